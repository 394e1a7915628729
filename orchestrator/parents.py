"""One job's result as the next one's base: what `run:JOB` and `model:NAME@alias` in `model.base` stand for.

It is settled once, when a run begins, and written into its job.json; a run that goes on has the same base, whatever has
been trained since.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from orchestrator import bundle as bundles
from orchestrator.bases import SCHEMES
from orchestrator.config import JobConfig
from orchestrator.errors import InputError, did_you_mean
from orchestrator.registry import Registry
from orchestrator.storage import Folder

_RECORDS = ("refit", "search", "train")
"""Of the stage whose bundle is a run's result, the last one that may be there first."""
_NEVER = datetime.fromtimestamp(0, UTC)


def settled(job: JobConfig, *, fresh: bool = False) -> JobConfig:
    """The job with `model.parent` said where its base is another job's result.

    The run's own folder knows it where the run has begun, unless `fresh`. Raises `InputError` where there is no such result
    or it is of another modality.
    """
    base = job.model.base
    if not base.startswith(SCHEMES) or job.model.parent is not None:
        return job
    begun = Folder(job.storage) / job.run_id / "job.json"
    parent = begun.read_json()["model"].get("parent") if begun.exists() and not fresh else None
    if parent is None:
        kind, _, name = base.partition(":")
        parent = _result_of(job, name) if kind == "run" else _registered(job, name)
    _require_same_modality(job, parent)
    return job.model_copy(update={"model": job.model.model_copy(update={"parent": parent})})


def _registered(job: JobConfig, name: str) -> str:
    try:
        return Registry(job.registry.uri, Folder(job.storage)).resolve(name).bundle
    except InputError as error:
        raise InputError(f"model.base: {error}") from error


def _result_of(job: JobConfig, name: str) -> str:
    """URI of the bundle of the newest run called `name` in the storage that has one."""
    storage = Folder(job.storage)
    runs = list(_runs(storage))
    mine = [run for run, called in runs if called == name and run != job.run_id]
    if not mine:
        names = sorted({called for _, called in runs})
        raise InputError(
            f"model.base: there is no run of a job called {name!r} in {storage}.{did_you_mean(name, names) if names else ' It has none yet.'}"
        )
    finished = [(when, run, bundle) for run in mine for when, bundle in _results(storage / run)]
    if not finished:
        raise InputError(
            f"model.base: the run {mine[-1]} of {name!r} has not finished its training, so there is no model yet; run that job to its end first."
        )
    return max(finished)[2]


def _runs(storage: Folder) -> Iterator[tuple[str, str]]:
    """The folder of each run and the name of its job."""
    for run in storage.names():
        place = storage / run / "job.json"
        if place.exists():
            yield run, str(place.read_json().get("name"))


def _results(run: Folder) -> Iterator[tuple[datetime, str]]:
    """When a run's result was recorded, and its bundle; nothing where there is none."""
    for stage in _RECORDS:
        place = run / "records" / f"{stage}.json"
        if place.exists():
            record: dict[str, Any] = place.read_json()["record"]
            bundle = record.get("train", record)["bundle"]
            if (Folder(bundle) / "manifest.json").exists():
                yield place.filesystem.get_file_info(place.path).mtime or _NEVER, bundle
                return


def _require_same_modality(job: JobConfig, parent: str) -> None:
    task = bundles.load(parent).task
    if task.modality != job.task.modality:
        raise InputError(
            f"model.base: {job.model.base} is a model for {task.modality} ({task.key}), and the task {job.task.key} needs one for {job.task.modality}."
        )
