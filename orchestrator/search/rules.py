"""What a `search` section may ask for: each rule is a sentence with the reason, said before anything starts."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence

from orchestrator.config import JobConfig, Parameter
from orchestrator.errors import InputError, did_you_mean
from orchestrator.search import paths

MUTATING = ("pbt", "pb2")
PAUSING = ("hyperband", "pbt", "pb2")
MUTABLE = tuple(
    f"training.{name}"
    for name in (
        "learning_rate",
        "weight_decay",
        "label_smoothing_factor",
        "max_grad_norm",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
    )
)
"""What may change in the middle of a training: nothing that its weights, its optimizer's moments or its steps are made of."""

_OTHER_ROWS = "trials would be scored on different rows, and such scores can't be compared"
_BY_THE_SWEEP = "the sweep validates all trials alike; set search.report_every"
_FIXED = {
    "name": "it names the run and decides nothing",
    "storage": "it says where files lie and decides nothing",
    "search": "a sweep doesn't search itself",
    "registry": "it is about versions of the finished model",
    "serving": "it is about the endpoint, which no trial has",
    "resources": "results don't depend on it; search.workers_per_trial, cpus_per_trial and gpus_per_trial say what a trial gets",
    "checkpoint": "results don't depend on it; the sweep keeps what can still win, within search.max_disk",
    "evaluation": "it says how models are scored, which must be the same for all trials",
    "data.validation": _OTHER_ROWS,
    "data.test": _OTHER_ROWS,
    "data.split": _OTHER_ROWS,
    "task.name": "scores of different tasks can't be compared",
    "training.eval_steps": _BY_THE_SWEEP,
    "training.save_steps": _BY_THE_SWEEP,
    "training.metric_for_best_model": "trials are compared by search.metric",
    "training.tokens_per_micro_batch": "results don't depend on it; a trial that runs out of memory halves it by itself",
    "training.record_rows": "results don't depend on it",
}


def decides_data(path: str) -> bool:
    """Is it part of what prepare is asked for?"""
    return paths.inside(path, "data") or paths.inside(path, "task")


def check_paths(job: JobConfig) -> None:
    """Raises `InputError` for a path that the job has not or that can't be searched, in `space` and in its conditions."""
    assert job.search is not None
    space, known = job.search.space, paths.known(job)
    for path, parameter in space.items():
        where = f"search.space.{path}"
        for fixed, reason in _FIXED.items():
            if paths.inside(path, fixed):
                raise InputError(f"{where} can't be searched: {reason}.")
        if path not in known:
            raise InputError(f"{where}: a job has no {path!r}.{paths.hint(path, job)}")
        if paths.is_section(known[path]):
            raise InputError(
                f"{where} is a whole section; name a key in it, as in {next(name for name in known if name.startswith(f'{path}.'))}."
            )
        if outer := next((other for other in space if other != path and paths.inside(path, other)), None):
            raise InputError(f"{where} is a part of {outer}, which is searched too; search one of them.")
        if decides_data(path):
            _check_data_path(job, path, parameter)
        for other in parameter.when:
            if other not in known:
                raise InputError(f"{where}.when: a job has no {other!r}.{paths.hint(other, job)}")
            if overlap := next(
                (name for name in space if name != other and (paths.inside(other, name) or paths.inside(name, other))), None
            ):
                raise InputError(f"{where}.when: {other} overlaps with {overlap}, which is searched; name {overlap} itself.")


def _check_data_path(job: JobConfig, path: str, parameter: Parameter) -> None:
    if parameter.choice is None:
        raise InputError(
            f"search.space.{path}: data is prepared before the sweep, once for each value, so the values must be listed, as in {{choice: [{parameter.low:g}, {parameter.high:g}]}}."
        )
    if paths.inside(path, "data.train"):
        for split in ("validation", "test"):
            if getattr(job.data, split) is None and getattr(job.data.split, split) > 0:
                raise InputError(
                    f"search.space.data.train: the {split} rows are split off the training rows, so {_OTHER_ROWS}; give data.{split} files of its own, or set data.split.{split}: 0."
                )
    role = path.removeprefix("data.columns.")
    if role != path and job.task.columns()[role].target:
        raise InputError(f"search.space.{path} can't be searched: trials would learn different things, and their scores can't be compared.")


def ordered(space: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The parameters, each after those that its `when` names. Raises `InputError` for a circle."""
    left, done = dict(space), {}
    while left:
        ready = [path for path, parameter in left.items() if not any(other in left for other in parameter.when)]
        if not ready:
            circle = " and ".join(sorted(left))
            raise InputError(f"search.space: {circle} depend on each other by their `when`, in a circle; take one of the conditions out.")
        done |= {path: left.pop(path) for path in ready[:1]}
    return done


def objectives(job: JobConfig) -> tuple[tuple[str, bool], ...]:
    """The metrics to make best and whether higher is better. Raises `InputError` for one that the task hasn't."""
    assert job.search is not None
    best_by = job.training.metric_for_best_model
    asked = job.search.metric or best_by or job.task.objective
    names = [name.removeprefix("eval_") for name in ([asked] if isinstance(asked, str) else asked)]
    for name in names:
        if not _has(job, name):
            raise InputError(f"search.metric: the task has no metric {name!r}.{did_you_mean(name, [*job.task.metrics(), 'loss'])}")
        if names.count(name) > 1:
            raise InputError(f"search.metric names {name!r} twice.")
    if best_by is not None and best_by.removeprefix("eval_") != names[0]:
        raise InputError(
            f"search.metric is {names[0]} and training.metric_for_best_model is {best_by}: a trial's best checkpoint is the one that counts in the sweep; leave one of them out."
        )
    return tuple((name, job.task.higher_is_better(name)) for name in names)


def check_comparable(wanted: Sequence[tuple[str, bool]], jobs: Sequence[JobConfig]) -> None:
    """Raises `InputError` where some trial's task has not the objectives, or means the other direction by them."""
    for job in jobs:
        for name, higher in wanted:
            if not _has(job, name) or job.task.higher_is_better(name) != higher:
                raise InputError(
                    f"search.metric: {name!r} is no metric of every trial: the task {job.task.to_json()} has {', '.join(job.task.metrics())}."
                )


def _has(job: JobConfig, name: str) -> bool:
    # Of one label, as f1/spam, or from a module that the job names: known when the data is read.
    return name in (*job.task.metrics(), "loss", *(job.evaluation.metrics or ())) or "/" in name


def check_algorithm(job: JobConfig, grid_size: int | None, parameters: Mapping[str, Parameter]) -> None:
    """Raises `InputError` where the algorithm can't search this space, or what it needs is not installed."""
    search = job.search
    assert search is not None
    name, several = search.algorithm, isinstance(search.metric, list) and len(search.metric) > 1
    if name == "grid":
        _check_grid(job, grid_size, parameters)
    if name in ("cmaes", "bohb", "hyperopt") and several:
        raise InputError(
            f"search.algorithm: {name} knows one metric only, and search.metric has {len(search.metric or ())}; use tpe or random."
        )
    if name == "cmaes":
        for path, parameter in parameters.items():
            if parameter.choice is not None or parameter.when:
                what = "a choice" if parameter.choice is not None else "there only under a condition (`when`)"
                raise InputError(f"search.algorithm: cmaes moves in a space of numbers, and {path} is {what}; use tpe.")
        if len(parameters) < 2:
            raise InputError("search.algorithm: cmaes needs a space of at least two paths; use tpe.")
    if name == "bohb" and search.scheduler != "hyperband":
        raise InputError(f"search.algorithm: bohb works with scheduler: hyperband only, not with {search.scheduler}.")
    if name == "hyperopt" and importlib.util.find_spec("hyperopt") is None:
        raise InputError("search.algorithm: hyperopt needs the package of that name: pip install 'ray-orchestrator[hyperopt]', or use tpe.")
    if search.scheduler in MUTATING and name not in ("tpe", "random"):
        raise InputError(
            f"search.algorithm: {search.scheduler} searches by itself from settings drawn at random, so {name} has nothing to propose; leave algorithm out."
        )


def _check_grid(job: JobConfig, size: int | None, parameters: Mapping[str, Parameter]) -> None:
    search = job.search
    assert search is not None
    for path, parameter in parameters.items():
        if parameter.kind in ("uniform", "loguniform"):
            raise InputError(
                f"search.space.{path}: a grid needs a list of values, and {parameter.kind} has endless ones; use {{choice: […]}}, or algorithm: random or tpe."
            )
    if size is not None and size > search.num_trials:
        raise InputError(
            f"search.num_trials is {search.num_trials}, and the grid of this space has {size:,} settings; set num_trials: {size}, take values out, or use algorithm: tpe."
        )


def check_scheduler(job: JobConfig) -> None:
    """Raises `InputError` where the scheduler can't work with this space or with the shape of its trials."""
    search = job.search
    assert search is not None
    name = search.scheduler
    if search.replay is not None and name not in MUTATING:
        raise InputError(f"search.replay follows the schedule of a pbt or pb2 sweep, and search.scheduler is {name}; set scheduler: pbt.")
    if name == "none":
        return
    if isinstance(search.metric, list) and len(search.metric) > 1:
        raise InputError(
            f"search.scheduler: {name} stops trials by one metric, and search.metric has {len(search.metric)}; set scheduler: none."
        )
    if name in PAUSING and search.workers_per_trial > 1:
        raise InputError(
            f"search.scheduler: {name} pauses trials and moves them, which trials of several workers can't; set workers_per_trial: 1, or use asha or median."
        )
    if name in MUTATING:
        _check_mutating(job)
    _check_reports(job)


def _check_mutating(job: JobConfig) -> None:
    search = job.search
    assert search is not None
    name = search.scheduler
    for path, parameter in search.space.items():
        if path not in MUTABLE:
            raise InputError(
                f"search.scheduler: {name} changes settings of running trials, and {path} can't change in the middle of a training; "
                f"what can is {', '.join(allowed.removeprefix('training.') for allowed in MUTABLE)}. Use asha for the rest."
            )
        if parameter.when:
            raise InputError(f"search.scheduler: {name} changes all paths together, and {path} is there only under a condition (`when`).")
        if name == "pb2" and parameter.kind not in ("uniform", "loguniform"):
            raise InputError(
                f"search.scheduler: pb2 needs ranges of numbers, and {path} is {parameter.kind}; use {{uniform: […]}} or scheduler: pbt."
            )
    if search.num_trials < 2:
        raise InputError(
            f"search.scheduler: {name} moves weights between trials, and search.num_trials is {search.num_trials}; it needs at least 2, better 4 or more."
        )


def _check_reports(job: JobConfig) -> None:
    """A scheduler decides at validations, so a trial needs several; of a job that counts steps that is known with its rows."""
    search, path = job.search, "training.num_train_epochs"
    assert search is not None
    if job.training.max_steps > 0 or "training.max_steps" in search.space:
        return
    parameter = search.space.get(path)
    found = [
        job.training.num_train_epochs,
        *(map(float, parameter.choice) if parameter and parameter.choice else [parameter.high] if parameter else []),
    ]
    epochs = max(found)
    for key in ("report_every", "grace", "perturb_every"):
        every = getattr(search, key)
        if every is not None and math.ceil(epochs / every - 1e-9) < 2:
            what = "has one validation only" if key == "report_every" else "ends before that"
            raise InputError(
                f"search.{key}: {every:g} epochs, and a trial has at most {epochs:g}: it {what}, so {search.scheduler} can't do anything; give less, or set scheduler: none."
            )
