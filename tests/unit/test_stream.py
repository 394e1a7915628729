"""Where the rows of an epoch go: the same for any number of workers, every row once."""

import numpy as np
import pytest

from orchestrator.data.stream import WINDOW, Plan, lanes

COUNTS = (103, 64, 0, 7, 250)


def everything(plan: Plan, lengths: dict[int, np.ndarray]) -> dict[int, tuple[int, int]]:
    """Position -> (file, row) over the whole epoch."""
    places = [
        (int(position), (file, row)) for file in range(len(plan.counts)) for row, position in enumerate(plan.positions(file, lengths[file]))
    ]
    assert len(dict(places)) == len(places)
    return dict(places)


def lengths_of(counts: tuple[int, ...]) -> dict[int, np.ndarray]:
    return {file: np.random.default_rng(file).integers(1, 300, count) for file, count in enumerate(counts)}


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("batch", [1, 7, 32, 1000])
def test_every_row_has_one_place(grouped: bool, batch: int) -> None:
    plan = Plan(COUNTS, seed=3, epoch=1, global_batch=batch, group_by_length=grouped)
    places = everything(plan, lengths_of(COUNTS))
    assert sorted(places) == list(range(sum(COUNTS)))
    assert sorted(places.values()) == [(file, row) for file, count in enumerate(COUNTS) for row in range(count)]
    assert plan.steps == -(-sum(COUNTS) // batch)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = lengths_of(COUNTS)
    first = everything(Plan(COUNTS, 3, 1, 32, True), lengths)
    assert everything(Plan(COUNTS, 3, 1, 32, True), lengths) == first
    assert everything(Plan(COUNTS, 3, 2, 32, True), lengths) != first
    assert everything(Plan(COUNTS, 4, 1, 32, True), lengths) != first


@pytest.mark.parametrize("world", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("batch", [32, 50])
def test_workers_share_every_step_evenly_and_borrow_only_where_none_is_left(world: int, batch: int) -> None:
    plan = Plan(COUNTS, 0, 0, batch)
    for step in range(plan.steps):
        rows = min(batch, plan.rows - step * batch)
        shares = [plan.share(step, rank, world) for rank in range(world)]
        own = [position for low, high, borrowed in shares if not borrowed for position in range(low, high)]
        assert own == list(range(step * batch, step * batch + rows))
        sizes = [high - low for low, high, borrowed in shares]
        assert all(size >= 1 for size in sizes)
        assert max(sizes) - min(sizes) <= 1
        assert sum(borrowed for *_, borrowed in shares) == max(0, world - rows)


@pytest.mark.parametrize("world", [1, 2, 3, 40])
def test_what_a_worker_reads_is_what_its_shares_are(world: int) -> None:
    plan = Plan(COUNTS, 0, 0, 32)
    positions = np.random.default_rng(0).permutation(plan.rows)
    for rank in range(world):
        shares = [plan.share(step, rank, world) for step in range(plan.steps)]
        assert sorted(positions[plan.mine(positions, rank, world)]) == [
            position for low, high, _ in shares for position in range(low, high)
        ]


def test_grouping_puts_like_lengths_into_a_batch_and_keeps_batches_apart() -> None:
    counts = (32 * WINDOW * 2,)
    lengths = lengths_of(counts)
    plain, grouped = Plan(counts, 1, 0, 32), Plan(counts, 1, 0, 32, True)

    def batches(plan: Plan) -> np.ndarray:
        in_order = np.empty(counts[0])
        in_order[plan.positions(0, lengths[0])] = lengths[0]
        return in_order.reshape(-1, 32)

    assert np.ptp(batches(grouped), axis=1).mean() < np.ptp(batches(plain), axis=1).mean() / 10
    means = batches(grouped).mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5  # neighbours in time are not neighbours in length
    halves = batches(grouped).reshape(-1, 2, 16).sum(axis=2)
    assert (np.abs(halves[:, 0] - halves[:, 1]) <= np.ptp(batches(grouped), axis=1)).all()  # two workers, alike loads


def test_grouping_needs_lengths() -> None:
    with pytest.raises(ValueError, match="each of the 103 rows of file 0"):
        Plan(COUNTS, 0, 0, 32, True).positions(0)


def test_files_before_the_start_and_after_the_stop_are_not_read() -> None:
    plan = Plan(COUNTS, 1, 0, 32)
    assert plan.files(0, plan.rows) == [file for file in plan.order if COUNTS[file]]
    first = plan.files(0, plan.rows)[0]
    assert plan.files(COUNTS[first], plan.rows) == plan.files(0, plan.rows)[1:]
    assert plan.files(0, 1) == [first]
    assert plan.files(0, 0) == []


@pytest.mark.parametrize(
    ("cluster", "worker", "world", "expected"),
    [(2, 1, 2, (1, 0)), (8, 1, 2, (1, 1)), (64, 1, 2, (8, 1)), (2, 3, 1, (1, 0)), (4, 1, 2, (1, 0))],
)
def test_encoding_takes_cpus_only_where_all_its_tasks_have_one(
    cluster: float, worker: float, world: int, expected: tuple[int, int]
) -> None:
    assert lanes(cluster, worker, world) == expected
