"""How many trials run at once, and what each gets, on clusters that aren't here."""

from typing import Any

import pytest

from orchestrator.config import JobConfig
from orchestrator.errors import InputError
from orchestrator.search.places import GIB, places


def job(**search: Any) -> JobConfig:
    given = {"space": {"training.learning_rate": {"loguniform": [1e-5, 1e-3]}}, **search}
    return JobConfig.parse({"task": "text-classification", "model": {"base": "b"}, "data": {"train": "a"}, "search": given})


def nodes(*sizes: tuple[float, float], memory: float = 0.0) -> list[dict[str, float]]:
    return [{"CPU": cpus, "GPU": gpus, "memory": memory} for cpus, gpus in sizes]


@pytest.mark.parametrize(
    ("search", "cluster", "found"),
    [
        ({}, nodes((2, 0)), (2, 1, 0)),
        ({}, nodes((16, 0), (16, 0)), (20, 1, 0)),  # num_trials
        ({"num_trials": 3}, nodes((16, 0)), (3, 5, 0)),
        ({"max_concurrent_trials": 2}, nodes((16, 0)), (2, 8, 0)),
        ({"cpus_per_trial": 0.5}, nodes((2, 0)), (4, 0.5, 0)),
        ({"gpus_per_trial": 0.25}, nodes((16, 2)), (8, 2, 0.25)),
        ({"gpus_per_trial": 1}, nodes((64, 1), (4, 0)), (1, 8, 1)),
    ],
)
def test_places_fill_the_cluster(search: dict[str, Any], cluster: list[dict[str, float]], found: tuple[int, float, float]) -> None:
    given = places(job(**search), cluster)
    assert (given.at_once, given.cpus, given.gpus) == found
    assert given.threads == max(1, int(given.cpus))


def test_trials_on_cpus_are_no_more_than_the_memory_holds() -> None:
    given = places(job(), nodes((16, 0), memory=32 * GIB), weights=GIB)
    assert (given.at_once, given.cpus) == (5, 3)  # 5.7 GiB each


@pytest.mark.parametrize(("weights", "share"), [(100 * 2**20, 0.25), (4 * GIB, 0.5), (9 * GIB, 1.0), (40 * GIB, 1.0), (0, 1.0)])
def test_small_models_share_a_gpu(weights: int, share: float) -> None:
    given = places(job(), nodes((16, 1)), weights=weights, gpu_memory=80 * GIB)
    assert given.gpus == share
    assert given.at_once == 1 / share


def test_trials_that_pause_are_bounded_by_room_alone() -> None:
    given = places(job(scheduler="pbt", num_trials=6, max_concurrent_trials=2, cpus_per_trial=1), nodes((8, 0)))
    assert (given.at_once, given.cpus) == (2, 3)


def test_several_workers_a_trial_are_counted_by_whole_groups() -> None:
    given = places(job(workers_per_trial=2), nodes((4, 0), (3, 0)))
    assert (given.at_once, given.cpus, given.workers, given.worker_cpus) == (3, 0, 2, 1)
    assert given.sentence == "3 trials at once, each with 2 workers with 1 CPU each and 1 thread"


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (
            {"cpus_per_trial": 4},
            r"a trial asks for 4 CPU, and no node has that: node 1: 2 CPU; node 2: 2 CPU\. Lower search\.cpus_per_trial",
        ),
        ({"gpus_per_trial": 1}, r"a trial asks for .* and 1 GPU, and no node has that"),
        ({"workers_per_trial": 5}, r"search\.workers_per_trial: 5 workers ask for 1 CPU each, and 4 of them fit"),
    ],
)
def test_what_fits_nowhere_is_refused_with_what_there_is(search: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        places(job(**search), nodes((2, 0), (2, 0)))
