"""The pipeline that brings rows to workers: nothing lost, nothing twice, in the order that `Plan` says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import processors
from orchestrator.data.stream import Encoding, Feed, RankStream, SplitRows
from orchestrator.errors import StageError

BATCH = 16


def encoding(prepared: Any, model: str, rank: int, world: int, **options: Any) -> Encoding:
    settings = {"seed": 5, "global_batch": BATCH, "group_by_length": True, **options}
    return Encoding.of(prepared, "train", processors.load(model, "text"), rank=rank, world=world, **settings)


def read(
    prepared: Any, model: str, world: int, *, epoch: int = 0, start: int = 0, epochs: int = 1, **options: Any
) -> dict[tuple[int, int], list[str]]:
    """(epoch, step) -> row ids of the global batch, gathered from all ranks in rank order."""
    batches: dict[tuple[int, int], list[str]] = {}
    for rank in range(world):
        stream = RankStream(
            encoding(prepared, model, rank, world, **options),
            total_steps=10**6 if epochs > 1 else (epoch + 1) * -(-sum(f.rows for f in prepared.splits["train"].files) // BATCH),
        )
        for number in range(epoch, epoch + epochs):
            shares = list(stream.steps(number, start if number == epoch else 0))
            assert [share.step for share in shares] == list(range(start if number == epoch else 0, stream.steps_per_epoch))
            for share in shares:
                assert share.examples
                assert all(set(example) >= {"input_ids", "labels"} and "truncated" not in example for example in share.examples)
                batches.setdefault((number, share.step), []).extend([] if share.borrowed else share.row_ids)
        stream.close()
    return batches


def test_any_number_of_workers_sees_each_row_once_in_the_same_batches(
    ray_session: Any, prepare_reviews: Callable[..., Any], tiny_model: str
) -> None:
    prepared = prepare_reviews([90, 0, 41, 60])
    alone = read(prepared, tiny_model, 1, epochs=2)
    together = read(prepared, tiny_model, 3, epochs=2)
    assert alone == together
    everything = {f"train-{file}:{row}" for file, count in enumerate([90, 0, 41, 60]) for row in range(count)}
    for epoch in range(2):
        seen = [row for (number, _), rows in alone.items() if number == epoch for row in rows]
        assert len(seen) == len(everything)
        assert set(seen) == everything
    assert [alone[0, step] for step in range(11)] != [alone[1, step] for step in range(11)]


def test_another_number_of_workers_resumes_with_exactly_the_rest(
    ray_session: Any, prepare_reviews: Callable[..., Any], tiny_model: str
) -> None:
    prepared = prepare_reviews([90, 41, 60])
    whole = read(prepared, tiny_model, 2)
    assert read(prepared, tiny_model, 1, start=7) == {place: rows for place, rows in whole.items() if place[1] >= 7}


def test_a_short_last_step_lends_rows_to_idle_workers(ray_session: Any, prepare_reviews: Callable[..., Any], tiny_model: str) -> None:
    prepared = prepare_reviews([17])
    stream = RankStream(encoding(prepared, tiny_model, 0, 2), total_steps=2)
    first, last = list(stream.steps(0, 0))
    assert (len(first.row_ids), first.borrowed) == (8, False)
    shares = [next(iter(RankStream(encoding(prepared, tiny_model, rank, 2), total_steps=2).steps(0, 1))) for rank in range(2)]
    assert sorted(share.borrowed for share in shares) == [False, True]
    assert shares[0].row_ids == shares[1].row_ids == last.row_ids
    stream.close()


def test_examples_are_those_of_the_task_and_cut_ones_are_counted(
    ray_session: Any, prepare_reviews: Callable[..., Any], tiny_model: str
) -> None:
    prepared = prepare_reviews([40])
    short = prepared.model_copy(update={"task": prepared.task.model_copy(update={"max_length": 6})})
    stream = RankStream(encoding(short, tiny_model, 0, 1), total_steps=3)
    shares = list(stream.steps(0, 0))
    rows = {row["row_id"]: row for row in pq.read_table(Path(prepared.root) / "train/part-00000.parquet").to_pylist()}
    processor = processors.load(tiny_model, "text")
    expected = {row_id: short.task.encode([row], processor)[0][0] for row_id, row in rows.items()}
    assert stream.encoded == 40
    assert 0 < stream.truncated == sum(example.pop("truncated") for example in expected.values()) < 40
    for share in shares:
        assert share.examples == [expected[row_id] for row_id in share.row_ids]


def test_a_file_that_changed_after_prepare_is_named(ray_session: Any, prepare_reviews: Callable[..., Any], tiny_model: str) -> None:
    prepared = prepare_reviews([40])
    path = Path(prepared.root) / "train/part-00000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(StageError, match=r"part-00000\.parquet has 39 rows where 40 were prepared"):
        next(RankStream(encoding(prepared, tiny_model, 0, 1), total_steps=3).steps(0, 0))


def test_a_wait_for_rows_ends_with_a_sentence() -> None:
    def never() -> Any:
        import time

        time.sleep(1)
        yield pa.table({})

    with pytest.raises(StageError, match=r"No rows of the training data came from the encoding tasks for 0\.05 s"):
        next(iter(Feed(never(), "the training data", patience=0.05)))


def test_validation_rows_are_shared_out_and_read_again_from_memory(
    ray_session: Any, prepare_reviews: Callable[..., Any], tiny_model: str
) -> None:
    prepared = prepare_reviews([20], validation=31)
    seen: dict[int, str] = {}
    for rank in range(2):
        kept, streamed = (
            SplitRows(Encoding.of(prepared, "validation", processors.load(tiny_model, "text"), rank=rank, world=2), keep_rows=keep)
            for keep in (100, 5)
        )
        first = [(position, row["row_id"], examples) for chunk in kept for position, row, examples in chunk]
        assert first == [(position, row["row_id"], examples) for chunk in kept for position, row, examples in chunk]
        assert first == [(position, row["row_id"], examples) for chunk in streamed for position, row, examples in chunk]
        assert first == [(position, row["row_id"], examples) for chunk in streamed for position, row, examples in chunk]
        seen.update({position: row_id for position, row_id, _ in first})
    assert seen == {row: f"validation-0:{row}" for row in range(31)}
