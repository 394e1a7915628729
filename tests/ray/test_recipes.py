"""Every recipe that ships, on its real data and base model: checked, prepared, two steps, a bundle, scores and an answer.

Ray prepares the data; the rest is what a worker and a replica do, without the half minute that starting them takes. Whole runs
through Ray Train and Ray Serve are in tests/e2e; the figures in the recipes come from such runs.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest

from jobs import validate
from orchestrator import bundle, loop, models, processors, scratch
from orchestrator.config import CheckpointSection, load
from orchestrator.data.prepare import prepare
from orchestrator.predictor import Losses, Predictor
from orchestrator.progress import Silent
from orchestrator.records import PreparedData
from orchestrator.storage import Folder
from tests.unit.tiny import Batches

RECIPES = sorted((Path(__file__).parent.parent.parent / "jobs" / "recipes").rglob("*.yaml"))
ROWS = 8


class Same(Batches):
    """All examples in every step, those of a row together."""

    def batch(self, epoch: int, step: int) -> list[Any]:
        return self.examples


def first_rows(prepared: PreparedData, split: str, count: int) -> list[dict[str, Any]]:
    roles = prepared.task.columns()
    tables = (pq.read_table(Path(prepared.root) / file.path) for file in prepared.splits[split].files)
    every = (row for table in tables for row in table.slice(0, count).to_pylist())
    return [
        {name: value for name, value in row.items() if value is not None and (name in roles or name == "row_id")}
        for row in itertools.islice(every, count)
    ]


@pytest.mark.network
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_goes_from_its_data_to_an_answer(recipe: Path, ray_session: Any, tmp_path: Path) -> None:
    job = load(recipe, storage=str(tmp_path / "runs"))
    assert [check.sentence for check in validate.main(job, register=False, serve=False) if check.ok is False] == []
    prepared = prepare(job, Folder(job.storage), Silent())
    assert set(prepared.splits) >= {"train", "validation", "test"}
    task, section = prepared.task, scratch.based(job.model, prepared, seed=1)
    processor = processors.of(task, models.resolve(section.base, section.revision))
    model = models.load(task, section, precision="fp32")

    rows = first_rows(prepared, "train", ROWS)
    encoded = task.encode_to_train(rows, processor, list(range(len(rows))))
    examples = [{**example, "row_id": row["row_id"]} for row, its in zip(rows, encoded, strict=True) for example in its]
    settings = job.training.model_copy(update={"max_steps": 2, "precision": "fp32"})
    history = list(
        loop.train(
            task, model, processor, settings, Same(examples, len(examples)), folder=Folder(str(tmp_path / "train")), validate=None,
            global_batch_size=len(examples), identity="x", checkpoint=CheckpointSection(),
        )
    )  # fmt: skip
    assert len(history) == 2 and all(math.isfinite(progress.loss) for progress in history)

    place = Folder(str(tmp_path / "bundle"))
    bundle.write(place, model=models.merged(model), processor=processor, task=task, job=job.to_json(), lineage={}, metrics={})
    served = Predictor(bundle.load(place.uri), precision="fp32")
    held = first_rows(prepared, "test", 3)
    losses = Losses()
    predictions = served.score(held, losses)
    scores = served.task.score(predictions, held)  # pyright: ignore[reportArgumentType]
    assert scores.keys() <= {*served.task.metrics()} and all(math.isfinite(value) for value in scores.values())

    asked = served.task.rows_from(served.task.inputs_from(held[0]))
    answer = served.task.answer(served(asked), served.task.parameters(), single=True)
    jsonschema.validate(json.loads(json.dumps(answer, allow_nan=False)), served.task.answer_schema())
