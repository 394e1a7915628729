"""Ray Tune's part of a sweep: it is given the trials that are left, and what it tells of them goes to the ledger."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import training
from orchestrator.errors import StageError
from orchestrator.progress import Display
from orchestrator.records import TrialRecord
from orchestrator.search import searchers, trial
from orchestrator.search.disk import Disk
from orchestrator.search.ledger import Ledger
from orchestrator.search.places import Places
from orchestrator.search.sweep import Sweep, note_out_of_memory, read_state, release
from orchestrator.storage import Folder

POLL_S = 0.5
STOP_S = 5.0
"""How long an interrupted sweep waits for Ray Tune to notice."""
WAITING_BYTES = 2**20
"""That the process of a trial with workers of its own asks Ray for; it has no CPU."""
ENDED = ("done", "stopped")
SCHEDULE = "schedule.jsonl"
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the other one prints a table whatever it is told
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed reports that, and no metric
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # the ledger is what a sweep continues from
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "10",
}


@dataclass
class Driver:
    """What Ray Tune tells of the trials, on its way to the ledger, and what is done about it. Its methods run in Tune's thread."""

    sweep: Sweep
    where: Places
    ledger: Ledger
    display: Display
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.disk = Disk(self.sweep.folder, self.sweep.space.objectives, self.sweep.search.max_disk)
        self._waiting_since: float | None = None
        self._failed: dict[str, str] = {}
        self._deaths: dict[str, int] = {}
        self._untidy = False

    def run(self, known: Sequence[TrialRecord], rows: int) -> None:
        """Runs the trials that are left; returns when they are over or a budget is used up."""
        import ray.tune

        space, search = self.sweep.space, self.sweep.search
        ended = [one for one in known if one.status in ENDED]
        # What failed is tried again: the cause may be gone. What diverged fails at once.
        left = [one.model_copy(update={"status": "running"}) for one in known if one.status not in ENDED]
        tuner = ray.tune.Tuner(
            self._trainable(),
            tune_config=ray.tune.TuneConfig(
                search_alg=searchers.searcher(space, known=[*ended, *left]),
                scheduler=searchers.scheduler(space, rows, schedule=self.sweep.folder / SCHEDULE),
                num_samples=-1,  # the searcher says when they are over
                max_concurrent_trials=self.where.at_once,
                reuse_actors=True,
                trial_name_creator=lambda one: f"trial-{one.trial_id}",
                trial_dirname_creator=lambda one: one.trial_id,
            ),
            run_config=ray.tune.RunConfig(
                name="ray",
                storage_path=self.sweep.folder.path,
                storage_filesystem=self.sweep.folder.filesystem,
                callbacks=[_callback(self)],
                stop=_stopper(self),
                failure_config=ray.tune.FailureConfig(max_failures=search.max_failures),
                verbose=0,
            ),
        )
        fit = training.Fit(tuner, "tune")
        try:
            with training.environment(**ENVIRONMENT):
                fit.start()
                while fit.is_alive():
                    fit.join(POLL_S)
                    self.ledger.view.refresh()
        finally:
            self.interrupted = True
            fit.join(STOP_S)
            self.ledger.close()
        if fit.error is not None:
            raise self._explain(fit.error) from fit.error
        (self.sweep.folder / "ray").delete()

    def _trainable(self) -> Any:
        import ray.tune

        sweep = self.sweep

        def search_trial(config: dict[str, Any]) -> None:
            trial.trainable(config, sweep=sweep)

        search_trial.__mixins__ = trial.trainable.__mixins__  # pyright: ignore[reportFunctionMemberAccess]
        # Tune takes no trial that asks for nothing, as one does whose workers do the work.
        asked: dict[str, float] = {"cpu": self.where.cpus, "gpu": self.where.gpus} if self.where.workers == 1 else {"memory": WAITING_BYTES}
        return ray.tune.with_resources(search_trial, asked)

    # ---- what Tune tells ---------------------------------------------------------------------------------------
    def begins(self, one: Any) -> None:
        self.ledger.begin(one.trial_id, one.config, self.sweep.trial_folder(one.config))

    def reports(self, one: Any, result: Mapping[str, Any]) -> None:
        if "failed" in result:
            self._failed[one.trial_id] = result["failed"]
            return
        before = self.ledger.of(one.trial_id)
        after = self.ledger.report(one.trial_id, _own(result))
        if after is not before:
            self._deaths.pop(one.trial_id, None)

    def completes(self, one: Any) -> None:
        failed = self._failed.pop(one.trial_id, None)
        record = self.ledger.of(one.trial_id)
        state = read_state(Folder(record.folder)) or {}
        done = state.get("status") == "done" or (record.reports and record.reports[-1]["step"] >= record.reports[-1]["total_steps"])
        self.ledger.end(one.trial_id, "failed" if failed else "done" if done else "stopped", failed)
        self._untidy = True

    def recovers(self, one: Any) -> None:
        """The trial's process died, and it starts again."""
        record = self.ledger.die(one.trial_id)
        folder = Folder(record.folder)
        error = _error_of(one)
        self._deaths[one.trial_id] = self._deaths.get(one.trial_id, 0) + 1
        # The kernel doesn't say whom it killed for want of memory, so a second death without a report between counts as one.
        memory = _is_out_of_memory(error) or self._deaths[one.trial_id] > 1
        if memory:
            note_out_of_memory(folder)
        if self.where.workers > 1:
            release(folder)
        what = " with half the micro-batch" if memory else ""
        self.display.warn(f"trial {record.number}: {_cause(error)}; it starts again{what}")

    def fails(self, one: Any) -> None:
        """The trial is given up."""
        if not self.ledger.knows(one.trial_id):  # it died before it began
            self.begins(one)
        record = self.ledger.of(one.trial_id)
        if self.where.workers > 1:
            release(Folder(record.folder))
        tries = f" after {record.restarts} restarts" if record.restarts else ""
        self.ledger.end(one.trial_id, "failed", f"{_cause(_error_of(one))}{tries}")
        self._untidy = True

    def steps(self, trials: Sequence[Any]) -> None:
        """Some ten times a second."""
        if self.interrupted:
            raise _Interrupted
        self._require_progress(trials)
        if self._untidy:
            self._untidy = not self._tidy()

    def ends(self) -> bool:
        """Is the sweep to end before its last trial?"""
        return self.ledger.over() is not None

    # ---- inside ------------------------------------------------------------------------------------------------
    def _tidy(self) -> bool:
        """Frees disk of trials that have stopped writing; whether all that have ended have."""
        records = self.ledger.records
        writing = {one.id for one in records if one.status != "running" and _writes(one)}
        fits = self.disk.tidy([one.model_copy(update={"status": "running"}) if one.id in writing else one for one in records])
        if not fits and not writing:
            self.ledger.stopped_by = f"search.max_disk: the running trials alone take {self.disk.used / 1e9:.3g} GB"
        return not writing

    def _require_progress(self, trials: Sequence[Any]) -> None:
        """Raises `StageError` where for too long no trial has run although some could."""
        if not any(one.status in ("PENDING", "PAUSED") for one in trials) or any(one.status == "RUNNING" for one in trials):
            self._waiting_since = None
            return
        self._waiting_since = self._waiting_since or time.monotonic()
        limit = self.sweep.job.resources.start_timeout_s
        if time.monotonic() - self._waiting_since > limit:
            raise StageError(
                f"For {limit:g} s no trial could start: each asks for {self.where.cpus:g} CPU{f' and {self.where.gpus:.3g} GPU' if self.where.gpus else ''}. "
                f"{training.room()} Lower search.cpus_per_trial, add nodes, or end what else runs there; the same command goes on from here."
            )

    def _explain(self, error: BaseException) -> Exception:
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, StageError):
                return seen
            seen = seen.__cause__ or seen.__context__
        log = self.sweep.folder / "failure.log"
        log.write_bytes("".join(traceback.format_exception(error)).encode())
        return StageError(f"The sweep failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}. The whole story is in {log}.")


class _Interrupted(BaseException):
    """Ends Tune's loop at once, without its waiting for the trials: they can be killed at any time."""


def _callback(driver: Driver) -> Any:
    from ray.tune import Callback

    class Told(Callback):
        def __reduce__(self) -> Any:  # Tune pickles it with the tuner, to restore from, which nobody does
            return Callback, ()

        def on_step_begin(self, **info: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  all is given by name
            driver.steps(info["trials"])

        def on_trial_start(self, **info: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            driver.begins(info["trial"])

        def on_trial_result(self, **info: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            driver.reports(info["trial"], info["result"])

        def on_trial_complete(self, **info: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            driver.completes(info["trial"])

        def on_trial_recover(self, **info: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            driver.recovers(info["trial"])

        def on_trial_error(self, **info: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            driver.fails(info["trial"])

    return Told()


def _stopper(driver: Driver) -> Any:
    from ray.tune import Stopper

    class Budget(Stopper):
        def __reduce__(self) -> Any:
            return Stopper, ()

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return "failed" in result

        def stop_all(self) -> bool:
            return driver.ends()

    return Budget()


def _own(result: Mapping[str, Any]) -> dict[str, Any]:
    """A report without what Tune adds to it."""
    return {name: item for name, item in result.items() if name not in _TUNES and not name.startswith("config")}


_TUNES = {
    "timestamp", "checkpoint_dir_name", "should_checkpoint", "done", "training_iteration", "trial_id", "date", "time_this_iter_s",
    "time_total_s", "hostname", "node_ip", "time_since_restore", "iterations_since_restore", "experiment_tag", "episodes_total",
    "timesteps_total",
}  # fmt: skip


def _writes(record: TrialRecord) -> bool:
    """Might the process of a trial that has ended still write into its folder?"""
    state = read_state(Folder(record.folder))
    return record.status != "failed" and state is not None and state["status"] == "running"


def _error_of(one: Any) -> BaseException | None:
    """What a trial raised last."""
    import ray.cloudpickle

    if one.pickled_error_file is None:
        return None
    with Path(one.pickled_error_file).open("rb") as file:
        return ray.cloudpickle.load(file)


def _is_out_of_memory(error: BaseException | None) -> bool:
    import ray.exceptions

    return isinstance(error, ray.exceptions.OutOfMemoryError) or any(
        words in str(error) for words in ("OUT_OF_MEMORY", "OutOfMemory", "running low on memory")
    )


def _cause(error: BaseException | None) -> str:
    inner = getattr(error, "cause", None)  # of what Ray has wrapped
    error = inner if isinstance(inner, BaseException) else error
    return training.one_line(error) if error is not None else "it failed without saying why"
