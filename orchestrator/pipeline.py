"""The stages in order. Each leaves one record on disk before the next starts, so a job that died continues from them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from orchestrator import bundle as bundles
from orchestrator import evaluation, preflight, training, tuning
from orchestrator.config import JobConfig, digest
from orchestrator.data.prepare import prepare
from orchestrator.errors import InputError
from orchestrator.progress import Display
from orchestrator.records import Comparison, DeployRecord, EvaluateRecord, PreparedData, RegisterRecord, SearchRecord, TrainRecord
from orchestrator.registry import Registry
from orchestrator.schema import Schema
from orchestrator.search import winner
from orchestrator.storage import Folder

Until = Literal["train", "evaluate", "register", "deploy"]
Deploy = Callable[[JobConfig, PreparedData, EvaluateRecord, RegisterRecord], DeployRecord]
Record = TypeVar("Record", bound=Schema)

GOLDEN_ROWS = 8
LOCK = ".lock"


@dataclass
class Run:
    """A job's folder in the storage, with the records of the stages that are done."""

    job: JobConfig
    display: Display
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def storage(self) -> Folder:
        return Folder(self.job.storage)

    @property
    def folder(self) -> Folder:
        return self.storage / self.job.run_id

    @property
    def log_dir(self) -> Path:
        """Where the chatter of Ray and the libraries goes; beside the run where that is a local folder."""
        local = Path(self.folder.path) if self.folder.is_local else Path.cwd() / self.job.run_id
        return local / "logs"

    @contextlib.contextmanager
    def alone(self, *, fresh: bool = False) -> Iterator[None]:
        """Makes the folder, with the resolved job in it, and keeps other processes from working on the same run meanwhile.

        A killed process lets go by itself. `fresh` forgets the stages that are done. Raises `InputError` where another
        process has the run; of a storage that is not local that can't be told.
        """
        self.folder.make()
        with self._locked() if self.folder.is_local else contextlib.nullcontext():
            if fresh:
                self._forget()
            (self.folder / "job.json").write_json(self.job.to_json())
            yield

    @property
    def attempt(self) -> int:
        """How often the run was started over."""
        place = self.folder / "attempt.json"
        return place.read_json() if place.exists() else 0

    def _forget(self) -> None:
        """Forgets the stages that are done, but keeps the bundles: versions of the model may point at them."""
        (self.folder / "attempt.json").write_json(self.attempt + 1)
        for name in self.folder.names():
            if name == "records" or name.startswith("evaluation"):
                (self.folder / name).delete()
            elif name.startswith("train-"):
                (self.folder / name / "checkpoints").delete()
            elif name.startswith("search-"):
                for trial in (self.folder / name / "trials").names():
                    (self.folder / name / "trials" / trial / "checkpoints").delete()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl

        with (Path(self.folder.path) / LOCK).open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise InputError(
                    f"The run {self.job.run_id} is being worked on by process {lock.read().strip() or 'unknown'} on this machine; "
                    "wait for it, stop it, or change the job."
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def stage(
        self, name: str, schema: type[Record], inputs: Any, work: Callable[[], Record], needs: Callable[[Record], list[str]]
    ) -> Record:
        """The record of the stage `name` for `inputs` (any JSON value): the one on disk, or what `work` returns now.

        A record on disk counts as long as the files are there that it `needs` (URIs).
        """
        place = self.folder / "records" / f"{name}.json"
        key = digest(inputs)
        self.display.stage(name)
        if place.exists():
            saved = place.read_json()
            if saved["inputs"] == key:
                record = schema.parse(saved["record"], str(place))
                gone = [uri for uri in needs(record) if not Folder(uri).exists()]
                if not gone:
                    self.timings[name] = 0.0
                    self.display.say("done before, its record is reused")
                    return record
                self.display.say(f"done before, but {gone[0]} is gone: done again")
        with self.timed(name, announce=False):
            record = work()
        self.keep(name, record, inputs=key)
        return record

    @contextlib.contextmanager
    def timed(self, name: str, *, announce: bool = True) -> Iterator[None]:
        """The body is the stage `name`, whose seconds go into `timings`."""
        if announce:
            self.display.stage(name)
        started = time.perf_counter()
        yield
        self.timings[name] = round(time.perf_counter() - started, 3)

    def keep(self, name: str, record: Schema, **more: Any) -> None:
        """Writes a stage's record into the run folder."""
        (self.folder / "records" / f"{name}.json").write_json({**more, "seconds": self.timings[name], "record": record.to_json()})


def run(run: Run, *, until: Until = "deploy", promote: bool = False, deploy: Deploy | None = None) -> dict[str, Any]:
    """Takes the job through its stages up to `until` and returns what the command line prints with `--json`.

    The cluster must be connected. `deploy` starts the endpoint: it lives outside the library, beside what Serve runs.
    """
    job, display = run.job, run.display
    result: dict[str, Any] = {"run": job.run_id, "run_dir": str(run.folder), "timings": run.timings}

    registry = Registry(job.registry.uri, run.storage) if until in ("register", "deploy") else None
    if registry is not None:
        registry.warm()

    with run.timed("prepare"):
        prepared = prepare(job, run.storage, display)
    run.keep("prepare", prepared)
    preflight.require_metrics(job, prepared.task)
    preflight.require_parts(job, prepared.task)

    if job.search is None:
        question = _question(run, prepared)
        folder = run.folder / f"train-{digest(question)[:8]}"
        trained = run.stage(
            "train",
            TrainRecord,
            question,
            lambda: training.train(job, prepared, folder, display),
            needs=lambda record: [f"{record.bundle}/manifest.json"],
        )
        final = Final(job, prepared, trained, question)
    else:
        final = _search(run, prepared)
    as_written, prepared, trained = prepared, final.prepared, final.trained
    result["metrics"] = {"validation": trained.metrics}
    result["train"] = trained.to_json()
    if final.searched is not None:
        result["search"] = winner.summary(final.searched)
    if until == "train":
        return result

    def evaluate() -> EvaluateRecord:
        record = evaluation.evaluate(final.job, prepared, trained.bundle, run.folder / "evaluation", display)
        split = "validation" if record.predictions.get("validation") else "test"
        golden = [
            {"row": prepared.task.self_contained(entry["row"]), "prediction": entry["prediction"]}
            for entry in evaluation.read_predictions(record.predictions[split], limit=GOLDEN_ROWS)
        ]
        bundles.complete(Folder(trained.bundle), metrics=record.metrics, golden=golden)
        return record

    evaluated = run.stage(
        "evaluate",
        EvaluateRecord,
        [final.question, job.evaluation.to_json()],
        evaluate,
        needs=lambda record: [*record.predictions.values(), f"{trained.bundle}/golden.json"],
    )
    result["metrics"] = evaluated.metrics
    if final.searched is not None and evaluated.predictions:
        compared = _compare(run, final, final.searched, as_written, evaluated)
        display.say(compared.sentence())
        result["comparison"] = compared.to_json()
    if registry is None:
        return result

    with run.timed("register"):
        registered = _register(run, registry, final, evaluated, promote=promote)
    run.keep("register", registered)
    display.say(f"{registered.name} version {registered.version}: {registered.reason}")
    result["model"] = {"name": registered.name, "version": registered.version}

    if deploy is not None:
        with run.timed("deploy"):
            deployed = deploy(job, prepared, evaluated, registered)
        run.keep("deploy", deployed)
        result["endpoint"] = deployed.to_json()
    return result


@dataclass(frozen=True)
class Final:
    """The training that the stages after it go on with."""

    job: JobConfig
    """With the settings that it was trained with: of a sweep the winner's."""
    prepared: PreparedData
    trained: TrainRecord
    question: Any
    """What decides how it came out, as JSON."""
    searched: SearchRecord | None = None


def _question(run: Run, prepared: PreparedData) -> dict[str, Any]:
    question = {"data": prepared.fingerprint, **run.job.model_dump(mode="json", include={"task", "model", "training"})}
    search = run.job.search
    if search is None:
        return {**question, "global_batch_size": training.global_batch_size(run.job), "attempt": run.attempt}
    batch = run.job.training.global_batch(search.workers_per_trial)
    return {**question, "global_batch_size": batch, "attempt": run.attempt, "search": search.question}


def _search(run: Run, prepared: PreparedData) -> Final:
    """The sweep in place of training, and where the job asks for it the winner's setting trained once more on more rows."""
    job, display = run.job, run.display
    assert job.search is not None
    question = _question(run, prepared)
    folder = run.folder / f"search-{digest(question)[:8]}"
    asked = [question, job.search.model_dump(mode="json", include={"num_trials", "max_seconds", "max_examples", "plateau"})]
    searched = run.stage(
        "search",
        SearchRecord,
        asked,
        lambda: tuning.tune(job, prepared, folder, display),
        needs=lambda record: [f"{trained.bundle}/manifest.json" for trained in (record.train, record.default) if trained is not None],
    )
    settings = winner.settings(job, searched)
    same = settings.data == job.data and settings.task == job.task
    data = prepared if same else prepare(settings, run.storage, display)
    trained, asked = searched.train, [*asked, searched.best]
    if job.search.refit:
        asked, data = [*asked, "refit"], winner.train_and_validation(data)
        trained = run.stage(
            "refit",
            TrainRecord,
            asked,
            lambda: winner.refit(settings, job, data, searched, folder / "refit", display),
            needs=lambda record: [f"{record.bundle}/manifest.json"],
        )
    return Final(settings, data, trained, asked, searched)


def _compare(run: Run, final: Final, searched: SearchRecord, prepared: PreparedData, evaluated: EvaluateRecord) -> Comparison:
    """How sure the winner's score is and what the sweep has gained, on rows that no trial has seen.

    `prepared` is the data of the job as it is written.
    """
    compared = run.stage(
        "compare",
        Comparison,
        [final.question, run.job.evaluation.to_json()],
        lambda: winner.compare(run.job, prepared, searched, final.trained, evaluated, run.folder / "evaluation-of-default", run.display),
        needs=lambda record: [],
    )
    winner.write_report(searched, compared)
    return compared


def _register(run: Run, registry: Registry, final: Final, evaluated: EvaluateRecord, *, promote: bool) -> RegisterRecord:
    """A version of the model, compared with the champion on the same test rows, where these differ by scoring it on them now."""
    job, prepared, trained = final.job, final.prepared, final.trained
    bundle = bundles.load(trained.bundle)
    split = "test" if evaluated.predictions.get("test") else "validation"
    rows = _fingerprint(evaluated.predictions[split])
    champion_score = None
    with contextlib.suppress(InputError):  # there is no champion yet
        champion = registry.resolve(f"{job.model_name}@{job.registry.alias}")
        if champion.tags.get("test_fingerprint") != rows and champion.bundle != trained.bundle and not promote:
            champion_score = _score_champion(run, prepared, champion.bundle, split, bundle.task.objective)
    return registry.register(
        job,
        bundle.task,
        bundle=Folder(trained.bundle),
        metrics=evaluated.metrics,
        test_fingerprint=rows,
        lineage={**bundle.lineage, "data_fingerprint": prepared.fingerprint},
        run_id=run.job.run_id,
        run_dir=run.folder,
        searched=final.searched,
        history=trained.history,
        tables=evaluated.tables,
        champion_score=champion_score,
        promote=promote,
    )


def _score_champion(run: Run, prepared: PreparedData, bundle: str, split: str, objective: str) -> float | None:
    run.display.say("the champion was scored on other rows: it is scored on these now")
    try:
        record = evaluation.evaluate(run.job, prepared, bundle, run.folder / "evaluation-of-champion", run.display)
    except InputError as error:
        run.display.warn(f"The champion can't be scored on these rows, so it stays where it is: {error}")
        return None
    return record.metrics[split].get(objective)


def _fingerprint(predictions: str) -> str:
    """Of the rows that were answered, targets included, whatever the answers."""
    content = hashlib.sha256()
    for entry in evaluation.read_predictions(predictions):
        content.update(json.dumps(entry["row"], sort_keys=True).encode())
    return content.hexdigest()
