import random
from itertools import combinations, pairwise

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


def test_equal_lengths_fill_the_budget() -> None:
    assert len(micro_batches([24] * 32, 240)) == 4
    assert len(micro_batches([24] * 32, 768)) == 1


def test_a_pass_is_worth_its_padding() -> None:
    assert len(micro_batches([100, 10, 10, 10], 4096, pass_cost=128)) == 2
    assert len(micro_batches([100, 80, 80, 80], 4096, pass_cost=128)) == 1
    assert len(micro_batches([100, 10, 10, 10], 4096, pass_cost=4096)) == 1


def test_no_cut_of_the_order_is_cheaper() -> None:
    rng = random.Random(1)
    for _ in range(20):
        lengths = sorted((rng.randrange(1, 90) for _ in range(8)), reverse=True)

        def cost(groups: list[list[int]], lengths: list[int] = lengths) -> int:
            return sum(max(lengths[index] for index in group) * len(group) + 40 for group in groups)

        cuts = [[0, *places, 8] for count in range(8) for places in combinations(range(1, 8), count)]
        all_groups = [[list(range(low, high)) for low, high in pairwise(cut)] for cut in cuts]
        possible = [groups for groups in all_groups if all(lengths[group[0]] * len(group) <= 200 for group in groups)]
        assert cost(micro_batches(lengths, 200, pass_cost=40)) == min(map(cost, possible))


def test_an_example_longer_than_the_budget_is_alone() -> None:
    assert micro_batches([3, 50, 3], 10) == [[1], [0, 2]]


def test_empty_examples_and_no_examples() -> None:
    assert micro_batches([0, 0], 8) == [[0, 1]]
    assert micro_batches([], 8) == []
    with pytest.raises(ValueError, match="holds nothing"):
        micro_batches([1], 0)
