"""Trials in the processes of Ray Tune: with workers of their own, with rows that are streamed, one after another in a process."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import bundle
from orchestrator.config import JobConfig
from orchestrator.search import trial
from orchestrator.search.space import Space, data_key
from orchestrator.search.sweep import Sweep, read_state
from orchestrator.storage import Folder
from tests.ray.conftest import dies_at

RATE = "training.learning_rate"
STEPS, EPOCHS = 7, 2


@pytest.fixture(scope="module")
def prepared(prepare_reviews: Callable[..., Any]) -> Any:
    return prepare_reviews([70, 41], 30)


@pytest.fixture
def sweep(ray_session: Any, prepared: Any, tiny_model: str, tmp_path: Path) -> Callable[..., Sweep]:
    def make(name: str, **search: Any) -> Sweep:
        job = JobConfig.parse(
            {
                "task": prepared.task.to_json(),
                "model": {"base": tiny_model},
                "data": {"train": "unused.csv"},
                "training": {"num_train_epochs": EPOCHS, "global_batch_size": 16, "precision": "fp32"},
                "search": {"space": {RATE: {"loguniform": [1e-5, 1e-1]}}, "scheduler": "none", **search},
            }
        )
        space = Space.of(job)
        return Sweep(job, space, Folder(str(tmp_path / name)), {data_key(job): prepared for job in space.data_variants()}, 2 / STEPS)

    return make


def config(number: int, rate: float) -> dict[str, Any]:
    return {"sample": {RATE: rate}, "number": number, "origin": "search"}


def in_tune(
    sweep: Sweep,
    rates: list[float],
    *,
    cpus: float,
    stop: Callable[[dict[str, Any]], bool],
    resident: int | None = None,
    workers: Callable[[Any], Any] | None = None,
) -> Any:
    """Runs trials one after another; `stop` is asked at each report, `resident` bounds the rows that a process keeps.

    `workers` takes the place of `training._worker_function`.
    """
    from ray import tune

    def search_trial(config: dict[str, Any]) -> None:
        from orchestrator import training
        from orchestrator.data import resident as kept

        training._worker_function = workers or training._worker_function
        kept.RESIDENT_ROWS = kept.RESIDENT_ROWS if resident is None else resident
        trial.trainable(config, sweep=sweep)

    search_trial.__mixins__ = trial.trainable.__mixins__  # pyright: ignore[reportFunctionMemberAccess]
    tuner = tune.Tuner(
        tune.with_resources(search_trial, {"cpu": cpus} if cpus else {"memory": 2**20}),
        param_space=tune.grid_search([config(number, rate) for number, rate in enumerate(rates)]),
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=tune.RunConfig(name="ray", storage_path=sweep.folder.path, stop=lambda _, result: stop(result), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    return results


def losses(folder: Folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_bytes().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def heard(sweep: Sweep, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs a trial in this process; what it reported."""
    reports: list[dict[str, Any]] = []
    trial.run(sweep, given, trial_id="here", report=lambda values, _: reports.append(values))
    return reports


def test_a_trial_with_workers_is_one_with_one_worker_stops_in_order_and_outlives_a_worker(
    sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    """The second trial needs both CPUs, so the first must have given its workers' back, although only a report could tell it to end.

    A worker of the second dies between two checkpoints.
    """
    import ray

    alone = sweep("alone")
    expected = heard(alone, config(0, 2e-3))
    ours = sweep("workers", workers_per_trial=2)
    died = tmp_path / "died"
    in_tune(
        ours, [2e-3, 1e-3], cpus=0, stop=lambda result: result["config"]["number"] == 0 and result["step"] >= 4,
        workers=dies_at(STEPS + 2, died),
    )  # fmt: skip
    assert died.exists()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2
    assert {group["state"] for group in ray.util.placement_group_table().values()} <= {"REMOVED"}
    first, second = (ours.trial_folder(config(number, rate)) for number, rate in enumerate((2e-3, 1e-3)))
    states = [read_state(folder) for folder in (first, second)]
    assert [state and state["status"] for state in states] == ["stopped", "done"]
    assert len(losses(first)) == 4
    heard(alone, config(1, 1e-3))
    assert losses(second) == pytest.approx(losses(alone.trial_folder(config(1, 1e-3))), abs=1e-4)
    assert len(losses(second)) == EPOCHS * STEPS
    assert losses(first) == pytest.approx(losses(alone.trial_folder(config(0, 2e-3)))[:4], abs=1e-4)
    last = json.loads((first / "reports.jsonl").read_bytes().splitlines()[-1])
    assert last["accuracy"] == pytest.approx(expected[1]["accuracy"], abs=1e-3)
    record = trial.write_bundle(ours, first, last["best_step"])
    assert (record.num_workers, record.steps) == (2, 4)
    assert bundle.load(record.bundle).lineage["search"]["number"] == 0
    assert not (first / "ray").exists()


def test_a_trial_whose_rows_are_too_many_to_keep_streams_them_in_the_same_order(sweep: Callable[..., Sweep]) -> None:
    kept, streamed = sweep("kept"), sweep("streamed")
    reports = {rate: heard(kept, config(0, rate)) for rate in (2e-3, 1e-3)}
    results = in_tune(streamed, [2e-3, 1e-3], cpus=1, stop=lambda _: False, resident=10)
    for rate in (2e-3, 1e-3):
        assert losses(streamed.trial_folder(config(0, rate))) == losses(kept.trial_folder(config(0, rate)))
    assert [result.metrics["accuracy"] for result in results] == [reports[rate][-1]["accuracy"] for rate in (2e-3, 1e-3)]
    states = [read_state(streamed.trial_folder(config(0, rate))) for rate in (2e-3, 1e-3)]
    assert [state and state["warm"] for state in states] == [False, True]
    assert len({state and state["pid"] for state in states}) == 1
