"""What stops weak trials early: the schedulers of Ray Tune, with three things of ours.

Their clock is validations. A trial reports the rows that it has seen (`examples`), and batch sizes make these differ a
little from trial to trial; a scheduler that compared them would take a validation at 4,990 rows for one before 5,000.

They remember. Tune writes no scheduler to disk; after a death its rungs would be empty and the next trials would be
judged by nobody. Every report is in the sweep's `Proposals`, those of earlier starts too, so they read it there.

The job as it is written runs to its end: the winner is compared with it.

Imports Ray: import it late.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, HyperBandForBOHB, MedianStoppingRule, TrialScheduler

if TYPE_CHECKING:
    from orchestrator.search.proposals import Proposals

CLOCK = "validations"
"""The key that results are given for the schedulers."""


def proposals(controller: Any) -> Proposals:
    """The searcher of a sweep, inside what Tune has put around it."""
    searcher = controller.search_alg
    while hasattr(searcher, "searcher"):
        searcher = searcher.searcher
    return searcher


def is_default(trial: Trial) -> bool:
    """Is it the job as it is written?"""
    return trial.config.get("origin") == "default"


class Ended:
    """Stands for a trial that is over, in a scheduler's memory."""

    def __init__(self, trial_id: str):
        self.trial_id = trial_id

    def is_finished(self) -> bool:
        return True


class Clocked:
    """Mixed into a scheduler of Tune: it counts in validations, each `interval` rows."""

    _metric: Any

    def __init__(self, interval: float, **options: Any):
        super().__init__(time_attr=CLOCK, **options)  # pyright: ignore[reportCallIssue]  of Tune's scheduler
        self._interval = interval
        self._reads_proposals = True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)  # pyright: ignore[reportAttributeAccessIssue]
        known = proposals(tune_controller)
        if self._reads_proposals:
            self._reads_proposals = False
            for trial_id, ended in known.ended.items():
                if ended.reports:
                    self._recall(Ended(trial_id), [self._timed(report) for report in ended.reports])
        if reports := known.reports(trial.trial_id):
            self._recall(trial, [self._timed(report) for report in reports])

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        timed = self._timed(result)
        if CLOCK not in timed:  # a trial that ended without a validation
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, timed)  # pyright: ignore[reportAttributeAccessIssue]

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, self._timed(result))  # pyright: ignore[reportAttributeAccessIssue]

    def _timed(self, result: Mapping[str, Any]) -> dict[str, Any]:
        if "examples" not in result or self._metric not in result:
            return dict(result)
        return {**result, CLOCK: max(1, round(result["examples"] / self._interval))}

    def _recall(self, trial: Any, reports: list[dict[str, Any]]) -> None:
        """Takes in what a trial had reported before this process began: at least one validation."""
        raise NotImplementedError


class Halving(Clocked, AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934). After `max_t` validations nobody is stopped any more."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if self._timed(result).get(CLOCK, 0) > self._max_t:
            return TrialScheduler.CONTINUE
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if is_default(trial) else action

    def _recall(self, trial: Any, reports: list[dict[str, Any]]) -> None:
        (bracket,) = self._brackets
        for report in reports:
            bracket.on_result(trial, report[CLOCK], self._metric_op * report[self._metric])  # pyright: ignore[reportOperatorIssue]


class Median(Clocked, MedianStoppingRule):
    """The median stopping rule of Vizier (Golovin et al. 2017): stops what is worse than the others were at its age."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        timed = self._timed(result)
        if not is_default(trial) or CLOCK not in timed:
            return super().on_trial_result(tune_controller, trial, result)
        self._results[trial].append(timed)  # the others are judged by it, and it by nobody
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if CLOCK in self._timed(result):
            super().on_trial_complete(tune_controller, trial, result)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Trial, time: float) -> str:
        return TrialScheduler.CONTINUE  # Tune's lets another trial have a turn, which costs more than it tells

    def _recall(self, trial: Any, reports: list[dict[str, Any]]) -> None:
        self._results[trial] += reports


class Bands(Clocked, HyperBandForBOHB):
    """HyperBand (Li et al. 2018, arXiv 1603.06560), in brackets that fill up while their first trials wait.

    Tune's plain one halves a bracket as soon as the trials that there are have reached its rung: with two at a time, two.
    The job as it is written takes no part. After a death brackets begin anew with the trials that remain.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        if not is_default(trial) and not trial.is_finished():
            super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        timed = self._timed(result)
        if trial not in self._trial_info or CLOCK not in timed:
            return TrialScheduler.CONTINUE
        bracket, _ = self._trial_info[trial]
        bracket.update_trial_stats(trial, timed)
        if bracket.continue_trial(trial):
            return TrialScheduler.CONTINUE
        others = [other.status for other in bracket.current_trials() if other is not trial]
        action = TrialScheduler.PAUSE
        if bracket.filled() and all(status == Trial.PAUSED for status in others):
            action = self._process_bracket(tune_controller, bracket)
        if action == TrialScheduler.PAUSE:
            proposals(tune_controller).on_pause(trial.trial_id)
        return action

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        if trial in self._trial_info:
            super().on_trial_remove(tune_controller, trial)

    def _unpause_trial(self, tune_controller: Any, trial: Trial) -> None:
        proposals(tune_controller).on_unpause(trial.trial_id)

    def choose_trial_to_run(self, tune_controller: Any, allow_recurse: bool = True) -> Trial | None:
        for trial in tune_controller.get_trials():
            if is_default(trial) and trial.status == Trial.PENDING:
                return trial
        return super().choose_trial_to_run(tune_controller, allow_recurse)

    def _recall(self, trial: Any, reports: list[dict[str, Any]]) -> None:
        if trial in self._trial_info:
            self._trial_info[trial][0].update_trial_stats(trial, reports[-1])
