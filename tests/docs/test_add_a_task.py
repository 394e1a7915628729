"""The guide's task, from outside of the product, through everything that a run does with it; on Ray like any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import bundle, loop, models, predictor, processors, tasks
from orchestrator.config import CheckpointSection, ModelSection, TrainingSection
from orchestrator.predictor import Predictor
from orchestrator.storage import Folder
from orchestrator.tasks.base import RowError
from orchestrator.validation import Validation
from tests.docs.test_docs import write_named
from tests.fixtures.tiny import text_base
from tests.unit.tiny import Batches

WORDS = ["awful", "poor", "fair", "good", "great"]
ROWS = [
    {"text": f"the phone is {word} {'and more ' * (number % 3)}", "grade": grade}
    for number in range(6)
    for grade, word in enumerate(WORDS, 1)
]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    write_named(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tasks.create("grading:Grading")


def test_it_is_short(tmp_path: Path) -> None:
    write_named(tmp_path)
    assert len((tmp_path / "grading.py").read_text(encoding="utf-8").splitlines()) <= 80  # with the line of its name


def test_it_trains_is_saved_and_answers(task: Any, tmp_path: Path) -> None:
    assert tasks.create(task.to_json()) == task and task.key == "grading:Grading"
    for wrong in ({"text": "x", "grade": 6}, {"text": "x", "grade": "2.5"}, {"text": "", "grade": 1}, {"text": "x", "grade": None}):
        with pytest.raises(RowError):
            task.clean(wrong)
    rows = [{**task.clean(row), "row_id": f"rows.csv:{place}"} for place, row in enumerate(ROWS)]
    assert task.clean({"text": "x", "grade": "4.0"}) == {"text": "x", "grade": 4}
    base = text_base(tmp_path / "base", [row["text"] for row in rows])
    processor = processors.of(task, base)
    task = task.fit({"train": task.observe(rows)})
    encoded = task.encode(rows, processor)
    examples = [{**example, "row_id": row["row_id"]} for row, its in zip(rows, encoded, strict=True) for example in its]
    model = models.load(task, ModelSection(base=base), precision="fp32")
    settings = TrainingSection.parse({"learning_rate": 3e-3, "num_train_epochs": 80, "global_batch_size": 10, "precision": "fp32"})
    validate = Validation(
        task, processor, [[(place, row, its) for place, (row, its) in enumerate(zip(rows, encoded, strict=True))]], precision="fp32"
    )
    history = list(
        loop.train(
            task, model, processor, settings, Batches(examples, 10), folder=Folder(str(tmp_path / "run")), validate=validate,
            global_batch_size=10, identity="x", checkpoint=CheckpointSection(),
        )
    )  # fmt: skip
    scored = [progress.metrics for progress in history if progress.metrics]
    assert scored[-1]["mae"] < 0.5 < scored[0]["mae"]
    assert history[-1].best_value == min(one["mae"] for one in scored)

    together = predictor.forward(task, model, processor, examples, tokens=10_000, precision="fp32")
    [alone] = predictor.forward(task, model, processor, examples[:1], tokens=10_000, precision="fp32")
    assert abs(alone - together[0]).max() < 1e-5
    place = Folder(str(tmp_path / "bundle"))
    bundle.write(place, model=model, processor=processor, task=task, job={}, lineage={}, metrics={})
    served = Predictor(bundle.load(place.uri), precision="fp32")
    asked = served.task.rows_from(["the phone is great", "the phone is awful"])
    answers = served.task.answer(served(asked), None, single=False)
    assert answers[0]["grade"] > 4 and answers[1]["grade"] < 2 and all(math.isfinite(one["grade"]) for one in answers)
    assert isinstance(model, torch.nn.Module)
