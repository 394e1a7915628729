"""`run:JOB` and `model:NAME@alias` as bases: which bundle they stand for, once and for all of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import bundle, parents, processors
from orchestrator.config import JobConfig
from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks import create
from tests.fixtures.tiny import text_base
from tests.unit.families import Made


def job(tmp_path: Path, base: str = "run:pretrain", **more: Any) -> JobConfig:
    return JobConfig.parse(
        {
            "name": "reviews",
            "storage": str(tmp_path / "runs"),
            "task": "text-classification",
            "model": {"base": base},
            "data": {"train": "a.csv"},
        }
        | more
    )


def a_run(tmp_path: Path, run: str, name: str, *, when: int = 0, stage: str = "train", finished: bool = True) -> Path:
    """A run's folder, with the record of a bundle where it is finished."""
    folder = tmp_path / "runs" / run
    (folder / "records").mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"name": name, "model": {"base": "x"}}))
    place = folder / "train-0" / "bundle"
    if finished:
        task = create({"name": "text-classification", "labels": ["a", "b"]})
        base = text_base(tmp_path / f"base-{run}", ["good bad"])
        bundle.write(
            Folder(str(place)), model=task.model(base, dtype=torch.float32), processor=processors.of(task, base), task=task, job={},
            lineage={"run": run}, metrics={},
        )  # fmt: skip
        record = {"bundle": str(place)}
        records = folder / "records" / f"{stage}.json"
        records.write_text(json.dumps({"record": {"train": record} if stage == "search" else record}))
        os.utime(records, (1_700_000_000 + when,) * 2)
    return place


def test_it_is_the_newest_finished_run_of_that_name_and_stays_that(tmp_path: Path) -> None:
    a_run(tmp_path, "pretrain-1", "pretrain", when=1)
    newest = a_run(tmp_path, "pretrain-2", "pretrain", when=3, stage="search")
    a_run(tmp_path, "pretrain-3", "pretrain", finished=False)
    a_run(tmp_path, "pretrain-more-1", "pretrain-more", when=9)
    given = job(tmp_path)
    settled = parents.settled(given)
    assert settled.model.parent == str(newest) and settled.model.base == "run:pretrain"
    assert settled.run_id == given.run_id
    folder = Folder(settled.storage) / settled.run_id
    (folder / "job.json").write_json(settled.to_json())

    later = a_run(tmp_path, "pretrain-4", "pretrain", when=5)
    assert parents.settled(given).model.parent == str(newest)
    assert parents.settled(given, fresh=True).model.parent == str(later)
    assert parents.settled(settled) is settled


def test_other_bases_stay_as_they_are(tmp_path: Path) -> None:
    given = job(tmp_path, base="example://minilm")
    assert parents.settled(given) is given


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no run of a job called 'pretrain' in .*runs\. It has none yet\."):
        parents.settled(job(tmp_path))
    a_run(tmp_path, "pretrain-1", "pretrain", finished=False)
    with pytest.raises(InputError, match=r"called 'pretrian' in .*runs\. Did you mean 'pretrain'\?"):
        parents.settled(job(tmp_path, "run:pretrian"))
    with pytest.raises(InputError, match=r"the run pretrain-1 of 'pretrain' has not finished its training"):
        parents.settled(job(tmp_path))
    with pytest.raises(InputError, match=r"model\.base: MODEL: there is no registry"):
        parents.settled(job(tmp_path, "model:pretrain@champion"))


def test_a_model_of_another_modality_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(tmp_path, "pretrain-1", "pretrain")
    given = job(tmp_path, task={"name": "tests.unit.families:Made", "family": "vit"})
    monkeypatch.setattr(Made, "modality", "image")
    with pytest.raises(
        InputError,
        match=r"run:pretrain is a model for text \(text-classification\), and the task tests.unit.families:Made needs one for image",
    ):
        parents.settled(given)
