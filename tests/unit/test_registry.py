"""Model versions, aliases, lineage and the sentences when something isn't there, on a real MLflow SQLite file."""

import json
import re
import socket
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from orchestrator import registry
from orchestrator.config import JobConfig
from orchestrator.errors import InputError, StageError
from orchestrator.registry import Registry
from orchestrator.storage import Folder
from orchestrator.tasks.base import Task


class Guess(Task):
    """A task that knows two metrics, one of which should fall."""

    lower_is_better = frozenset({"error"})
    best: str = "accuracy"

    def metrics(self) -> tuple[str, ...]:
        return (self.best, "accuracy", "error")


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Folder:
    """One registry for all tests: making its tables takes seconds, and each test has a model of its own."""
    return Folder(str(tmp_path_factory.mktemp("storage")))


@pytest.fixture
def place(storage, request) -> "Place":
    return Place(storage, re.sub(r"\W+", "-", request.node.name.removeprefix("test_"))[-60:].strip("-_"))


class Place:
    def __init__(self, storage: Folder, model: str):
        self.storage, self.model, self.registry = storage, model, Registry(None, storage)

    def bundle(self, content: str) -> Folder:
        folder = self.storage / f"bundles/{self.model}-{content}"
        (folder / "task.json").write_json({"name": "x"})
        (folder / "manifest.json").write_json({"format": 1, "files": {}, "content": content})
        return folder

    def register(self, content: str, accuracy: float, *, test: str = "rows-a", best: str = "accuracy", **more):
        task = Guess(best=best)
        job = JobConfig.parse(
            {"name": self.model, "storage": self.storage.uri, "task": task, "model": {"base": "minilm"}, "data": {"train": "a.csv"}}
        )
        metrics = more.pop("metrics", {"test": {"accuracy": accuracy, "error": accuracy}, "validation": {"accuracy": 0.5}})
        return self.registry.register(
            job,
            task,
            bundle=self.bundle(content),
            metrics=metrics,
            test_fingerprint=test,
            lineage={"data": "fingerprint-1"},
            run_dir=self.storage / job.run_id,
            **more,
        )


def test_the_first_version_becomes_champion_and_a_worse_one_does_not(place):
    first = place.register("one", 0.8)
    assert (first.version, first.alias) == (1, "champion")
    worse = place.register("two", 0.7)
    assert (worse.version, worse.alias) == (2, None)
    assert "0.7 against 0.8 of version 1" in worse.reason and f"orchestrator models promote {place.model}/2" in worse.reason
    better = place.register("three", 0.9)
    assert (better.version, better.alias) == (3, "champion")
    assert place.registry.resolve(place.model).version == 3


def test_a_metric_that_should_fall_is_better_when_lower(place):
    place.register("one", 0.8, best="error")
    assert place.register("two", 0.9, best="error").alias is None
    assert place.register("three", 0.1, best="error").alias == "champion"


def test_the_same_bundle_again_is_the_same_version(place):
    first = place.register("one", 0.8)
    again = place.register("one", 0.8)
    assert (again.version, again.mlflow_run, again.alias) == (1, first.mlflow_run, "champion")
    assert [version.version for version in place.registry.show(place.model)] == [1]


def test_other_test_rows_leave_the_champion_where_it_is(place):
    place.register("one", 0.6, test="rows-a")
    other = place.register("two", 0.99, test="rows-b")
    assert other.alias is None and "other test rows" in other.reason and f"promote {place.model}/2" in other.reason


@pytest.mark.parametrize(("champion_score", "alias"), [(0.95, None), (0.5, "champion")])
def test_a_champion_scored_again_is_compared(place, champion_score, alias):
    place.register("one", 0.6, test="rows-a")
    assert place.register("two", 0.9, test="rows-b", champion_score=champion_score).alias == alias


def test_promote_moves_the_alias_whatever_the_score(place):
    place.register("one", 0.9)
    assert place.register("two", 0.1, promote=True).alias == "champion"
    assert place.registry.promote(f"{place.model}/1").aliases == ("champion",)
    assert place.registry.promote(place.model, "staging").version == 2  # a bare name is its latest version
    assert place.registry.resolve(f"{place.model}@staging").version == 2
    assert place.registry.resolve(place.model).version == 1


def test_a_version_carries_its_lineage_metrics_and_run(place, tmp_path):
    history = tmp_path / "history.jsonl"
    lines = [{"step": step, "epoch": step / 2, "loss": 1 / step, "learning_rate": 1e-5, "metrics": None} for step in (1, 2)]
    lines[1]["metrics"] = {"accuracy": 0.4}
    history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = tmp_path / "per_class.csv"
    table.write_text("label,f1\nbad,0.5\n")
    record = place.register("one", 0.75, history=str(history), tables={"per_class": str(table)})
    resolved = place.registry.resolve(f"{place.model}/1")
    assert resolved.bundle == str(place.bundle("one")) == record.bundle
    assert resolved.metrics == {"test": {"accuracy": 0.75, "error": 0.75}, "validation": {"accuracy": 0.5}}
    assert resolved.tags["lineage.data"] == "fingerprint-1" and resolved.tags["test_fingerprint"] == "rows-a"
    assert resolved.tags["base_model"] == "minilm" and resolved.tags["library.torch"] and len(resolved.tags["bundle_digest"]) == 64
    client = place.registry.client
    run = client.get_run(record.mlflow_run)
    assert run.data.params["training.learning_rate"] == "5e-05" and run.data.params["model.base"] == "minilm"
    curve = client.get_metric_history(record.mlflow_run, "curve/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 1.0), (2, 0.5)]
    assert [point.value for point in client.get_metric_history(record.mlflow_run, "curve/validation_accuracy")] == [0.4]
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_relative_to(Path(place.storage.path) / "mlflow-artifacts")
    files = {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*") if path.is_file()}
    assert files == {"job.json", "history.jsonl", "tables/per_class.csv", "bundle/task.json", "bundle/manifest.json"}


def test_the_second_version_names_the_champion_it_met_as_parent(place):
    place.register("one", 0.8)
    place.register("two", 0.9)
    assert "parent" not in place.registry.resolve(f"{place.model}/1").tags
    assert place.registry.resolve(f"{place.model}/2").tags["parent"] == f"{place.model}/1"


def test_long_histories_are_thinned_but_keep_validations(tmp_path):
    history = tmp_path / "history.jsonl"
    validated = {777, 4999}
    with history.open("w") as file:
        for step in range(5000):
            file.write(json.dumps({"step": step, "loss": 1.0, "metrics": {"accuracy": 0.1} if step in validated else None}) + "\n")
    points = list(registry._curves(str(history), 0))
    assert len([name for name, *_ in points if name == "curve/loss"]) <= registry.POINTS + len(validated)
    assert {step for name, _, step, _ in points if name == "curve/validation_accuracy"} == validated


def test_a_bundle_folder_resolves_to_itself(place):
    folder = place.bundle("loose")
    resolved = place.registry.resolve(str(folder))
    assert (resolved.bundle, resolved.version) == (str(folder), None)
    (folder / "manifest.json").delete()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        place.registry.resolve(str(folder))


def test_what_is_not_there_is_named_with_what_is(place):
    place.register("one", 0.8)
    wrong = place.model[:-1]
    with pytest.raises(InputError, match=f"Did you mean '{place.model}'"):
        place.registry.resolve(wrong)
    with pytest.raises(InputError, match=r"no version '7'.* versions 1 and the aliases champion"):
        place.registry.resolve(f"{place.model}/7")
    with pytest.raises(InputError, match=r"no alias 'champoin'.*nearest alias is 'champion'"):
        place.registry.resolve(f"{place.model}@champoin")


def test_an_empty_storage_has_no_models_and_looking_makes_no_registry(tmp_path):
    empty = Registry(None, Folder(str(tmp_path / "runs")))
    assert empty.list_models() == []
    with pytest.raises(InputError, match=r"there is no registry at sqlite.*run a job first"):
        empty.resolve("reviews")
    assert not (tmp_path / "runs").exists()


def test_models_are_listed(place):
    place.register("one", 0.8)
    place.register("two", 0.9)
    listed = next(model for model in place.registry.list_models() if model["name"] == place.model)
    assert listed == {"name": place.model, "versions": 2, "latest": 2, "aliases": {"champion": 2}}


def test_a_name_that_mlflow_cannot_take_is_refused_before_anything_is_written(place):
    job = {"task": Guess(), "model": {"base": "m"}, "data": {"train": "a.csv"}, "registry": {"model": "team/reviews"}}
    with pytest.raises(InputError, match="'team/reviews' can't name a model"):
        place.registry.register(
            JobConfig.parse(job), Guess(), bundle=place.bundle("x"), metrics={}, test_fingerprint="", lineage={}, run_dir=place.storage
        )


@pytest.mark.parametrize("ending", ["", ".zip", ".tar.gz"])
def test_export_writes_the_whole_bundle_once(place, ending, tmp_path):
    from orchestrator import bundle as bundles

    folder = place.bundle("export")
    content = bundles._entry(Path((folder / "task.json").path))
    (folder / "manifest.json").write_json({"format": 1, "files": {"task.json": content}})
    (folder / "task.json").write_json({"name": "text-classification"})
    (folder / "manifest.json").write_json({"format": 1, "files": {"task.json": bundles._entry(Path((folder / "task.json").path))}})
    target = tmp_path / f"out{ending}"
    written = place.registry.export(str(folder), target)
    if ending == ".zip":
        names = set(zipfile.ZipFile(written).namelist())
    elif ending:
        with tarfile.open(written) as archive:
            names = {name.removeprefix("./") for name in archive.getnames()}
    else:
        names = {path.name for path in written.iterdir()}
    assert {"task.json", "manifest.json"} <= names
    with pytest.raises(InputError, match="exists already"):
        place.registry.export(str(folder), target)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_remote_storage_needs_a_registry_of_its_own():
    class Remote(Folder):
        is_local = False

    with pytest.raises(InputError, match=r"registry\.uri is missing.*s3://bucket/runs"):
        registry.check(None, Remote("s3://bucket/runs"))


def test_a_server_that_is_not_there_or_never_answers_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, then says nothing
        port = silent.getsockname()[1]
        with pytest.raises(InputError, match=f"MLflow server http://127.0.0.1:{port} doesn't answer"):
            registry.check(f"http://user:secret@127.0.0.1:{port}", Folder(str(tmp_path)))
    with pytest.raises(InputError, match="doesn't answer") as refused:
        registry.check(f"http://user:secret@127.0.0.1:{port}", Folder(str(tmp_path)))
    assert "secret" not in str(refused.value)
    with pytest.raises(InputError, match=r"database postgresql://.* doesn't answer"):
        registry.check(f"postgresql://user:secret@127.0.0.1:{port}/mlflow", Folder(str(tmp_path)))
    with pytest.raises(InputError, match="doesn't answer"):
        Registry(f"http://127.0.0.1:{port}", Folder(str(tmp_path))).list_models()


def test_a_server_that_is_something_else_is_a_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(InputError, match=r"not an MLflow server: it answers /health with HTTP 404"):
            registry.check(f"http://127.0.0.1:{server.getsockname()[1]}", Folder(str(tmp_path)))
        thread.join()


def test_a_broken_database_is_a_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is no database, however long it may be " * 100)
    with pytest.raises(StageError, match=r"The registry sqlite:///.*mlflow\.db failed: .*not a database"):
        Registry(None, Folder(str(tmp_path))).list_models()


def test_two_registries_made_at_once_share_one_database(tmp_path):
    """Two runs in one fresh storage: whoever comes second waits for the tables and finds them."""
    folder = Folder(str(tmp_path))
    failures: list[BaseException] = []

    def use(index: int) -> None:
        try:
            Registry(None, folder).client.create_registered_model(f"model-{index}")
        except BaseException as error:  # noqa: BLE001 - handed to the assertion
            failures.append(error)

    threads = [threading.Thread(target=use, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert failures == []
    assert [model["name"] for model in Registry(None, folder).list_models()] == ["model-0", "model-1", "model-2"]


def test_warming_makes_the_tables(tmp_path):
    warmed = Registry(None, Folder(str(tmp_path)))
    warmed.warm()
    deadline = time.monotonic() + 60
    while warmed.list_models() != [] or not (tmp_path / "mlflow.db").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_trial_of_a_sweep_is_a_run_below_the_winners(place, tmp_path):
    from tests.unit.sweeps import sweep

    (tmp_path / "report.html").write_text("<html>")
    searched = sweep(6, report=str(tmp_path / "report.html"))
    record = place.register("one", 0.8, searched=searched, run_id="reviews-1a2b")
    client = place.registry.client
    (experiment,) = client.search_experiments(filter_string=f"name = '{place.model}'")
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{record.mlflow_run}'")
    assert sorted(int(run.data.tags["number"]) for run in children) == list(range(6))
    by_number = {int(run.data.tags["number"]): run for run in children}
    trial = searched.trials[2]
    assert trial.best is not None
    run = by_number[2]
    assert run.info.run_name == "trial 2"
    assert run.data.params["training.learning_rate"] == repr(trial.sample["training.learning_rate"])
    assert run.data.metrics["best_f1"] == trial.best["f1"]
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "f1")] == [
        (report["examples"], report["f1"]) for report in trial.reports
    ]
    assert by_number[5].info.status == "FAILED"
    assert "learning_rate" in by_number[5].data.tags["error"]
    tags = client.get_model_version(place.model, "1").tags
    best = next(trial for trial in searched.trials if trial.id == searched.best)
    assert (tags["search.trials"], tags["search.trial"], tags["job_run"]) == ("6", str(best.number), "reviews-1a2b")
    assert "report.html" in [item.path for item in client.list_artifacts(record.mlflow_run)]
    assert len(place.registry.show(place.model)) == 1
