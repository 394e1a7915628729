"""The bundle: whole or not there, verified, without secrets, from any storage."""

import json
import shutil

import pyarrow.fs as pafs
import pytest
import torch

from orchestrator import bundle, processors
from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks import create
from tests.fixtures.tiny import text_base

TASK = {"name": "text-classification", "labels": ["a", "b"]}
JOB = {"name": "reviews", "registry": {"uri": "https://me:hunter2@mlflow.example/x"}, "data": {"train": ["s3://KEY:SECRET@bucket/a.csv"]}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    base = text_base(tmp_path_factory.mktemp("base"), ["good bad"])
    task = create(TASK)
    folder = Folder(str(tmp_path_factory.mktemp("bundles") / "b"))
    bundle.write(
        folder,
        model=task.model(base, dtype=torch.float32),
        processor=processors.load(base, "text"),
        task=task,
        job=JOB,
        lineage={"git": "abc", "data": "gs://token@bucket/x"},
        metrics={"validation": {"accuracy": 0.5}},
    )
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written.path, tmp_path / "b")
    return Folder(str(tmp_path / "b"))


def test_a_bundle_comes_back_as_it_was_written(folder):
    loaded = bundle.load(folder.uri)
    assert loaded.task == create(TASK)
    assert loaded.metrics == {"validation": {"accuracy": 0.5}}
    assert loaded.golden == []
    assert loaded.name == f"reviews-{loaded.digest[:8]}"
    assert (
        loaded.environment["libraries"]["torch"] == torch.__version__.partition("+")[0]
        or loaded.environment["libraries"]["torch"] == torch.__version__
    )
    names = set(folder.names())
    assert names == {"model", "processor", "task.json", "job.json", "metrics.json", "environment.json", "lineage.json", "manifest.json"}
    assert "model.safetensors" in (folder / "model").names()
    assert not [name for name in Folder(str(folder.path) + "/..").names() if "orchestrator-bundle" in name or name.endswith(".tmp")]


def test_secrets_stay_out(folder):
    text = "".join((folder / name).read_bytes().decode() for name in folder.names() if name.endswith(".json"))
    for secret in ("hunter2", "SECRET", "token@"):
        assert secret not in text
    assert bundle.load(folder.uri).job["registry"]["uri"] == "https://mlflow.example/x"


def test_writing_again_replaces_the_whole(folder, tmp_path):
    before = bundle.load(folder.uri).digest
    base = text_base(tmp_path / "base", ["good bad"], hidden_size=16)
    task = create(TASK)
    bundle.write(folder, model=task.model(base), processor=processors.load(base, "text"), task=task, job={}, lineage={}, metrics={})
    assert bundle.load(folder.uri).digest != before


def test_completing_adds_metrics_and_golden_rows_and_changes_the_digest(folder):
    before = bundle.load(folder.uri).digest
    golden = [{"row_id": "f:1", "row": {"text": "good"}, "prediction": {"label": "a"}}]
    bundle.complete(folder, metrics={"test": {"accuracy": 0.9}}, golden=golden)
    loaded = bundle.load(folder.uri)
    assert loaded.metrics == {"test": {"accuracy": 0.9}}
    assert loaded.golden == [{"row": {"text": "good"}, "prediction": {"label": "a"}}]
    assert loaded.digest != before
    bundle.complete(folder, metrics={"test": {"accuracy": 0.9}}, golden=golden)
    assert bundle.load(folder.uri).digest == loaded.digest


def test_a_death_while_completing_leaves_a_whole_bundle(folder, monkeypatch):
    bundle.complete(folder, metrics={"test": {"accuracy": 0.9}}, golden=[])
    writes = []
    write = Folder.write_bytes

    class Killed(BaseException):
        pass

    for last in range(4):

        def dying(self, content, last=last):
            if len(writes) == last:
                raise Killed
            writes.append(self.uri)
            write(self, content)

        writes.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Folder, "write_bytes", dying)
            bundle.complete(folder, metrics={"test": {"accuracy": 0.1 * last}}, golden=[{"row": {}, "prediction": {}}] * last)
        bundle.load(folder.uri)
    assert len(writes) == 3


@pytest.mark.parametrize("name", ["model/model.safetensors", "task.json", "processor/tokenizer.json"])
def test_a_torn_or_altered_file_is_named(folder, name):
    place = folder.path + "/" + name
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"torn or was altered: {name} has [\d,]+ bytes"):
        bundle.load(folder.uri)
    (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=f"was altered: {name} differs from its manifest"):
        bundle.load(folder.uri)
    Folder(place).delete()
    with pytest.raises(InputError, match=f"is torn: {name} is missing"):
        bundle.load(folder.uri)


def test_what_is_no_bundle_is_said(folder, tmp_path):
    with pytest.raises(InputError, match="is not a bundle: there is nothing"):
        bundle.load(str(tmp_path / "nothing"))
    (folder / "manifest.json").delete()
    with pytest.raises(InputError, match=r"is not a bundle: it has no manifest\.json, so it was never finished"):
        bundle.load(folder.uri)
    for content, sentence in [
        (b"{", "manifest.json is not a manifest"),
        (b"[]", "manifest.json is not a manifest"),
        (json.dumps({"format": 2, "files": {}}).encode(), "has format 2; this version of the orchestrator reads format 1"),
        (json.dumps({"format": 1, "files": {"../x": {"sha256": "", "bytes": 0}}}).encode(), "names '../x', which lies outside it"),
        (json.dumps({"format": 1, "files": {"/x": {"sha256": "", "bytes": 0}}}).encode(), "names '/x', which lies outside it"),
    ]:
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            bundle.load(folder.uri)


def test_a_remote_bundle_is_kept_and_verified(folder, tmp_path, monkeypatch):
    """Storage that is not local, as an object store is: pyarrow's in-memory one."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    remote, inner = pafs._MockFileSystem(), []
    pafs.copy_files(folder.path, "bucket/b", destination_filesystem=remote)
    monkeypatch.setattr(
        Folder,
        "_place",
        property(lambda self: (remote, self.uri.partition("://")[2]) if "://" in self.uri else (pafs.LocalFileSystem(), self.uri)),
    )
    copies = pafs.copy_files
    monkeypatch.setattr(pafs, "copy_files", lambda *args, **kwargs: (inner.append(args), copies(*args, **kwargs)))

    first = bundle.load("mock://bucket/b")
    assert first.path.is_relative_to(tmp_path / "cache")
    assert bundle.load("mock://bucket/b") == first
    assert len(inner) == 1
    (first.path / "task.json").write_text("{}", encoding="utf-8")
    assert bundle.load("mock://bucket/b") == first
    assert len(inner) == 2
    with remote.open_output_stream("bucket/b/task.json") as stream:
        stream.write(b"{}")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(InputError, match=r"task\.json"):
        bundle.load("mock://bucket/b")
    assert list((tmp_path / "cache" / "bundles").iterdir()) == []
