"""What becomes of a sweep that has ended: the winner's settings, a last training on more rows, and what it is worth."""

from __future__ import annotations

from typing import Any

from orchestrator import bundle as bundles
from orchestrator import evaluation, training
from orchestrator.config import JobConfig, digest
from orchestrator.errors import StageError
from orchestrator.progress import Display
from orchestrator.records import Comparison, EvaluateRecord, PreparedData, PreparedSplit, SearchRecord, TrainRecord, TrialRecord
from orchestrator.search import comparison
from orchestrator.search.space import Space
from orchestrator.storage import Folder

REPORT = "report.html"


def trial(searched: SearchRecord) -> TrialRecord:
    """The winner."""
    return next(one for one in searched.trials if one.id == searched.best)


def settings(job: JobConfig, searched: SearchRecord) -> JobConfig:
    """The job that the winner trained."""
    return Space.of(job).apply(searched.sample)


def summary(searched: SearchRecord) -> dict[str, Any]:
    """The record as JSON without the trials' reports, of which there are many."""
    found = searched.to_json()
    for one in found["trials"]:
        one.pop("reports")
    return found


def write_report(searched: SearchRecord, compared: Comparison | None = None) -> str:
    """Writes report.html into the sweep's folder; returns its URI."""
    from orchestrator.search import report

    place = Folder(searched.folder) / REPORT
    place.write_bytes(report.sweep_html(searched, compared).encode())
    return place.uri


def train_and_validation(prepared: PreparedData) -> PreparedData:
    """The data with the validation rows among those to train on."""
    train, validation = (prepared.splits.get(name, PreparedSplit(rows=0, files=())) for name in ("train", "validation"))
    both = PreparedSplit(rows=train.rows + validation.rows, files=(*train.files, *validation.files))
    splits = {**prepared.splits, "train": both, "validation": PreparedSplit(rows=0, files=())}
    return prepared.model_copy(update={"splits": splits, "fingerprint": digest([prepared.fingerprint, "train and validation"])})


def refit(won: JobConfig, job: JobConfig, prepared: PreparedData, searched: SearchRecord, folder: Folder, display: Display) -> TrainRecord:
    """Trains the winner's job `won` once more, on `prepared`, for the epochs after which it was best, with the resources of `job`.

    There is nothing left to choose a checkpoint by, so it is the last one, nor to calibrate the task by: it stays as the winner's.
    """
    best = trial(searched).best
    if best is None:
        raise StageError("The winner has no best validation, so it is not known how long to train.")
    epochs = float(best["epoch"])
    changes = {
        "num_train_epochs": epochs,
        "max_steps": -1,
        "early_stopping_patience": None,
        "eval_steps": None,
        "metric_for_best_model": None,
    }
    resources = job.resources if won.training.per_device_train_batch_size is None else won.resources
    again = won.model_copy(update={"training": won.training.model_copy(update=changes), "resources": resources})
    display.say(f"trains on {prepared.splits['train'].rows:,} rows, validation rows among them, for {epochs:.3g} epochs")
    calibrated = prepared.model_copy(update={"task": prepared.task.calibrate(best)})
    return training.train(again, calibrated, folder, display)


def compare(
    job: JobConfig,
    prepared: PreparedData,
    searched: SearchRecord,
    trained: TrainRecord,
    evaluated: EvaluateRecord,
    folder: Folder,
    display: Display,
) -> Comparison:
    """The winner's score on the test rows, with its interval, beside that of the job as it is written, which is evaluated in `folder`.

    Where there are no test rows it is the validation rows, by which the winner was chosen: then it looks better than it is.
    """
    task = bundles.load(trained.bundle).task
    split = "test" if evaluated.predictions.get("test") else "validation"
    wanted = searched.objectives[0][0]
    metric = wanted if wanted in task.metrics() else task.objective
    default = None
    if searched.default is not None and searched.default.bundle != trained.bundle:
        display.say("the job as it is written is scored on the same rows")
        only = prepared.model_copy(update={"splits": {split: prepared.splits[split]}})
        default = evaluation.evaluate(job, only, searched.default.bundle, folder, display).predictions.get(split)
    return comparison.compare(
        task, metric, split, evaluated.predictions[split], default, on_resample=lambda done, of: display.step(done, of, "resamples")
    )
