"""Populations: trials that take over the weights of stronger ones and go on with other settings (PBT, PB2).

What happened is a schedule, a JSONL file: a line for each trial as it begins (`parent` null, `examples` 0) and for each
time that one took over another's weights (`parent`, and the rows that those had seen), with the `sample` from there on.
The last line names the `best` trial. `steps` makes of it the settings that led to the winner's weights, and
`Replay` trains by them.

Imports Ray: import it late.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune import loguniform, uniform
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.schedulers.pb2 import PB2
from ray.tune.schedulers.pbt import _PBTTrialState

from orchestrator.config import Parameter
from orchestrator.errors import InputError
from orchestrator.search import distributions
from orchestrator.search.schedulers import CLOCK, Clocked, is_default, proposals
from orchestrator.search.space import Space, member
from orchestrator.storage import Folder


class Exchange(Clocked):
    """What PBT and PB2 have in common: new settings stay inside the space, and the schedule is written."""

    _trial_state: dict[Any, Any]
    _metric_op: float

    def __init__(self, parameters: Mapping[str, Parameter], schedule: Folder | None, **options: Any):
        super().__init__(log_config=False, require_attrs=False, **options)
        self._parameters = dict(parameters)
        self._schedule = schedule

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # Tune's refuses search algorithms. Ours only lays out the settings to begin with, all of them.
        self._trial_state[trial] = _PBTTrialState(trial)
        if reports := proposals(tune_controller).reports(trial.trial_id):
            self._recall(trial, [self._timed(report) for report in reports])
        else:
            self._write(trial=member(trial.config["number"]), parent=None, examples=0, sample=trial.config["sample"])

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        # The job as it is written takes no part: with another's weights it would be another. Nor does one that has ended.
        if is_default(trial) or result.get("step", 0) >= result.get("total_steps", math.inf):
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def _recall(self, trial: Any, reports: list[dict[str, Any]]) -> None:
        state = self._trial_state[trial]
        state.last_score = self._metric_op * reports[-1][self._metric]
        state.last_train_time = state.last_perturbation_time = reports[-1][CLOCK]
        state.last_result = reports[-1]

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        found, operations = super()._get_new_config(trial, trial_to_clone)  # pyright: ignore[reportAttributeAccessIssue]
        sample = {path: _within(self._parameters[path], value) for path, value in found["sample"].items()}
        return {**trial.config, "sample": sample}, operations

    def _exploit(self, tune_controller: Any, trial: Trial, trial_to_clone: Trial) -> None:
        super()._exploit(tune_controller, trial, trial_to_clone)  # pyright: ignore[reportAttributeAccessIssue]
        seen = (self._trial_state[trial_to_clone].last_result or {}).get("examples", 0)
        parent = member(trial_to_clone.config["number"])
        self._write(trial=member(trial.config["number"]), parent=parent, examples=seen, sample=trial.config["sample"])

    def _write(self, **line: Any) -> None:
        if self._schedule is not None:
            before = self._schedule.read_bytes() if self._schedule.exists() else b""
            self._schedule.write_bytes(before + json.dumps(line).encode() + b"\n")


class Population(Exchange, PopulationBasedTraining):
    """Population based training (Jaderberg et al. 2017, arXiv 1711.09846)."""

    def __init__(self, parameters: Mapping[str, Parameter], schedule: Folder | None, **options: Any):
        mutations = {path: _mutation(parameter) for path, parameter in parameters.items()}
        super().__init__(parameters, schedule, hyperparam_mutations={"sample": mutations}, **options)


class Bandit(Exchange, PB2):
    """Population based bandits (Parker-Holder et al. 2020, arXiv 2002.02518): a Gaussian process proposes what to go on with.

    Tune's lets it see a learning rate from 1e-5 to 1e-3 on a linear scale, where most of the range is one point; here
    `loguniform` is seen by its logarithm. As long as the process has seen no change of a score, Tune's leaves the setting as
    it is, so that two trials do the same; here it is drawn from the space, as in the paper.
    """

    def __init__(self, parameters: Mapping[str, Parameter], schedule: Folder | None, **options: Any):
        bounds = {path: [_seen(parameter, parameter.low), _seen(parameter, parameter.high)] for path, parameter in parameters.items()}
        super().__init__(parameters, schedule, hyperparam_bounds={"sample": bounds}, **options)

    def _save_trial_state(self, state: Any, time: int, result: dict[str, Any], trial: Trial) -> Any:
        return super()._save_trial_state(state, time, result, self._through(trial))

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        source = self._through(trial_to_clone)
        found, operations = PB2._get_new_config(self, self._through(trial), source)
        seen = found["sample"]
        if seen == source.config["sample"]:
            bounds = self._hyperparam_bounds["sample"]
            seen = {path: random.uniform(*bounds[path]) for path in seen}
        sample = {path: _within(self._parameters[path], _unseen(self._parameters[path], value)) for path, value in seen.items()}
        return {**trial.config, "sample": sample}, operations

    def _through(self, trial: Trial) -> Any:
        sample = {path: _seen(self._parameters[path], value) for path, value in trial.config["sample"].items()}
        return _Through(str(trial), {"sample": sample})


@dataclass(frozen=True)
class _Through:
    """A trial as PB2 is shown it: its name and its settings."""

    name: str
    config: dict[str, Any]

    def __str__(self) -> str:
        return self.name


class Replay(FIFOScheduler):
    """Trains one trial by the schedule of an earlier population; others, such as the job as it is written, as they are."""

    def __init__(self, schedule: list[tuple[int, dict[str, Any]]], slack: float):
        super().__init__()
        self._steps = schedule
        self._slack = slack

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if trial.config["origin"] != "search" or "examples" not in result:
            return TrialScheduler.CONTINUE
        due = [sample for examples, sample in self._steps if examples <= result["examples"] + self._slack][-1]
        if due == trial.config["sample"]:
            return TrialScheduler.CONTINUE
        tune_controller.pause_trial(trial, should_checkpoint=False)  # it finds its checkpoint in its own folder
        trial.set_config({**trial.config, "sample": due})
        return TrialScheduler.NOOP


def conclude(schedule: Folder, best: str) -> None:
    """Writes into a schedule which trial (by its id in the record) turned out best."""
    lines = [line for line in _lines(schedule) if "best" not in line]
    schedule.write_bytes("".join(f"{json.dumps(line)}\n" for line in [*lines, {"best": best}]).encode())


def steps(schedule: Folder) -> list[tuple[int, dict[str, Any]]]:
    """From how many rows on which setting led to the best trial's weights, the first from 0. Raises `InputError`."""
    lines = _lines(schedule)
    trial = lines[-1].get("best") if lines else None
    found: list[tuple[int, dict[str, Any]]] = []
    for line in reversed(lines):
        if "best" not in line and line["trial"] == trial:
            found.insert(0, (line["examples"], line["sample"]))
            trial = line["parent"]
    if not found or found[0][0] != 0:
        raise InputError(
            f"search.replay: {str(schedule)!r} is not the schedule of a finished population: it must lead from a first setting to its best trial."
        )
    return found


def plan(space: Space, schedule: Folder) -> list[tuple[int, dict[str, Any]]]:
    """The `steps` of a schedule, as trials of this space; `InputError` where they are not."""
    found = steps(schedule)
    for _, sample in found:
        if sample.keys() != space.parameters.keys():
            raise InputError(
                f"search.replay: {str(schedule)!r} sets {', '.join(sample)}, and search.space has {', '.join(space.parameters)}; they must be the same."
            )
        space.apply(sample)
    return found


def _lines(schedule: Folder) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(text) for text in schedule.read_bytes().decode().splitlines()]
    except FileNotFoundError:
        raise InputError(f"search.replay: there is no file {str(schedule)!r}.") from None
    except ValueError as error:
        raise InputError(f"search.replay: {str(schedule)!r} is not JSON lines: {error}.") from None
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not ("best" in line or {"trial", "parent", "examples", "sample"} <= line.keys()):
            raise InputError(f"search.replay: {str(schedule)!r}, line {number}: not a line of a schedule: {json.dumps(line)[:100]}.")
    return lines


def _mutation(parameter: Parameter) -> Any:
    """As PBT takes it: ranges are multiplied and drawn from, lists are walked along."""
    if parameter.kind in ("uniform", "loguniform"):
        return (loguniform if parameter.kind == "loguniform" else uniform)(parameter.low, parameter.high)
    return list(distributions.values(parameter))


def _within(parameter: Parameter, value: Any) -> Any:
    """A value that PBT multiplied, inside the space."""
    if parameter.kind not in ("uniform", "loguniform"):
        return value
    return min(max(float(f"{value:.6g}"), parameter.low), parameter.high)


def _seen(parameter: Parameter, value: Any) -> float:
    return math.log(value) if parameter.kind == "loguniform" else float(value)


def _unseen(parameter: Parameter, value: float) -> float:
    return math.exp(value) if parameter.kind == "loguniform" else float(value)
