import math

import pytest

from orchestrator.tasks import rankings


def test_labels_are_ranked_and_cut():
    assert rankings.scored_labels({"a": 0.2, "b": 0.5, "c": 0.3}, 2) == [{"label": "b", "score": 0.5}, {"label": "c", "score": 0.3}]
    assert len(rankings.scored_labels({"a": 0.2, "b": 0.8}, None)) == 2


def test_a_label_that_fell_below_the_cut_is_as_far_as_the_last_one_above_it():
    one = rankings.scored_labels({"a": 0.6, "b": 0.21, "c": 0.19}, 2)
    other = rankings.scored_labels({"a": 0.6, "b": 0.19, "c": 0.2}, 2)
    assert rankings.labels_difference(one, other) == pytest.approx(0.01)
    assert rankings.labels_difference([one, one], [one, other]) == pytest.approx(0.01)
    assert rankings.labels_difference([one], [one, other]) == math.inf
