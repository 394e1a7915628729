"""From prepared Parquet files to the rows that each worker trains on, encoded by Ray Data while training goes on.

The place of a row in an epoch is a pure function of (seed, epoch, file, row) and, with `group_by_length`, of the lengths
of the rows in its file. So nothing about order is state: a checkpoint's data position is (epoch, step), any number of
workers sees the same global batches, and what a killed run had read is computed, not remembered.

Every worker has a Ray Data pipeline of its own, whose input is the list of files in the order of the epochs still to
come. A task reads one file, drops the rows of other workers, then encodes the rest. One pipeline runs over all epochs,
so there is no gap between them. It is built where it is consumed, because only there the step to resume from is known.

CPUs: Train's workers hold theirs for the whole run. If encoding tasks asked for CPUs too, a machine with no spare ones
would never run them, and a task waiting for its reader while it holds the last CPU would stop the other workers for
good. So tasks ask for a CPU only where there is one for each that may run at once, else for none (`lanes`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import pickle
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from orchestrator.errors import StageError
from orchestrator.storage import Folder
from orchestrator.tasks.base import PARTNER, Example, Row, Task

if TYPE_CHECKING:
    from orchestrator.loop import Share
    from orchestrator.records import PreparedData

WINDOW = 50
"""Global batches among which rows are grouped by length, as in `transformers`' LengthGroupedSampler."""
LEG = 512
"""Files in one pipeline; a longer run is several pipelines, one after the other."""
OBJECT_STORE = 192 * 2**20
"""Bytes of encoded rows that a worker's pipeline keeps ready."""
KEEP_BYTES = 512 * 2**20
"""Of encoded rows of a split that is not trained on, which a worker keeps in memory; a larger one is streamed each time."""
PATIENCE_S = 1800.0
"""How long a worker waits for the next rows before it says so."""


@dataclass(frozen=True)
class Plan:
    """The place of every row in one epoch.

    `counts` are the rows of each file. An epoch permutes the files, then the rows in each; `position // global_batch` is
    the step. With `group_by_length`, rows of similar length share a global batch: within a file, windows of about
    `WINDOW` batches are sorted by length, and the batches of a window shuffled.
    """

    counts: tuple[int, ...]
    seed: int
    epoch: int
    global_batch: int
    group_by_length: bool = False

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def steps(self) -> int:
        return -(-self.rows // self.global_batch)

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """The files in the order in which the epoch reads them."""
        return tuple(np.random.default_rng([self.seed, self.epoch]).permutation(len(self.counts)).tolist())

    @functools.cached_property
    def offsets(self) -> dict[int, int]:
        """File -> position of its first row in the epoch."""
        starts = itertools.accumulate((self.counts[file] for file in self.order), initial=0)
        return dict(zip(self.order, starts, strict=False))

    def files(self, start: int, stop: int) -> list[int]:
        """The files with rows at positions from `start` to before `stop`, in reading order."""
        return [
            file
            for file in self.order
            if self.offsets[file] < stop and self.offsets[file] + self.counts[file] > start and self.counts[file]
        ]

    def positions(self, file: int, lengths: np.ndarray | None = None) -> np.ndarray:
        """For each row of `file` its position in the epoch; `lengths` (one for each row) are needed to group by length."""
        rng = np.random.default_rng([self.seed, self.epoch, file])
        order = rng.permutation(self.counts[file])
        if self.group_by_length:
            if lengths is None or len(lengths) != len(order):
                raise ValueError(f"grouping by length needs the length of each of the {len(order)} rows of file {file}")
            order = self._grouped(order, lengths, self.offsets[file], rng)
        positions = np.empty(len(order), dtype=np.int64)
        positions[order] = self.offsets[file] + np.arange(len(order))
        return positions

    def share(self, step: int, rank: int, world: int) -> tuple[int, int, bool]:
        """First and last+1 position of a worker's rows at `step`, and whether they are borrowed.

        The rows of a step are cut into `world` runs that differ by one row at most, also in the last, short step. A
        worker for which none is left borrows the first, so that it has something to send through the model.
        """
        first = step * self.global_batch
        rows = min(self.global_batch, self.rows - first)
        low, high = -(-rank * rows // world), -(-(rank + 1) * rows // world)
        return (first + low, first + high, False) if high > low else (first, first + 1, True)

    def mine(self, positions: np.ndarray, rank: int, world: int) -> np.ndarray:
        """Which of the rows at `positions` a worker reads, borrowed ones too: `share`, for many rows at once."""
        step, local = np.divmod(positions, self.global_batch)
        rows = np.minimum(self.global_batch, self.rows - step * self.global_batch)
        has_rows = -(-rank * rows // world) < -(-(rank + 1) * rows // world)
        return np.where(has_rows, (local * world) // rows == rank, local == 0)

    def _grouped(self, order: np.ndarray, lengths: np.ndarray, offset: int, rng: np.random.Generator) -> np.ndarray:
        # Runs of the file's rows that fall into the same global batch: the first and last are shared with other files.
        edges = np.unique(
            np.clip(np.r_[0, np.arange(-offset % self.global_batch, len(order), self.global_batch), len(order)], 0, len(order))
        )
        sizes = np.diff(edges)
        grouped = np.empty_like(order)
        for low in range(0, len(sizes), WINDOW):
            window = slice(edges[low], edges[min(low + WINDOW, len(sizes))])
            by_length = order[window][np.argsort(lengths[order[window]], kind="stable")]
            taken = 0
            for batch in low + rng.permutation(min(WINDOW, len(sizes) - low)):
                rows = by_length[taken : taken + sizes[batch]]
                taken += sizes[batch]
                grouped[edges[batch] : edges[batch + 1]] = rows[_spread(len(rows))]
        return grouped


@functools.lru_cache(maxsize=64)
def _spread(count: int) -> np.ndarray:
    """An order of `count` sorted things in which every run of them is spread over the whole (van der Corput, 1935).

    A worker's rows are a run of the global batch. This way each gets long and short ones alike, and none waits for another.
    """
    bits = max(1, (count - 1).bit_length())
    index, reverse = np.arange(count), np.zeros(count, dtype=np.int64)
    for bit in range(bits):
        reverse |= ((index >> bit) & 1) << (bits - 1 - bit)
    return np.argsort(reverse)


def lanes(cluster_cpus: float, worker_cpus: float, world: int) -> tuple[int, int]:
    """How many encoding tasks each worker's pipeline runs at once, and the CPUs that each asks for.

    Twice as many tasks fit as the pipelines of training run, since validation has its own.
    """
    spare = int(cluster_cpus - worker_cpus * world)
    return (min(8, spare // (2 * world)), 1) if spare >= 2 * world else (1, 0)


@dataclass(frozen=True)
class Encoding:
    """What a task must know to turn a file of a split into encoded rows of one worker. Pickles; knows no order of epochs."""

    root: str
    files: tuple[str, ...]
    counts: tuple[int, ...]
    task: Task
    processor: bytes
    """Pickled: unpickling it takes a third of the time of loading it in a task, and needs no torch there."""
    rank: int
    world: int
    seed: int = 0
    global_batch: int = 0
    """0: not for training: rows stay in the order of the files, and `position % world` gives the worker."""
    group_by_length: bool = False

    @classmethod
    def of(cls, prepared: PreparedData, split: str, processor: Any, *, rank: int, world: int, **order: Any) -> Encoding:
        """For the rows of `split`; `order` (seed, global_batch, group_by_length) for training."""
        files = prepared.splits[split].files if split in prepared.splits else ()
        paths, counts = tuple(file.path for file in files), tuple(file.rows for file in files)
        return cls(prepared.root, paths, counts, prepared.task, pickle.dumps(processor, protocol=5), rank, world, **order)

    def plan(self, epoch: int) -> Plan:
        return Plan(self.counts, self.seed, epoch, self.global_batch, self.group_by_length)

    def read(self, epoch: int, file: int, start: int, stop: int) -> pa.Table:
        """This worker's rows of one file at positions from `start` to before `stop`, sorted by `_position`."""
        folder = Folder(self.root)
        table = pq.read_table((folder / self.files[file]).path, filesystem=folder.filesystem)
        if len(table) != self.counts[file]:
            raise StageError(
                f"{folder / self.files[file]} has {len(table)} rows where {self.counts[file]} were prepared; delete the prepared data to prepare it anew."
            )
        if self.global_batch:
            plan = self.plan(epoch)
            positions = plan.positions(file, lengths(table, self.task) if self.group_by_length else None)
            mine = plan.mine(positions, self.rank, self.world)
        else:
            positions = sum(self.counts[:file]) + np.arange(len(table))
            mine = positions % self.world == self.rank
        mine &= (positions >= start) & (positions < stop)
        taken = np.flatnonzero(mine)
        taken = taken[np.argsort(positions[taken])]
        rows = table.take(pa.array(taken))
        if self.global_batch and self.task.mixes:
            others = table.take(pa.array(partners(len(table), [self.seed, epoch, file])[taken]))
            rows = rows.append_column(PARTNER, others.to_struct_array())
        return rows.append_column("_position", pa.array(positions[taken]))

    def encode(self, table: pa.Table, with_rows: bool, epoch: int = 0) -> pa.Table:
        """Columns row_id, position and examples (pickled: cheap for ragged token lists), and the rows themselves if wanted."""
        rows: list[Row] = table.drop_columns([name for name in ("_position", "_row") if name in table.column_names]).to_pylist()
        rows = [_present(row) for row in rows]
        if self.global_batch:
            seeds = row_seeds(self.seed, epoch, [row["row_id"] for row in rows])
            examples = self.task.encode_to_train(rows, _processor(self.processor), seeds)
        else:
            examples = self.task.encode(rows, _processor(self.processor))
        columns = {
            "row_id": pa.array([row["row_id"] for row in rows], pa.string()),
            "position": table["_position"].combine_chunks(),
            "examples": pa.array([pickle.dumps(each, protocol=5) for each in examples], pa.large_binary()),
        }
        if with_rows:
            columns["row"] = pa.array([pickle.dumps(row, protocol=5) for row in rows], pa.large_binary())
        return pa.table(columns)


def _present(row: Row) -> Row:
    """Without what is null, in its partner neither."""
    return {role: _present(value) if role == PARTNER else value for role, value in row.items() if value is not None}


def partners(count: int, seed: Sequence[int]) -> np.ndarray:
    """For each of `count` rows another one, and each the partner of one: neighbours in a circle of random order."""
    circle = np.random.default_rng([*seed, 1]).permutation(count)
    others = np.empty(count, dtype=np.int64)
    others[circle] = np.roll(circle, 1)
    return others


def row_seeds(seed: int, epoch: int, row_ids: Sequence[str]) -> list[int]:
    """What is random about a row in an epoch is drawn from: 64 bits, the same wherever the row is encoded."""
    return [int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{row_id}".encode(), digest_size=8).digest(), "little") for row_id in row_ids]


@functools.lru_cache(maxsize=2)
def _processor(pickled: bytes) -> Any:
    """Once for each process that runs tasks."""
    return pickle.loads(pickled)


def lengths(table: pa.Table, task: Task) -> np.ndarray:
    """A cheap measure of each row: bytes of its texts (a token is about as many bytes in any script).

    A label says nothing of it, and neither does the size of an image's file: rows sorted by these would come in batches of one class.
    """
    total = np.zeros(len(table), dtype=np.int64)
    columns = task.columns()
    for field in table.schema:
        if field.name not in columns or columns[field.name].kind in ("image", "label"):
            continue
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            total += pc.fill_null(pc.call_function("binary_length", [table[field.name]]), 0).to_numpy().astype(np.int64)
    return total


@dataclass(frozen=True)
class Part:
    """Positions from `start` to before `stop` of one file in one epoch."""

    epoch: int
    file: int
    start: int
    stop: int


def _run_part(batch: pa.Table, *, encoding: Encoding, parts: Sequence[Part], with_rows: bool) -> Iterator[pa.Table]:
    """What a task does: reads one file, keeps the rows of one worker, encodes them."""
    for index in batch["item"].to_pylist():
        part = parts[index]
        table = encoding.read(part.epoch, part.file, part.start, part.stop)
        for low in range(0, len(table), encoding.task.rows_at_once):
            yield encoding.encode(table.slice(low, encoding.task.rows_at_once), with_rows, part.epoch)


def pipeline(
    encoding: Encoding, parts: Iterable[Part], *, tasks: int = 1, cpus: float = 0, object_store: int = OBJECT_STORE, with_rows: bool = False
) -> Iterator[pa.Table]:
    """The encoded rows of `parts` in order, by Ray Data. Iterating runs it; closing the iterator stops it."""
    import ray.data
    from ray.data import DataContext, ExecutionOptions, ExecutionResources

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = -1  # a slow reader is no fault; `Feed` has the deadline
    context.execution_options = ExecutionOptions(preserve_order=True, resource_limits=ExecutionResources(object_store_memory=object_store))
    remaining = iter(parts)
    while leg := list(itertools.islice(remaining, LEG)):
        rows = ray.data.from_items(list(range(len(leg))), override_num_blocks=len(leg)).map_batches(
            _run_part,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=cpus,
            concurrency=tasks,
            fn_kwargs={"encoding": encoding, "parts": leg, "with_rows": with_rows},
        )
        yield from rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


class Feed:
    """A pipeline's tables, pulled by a thread a little ahead of their use; the thread starts at once.

    A wait longer than `patience` seconds is a `StageError` that says so; what the pipeline raises is raised here.
    """

    def __init__(self, tables: Iterator[pa.Table], what: str, patience: float = PATIENCE_S):
        self._queue: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=2)
        self._closed = threading.Event()
        self._what, self._patience = what, patience
        threading.Thread(target=self._pull, args=(tables,), name="rows", daemon=True).start()

    def __iter__(self) -> Iterator[pa.Table]:
        while True:
            try:
                item = self._queue.get(timeout=self._patience)
            except queue.Empty:
                raise StageError(
                    f"No rows of {self._what} came from the encoding tasks for {self._patience:g} s. The cluster may have lost nodes or be out of memory; see Ray's logs."
                ) from None
            if item is None:
                return
            if isinstance(item, BaseException):
                raise _cause(item) from item
            yield item

    def close(self) -> None:
        self._closed.set()

    def _pull(self, tables: Iterator[pa.Table]) -> None:
        last: BaseException | None = None
        try:
            with contextlib.closing(tables):  # pyright: ignore[reportArgumentType]
                for table in tables:
                    if not self._put(table):
                        return
        except BaseException as error:  # noqa: BLE001  it belongs to the reader, who raises it
            last = error
        self._put(last)

    def _put(self, item: pa.Table | BaseException | None) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.2)
                return True
        return False


def _cause(error: BaseException) -> BaseException:
    """What went wrong in an encoding task: a sentence as it stands, anything else in one line."""
    from ray.exceptions import RayTaskError

    from orchestrator.errors import InputError

    seen: BaseException | None = error
    while seen is not None:
        inner = seen.cause if isinstance(seen, RayTaskError) else seen
        if isinstance(inner, (InputError, StageError)):
            return inner
        if seen.__cause__ is None and not isinstance(seen, RayTaskError):
            break
        seen = seen.__cause__ or (inner if inner is not seen else None)
    root = seen if seen is not None else error
    return StageError(f"Encoding failed: {type(root).__name__}: {' '.join(str(root).split())[:500]}.")


class Unpacker:
    """Encoded rows back to examples; `encoded` and `truncated` count those that are not borrowed (None: the task does not say)."""

    encoded = 0
    truncated: int | None = None

    def unpack(self, encoded: bytes, *, borrowed: bool = False) -> list[Example]:
        """The examples of one row."""
        examples = pickle.loads(encoded)
        for example in examples:
            truncated = example.pop("truncated", None)
            if not borrowed:
                self.encoded += 1
                if truncated is not None:
                    self.truncated = (self.truncated or 0) + bool(truncated)
        return examples


class RankStream(Unpacker):
    """One worker's part of every global batch, over all epochs: the `loop.Stream` of distributed training.

    `total_steps` are the optimizer steps of the whole run: nothing beyond them is read.
    """

    def __init__(self, encoding: Encoding, *, total_steps: int, tasks: int = 1, cpus: float = 0, object_store: int = OBJECT_STORE):
        self.rows = sum(encoding.counts)
        self.steps_per_epoch = encoding.plan(0).steps
        self._encoding, self._total_steps = encoding, total_steps
        self._pipeline = functools.partial(pipeline, encoding, tasks=tasks, cpus=cpus, object_store=object_store)
        self._feed: Feed | None = None
        self._next: tuple[int, int] | None = None
        self._rows: Iterator[tuple[int, str, bytes]] = iter(())

    def begin(self, epoch: int, start: int) -> None:
        """Starts reading at a step, so that rows are there when `steps(epoch, start)` asks for them."""
        self.close()
        self._feed = Feed(self._pipeline(self._parts(epoch, start)), "the training data")
        self._rows = _rows(self._feed)
        self._next = (epoch, start)

    def steps(self, epoch: int, start: int) -> Iterator[Share]:
        """This worker's share of each step of `epoch` from `start` on."""
        from orchestrator.loop import Share

        if self._next != (epoch, start):
            self.begin(epoch, start)
        plan = self._encoding.plan(epoch)
        for step in range(start, self.steps_per_epoch):
            low, high, borrowed = plan.share(step, self._encoding.rank, self._encoding.world)
            row_ids: list[str] = []
            examples: list[Example] = []
            for expected in range(low, high):
                position, row_id, encoded = next(self._rows, (-1, "", b""))
                if position != expected:
                    raise StageError(
                        f"The stream lost its order: at step {step} of epoch {epoch} worker {self._encoding.rank} expected the row at position {expected} and got "
                        + (f"{row_id!r} at {position}." if position >= 0 else "the end of the data.")
                    )
                found = self.unpack(encoded, borrowed=borrowed)
                examples += found
                row_ids += [row_id] * len(found)
            self._next = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield Share(step=step, row_ids=row_ids, examples=examples, borrowed=borrowed)

    def close(self) -> None:
        if self._feed is not None:
            self._feed.close()
        self._feed, self._next, self._rows = None, None, iter(())

    def _parts(self, epoch: int, start: int) -> Iterator[Part]:
        """Files in the order of this and the epochs to come, up to the last step of the run."""
        batch = self._encoding.global_batch
        while epoch * self.steps_per_epoch < self._total_steps:
            plan = self._encoding.plan(epoch)
            stop = min(self.rows, (self._total_steps - epoch * self.steps_per_epoch) * batch)
            yield from (Part(epoch, file, start * batch, stop) for file in plan.files(start * batch, stop))
            epoch, start = epoch + 1, 0


def _rows(tables: Iterable[pa.Table]) -> Iterator[tuple[int, str, bytes]]:
    for table in tables:
        yield from zip(table["position"].to_pylist(), table["row_id"].to_pylist(), table["examples"].to_pylist(), strict=True)


class SplitRows:
    """One worker's rows of a split that is not trained on, encoded: every `world`-th row, in the order of the files.

    Iterating gives chunks of (position, row, examples). They are encoded once and kept where the split has at most
    `keep_rows` rows and their examples fit into `KEEP_BYTES`, else streamed again each time.
    """

    def __init__(self, encoding: Encoding, *, tasks: int = 1, cpus: float = 0, keep_rows: int = 200_000):
        self.rows = sum(encoding.counts)
        self._encoding, self._tasks, self._cpus = encoding, tasks, cpus
        self._keep = self.rows <= keep_rows
        self._kept: list[list[tuple[int, Row, list[Example]]]] | None = None

    def __iter__(self) -> Iterator[list[tuple[int, Row, list[Example]]]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[list[tuple[int, Row, list[Example]]]] = []
        size = 0
        parts = [Part(0, file, 0, self.rows) for file, count in enumerate(self._encoding.counts) if count]
        feed = Feed(
            pipeline(self._encoding, parts, tasks=self._tasks, cpus=self._cpus, object_store=OBJECT_STORE // 2, with_rows=True),
            "the validation data",
        )
        try:
            for table in feed:
                size += table.nbytes
                if self._keep and size > KEEP_BYTES:
                    self._keep, kept = False, []
                chunk = [
                    (position, pickle.loads(row), [_without_truncated(example) for example in pickle.loads(examples)])
                    for position, row, examples in zip(
                        table["position"].to_pylist(), table["row"].to_pylist(), table["examples"].to_pylist(), strict=True
                    )
                ]
                if self._keep:
                    kept.append(chunk)
                yield chunk
        finally:
            feed.close()
        if self._keep:
            self._kept = kept


def _without_truncated(example: Example) -> Example:
    example.pop("truncated", None)
    return example
