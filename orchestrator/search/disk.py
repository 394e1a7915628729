"""What the trials of a sweep leave on the disk: only checkpoints that can still win are kept, within `search.max_disk`."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import checkpoints
from orchestrator.errors import InputError
from orchestrator.records import TrialRecord
from orchestrator.storage import Folder

KEPT = 3
"""Of so many of the best trials that have ended the best checkpoint is kept: should one be torn, the next takes its place."""
Objectives = Sequence[tuple[str, bool]]


def value(report: dict[str, Any] | None, metric: str) -> float | None:
    """A metric of a report; None where it has none that is a number."""
    found = (report or {}).get(metric)
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None


def ranked(trials: Iterable[TrialRecord], objectives: Objectives) -> list[TrialRecord]:
    """The trials that have a score, the best by the first objective first; of equal ones the earlier."""
    metric, higher = objectives[0]
    scored = [(found, trial) for trial in trials if (found := value(trial.best, metric)) is not None]
    sign = -1.0 if higher else 1.0
    return [trial for _, trial in sorted(scored, key=lambda pair: (sign * pair[0], pair[1].number))]


def front(trials: Iterable[TrialRecord], objectives: Objectives) -> list[TrialRecord]:
    """The trials that no other beats in every objective (Pareto's front), the best by the first objective first."""
    scored: list[tuple[TrialRecord, list[float]]] = []
    for trial in ranked(trials, objectives):
        values = [(value(trial.best, metric), higher) for metric, higher in objectives]
        numbers = [found if higher else -found for found, higher in values if found is not None]
        if len(numbers) == len(values):
            scored.append((trial, numbers))

    def beaten(mine: Sequence[Any]) -> bool:
        return any(other != mine and all(theirs >= own for theirs, own in zip(other, mine, strict=True)) for _, other in scored)

    return [trial for trial, values in scored if not beaten(values)]


def can_win(trials: Sequence[TrialRecord], objectives: Objectives) -> list[TrialRecord]:
    """The trials that have ended and whose checkpoint is kept, those that are given up last first."""
    ended = [trial for trial in trials if trial.status != "running"]
    best = ranked(ended, objectives)[:KEPT] if len(objectives) == 1 else front(ended, objectives)
    default = [trial for trial in ranked(ended, objectives) if trial.origin == "default" and trial not in best]
    return [*best[:1], *default, *best[1:]]


@dataclass
class Disk:
    """What the trials of a sweep take, measured; checkpoints are deleted as they can't win any more."""

    folder: Folder
    """Of the sweep."""
    objectives: Objectives
    limit: int
    """Bytes."""
    used: int = 0
    most: int = 0
    """Of `used`, so far."""
    _bare: set[str] = field(default_factory=set)
    """Ids of ended trials that have no checkpoints any more."""

    def tidy(self, trials: Sequence[TrialRecord]) -> bool:
        """Deletes the checkpoints that can't win, then more of ended trials where the limit asks for it; whether all fits now.

        `trials` that have ended must have stopped writing. Of one that can win its best checkpoint is kept.
        """
        keep = can_win(trials, self.objectives)
        kept = {trial.id for trial in keep}
        for trial in trials:
            if trial.status != "running" and trial.id not in self._bare:
                if trial.id not in kept:
                    self._strip(trial)
                elif trial.best is not None:
                    checkpoints.keep_only(Folder(trial.folder), trial.best["best_step"])
        self.measure()
        while self.used > self.limit and len(keep) > 1:
            self._strip(keep.pop())
            self.measure()
        return self.used <= self.limit

    def measure(self) -> int:
        """Bytes of all that the trials have written."""
        self.used = size(self.folder / "trials")
        self.most = max(self.most, self.used)
        return self.used

    def _strip(self, trial: TrialRecord) -> None:
        (Folder(trial.folder) / "checkpoints").delete()
        self._bare.add(trial.id)


def size(folder: Folder) -> int:
    """Bytes of all files under a folder, one that stands there twice (a hard link) counted once; what is deleted meanwhile doesn't count."""
    if folder.is_local:
        found: dict[tuple[int, int], int] = {}
        for place, _, names in os.walk(folder.path):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    seen = (Path(place) / name).stat()
                    found[seen.st_dev, seen.st_ino] = seen.st_size
        return sum(found.values())
    import pyarrow.fs as pafs

    selector = pafs.FileSelector(folder.path, allow_not_found=True, recursive=True)
    return sum(info.size or 0 for info in folder.filesystem.get_file_info(selector) if info.type == pafs.FileType.File)


def require_room(weights: int, trained: int, at_once: int, num_trials: int, limit: int, folder: Folder) -> int:
    """Bytes that a sweep's trials take at most, where `trained` of a model's `weights` bytes are trained and `at_once` trials run at the same time.

    Raises `InputError` where what can't be deleted is more than `limit`, or all is more than is free for `folder`.
    """
    each = 3 * trained  # weights and two moments
    bundles = 2 * weights  # of the winner and of the job as it is written
    needed = each * (3 * min(at_once, num_trials) + 1) + bundles  # the last, the best and one being written; and the winner's
    if needed > limit:
        raise InputError(
            f"search.max_disk is {_gigabytes(limit)}, and {at_once} trials at once need about {_gigabytes(needed)} for their checkpoints "
            "and two bundles; raise it, or lower search.max_concurrent_trials, or search with model.lora."
        )
    most = min(limit, needed + each * KEPT)
    if folder.is_local:
        free = shutil.disk_usage(next(place for place in (Path(folder.path), *Path(folder.path).parents) if place.exists())).free
        if free < most:
            raise InputError(
                f"storage: {folder} has {_gigabytes(free)} free, and this sweep needs about {_gigabytes(most)}; "
                "free some, set storage to another place, or lower search.max_concurrent_trials."
            )
    return most


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
