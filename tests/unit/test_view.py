"""What a person sees of a sweep while it runs."""

import io
import re

import pytest

from orchestrator.progress import Plain, Silent
from orchestrator.records import TrialRecord
from orchestrator.search.view import ROWS, SweepView, say_value, short_names
from orchestrator.terminal import Terminal

LR, LORA = "training.learning_rate", "model.lora"


class Clock:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Recorder(Silent):
    """Keeps what it was told."""

    def __init__(self):
        self.news, self.warnings, self.tables, self.moving = [], [], [], {}

    def warn(self, sentence):
        self.warnings.append(sentence)

    def step(self, done, total, unit="steps", *, left=None, **fields):
        self.moving = {"done": done, "total": total, "unit": unit, "left": left, **fields}

    def table(self, columns, rows, news=()):
        self.tables.append((list(columns), [(list(cells), style) for cells, style in rows]))
        self.news += news

    @property
    def rows(self) -> dict[str, tuple[list[str], str]]:
        """Trial -> its cells after the number, and its style, of the last table."""
        return {cells[0]: (cells[1:], style) for cells, style in self.tables[-1][1]}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shown() -> Recorder:
    return Recorder()


def view(display, clock, objectives=(("f1", True),), **options) -> SweepView:
    return SweepView(display, objectives=objectives, paths=[LR, LORA], **{"num_trials": 6, "examples": 900, **options}, clock=clock)


def trial(number: int, status="running", scores=(), **fields) -> TrialRecord:
    reports = tuple(
        {"f1": score, "loss": 1 - score, "epoch": float(place), "step": 10 * place, "examples": 300 * place}
        for place, score in enumerate(scores, 1)
    )
    given = {
        "id": f"t{number}",
        "number": number,
        "sample": {LR: number * 1e-4 or 5e-5, LORA: {"r": 4} if number % 2 else None},
        "status": status,
        "reports": reports,
        "best": max(reports, key=lambda report: report["f1"], default=None),
        "examples": reports[-1]["examples"] if reports else 0,
    }
    return TrialRecord(**given | fields)


def test_the_table_shows_what_each_trial_does_and_marks_the_best(shown, clock):
    seen = view(shown, clock)
    seen.started(trial(0, origin="default"))
    seen.started(trial(1))
    clock.now += 5
    seen.reported(trial(1, scores=[0.7]), trial(1, scores=[0.7]).reports[-1])
    assert shown.tables[-1][0] == ["trial", "state", "rung", "f1", "epoch", "time", "learning_rate", "lora"]
    assert shown.rows == {
        "1": (["running", "0", "0.7", "1", "5.0 s", "1e-4", "r=4"], "bold green"),
        "0": (["starts", "0", "", "", "5.0 s", "5e-5", "none"], ""),
    }
    seen.ended(trial(1, "stopped", [0.7, 0.9, 0.8], rung=1, seconds=42.0))
    seen.ended(trial(0, "done", [0.85], seconds=50.0))
    assert shown.rows["1"] == (["stopped", "1", "0.9", "3", "42 s", "1e-4", "r=4"], "bold green")
    assert shown.rows["0"][1] == "dim"
    assert shown.moving["done"] == 2 and shown.moving["total"] == 6 and shown.moving["unit"] == "trials"
    assert shown.moving["best"] == "best f1 0.9 (trial 1)"


def test_news_are_each_new_best_and_each_end(shown, clock):
    seen = view(shown, clock)
    seen.started(trial(0, origin="default"))
    for scores in ([0.7], [0.7, 0.6], [0.7, 0.6, 0.8]):
        seen.reported(trial(0, scores=scores, origin="default"), trial(0, scores=scores).reports[-1])
    seen.ended(trial(0, "done", [0.7, 0.6, 0.8], seconds=4.2, origin="default"))
    seen.ended(trial(1, "stopped", [0.5], rung=0, seconds=2.0))
    assert shown.news == [
        "trial 0: f1 0.7 at epoch 1, the best so far",
        "trial 0: f1 0.8 at epoch 3, the best so far",
        "trial 0 done after 4.2 s: best f1 0.8 at epoch 3 (the job as it is written)",
        "trial 1 stopped at rung 1 after 2.0 s: best f1 0.5 at epoch 1 (learning_rate 1e-4, lora r=4)",
    ]


def test_a_failed_trial_is_a_line_with_its_cause_and_log(shown, clock):
    seen = view(shown, clock)
    seen.ended(trial(3, "failed", error="the loss is not a number at step 30", log="/runs/t3/failure.log"))
    assert shown.warnings == ["trial 3 failed: the loss is not a number at step 30; log: /runs/t3/failure.log"]
    assert shown.moving["failed"] == "1 failed" and "best" not in shown.moving


def test_lower_is_better_where_the_metric_says_so_and_what_is_no_number_is_never_best(shown, clock):
    seen = view(shown, clock, objectives=[("loss", False), ("f1", True)])
    for number, score in ((0, 0.6), (1, 0.8), (2, float("nan")), (3, 0.7)):
        seen.ended(trial(number, "done", [score], seconds=1.0))
    assert shown.rows["1"] == (["done", "0", "0.2", "0.8", "1", "1.0 s", "1e-4", "r=4"], "bold green")
    assert list(shown.rows) == ["1", "3", "0"]
    assert shown.moving["best"] == "best loss 0.2, f1 0.8 (trial 1)"


def test_of_many_trials_the_running_and_the_best_have_room(shown, clock):
    seen = view(shown, clock, num_trials=100)
    seen.known(trial(number, "done", [number / 100], seconds=1.0) for number in range(40))
    assert list(shown.rows) == [str(number) for number in range(39, 27, -1)] and not shown.news
    for number in range(40, 60):
        seen.started(trial(number))
    assert list(shown.rows) == ["39", *(str(number) for number in range(40, 48)), "38", "37", "36"]
    assert len(shown.rows) == ROWS


def test_time_left_by_the_trials_so_far(shown, clock):
    seen = view(shown, clock, num_trials=4)
    seen.started(trial(0))
    seen.started(trial(1))
    assert seen.left() is None
    clock.now += 10
    seen.reported(trial(0, scores=[0.5]), {"f1": 0.5})
    assert seen.left() == pytest.approx((20 + 20 + 2 * 30) / 2)  # 300 of 900 rows took 10 s, two at once
    seen.ended(trial(0, "done", [0.5] * 3, seconds=40.0))
    assert seen.left() == pytest.approx((30 + 2 * 40) / 2)


def test_time_left_is_never_more_than_the_budgets_leave(shown, clock):
    seen = view(shown, clock, num_trials=100, max_seconds=60.0, spent=20.0)
    seen.started(trial(0))
    clock.now += 10
    assert seen.left() == pytest.approx(30)
    clock.now += 100
    assert seen.left() == 0
    seen = view(shown, clock, num_trials=100, max_examples=900)
    seen.started(trial(0))
    clock.now += 10
    seen.reported(trial(0, scores=[0.5]), {"f1": 0.5})
    assert seen.left() == pytest.approx(20)


def test_plain_output_has_a_line_for_each_end_and_new_best(clock):
    stream = io.StringIO()
    with Plain(stream, clock=clock, heartbeat=3600) as display:
        display.stage("search")
        seen = view(display, clock, num_trials=2)
        seen.started(trial(0, origin="default"))
        seen.reported(trial(0, scores=[0.7]), {"f1": 0.7, "epoch": 1.0})
        clock.now += 10
        seen.ended(trial(0, "done", [0.7], seconds=10.0, origin="default"))
    assert stream.getvalue().splitlines() == [
        "search",
        "  search: 0/2 trials (0%), 1 running",
        "  trial 0: f1 0.7 at epoch 1, the best so far",
        "  search: 1/2 trials (50%), best f1 0.7 (trial 0), 10 s left",
        "  trial 0 done after 10 s: best f1 0.7 at epoch 1 (the job as it is written)",
        "search: done in 10 s",
    ]


@pytest.mark.parametrize("width", [120, 60])
def test_on_a_terminal_the_table_is_below_the_moving_line_and_stays(clock, width):
    stream = io.StringIO()
    display = Terminal(stream, clock=clock, width=width, height=24, force_terminal=True, color_system=None)
    display.stage("search")
    display.say("6 trials")
    seen = view(display, clock, num_trials=30)
    seen.known(
        trial(number, "done", [number / 100], seconds=1.0, sample={LR: 1e-4, LORA: "[bold]x\x1b[2J" * 20}) for number in range(1, 20)
    )
    display._live.refresh()
    block = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert max(map(len, block.splitlines())) <= width and len(block.splitlines()) < 24
    lines = [line.split() for line in block.splitlines()]
    assert ["19", "done", "0", "0.19", "1", "1.0", "s", "1e-4"] in [line[:8] for line in lines]
    assert block.index("19/30 trials") < block.index("trial  state")
    stream.truncate(0)
    display.close()
    end = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "✓ search" in end and "[bold]x" in end and "6 trials" in end
    assert len(re.findall(r"^    \d+ +done", end, re.MULTILINE)) == ROWS


def test_names_are_as_short_as_they_can_be():
    assert short_names(["training.seed", "data.split.seed", "model.lora.r", "task.r2"]) == {
        "training.seed": "training.seed",
        "data.split.seed": "split.seed",
        "model.lora.r": "r",
        "task.r2": "r2",
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"), (True, "true"), (3e-5, "3e-5"), (1.234e-4, "1.23e-4"), (0.05, "0.05"), (0.0, "0"), (2e6, "2e6"), (64, "64"), ("cosine", "cosine"),
        ({"r": 4, "dropout": 0.1}, "r=4 dropout=0.1"), ({}, "{}"), ([1, 2], "1, 2"),
    ],
)  # fmt: skip
def test_values_as_people_write_them(value, text):
    assert say_value(value) == text
