"""Does the job fit this data and this cluster? Asked before any CPU is held; each answer is a sentence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from orchestrator.config import JobConfig, digest
from orchestrator.data import sources
from orchestrator.doctor import Check
from orchestrator.errors import InputError, did_you_mean
from orchestrator.search.space import Space
from orchestrator.storage import Folder
from orchestrator.tasks.base import RowError, Task

GIB = 2**30


def check(job: JobConfig, *, serve: bool = True, embedded: bool = True) -> list[Check]:
    """All that can be known of a job without starting anything, in seconds. A check that failed has `ok=False`.

    Without `serve` the registry is not looked at: nothing up to evaluation needs it. Unless `embedded` the machine is not
    either: a running cluster is asked once it is connected (`require_resources`).
    """
    asked = {"registry": serve, "machine": embedded, "search": job.search is not None}
    looks = {name: look for name, look in _LOOKS.items() if asked.get(name, True)}
    return [_outcome(name, look, job) for name, look in looks.items()]


def token_views(job: JobConfig, rows: int) -> list[list[tuple[str, bool]]]:
    """For the first `rows` training rows the tokens that the model learns from, and whether each counts in the loss.

    `InputError` where a row can't be used, or where the task's rows have no tokens of which some are left out.
    """
    from orchestrator import processors, scratch

    if job.model.base.startswith(scratch.SCHEME):
        raise InputError(f"--show-tokens: {job.model.base} has no tokenizer before one is fitted on the prepared rows.")
    peek = sources.peek(job.data, "train", rows)
    mapping = sources.map_columns(job.data, job.task.columns(), peek.columns)
    base = scratch.local(job.model, job.task)
    processor = processors.of(job.task, base, trust_remote_code=job.model.trust_remote_code, revision=job.model.revision)
    views = []
    for number, values in enumerate(peek.rows, 1):
        try:
            row = job.task.clean({role: values[name] for role, name in mapping.items() if values.get(name) is not None})
            job.task.check_target(row)
        except RowError as error:
            column = mapping.get(error.column, error.column)
            raise InputError(sources.describe(peek.files[0].name, number, column, error.expected, error.found)) from None
        views.append(job.task.token_view(row, processor))
    if not any(views):
        raise InputError(f"--show-tokens: the task {job.task.key} has no tokens of which the loss leaves some out.")
    return views


def require_resources(job: JobConfig, nodes: list[dict[str, float]]) -> None:
    """Raises `InputError` when the workers can't be placed on `nodes` (each with CPU and GPU), which exist by now."""
    wanted = job.resources.num_workers
    if wanted == "auto":
        return
    cpus, gpus = sum(node.get("CPU", 0) for node in nodes), sum(node.get("GPU", 0) for node in nodes)
    each = 1.0 if job.resources.cpus_per_worker == "auto" else job.resources.cpus_per_worker
    each_gpu = job.resources.gpus_per_worker
    what = f"{len(nodes)} nodes with {cpus:g} CPUs" if len(nodes) > 1 else f"{cpus:g} CPUs"
    if each_gpu != "auto" and each_gpu > 0:
        fit = sum(int(node.get("GPU", 0) // each_gpu) for node in nodes)
        if fit < wanted:
            raise InputError(
                f"resources: {wanted} workers of {each_gpu:g} GPU ask for {wanted * each_gpu:g} GPUs, and there are {gpus:g}; "
                f"the most that fits is num_workers: {fit}."
            )
    fit = sum(int(node.get("CPU", 0) // each) for node in nodes)
    if fit < wanted and not (gpus and job.resources.cpus_per_worker == "auto"):
        raise InputError(
            f"resources: {wanted} workers of {each:g} CPU ask for {wanted * each:g} CPUs, and there are {what}; "
            f"the most that fits is num_workers: {fit}."
        )


def _outcome(name: str, look: Callable[[JobConfig], str], job: JobConfig) -> Check:
    try:
        return Check(name=name, ok=True, sentence=look(job))
    except InputError as error:
        return Check(name=name, ok=False, sentence=str(error))


def _data(job: JobConfig) -> str:
    found = []
    for split in ("train", "validation", "test"):
        if getattr(job.data, split) is None:
            continue
        peek = sources.peek(job.data, split)
        roles = job.task.columns()
        sources.map_columns(job.data, roles, peek.columns, where=f"data.{split}")
        found.append(f"{split}: {len(peek.files)} {peek.format} file{'s' * (len(peek.files) != 1)}, columns {', '.join(peek.columns)}")
    unknown = set(job.data.columns) - set(job.task.columns())
    if unknown:
        name = sorted(unknown)[0]
        raise InputError(f"data.columns: the task has no role {name!r}.{did_you_mean(name, job.task.columns())}")
    return "; ".join(found)


def _metrics(job: JobConfig) -> str:
    known = job.task.metrics()
    for name in _asked_metrics(job):
        if name not in known and "/" not in name:  # of one label, as in f1/spam, or the hub's: known when the data is read
            raise InputError(f"metrics: the task has no metric {name!r}.{did_you_mean(name, known)}")
    return f"best checkpoint by {job.training.metric_for_best_model or job.task.objective}"


def _asked_metrics(job: JobConfig) -> list[str]:
    """The metrics that the job names; not the validation loss, by which any task's checkpoints and trials can be told apart."""
    sought = job.search.metric if job.search is not None else None
    best = [job.training.metric_for_best_model, *([sought] if isinstance(sought, str) else sought or [])]
    names = [name.removeprefix("eval_") for name in best if name is not None]
    return [*(job.evaluation.metrics or []), *(name for name in names if name != "loss")]


def _model(job: JobConfig) -> str:
    from orchestrator import models, scratch

    section = job.model
    base = scratch.local(section, job.task)
    with models.explained(job.task, section.base):
        job.task.check_base(base, **models.from_hub(section))
    weights = weight_bytes(job)
    return f"{section.base}{f', {weights / 2**20:.0f} MiB of weights' if weights else ''}"


def require_metrics(job: JobConfig, task: Task) -> None:
    """Raises `InputError` for a metric of a label that the data have not, as in f1/spam. `task` is completed."""
    known = task.metrics()
    kinds = {name.partition("/")[0] for name in known if "/" in name}
    for name in _asked_metrics(job):
        if name not in known and name.partition("/")[0] in kinds:
            raise InputError(f"metrics: the task has no metric {name!r}.{did_you_mean(name, known)}")


def require_parts(job: JobConfig, task: Task) -> None:
    """Raises `InputError` where the base model has not what the job, or a trial of it, wants to adapt or freeze. `task` is completed."""
    from orchestrator import models, scratch

    trials = [] if job.search is None else Space.of(job).check()
    for section in {digest(one.model.to_json()): one.model for one in (job, *trials)}.values():
        if section.lora is not None or section.freeze is not None or section.head_dropout is not None:
            base = scratch.local(section, task)
            models.check(task, section.model_copy(update={"base": base, "parent": None}))


def weight_bytes(job: JobConfig) -> int:
    """Of the base model where it is a local folder; 0 where that is not known before it is fetched or made."""
    from orchestrator import bases, scratch

    if job.model.base.startswith(scratch.SCHEME):
        return 0
    return sum(file.stat().st_size for file in Path(bases.local(job.model.source, job.model.revision)).glob("*.safetensors"))


def _disk(job: JobConfig) -> str:
    folder = Folder(job.storage)
    if not folder.is_local:
        return f"{folder}: not local, its room is not known"
    place = Path(folder.path)
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise InputError(f"storage: {place} can't be written to by this user; set storage to a folder that can.")
    free = shutil.disk_usage(place).free
    weights = weight_bytes(job)
    # Training state is weights + two Adam moments; the best, the kept and the one being written, and the bundle.
    need = 3 * weights * (job.checkpoint.keep + 2) + weights + 2**26
    if free < need:
        raise InputError(
            f"storage: {place} has {free / GIB:.1f} GiB free and this job needs about {need / GIB:.1f} GiB for checkpoints and the bundle."
        )
    return f"{place}: {free / GIB:.0f} GiB free, about {need / GIB:.1f} GiB needed"


def _machine(job: JobConfig) -> str:
    import psutil

    cpus = os.cpu_count() or 1
    require_resources(job, [this_machine()])
    weights = weight_bytes(job)
    workers = job.resources.num_workers if job.resources.num_workers != "auto" else 1
    # Per worker: fp32 weights, gradients, two Adam moments, and about as much again for activations and libraries.
    need = workers * (4 * weights * 1.25 + 0.7 * GIB)
    memory = psutil.virtual_memory().available
    if need > memory:
        raise InputError(
            f"resources: {workers} workers need about {need / GIB:.1f} GiB of memory, and {memory / GIB:.1f} GiB are free; ask for fewer workers or use model.lora."
        )
    return f"{cpus} CPUs, {memory / GIB:.0f} GiB of memory free, about {need / GIB:.1f} GiB needed"


def this_machine() -> dict[str, float]:
    """Its CPU and GPU, as of a node of a cluster."""
    return {"CPU": float(os.cpu_count() or 1), **_gpus()}


def _gpus() -> dict[str, float]:
    """GPUs by their device files: asking torch would cost seconds."""
    return {"GPU": float(sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*")))}


def _registry(job: JobConfig) -> str:
    from orchestrator import registry

    return registry.check(job.registry.uri, Folder(job.storage))


def _search(job: JobConfig) -> str:
    """Every bound and choice of the space, as the trials that would have it: the job, its data and its base model."""
    space = Space.of(job)
    looked = {_base_key(job)}
    for trial in space.check():
        if _base_key(trial) not in looked:
            looked.add(_base_key(trial))
            _model(trial)
    variants = space.data_variants()
    for variant in variants[1:]:
        _data(variant)
    search = space.search
    if search.replay is not None:
        from orchestrator.search import population

        population.plan(space, Folder(search.replay))
    names = ", ".join(f"{'highest' if higher else 'lowest'} {name}" for name, higher in space.objectives)
    sentence = f"{search.num_trials} trials over {', '.join(space.parameters)}, by {search.algorithm} with scheduler {search.scheduler}, for the {names}"
    prepared = f"; data is prepared in {len(variants)} ways" if len(variants) > 1 else ""
    return f"{sentence}{prepared}; the jobs at every bound and choice are valid"


def _base_key(job: JobConfig) -> str:
    """What the look at the base model depends on."""
    return digest([job.task.to_json(), job.model.to_json()])


_LOOKS: dict[str, Callable[[JobConfig], str]] = {
    "data": _data,
    "model": _model,
    "metrics": _metrics,
    "search": _search,
    "machine": _machine,
    "disk": _disk,
    "registry": _registry,
}
