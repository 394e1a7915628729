"""The algorithms that propose samples: those of Optuna, BOHB, and hyperopt. No Ray here, and what they need is imported when made."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.config import Parameter
from orchestrator.search import distributions, rules
from orchestrator.search.space import Sample, Space


class Engine(Protocol):
    """An algorithm that proposes samples and is told what they were worth."""

    def ask(self, trial_id: str) -> Sample: ...

    def note(self, trial_id: str, sample: Sample) -> None:
        """A trial runs with a sample that others chose; its worth will be told like that of the algorithm's own."""
        ...

    def hear(self, trial_id: str, value: float) -> None:
        """The first objective at the next validation of a running trial."""
        ...

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        """The objectives' values of a trial that has ended; None: it has none, or did not run."""
        ...


class OptunaEngine:
    """Proposals by a sampler of Optuna: random, tpe or cmaes."""

    def __init__(self, space: Space, seed: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._study = optuna.create_study(
            directions=["maximize" if higher else "minimize" for _, higher in space.objectives], sampler=_sampler(space, seed)
        )
        self._numbers: dict[str, int] = {}

    def ask(self, trial_id: str) -> Sample:
        trial = self._study.ask()
        self._numbers[trial_id] = trial.number
        return self._space.suggest(trial)

    def note(self, trial_id: str, sample: Sample) -> None:
        """As a trial that runs, with those of its values that lie in the space: the job's own may lie outside."""
        import optuna
        from optuna.trial import TrialState

        self._study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, **_inside(self._space, sample)))
        self._numbers[trial_id] = len(self._study.get_trials(deepcopy=False)) - 1

    def hear(self, trial_id: str, value: float) -> None:
        pass  # what counts is a trial's best, told at its end

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        from optuna.trial import TrialState

        number = self._numbers.pop(trial_id, None)
        if number is not None and values is None:
            self._study.tell(number, state=TrialState.FAIL)
        elif number is not None:
            self._study.tell(number, list(values or ()))


def _sampler(space: Space, seed: int) -> Any:
    import optuna

    search = space.search
    if search.algorithm == "random" or search.scheduler in rules.MUTATING:
        # A population's settings change while it runs, so what its members reach says little about those that they began with.
        return optuna.samplers.RandomSampler(seed=seed)
    if search.algorithm == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            n_startup_trials=max(4, min(10, search.num_trials // 3)), multivariate=True, group=True, constant_liar=True, seed=seed
        )


def _inside(space: Space, sample: Sample) -> dict[str, Any]:
    """`params` and `distributions` of a trial of Optuna, of those values that lie in the space."""
    found = {path: _as_optuna(space.parameters[path], path, value) for path, value in sample.items() if space.contains(path, value)}
    return {
        "params": {path: answer for path, (answer, _) in found.items()},
        "distributions": {path: kind for path, (_, kind) in found.items()},
    }


def _as_optuna(parameter: Parameter, path: str, value: Any) -> tuple[Any, Any]:
    """A value as Optuna has it, and its distribution: what `Space.suggest` would have asked for."""
    recorder = _Recorder(parameter, value)
    distributions.draw(recorder, path, parameter)
    return recorder.answer, recorder.distribution


class _Recorder:
    """Of a trial's shape: answers with what means `value`, and notes how it was asked."""

    def __init__(self, parameter: Parameter, value: Any):
        self._parameter, self._value = parameter, value
        self.answer: Any = None
        self.distribution: Any = None

    def suggest_categorical(self, name: str, choices: Sequence[int]) -> int:
        from optuna.distributions import CategoricalDistribution

        self.answer = _place(self._parameter, self._value)
        self.distribution = CategoricalDistribution(choices)
        return self.answer

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        from optuna.distributions import FloatDistribution

        self.answer, self.distribution = float(self._value), FloatDistribution(low, high, log=log, step=step)
        return self.answer

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        from optuna.distributions import IntDistribution

        self.answer, self.distribution = int(self._value), IntDistribution(low, high, log=log)
        return self.answer


class BohbEngine:
    """BOHB (Falkner et al. 2018, arXiv 1807.01774): hyperband, with settings from a model of the longest trainings there are.

    The model is a multivariate Parzen estimator (Optuna's) of the trials that have reached the latest validation at which at
    least two more than the space has paths can be compared; it learns from trials long before they end. Every third setting
    is random, as in the paper.
    """

    def __init__(self, space: Space, seed: int):
        self._space, self._random = space, random.Random(seed)
        self._samples: dict[str, Sample] = {}
        self._best: dict[str, list[float]] = {}
        """A trial's best so far at each of its validations."""

    def ask(self, trial_id: str) -> Sample:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed, higher = self._random.randrange(2**31), self._space.objectives[0][1]
        compared = {} if self._random.random() < 1 / 3 else self._compared()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            samplers = optuna.samplers
            sampler = (
                samplers.TPESampler(multivariate=True, group=True, n_startup_trials=0, seed=seed)
                if compared
                else samplers.RandomSampler(seed)
            )
        study = optuna.create_study(direction="maximize" if higher else "minimize", sampler=sampler)
        for one, value in compared.items():
            study.add_trial(optuna.trial.create_trial(value=value, **_inside(self._space, self._samples[one])))
        sample = self._space.suggest(study.ask())
        self.note(trial_id, sample)
        return sample

    def note(self, trial_id: str, sample: Sample) -> None:
        self._samples[trial_id] = sample
        self._best[trial_id] = []

    def hear(self, trial_id: str, value: float) -> None:
        if math.isfinite(value):
            better = max if self._space.objectives[0][1] else min
            self._best[trial_id].append(better([value, *self._best[trial_id][-1:]]))

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        if values is None:  # it failed, or never ran
            self._samples.pop(trial_id, None)
            self._best.pop(trial_id, None)

    def _compared(self) -> dict[str, float]:
        """Trials, and their best at the latest validation that enough of them have reached."""
        enough = len(self._space.parameters) + 2
        lengths = sorted((len(values) for values in self._best.values()), reverse=True)
        last = lengths[enough - 1] if len(lengths) >= enough else 0
        return {one: values[last - 1] for one, values in self._best.items() if len(values) >= last} if last else {}


class HyperoptEngine:
    """The tree-structured Parzen estimator of hyperopt (Bergstra et al. 2011)."""

    def __init__(self, space: Space, seed: int):
        import hyperopt
        import numpy as np

        self._space = space
        self._random = np.random.default_rng(seed)
        self._higher = space.objectives[0][1]
        self._trials = hyperopt.Trials()
        self._numbers: dict[str, int] = {}

    def ask(self, trial_id: str) -> Sample:
        import hyperopt

        domain = hyperopt.Domain(_itself, {path: _as_hyperopt(path, parameter) for path, parameter in self._space.parameters.items()})
        number = self._trials.new_trial_ids(1)[0]
        self._trials.refresh()
        startup = max(4, min(10, self._space.search.num_trials // 3))
        (found,) = hyperopt.tpe.suggest(
            [number], domain, self._trials, int(self._random.integers(2**31 - 1)), n_startup_jobs=startup, verbose=False
        )
        drawn = {path: values[0] for path, values in found["misc"]["vals"].items()}
        sample = self._space.suggest(_Drawn(drawn))
        self._insert(trial_id, number, {path: drawn[path] for path in sample})
        return sample

    def note(self, trial_id: str, sample: Sample) -> None:
        inside = {path: value for path, value in sample.items() if self._space.contains(path, value)}
        values = {path: _place(self._space.parameters[path], value) for path, value in inside.items()}
        self._insert(trial_id, self._trials.new_trial_ids(1)[0], values)

    def hear(self, trial_id: str, value: float) -> None:
        pass

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        import hyperopt

        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        document = next(one for one in self._trials._dynamic_trials if one["tid"] == number)
        document["state"] = hyperopt.JOB_STATE_ERROR if values is None else hyperopt.JOB_STATE_DONE
        if values is not None:
            document["result"] = {"status": hyperopt.STATUS_OK, "loss": -values[0] if self._higher else values[0]}
        self._trials.refresh()

    def _insert(self, trial_id: str, number: int, values: dict[str, Any]) -> None:
        """Notes a trial that runs, with the values that it has; hyperopt wants to be told of the others that they are missing."""
        import hyperopt

        every = self._space.parameters
        misc = {
            "tid": number,
            "cmd": ("domain_attachment", "FMinIter_Domain"),
            "workdir": None,
            "idxs": {path: [number] if path in values else [] for path in every},
            "vals": {path: [values[path]] if path in values else [] for path in every},
        }
        (document,) = self._trials.new_trial_docs([number], [None], [{"status": hyperopt.STATUS_NEW}], [misc])
        document["state"] = hyperopt.JOB_STATE_RUNNING
        self._trials.insert_trial_docs([document])
        self._trials.refresh()
        self._numbers[trial_id] = number


def _itself(value: Any) -> Any:
    return value


def _as_hyperopt(path: str, parameter: Parameter) -> Any:
    from hyperopt import hp

    if parameter.choice is not None:
        return hp.randint(path, len(parameter.choice))
    if parameter.quniform is not None:
        return hp.randint(path, distributions.count(parameter))
    if parameter.kind in ("uniform", "int"):
        return hp.uniform(path, parameter.low, parameter.high)
    return hp.loguniform(path, math.log(parameter.low), math.log(parameter.high))


def _place(parameter: Parameter, value: Any) -> Any:
    """A value as hyperopt has it: of a list its place."""
    if parameter.choice is not None:
        return next(place for place, choice in enumerate(parameter.choice) if distributions.same(choice, value))
    return round((value - parameter.low) / parameter.quniform[2]) if parameter.quniform is not None else float(value)


@dataclass(frozen=True)
class _Drawn:
    """Of a trial's shape: answers with what hyperopt has drawn."""

    values: Mapping[str, Any]

    def suggest_categorical(self, name: str, choices: Sequence[int]) -> int:
        return choices[int(self.values[name])]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        return float(self.values[name]) if step is None else low + int(self.values[name]) * step

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return min(max(round(self.values[name]), low), high)


def engine(space: Space, known: int) -> Engine:
    """The algorithm that the job asks for, where `known` trials are there already: with the same seed it would begin with theirs again."""
    made = {"hyperopt": HyperoptEngine, "bohb": BohbEngine}
    return made.get(space.search.algorithm, OptunaEngine)(space, space.search.seed + known)
