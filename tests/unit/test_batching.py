import random

import pytest

from orchestrator.batching import micro_batches


@pytest.mark.parametrize("tokens", [1, 16, 100, 4096])
def test_every_index_stands_once_and_no_group_exceeds_the_budget(tokens: int) -> None:
    rng = random.Random(tokens)
    lengths = [rng.randrange(1, 60) for _ in range(200)]
    groups = micro_batches(lengths, tokens)
    assert sorted(index for group in groups for index in group) == list(range(200))
    for group in groups:
        assert len(group) == 1 or max(lengths[index] for index in group) * len(group) <= tokens


def test_similar_lengths_go_together() -> None:
    assert micro_batches([5, 1, 5, 1, 1], 10) == [[0, 2], [1, 3, 4]]


def test_an_example_longer_than_the_budget_is_alone() -> None:
    assert micro_batches([3, 50, 3], 10) == [[1], [0, 2]]


def test_empty_examples_and_no_examples() -> None:
    assert micro_batches([0, 0], 8) == [[0, 1]]
    assert micro_batches([], 8) == []
    with pytest.raises(ValueError, match="holds nothing"):
        micro_batches([1], 0)
