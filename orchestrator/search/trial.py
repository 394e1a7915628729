"""One trial of a sweep, in the process that Ray Tune gives it: a job with the sample's settings, trained by the loop.

All that a trial knows is in its folder (`sweep`), so that it can be killed at any time: started again it continues from
its checkpoint, and what it had reported is reported again. What trials share (libraries, encoded rows, base weights) is
loaded once a process and kept for the next (`warm`).
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from orchestrator import training, worker
from orchestrator.config import ModelSection, digest
from orchestrator.errors import Diverged, InputError, StageError
from orchestrator.progress import Silent
from orchestrator.records import TrainRecord
from orchestrator.search import warm
from orchestrator.search.sweep import Sweep, killed, read_state, release
from orchestrator.storage import Folder

MOST_HALVINGS = 5
STOP_TIMEOUT_S = 120.0
"""How long a trial that is stopped may take to close what it has open."""
TASKS, TASK_CPUS = 1, 0.0
"""Encoding tasks of a trial whose rows are streamed. Trials hold the CPUs, so it asks for none (see `stream.lanes`)."""

Report = Callable[[dict[str, Any], dict[str, Any] | None], None]
"""Hands a report to the sweep, with a pointer to the trial's checkpoint or None; raises SystemExit where the trial is to end."""

log = logging.getLogger(__name__)
_trials_run = 0
_thread: threading.Thread | None = None


class Unforeseen(StageError):
    """What nobody thought of went wrong; in another process it may go well."""


def trainable(config: dict[str, Any], *, sweep: Sweep) -> None:
    """What Ray Tune calls with {"sample": …, "number": …, "origin": …}; `sweep` is bound by the driver."""
    began = time.perf_counter()
    from ray import tune

    global _thread
    _thread = threading.current_thread()
    # Tune gives a stopped trial so long to end before the next one in its process; where it takes longer, the next one fails.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", f"{STOP_TIMEOUT_S:.0f}")
    given = tune.get_checkpoint()
    pointer = None
    if given is not None:
        with given.as_directory() as place:
            pointer = json.loads((Path(place) / "pointer.json").read_bytes())

    def report(values: dict[str, Any], pointer: dict[str, Any] | None) -> None:
        if pointer is None:
            tune.report(values)
            return
        with tempfile.TemporaryDirectory(prefix="orchestrator-pointer-") as folder:
            (Path(folder) / "pointer.json").write_text(json.dumps(pointer))
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(folder))

    try:
        run(sweep, config, trial_id=tune.get_context().get_trial_id(), report=report, pointer=pointer, began=began)
    except Unforeseen:
        raise
    except (InputError, StageError) as error:
        # Said as a report: raised, it would cost the process, warm as it is, and Tune would try again what fails again.
        tune.report({"failed": str(error)})


class Orderly:
    """Has the actor of a stopped trial wait until the trial has closed what it has open, its workers first of all."""

    def cleanup(self) -> None:
        try:
            super().cleanup()  # pyright: ignore[reportAttributeAccessIssue]  Tune's trainable: tells the trial to end, without waiting
        finally:
            if _thread is not None:
                _thread.join(STOP_TIMEOUT_S)


trainable.__mixins__ = (Orderly,)  # pyright: ignore[reportFunctionMemberAccess]  what Tune derives the actor's class from


def run(
    sweep: Sweep,
    config: Mapping[str, Any],
    *,
    trial_id: str,
    report: Report,
    pointer: dict[str, Any] | None = None,
    began: float | None = None,
) -> None:
    """Runs a trial, or what is left of it.

    `pointer` is the checkpoint ({"folder", "step"}) that it is to go on from: its own, or in a population another's.
    Raises `InputError` and `StageError`, each with one line; SystemExit where `report` did.
    """
    global _trials_run
    warmed, _trials_run = _trials_run > 0, _trials_run + 1
    trial = _Trial(sweep, config, trial_id, report, pointer, time.perf_counter() if began is None else began, warmed)
    try:
        trial.run()
    except SystemExit:
        trial.note(status="stopped")
        raise
    except Exception as error:  # noqa: BLE001  it is written down as a whole and raised again as a line
        trial.fail(error)
        if isinstance(error, (InputError, StageError)):
            raise type(error)(str(error)) from None
        raise Unforeseen(training.one_line(error)) from None


def write_bundle(sweep: Sweep, folder: Folder, step: int) -> TrainRecord:
    """Writes the bundle of the trial in `folder` with the weights of its checkpoint of `step`; runs anywhere, needs no cluster.

    Raises `StageError` where the checkpoint is gone.
    """
    import torch

    from orchestrator import checkpoints, models, scratch

    state = read_state(folder)
    if state is None or state["figures"] is None:
        raise StageError(f"The trial in {str(folder)!r} has not reported anything.")
    found = checkpoints.at(folder, step)
    if found is None:
        raise StageError(f"The checkpoint of step {step} of the trial in {str(folder)!r} is gone or torn.")
    job = sweep.job_of(state["sample"])
    prepared = sweep.prepared_for(job)
    section = scratch.based(job.model, prepared, seed=job.training.seed)
    seed = job.training.seed
    model, weights = models.without_adapters(prepared.task, section, precision=state["figures"]["precision"], seed=seed)
    model = models.with_adapters(model, section, weights, seed=seed)
    tensors, places = found.tensors("model"), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if unknown := tensors.keys() - places.keys():
        raise StageError(f"The checkpoint {str(found.folder)!r} has weights that the model has not: {', '.join(sorted(unknown)[:5])}.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)
    processor = warm.processor(prepared.task, section)
    search = {"folder": sweep.folder.uri, "trial": state["trial"], "number": state["number"], "sample": state["sample"]}
    lineage = {**training.lineage(job, prepared), "run": sweep.job.run_id, "search": search}
    said = worker.write_bundle(
        folder / "bundle", model, processor, task=prepared.task, job=job, lineage=lineage, best=found, figures=state["figures"]
    )
    history = str((folder / "history.jsonl").uri)
    found = {**state["figures"], **worker.weights_record(weights), **said}
    return TrainRecord(**found, seconds=state["seconds"], history=history)


class _Trial:
    """One attempt at a trial."""

    def __init__(
        self,
        sweep: Sweep,
        config: Mapping[str, Any],
        trial_id: str,
        report: Report,
        pointer: dict[str, Any] | None,
        began: float,
        warmed: bool,
    ):
        self.sweep, self._report, self._pointer, self._began = sweep, report, pointer, began
        self.sample = dict(config["sample"])
        self.folder = sweep.trial_folder(config)
        before = read_state(self.folder) or {}
        self.state: dict[str, Any] = {
            "trial": trial_id,
            "number": config["number"],
            "origin": config["origin"],
            "sample": self.sample,
            "status": "running",
            "error": None,
            "final": False,
            "started": before.get("started", time.time()),
            "seconds": before.get("seconds", 0.0),
            "attempts": before.get("attempts", 0) + 1,
            "halvings": before.get("halvings", 0),
            "taken": before.get("taken"),
            "parent": before.get("parent"),
            "place": before.get("place"),
            "figures": before.get("figures"),
            "pid": os.getpid(),
            "node": socket.gethostname(),
            "warm": warmed,
        }
        self._before = before
        self._earlier = self.state["seconds"]
        self._killed = killed(self.folder)
        self._reports = worker.StepLog(self.folder / "reports.jsonl")
        self._reported = 0  # the step of the last report of this attempt
        self._stepped: float | None = None
        """When the first step of this attempt ended."""
        self._first_step: dict[str, float] = {}
        self._losses: list[float] = []
        self._figures: Callable[[], dict[str, Any]] | None = None

    @property
    def halvings(self) -> int:
        """How often the micro-batch was halved: here, and after the process was killed."""
        return min(MOST_HALVINGS, self.state["halvings"] + self._killed)

    def run(self) -> None:
        if self._before.get("status") == "done" and self._before["sample"] == self.sample and not self._foreign():
            self._again(math.inf)
            return
        if self._before.get("final") and self._before["sample"] == self.sample:
            raise Diverged(self._before["error"])
        self.job = self.sweep.job_of(self.sample)
        self.prepared = self.sweep.prepared_for(self.job)
        self.folder.make()
        (self.folder / "job.json").write_json(self.job.to_json())
        self.note()
        if self._foreign():
            self._take_over()
        train = self._with_workers if self.sweep.search.workers_per_trial > 1 else self._here
        while not self._trained(train):
            self.state["halvings"] += 1
            log.warning("Memory ran out; the micro-batch is halved for the %d. time.", self.halvings)
            self.note()
            _free_memory()
        self.note(status="done")

    def note(self, **changes: Any) -> None:
        """Writes how the trial stands."""
        self.state |= {"seconds": self._seconds(), **changes}
        (self.folder / "trial.json").write_json(self.state)

    def fail(self, error: Exception) -> None:
        """Writes why it failed. A training that left the finite numbers is not tried again."""
        (self.folder / "failure.log").write_bytes("".join(traceback.format_exception(error)).encode())
        self.note(status="failed", error=training.one_line(error), final=isinstance(error, Diverged))

    # ---- where it goes on from -------------------------------------------------------------------------------
    def _foreign(self) -> bool:
        """Whether it is to go on from another trial's checkpoint, and has not yet."""
        if self._pointer is None or self._pointer["folder"] == self.folder.uri:
            return False
        return self._before.get("taken") != self._taking()

    def _taking(self) -> dict[str, Any]:
        assert self._pointer is not None
        return {**self._pointer, "sample": digest(self.sample)}

    def _take_over(self) -> None:
        """Weights, moments, step and standing of another trial in the place of its own, and the history that belongs to them."""
        from orchestrator import checkpoints

        assert self._pointer is not None
        source = Folder(self._pointer["folder"])
        checkpoints.take_over(source, self.folder, self._pointer["step"])
        history = source / "history.jsonl"
        (self.folder / "history.jsonl").write_bytes(history.read_bytes() if history.exists() else b"")
        (self.folder / "reports.jsonl").delete()
        self.note(taken=self._taking(), parent=Path(source.path).name)

    # ---- training --------------------------------------------------------------------------------------------
    def _trained(self, train: Callable[[], None]) -> bool:
        """Trains to the end; False where memory ran out and a smaller micro-batch may help."""
        try:
            train()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.halvings >= MOST_HALVINGS:
                raise StageError(
                    f"Memory ran out, with micro-batches of {self._tokens()} padded tokens too: {training.one_line(error)}. "
                    "Lower task.max_length or search.max_concurrent_trials, or choose a smaller model."
                ) from error
            return False
        return True

    def _here(self) -> None:
        import torch

        from orchestrator import loop, models, scratch

        torch.set_num_threads(self.sweep.threads)  # OpenMP's number belongs to the thread, and each trial is one
        job, prepared = self.job, self.prepared
        settings = job.training.model_copy(update={"tokens_per_micro_batch": self._tokens()})
        task, batch = prepared.task, settings.global_batch(1)
        worker.seed(settings.seed)
        section = scratch.based(job.model, prepared, seed=settings.seed)
        processor = warm.processor(task, section)
        precision = models.hardware_precision(settings.precision)
        stream = self._stream(section, processor, batch)
        tokens = job.evaluation.tokens_per_batch or _prediction_tokens()
        validate = worker.validation(
            job, task, processor, self._rows(section, processor), precision, tokens=max(1, tokens >> self.halvings)
        )
        model = warm.model(task, section, precision=precision, seed=settings.seed)
        logs = worker.Logs(self.folder, 0, 1, stream.steps_per_epoch, record_rows=settings.record_rows)
        tally = worker.Tally()
        self._stepped = None

        def on_rows(step: int, row_ids: list[str]) -> None:  # called as a step ends; progress comes after its validation
            self._stepped = self._stepped or time.perf_counter()
            logs.rows(step, row_ids)

        self._figures = lambda: worker.figures(tally, stream, batch=batch, world=1, precision=precision)
        steps = loop.train(
            task, model, processor, settings, stream, folder=self.folder, validate=validate, global_batch_size=batch,
            identity=self.sweep.identity(job), checkpoint=job.checkpoint, on_rows=on_rows,
            write_behind=not self.sweep.pauses, end_with_best=False,
        )  # fmt: skip
        with contextlib.closing(stream), contextlib.closing(steps):
            for progress in steps:
                tally.add(progress)
                logs.progress(progress)
                if tally.first is progress:
                    self._start(progress.resumed_from, progress.seconds)
                self._losses.append(progress.loss)
                if progress.metrics is not None:
                    rate = tally.rows / tally.seconds if tally.seconds else 0.0
                    self._validated(
                        progress.step, progress.total_steps, progress.epoch, progress.metrics, progress.best_step, progress.best_value, rate
                    )
        self.state["figures"] = self._figures()

    def _stream(self, section: ModelSection, processor: Any, batch: int) -> Any:
        """The train split from memory, or where it is too large for that by Ray Data."""
        from orchestrator import loop
        from orchestrator.data.resident import ResidentStream
        from orchestrator.data.stream import Encoding, RankStream

        settings = self.job.training
        order = {"seed": settings.seed, "global_batch": batch, "group_by_length": settings.group_by_length}
        split = warm.split(self.prepared, "train", section)
        if split is not None:
            return ResidentStream(split, **order)
        encoding = Encoding.of(self.prepared, "train", processor, rank=0, world=1, **order)
        return RankStream(encoding, total_steps=loop.total_steps(settings, encoding.plan(0).steps), tasks=TASKS, cpus=TASK_CPUS)

    def _rows(self, section: ModelSection, processor: Any) -> Any:
        """The validation split, in the same way."""
        from orchestrator.data.resident import ResidentRows
        from orchestrator.data.stream import Encoding, SplitRows

        split = warm.split(self.prepared, "validation", section, with_rows=True)
        if split is not None:
            return ResidentRows(split)
        return SplitRows(Encoding.of(self.prepared, "validation", processor, rank=0, world=1), tasks=TASKS, cpus=TASK_CPUS)

    def _with_workers(self) -> None:
        """By Ray Train, whose workers wait after each validation for what the sweep says."""
        from orchestrator import checkpoints

        release(self.folder)
        job = self.job
        if self.halvings:  # else the workers know best
            job = job.model_copy(update={"training": job.training.model_copy(update={"tokens_per_micro_batch": self._tokens()})})
        newest, _ = checkpoints.latest(self.folder, self.sweep.identity(job))
        self._start(newest.step if newest else None, 0.0)
        ended: SystemExit | InputError | StageError | None = None

        def goes_on(heard: dict[str, Any]) -> bool:
            nonlocal ended
            self.state["place"] = heard["place"]
            self._figures = lambda: {
                "steps": heard["step"],
                "epochs": heard["epoch"],
                "rows_seen": self._examples(heard["epoch"]),
                "global_batch_size": job.training.global_batch(heard["num_workers"]),
                "num_workers": heard["num_workers"],
                "precision": heard["precision"],
                "examples_per_second": heard["rows"] / (heard["seconds"] or 1.0),
                "data_wait_share": heard["wait_seconds"] / (heard["seconds"] or 1.0),
                "peak_memory_bytes": 0,
            }
            self._losses.append(heard["loss"])
            rate = heard["rows"] / (heard["seconds"] or 1.0)
            try:
                self._validated(
                    heard["step"], heard["total_steps"], heard["epoch"], heard["metrics"], heard["best_step"], heard["best_value"], rate
                )
            except (SystemExit, InputError, StageError) as end:  # raised when the workers have ended, so that they leave nothing behind
                ended = end
            return ended is None

        found = training.fit(job, self.prepared, self.folder, _Notes(), goes_on=goes_on)
        found.pop("marks")
        self.state |= {"figures": found, "place": None}
        if ended is not None:
            raise ended

    def _tokens(self) -> int:
        """Padded tokens of a micro-batch, after all halvings."""
        import torch

        from orchestrator import step

        on_gpu = self.sweep.gpus_per_worker > 0 if self.sweep.search.workers_per_trial > 1 else torch.cuda.is_available()
        default = step.GPU_TOKENS if on_gpu else step.CPU_TOKENS
        return max(1, (self.job.training.tokens_per_micro_batch or default) >> self.halvings)

    # ---- reports ---------------------------------------------------------------------------------------------
    def _start(self, resumed_from: int | None, seconds: float) -> None:
        """At the first step of a training, which took `seconds`: what was reported up to where it goes on from is reported again."""
        taken = (self._stepped or time.perf_counter()) - self._began
        self._first_step = {"setup_seconds": round(taken - seconds, 4), "first_step_seconds": round(taken, 4)} if seconds else {}
        self._reports.restart(resumed_from or 0)
        self._again(resumed_from or 0)

    def _again(self, step: float) -> None:
        """Reports again what was reported after the checkpoint that Tune knows of, up to `step`; it drops what it has already."""
        place = self.folder / "reports.jsonl"
        lines = [json.loads(line) for line in place.read_bytes().splitlines()] if place.exists() else []
        known = self._pointer["step"] if self._pointer and self._pointer["folder"] == self.folder.uri else 0
        for line in lines:
            if max(known, self._reported) < line["step"] <= step:
                self._reported = line["step"]
                self._report(line, self._here_at(line["step"]))

    def _validated(
        self, step: int, total: int, epoch: float, metrics: dict[str, float], best_step: int | None, best_value: float | None, rate: float
    ) -> None:
        loss = sum(self._losses) / len(self._losses)
        self._losses = []
        for name, _ in self.sweep.space.objectives:
            if name not in metrics:
                raise InputError(f"search.metric: validation gives no {name!r}; it gives {', '.join(sorted(metrics))}.")
            if math.isnan(metrics[name]):
                raise Diverged(f"The validation at step {step} gave {name} = nan, by which the trial can't be compared.")
        values = {
            **metrics,
            "examples": self._examples(epoch),
            "epoch": epoch,
            "step": step,
            "total_steps": total,
            "train_loss": loss,
            "best_step": best_step,
            "best_value": best_value,
            "seconds": round(self._seconds(), 3),
            "rows_per_second": round(rate, 2),
            "warm": self.state["warm"],
            "pid": self.state["pid"],
            "node": self.state["node"],
            "micro_batch_halvings": self.halvings,
            "attempt": self.state["attempts"],
            **({"parent": self.state["parent"]} if self.state["parent"] else {}),
            **self._first_step,
        }
        self._first_step = {}
        self._reports.add(**values)
        self._reports.flush(upload=True)
        if self._figures is not None:
            self.state["figures"] = self._figures()
        self.note()
        if step > self._reported:  # where memory ran out since, the same steps are done again
            self._reported = step
            self._report(values, self._here_at(step))

    def _here_at(self, step: int) -> dict[str, Any] | None:
        """The pointer to this trial's checkpoint, for schedulers that hand it on."""
        return {"folder": self.folder.uri, "step": step} if self.sweep.pauses else None

    def _examples(self, epoch: float) -> int:
        return round(epoch * self.prepared.splits["train"].rows)

    def _seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._began


class _Notes(Silent):
    """What training says goes to the log of the trial's process."""

    def warn(self, sentence: str) -> None:
        log.warning(sentence)


def _prediction_tokens() -> int:
    from orchestrator.predictor import TOKENS_PER_BATCH

    return TOKENS_PER_BATCH


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # What the allocator for the CPU says, and a worker of the trial.
    return any(words in str(error) for words in ("can't allocate memory", "DefaultCPUAllocator: not enough memory", "OutOfMemoryError: "))


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
