"""From files to a canonical Parquet data set with splits, the completed task, and nothing half-written."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from orchestrator.config import JobConfig, digest
from orchestrator.data import files as source_files
from orchestrator.data import fingerprint, quality, sources, splits
from orchestrator.data.files import SPLITS, SourceFile
from orchestrator.data.place import MANIFEST, finished, workplace
from orchestrator.data.spool import FILE_BYTES, MOST_BUCKETS, Reading, Writing
from orchestrator.errors import InputError, did_you_mean
from orchestrator.progress import Display
from orchestrator.records import PreparedData, PreparedFile, PreparedSplit
from orchestrator.storage import Folder
from orchestrator.tasks.base import Observation

VERSION = 1
"""Of the canonical form; part of the fingerprint."""


def prepare(job: JobConfig, storage: Folder, display: Display) -> PreparedData:
    """Reads, checks and splits the job's data into `storage`/prepared/FINGERPRINT, or reuses what lies there.

    Needs a connected Ray. Memory: about 30 bytes a row in this process, a few hundred MB in each task, whatever the
    size of the files. Raises `InputError` for anything wrong with the data; nothing is left behind then.
    """
    started = time.perf_counter()
    found = source_files.find(job.data)
    mappings = {split: _mapping(job, split, found) for split in found}
    key = _fingerprint(job, found)
    root = (Folder(storage.path) if storage.is_local else storage) / "prepared"
    target = root / key[:16]
    if (done := finished(target, key)) is not None:
        display.say(f"prepared before from the same data, reused: {_summary(done)} ({target})")
        return done
    with workplace(root, target) as folder:
        prepared = _Build(job, found, mappings, key, folder, target, display).run()
    seconds = time.perf_counter() - started
    display.say(f"{_summary(prepared)}, from {_count(sum(map(len, found.values())), 'file')} in {seconds:.1f} s ({target})")
    return prepared


@dataclass
class _Source:
    """What pass 1 found in the files of one split."""

    rows: int = 0
    bytes: int = 0
    spools: tuple[str, ...] = ()
    buckets: int = 1
    split_hashes: np.ndarray = None  # type: ignore[assignment]
    input_hashes: np.ndarray = None  # type: ignore[assignment]
    target_hashes: np.ndarray = None  # type: ignore[assignment]
    strata: tuple[str | None, ...] = ()
    codes: np.ndarray = None  # type: ignore[assignment]


@dataclass
class _Build:
    job: JobConfig
    found: Mapping[str, list[SourceFile]]
    mappings: Mapping[str, dict[str, str]]
    key: str
    folder: Folder
    target: Folder
    display: Display

    def __post_init__(self) -> None:
        self.spool = (self.folder / "spool").make()
        self.here = self.spool.is_local or any(file.is_local for files in self.found.values() for file in files)
        self.rows_read = self.rows_bad = self.rows_joined = 0
        self.bad_first: list[dict[str, Any]] = []
        self.schemas: list[pa.Schema] = []

    def run(self) -> PreparedData:
        found = self._read()
        self._judge_bad_rows()
        for split, source in found.items():
            if not source.rows:
                raise InputError(sources.no_rows(split, self.found[split]))
        cuts = {split: self._cuts(split, source) for split, source in found.items()}
        places = {split: cuts[split].assign(source.split_hashes, source.codes, source.strata) for split, source in found.items()}
        for sentence in self._quality(found, places):
            self.display.warn(sentence)
        written, observed = self._write(found, cuts)
        task = self.job.task.fit(observed)
        quarantine = self._quarantine()
        self.spool.delete()
        prepared = PreparedData(
            root=str(self.target),
            fingerprint=self.key,
            task=task,
            splits=written,
            observed=observed,
            rows_read=self.rows_read,
            rows_bad=self.rows_bad,
            quarantine=str(self.target / quarantine) if quarantine else None,
            sources={split: tuple(file.uri for file in files) for split, files in self.found.items()},
        )
        (self.folder / MANIFEST).write_json(prepared.to_json())
        if quarantine:
            share = self.rows_bad / self.rows_read
            self.display.warn(
                f"{_count(self.rows_bad, 'bad row')} of {self.rows_read:,} ({share:.2%}) left out; they are listed in {prepared.quarantine}."
            )
        return prepared

    # ---- pass 1 ----------------------------------------------------------------------------------------------
    def _read(self) -> dict[str, _Source]:
        from orchestrator.data.datasource import stream

        buckets = {split: _buckets(files) for split, files in self.found.items()}
        work = [
            Reading(self.job.task, self.job.data, split, tuple(some), self.mappings[split], index, buckets[split], self.spool)
            for split, files in self.found.items()
            for index, some in enumerate(sources.tasks_of(files))
        ]
        reports: dict[str, list[dict[str, Any]]] = {split: [] for split in self.found}
        with contextlib.closing(stream("Files", work, here=self.here)) as done:
            for report in done:
                _refuse(report)
                self.rows_read += report["rows"] + report["bad"] + report["joined"]
                self.rows_joined += report["joined"]
                self.rows_bad += report["bad"]
                if report["bad"]:
                    self.bad_first += json.loads(report["bad_first"])
                reports[report["split"]].append(report)
                self.display.step(self.rows_read, None, "rows")
        return {
            split: self._gather(split, sorted(some, key=lambda report: report["name"]), buckets[split]) for split, some in reports.items()
        }

    def _gather(self, split: str, reports: Sequence[dict[str, Any]], buckets: int) -> _Source:
        filled = [report for report in reports if report["rows"]]
        self.schemas += [pa.ipc.read_schema(pa.py_buffer(report["schema"])) for report in filled]
        strata = sorted({name for report in filled for name in report["strata"]}, key=lambda name: (name is not None, name or ""))
        place = {name: code for code, name in enumerate(strata)}

        def joined(key: str) -> np.ndarray:
            # Popped, so that a corpus is not held twice.
            return np.concatenate([np.zeros(0, np.uint64), *(np.frombuffer(report.pop(key), np.uint64) for report in filled)])

        codes = [
            np.array([place[name] for name in report["strata"]], np.int32)[np.frombuffer(report.pop("codes"), np.int32)]
            for report in filled
        ]
        return _Source(
            rows=sum(report["rows"] for report in filled),
            bytes=sum(report["bytes"] for report in filled),
            spools=tuple(report["name"] for report in filled),
            buckets=buckets,
            split_hashes=joined("split_hashes"),
            input_hashes=joined("input_hashes"),
            target_hashes=joined("target_hashes"),
            strata=tuple(strata),
            codes=np.concatenate([np.zeros(0, np.int32), *codes]),
        )

    def _judge_bad_rows(self) -> None:
        allowed = self.job.data.max_bad_rows
        if not self.rows_bad or self.rows_bad <= allowed * self.rows_read:
            return
        first = sorted(self.bad_first, key=lambda row: (row["file"], row["row"]))[:5]
        shown = "\n".join("  " + sources.describe(row["file"], row["row"], row["column"], row["expected"], row["found"]) for row in first)
        more = f"\n  … and {self.rows_bad - len(first):,} more" if self.rows_bad > len(first) else ""
        # Where no bad row is allowed, reading stops early: the numbers are of what was read.
        share = f"{self.rows_bad / self.rows_read:.2%}" if allowed else f"{self.rows_bad:,} of the {self.rows_read:,} read"
        raise InputError(
            f"{'Bad rows' if self.rows_bad > 1 else 'A bad row'} ({share}; data.max_bad_rows allows {allowed:g}):\n{shown}{more}\n"
            f"Correct {'them' if self.rows_bad > 1 else 'it'}, or let a share of the rows be left out and listed: --set data.max_bad_rows=0.01."
        )

    # ---- splits ----------------------------------------------------------------------------------------------
    def _cuts(self, split: str, source: _Source) -> splits.Cuts:
        section = self.job.data.split
        if split != "train":
            return splits.fixed(split)
        validation = 0.0 if "validation" in self.found else section.validation
        test = 0.0 if "test" in self.found else section.test
        if not validation and not test:
            return splits.fixed("train")
        if section.group is not None:
            return splits.cut_groups(source.split_hashes, validation=validation, test=test)
        if section.stratify:
            return splits.cut(source.split_hashes, source.codes, source.strata, validation=validation, test=test)
        return splits.cut(source.split_hashes, np.zeros_like(source.codes), (None,), validation=validation, test=test)

    def _quality(self, found: Mapping[str, _Source], places: Mapping[str, np.ndarray]) -> Iterator[str]:
        counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        for split, source in found.items():
            for place, name in enumerate(SPLITS):
                tally = np.bincount(source.codes[places[split] == place], minlength=len(source.strata))
                counts[name].update(
                    {stratum: int(rows) for stratum, rows in zip(source.strata, tally, strict=True) if stratum is not None and rows}
                )
        yield from quality.balance(counts)
        for split, share in (("validation", self.job.data.split.validation), ("test", self.job.data.split.test)):
            if share and split not in found and not any((part == SPLITS.index(split)).any() for part in places.values()):
                yield f"There are too few rows{' or groups' * (self.job.data.split.group is not None)} for a {split} split: it is empty."
        roles = self.job.task.columns()
        mapping = self.mappings["train"]
        ends = np.cumsum([source.rows for source in found.values()])

        def where(row: int) -> str:
            index = int(np.searchsorted(ends, row, side="right"))
            source = list(found.values())[index]
            return self._row_id(source, row - (int(ends[index - 1]) if index else 0))

        yield from quality.duplicates(
            np.concatenate([source.input_hashes for source in found.values()]),
            np.concatenate([source.target_hashes for source in found.values()]),
            np.concatenate([places[split] for split in found]),
            where,
            [mapping[role] for role in mapping if not roles[role].target],
            own_files=len(found) > 1,
            group=self.job.data.split.group,
        )

    def _row_id(self, source: _Source, row: int) -> str:
        """The id of a row by its place in the spools, which is the order of the hashes."""
        for name in source.spools:
            place = self.spool / f"{name}.arrow"
            with place.filesystem.open_input_file(place.path) as stream:
                reader = pa.ipc.open_file(stream)
                for index in range(reader.num_record_batches):
                    batch = reader.get_batch(index)
                    if row < batch.num_rows:
                        return batch["row_id"][row].as_py()
                    row -= batch.num_rows
        raise IndexError(row)

    # ---- pass 2 ----------------------------------------------------------------------------------------------
    def _write(
        self, found: Mapping[str, _Source], cuts: Mapping[str, splits.Cuts]
    ) -> tuple[dict[str, PreparedSplit], dict[str, Observation]]:
        from orchestrator.data.datasource import stream

        schema = _without_empty(pa.unify_schemas(self.schemas, promote_options="permissive")).serialize().to_pybytes()
        work: list[Writing] = []
        for split, source in found.items():
            files = min(source.buckets, max(1, math.ceil(source.bytes / FILE_BYTES)))
            ends = [source.buckets * place // files for place in range(files + 1)]
            for first, last in itertools.pairwise(ends):
                work.append(Writing(self.job.task, source.spools, (first, last), schema, cuts[split], len(work), self.spool, self.folder))
        parts: dict[str, list[PreparedFile]] = {split: [] for split in SPLITS}
        observed: dict[str, Observation] = {}
        rows = 0
        with contextlib.closing(stream("BucketsIntoSplits", work, here=self.here)) as done:
            for report in done:
                _refuse(report)
                for split, (name, count) in json.loads(report["files"]).items():
                    parts[split].append(PreparedFile(path=name, rows=count))
                    rows += count
                for split, observation in json.loads(report["observed"]).items():
                    observed[split] = merge(observed[split], observation) if split in observed else observation
                self.display.step(rows, self.rows_read - self.rows_bad - self.rows_joined, "rows")
        for split in SPLITS:
            observed.setdefault(split, self.job.task.observe([]))
            parts[split].sort(key=lambda file: file.path)
        return (
            {split: PreparedSplit(rows=sum(file.rows for file in parts[split]), files=tuple(parts[split])) for split in SPLITS},
            {split: _sorted(observed[split]) for split in SPLITS},
        )

    def _quarantine(self) -> str | None:
        if not self.rows_bad:
            return None
        target = self.folder / "quarantine.jsonl"
        with target.filesystem.open_output_stream(target.path) as out:
            for name in self.spool.names():
                if name.endswith(".bad.jsonl"):
                    out.write((self.spool / name).read_bytes())
        return "quarantine.jsonl"


def _refuse(report: Mapping[str, Any]) -> None:
    if report["error"] is not None:
        raise InputError(report["error"])


def merge(one: Observation, other: Observation) -> Observation:
    """Two observations as one: leaves are added, key by key."""
    merged = dict(one)
    for key, value in other.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] += value
    return merged


def _sorted(value: Any) -> Any:
    return {key: _sorted(value[key]) for key in sorted(value)} if isinstance(value, Mapping) else value


def _mapping(job: JobConfig, split: str, found: Mapping[str, list[SourceFile]]) -> dict[str, str]:
    """Role -> column for a split's files, seen to be there in their first rows."""
    columns = sources.peek(job.data, split, found=found).columns
    group = job.data.split.group
    if split == "train" and group is not None and group not in columns:
        raise InputError(f"data.split.group: there is no column {group!r} in data.train.{did_you_mean(group, columns)}")
    return sources.map_columns(job.data, job.task.columns(), columns, where=f"data.{split}")


def _fingerprint(job: JobConfig, found: Mapping[str, list[SourceFile]]) -> str:
    asked = job.data.model_dump(mode="json", exclude=set(SPLITS))
    contents = {split: [[file.name, file.format, fingerprint.content(file)] for file in files] for split, files in found.items()}
    return digest({"version": VERSION, "task": job.task.to_json(), "data": asked, "files": contents})


def _buckets(files: Sequence[SourceFile]) -> int:
    """How finely spools are cut: a few buckets for an output file, whose number is known only when all has been read."""
    size = sum(file.size * (4 if file.compression or file.format in ("parquet", "arrow") else 1) for file in files)
    return min(MOST_BUCKETS, 8 * max(1, math.ceil(size / FILE_BYTES)))


def _without_empty(schema: pa.Schema) -> pa.Schema:
    """Optional columns that no row has are left out; a list that is empty in every row is one of texts."""
    fields = [
        pa.field(column.name, pa.list_(pa.string()))
        if pa.types.is_list(column.type) and pa.types.is_null(column.type.value_type)
        else column
        for column in schema
        if not pa.types.is_null(column.type)
    ]
    return pa.schema(fields)


def _summary(prepared: PreparedData) -> str:
    parts = ", ".join(f"{split.rows:,} {name}" for name, split in prepared.splits.items() if split.rows)
    return f"{_count(sum(split.rows for split in prepared.splits.values()), 'row')}: {parts}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
