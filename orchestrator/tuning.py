"""A sweep on the cluster: Ray Tune runs the trials, the ledger keeps what they say, and the best checkpoint of the best one becomes the bundle.

Each start of a sweep is a fresh run of Ray Tune. What earlier ones found is told to its searcher and its scheduler, and trials that
had not ended come first and go on from their own checkpoints. So it can continue on another cluster, with more trials, whatever died.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator import cluster, preflight
from orchestrator.config import JobConfig
from orchestrator.data.prepare import prepare
from orchestrator.errors import StageError
from orchestrator.progress import Display
from orchestrator.records import PreparedData, SearchRecord, TrainRecord, TrialRecord
from orchestrator.search import disk, ledger, places, searchers, trial, winner
from orchestrator.search.driver import ENDED, SCHEDULE, Driver
from orchestrator.search.ledger import Ledger
from orchestrator.search.space import Space, data_key
from orchestrator.search.sweep import Sweep
from orchestrator.search.view import SweepView
from orchestrator.storage import Folder

BUNDLE_TIMEOUT_S = 1800.0
TRAINED = "train.json"
"""In a trial's folder: the record of its bundle."""


def tune(job: JobConfig, prepared: PreparedData, folder: Folder, display: Display) -> SearchRecord:
    """Runs the sweep of a job's `search` section on the connected cluster, or what is left of it; all its state is in `folder`.

    `prepared` is the data of the job as it is written; what trials need beside it is prepared first.
    Raises `InputError` and `StageError`.
    """
    space = Space.of(job)
    search = space.search
    data = {data_key(job): prepared}
    for variant in space.data_variants():
        if data_key(variant) not in data:
            data[data_key(variant)] = prepare(variant, Folder(job.storage), display)
    nodes = cluster.resources().nodes
    where = places.places(job, nodes, weights=preflight.weight_bytes(job), gpu_memory=_gpu_memory(job, nodes))
    _require_room(job, where.at_once, folder)
    rows = prepared.splits["train"].rows
    sweep = Sweep(
        job=job, space=space, folder=folder, prepared=data, report_every=space.report_every(rows), threads=where.threads,
        cpus_per_worker=where.worker_cpus or 1.0, gpus_per_worker=where.worker_gpus,
    )  # fmt: skip
    known, torn = ledger.read(folder)
    for sentence in torn:
        display.warn(sentence)
    view = SweepView(
        display, objectives=space.objectives, paths=list(space.parameters), num_trials=search.num_trials, examples=space.most_examples(rows),
        max_seconds=search.max_seconds, max_examples=search.max_examples, spent=ledger.spent(folder),
    )  # fmt: skip
    ended = [one for one in known if one.status in ENDED]
    if known:
        display.say(f"continues: {len(ended)} of {search.num_trials} trials have ended, {len(known) - len(ended)} go on")
        view.known(ended)
    display.say(where.sentence)
    folder.make()
    kept = Ledger(
        folder, search, space.objectives, view, rungs=searchers.rungs(space, rows), population=sweep.population, known=known
    )  # fmt: skip
    driver = Driver(sweep, where, kept, display)
    if len(ended) < search.num_trials and driver.ledger.over() is None:
        driver.run(known, rows)
    return _finish(sweep, driver, display)


def look(job: JobConfig, nodes: Sequence[Mapping[str, float]]) -> str:
    """A sentence on the trials of a sweep on `nodes`: how many at once, and what their checkpoints take. Raises `InputError`."""
    search = job.search
    assert search is not None
    where = places.places(job, nodes, weights=preflight.weight_bytes(job))
    need = _require_room(job, where.at_once, Folder(job.storage))
    return f"{where.sentence}; checkpoints and bundles take up to about {need / 1e9:.2g} GB"


def _require_room(job: JobConfig, at_once: int, folder: Folder) -> int:
    search = job.search
    assert search is not None
    weights = preflight.weight_bytes(job)
    # About so much of the weights is trained, and so in a checkpoint.
    trained = weights // 20 if job.model.lora is not None and "model.lora" not in search.space else weights
    return disk.require_room(weights, trained, at_once, search.num_trials, search.max_disk, folder)


def _gpu_memory(job: JobConfig, nodes: Sequence[Mapping[str, float]]) -> int:
    """Bytes of the smallest kind of GPU asked; 0 where nobody needs to know."""
    assert job.search is not None
    if job.search.gpus_per_trial != "auto" or not any(node.get("GPU", 0) for node in nodes):
        return 0
    import ray
    import ray.exceptions

    def memory() -> int:
        import torch

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0

    asked = ray.remote(memory).options(num_cpus=0, num_gpus=0.01).remote()
    try:
        return ray.get(asked, timeout=job.resources.start_timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise StageError(
            f"No GPU was free within {job.resources.start_timeout_s:g} s to ask it for its memory; set search.gpus_per_trial, or free one."
        ) from None


# ---- the end ---------------------------------------------------------------------------------------------------
def _finish(sweep: Sweep, driver: Driver, display: Display) -> SearchRecord:
    """The record, with the bundle of the best trial and of the job as it is written."""
    records, objectives = driver.ledger.records, sweep.space.objectives
    order = disk.ranked(records, objectives)
    if not order:
        cause = ledger.most_common_cause(records)
        raise StageError(f"None of the {len(records)} trials has a score to compare by." + (f" Most failed so: {cause}" if cause else ""))
    driver.disk.tidy(records)
    default = next((one for one in order if one.origin == "default"), None)
    best, train = _first_bundle(sweep, order, display)
    if (sweep.folder / SCHEDULE).exists():
        from orchestrator.search import population

        population.conclude(sweep.folder / SCHEDULE, best.id)
    compared = None
    if default is not None and default.id != best.id:
        compared = _bundle(sweep, default)
        if isinstance(compared, str):
            display.warn(f"The winner can't be compared with the job as it is written: {compared}")
            compared = None
    driver.disk.tidy(records)  # The bundles count too.
    record = SearchRecord(
        search=sweep.search.to_json(),
        objectives=objectives,
        trials=tuple(records),
        best=best.id,
        pareto=tuple(one.id for one in disk.front(records, objectives)) if len(objectives) > 1 else (),
        sample=best.sample,
        train=train,
        default=train if default is not None and default.id == best.id else compared,
        seconds=round(driver.ledger.seconds, 3),
        trials_run=len(records),
        stopped_by=driver.ledger.stopped_by,
        schedule=(sweep.folder / SCHEDULE).uri if (sweep.folder / SCHEDULE).exists() else None,
        report=(sweep.folder / winner.REPORT).uri,
        folder=sweep.folder.uri,
    )
    winner.write_report(record)
    return record


def _first_bundle(sweep: Sweep, order: Sequence[TrialRecord], display: Display) -> tuple[TrialRecord, TrainRecord]:
    """The best trial whose checkpoint is whole, and its bundle."""
    fault = ""
    for one in order[: disk.KEPT]:
        found = _bundle(sweep, one)
        if not isinstance(found, str):
            return one, found
        fault = found
        display.warn(f"trial {one.number} can't be the winner: {found}")
    raise StageError(f"The best {min(len(order), disk.KEPT)} trials have no checkpoint any more, so there is no winner: {fault}")


def _bundle(sweep: Sweep, one: TrialRecord) -> TrainRecord | str:
    """The record of a trial's bundle, written by a task where it isn't there yet; a sentence where its checkpoint is gone."""
    import ray
    import ray.exceptions

    assert one.best is not None
    folder, step = Folder(one.folder), one.best["best_step"]
    place = folder / TRAINED
    if place.exists() and (folder / "bundle" / "manifest.json").exists():
        record = TrainRecord.parse(place.read_json(), str(place))
        if record.best_step == step:
            return record
    cpus = 0 if sweep.search.workers_per_trial > 1 else 1
    task = ray.remote(trial.write_bundle).options(num_cpus=cpus).remote(sweep, folder, step)
    try:
        record = ray.get(task, timeout=BUNDLE_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise StageError(f"The bundle of trial {one.number} was not written within {BUNDLE_TIMEOUT_S:.0f} s.") from None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, StageError):
            return str(error.cause)
        raise
    place.write_json(record.to_json())
    return record
