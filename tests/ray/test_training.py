"""Training on Ray: parallelism is true, what died continues, what can't start says so."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import bundle, training
from orchestrator.config import JobConfig
from orchestrator.errors import StageError
from orchestrator.progress import Silent
from orchestrator.records import TrainRecord
from orchestrator.storage import Folder
from tests.ray.conftest import dies_at

FILES, VALIDATION, BATCH = [70, 41], 30, 16
STEPS, EPOCHS = 7, 3  # 111 rows an epoch


class Heard(Silent):
    """A display that remembers."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.steps: list[float] = []

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)

    warn = say

    def step(self, done: float, total: float | None, unit: str = "steps", *, left: float | None = None, **fields: float | str) -> None:
        self.steps.append(done)


def job(model: str, workers: int, **sections: Any) -> JobConfig:
    value = {
        "task": "text-classification",
        "model": {"base": model},
        "data": {"train": "unused.csv"},
        "training": {
            "learning_rate": 4e-3,
            "num_train_epochs": EPOCHS,
            "global_batch_size": BATCH,
            "precision": "fp32",
            "record_rows": True,
            "save_steps": 3,
        },
        "resources": {"num_workers": workers, "cpus_per_worker": 1},
    }
    for name, section in sections.items():
        value[name] = {**value.get(name, {}), **section}
    return JobConfig.parse(value)


def history(record: TrainRecord) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(record.history).read_text().splitlines()]


def losses(record: TrainRecord) -> list[float]:
    lines = history(record)
    assert [line["step"] for line in lines] == list(range(1, record.steps + 1))
    return [line["loss"] for line in lines]


def rows(folder: Path) -> dict[tuple[int, int], list[str]]:
    """(epoch, step) -> the row ids that all workers recorded."""
    seen: dict[tuple[int, int], list[str]] = {}
    for file in sorted((folder / "rows").iterdir()):
        for line in map(json.loads, file.read_text().splitlines()):
            seen.setdefault((line["epoch"], line["step"]), []).extend(line["row_ids"])
    return {place: sorted(ids) for place, ids in seen.items()}


def weights(record: TrainRecord) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(bundle.load(record.bundle).model / "model.safetensors")


@pytest.fixture(scope="module")
def prepared(prepare_reviews: Callable[..., Any]) -> Any:
    return prepare_reviews(FILES, VALIDATION)


@pytest.fixture(scope="module")
def alone(ray_session: Any, prepared: Any, tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRecord, Path]:
    """One worker, from start to end: what the others are held against."""
    folder = tmp_path_factory.mktemp("alone")
    return training.train(job(tiny_model, 1), prepared, Folder(str(folder)), Silent()), folder


def test_one_worker_learns_and_leaves_a_bundle(alone: tuple[TrainRecord, Path], prepared: Any) -> None:
    record, folder = alone
    found = losses(record)
    assert sum(found[-STEPS:]) < 0.75 * sum(found[:STEPS])
    assert record.metrics["accuracy"] > 0.6
    assert 0.3 < record.metrics["loss"] < 1.0
    assert (record.steps, record.epochs, record.rows_seen, record.num_workers, record.global_batch_size) == (
        EPOCHS * STEPS,
        float(EPOCHS),
        EPOCHS * 111,
        1,
        BATCH,
    )
    assert record.truncated_share == 0.0
    assert record.examples_per_second > 0
    assert record.peak_memory_bytes > 50 * 2**20
    assert {"workers", "imports", "model", "first_rows", "first_step", "total"} <= set(record.timings)
    made = bundle.load(record.bundle)
    assert made.metrics == {"validation": record.metrics}
    assert made.lineage["data"]["fingerprint"] == prepared.fingerprint
    assert not (folder / "ray").exists()
    validated = [line for line in history(record) if "metrics" in line]
    assert [line["step"] for line in validated] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_two_workers_on_two_cpus_do_what_one_does(alone: tuple[TrainRecord, Path], prepared: Any, tiny_model: str, tmp_path: Path) -> None:
    """No CPU is left for encoding here, and yet nothing waits for ever."""
    heard = Heard()
    record = training.train(job(tiny_model, 2), prepared, Folder(str(tmp_path)), heard)
    assert record.num_workers == 2
    assert losses(record) == pytest.approx(losses(alone[0]), abs=1e-4)
    one, two = weights(alone[0]), weights(record)
    assert one.keys() == two.keys()
    # a key's bias cancels in the softmax: its gradient is rounding noise, from which Adam makes steps
    assert max(float((one[name] - two[name]).abs().max()) for name in one if not name.endswith("key.bias")) < 1e-3
    assert record.metrics == pytest.approx(alone[0].metrics, abs=1e-3)
    assert rows(tmp_path) == rows(alone[1])
    everything = sorted(f"train-{file}:{row}" for file, count in enumerate(FILES) for row in range(count))
    for epoch in range(EPOCHS):
        assert sorted(row for (number, _), ids in rows(tmp_path).items() if number == epoch for row in ids) == everything
    assert len(list((tmp_path / "rows").iterdir())) == 2
    assert heard.steps[-1] == EPOCHS * STEPS


@pytest.fixture
def dies_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`dies_once(step)`: the last worker's process ends at that step, the first time it gets there."""
    marker = tmp_path / "died"

    def arrange(step: int) -> None:
        monkeypatch.setattr(training, "_worker_function", dies_at(step, marker))

    return arrange


def test_a_killed_worker_costs_time_and_nothing_else(
    alone: tuple[TrainRecord, Path], prepared: Any, tiny_model: str, tmp_path: Path, dies_once: Callable[[int], None]
) -> None:
    dies_once(STEPS + 4)
    heard = Heard()
    record = training.train(job(tiny_model, 2), prepared, Folder(str(tmp_path / "run")), heard)
    assert (tmp_path / "died").exists()
    assert record.resumed_from is not None
    assert 0 < record.resumed_from <= STEPS + 4
    assert losses(record) == pytest.approx(losses(alone[0]), abs=1e-4)
    assert rows(tmp_path / "run") == rows(alone[1])
    assert any("The workers start again" in sentence for sentence in heard.sentences)
    assert f"continues from the checkpoint of step {record.resumed_from} of {EPOCHS * STEPS}" in heard.sentences


def test_what_a_worker_says_reaches_the_user_as_it_stands_and_at_once(
    prepared: Any, ray_session: Any, tiny_model: str, tmp_path: Path
) -> None:
    heard = Heard()
    with pytest.raises(StageError, match=r"^The (loss|gradient) became .* at step \d+ \(learning rate .*\), in the rows train-"):
        training.train(
            job(tiny_model, 2, training={"learning_rate": 1e38, "warmup_ratio": 0, "max_grad_norm": 0}),
            prepared,
            Folder(str(tmp_path)),
            heard,
        )
    assert not any("start again" in sentence for sentence in heard.sentences)


def test_workers_that_cannot_be_placed_are_named_in_time(prepared: Any, ray_session: Any, tiny_model: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(
        StageError, match=r"3 workers with 1 CPU each could not be placed within 3 s\. The nodes have: node 1: 2 CPU; free now: 2 CPU"
    ):
        training.train(job(tiny_model, 3, resources={"start_timeout_s": 3}), prepared, Folder(str(tmp_path)), Silent())
    assert time.monotonic() - began < 60


def test_early_stopping_ends_all_workers_at_the_same_step(prepared: Any, ray_session: Any, tiny_model: str, tmp_path: Path) -> None:
    heard = Heard()
    patient = {
        "early_stopping_patience": 1,
        "early_stopping_threshold": 1.0,
        "metric_for_best_model": "eval_loss",
        "num_train_epochs": 50,
        "eval_steps": 4,
    }
    record = training.train(job(tiny_model, 2, training=patient), prepared, Folder(str(tmp_path)), heard)
    assert record.steps == 8
    assert any(sentence.startswith("stopped early at step 8") for sentence in heard.sentences)
    assert not [thread for thread in threading.enumerate() if thread.name == "train"]
