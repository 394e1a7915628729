import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from orchestrator import checkpoints
from orchestrator.errors import InputError, StageError
from orchestrator.storage import Folder

TENSORS = {"model": {"weight": torch.arange(6.0)}, "optimizer": {"exp_avg:weight": torch.ones(6)}}


def save(folder: Folder, step: int, best: int | None = None, identity: str = "a job") -> None:
    state = {"step": step, "identity": identity, "best": {"step": best, "metrics": {}} if best else None}
    checkpoints.save(folder, state, TENSORS)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    for folder in (Folder(str(tmp_path / "plain")), Folder(f"file://{tmp_path}/uri")):
        save(folder, 10)
        save(folder, 20)
        found, torn = checkpoints.latest(folder, "a job")
        assert found is not None
        assert (found.step, torn) == (20, [])
        assert torch.equal(found.tensors("model")["weight"], TENSORS["model"]["weight"])
        assert sorted(found.folder.names()) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_nothing_there() -> None:
    assert checkpoints.latest(Folder("/nowhere/at/all"), "a job") == (None, [])
    assert checkpoints.best(Folder("/nowhere/at/all"), "a job") is None


@pytest.mark.parametrize(
    ("tear", "says"),
    [
        (lambda place: (place / "manifest.json").unlink(), "no manifest"),
        (lambda place: (place / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda place: (place / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda place: (place / "model.safetensors").write_bytes(b"\0" * 152), "model.safetensors differs"),
        (lambda place: (place / "state.json").write_text("{}"), "state.json differs"),
    ],
)
def test_a_torn_one_is_passed_over_and_named(tmp_path: Path, tear, says: str) -> None:
    folder = Folder(str(tmp_path))
    save(folder, 10)
    save(folder, 20)
    tear(tmp_path / "checkpoints" / "step-00000020")
    found, torn = checkpoints.latest(folder, "a job")
    assert found is not None
    assert found.step == 10
    assert len(torn) == 1
    assert "step-00000020" in torn[0]
    assert says in torn[0]
    checkpoints.delete_torn(folder, found)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]


def test_another_jobs_checkpoint_is_refused(tmp_path: Path) -> None:
    save(Folder(str(tmp_path)), 10, identity="another")
    with pytest.raises(InputError, match="belongs to another job"):
        checkpoints.latest(Folder(str(tmp_path)), "a job")


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for step in (10, 20, 30, 40):
        save(folder, step, best=20)
        checkpoints.prune(folder, keep=1, best_step=20)
    assert (folder / "checkpoints").names() == ["step-00000020", "step-00000040"]
    best = checkpoints.best(folder, "a job")
    assert best is not None
    assert best.step == 20


def test_a_full_disk_is_a_sentence_with_the_folder_and_the_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(InputError, match=re.escape(str(tmp_path)) + ".*needs 1.0 MB and 0.0 MB are free"):
        save(Folder(str(tmp_path)), 10)
    assert not (tmp_path / "checkpoints").exists()


def test_a_folder_that_can_not_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(StageError, match="can't be written"):
        save(Folder(str(tmp_path)), 10)


def test_taking_over_another_runs_checkpoint_brings_its_best_one_and_leaves_no_own(tmp_path: Path) -> None:
    source, target = Folder(str(tmp_path / "source")), Folder(str(tmp_path / "target"))
    for step, best in ((10, 10), (20, 10), (30, 10)):
        save(source, step, best)
    save(target, 40, 40)
    assert checkpoints.take_over(source, target, 20) == 20
    assert (target / "checkpoints").names() == ["step-00000010", "step-00000020"]
    checkpoints.prune(source, 1, 10)  # its own run goes on and deletes it
    checkpoints.save(source, {"step": 20, "identity": "a job", "best": None}, {"model": {"weight": torch.zeros(6)}})
    kept = checkpoints.at(target, 20)
    assert kept is not None
    assert torch.equal(kept.tensors("model")["weight"], TENSORS["model"]["weight"])


def test_where_that_one_is_gone_or_torn_a_later_one_is_taken_over(tmp_path: Path) -> None:
    source, target = Folder(str(tmp_path / "source")), Folder(str(tmp_path / "target"))
    for step in (10, 30, 40):
        save(source, step, None)
    (tmp_path / "source/checkpoints/step-00000040/model.safetensors").write_bytes(b"")
    assert checkpoints.take_over(source, target, 20) == 30
    with pytest.raises(StageError, match=r"no complete checkpoint of step 50 or later in '.*source'"):
        checkpoints.take_over(source, target, 50)
