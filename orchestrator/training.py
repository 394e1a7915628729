"""Training on a cluster: Ray Train places the workers and restarts them, the loop does the rest.

Checkpoints are the loop's own, in the run's folder, and not Ray's: so a worker group that is started again, or the whole
job on another number of workers, finds them by itself. Ray is told the metrics of each validation.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator import bundle as bundles
from orchestrator import cluster
from orchestrator.bundle import without_secrets
from orchestrator.config import JobConfig
from orchestrator.errors import InputError, StageError
from orchestrator.progress import Display
from orchestrator.records import PreparedData, TrainRecord
from orchestrator.storage import Folder
from orchestrator.worker import Work, run

POLL_S = 0.2
ACTOR_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Workers:
    """What training asks of the cluster, with nothing left to "auto"."""

    num_workers: int
    cpus: float
    gpus: float
    threads: int

    @property
    def each(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


def workers(job: JobConfig, nodes: Sequence[Mapping[str, float]]) -> Workers:
    """The workers for a job on `nodes` (each with its CPU and GPU).

    Where the job leaves it open: one worker a GPU, else one; of the CPUs as many as each worker can have on the nodes,
    less an eighth for encoding from four on, and half of them beside a GPU, at most eight.
    """
    asked = job.resources
    has_gpus = sum(int(node.get("GPU", 0)) for node in nodes) > 0
    gpus = (1.0 if has_gpus else 0.0) if asked.gpus_per_worker == "auto" else float(asked.gpus_per_worker)
    if asked.num_workers == "auto":
        number = max(1, sum(int(node.get("GPU", 0) // gpus) for node in nodes)) if gpus else 1
    else:
        number = asked.num_workers
    if asked.cpus_per_worker == "auto":
        most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
        fitting = (cpus for cpus in range(most, 0, -1) if _fit(nodes, cpus, gpus) >= number)
        cpus = next(fitting, 1)
        cpus = float(min(8, max(1, cpus // 2)) if gpus else cpus - max(1, cpus // 8) if cpus >= 4 else cpus)
    else:
        cpus = float(asked.cpus_per_worker)
    threads = max(1, int(cpus)) if asked.threads_per_worker == "auto" else asked.threads_per_worker
    return Workers(number, cpus, gpus, threads)


def global_batch_size(job: JobConfig) -> int:
    """Rows per optimizer step of this job on the connected cluster."""
    return job.training.global_batch(workers(job, _nodes()).num_workers)


def train(job: JobConfig, prepared: PreparedData, folder: Folder, display: Display) -> TrainRecord:
    """Fine-tunes on the connected cluster; the state of training and the bundle with the best weights are in `folder`.

    Continues from the newest complete checkpoint there. Raises `InputError` and `StageError`.
    """
    called = time.time()
    found = fit(job, prepared, folder, display)
    if not (Folder(found["bundle"]) / "manifest.json").exists():
        raise StageError(
            f"The workers wrote the bundle to {found['bundle']!r}, but it is not there on this machine: storage must be a folder that all nodes share, or a URI."
        )
    timings = _timings(called, found.pop("marks"))
    return TrainRecord(**found, seconds=time.time() - called, timings=timings, history=str((folder / "history.jsonl").uri))


def fit(
    job: JobConfig, prepared: PreparedData, folder: Folder, display: Display, *, goes_on: Callable[[dict[str, Any]], bool] | None = None
) -> dict[str, Any]:
    """Trains as `train` does and returns what the first worker says of it.

    With `goes_on` no bundle is written: after each validation the workers wait for what it says of their report, and end
    in order where it says no.
    """
    if not prepared.splits.get("train") or not prepared.splits["train"].rows:
        raise InputError("There are no rows to train on.")
    import ray
    import ray.exceptions
    import ray.train
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestrator.data.stream import lanes

    nodes = _nodes()
    asked = workers(job, nodes)
    alone = goes_on is None  # else the CPUs that seem to be spare are other trials'
    tasks, task_cpus = lanes(sum(node.get("CPU", 0) for node in nodes), asked.cpus, asked.num_workers) if alone else (1, 0)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    reports = ray.remote(Reports).options(num_cpus=0, scheduling_strategy=here).remote()
    marker = f".here-{uuid.uuid4().hex[:8]}"
    folder.make()
    (folder / marker).write_bytes(b"")
    work = Work(
        job=job, prepared=prepared, folder=folder, lineage=lineage(job, prepared), threads=asked.threads, tasks=tasks, task_cpus=task_cpus,
        reports=reports, marker=marker, asks=goes_on is not None,
    )  # fmt: skip
    follower = Follower(display)
    name = f"train-{uuid.uuid4().hex[:8]}"
    trainer = _lean_trainer()(
        _worker_function(work),
        scaling_config=ray.train.ScalingConfig(
            num_workers=asked.num_workers,
            use_gpu=asked.gpus > 0,
            resources_per_worker={"CPU": asked.cpus, **({"GPU": asked.gpus} if asked.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=(folder / "ray").path,
            storage_filesystem=folder.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=job.resources.max_failures, controller_failure_limit=0),
            callbacks=[_failures(reports)],
        ),
    )
    display.say(
        f"{asked.num_workers} worker{'s' * (asked.num_workers > 1)} with {asked.each} and {asked.threads} thread{'s' * (asked.threads > 1)} each"
    )
    running = Fit(trainer, "train")
    try:
        with environment(
            RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5",
            RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=f"{job.resources.start_timeout_s:g}",
            # A single node that is drained takes everything with it: nothing to watch for, and a process less.
            RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=f"{int(len(nodes) > 1)}",
        ):
            running.start()
            while running.is_alive():
                drained = ray.get(reports.drain.remote(), timeout=ACTOR_TIMEOUT_S)
                follower.follow(drained)
                for report in drained:
                    if goes_on is not None and report.get("metrics") is not None:
                        ray.get(reports.decide.remote(report["attempt"], report["step"], goes_on(report)), timeout=ACTOR_TIMEOUT_S)
                running.join(POLL_S)
        follower.follow(ray.get(reports.drain.remote(), timeout=ACTOR_TIMEOUT_S))
    finally:
        ray.kill(reports)  # pyright: ignore[reportArgumentType]
        (folder / marker).delete()
        (folder / "ray").delete()
    if running.error is not None:
        raise _explain(running.error, asked, job, folder) from running.error
    return dict(running.result.return_value)


def lineage(job: JobConfig, prepared: PreparedData) -> dict[str, Any]:
    """Where a model comes from."""
    return without_secrets(
        {
            "run": job.run_id,
            "data": {
                "fingerprint": prepared.fingerprint,
                "root": prepared.root,
                "sources": prepared.sources,
                "rows": {name: split.rows for name, split in prepared.splits.items()},
            },
            "base_model": {"base": job.model.base, "revision": job.model.revision},
            **_parent(job),
            "git_commit": _git_commit(),
        }
    )


def _parent(job: JobConfig) -> dict[str, Any]:
    """The bundle that is this model's base, where it is one."""
    if job.model.parent is None:
        return {}
    bundle = bundles.load(job.model.parent)
    return {"parent": {"bundle": job.model.parent, "digest": bundle.digest, "run": bundle.lineage.get("run")}}


class Reports:
    """An actor between rank 0, wherever it is, and the driver, which asks it a few times a second."""

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []
        self._verdicts: dict[tuple[str, int], bool] = {}

    def put(self, reports: list[dict[str, Any]]) -> None:
        self._waiting += reports

    def drain(self) -> list[dict[str, Any]]:
        reports, self._waiting = self._waiting, []
        return reports

    def decide(self, attempt: str, step: int, goes_on: bool) -> None:
        self._verdicts[attempt, step] = goes_on

    def verdict(self, attempt: str, step: int) -> bool | None:
        """What the driver said of the validation of a step; None: nothing yet."""
        return self._verdicts.get((attempt, step))


class Follower:
    """Shows the workers' reports to a person."""

    def __init__(self, display: Display):
        self._display = display
        self._attempt: str | None = None
        self._recent: list[tuple[int, float]] = []

    def follow(self, reports: Sequence[dict[str, Any]]) -> None:
        last = None
        for report in reports:
            if "failure" in report:
                self._display.warn(report["failure"])
                continue
            if "said" in report:
                self._display.say(report["said"])
                continue
            if report["attempt"] != self._attempt:
                self._begin(report)
            for note in report["notes"]:
                self._display.warn(note)
            if report["rows"]:
                self._recent = [*self._recent[-49:], (report["rows"], report["seconds"])]
                last = report
            if report["metrics"] is not None:
                figures = ", ".join(f"{name} {value:.4g}" for name, value in report["metrics"].items() if "/" not in name)
                self._display.say(
                    f"step {report['step']}, epoch {report['epoch']:.3g}: {figures}{' (best so far)' if report['best'] else ''}"
                )
            if report["stopped"]:
                self._display.say(f"stopped early at step {report['step']}: {report['stopped']}")
        if last is not None:
            self._show(last)

    def _begin(self, report: dict[str, Any]) -> None:
        step = report["resumed_from"]
        if step is not None:
            self._display.say(f"continues from the checkpoint of step {step} of {report['total_steps']}")
        elif self._attempt is not None:
            self._display.say("starts again from the beginning: there was no checkpoint yet")
        self._attempt, self._recent = report["attempt"], []

    def _show(self, report: dict[str, Any]) -> None:
        rows, seconds = (sum(values) for values in zip(*self._recent, strict=True))
        rate = f"{rows / max(seconds, 1e-9):.0f} examples/s"
        self._display.step(report["step"], report["total_steps"], loss=report["loss"], lr=report["learning_rate"], rate=rate)


def _lean_trainer() -> Any:
    """Ray's `TorchTrainer` without two processes that do nothing here, and whose imports hold up the workers' on a small machine.

    One hands out data sets given to the trainer, of which there are none. The other clears up after a killed driver by asking
    the dashboard; without one it can't, and an embedded cluster ends with its driver.
    """
    from ray.train.torch import TorchTrainer

    needless = {"DatasetsCallback"} | (set() if cluster.has_dashboard() else {"PlacementGroupCleanerCallback"})

    class LeanTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> Any:
            return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in needless]

    return LeanTrainer


class Fit(threading.Thread):
    """`fit()` of a trainer or tuner of Ray in a thread: in the main one it would take over Ctrl-C and end the process with status 0."""

    def __init__(self, fitted: Any, name: str):
        super().__init__(name=name, daemon=True)
        self._fitted = fitted
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._fitted.fit()
        except BaseException as error:  # noqa: BLE001  it belongs to the thread that waits for this one
            self.error = error


def _worker_function(work: Work) -> Any:
    def train_worker() -> Any:
        return run(work)

    return train_worker


def _failures(reports: Any) -> Any:
    """Decides, in Ray's controller, which failures are worth a restart of the workers: what a worker said itself is not."""
    from ray.train import UserCallback

    class Failures(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if (
                    isinstance(error, (InputError, StageError))
                    or _is_full(error)
                    or _is_out_of_memory(error)
                    or (not isinstance(error, (OSError, RuntimeError)) and not _is_death(error))
                ):
                    raise error  # a callback's error ends the run; a restart would end the same way
            rank, error = next(iter(worker_exceptions.items()))
            reports.put.remote([{"failure": f"Worker {rank} failed: {one_line(error)}. The workers start again."}])

    return Failures()


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _is_out_of_memory(error: BaseException) -> bool:
    """As torch says it of a GPU; not that Ray or the kernel killed the process, after which there may be room."""
    return type(error).__name__ == "OutOfMemoryError" and isinstance(error, RuntimeError) and not _is_death(error)


def _is_death(error: BaseException) -> bool:
    """A process or node is gone, rather than that its code raised something."""
    import ray.exceptions
    from ray.train import TrainingFailedError

    inner = getattr(error, "health_check_failure", error)
    return isinstance(inner, (ray.exceptions.RayError, TrainingFailedError)) or type(error).__module__.startswith("ray.")


def _explain(error: BaseException, asked: Workers, job: JobConfig, folder: Folder) -> Exception:
    """The sentence for what `fit` raised."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, (InputError, StageError)):
            return cause
    text = "".join(traceback.format_exception(error)) + "".join(f"\n{type(cause).__name__}: {cause}\n" for cause in causes)
    log = folder / "failure.log"
    log.write_bytes(text.encode())
    if any("StartupTimeout" in type(cause).__name__ or "InsufficientCluster" in type(cause).__name__ for cause in causes):
        return StageError(
            f"{asked.num_workers} workers with {asked.each} each could not be placed within {job.resources.start_timeout_s:g} s. "
            f"{room()} Lower resources.num_workers or cpus_per_worker, or add nodes."
        )
    root = causes[-1]
    tries = f" after {job.resources.max_failures} restarts" if _is_death(root) and job.resources.max_failures else ""
    return StageError(
        f"Training failed{tries}: {'a worker failed, ' if _is_death(root) else ''}{one_line(root)}. The whole story is in {log}; the same command continues from the last checkpoint."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what is inside it, the innermost last; of several workers, one that did not just lose another."""
    import ray.exceptions
    from ray.train import ControllerError, WorkerGroupError

    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, ControllerError):
            seen = seen.controller_failure
        elif isinstance(seen, WorkerGroupError):
            failures = sorted(seen.worker_failures.items(), key=lambda failure: (not _is_death(failure[1]), failure[0]))
            seen = failures[0][1] if failures else None
        elif isinstance(seen, ray.exceptions.RayTaskError):
            seen = seen.cause if seen.cause is not seen else None
        else:
            seen = getattr(seen, "health_check_failure", None)


def one_line(error: BaseException) -> str:
    """What an error says, for a sentence."""
    text = " ".join(str(error).split())
    if isinstance(error, (InputError, StageError)):
        return text
    if _is_death(error):
        place = re.search(r"\bip: (\S+)", text)
        return f"its process{f' on node {place[1]}' if place else ''} died, killed or out of memory"
    return f"{type(error).__name__}: {text[:300]}{'…' if len(text) > 300 else ''}".rstrip(": .")


def _fit(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many workers of this size the nodes hold."""
    return sum(min(int(node.get("CPU", 0) // cpus), int(node.get("GPU", 0) // gpus) if gpus else 10**9) for node in nodes)


def _nodes() -> Sequence[Mapping[str, float]]:
    return cluster.resources().nodes


def _describe(nodes: Sequence[Mapping[str, float]]) -> str:
    return (
        "; ".join(
            f"node {place}: {node.get('CPU', 0):g} CPU" + (f", {node['GPU']:g} GPU" if node.get("GPU") else "")
            for place, node in enumerate(nodes, start=1)
        )
        or "none is alive"
    )


def room() -> str:
    """A sentence: what the nodes have, and what of it is free."""
    return f"The nodes have: {_describe(_nodes())}; free now: {_free()}."


def _free() -> str:
    import ray

    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPU" + (f", {free['GPU']:g} GPU" if free.get("GPU") else "")


def _timings(called: float, marks: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each part of the way from the call to the first step."""
    timings, before = {}, called
    for name in ("workers", "imports", "model", "setup", "first_rows", "first_step"):
        if name in marks:
            timings[name] = round(max(0.0, marks[name] - before), 3)
            before = marks[name]
    return timings | {"total": round(before - called, 3)}


def _git_commit() -> str | None:
    """The commit of the working directory, `+changes` where it has some; None where there is no git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for a while; one that the user has set stays."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
