"""How much each parameter of a sweep had to do with the scores: functional ANOVA (Hutter et al. 2014), by Optuna."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.records import SearchRecord
from orchestrator.search.axes import Axis, axes
from orchestrator.search.view import number

FEWEST = 4
"""Trials with a score, below which nothing can be said."""


def importance(record: SearchRecord) -> tuple[dict[str, float], str]:
    """Name of each parameter that all trials have -> its share of the score's variance; and a sentence about it.

    Nothing but the sentence where it can't be told.
    """
    metric = record.objectives[0][0]
    scored = [(trial, value) for trial in record.trials if trial.status != "failed" and (value := number(trial.best, metric)) is not None]
    if len(scored) < FEWEST:
        return {}, f"Importance needs at least {FEWEST} trials with a score; this sweep has {len(scored)}."
    if len({value for _, value in scored}) == 1:
        return {}, f"All {len(scored)} trials have the same score, so no parameter made a difference."
    every = axes(record)
    always = [axis for axis in every if all(axis.path in trial.sample for trial, _ in scored)]
    varied = [axis for axis in always if len({axis.place(trial.sample) for trial, _ in scored}) > 1]
    sometimes = [axis.name for axis in every if axis not in always]
    left_out = f" Not in every trial, so left out: {', '.join(sometimes)}." if sometimes else ""
    if not varied:
        return {}, f"No parameter that all trials have took more than one value.{left_out}"
    found = _fanova(varied, [[axis.place(trial.sample) for axis in varied] for trial, _ in scored], [value for _, value in scored])
    found |= {axis.name: 0.0 for axis in always if axis not in varied}
    return found, (
        f"Functional ANOVA (Hutter et al. 2014) over the best scores of {len(scored)} trials, those stopped early among them.{left_out}"
    )


def _fanova(axes: Sequence[Axis], places: Sequence[Sequence[Any]], scores: Sequence[float]) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    space: dict[str, BaseDistribution] = {}
    for axis, column in zip(axes, zip(*places, strict=True), strict=True):
        space[axis.path] = (
            CategoricalDistribution(sorted(set(column))) if axis.labels else FloatDistribution(min(column), max(column), log=axis.log)
        )
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        for row, score in zip(places, scores, strict=True):
            params = {axis.path: place for axis, place in zip(axes, row, strict=True)}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=score))
        shares = optuna.importance.get_param_importances(study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))
    finally:
        optuna.logging.set_verbosity(level)
    return {axis.name: shares[axis.path] for axis in axes}
