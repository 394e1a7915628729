"""Evaluation and batch prediction on Ray: the served predictor's answers, every row once, in order, files whole or not there."""

import csv
import json
import random

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import bundle, evaluation, models, processors
from orchestrator.config import DataSection, JobConfig
from orchestrator.errors import InputError, StageError
from orchestrator.predictor import Losses, Predictor
from orchestrator.progress import Silent
from orchestrator.records import PreparedData, PreparedFile, PreparedSplit
from orchestrator.storage import Folder
from orchestrator.tasks import create

TASK = {"name": "text-classification", "labels": ["bad", "good"]}
WORDS = ["good", "great", "bad", "poor", "the", "camera", "screen", "very", "not"]


class Heard(Silent):
    def __init__(self):
        self.steps, self.warnings = [], []

    def step(self, done, total, unit="steps", **fields):
        self.steps.append((done, total, unit))

    def warn(self, sentence):
        self.warnings.append(sentence)


def sentence(rng):
    return " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 8, 40])))


@pytest.fixture(scope="module")
def bundle_uri(tiny_model, tmp_path_factory):
    job = JobConfig.parse({"task": TASK, "model": {"base": tiny_model}, "data": {"train": "reviews.csv", "columns": {"text": "review"}}})
    model = models.load(job.task, job.model, precision="fp32")
    folder = Folder(str(tmp_path_factory.mktemp("bundle") / "b"))
    bundle.write(
        folder, model=model, processor=processors.load(tiny_model, "text"), task=job.task, job=job.to_json(), lineage={}, metrics={}
    )
    return folder.uri


def prepared_data(root, **counts):
    """Validation and test files with so many rows each, as prepare leaves them."""
    rng = random.Random(0)
    splits = {"train": PreparedSplit(rows=0, files=())}
    for split, files in counts.items():
        parts = []
        for place, count in enumerate(files):
            path = root / split / f"part-{place}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            columns = {
                "text": [sentence(rng) for _ in range(count)],
                "label": [rng.choice(["bad", "good"]) for _ in range(count)],
                "row_id": [f"{split}-{place}:{number}" for number in range(count)],
                "_row": list(range(count)),
            }
            pq.write_table(pa.table(columns), path)
            parts.append(PreparedFile(path=f"{split}/part-{place}.parquet", rows=count))
        splits[split] = PreparedSplit(rows=sum(files), files=tuple(parts))
    return PreparedData(root=str(root), fingerprint="f", task=create(TASK), splits=splits, observed={}, rows_read=0, rows_bad=0)


def job_for(tiny_model, **sections):
    return JobConfig.parse({"task": TASK, "model": {"base": tiny_model}, "data": {"train": "reviews.csv"}, **sections})


def test_evaluation_scores_what_the_predictor_says(ray_session, tiny_model, bundle_uri, tmp_path):
    prepared = prepared_data(tmp_path / "data", validation=[700], test=[3, 0, 520])
    heard = Heard()
    record = evaluation.evaluate(job_for(tiny_model), prepared, bundle_uri, Folder(str(tmp_path / "out")), heard)

    predictor = Predictor(bundle.load(bundle_uri))
    for split in ("validation", "test"):
        found = evaluation.read_predictions(record.predictions[split])
        wanted = [row for file in prepared.splits[split].files for row in pq.read_table(tmp_path / "data" / file.path).to_pylist()]
        assert [one["row_id"] for one in found] == [row["row_id"] for row in wanted]
        assert [one["row"] for one in found] == [{"text": row["text"], "label": row["label"]} for row in wanted]
        offline = predictor([one["row"] for one in found])
        assert all(predictor.task.agree(one["prediction"], other, 1e-4) for one, other in zip(found, offline, strict=True))
        losses = Losses()
        predictor.score(wanted, losses)
        expected = {**predictor.task.score(offline, wanted), "loss": losses.total / losses.items}
        assert record.metrics[split] == pytest.approx(expected, abs=2e-3)
    assert heard.steps[0] == (0, 1223, "rows")
    assert heard.steps[-1] == (1223, 1223, "rows")
    assert len(evaluation.read_predictions(record.predictions["test"], limit=5)) == 5

    table = pandas.read_parquet(record.predictions["test"])
    assert list(table.columns) == ["text", "label", "row_id", "prediction_label", "prediction_score", "prediction"]
    per_class = pandas.read_csv(record.tables["test-per_class"])
    assert per_class["rows"].sum() == 523
    assert {"validation-confusion_matrix", "test-confusion_matrix"} <= record.tables.keys()
    matrix = pandas.read_csv(record.tables["test-confusion_matrix"])
    assert matrix[["predicted bad", "predicted good"]].to_numpy().sum() == 523
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp") == []


def test_the_job_chooses_metrics(ray_session, tiny_model, bundle_uri, tmp_path):
    prepared = prepared_data(tmp_path / "data", validation=[], test=[20])
    job = job_for(tiny_model, evaluation={"metrics": ["f1/good", "mcc"], "tokens_per_batch": 64})
    record = evaluation.evaluate(job, prepared, bundle_uri, Folder(str(tmp_path / "out")), Silent())
    assert record.metrics.keys() == {"test"}
    assert record.metrics["test"].keys() == {"f1/good", "mcc", "loss"}


def test_without_rows_to_score_it_says_so(ray_session, tiny_model, bundle_uri, tmp_path):
    heard = Heard()
    record = evaluation.evaluate(
        job_for(tiny_model), prepared_data(tmp_path, validation=[], test=[]), bundle_uri, Folder(str(tmp_path / "o")), heard
    )
    assert record.metrics == {}
    assert "not scored" in heard.warnings[0]


def test_an_actor_that_fails_is_heard_and_leaves_no_file(ray_session, tiny_model, bundle_uri, tmp_path):
    prepared = prepared_data(tmp_path / "data", validation=[10], test=[10])
    (tmp_path / "data" / "test" / "part-0.parquet").write_bytes(b"not parquet")
    with pytest.raises((pa.ArrowInvalid, StageError), match=r"[Pp]arquet"):
        evaluation.evaluate(job_for(tiny_model), prepared, bundle_uri, Folder(str(tmp_path / "out")), Silent())
    assert list((tmp_path / "out").glob("*")) == []


def test_a_full_cluster_is_a_sentence(ray_session, tiny_model, bundle_uri, tmp_path):
    @ray_session.remote(num_cpus=2)
    class Busy:
        def ready(self):
            return True

    busy = Busy.remote()
    ray_session.get(busy.ready.remote())
    job = job_for(tiny_model, resources={"start_timeout_s": 2})
    try:
        with pytest.raises(StageError, match=r"within 2 s: the cluster has 0 CPUs"):
            evaluation.evaluate(job, prepared_data(tmp_path, test=[10]), bundle_uri, Folder(str(tmp_path / "out")), Silent())
    finally:
        ray_session.kill(busy)


def read_back(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_every_row_comes_back_in_order(ray_session, bundle_uri, tmp_path, ending):
    rng = random.Random(1)
    texts = [sentence(rng) for _ in range(300)]
    texts[7], texts[250] = "", 'a "quoted",\nbroken line – ünï'
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "review", "stars"])
        writer.writerows([[f"n{place}", text, "5" if place % 2 else ""] for place, text in enumerate(texts)])
    output = tmp_path / "new" / f"out.{ending}"
    source = DataSection(train=str(tmp_path / "in.csv"), columns={"text": "review"})
    heard = Heard()
    counted = evaluation.predict(bundle_uri, source, str(output), display=heard)

    assert counted == {"rows": 300, "errors": 1}
    assert "1 of 300 rows" in heard.warnings[0]
    rows = read_back(output)
    assert [row["id"] for row in rows] == [f"n{place}" for place in range(300)]
    assert [row["review"] or "" for row in rows] == texts
    assert [row["error"] for row in rows if row["error"]] == [rows[7]["error"]]
    assert "'review'" in rows[7]["error"]
    assert rows[7]["prediction"] is None
    assert rows[7]["prediction_label"] is None
    task = create(TASK)
    good = [row for row in rows if row["error"] is None]
    offline = Predictor(bundle.load(bundle_uri))([{"text": row["review"]} for row in good])
    for row, one in zip(good, offline, strict=True):
        assert row["prediction_label"] == json.loads(row["prediction"])["label"]
        assert float(row["prediction_score"]) == pytest.approx(one["score"], abs=1e-4)
        assert task.agree(json.loads(row["prediction"]), one, 1e-4)


def test_columns_that_change_type_and_unreadable_rows_come_back_too(ray_session, bundle_uri, tmp_path):
    lines = [
        json.dumps({"text": "good camera", "n": 1, "tags": ["a"]}),
        json.dumps({"text": "bad", "n": "two"}),
        "{broken",
        json.dumps({"text": None, "n": 2.5, "extra": {"k": None}}),
        json.dumps({"text": 5}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    output = tmp_path / "out.parquet"
    counted = evaluation.predict(bundle_uri, DataSection(train=str(tmp_path / "in.jsonl")), str(output), display=Silent())
    rows = read_back(output)
    assert counted == {"rows": 5, "errors": 2}
    assert [row["error"] is None for row in rows] == [True, True, False, False, True]
    assert [row["row_id"].rpartition(":")[2] for row in rows] == ["1", "2", "3", "4", "5"]


def test_what_cannot_be_predicted_leaves_no_file(ray_session, bundle_uri, tmp_path):
    (tmp_path / "in.csv").write_text("review,error\ngood,1\n", encoding="utf-8")

    def refused(source, output, match):
        with pytest.raises(InputError, match=match):
            evaluation.predict(bundle_uri, DataSection.parse(source), str(tmp_path / output), display=Silent())

    train = str(tmp_path / "in.csv")
    refused({"train": train}, "out.csv", r"INPUT: there is no column 'text'.*'review'")
    refused({"train": train, "columns": {"text": "review"}}, "out.csv", "INPUT has the column 'error'")
    refused({"train": train}, "out.xlsx", r"must end in \.parquet, \.csv or \.jsonl")
    (tmp_path / "folder.csv").mkdir()
    refused({"train": train}, "folder.csv", "is a folder")
    refused({"train": str(tmp_path / "none.csv")}, "out.csv", r"none\.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.csv", "in.csv"]
