"""A sweep as its trials know it: the jobs that they train, and the folders in which they keep how they stand.

job.json        the job that a trial trains
trial.json      what it is and how it stands: sample, status, process, seconds, figures of the training
checkpoints/    the loop's own
history.jsonl   a line for each optimizer step
reports.jsonl   a line for each report to Ray Tune
oom.json        how often its process was killed for want of memory; the driver says so
failure.log     the whole story of its last failure
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator import worker
from orchestrator.config import JobConfig, SearchSection
from orchestrator.errors import InputError
from orchestrator.records import PreparedData
from orchestrator.search.space import Space, data_key, member
from orchestrator.storage import Folder

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
    """`space.data_key(job)` -> its data, for each of `space.data_variants()`."""
    report_every: float
    """Epochs from one validation to the next."""
    threads: int = 1
    """Of torch, in each worker."""
    cpus_per_worker: float = 1.0
    """Only with `search.workers_per_trial` above 1: what each worker of a trial gets."""
    gpus_per_worker: float = 0.0

    @property
    def population(self) -> bool:
        """Whether samples change while trials train."""
        return self.search.scheduler in POPULATION or self.search.replay is not None

    @property
    def pauses(self) -> bool:
        return self.search.scheduler in PAUSING or self.search.replay is not None

    @property
    def search(self) -> SearchSection:
        return self.space.search

    @property
    def objective(self) -> str:
        """The metric that decides."""
        return self.space.objectives[0][0]

    def trial_folder(self, config: Mapping[str, Any]) -> Folder:
        """Where a trial keeps all its state: named by its sample, or in a population, where that changes on the way, by its number."""
        return self.folder / "trials" / (member(config["number"]) if self.population else self.space.key(config["sample"]))

    def job_of(self, sample: dict[str, Any]) -> JobConfig:
        """The job that a trial trains: the sample's, validated by the sweep's clock and judged by its first objective."""
        job = self.space.apply(sample)
        workers = self.search.workers_per_trial
        steps_per_epoch = -(-self.prepared_for(job).splits["train"].rows // job.training.global_batch(workers))
        every = max(1, round(self.report_every * steps_per_epoch))
        settings: dict[str, Any] = {"eval_steps": every}
        if self.pauses:
            settings["save_steps"] = every
        elif job.training.save_steps is None:  # where it validates: then one checkpoint does for both
            from orchestrator.loop import save_every

            settings["save_steps"] = every * max(1, round(save_every(job.training, steps_per_epoch) / every))
        wanted = [*(job.evaluation.metrics or ()), *(name for name, _ in self.space.objectives if name != "loss")]
        sections: dict[str, Any] = {
            "training": job.training.model_copy(update=settings),
            "evaluation": job.evaluation.model_copy(update={"metrics": list(dict.fromkeys(wanted))}),
        }
        if workers > 1:
            asked = {"cpus_per_worker": self.cpus_per_worker, "gpus_per_worker": self.gpus_per_worker}
            sections["resources"] = job.resources.model_copy(update={**asked, "threads_per_worker": self.threads})
        if self.population:  # a stronger trial's checkpoint is asked for up to an interval after it was made
            interval = math.ceil((self.search.perturb_every or self.report_every) / self.report_every)
            sections["checkpoint"] = job.checkpoint.model_copy(update={"keep": max(job.checkpoint.keep, interval + 1)})
        return job.model_copy(update=sections)

    def prepared_for(self, job: JobConfig) -> PreparedData:
        """The data of a trial's job. `InputError` where there is nothing to train on or to judge by."""
        prepared = self.prepared[data_key(job)]
        for split, what in (
            ("train", "train on"),
            ("validation", "compare trials by; set data.validation or data.split.validation above 0"),
        ):
            if split not in prepared.splits or not prepared.splits[split].rows:
                raise InputError(f"There are no {split} rows to {what}.")
        return prepared

    def identity(self, job: JobConfig) -> str:
        """Of the checkpoints of a trial's job; members of a population can take each other's."""
        return worker.identity(job, self.prepared_for(job), self.space.mutable if self.population else ())


def read_state(folder: Folder) -> dict[str, Any] | None:
    """What stands in a trial's trial.json; None: it has not begun."""
    place = folder / "trial.json"
    return place.read_json() if place.exists() else None


def note_out_of_memory(folder: Folder) -> int:
    """For the driver: the process of the trial in `folder` was killed for want of memory. Its next attempt halves its micro-batch.

    Returns how often that has happened.
    """
    count = killed(folder) + 1
    (folder / "oom.json").write_json({"count": count})
    return count


def release(folder: Folder) -> None:
    """For the driver: gives back what the workers of a trial held whose process was killed (Ray keeps it until the job ends)."""
    state = read_state(folder)
    if state is None or state["place"] is None:
        return
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(state["place"]))))


def killed(folder: Folder) -> int:
    """How often the driver has noted that."""
    place = folder / "oom.json"
    return place.read_json()["count"] if place.exists() else 0
