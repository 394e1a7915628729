"""The searcher and the scheduler of Ray Tune for a space. Both know their metric: `TuneConfig` is given none.

Ray is imported when they are made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError
from orchestrator.records import TrialRecord
from orchestrator.search import rules
from orchestrator.search.space import Sample, Space
from orchestrator.storage import Folder

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

    from orchestrator.search.proposals import Proposals


def searcher(space: Space, *, known: Sequence[TrialRecord] = ()) -> Proposals:
    """What proposes the trials' samples. `known`: trials of an earlier start of this sweep.

    It gives `search.num_trials` in all, the known ones included, fewer where a finite space is exhausted, and says that the
    sweep is over when the last of them has ended. Raises `InputError`.
    """
    from orchestrator.search.proposals import Proposals

    search = space.search
    points = space.points()
    queued: list[tuple[str, Sample]] = [("start", point) for point in points]
    if search.include_default:
        queued[0] = ("default", points[0])
    if search.replay is not None:
        from orchestrator.search import population

        return Proposals(
            space, None, [*queued[: search.include_default], ("search", population.plan(space, Folder(search.replay))[0][1])], known
        )
    if search.algorithm == "grid":
        return Proposals(space, None, [*queued, *(("search", sample) for sample in space.grid())], known)
    from orchestrator.search import engines

    return Proposals(space, engines.engine(space, len(known)), queued, known)


def scheduler(space: Space, rows: int, *, schedule: Folder | None = None) -> TrialScheduler:
    """What stops or changes running trials, where the training split has `rows`. `schedule`: a population's file.

    Raises `InputError` where trials are too short for it.
    """
    from ray.tune.schedulers import FIFOScheduler

    search = space.search
    name = search.scheduler
    if name == "none":
        return FIFOScheduler()
    interval = space.report_every(rows) * rows
    last = validations(space, rows)
    least = math.ceil(search.reduction_factor) if name == "hyperband" else 2
    if last < least:
        raise InputError(
            f"search.scheduler: {name} decides at validations and needs {least} of a trial, and the longest has {last} (one every {interval:,.0f} "
            f"rows of at most {space.most_examples(rows):,}); give a smaller search.report_every, or set scheduler: none."
        )
    metric, higher = space.objectives[0]
    common: dict[str, Any] = {"interval": interval, "metric": metric, "mode": "max" if higher else "min"}
    if name in rules.MUTATING:
        from orchestrator.search import population

        if search.replay is not None:
            return population.Replay(population.plan(space, Folder(search.replay)), slack=interval / 2)
        kind = population.Bandit if name == "pb2" else population.Population
        return kind(space.parameters, schedule, perturbation_interval=_count(search.perturb_every, space, rows), **common)
    from orchestrator.search import schedulers

    if name == "median":
        return schedulers.Median(grace_period=_count(search.grace, space, rows), **common)
    if name == "hyperband":
        return schedulers.Bands(max_t=last, reduction_factor=search.reduction_factor, **common)
    return schedulers.Halving(
        max_t=last - 1,  # at its last validation a trial has all but ended: to stop it there saves nothing
        grace_period=min(last - 1, _count(search.grace, space, rows)),
        reduction_factor=search.reduction_factor,
        stop_last_trials=False,
        **common,
    )


def validations(space: Space, rows: int) -> int:
    """How often the longest trial is validated."""
    return max(1, round(space.most_examples(rows) / (space.report_every(rows) * rows)))


def rungs(space: Space, rows: int) -> tuple[int, ...]:
    """The rows at which the scheduler decides over a trial, before its end: as many as a trial has passed are its rung."""
    search, last = space.search, validations(space, rows)
    if search.scheduler in ("asha", "hyperband"):
        first = _count(search.grace, space, rows) if search.scheduler == "asha" else 1
        levels = [first * search.reduction_factor**level for level in range(64)]
    elif search.scheduler == "none":
        levels = []
    else:
        every = _count(search.grace if search.scheduler == "median" else search.perturb_every, space, rows)
        levels = range(every, last, every if search.scheduler in rules.MUTATING else 1)
    interval = space.report_every(rows) * rows
    return tuple(round((math.ceil(level) - 0.5) * interval) for level in levels if level < last)


def _count(epochs: float | None, space: Space, rows: int) -> int:
    """Epochs in validations; one where they are not given."""
    return 1 if epochs is None else max(1, round(epochs / space.report_every(rows)))
