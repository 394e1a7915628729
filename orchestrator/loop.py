"""The training loop: epochs, validation, checkpoints, early stopping; it yields one `Progress` an optimizer step.

It knows no Ray and no task: it runs alone, or in every process of a process group that Ray Train or torchrun has set up.
What it computes is a function of the job and the global batches, whatever the number of workers, and a run that continues
from a checkpoint has the losses of one that was never stopped.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from orchestrator import checkpoints, models
from orchestrator.checkpoints import Checkpoint
from orchestrator.dropout import row_keyed
from orchestrator.errors import InputError, StageError
from orchestrator.freezing import still
from orchestrator.step import Share, Stepper
from orchestrator.storage import Folder
from orchestrator.tasks.base import Task

if TYPE_CHECKING:
    from orchestrator.config import CheckpointSection, TrainingSection

__all__ = ["Progress", "Share", "Stream", "save_every", "total_steps", "train"]

WRITE_TIMEOUT_S = 1800.0
log = logging.getLogger(__name__)


class Stream(Protocol):
    """This worker's shares of the global batches. Their place depends on (epoch, step) alone."""

    @property
    def rows(self) -> int:
        """Of all workers, an epoch."""
        ...

    @property
    def steps_per_epoch(self) -> int: ...

    def steps(self, epoch: int, start: int) -> Iterator[Share]:
        """The shares of an epoch from step `start` on: `steps_per_epoch - start` on every worker, none of them empty."""
        ...


@dataclass(frozen=True)
class Progress:
    """What one optimizer step did; the same on every worker but for the seconds."""

    step: int
    """Optimizer steps done, from 1."""
    total_steps: int
    epoch: float
    """Epochs done."""
    loss: float
    """Mean over the items of the global batch."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    rows: int
    """Of the global batch."""
    seconds: float
    """Of this step, waiting included, validation and checkpoint left out."""
    wait_seconds: float
    """In which this worker waited for rows."""
    metrics: dict[str, float] | None = None
    """Where this step ended in a validation."""
    saved: bool = False
    """A checkpoint of this step is being written; the last one is complete when the loop ends."""
    best: bool = False
    """This step's weights are the best so far."""
    best_step: int | None = None
    """The step of the best validation so far; None: there was none."""
    best_value: float | None = None
    resumed_from: int | None = None
    """On the first step of a run that continues: the step of the checkpoint."""
    stopped: str | None = None
    """On the last step, where training stops before `total_steps`: why."""
    notes: tuple[str, ...] = ()
    """Sentences for the user: torn checkpoints that were passed over."""


def total_steps(settings: TrainingSection, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run; `num_train_epochs` may be a fraction."""
    return settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * steps_per_epoch)


def save_every(settings: TrainingSection, steps_per_epoch: int) -> int:
    """Steps from one checkpoint to the next."""
    return settings.save_steps or max(10, min(500, steps_per_epoch // 2))


def train(
    task: Task,
    model: torch.nn.Module,
    processor: Any,
    settings: TrainingSection,
    stream: Stream,
    *,
    folder: Folder,
    validate: Callable[[torch.nn.Module], dict[str, float]] | None,
    global_batch_size: int,
    identity: str,
    checkpoint: CheckpointSection,
    on_rows: Callable[[int, list[str]], None] | None = None,
    write_behind: bool = True,
    end_with_best: bool = True,
) -> Generator[Progress, None, None]:
    """Trains `model` in place; when the iterator is exhausted it holds the best weights, on every worker.

    `validate` is called on every worker at the same steps with the model in eval mode, and gives each the same metrics.
    `identity` says what the run computes (data, settings): a checkpoint in `folder` that has another is refused with
    `InputError`. `on_rows` is told after each step which rows of it this worker saw. A run that finds its
    training already finished yields one `Progress` of the last step, with 0 rows. Without `write_behind` a checkpoint is
    complete when the `Progress` that names it comes out; without `end_with_best` the model keeps the last weights.
    """
    per_epoch = stream.steps_per_epoch
    if per_epoch < 1:
        raise InputError("There are no rows to train on.")
    total = total_steps(settings, per_epoch)
    was_training = model.training
    with row_keyed(model, settings.seed) as keys, still(model), contextlib.ExitStack() as stack:
        stepper = Stepper(
            task,
            model,
            processor,
            settings,
            precision=models.hardware_precision(settings.precision),
            total_steps=total,
            global_batch_size=global_batch_size,
            keys=keys,
        )
        stack.callback(lambda: model.train(was_training))
        stack.callback(stepper.close)
        found, notes = _resume(stepper, folder, identity, global_batch_size, per_epoch)
        standing = _Standing(**found.state["standing"]) if found else _Standing()
        done = found.step if found else 0
        writer = stack.enter_context(_Writer(folder, checkpoint.keep)) if stepper.rank == 0 else None
        resumed = found.step if found else None
        if resumed is not None and (done >= total or standing.stopped):
            yield Progress(
                done,
                total,
                done / per_epoch,
                standing.loss,
                0.0,
                0.0,
                0,
                0.0,
                0.0,
                best_step=standing.best_step,
                best_value=standing.best_value,
                resumed_from=done,
                stopped=standing.stopped,
                notes=notes,
            )
        while done < total and not standing.stopped:
            epoch, start = divmod(done, per_epoch)
            shares = stream.steps(epoch, start)
            with contextlib.closing(shares) if hasattr(shares, "close") else contextlib.nullcontext():  # pyright: ignore[reportArgumentType]
                for _ in range(start, min(per_epoch, total - epoch * per_epoch)):
                    began = time.perf_counter()
                    share = next(shares, None)
                    if share is None:
                        raise StageError(f"The rows of epoch {epoch} ended at step {done % per_epoch} of {per_epoch}.")
                    waited = time.perf_counter() - began
                    done += 1
                    outcome = stepper.step(done, share)
                    if on_rows is not None and not share.borrowed:
                        on_rows(done, list(dict.fromkeys(share.row_ids)))
                    progress = Progress(
                        step=done,
                        total_steps=total,
                        epoch=done / per_epoch,
                        loss=outcome.loss,
                        learning_rate=stepper.learning_rate(done),
                        grad_norm=outcome.grad_norm,
                        rows=outcome.rows,
                        seconds=time.perf_counter() - began,
                        wait_seconds=waited,
                        resumed_from=resumed,
                        notes=notes,
                    )
                    resumed, notes = None, ()
                    metrics, best = None, False
                    due = done % settings.eval_steps == 0 if settings.eval_steps else done % per_epoch == 0
                    if validate is not None and (due or done == total):
                        model.eval()
                        metrics = validate(model)
                        model.train()
                        standing, best = standing.after(done, metrics, task, settings)
                    standing = replace(standing, loss=outcome.loss)
                    saved = best or done == total or standing.stopped is not None or done % save_every(settings, per_epoch) == 0
                    if saved and writer is not None:
                        state = {
                            "step": done,
                            "epoch": done // per_epoch,
                            "step_in_epoch": done % per_epoch,
                            "steps_per_epoch": per_epoch,
                            "global_batch_size": global_batch_size,
                            "identity": identity,
                            "best": {"step": standing.best_step, "metrics": standing.best_metrics} if standing.best_step else None,
                            "standing": asdict(standing),
                            "scaler": stepper.scaler_state(),
                        }
                        writer.start(state, stepper)
                        if not write_behind:
                            writer.wait()
                    yield replace(
                        progress, metrics=metrics, saved=saved, best=best, best_step=standing.best_step, best_value=standing.best_value,
                        stopped=standing.stopped,
                    )  # fmt: skip
                    if standing.stopped:
                        break
        if writer is not None:
            writer.wait()
        if end_with_best and standing.best_step not in (None, done):
            _load_best(stepper, folder, standing.best_step)


@dataclass(frozen=True)
class _Standing:
    """The best validation so far, and how long ago it was."""

    best_step: int | None = None
    best_value: float | None = None
    best_metrics: dict[str, float] | None = None
    stale: int = 0
    """Validations in a row that did not improve by more than the threshold."""
    loss: float = math.nan
    stopped: str | None = None

    def after(self, step: int, metrics: dict[str, float], task: Task, settings: TrainingSection) -> tuple[_Standing, bool]:
        """The standing after a validation, and whether it is the best. As transformers' EarlyStoppingCallback."""
        name = (settings.metric_for_best_model or task.objective).removeprefix("eval_")
        if name not in metrics:
            raise InputError(f"training.metric_for_best_model: validation gives no {name!r}; it gives {', '.join(sorted(metrics))}.")
        value = metrics[name]
        gain = math.inf if self.best_value is None else (value - self.best_value) * (1 if task.higher_is_better(name) else -1)
        gain = -math.inf if math.isnan(value) else gain
        best = gain > 0
        stale = 0 if gain > settings.early_stopping_threshold else self.stale + 1
        patience = settings.early_stopping_patience
        stopped = None
        if patience is not None and stale >= patience:
            amount = f" by more than {settings.early_stopping_threshold:g}" if settings.early_stopping_threshold else ""
            at, of = (step, value) if best else (self.best_step, self.best_value)
            stopped = f"{name} has not improved{amount} in {stale} validation{'s' * (stale > 1)}"
            stopped += f"; its best is {of:.4g} at step {at}" if of is not None else " and was never a number"
        if not best:
            return replace(self, stale=stale, stopped=stopped), False
        return replace(self, best_step=step, best_value=value, best_metrics=dict(metrics), stale=stale, stopped=stopped), True


class _Writer:
    """Writes checkpoints beside the training, one at a time; a failure comes out at the next one or at the end."""

    def __init__(self, folder: Folder, keep: int):
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def start(self, state: dict[str, Any], stepper: Stepper) -> None:
        """Copies the tensors, which is all that training waits for."""
        self.wait()
        self._running = self._thread.submit(self._write, state, stepper.state())

    def _write(self, state: dict[str, Any], tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        checkpoints.save(self.folder, state, tensors)
        checkpoints.prune(self.folder, self.keep, state["best"] and state["best"]["step"])

    def wait(self) -> None:
        if self._running is not None:
            try:
                self._running.result(timeout=WRITE_TIMEOUT_S)
            except TimeoutError:
                raise StageError(f"A checkpoint in {str(self.folder)!r} was not written within {WRITE_TIMEOUT_S:.0f} s.") from None
            self._running = None


def _resume(
    stepper: Stepper, folder: Folder, identity: str, global_batch_size: int, per_epoch: int
) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Brings every worker to the newest complete checkpoint; rank 0 reads it for all."""
    answer: list[Any] = [None]
    if stepper.rank == 0:
        try:
            found, torn = checkpoints.latest(folder, identity)
            if found is not None and not _has_best(folder, found):
                torn.append(f"The best checkpoint up to step {found.step} is gone or torn, so the best is looked for from there on.")
                found.state["standing"] |= {"best_step": None, "best_value": None, "best_metrics": None}
            answer = [(found, tuple(torn), None)]
        except InputError as error:
            answer = [(None, (), str(error))]
    if stepper.world > 1:
        dist.broadcast_object_list(answer, src=0)
    found, torn, refusal = answer[0]
    if refusal is not None:
        raise InputError(refusal)
    for sentence in torn:
        log.warning(sentence)
    if found is not None:
        for name, now in (("global_batch_size", global_batch_size), ("steps_per_epoch", per_epoch)):
            if found.state[name] != now:
                raise InputError(
                    f"The checkpoint {str(found.folder)!r} was made with {name} {found.state[name]}, this run has {now}; they can't be one run."
                )
        first = stepper.rank == 0
        stepper.load_weights(found.tensors("model") if first else None)
        stepper.load_moments(found.tensors("optimizer") if first else None, found.state["scaler"])
    if stepper.rank == 0:
        checkpoints.delete_torn(folder, found)
    return found, torn


def _has_best(folder: Folder, found: Checkpoint) -> bool:
    step = found.state["standing"]["best_step"]
    return step in (None, found.step) or checkpoints.at(folder, step) is not None


def _load_best(stepper: Stepper, folder: Folder, step: int | None) -> None:
    answer: list[Any] = [None]
    best = None
    if stepper.rank == 0 and step is not None:
        best = checkpoints.at(folder, step)
        answer = [best is not None]
    if stepper.world > 1:
        dist.broadcast_object_list(answer, src=0)
    if not answer[0]:
        raise StageError(
            f"The checkpoint of step {step}, which has the best weights, is gone from {str(folder / 'checkpoints')!r} or torn; train again."
        )
    stepper.load_weights(best.tensors("model") if best is not None else None)
