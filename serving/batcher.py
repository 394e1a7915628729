"""The dynamic batcher of a replica: many requests go through the model together.

Three kinds of threads: the event loop admits requests and waits; a small pool tokenises and post-processes; one thread
runs the model and nothing else. A batch is cut whenever that thread is free: nothing ever waits for company.

A batch is led by the item whose turn it is and is filled with those nearest to it in length, as far as the token budget
and little padding allow. So a batch is of one length, and nothing starves, long or short: turns go round the waiting
requests, oldest first (start-time fair queueing, Goyal et al. 1996), so a request of a thousand rows doesn't hold up one of
a single row either. (The token budget without a waiting window is text-embeddings-inference's.)
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.tasks.base import Example, Prediction, Row, Task

PADDING_SHARE = 0.25
"""Padded tokens that a batch may have more than its items have, as a share of theirs …"""
PADDING_TOKENS = 32
"""… or as many as cost less than another pass through the model."""
SECONDS_PER_ROW = 0.05
"""What a row is taken to cost before any was measured."""


class Engine(Protocol):
    """What answers rows: `orchestrator.predictor.Predictor`. `encode` and `decode` may run while `infer` does."""

    task: Task

    def encode(self, rows: Sequence[Row]) -> list[list[Example]]: ...
    def infer(self, examples: Sequence[Example]) -> list[Any]: ...
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction: ...


class Overloaded(RuntimeError):
    """The queue is full; `retry_after_s` is when there will be room, from the measured drain rate."""

    def __init__(self, retry_after_s: float):
        super().__init__(f"the queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class Late(TimeoutError):
    """The deadline passed before the answer was there."""


class Closed(RuntimeError):
    """The batcher no longer takes requests."""


class BadItem(ValueError):
    """The row at `index` of the request cannot be answered; `__cause__` says why."""

    def __init__(self, index: int, stage: str):
        super().__init__(f"row {index} failed in {stage}")
        self.index, self.stage = index, stage


@dataclass
class Timings:
    """Seconds a request spent in each part."""

    tokenise: float = 0.0
    queue: float = 0.0
    inference: float = 0.0


@dataclass(frozen=True)
class Answer:
    predictions: list[Prediction]
    timings: Timings
    tokens: int
    """Tokens of the request's examples, unpadded."""


@dataclass(frozen=True)
class Batch:
    """One pass through the model, for the metrics."""

    examples: int
    tokens: int
    padded_tokens: int
    seconds: float


@dataclass(eq=False)
class _Job:
    """One request."""

    rows: Sequence[Row]
    future: asyncio.Future[list[Prediction]]
    loop: asyncio.AbstractEventLoop
    timings: Timings = field(default_factory=Timings)
    outputs: list[list[Any]] = field(default_factory=list)
    missing: int = 0
    tokens: int = 0
    ready: float = 0.0
    started: float = 0.0
    dead: bool = False
    """Nobody waits for it any more: nothing further is done for it."""


@dataclass(eq=False)
class _Item:
    """One example of a request."""

    job: _Job
    row: int
    part: int
    example: Example
    length: int


class Batcher:
    """`submit` answers rows. Use it from one event loop; `close` it when done."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch_tokens: int,
        max_queue: int,
        pool_threads: int = 2,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ):
        self.engine, self.max_batch_tokens, self.max_queue, self._on_batch = engine, max_batch_tokens, max_queue, on_batch
        self._queue = _Queue(max_batch_tokens)
        self._changed = threading.Condition()
        self._rows = 0
        self._closed = False
        self._seconds_per_row = SECONDS_PER_ROW
        self._running_since: float | None = None
        self._failures = 0
        self._pool = ThreadPoolExecutor(pool_threads, "tokenise")
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def queued_rows(self) -> int:
        """Rows admitted and not answered yet."""
        return self._rows

    @property
    def retry_after_s(self) -> float:
        """Seconds until the rows that are here now will be answered, at the measured rate; 1 to 60."""
        return min(60.0, max(1.0, math.ceil(self._rows * self._seconds_per_row)))

    async def submit(self, rows: Sequence[Row], *, timeout_s: float) -> Answer:
        """The predictions for clean rows, in their order.

        Raises `Overloaded`, `Late`, `BadItem` or `Closed`. A cancelled call costs nothing from then on.
        """
        if self._closed:
            raise Closed("the endpoint is shutting down")
        if self._rows and self._rows + len(rows) > self.max_queue:
            raise Overloaded(self.retry_after_s)
        loop = asyncio.get_running_loop()
        job = _Job(rows, loop.create_future(), loop)
        self._rows += len(rows)
        try:
            async with asyncio.timeout(timeout_s):
                self._pool.submit(self._encode, job)
                predictions = await job.future
        except TimeoutError:
            raise Late(f"no answer within {timeout_s:g} s") from None
        finally:
            self._rows -= len(rows)
            job.dead = True
            if not job.future.done() or job.future.cancelled():
                with self._changed:
                    self._queue.discard(job)
        return Answer(predictions, job.timings, job.tokens)

    async def check(self, rows: Sequence[Row], *, stuck_after_s: float) -> None:
        """Raises `RuntimeError` where the batcher does not work: dead, stuck, or failing every batch.

        While requests go through it those are the probe; when it is idle, `rows` are sent through.
        """
        if self._closed:
            raise RuntimeError("the endpoint is shutting down")
        if not self._thread.is_alive():
            raise RuntimeError("the inference thread has died")
        since = self._running_since
        if since is not None and time.monotonic() - since > stuck_after_s:
            raise RuntimeError(f"one batch has been in the model for {time.monotonic() - since:.0f} s")
        if self._failures >= 3:
            raise RuntimeError(f"the last {self._failures} batches failed")
        if self._rows == 0:
            try:
                await self.submit(rows, timeout_s=stuck_after_s)
            except (Late, BadItem) as error:
                raise RuntimeError(f"a probe sent through the model failed: {error}") from error

    def close(self) -> None:
        """Takes no more requests; those waiting are dropped, and the threads end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- in the pool -----------------------------------------------------------------------------------------
    def _encode(self, job: _Job) -> None:
        if job.dead:
            return
        started = time.perf_counter()
        try:
            encoded = self.engine.encode(job.rows)
        except Exception:  # noqa: BLE001 - whatever the rows of one request raise is that request's answer
            error = self._guilty_row(job.rows)
            self._fail([job], error)
            return
        job.timings.tokenise = time.perf_counter() - started
        items = [
            _Item(job, row, part, example, self.engine.task.length(example))
            for row, examples in enumerate(encoded)
            for part, example in enumerate(examples)
        ]
        job.outputs = [[None] * len(examples) for examples in encoded]
        job.missing, job.tokens, job.ready = len(items), sum(item.length for item in items), time.perf_counter()
        if not items:
            self._finish([job])
            return
        with self._changed:
            if self._closed:
                self._fail([job], Closed("the endpoint is shutting down"))
            elif not job.dead:
                self._queue.add(items)
                self._changed.notify()

    def _guilty_row(self, rows: Sequence[Row]) -> BadItem:
        for index, row in enumerate(rows):
            try:
                self.engine.encode([row])
            except Exception as cause:  # noqa: BLE001 - see above
                error = BadItem(index, "tokenising")
                error.__cause__ = cause
                return error
        return BadItem(0, "tokenising")

    def _finish(self, jobs: list[_Job]) -> None:
        done: list[tuple[_Job, list[Prediction] | BaseException]] = []
        for job in jobs:
            if job.dead:
                continue
            predictions: list[Prediction] = []
            try:
                for row, outputs in zip(job.rows, job.outputs, strict=True):
                    predictions.append(self.engine.decode(row, outputs))
                done.append((job, predictions))
            except Exception as cause:  # noqa: BLE001 - see above
                error = BadItem(len(predictions), "post-processing")
                error.__cause__ = cause
                done.append((job, error))
        _settle(done)

    def _fail(self, jobs: Sequence[_Job], error: BaseException) -> None:
        _settle([(job, error) for job in jobs])

    # ---- in the inference thread -----------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    waiting = {item.job for item in self._queue.drain()}
                    break
                items = self._queue.cut()
            self._infer(items)
        self._fail(list(waiting), Closed("the endpoint is shutting down"))

    def _infer(self, items: list[_Item]) -> None:
        started = time.perf_counter()
        for job in {item.job for item in items}:
            if not job.started:
                job.started = started
                job.timings.queue = started - job.ready
        self._running_since = time.monotonic()
        bad: list[tuple[_Job, list[Prediction] | BaseException]] = []
        good = self._isolate(items, bad)
        self._running_since = None
        seconds = time.perf_counter() - started
        self._failures = 0 if good else self._failures + bool(bad)  # neither: nobody waits any more
        _settle(bad)  # after it was counted, so that who hears of it can ask whether it was the third
        if not good:
            return
        rows = sum(1 for item in good if item.part == 0)
        if rows:
            self._seconds_per_row += 0.2 * (seconds / rows - self._seconds_per_row)
        padded = len(items) * max(item.length for item in items)
        self._on_batch(Batch(len(items), sum(item.length for item in items), padded, seconds))
        finished = []
        for item in good:
            item.job.missing -= 1
            if item.job.missing == 0:
                item.job.timings.inference = time.perf_counter() - item.job.started
                finished.append(item.job)
        if not finished:
            return
        if self._closed or not self._queue:  # Nothing waits for the model, so a hop to the pool would only cost time.
            self._finish(finished)
        else:
            self._pool.submit(self._finish, finished)

    def _isolate(self, items: list[_Item], bad: list[tuple[_Job, list[Prediction] | BaseException]]) -> list[_Item]:
        """Runs the items; where they fail together, in halves, so that only the bad ones fail: these go to `bad`. Returns the others."""
        items = [item for item in items if not item.job.dead]
        if not items:
            return []
        try:
            outputs = self.engine.infer([item.example for item in items])
        except Exception as cause:  # noqa: BLE001 - a bad item must not take the thread, nor its neighbours, with it
            if len(items) > 1:
                half = len(items) // 2
                return self._isolate(items[:half], bad) + self._isolate(items[half:], bad)
            error = BadItem(items[0].row, "inference")
            error.__cause__ = cause
            items[0].job.dead = True
            bad.append((items[0].job, error))
            with self._changed:
                self._queue.discard(items[0].job)
            return []
        for item, output in zip(items, outputs, strict=True):
            item.job.outputs[item.row][item.part] = output
        return items


def _settle(done: Sequence[tuple[_Job, list[Prediction] | BaseException]]) -> None:
    """Wakes those who wait, once for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, list[Prediction] | BaseException]]] = {}
    for job, result in done:
        job.dead = isinstance(result, BaseException) or job.dead
        by_loop.setdefault(job.loop, []).append((job, result))
    for loop, settled in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_set, settled)


def _set(settled: Sequence[tuple[_Job, list[Prediction] | BaseException]]) -> None:
    for job, result in settled:
        if not job.future.done():
            if isinstance(result, BaseException):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)


class _Queue:
    """Items by turn and by length at once. Not safe by itself: its owner holds a lock."""

    def __init__(self, max_tokens: int):
        self._max_tokens = max_tokens
        self._items: dict[int, _Item] = {}
        self._by_turn: list[tuple[int, int]] = []
        """Heap of (turn, number); numbers no longer in `_items` are gone."""
        self._by_length: list[tuple[int, int]] = []
        """Sorted (length, number)."""
        self._number = self._turn = 0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, items: Sequence[_Item]) -> None:
        """Queues the items of one request: the first takes the next turn, each further one the turn after."""
        for later, item in enumerate(items, 1):
            self._number += 1
            self._items[self._number] = item
            heapq.heappush(self._by_turn, (self._turn + later, self._number))
            bisect.insort(self._by_length, (item.length, self._number))

    def drain(self) -> list[_Item]:
        items = list(self._items.values())
        self._items, self._by_turn, self._by_length = {}, [], []
        return items

    def discard(self, job: _Job) -> None:
        gone = {number for number, item in self._items.items() if item.job is job}
        if gone:
            for number in gone:
                del self._items[number]
            self._by_length = [place for place in self._by_length if place[1] not in gone]
            self._by_turn = [place for place in self._by_turn if place[1] in self._items]
            heapq.heapify(self._by_turn)

    def cut(self) -> list[_Item]:
        """Takes out a batch: the item whose turn it is and its nearest neighbours in length."""
        turn, number = heapq.heappop(self._by_turn)
        while number not in self._items:
            turn, number = heapq.heappop(self._by_turn)
        self._turn = turn
        length = self._items[number].length
        low = high = bisect.bisect_left(self._by_length, (length, number))
        tokens = longest = length
        while True:
            shorter = self._by_length[low - 1][0] if low > 0 else None
            longer = self._by_length[high + 1][0] if high + 1 < len(self._by_length) else None
            if longer is not None and (shorter is None or longer - longest <= length - shorter):
                candidate, low_then, high_then = longer, low, high + 1
            elif shorter is not None:
                candidate, low_then, high_then = shorter, low - 1, high
            else:
                break
            padded = (high_then - low_then + 1) * max(longest, candidate)
            padding = padded - tokens - candidate
            if padded > self._max_tokens or padding > max(PADDING_TOKENS, PADDING_SHARE * (tokens + candidate)):
                break
            tokens, longest, low, high = tokens + candidate, max(longest, candidate), low_then, high_then
        places = self._by_length[low : high + 1]
        del self._by_length[low : high + 1]
        return [self._items.pop(number) for _, number in places]
