"""Sweeps on a real cluster: the best checkpoint wins, whatever dies on the way."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import JobConfig
from orchestrator.progress import Silent
from orchestrator.storage import Folder
from orchestrator.tuning import tune

LR, BATCH = "training.learning_rate", "training.global_batch_size"


class Recorder(Silent):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    warn = say


@pytest.fixture
def shown() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def prepared(prepare_reviews: Callable[..., Any]) -> Any:
    return prepare_reviews([90, 70], validation=80)


@pytest.fixture
def job(tiny_model: str, tmp_path: Path) -> Callable[..., JobConfig]:
    """`job(search keys, **training keys)`: a job on the tiny model with a search section."""

    def make(search: dict[str, Any], **training: Any) -> JobConfig:
        return JobConfig.parse(
            {
                "storage": str(tmp_path),
                "task": {"name": "text-classification", "labels": ["bad", "good"]},
                "model": {"base": tiny_model},
                "data": {"train": "unused"},
                "training": {"global_batch_size": 16, "num_train_epochs": 3, "learning_rate": 1e-4, "precision": "fp32", **training},
                "resources": {"start_timeout_s": 30},
                "search": search,
            }
        )

    return make


def states(folder: Path) -> dict[int, dict[str, Any]]:
    """Number -> what a trial says of itself."""
    found = [json.loads(path.read_text()) for path in folder.glob("trials/*/trial.json")]
    return {state["number"]: state for state in found}


def test_a_sweep_ends_with_the_best_checkpoint_of_the_best_trial(
    ray_session: Any, job: Callable[..., JobConfig], prepared: Any, tmp_path: Path, shown: Recorder
) -> None:
    import ray.util

    search = {
        "space": {LR: {"loguniform": [1e-5, 1e-2]}, BATCH: {"choice": [16, 32]}},
        "num_trials": 6, "start": [{LR: 3e-3}, {LR: 1e-2, BATCH: 32}], "seed": 1,
    }  # fmt: skip
    folder = tmp_path / "search"
    record = tune(job(search), prepared, Folder(str(folder)), shown)
    assert [trial.number for trial in record.trials] == list(range(6))
    assert [trial.origin for trial in record.trials] == ["default", "start", "start", "search", "search", "search"]
    assert record.trials[0].status == "done"  # the job as it is written runs to its end
    assert record.stopped_by is None
    best = max(report["accuracy"] for trial in record.trials for report in trial.reports)
    winner = next(trial for trial in record.trials if trial.id == record.best)
    assert winner.best is not None
    assert winner.best["accuracy"] == best == record.train.metrics["accuracy"]
    assert record.train.best_step == winner.best["step"]
    assert record.sample == winner.sample
    assert record.default is not None
    assert (Path(record.train.bundle) / "manifest.json").exists()
    assert Path(record.report or "").exists()
    # Two processes ran them all, and nothing is left of Tune.
    assert len({trial.pid for trial in record.trials}) == 2
    assert sum(trial.warm for trial in record.trials) == 4
    assert not (folder / "ray").exists()
    assert [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"] == []
    kept = [trial.number for trial in record.trials if (Path(trial.folder) / "checkpoints").exists()]
    assert set(kept) >= {0, winner.number}
    assert len(kept) <= 4


class Killer(threading.Thread):
    """Calls `kill` with what the first trial that `fits` says of itself; what goes wrong in it comes out of `done`."""

    def __init__(self, folder: Path, fits: Callable[[dict[str, Any]], bool], kill: Callable[[dict[str, Any]], None]):
        super().__init__(daemon=True)
        self._folder, self._fits, self._kill = folder, fits, kill
        self.state: dict[str, Any] | None = None
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while self.state is None and time.monotonic() < deadline:
            time.sleep(0.02)
            self.state = next((state for state in states(self._folder).values() if state["figures"] and self._fits(state)), None)
        if self.state is not None:
            self._kill(self.state)

    def done(self) -> dict[str, Any]:
        self.join(60)
        assert self.state is not None, "no trial was killed"
        return self.state


def steps(folder: str) -> list[int]:
    """The optimizer steps that a trial's final weights come from."""
    return [json.loads(line)["step"] for line in (Path(folder) / "history.jsonl").read_text().splitlines()]


LONG = {"num_train_epochs": 40, "save_steps": 10}


def test_a_sweep_outlives_a_process_and_a_node_and_a_diverging_trial_is_a_line(
    ray_session: Any, job: Callable[..., JobConfig], prepared: Any, tmp_path: Path, shown: Recorder
) -> None:
    import psutil
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.head_node = ray._private.worker._global_node  # type: ignore[attr-defined]
    node = cluster.add_node(wait=False, num_cpus=1, object_store_memory=80 * 2**20)
    deadline = time.monotonic() + 60
    while sum(found["Alive"] for found in ray.nodes()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)

    def on_node(state: dict[str, Any]) -> bool | None:
        try:
            return any(node._raylet_socket_name in " ".join(parent.cmdline()) for parent in psutil.Process(state["pid"]).parents())
        except psutil.NoSuchProcess:
            return None

    def elsewhere(state: dict[str, Any]) -> bool:
        lost = of_node.state is not None and of_node.state["number"] == state["number"]  # its process outlives its raylet by a moment
        return not lost and on_node(state) is False

    search = {
        "space": {LR: {"choice": [1e-4, 1e-3, 3e-3, 1e12]}, "training.max_grad_norm": {"choice": [0.0, 1.0]}}, "num_trials": 5,
        "include_default": False, "scheduler": "none", "algorithm": "random",
        "start": [{LR: 1e12, "training.max_grad_norm": 0.0}, {LR: 3e-3}, {LR: 1e-3}, {LR: 1e-4}],
    }  # fmt: skip
    folder = tmp_path / "search"
    of_node = Killer(folder, lambda state: bool(on_node(state)), lambda state: cluster.remove_node(node, allow_graceful=False))
    of_process = Killer(folder, elsewhere, lambda state: os.kill(state["pid"], signal.SIGKILL))
    record = tune(job(search, **LONG), prepared, Folder(str(folder)), shown)
    assert "3 trials at once" in " ".join(shown.said)
    lost = {of_node.done()["number"], of_process.done()["number"]}
    assert len(lost) == 2
    diverged, *others = record.trials
    for trial in others:
        assert (trial.status, trial.restarts, trial.halvings) == ("done", int(trial.number in lost), 0)
        assert states(folder)[trial.number]["attempts"] == 1 + trial.restarts
        assert steps(trial.folder) == list(range(1, 401))  # each step once
        assert [report["step"] for report in trial.reports] == sorted({report["step"] for report in trial.reports})
    assert sum("starts again" in sentence for sentence in shown.said) == 2
    assert diverged.status == "failed"
    assert diverged.error is not None
    assert "learning rate" in diverged.error
    assert diverged.log is not None
    assert "Diverged" in Path(diverged.log).read_text()
    assert states(folder)[0]["attempts"] == 1  # with the same setting it would fail again
    assert any(f"trial 0 failed: {diverged.error}; log: {diverged.log}" in sentence for sentence in shown.said)


def test_a_population_moves_weights_and_its_schedule_can_be_followed(
    ray_session: Any, job: Callable[..., JobConfig], prepared: Any, tmp_path: Path, shown: Recorder
) -> None:
    search = {
        "space": {LR: {"loguniform": [1e-7, 1e-2]}}, "num_trials": 3, "scheduler": "pbt", "include_default": False,
        "start": [{LR: 1e-7}, {LR: 3e-3}, {LR: 1e-3}], "report_every": 1,
    }  # fmt: skip
    one = job(search, num_train_epochs=4)
    record = tune(one, prepared, Folder(str(tmp_path / "search")), shown)
    assert record.schedule is not None
    lines = [json.loads(line) for line in Path(record.schedule).read_text().splitlines()]
    moves = [line for line in lines if line.get("parent")]
    assert moves
    assert lines[-1] == {"best": record.best}
    taker = next(trial for trial in record.trials if trial.id == moves[0]["trial"])
    assert taker.parent is not None
    assert steps(taker.folder) == list(range(1, 41))  # its parent's steps, then its own
    again = one.model_copy(update={"search": one.search.model_copy(update={"replay": record.schedule, "max_concurrent_trials": 1})})  # type: ignore[union-attr]
    followed = tune(again, prepared, Folder(str(tmp_path / "replay")), shown)
    assert len(followed.trials) == 1
    assert followed.train.metrics == pytest.approx(record.train.metrics, abs=1e-5)
