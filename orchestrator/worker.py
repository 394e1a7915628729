"""What runs in each worker of Ray Train: the loop on this worker's stream, and what is told about it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config import JobConfig, digest
from orchestrator.errors import InputError, StageError
from orchestrator.records import PreparedData
from orchestrator.storage import Folder

if TYPE_CHECKING:
    from orchestrator.checkpoints import Checkpoint
    from orchestrator.tasks.base import Task
    from orchestrator.validation import Validation

REPORT_EVERY_S = 0.25
VERDICT_TIMEOUT_S = 900.0
VERDICT_POLL_S = 0.05


@dataclass(frozen=True)
class Work:
    """All that a worker is told. It pickles."""

    job: JobConfig
    prepared: PreparedData
    folder: Folder
    lineage: dict[str, Any]
    threads: int
    tasks: int
    """Encoding tasks at once, and the CPUs that each asks for (`stream.lanes`)."""
    task_cpus: float
    reports: Any
    """Handle of the actor that takes what the driver shows; None: nobody looks."""
    marker: str
    """A file that the driver wrote into `folder`."""
    asks: bool = False
    """After each validation rank 0 asks the driver whether training goes on; it writes no bundle then."""

    @property
    def identity(self) -> str:
        return identity(self.job, self.prepared)


def identity(job: JobConfig, prepared: PreparedData, free: Sequence[str] = ()) -> str:
    """What a run computes, wherever it runs: checkpoints of another are refused. `free` are paths of `training` that may change on the way."""
    question = job.model_dump(mode="json", include={"model", "training"})
    for name in ("record_rows", "tokens_per_micro_batch", *(path.removeprefix("training.") for path in free)):
        question["training"].pop(name)
    return digest([prepared.fingerprint, prepared.task.to_json(), question])


def run(work: Work) -> dict[str, Any] | None:
    """Trains, writes the bundle, and returns (on rank 0) what goes into the record; called by Ray Train on every worker."""
    marks = {"workers": time.time()}
    _require_shared(work)
    import ray.train
    import torch

    torch.set_num_threads(work.threads)
    from orchestrator import checkpoints, loop, models, processors, scratch
    from orchestrator.data.stream import Encoding, RankStream, SplitRows

    marks["imports"] = time.time()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    job, settings = work.job, work.job.training
    task, section = work.prepared.task, scratch.based(job.model, work.prepared, seed=settings.seed)
    seed(settings.seed)

    base = models.resolve(section.base, section.revision)
    processor = processors.of(task, base, trust_remote_code=section.trust_remote_code, revision=section.revision)
    batch = settings.global_batch(world)
    encoding = Encoding.of(
        work.prepared,
        "train",
        processor,
        rank=rank,
        world=world,
        seed=settings.seed,
        global_batch=batch,
        group_by_length=settings.group_by_length,
    )
    total = loop.total_steps(settings, encoding.plan(0).steps)
    stream = RankStream(encoding, total_steps=total, tasks=work.tasks, cpus=work.task_cpus)
    done = _newest_step(work.folder)
    if done < total:
        stream.begin(*divmod(done, stream.steps_per_epoch))  # rows are read and encoded while the model loads
    precision = models.hardware_precision(settings.precision)
    model = models.load(task, section, precision=precision, seed=settings.seed)
    marks["model"] = time.time()

    validate = None
    if "validation" in work.prepared.splits and work.prepared.splits["validation"].rows:
        rows = SplitRows(Encoding.of(work.prepared, "validation", processor, rank=rank, world=world), tasks=work.tasks, cpus=work.task_cpus)
        validate = validation(job, task, processor, rows, precision)
    logs = Logs(work.folder, rank, world, stream.steps_per_epoch, record_rows=settings.record_rows)
    place = ray.util.get_current_placement_group()
    steps = loop.train(
        task, model, processor, settings, stream, folder=work.folder, validate=validate, global_batch_size=batch,
        identity=work.identity, checkpoint=job.checkpoint, on_rows=logs.rows, write_behind=not work.asks, end_with_best=not work.asks,
    )  # fmt: skip
    tally = Tally()
    reporter = Reporter(work.reports if rank == 0 else None, total, world, precision=precision, place=place and place.id.hex())
    with contextlib.closing(steps):
        for progress in steps:
            tally.add(progress)
            logs.progress(progress)
            reporter.add(progress)
            if tally.first is progress:
                began = time.time() - progress.seconds
                marks |= {"setup": began, "first_rows": began + progress.wait_seconds, "first_step": began + progress.seconds}
            if progress.step % stream.steps_per_epoch == 0 or progress.step == total or progress.stopped:
                _require_equal(model, f"after step {progress.step}")
            if progress.metrics is not None:
                ray.train.report(
                    {
                        "step": progress.step,
                        "epoch": progress.epoch,
                        "loss": progress.loss,
                        **{f"eval_{name}": value for name, value in progress.metrics.items()},
                    }
                )
                if work.asks and not reporter.goes_on(progress.step):
                    break
    stream.close()
    reporter.flush()
    marks["trained"] = time.time()
    if not work.asks:
        _require_equal(model, "of the best checkpoint")

    found = {**figures(tally, stream, batch=batch, world=world, precision=precision), "marks": marks}
    if rank > 0:
        return None
    if work.asks:
        return found
    best = checkpoints.best(work.folder, work.identity)
    if best is None:
        raise StageError(f"There is no complete checkpoint in {str(work.folder)!r} although training has ended.")
    said = write_bundle(work.folder / "bundle", model, processor, task=task, job=job, lineage=work.lineage, best=best, figures=found)
    return {**said, **found}


def validation(job: JobConfig, task: Task, processor: Any, rows: Any, precision: str, *, tokens: int | None = None) -> Validation:
    """The validation of a job's training over `rows`; `tokens` go through the model at once, None: as the job says."""
    from orchestrator.validation import Validation

    best_by = (job.training.metric_for_best_model or task.objective).removeprefix("eval_")
    tokens = tokens or job.evaluation.tokens_per_batch
    given = {"tokens": tokens} if tokens else {}
    return Validation(task, processor, rows, precision=precision, wanted=[*(job.evaluation.metrics or ()), best_by], **given)


def figures(tally: Tally, stream: Any, *, batch: int, world: int, precision: str) -> dict[str, Any]:
    """What a record says of the training that has just ended; all workers call it, and each gets the same but `resumed_from`."""
    last = tally.last
    if last is None:
        raise StageError("Training ended before its first step.")
    epochs, steps_in_epoch = divmod(last.step, stream.steps_per_epoch)
    return {
        "steps": last.step,
        "epochs": last.epoch,
        "rows_seen": epochs * stream.rows + min(stream.rows, steps_in_epoch * batch),
        "global_batch_size": batch,
        "num_workers": world,
        "precision": precision,
        "resumed_from": tally.resumed_from,
        **_sum_up(tally, stream),
    }


def write_bundle(
    place: Folder,
    model: Any,
    processor: Any,
    *,
    task: Task,
    job: JobConfig,
    lineage: dict[str, Any],
    best: Checkpoint,
    figures: dict[str, Any],
) -> dict[str, Any]:
    """Writes the bundle of `model`, which has the weights of the checkpoint `best`, and returns what a record says of it."""
    from orchestrator import bundle, models

    standing = best.state.get("best")
    metrics = dict(standing["metrics"]) if standing and standing["step"] == best.step else {}
    counted = {name: figures[name] for name in ("steps", "rows_seen", "global_batch_size", "num_workers")}
    plain = models.merged(model).to("cpu")
    bundle.write(
        place,
        model=plain,
        processor=processor,
        task=task.calibrate(metrics),
        job=job.to_json(),
        lineage={**lineage, **counted, "best_step": best.step},
        metrics={"validation": metrics},
    )
    return {"bundle": str(place.uri), "metrics": metrics, "best_step": best.step}


class Tally:
    """Sums over the steps of this attempt."""

    def __init__(self) -> None:
        self.first: Any = None
        self.last: Any = None
        self.resumed_from: int | None = None
        self.rows = 0
        self.seconds = self.waited = 0.0

    def add(self, progress: Any) -> None:
        if self.last is self.first:  # the first step's time is start-up (it waits for the pipeline); it counts only while there is no other
            self.rows, self.seconds, self.waited = 0, 0.0, 0.0
        if self.first is None:
            self.first, self.resumed_from = progress, progress.resumed_from
        self.rows += progress.rows
        self.seconds += progress.seconds
        self.waited += progress.wait_seconds
        self.last = progress


class Reporter:
    """Sends progress to the driver a few times a second, without waiting for it."""

    def __init__(self, actor: Any, total: int, world: int, **more: Any):
        self._actor, self._attempt = actor, uuid.uuid4().hex[:8]
        self._waiting: list[dict[str, Any]] = []
        self._sent = 0.0
        self._common = {"attempt": self._attempt, "total_steps": total, "num_workers": world, **more}

    def add(self, progress: Any) -> None:
        if self._actor is None:
            return
        self._waiting.append({**asdict(progress), **self._common})
        if progress.metrics is not None or progress.notes or time.monotonic() - self._sent > REPORT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        if self._actor is not None and self._waiting:
            self._actor.put.remote(self._waiting)
            self._waiting, self._sent = [], time.monotonic()

    def goes_on(self, step: int) -> bool:
        """Whether the driver wants more after the validation of `step`; every worker calls it, rank 0 asks for all."""
        import torch.distributed as dist

        answer: list[Any] = [self._ask(step) if self._actor is not None else None]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[0] is None:
            raise StageError(f"The driver did not say within {VERDICT_TIMEOUT_S:.0f} s whether training goes on after step {step}.")
        return answer[0]

    def _ask(self, step: int) -> bool | None:
        import ray

        deadline = time.monotonic() + VERDICT_TIMEOUT_S
        while time.monotonic() < deadline:
            answer: Any = ray.get(self._actor.verdict.remote(self._attempt, step), timeout=VERDICT_TIMEOUT_S)
            if answer is not None:
                return answer
            time.sleep(VERDICT_POLL_S)
        return None


class StepLog:
    """A JSONL file with a line for each step that the final weights come from.

    A run that continues from a checkpoint does later steps again, so it takes their lines out first.
    """

    def __init__(self, file: Folder):
        self._file = file
        self._waiting: list[str] = []
        self._written: list[str] = []

    def restart(self, step: int) -> None:
        """Forgets the lines of steps after `step`, and what a killed writer left of its last line."""
        self._written = []
        if self._file.exists():
            for text in self._file.read_bytes().decode(errors="replace").splitlines():
                try:
                    keep = json.loads(text)["step"] <= step
                except ValueError:
                    break
                if keep:
                    self._written.append(text)
            self._file.write_bytes("".join(f"{text}\n" for text in self._written).encode())
        elif self._file.is_local:
            Path(self._file.path).parent.mkdir(parents=True, exist_ok=True)

    def add(self, **line: Any) -> None:
        self._waiting.append(json.dumps(line))

    def flush(self, *, upload: bool) -> None:
        """Writes what was added; object stores, which don't append, get the whole file with `upload`."""
        if self._file.is_local:
            with Path(self._file.path).open("a", encoding="utf-8") as file:
                file.writelines(f"{text}\n" for text in self._waiting)
        else:
            self._written += self._waiting
            if upload:
                self._file.write_bytes("".join(f"{text}\n" for text in self._written).encode())
        self._waiting = []


class Logs:
    """`history.jsonl` of the run (rank 0) and, where asked for, `rows/rank-R.jsonl`: which rows this worker saw at which step."""

    def __init__(self, folder: Folder, rank: int, world: int, steps_per_epoch: int, *, record_rows: bool):
        self._per_epoch = steps_per_epoch
        self._history = StepLog(folder / "history.jsonl") if rank == 0 else None
        self._rows = StepLog(folder / "rows" / f"rank-{rank}.jsonl") if record_rows else None
        names = (folder / "rows").names()  # also of workers that are no more, each restarted by one that is
        numbers = [name.removeprefix("rank-").removesuffix(".jsonl") for name in names]
        self._gone = [
            StepLog(folder / "rows" / f"rank-{number}.jsonl")
            for number in numbers
            if number.isdigit() and int(number) % world == rank != int(number)
        ]
        self._started = False

    def rows(self, step: int, row_ids: list[str]) -> None:
        """Optimizer step (from 1) and the row of each example."""
        if self._rows is not None:
            self._rows.add(epoch=(step - 1) // self._per_epoch, step=step, row_ids=list(dict.fromkeys(row_ids)))

    def progress(self, progress: Any) -> None:
        logs = [log for log in (self._history, self._rows) if log is not None]
        if not self._started:
            for log in [*logs, *self._gone]:
                log.restart(progress.resumed_from or 0)
            self._started = True
        if self._history is not None and progress.rows:
            line = {
                name: getattr(progress, name)
                for name in ("step", "epoch", "loss", "learning_rate", "grad_norm", "rows", "seconds", "wait_seconds")
            }
            self._history.add(**line, **({"metrics": progress.metrics, "best": progress.best} if progress.metrics is not None else {}))
        for log in logs:
            log.flush(upload=progress.saved)


def _newest_step(folder: Folder) -> int:
    """Where training probably goes on; should the newest checkpoint be torn, the loop asks for rows from another step."""
    names = (folder / "checkpoints").names()
    return max((int(name.removeprefix("step-")) for name in names if name.removeprefix("step-").isdigit()), default=0)


def _require_shared(work: Work) -> None:
    if not (work.folder / work.marker).exists():
        import socket

        raise InputError(
            f"storage: {str(work.folder)!r} is not the same folder on the node {socket.gethostname()}: a file that was written to it where the job runs is not there. "
            "With workers on several nodes, storage must be a folder that all of them share, or a URI such as s3://bucket/runs."
        )


def _require_equal(model: Any, when: str) -> None:
    """Raises `StageError` on every worker unless all have the same trained weights, to the bit."""
    import torch
    import torch.distributed as dist

    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.int64, device=device)
    for place, parameter in enumerate(parameter for parameter in model.parameters() if parameter.requires_grad):
        bits = parameter.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()])
        total = total * 31 + bits.sum(dtype=torch.int64) + place
    sums = [torch.zeros_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, total)
    if len({int(one) for one in sums}) > 1:
        found = ", ".join(f"worker {rank}: {int(one) & (2**64 - 1):016x}" for rank, one in enumerate(sums))
        raise StageError(
            f"The workers' weights differ {when} ({found}): gradients were not exchanged. Please report this with the job file."
        )


def _sum_up(tally: Tally, stream: Any) -> dict[str, Any]:
    """Figures of the attempt over all workers."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    )
    mine = {"encoded": stream.encoded, "truncated": stream.truncated, "waited": tally.waited, "seconds": tally.seconds, "peak": peak}
    every: list[Any] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
    seconds = max(one["seconds"] for one in every)
    encoded = sum(one["encoded"] for one in every)
    cut = [one["truncated"] for one in every if one["truncated"] is not None]
    return {
        "examples_per_second": tally.rows / seconds if seconds else 0.0,
        "data_wait_share": sum(one["waited"] for one in every) / (sum(one["seconds"] for one in every) or 1.0),
        "peak_memory_bytes": int(max(one["peak"] for one in every)),
        "truncated_share": sum(cut) / encoded if cut and encoded else None,
    }


def seed(seed: int) -> None:
    """Of everything in this process that draws at random."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
