from collections import Counter

import numpy as np
import pytest

from orchestrator.data import quality, splits

TRAIN, VALIDATION, TEST = range(3)
HASHES = [7056027906363976363, 1853858741963213384]


def hashes(count: int, seed: int = 42) -> np.ndarray:
    return splits.hashes([f"a.csv:{number}" for number in range(count)], f"split {seed}")


def test_hashes_stay_the_same_and_differ_by_purpose() -> None:
    """Were they to change, the same seed would split otherwise than before."""
    assert splits.hashes(["a.csv:2", "é"], "split 42").tolist() == HASHES
    assert splits.hashes(["a.csv:2"], "order 42").tolist() != HASHES[:1]
    assert len(splits.hashes(["half \ud800"], "split 42")) == 1


@pytest.mark.parametrize("counts", [[700, 200, 100], [997, 3, 1], [33, 33, 34], [10], [5, 5, 5, 5, 5]])
@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.1), (0.25, 0.05), (0.0, 0.3), (0.15, 0.0)])
def test_shares_are_exact_and_strata_keep_theirs(counts: list[int], validation: float, test: float) -> None:
    strata = [f"class {place}" for place in range(len(counts))]
    codes = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    rows = hashes(len(codes))
    places = splits.cut(rows, codes, strata, validation=validation, test=test).assign(rows, codes, strata)
    total = len(codes)
    for place, share in ((VALIDATION, validation), (TEST, test)):
        wanted = max(1, round(share * total)) if share else 0
        assert int((places == place).sum()) == wanted
        for code, count in enumerate(counts):
            assert abs(int(((places == place) & (codes == code)).sum()) - share * count) <= 1
    assert all(((places == TRAIN) & (codes == code)).any() for code in range(len(counts)))


def test_a_class_of_one_row_is_for_training() -> None:
    codes = np.array([0] * 9 + [1], np.int32)
    for seed in range(20):
        rows = hashes(10, seed)
        places = splits.cut(rows, codes, ["many", "one"], validation=0.2, test=0.2).assign(rows, codes, ["many", "one"])
        assert places[9] == TRAIN
        assert Counter(places.tolist()) == {TRAIN: 6, VALIDATION: 2, TEST: 2}


def test_the_split_of_a_row_depends_on_seed_and_id_alone() -> None:
    rows, codes = hashes(1000), np.zeros(1000, np.int32)
    order = np.random.default_rng(0).permutation(1000)
    places = splits.cut(rows, codes, (None,), validation=0.1, test=0.1).assign(rows, codes, (None,))
    shuffled = splits.cut(rows[order], codes, (None,), validation=0.1, test=0.1).assign(rows[order], codes, (None,))
    assert (places[order] == shuffled).all()
    other = hashes(1000, seed=7)
    assert (places != splits.cut(other, codes, (None,), validation=0.1, test=0.1).assign(other, codes, (None,))).any()


def test_rows_can_be_assigned_piece_by_piece_with_other_codes() -> None:
    strata = ["a", None, "b"]
    codes = np.array([0, 1, 2] * 100, np.int32)
    rows = hashes(300)
    cuts = splits.cut(rows, codes, strata, validation=0.1, test=0.1)
    whole = cuts.assign(rows, codes, strata)
    piece = cuts.assign(rows[codes == 2], np.zeros(100, np.int32), ["b"])
    assert (piece == whole[codes == 2]).all()


def test_groups_never_cross() -> None:
    rng = np.random.default_rng(3)
    group = rng.integers(0, 200, 2000)
    rows = hashes(200)[group]
    codes = np.zeros(2000, np.int32)
    places = splits.cut_groups(rows, validation=0.1, test=0.2).assign(rows, codes, (None,))
    assert all(len(set(places[group == one])) == 1 for one in range(200))
    assert abs(int((places == TEST).sum()) - 400) <= 10
    assert abs(int((places == VALIDATION).sum()) - 200) <= 10


@pytest.mark.parametrize("count", [1, 2])
def test_few_groups_leave_one_to_train(count: int) -> None:
    rows = np.repeat(hashes(count), 5)
    places = splits.cut_groups(rows, validation=0.4, test=0.4).assign(rows, np.zeros(len(rows), np.int32), (None,))
    assert (places == TRAIN).any()


def test_apportion_adds_up_by_largest_remainders() -> None:
    counts = np.array([10, 25, 65])
    assert splits.apportion(counts, 0.1, counts).tolist() == [1, 3, 6]
    assert splits.apportion(counts, 0.1, np.array([0, 1, 65])).tolist() == [0, 1, 9]
    assert splits.apportion(np.array([3]), 0.01, np.array([2])).tolist() == [1]
    assert splits.apportion(np.array([2]), 0.01, np.array([1])).tolist() == [0]


# ---- quality -------------------------------------------------------------------------------------------------
def words(inputs: list[int], targets: list[int], places: list[int], *, own_files: bool = False, group: str | None = None) -> list[str]:
    return quality.duplicates(
        np.array(inputs, np.uint64), np.array(targets, np.uint64), np.array(places, np.int8),
        lambda row: f"a.csv:{row + 2}", ["review"], own_files=own_files, group=group,
    )  # fmt: skip


def test_rows_that_differ_give_no_sentence() -> None:
    assert words([1, 2, 3], [0, 0, 1], [0, 1, 2]) == []


def test_duplicates_leaks_and_contradictions_are_counted() -> None:
    said = words([5, 1, 5, 2, 1, 5], [0, 1, 0, 0, 0, 0], [0, 0, 2, 1, 1, 0])
    assert said == [
        "3 rows (50.0%) repeat the review of another row, for example a.csv:3 and a.csv:6.",
        "1 row of test has the same review as a training row, which makes test scores look better than they are: "
        "remove the duplicates, or set data.split.group: review so that equal rows stay together.",
        "1 row of validation has the same review as a training row, which makes validation scores look better than they are: "
        "remove the duplicates, or set data.split.group: review so that equal rows stay together.",
        "1 input has different labels in different rows, for example a.csv:3 and a.csv:6.",
    ]


def test_a_leak_between_files_is_put_right_in_the_files() -> None:
    assert words([1, 1], [0, 0], [0, 2], own_files=True)[1].endswith("remove them from the test rows.")


def test_classes_far_apart_small_or_absent_are_named() -> None:
    said = quality.balance(
        {"train": {"good": 500, "bad": 30, "odd": 4}, "validation": {"good": 50, "bad": 3, "odd": 1}, "test": {"good": 50}}
    )
    assert said == [
        "Classes are far apart: 500 rows of 'good' and 4 rows of 'odd' in train; accuracy says little then, look at F1 and at class weights.",
        "Classes with fewer than 10 training rows: 'odd' (4).",
        "No test row has 'bad', 'odd': test scores say nothing of it.",
    ]
    assert quality.balance({"train": {"good": 20, "bad": 10}, "validation": {}, "test": {}}) == []
