"""One trial of a sweep, in the process that Ray Tune gives it: a job with the sample's settings, trained by the loop.

All that a trial knows is in its folder, so it can be killed at any time: started again it continues from its checkpoint,
and what it had reported is reported again. What trials share (libraries, encoded rows, base weights) is loaded once a
process and kept for the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.config import JobConfig, digest
from orchestrator.records import PreparedData, TrainRecord
from orchestrator.storage import Folder

if TYPE_CHECKING:
    from orchestrator.space import Space

POPULATION = ("pbt", "pb2")
"""Schedulers whose trials change their sample on the way."""
PAUSING = (*POPULATION, "hyperband")
"""Schedulers that pause trials: they need a complete checkpoint at every report."""


@dataclass(frozen=True)
class Sweep:
    """All that a trial is told beside its sample. It pickles, and is small."""

    job: JobConfig
    """The base job, `search` included."""
    space: Space
    folder: Folder
    """Of the sweep; the trials' are in it."""
    prepared: dict[str, PreparedData]
    """`variant(job)` -> its data, for each of `space.data_variants()`."""
    report_every: float
    """Epochs from one validation to the next."""
    threads: int = 1
    """Of torch, in each worker."""
    cpus_per_worker: float = 1.0
    """Only with `search.workers_per_trial` above 1: what each worker of a trial gets."""
    gpus_per_worker: float = 0.0

    def trial_folder(self, sample: dict[str, Any], trial_id: str) -> Folder:
        """Where a trial keeps all its state; `trial_id` is Ray Tune's, used where the sample changes on the way."""
        raise NotImplementedError


def variant(job: JobConfig) -> str:
    """Which prepared data a job needs: jobs with equal task and data share it."""
    return digest(job.model_dump(mode="json", include={"task", "data"}))[:12]


def trainable(config: dict[str, Any], *, sweep: Sweep) -> None:
    """What Ray Tune calls with {"sample": …, "number": …, "origin": …}, as `tune.with_parameters(trainable, sweep=sweep)`."""
    raise NotImplementedError


def write_bundle(sweep: Sweep, folder: Folder, step: int) -> TrainRecord:
    """Writes the bundle of the trial in `folder` with the weights of its checkpoint of `step`; runs anywhere, needs no Ray."""
    raise NotImplementedError


def note_out_of_memory(folder: Folder) -> int:
    """For the driver: the process of the trial in `folder` was killed for want of memory. Its next attempt halves its micro-batch.

    Returns how often that has happened.
    """
    raise NotImplementedError
