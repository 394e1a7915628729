"""Bootstrap intervals: what they are of known scores, and that two models are compared on the same draws."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.search.comparison import compare
from orchestrator.tasks import create


def predictions(place: Path, right: list[bool], *, order: random.Random | None = None) -> str:
    """A file of predictions in which those that are `right` are."""
    lines = []
    for number, is_right in enumerate(right):
        label = "good" if number % 2 else "bad"
        said = label if is_right else {"good": "bad", "bad": "good"}[label]
        answer = {"label": said, "scores": {"good": float(said == "good"), "bad": float(said == "bad")}}
        lines.append({"row_id": f"r{number}", "text": "t", "label": label, "prediction": json.dumps(answer)})
    if order is not None:
        order.shuffle(lines)
    pq.write_table(pa.Table.from_pylist(lines), place)
    return str(place)


@pytest.fixture
def task():
    return create({"name": "text-classification", "labels": ["bad", "good"]})


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution(task, tmp_path: Path) -> None:
    found = compare(task, "accuracy", "test", predictions(tmp_path / "a.parquet", [n % 5 > 0 for n in range(400)]))
    assert (found.score, found.rows, found.split) == (0.8, 400, "test")
    assert found.low == pytest.approx(0.8 - 1.96 * (0.8 * 0.2 / 400) ** 0.5, abs=0.008)
    assert found.high == pytest.approx(0.8 + 1.96 * (0.8 * 0.2 / 400) ** 0.5, abs=0.008)
    assert found.default is None
    assert found == compare(task, "accuracy", "test", predictions(tmp_path / "a.parquet", [n % 5 > 0 for n in range(400)]))  # seeded


def test_a_difference_is_taken_on_the_same_rows(task, tmp_path: Path) -> None:
    better = predictions(tmp_path / "a.parquet", [n % 5 > 0 for n in range(400)])
    # Wrong on the same rows and on twelve more, in another order: hard rows cancel out, so the interval is far narrower than the scores'.
    worse = predictions(tmp_path / "b.parquet", [n % 5 > 0 and n % 32 != 1 for n in range(400)], order=random.Random(0))
    found = compare(task, "accuracy", "test", better, worse)
    assert found.default is not None
    assert found.difference == pytest.approx(0.8 - found.default)
    assert found.difference_low is not None
    assert found.difference_high is not None
    assert 0 < found.difference_low < found.difference < found.difference_high < 0.05
    assert "default setting" in found.sentence()
