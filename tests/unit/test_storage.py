"""Folders on any file system, whole-file writes."""

import pickle
from pathlib import Path

import pytest

from orchestrator.errors import InputError
from orchestrator.storage import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "root"))


@pytest.fixture(params=["plain", "uri"])
def either(request, tmp_path) -> Folder:
    return Folder(str(tmp_path / "root") if request.param == "plain" else (tmp_path / "root").as_uri())


def test_what_is_written_is_read(either):
    (either / "a/b.json").write_json({"text": "é", "list": [1, 2]})
    assert (either / "a/b.json").read_json() == {"text": "é", "list": [1, 2]}
    assert (either / "a").names() == ["b.json"]
    assert either.is_local and (either / "a/b.json").exists() and not (either / "a/c.json").exists()


def test_a_write_that_fails_leaves_the_old_file_whole(folder, monkeypatch):
    target = folder / "state.json"
    target.write_json({"step": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        target.write_json({"step": 2})
    assert target.read_json() == {"step": 1}


def test_a_folder_that_is_not_there_has_no_names_and_can_be_deleted(folder):
    assert folder.names() == []
    folder.delete()
    folder.make()
    assert folder.exists()
    (folder / "x").write_bytes(b"x")
    (folder / "x").delete()
    assert folder.names() == []
    folder.delete()
    assert not folder.exists()


def test_moving_and_copying_whole_folders(folder, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_text("1", encoding="utf-8")
    (folder / "other").write_bytes(b"")
    (folder / "copy").put(source)
    (source / "deep" / "file").write_text("2", encoding="utf-8")
    (folder / "copy").put(source)
    assert (folder / "copy/deep/file").read_bytes() == b"2"
    (folder / "copy").move(folder / "moved")
    assert folder.names() == ["moved", "other"]
    assert (folder / "moved").to_local() == Path(folder.path) / "moved"


def test_a_relative_folder_stays_where_it_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs")
    assert str(folder) == str(tmp_path / "runs")


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~/runs").path == str(tmp_path / "runs")


def test_a_folder_can_be_sent_to_a_worker(folder):
    (folder / "a").write_bytes(b"1")
    again = pickle.loads(pickle.dumps(folder))
    assert again == folder and (again / "a").read_bytes() == b"1"


def test_a_uri_that_cannot_be_opened_is_a_sentence():
    with pytest.raises(InputError, match="storage: 'nope://bucket/x' can't be opened"):
        _ = Folder("nope://bucket/x").path
