"""How many trials of a sweep run at once, and what each gets of the cluster."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config import JobConfig
from orchestrator.errors import InputError
from orchestrator.search.rules import MUTATING
from orchestrator.training import workers

GIB = 2**30
PROCESS_BYTES = 0.7 * GIB
"""Of a trial's process without a model: libraries and rows."""
GPU_BYTES = 1.0 * GIB
"""Of a process on a GPU without a model."""
SHARES = 4
"""Most trials that share a GPU: more take turns rather than run together."""
CPUS_BESIDE_GPU = 8


@dataclass(frozen=True)
class Places:
    """What a trial gets, with nothing left to "auto"."""

    at_once: int
    """Trials at the same time."""
    cpus: float
    """Of a trial's own process; none where its workers do the work."""
    gpus: float
    threads: int
    """Of torch, in each worker."""
    workers: int = 1
    worker_cpus: float = 0.0
    """Of each worker, where a trial has several."""
    worker_gpus: float = 0.0

    @property
    def sentence(self) -> str:
        """For example: 2 trials at once, each with 1 CPU and 1 thread."""
        cpus, gpus = (self.worker_cpus, self.worker_gpus) if self.workers > 1 else (self.cpus, self.gpus)
        each = _resources(cpus, gpus)
        what = f"{self.workers} workers with {each} each" if self.workers > 1 else each
        return (
            f"{self.at_once} trial{'s' * (self.at_once > 1)} at once, each with {what} and {self.threads} thread{'s' * (self.threads > 1)}"
        )


def places(job: JobConfig, nodes: Sequence[Mapping[str, float]], *, weights: int = 0, gpu_memory: int = 0) -> Places:
    """The places for a sweep's trials on `nodes` (each with its CPU, GPU and memory).

    Where the job leaves it open: a CPU a trial, more where there are fewer trials than CPUs or where the memory is too small for one
    on each; with GPUs as large a part of one as the model needs by its `weights` (bytes), out of `gpu_memory` bytes.
    Raises `InputError` where no trial can be placed.
    """
    search = job.search
    assert search is not None
    most = search.num_trials if search.max_concurrent_trials == "auto" else min(search.num_trials, search.max_concurrent_trials)
    if search.workers_per_trial > 1:
        return _several(job, nodes, most)
    has_gpus = any(node.get("GPU", 0) for node in nodes)
    gpus = float(search.gpus_per_trial) if search.gpus_per_trial != "auto" else _gpu_share(weights, gpu_memory) if has_gpus else 0.0
    if search.cpus_per_trial != "auto":
        cpus = float(search.cpus_per_trial)
    elif gpus:
        beside = [node.get("CPU", 0) / (node["GPU"] / gpus) for node in nodes if node.get("GPU", 0) >= gpus]
        cpus = float(max(1, min(CPUS_BESIDE_GPU, math.floor(min(beside, default=1)))))
    else:
        cpus = _cpus(nodes, most, 4 * weights * 1.25 + PROCESS_BYTES)
    fit = sum(_fit(node, cpus, gpus) for node in nodes)
    while search.scheduler in MUTATING and fit > most:  # a population takes turns, all of it: nothing but room bounds those that run
        cpus += 1.0
        fit = sum(_fit(node, cpus, gpus) for node in nodes)
    if not fit:
        raise InputError(
            f"search: a trial asks for {_resources(cpus, gpus)}, and no node has that: {_shown(nodes)}. Lower search.cpus_per_trial or gpus_per_trial."
        )
    return Places(at_once=min(most, fit), cpus=cpus, gpus=gpus, threads=max(1, int(cpus)))


def _several(job: JobConfig, nodes: Sequence[Mapping[str, float]], most: int) -> Places:
    """Of trials with several workers, which Ray Train places: the trial's own process only waits for them."""
    search = job.search
    assert search is not None
    number = search.workers_per_trial
    asked = workers(job.model_copy(update={"resources": job.resources.model_copy(update={"num_workers": number})}), nodes)
    cpus = 1.0 if search.cpus_per_trial == "auto" and not asked.gpus else asked.cpus
    cpus = float(search.cpus_per_trial) if search.cpus_per_trial != "auto" else cpus
    gpus = float(search.gpus_per_trial) if search.gpus_per_trial != "auto" else asked.gpus
    fit = sum(_fit(node, cpus, gpus) for node in nodes)
    if fit < number:
        raise InputError(
            f"search.workers_per_trial: {number} workers ask for {_resources(cpus, gpus)} each, and {fit} of them fit: {_shown(nodes)}. "
            f"Lower search.workers_per_trial or cpus_per_trial."
        )
    return Places(
        at_once=min(most, fit // number), cpus=0.0, gpus=0.0, threads=max(1, int(cpus)), workers=number, worker_cpus=cpus, worker_gpus=gpus
    )


def _gpu_share(weights: int, memory: int) -> float:
    """The part of a GPU that a trial takes: weights, gradients and two moments in fp32, and as much again for activations."""
    if not weights or not memory:
        return 1.0
    return 1.0 / max(1, min(SHARES, int(0.9 * memory // (8 * weights + GPU_BYTES))))


def _cpus(nodes: Sequence[Mapping[str, float]], most: int, memory: float) -> float:
    """CPUs of a trial: all are in use where there are few trials, and no more trials than the memory holds."""
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    for cpus in range(max(1, largest), 0, -1):
        if sum(_fit(node, cpus, 0.0) for node in nodes) >= most:
            break
    else:
        cpus = 1
    while cpus < largest and any(_fit(node, cpus, 0.0) * memory > node["memory"] for node in nodes if node.get("memory")):
        cpus += 1
    return float(cpus)


def _fit(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    by_cpu = int((node.get("CPU", 0) + 1e-6) // cpus)
    return min(by_cpu, int((node.get("GPU", 0) + 1e-6) // gpus)) if gpus else by_cpu


def _resources(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU" + (f" and {gpus:.3g} GPU" if gpus else "")


def _shown(nodes: Sequence[Mapping[str, float]]) -> str:
    return "; ".join(f"node {place}: {_resources(node.get('CPU', 0), node.get('GPU', 0))}" for place, node in enumerate(nodes, start=1))
