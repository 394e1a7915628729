"""The report of a sweep: one page that needs nothing else and holds what was asked."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import plotly.graph_objects
import pytest

from orchestrator.records import Comparison, SearchRecord, TrialRecord
from orchestrator.search import figures
from orchestrator.search.importance import importance
from orchestrator.search.report import sweep_html
from tests.unit.sweeps import ALPHA, BATCH, LORA, LR, SMOOTHING, SPACE, schedule, sweep

COMPARISON = Comparison(
    metric="f1", split="test", rows=299, score=0.912, low=0.88, high=0.94, default=0.894, difference=0.018, difference_low=-0.01, difference_high=0.05
)  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of the page: its tags, its text and the figures' data."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text, self._inside = "", ""
        self.feed(text)
        self.figures = [json.loads(script) for (tag, kind), script in self._kinds() if kind == "application/json"]

    def _kinds(self):
        kinds = [(tag, attributes.get("type")) for tag, attributes in self.tags if tag == "script"]
        return zip(kinds, self.scripts, strict=True)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def headings(text: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text)


def changed(record: SearchRecord, number: int, **fields: Any) -> SearchRecord:
    """The record with another trial of this number."""
    trials = [TrialRecord(**{**dict(trial), **fields}) if trial.number == number else trial for trial in record.trials]
    return record.model_copy(update={"trials": tuple(trials)})


def test_the_page_says_what_was_found_and_needs_no_network():
    text = sweep_html(sweep(24), COMPARISON, name="reviews")
    page = Page(text)
    assert headings(text) == [
        "The best setting", "History", "Learning curves and rungs", "Parallel coordinates", "Importance of parameters", "Slices", "All trials",
        "Failed trials", "The search",
    ]  # fmt: skip
    assert "reviews: sweep of 24 trials" in page.text and "tpe with asha" in page.text
    assert "95 %: 0.88 to 0.94, on 299 rows that no trial saw. The job as it is written: 0.894, so +0.018 (-0.01 to +0.05)" in page.text
    assert "3.4 s in a new process, 0.06 s in a used one" in page.text
    assert "trials/000000000005/failure.log" in page.text and "/runs/" not in page.text
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href")]
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert len(page.figures) == 2 + 2 + 1 + 1 + 4


def every(record: SearchRecord, moves: Any = ()) -> list[figures.Figure]:
    one = [figures.history(record), figures.wall_time(record), figures.curves(record), figures.rungs(record), figures.parallel(record)]
    shares, _ = importance(record)
    many = [*figures.slices(record), *figures.pareto(record), *figures.population(record, moves), figures.importance(shares)]
    return [chart for chart in [*one, *many] if chart is not None]


@pytest.mark.parametrize(
    "record",
    [
        sweep(24),
        sweep(12, scheduler="none", objectives=(("f1", True), ("loss", False))),
        sweep(6, scheduler="pbt"),
        sweep(1),
        changed(sweep(8), 3, reports=({"f1": float("nan"), "examples": 10, "seconds": 1.0, "epoch": 1.0},), best=None),
    ],
    ids=["asha", "two objectives", "population", "one trial", "no number"],
)
def test_plotly_knows_every_attribute_of_the_figures(record):
    for chart in every(record, schedule(record)):
        text = json.dumps(chart, allow_nan=False).replace('"css:scale"', '[[0, "#000"], [1, "#fff"]]')
        plotly.graph_objects.Figure(json.loads(re.sub(r'"css:\w+"', '"#123456"', text)))


def test_nothing_that_a_user_wrote_is_markup():
    evil = '</script><img src="x" onerror="alert(1)">&amp;'
    record = changed(sweep(8), 5, error=evil, log=f"/runs/{evil}", sample={LR: 1e-4, LORA: {evil: evil}, evil: evil})
    record = record.model_copy(
        update={"objectives": (("f1", True), (evil, True)), "stopped_by": evil, "search": {**record.search, "note": evil}}
    )
    page = Page(sweep_html(record, COMPARISON.model_copy(update={"metric": evil}), name=evil))
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert page.text.count(evil) >= 6
    for chart in page.figures:
        assert "<img" not in json.dumps(chart)  # Plotly reads tags in its texts, so they are entities there


def test_a_population_shows_who_took_over_whom(tmp_path):
    record = sweep(6, scheduler="pbt")
    moves = schedule(record)
    file = tmp_path / "schedule.jsonl"
    file.write_text("".join(json.dumps(move) + "\n" for move in moves))
    text = sweep_html(record.model_copy(update={"schedule": str(file)}))
    assert "Population" in headings(text) and "Pareto front" not in headings(text)
    lineage, *parameters = figures.population(record, moves)
    assert len(lineage["layout"]["annotations"]) == 3
    assert [chart["layout"]["yaxis"]["title"]["text"] for chart in parameters] == [
        "learning_rate", "global_batch_size", "lora", "label_smoothing_factor",
    ]  # fmt: skip


def test_several_objectives_have_a_front():
    record = sweep(12, scheduler="none", objectives=(("f1", True), ("loss", False)))
    (chart,) = figures.pareto(record)
    assert [group["name"] for group in chart["data"]] == ["beaten", "Pareto front"]
    assert len(chart["data"][1]["x"]) == len(record.pareto)
    assert "Pareto front" in headings(sweep_html(record))


@pytest.mark.parametrize("higher", [True, False])
def test_the_best_so_far_goes_the_metrics_way(higher):
    record = sweep(12, objectives=(("f1" if higher else "loss", higher),))
    for chart in (figures.history(record), figures.wall_time(record)):
        assert chart is not None
        line = next(data["y"] for data in chart["data"] if data["name"] == "best so far")
        assert line == sorted(line, reverse=not higher)


def test_wall_time_counts_from_the_start_of_the_sweep():
    record = sweep(12)
    chart = figures.wall_time(record)
    assert chart is not None
    assert chart["layout"]["xaxis"]["title"]["text"] == "minutes of the sweep"
    assert chart["data"][0]["x"][-1] == pytest.approx(record.seconds / 60)


def test_rungs_are_where_trials_were_stopped():
    record = sweep(24)
    assert figures.levels(record) == [pytest.approx(667), pytest.approx(2000)]
    chart = figures.rungs(record)
    assert chart is not None
    on, ended = (bar["x"] for bar in chart["data"])
    assert on[0] + ended[0] == 23 and ended[0] == sum(trial.status == "stopped" and trial.rung == 0 for trial in record.trials)
    assert figures.rungs(sweep(8, scheduler="median")) is None and figures.levels(sweep(8, scheduler="none")) == []


def test_a_path_that_is_off_has_a_place_of_its_own_and_logarithms_their_ticks():
    space = {**SPACE, ALPHA: {"uniform": [1.0, 2.0], "when": {LORA: {"r": 4}}}}
    record = sweep(8).model_copy(update={"search": {"space": space}})
    record = changed(record, 3, sample={**record.trials[3].sample, ALPHA: 1.0})
    record = changed(record, 4, sample={**record.trials[4].sample, ALPHA: 2.0})
    chart = figures.parallel(record)
    assert chart is not None
    rate, _, lora, _, alpha, score = chart["data"][0]["dimensions"]
    assert rate["values"][0] == pytest.approx(-4.301, abs=1e-3) and rate["ticktext"][0].endswith(("e-5", "e-4"))
    assert lora["ticktext"] == ["none", "r=4", "r=16"] and lora["values"][0] == 0.0
    assert alpha["values"][0] < 1.0 == alpha["values"][3] and "off" in alpha["ticktext"]
    assert score["label"] == "f1" and len(figures.slices(record)[4]["data"][0]["x"]) == 2


def test_importance_finds_the_parameter_that_matters():
    shares, sentence = importance(sweep(40, scheduler="none"))
    assert max(shares, key=lambda name: shares[name]) == "learning_rate" and sum(shares.values()) == pytest.approx(1)
    assert "40 trials" not in sentence and "39 trials" in sentence  # one failed


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        (sweep(3), "Importance needs at least 4 trials with a score; this sweep has 3."),
        (sweep(5).model_copy(update={"trials": tuple(sweep(5).trials[0].model_copy(update={"id": f"t{i}"}) for i in range(5))}), "All 5 trials have the same score"),
    ],
)  # fmt: skip
def test_importance_says_why_it_can_not_be_told(record, sentence):
    shares, said = importance(record)
    assert shares == {} and said.startswith(sentence)
    assert sentence in Page(sweep_html(record)).text


def test_the_table_of_trials_sorts_by_numbers_and_marks_the_best():
    record = sweep(24)
    text = sweep_html(record)
    row = re.search(r'<tr class="best">(.*?)</tr>', text)
    assert row is not None
    best = next(trial for trial in record.trials if trial.id == record.best)
    assert row[1].startswith(f'<td data-value="{best.number}">') and f'data-value="{best.sample[LR]}"' in row[1]
    assert len(re.findall(r"<tr class=", text)) >= 24 and BATCH.split(".")[-1] in text and SMOOTHING in text
