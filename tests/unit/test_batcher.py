"""The batcher with an engine that counts instead of computing; `gate` holds the inference thread where a test needs it."""

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from orchestrator.tasks.base import Task
from serving.batcher import Answer, BadItem, Batch, Batcher, Closed, Late, Overloaded


class Words(Task):
    """An example is the list of a text's words, its output their number."""

    def length(self, example: dict[str, Any]) -> int:
        return len(example["words"])


class Engine:
    def __init__(self) -> None:
        self.task = Words()
        self.batches: list[list[list[str]]] = []
        self.encoded: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()
        self.threads: set[str] = set()

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        if any(row["text"] == "no tokens" for row in rows):
            raise ValueError("can't be tokenised")
        self.encoded += [row["text"] for row in rows]
        return [[{"words": part.split()} for part in row["text"].split("|") if part] for row in rows]

    def infer(self, examples: Sequence[dict[str, Any]]) -> list[int]:
        self.threads.add(threading.current_thread().name)
        self.inside.set()
        assert self.gate.wait(10)
        self.batches.append([example["words"] for example in examples])
        if any("poison" in example["words"] for example in examples):
            raise RuntimeError("the model fell over")
        return [len(example["words"]) for example in examples]

    def decode(self, row: dict[str, Any], outputs: Sequence[int]) -> dict[str, Any]:
        if row["text"] == "no answer":
            raise ValueError("can't be decoded")
        return {"text": row["text"], "words": sum(outputs), "parts": len(outputs)}


def rows(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def text(words: int, name: str = "w") -> str:
    return " ".join([name] * words)


@contextmanager
def batcher(engine: Engine, **options: Any):
    made = Batcher(engine, **{"max_batch_tokens": 1000, "max_queue": 1000, **options})
    try:
        yield made
    finally:
        engine.gate.set()
        made.close()


def run(body: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def within() -> Any:
        async with asyncio.timeout(20):
            return await body()

    return asyncio.run(within())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def busy(engine: Engine, made: Batcher) -> "asyncio.Task[Answer]":
    """Puts one request into the model and keeps it there until the gate opens."""
    engine.gate.clear()
    engine.inside.clear()
    blocker = asyncio.create_task(made.submit(rows("blocker"), timeout_s=10))
    await until(engine.inside.is_set)
    return blocker


def test_answers_come_in_the_order_of_the_rows_whatever_the_batches() -> None:
    engine = Engine()
    rng = random.Random(0)
    requests = [[text(rng.randint(1, 60), f"r{number}") for _ in range(rng.randint(1, 9))] for number in range(80)]

    async def body() -> list[Answer]:
        with batcher(engine, max_batch_tokens=200) as made:
            return await asyncio.gather(*[made.submit(rows(*request), timeout_s=10) for request in requests])

    answers = run(body)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.predictions == [{"text": item, "words": len(item.split()), "parts": 1} for item in request]
        assert answer.tokens == sum(len(item.split()) for item in request)
    assert engine.threads == {"inference"}


def test_a_row_of_several_examples_is_put_together_and_one_of_none_is_answered() -> None:
    engine = Engine()

    async def body() -> Answer:
        with batcher(engine, max_batch_tokens=2) as made:
            return await made.submit(rows("a|b b|c", ""), timeout_s=10)

    assert run(body).predictions == [{"text": "a|b b|c", "words": 4, "parts": 3}, {"text": "", "words": 0, "parts": 0}]


def test_a_lone_request_does_not_wait_for_company() -> None:
    engine = Engine()

    async def body() -> None:
        with batcher(engine) as made:
            for _ in range(3):
                await made.submit(rows("one"), timeout_s=10)

    run(body)
    assert [len(batch) for batch in engine.batches] == [1, 1, 1]


def test_waiting_requests_go_through_together_within_the_padded_token_budget() -> None:
    engine = Engine()

    async def body() -> None:
        with batcher(engine, max_batch_tokens=100) as made:
            blocker = await busy(engine, made)
            waiting = [asyncio.create_task(made.submit(rows(text(length)), timeout_s=10)) for length in [10] * 25]
            await until(lambda: len(made._queue) == 25)
            engine.gate.set()
            await asyncio.gather(blocker, *waiting)

    run(body)
    assert [len(batch) for batch in engine.batches] == [1, 10, 10, 5]


def test_batches_hold_items_of_like_length() -> None:
    engine = Engine()
    lengths = [3, 100, 4, 99, 3, 101, 4, 98]

    async def body() -> None:
        with batcher(engine) as made:
            blocker = await busy(engine, made)
            waiting = [asyncio.create_task(made.submit(rows(text(length)), timeout_s=10)) for length in lengths]
            await until(lambda: len(made._queue) == len(lengths))
            engine.gate.set()
            await asyncio.gather(blocker, *waiting)

    run(body)
    assert [sorted(len(words) for words in batch) for batch in engine.batches[1:]] == [[3, 3, 4, 4], [98, 99, 100, 101]]


def test_one_longer_than_the_budget_goes_alone() -> None:
    engine = Engine()

    async def body() -> Answer:
        with batcher(engine, max_batch_tokens=10) as made:
            return await made.submit(rows(text(50), text(50)), timeout_s=10)

    assert [prediction["words"] for prediction in run(body).predictions] == [50, 50]
    assert [len(batch) for batch in engine.batches] == [1, 1]


def test_a_long_text_does_not_starve_behind_short_ones() -> None:
    engine = Engine()

    async def body() -> int:
        with batcher(engine, max_batch_tokens=20) as made:
            blocker = await busy(engine, made)
            first = asyncio.create_task(made.submit(rows(text(2)), timeout_s=10))
            await until(lambda: len(made._queue) == 1)
            long = asyncio.create_task(made.submit(rows(text(500)), timeout_s=10))
            await until(lambda: len(made._queue) == 2)
            shorts = [asyncio.create_task(made.submit(rows(text(2)), timeout_s=10)) for _ in range(100)]
            await until(lambda: len(made._queue) == 102)
            engine.gate.set()
            await asyncio.gather(blocker, first, long, *shorts)
        return next(place for place, batch in enumerate(engine.batches) if len(batch[0]) == 500)

    assert run(body) == 2  # after the blocker and the one batch led by an older request


def test_a_large_request_does_not_hold_up_a_small_one() -> None:
    engine = Engine()
    done: list[str] = []

    async def body() -> None:
        with batcher(engine, max_batch_tokens=10) as made:
            blocker = await busy(engine, made)

            async def ask(name: str, *texts: str) -> None:
                await made.submit(rows(*texts), timeout_s=10)
                done.append(name)

            large = asyncio.create_task(ask("large", *[text(10)] * 200))
            await until(lambda: len(made._queue) == 200)
            small = asyncio.create_task(ask("small", text(3)))
            await until(lambda: len(made._queue) == 201)
            engine.gate.set()
            await asyncio.gather(blocker, large, small)

    run(body)
    assert done == ["small", "large"]
    assert len(engine.batches[2][0]) == 3 or len(engine.batches[1][0]) == 3


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    engine = Engine()

    async def body() -> tuple[float, float]:
        with batcher(engine, max_queue=10) as made:
            blocker = await busy(engine, made)
            waiting = asyncio.create_task(made.submit(rows(*[text(1)] * 9), timeout_s=10))
            await until(lambda: made.queued_rows == 10)
            with pytest.raises(Overloaded) as refused:
                await made.submit(rows("one"), timeout_s=10)
            made._seconds_per_row = 2.0
            with pytest.raises(Overloaded) as slow:
                await made.submit(rows("one"), timeout_s=10)
            engine.gate.set()
            await asyncio.gather(blocker, waiting)
            await made.submit(rows("one"), timeout_s=10)  # there is room again
            return refused.value.retry_after_s, slow.value.retry_after_s

    assert run(body) == (1.0, 20.0)


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    async def body() -> Answer:
        with batcher(Engine(), max_queue=10) as made:
            return await made.submit(rows(*[text(1)] * 50), timeout_s=10)

    assert len(run(body).predictions) == 50


def test_late_and_cancelled_requests_cost_nothing_more() -> None:
    engine = Engine()

    async def body() -> None:
        with batcher(engine) as made:
            blocker = await busy(engine, made)
            gone = asyncio.create_task(made.submit(rows("gone"), timeout_s=10))
            await until(lambda: len(made._queue) == 1)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            with pytest.raises(Late, match=r"0\.01 s"):
                await made.submit(rows("late"), timeout_s=0.01)
            assert len(made._queue) == 0
            assert made.queued_rows == 1
            engine.gate.set()
            await blocker
            await made.submit(rows("next"), timeout_s=10)

    run(body)
    assert [batch[0] for batch in engine.batches] == [["blocker"], ["next"]]


def test_a_request_cancelled_before_it_is_tokenised_is_not() -> None:
    engine = Engine()
    hold = threading.Event()

    async def body() -> None:
        with batcher(engine, pool_threads=1) as made:
            made._pool.submit(hold.wait, 10)
            gone = asyncio.create_task(made.submit(rows("gone"), timeout_s=10))
            await asyncio.sleep(0)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            hold.set()
            await made.submit(rows("next"), timeout_s=10)

    run(body)
    assert engine.encoded == ["next"]


@pytest.mark.parametrize(("bad", "stage"), [("poison", "inference"), ("no tokens", "tokenising"), ("no answer", "post-processing")])
def test_a_bad_row_fails_its_own_request_only(bad: str, stage: str) -> None:
    engine = Engine()

    async def body() -> list[Any]:
        with batcher(engine) as made:
            blocker = await busy(engine, made)
            requests = [rows("fine"), rows("good", bad), rows("also fine"), rows("quite good", "good")]
            waiting = [asyncio.create_task(made.submit(request, timeout_s=10)) for request in requests]
            await until(lambda: len(made._queue) == (4 if bad == "no tokens" else 6))
            engine.gate.set()
            await blocker
            return await asyncio.gather(*waiting, return_exceptions=True)

    fine, guilty, also, two = run(body)
    assert [prediction["text"] for answer in (fine, also, two) for prediction in answer.predictions] == [
        "fine",
        "also fine",
        "quite good",
        "good",
    ]
    assert isinstance(guilty, BadItem)
    assert (guilty.index, guilty.stage) == (1, stage)
    assert guilty.__cause__ is not None


def test_the_probe_goes_through_the_model_when_idle_and_tells_what_is_wrong() -> None:
    engine = Engine()

    async def body() -> None:
        with batcher(engine) as made:
            await made.check(rows("probe"), stuck_after_s=5)
            assert engine.batches == [[["probe"]]]
            blocker = await busy(engine, made)
            await made.check(rows("probe"), stuck_after_s=5)  # busy is not stuck
            with pytest.raises(RuntimeError, match="one batch has been in the model"):
                await made.check(rows("probe"), stuck_after_s=0)
            engine.gate.set()
            await blocker
            with pytest.raises(RuntimeError, match="a probe sent through the model failed"):
                await made.check(rows("poison"), stuck_after_s=5)
            for _ in range(2):
                with pytest.raises(BadItem):
                    await made.submit(rows("poison"), timeout_s=5)
            with pytest.raises(RuntimeError, match="the last 3 batches failed"):
                await made.check(rows("probe"), stuck_after_s=5)
            await made.submit(rows("fine"), timeout_s=5)
            await made.check(rows("probe"), stuck_after_s=5)

    run(body)


def test_closing_drops_those_who_wait_and_refuses_others() -> None:
    engine = Engine()

    async def body() -> None:
        made = Batcher(engine, max_batch_tokens=1, max_queue=100)
        blocker = await busy(engine, made)
        waiting = asyncio.create_task(made.submit(rows("waiting"), timeout_s=10))
        await until(lambda: len(made._queue) == 1)
        closing = asyncio.create_task(asyncio.to_thread(made.close))
        await until(lambda: made._closed)
        engine.gate.set()
        await closing
        assert (await blocker).predictions[0]["text"] == "blocker"
        with pytest.raises(Closed):
            await waiting
        with pytest.raises(Closed):
            await made.submit(rows("more"), timeout_s=10)
        with pytest.raises(RuntimeError, match="shutting down"):
            await made.check(rows("probe"), stuck_after_s=5)

    run(body)
    assert not any(thread.name == "inference" for thread in threading.enumerate())


def test_batches_are_reported_with_their_padding() -> None:
    engine = Engine()
    seen: list[Batch] = []

    async def body() -> None:
        with batcher(engine, on_batch=seen.append) as made:
            await made.submit(rows(text(4), text(5), text(5)), timeout_s=10)

    run(body)
    assert [(batch.examples, batch.tokens, batch.padded_tokens) for batch in seen] == [(3, 14, 15)]
    assert seen[0].seconds > 0
