"""The space of a sweep: which settings a trial may have, checked before anything starts.

A *sample* is a flat dict from a path of the job to a JSON value, such as
`{"training.learning_rate": 3e-5, "model.lora": {"r": 4}}`; a path that does not apply to a trial is not in it. `apply`
makes the trial's job of it. No Ray and no Optuna here: `suggest` is given a trial of Optuna's shape.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.config import JobConfig, Parameter, SearchSection, digest
from orchestrator.errors import InputError, did_you_mean
from orchestrator.search import distributions, paths, rules

Sample = dict[str, Any]
REPORTS = 9
"""Validations of a trial where the job doesn't say how often: three rungs of a reduction by three."""
ENUMERABLE = 10_000
"""Spaces of at most so many settings are listed; larger ones count as endless."""
_LENGTHS = tuple(
    f"training.{name}"
    for name in ("num_train_epochs", "max_steps", "global_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
)
"""What decides how many rows a trial sees."""


def data_key(job: JobConfig) -> str:
    """What prepare is asked for: jobs with equal keys train on the same prepared data."""
    return digest(job.model_dump(mode="json", include={"task", "data"}))


def member(number: int) -> str:
    """Names a trial of a population, whose sample changes."""
    return f"member-{number:03d}"


@dataclass(frozen=True)
class Space:
    """The settings that trials of a job may have. Made by `Space.of`, which refuses what can't work; it pickles."""

    job: JobConfig
    """As written, with its `search` section."""
    parameters: Mapping[str, Parameter]
    """Path -> distribution; a path comes after those that its `when` names. Paths that no trial can have are left out."""
    objectives: tuple[tuple[str, bool], ...]
    """Metric and whether higher is better; the first chooses a trial's best checkpoint."""
    own: Mapping[str, Any]
    """The job's own values of these paths, where it has one."""

    @classmethod
    def of(cls, job: JobConfig) -> Space:
        """The space of a job with a `search` section. Raises `InputError` for what would fail or mean nothing later."""
        if job.search is None:
            raise InputError("search: this job has no search section, so there is nothing to sweep; add search: {space: {…}}.")
        rules.check_paths(job)
        space = cls(job, {}, rules.objectives(job), {})
        for path, parameter in rules.ordered(job.search.space).items():
            space = space._with(path, parameter)
        if not space.parameters:
            raise InputError("search.space: the conditions (`when`) of all paths are such that no trial could have them.")
        rules.check_scheduler(job)
        rules.check_algorithm(job, space.grid_size, space.parameters)
        space._check_start()
        return space

    @property
    def search(self) -> SearchSection:
        """The section that it is made of."""
        assert self.job.search is not None
        return self.job.search

    @property
    def mutable(self) -> tuple[str, ...]:
        """The paths that pbt and pb2 change in a running trial; none with another scheduler."""
        return tuple(self.parameters) if self.search.scheduler in rules.MUTATING else ()

    # ---- samples ---------------------------------------------------------------------------------------------
    def key(self, sample: Sample) -> str:
        """Names a sample's folder: equal for equal samples."""
        return digest(sample)[:12]

    def active(self, sample: Mapping[str, Any], path: str) -> bool:
        """Does a path apply to a trial that has, of the paths before it, the values in `sample`?"""
        whens = self.parameters[path].when.items()
        return all(any(distributions.same(sample.get(other, self.own.get(other)), value) for value in wanted) for other, wanted in whens)

    def contains(self, path: str, value: Any) -> bool:
        """Could a trial be given this value by the path's distribution?"""
        return distributions.contains(self.parameters[path], value)

    def points(self) -> list[Sample]:
        """The samples that run first: the job as it is written where `include_default`, then the known good ones."""
        given: list[Sample] = [*([{}] if self.search.include_default else []), *self.search.start]
        return _distinct(self._completed(point) for point in given)

    def suggest(self, trial: Any) -> Sample:
        """A sample drawn through the `suggest_…` methods of an Optuna trial, conditions followed."""
        sample: Sample = {}
        for path, parameter in self.parameters.items():
            if self.active(sample, path):
                sample[path] = distributions.draw(trial, path, parameter)
        return sample

    def grid(self) -> list[Sample]:
        """Every sample of a finite space, the first path changing slowest; `InputError` for more than anybody could try."""
        size = self.grid_size
        if size is None or size > ENUMERABLE:
            raise InputError(f"search.space has {'endless' if size is None else f'{size:,}'} settings, so there is no grid of it.")
        return list(self._samples({}, list(self.parameters)))

    @property
    def grid_size(self) -> int | None:
        """The number of samples; None: endless. Where conditions make fewer than it takes long to count, all combinations."""
        counts = [distributions.count(parameter) for parameter in self.parameters.values()]
        if None in counts:
            return None
        most = math.prod(count for count in counts if count is not None)
        conditional = any(parameter.when for parameter in self.parameters.values())
        return sum(1 for _ in self._samples({}, list(self.parameters))) if conditional and most <= ENUMERABLE else most

    def _samples(self, sample: Sample, left: Sequence[str]) -> Iterator[Sample]:
        if not left:
            yield sample
        elif not self.active(sample, left[0]):
            yield from self._samples(sample, left[1:])
        else:
            for value in distributions.values(self.parameters[left[0]]):
                yield from self._samples({**sample, left[0]: value}, left[1:])

    def _completed(self, point: Mapping[str, Any]) -> Sample:
        """A sample in which the paths that `point` doesn't name have the job's own values."""
        sample: Sample = {}
        for path in self.parameters:
            if self.active(sample, path) and (path in point or path in self.own):
                sample[path] = self._spelt(path, point[path]) if path in point else self.own[path]
        return sample

    # ---- jobs ------------------------------------------------------------------------------------------------
    def apply(self, sample: Mapping[str, Any]) -> JobConfig:
        """The job of a trial: this one with the sample set and no search. `InputError` where that is no valid job."""
        value = self.job.to_json()
        value["search"] = None
        value["resources"]["num_workers"] = self.search.workers_per_trial
        value["training"]["metric_for_best_model"] = self.objectives[0][0]
        for path, new in sample.items():
            paths.put(value, path, new)
        try:
            return JobConfig.parse(value)
        except InputError as error:
            shown = ", ".join(f"{path}: {json.dumps(new)}" for path, new in sample.items())
            raise InputError(f"search.space: a trial with {{{shown}}} is no valid job: {error}") from None

    def data_variants(self) -> list[JobConfig]:
        """The jobs that differ in what prepare is asked for, the job as written first: each is prepared before the sweep."""
        samples: list[Sample] = [{}]
        for path in filter(rules.decides_data, self.parameters):
            given: list[Sample] = [{path: value} for value in distributions.values(self.parameters[path])]
            absent: list[Sample] = [{}] if self.parameters[path].when else []
            samples = [{**sample, **more} for sample in samples for more in (*absent, *given)]
        jobs = [self.apply(sample) for sample in ({}, *samples)]
        return list({data_key(job): job for job in reversed(jobs)}.values())[::-1]

    def check(self) -> list[JobConfig]:
        """The jobs at every bound and choice, each alone and all together: that they are valid shows that trials will be.

        Raises `InputError` naming the path and value of one that is not.
        """
        probes: list[Sample] = [{}, *self.points()]
        for path, parameter in self.parameters.items():
            where = self._where(path)
            probes += [{**where, path: value} for value in distributions.corners(parameter)] if self.active(where, path) else []
        for end in (0, -1):
            sample: Sample = {}
            for path, parameter in self.parameters.items():
                if self.active(sample, path):
                    sample[path] = distributions.corners(parameter)[end]
            probes.append(sample)
        probes += self.grid() if self.search.algorithm == "grid" else []
        jobs = [self.apply(sample) for sample in _distinct(probes)]
        rules.check_comparable(self.objectives, jobs)
        self._check_variants()
        return jobs

    def _check_variants(self) -> None:
        variants = len(self.data_variants())
        if variants > max(1, self.search.num_trials):
            raise InputError(
                f"search.space: its data and task paths make {variants:,} different preparations of the data, each made before the sweep, "
                f"more than the {self.search.num_trials} trials; search fewer of them at once, or raise num_trials."
            )

    # ---- lengths ---------------------------------------------------------------------------------------------
    def most_examples(self, rows: int) -> int:
        """Rows that the longest trial sees, where the training split has `rows`."""
        return max(self.examples(job, rows) for job in self._lengths())

    def examples(self, job: JobConfig, rows: int) -> int:
        """Rows that a trial with this job sees by its end, unless it is stopped."""
        if job.training.max_steps > 0:
            return min(job.training.max_steps * job.training.global_batch(self.search.workers_per_trial), 2**62)
        return math.ceil(job.training.num_train_epochs * rows)

    def report_every(self, rows: int) -> float:
        """Epochs from one validation of a trial to the next, the same for all trials."""
        return self.search.report_every or min(1.0, self.most_examples(rows) / max(1, rows) / REPORTS)

    def _lengths(self) -> Iterator[JobConfig]:
        """Jobs of which one is the longest, whatever else a trial is given."""
        names = [path for path in _LENGTHS if path in self.parameters]
        ends = [[{}, *({path: value} for value in distributions.corners(self.parameters[path]))] for path in names]
        for parts in itertools.product(*ends):
            yield self.apply({path: value for part in parts for path, value in part.items()})

    # ---- making ----------------------------------------------------------------------------------------------
    def _with(self, path: str, parameter: Parameter) -> Space:
        """This space with one path more, its values and conditions as the job reads them; itself where no trial has the path."""
        when = {}
        for other, wanted in parameter.when.items():
            values = wanted if isinstance(wanted, list) else [wanted]
            if other in self.parameters:
                when[other] = [self._possible(path, other, value) for value in values]
            elif not any(distributions.same(paths.get(self.job.to_json(), other), self._read(other, value, {})) for value in values):
                return self
        alone = replace(self, parameters={**self.parameters, path: parameter.model_copy(update={"when": when})})
        if parameter.choice is not None:
            choices = [_number(value, alone._read(path, value, alone._where(path))) for value in parameter.choice]
            parameter = parameter.model_copy(update={"choice": choices})
        found = replace(self, parameters={**self.parameters, path: parameter.model_copy(update={"when": when})})
        own = paths.get(self.job.to_json(), path)
        if path == "training.global_batch_size" and own is None:
            own = self.job.training.global_batch(self.search.workers_per_trial)
        return found if own is paths.ABSENT else replace(found, own={**self.own, path: found._spelt(path, own)})

    def _possible(self, path: str, other: str, value: Any) -> Any:
        """A value that `path` waits for at `other`, as that one's trials have it."""
        parameter = self.parameters[other]
        if parameter.kind in ("uniform", "loguniform"):
            raise InputError(f"search.space.{path}.when: {other} is {parameter.kind}, so no trial has exactly {value!r}; make it a choice.")
        spelt = self._spelt(other, value)
        if not self.contains(other, spelt):
            raise InputError(f"search.space.{path}.when: {other} is never {value!r}; it is {distributions.shown(parameter)}.")
        return spelt

    def _spelt(self, path: str, value: Any) -> Any:
        """A value at a path as its choices write it where it is one of them, and a number where YAML took it for text."""
        read = self._read(path, value, self._where(path))
        for choice in self.parameters[path].choice or ():
            if distributions.same(read, self._read(path, choice, self._where(path))):
                return choice
        return _number(value, read)

    def _read(self, path: str, value: Any, where: Sample) -> Any:
        """What the job makes of a value at a path: 5e-5 of "5e-5", a whole section of {r: 4}."""
        return paths.get(self.apply({**where, path: value}).to_json(), path)

    def _where(self, path: str) -> Sample:
        """Values of other paths with which this one applies."""
        sample: Sample = {}
        for other, wanted in self.parameters[path].when.items():
            sample |= {**self._where(other), other: wanted[0]}
        return sample

    def _check_start(self) -> None:
        for place, point in enumerate(self.search.start):
            where = f"search.start[{place}]"
            for path in point:
                if path not in self.parameters:
                    raise InputError(f"{where}: {path!r} is not in search.space.{did_you_mean(path, self.parameters)}")
            sample = self._completed(point)
            for path in point:
                if path not in sample:
                    raise InputError(f"{where}: {path} applies only when {_when(self.parameters[path])}, and here it doesn't.")
                if not self.contains(path, sample[path]):
                    raise InputError(
                        f"{where}: {path} is {point[path]!r}, outside the space: {distributions.shown(self.parameters[path])}."
                    )
        number = len(self.points())
        if number > self.search.num_trials:
            raise InputError(
                f"search.num_trials is {self.search.num_trials}, and {number} known settings run first; set num_trials above that."
            )


def _number(value: Any, read: Any) -> Any:
    return read if isinstance(value, str) and isinstance(read, (int, float)) and not isinstance(read, bool) else value


def _distinct(samples: Iterable[Sample]) -> list[Sample]:
    return list({digest(sample): sample for sample in samples}.values())


def _when(parameter: Parameter) -> str:
    return " and ".join(f"{other} is {' or '.join(json.dumps(value) for value in wanted)}" for other, wanted in parameter.when.items())
