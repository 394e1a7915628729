"""Every row of a job's data read and checked, without a cluster and without keeping any: what `orchestrator validate` does last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config import JobConfig
from orchestrator.data import files as source_files
from orchestrator.data import sources
from orchestrator.data.files import SPLITS, SourceFile
from orchestrator.data.prepare import mapping_of, merge
from orchestrator.data.readers import BadRow
from orchestrator.data.spool import cleaned
from orchestrator.errors import InputError
from orchestrator.progress import Display
from orchestrator.tasks.base import Observation, Row, Task

CHUNK = 2048
SHOWN = 1000
"""Bad rows that are listed; all are counted."""


@dataclass(frozen=True)
class Scan:
    """What is in the files of a job."""

    rows: dict[str, int]
    """Split with files of its own -> rows that can be used."""
    bad: int
    listed: tuple[dict[str, Any], ...]
    """The first bad rows: `file`, `row`, `field`, `expected`, `found`."""
    task: Task
    """Completed from all rows that can be used."""

    @property
    def share(self) -> float:
        """Of bad rows."""
        return self.bad / max(1, self.bad + sum(self.rows.values()))


def scan(job: JobConfig, display: Display) -> Scan:
    """Reads all rows of all splits. Raises `InputError` for what prepare would: files that can't be read, nothing to learn from.

    Bad rows are only counted, whatever the job allows; `refuse` says what it does not.
    """
    found = source_files.find(job.data)
    rows: dict[str, int] = {}
    bad: list[dict[str, Any]] = []
    observed: dict[str, Observation] = {split: job.task.observe([]) for split in SPLITS}
    count = all_bad = 0
    for split, files in found.items():
        mapping, good = mapping_of(job, split, found), 0
        pending: list[Row] = []
        for file, number, row in _rows(job, split, files, mapping):
            count += 1
            if isinstance(row, BadRow):
                all_bad += 1
                if len(bad) < SHOWN:
                    bad.append(
                        {"file": file.name, "row": number, "field": row.column, "expected": row.expected, "found": _shown(row.found)}
                    )
            else:
                good += 1
                pending.append(row)
            if len(pending) >= CHUNK:
                observed[split], pending = merge(observed[split], job.task.observe(pending)), []
                display.step(count, None, "rows")
        observed[split] = merge(observed[split], job.task.observe(pending))
        if not good:
            raise InputError(sources.no_rows(split, files) if not all_bad else _none_good(split, bad))
        rows[split] = good
    return Scan(rows, all_bad, tuple(bad), job.task.fit(observed))


def refuse(job: JobConfig, found: Scan) -> None:
    """Raises `InputError` where more rows are bad than the job allows."""
    if found.bad and found.share > job.data.max_bad_rows:
        raise InputError(
            f"{found.bad:,} of {found.bad + sum(found.rows.values()):,} rows can't be used ({found.share:.2%}; data.max_bad_rows allows "
            f"{job.data.max_bad_rows:g}). Correct them, or let a share of the rows be left out: --set data.max_bad_rows=0.01."
        )


def _rows(
    job: JobConfig, split: str, files: list[SourceFile], mapping: Mapping[str, str]
) -> Iterator[tuple[SourceFile, int, Row | BadRow]]:
    group = job.data.split.group if split == "train" else None
    for file in files:
        for number, _, row in cleaned(job.task, job.data, file, mapping, group):
            yield file, number, row


def _none_good(split: str, bad: list[dict[str, Any]]) -> str:
    first = "\n".join("  " + sources.describe(row["file"], row["row"], row["field"], row["expected"], row["found"]) for row in bad[:5])
    return f"data.{split}: no row can be used.\n{first}"


def _shown(found: Any) -> Any:
    shown = found if found is None or isinstance(found, (bool, int, str)) else repr(found)
    return f"{shown[:200]}…" if isinstance(shown, str) and len(shown) > 200 else shown
