"""Which checkpoints of a sweep are kept, and that no more than `search.max_disk` is."""

import os
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import InputError
from orchestrator.records import TrialRecord
from orchestrator.search.disk import Disk, can_win, front, ranked, require_room, size
from orchestrator.storage import Folder

F1 = (("f1", True),)


def trial(root: Path, number: int, f1: float | None, status: str = "done", **more: Any) -> TrialRecord:
    best = None if f1 is None else {"f1": f1, "step": 2, "best_step": 2, **more}
    origin = "default" if number == 0 else "search"
    return TrialRecord(
        id=f"t{number}", number=number, origin=origin, sample={}, status=status, best=best, folder=str(root / f"trials/t{number}")
    )  # type: ignore[arg-type]


def write(trials: list[TrialRecord], size: int = 1000) -> None:
    for one in trials:
        for step in (2, 3):
            place = Path(one.folder) / "checkpoints" / f"step-{step:08d}"
            place.mkdir(parents=True)
            (place / "model.safetensors").write_bytes(b"x" * size)


def left(root: Path) -> dict[str, list[int]]:
    """Trial -> the steps of its checkpoints."""
    return {
        place.name: sorted(int(step.name.removeprefix("step-")) for step in (place / "checkpoints").glob("step-*"))
        for place in sorted((root / "trials").iterdir())
    }


def test_the_best_checkpoint_of_the_best_trials_and_of_the_default_is_kept(tmp_path: Path) -> None:
    scores = [0.1, 0.5, 0.9, 0.7, 0.8, None]
    trials = [trial(tmp_path, number, f1) for number, f1 in enumerate(scores)]
    running = [trial(tmp_path, 6, 0.2, "running")]
    write([*trials, *running])
    disk = Disk(Folder(str(tmp_path)), F1, limit=10**6)
    assert disk.tidy([*trials, *running])
    assert left(tmp_path) == {"t0": [2], "t1": [], "t2": [2], "t3": [2], "t4": [2], "t5": [], "t6": [2, 3]}
    assert disk.used == 6000


def test_a_limit_takes_the_worst_first_and_never_the_best(tmp_path: Path) -> None:
    trials = [trial(tmp_path, number, f1) for number, f1 in enumerate([0.1, 0.5, 0.9, 0.7])]
    write(trials)
    disk = Disk(Folder(str(tmp_path)), F1, limit=2500)
    assert disk.tidy(trials)
    assert left(tmp_path) == {"t0": [2], "t1": [], "t2": [2], "t3": []}
    disk.limit = 500
    assert not disk.tidy(trials)  # and the best stays all the same
    assert left(tmp_path) == {"t0": [], "t1": [], "t2": [2], "t3": []}


def test_files_of_two_trials_count_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one").write_bytes(b"x" * 700)
    os.link(tmp_path / "a/one", tmp_path / "a/two")
    assert size(Folder(str(tmp_path))) == 700
    assert size(Folder(str(tmp_path / "gone"))) == 0


def test_of_several_objectives_the_front_can_win(tmp_path: Path) -> None:
    both = (("f1", True), ("loss", False))
    scores = [(0.9, 0.5), (0.8, 0.3), (0.8, 0.6), (0.7, 0.3), (0.9, 0.5)]
    trials = [trial(tmp_path, number, f1, loss=loss) for number, (f1, loss) in enumerate(scores)]
    assert [one.number for one in front(trials, both)] == [0, 4, 1]
    assert [one.number for one in can_win(trials, both)] == [0, 4, 1]


def test_lower_is_better_where_the_metric_says_so_and_nan_never_wins(tmp_path: Path) -> None:
    trials = [trial(tmp_path, number, f1) for number, f1 in enumerate([0.4, float("nan"), 0.2, None, 0.2])]
    assert [one.number for one in ranked(trials, (("f1", False),))] == [2, 4, 0]


def test_a_limit_that_running_trials_alone_exceed_is_refused_before_they_run(tmp_path: Path) -> None:
    place = Folder(str(tmp_path / "not/there/yet"))
    assert require_room(10**6, 10**6, 2, 20, 10**9, place) == 3 * 10**6 * 10 + 2 * 10**6
    assert require_room(10**6, 10**6, 2, 20, 25 * 10**6, place) == 25 * 10**6
    with pytest.raises(InputError, match=r"search\.max_disk is 1 GB, and 2 trials at once need about 2\.3 GB"):
        require_room(10**8, 10**8, 2, 20, 10**9, place)
    # With adapters the bundles are the most of it.
    with pytest.raises(InputError, match=r"need about 0\.205 GB for their checkpoints and two bundles"):
        require_room(9 * 10**7, 12 * 10**5, 2, 20, 10**8, place)
    with pytest.raises(InputError, match=r"storage: .* has .* free, and this sweep needs about 3\.2e\+05 GB"):
        require_room(10**13, 10**13, 2, 20, 10**18, place)
