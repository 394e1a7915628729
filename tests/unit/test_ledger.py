"""What a sweep keeps of its trials: records that it continues from, and when it is over."""

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import SearchSection
from orchestrator.progress import Silent
from orchestrator.records import TrialRecord
from orchestrator.search import ledger
from orchestrator.search.ledger import Ledger
from orchestrator.search.view import SweepView
from orchestrator.storage import Folder

LR = "training.learning_rate"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(folder: Path, clock: Clock, known: list[TrialRecord] | None = None, *, population: bool = False, **search: Any) -> Ledger:
    view = SweepView(Silent(), objectives=(("f1", True),), paths=[LR], num_trials=4)
    section = SearchSection.parse({"space": {LR: {"loguniform": [1e-5, 1e-3]}}, **search})
    place = Folder(str(folder))
    return Ledger(place, section, (("f1", True),), view, rungs=(100, 300), population=population, known=known or [], clock=clock)


def begin(kept: Ledger, number: int, lr: float = 1e-4, tune_id: str | None = None) -> str:
    tune_id = tune_id or f"tune{number}"
    kept.begin(tune_id, {"number": number, "origin": "search", "sample": {LR: lr}}, kept.folder / "trials" / f"t{number}")
    return tune_id


def report(step: int, f1: float, best: tuple[int, float] | None = None, **more: Any) -> dict[str, Any]:
    best_step, best_value = best or (step, f1)
    return {
        "f1": f1, "step": step, "epoch": step / 10, "examples": 10 * step, "best_step": best_step, "best_value": best_value,
        "seconds": step / 2, **more,
    }  # fmt: skip


def test_records_are_on_disk_as_things_happen(tmp_path: Path, clock: Clock) -> None:
    kept = opened(tmp_path, clock)
    one, two = begin(kept, 0), begin(kept, 1)
    clock.now += 7
    kept.report(one, report(10, 0.6))
    kept.report(one, report(20, 0.8))
    kept.report(one, report(30, 0.7, best=(20, 0.8), pid=5, warm=True, micro_batch_halvings=1))
    kept.report(two, report(10, 0.5))
    kept.end(two, "stopped")
    found, torn = ledger.read(Folder(str(tmp_path)))
    assert torn == []
    assert [(trial.number, trial.status, trial.examples, trial.rung) for trial in found] == [(0, "running", 300, 2), (1, "stopped", 100, 0)]
    assert found[0].best == report(20, 0.8)  # the best validation, not the last
    assert (found[0].pid, found[0].warm, found[0].halvings) == (5, True, 1)
    assert found == kept.records


def test_what_is_reported_again_after_a_restart_is_no_news(tmp_path: Path, clock: Clock) -> None:
    kept = opened(tmp_path, clock)
    one = begin(kept, 0)
    for step in (10, 20, 30):
        kept.report(one, report(step, step / 100))
    before = kept.of(one)
    assert kept.die(one).restarts == 1
    begin(kept, 0)
    for step in (10, 20):
        kept.report(one, report(step, step / 100, attempt=2))
    assert kept.of(one) == before.model_copy(update={"restarts": 1})
    kept.report(one, report(20, 0.9))  # from scratch, and it came out otherwise: what came after it is of another training
    assert [found["step"] for found in kept.of(one).reports] == [10, 20]


def test_a_sweep_that_is_continued_counts_on(tmp_path: Path, clock: Clock) -> None:
    kept = opened(tmp_path, clock)
    one, two = begin(kept, 0), begin(kept, 1)
    clock.now += 30
    kept.report(one, report(10, 0.6))
    kept.end(one, "done")
    kept.report(two, report(10, 0.5))
    known, _ = ledger.read(Folder(str(tmp_path)))
    again = opened(tmp_path, clock, known, max_seconds=50)
    assert again.seconds == pytest.approx(30)
    assert again.over() is None
    begin(again, 1, tune_id="other")
    again.report("other", report(20, 0.7))
    assert [trial.number for trial in again.records] == [0, 1]
    assert again.examples == 300
    clock.now += 20
    assert again.over() == "search.max_seconds: 50 s are over"


@pytest.mark.parametrize(
    ("search", "says"),
    [({"max_examples": 350}, "search.max_examples: 400 rows were trained on"), ({"plateau": 3}, "search.plateau: the best has not improved in 3 trials")],
)  # fmt: skip
def test_budgets_end_the_sweep_with_a_sentence(tmp_path: Path, clock: Clock, search: dict[str, Any], says: str) -> None:
    kept = opened(tmp_path, clock, **search)
    for number, f1 in enumerate([0.8, 0.7, 0.75, 0.8]):
        assert kept.over() is None
        one = begin(kept, number)
        kept.report(one, report(10, f1))
        kept.end(one, "done")
    assert kept.over() == says


def test_what_still_ran_when_a_budget_ended_the_sweep_goes_on_later(tmp_path: Path, clock: Clock) -> None:
    kept = opened(tmp_path, clock)
    kept.report(begin(kept, 0), report(10, 0.6))
    kept.close()
    assert [trial.status for trial in kept.records] == ["stopped"]
    assert [trial.status for trial in ledger.read(Folder(str(tmp_path)))[0]] == ["running"]


def test_a_member_of_a_population_is_as_good_as_the_weights_it_has(tmp_path: Path, clock: Clock) -> None:
    kept = opened(tmp_path, clock, population=True)
    weak, strong = begin(kept, 0), begin(kept, 1)
    kept.report(weak, report(10, 0.65))
    kept.report(weak, report(20, 0.4, best=(10, 0.65)))
    kept.report(strong, report(10, 0.6, accuracy=0.9))
    begin(kept, 0, lr=2e-4)  # goes on from the strong one's checkpoint, its own is gone
    kept.report(weak, report(20, 0.5, best=(10, 0.6), parent="t1"))
    record = kept.of(weak)
    assert record.best is not None
    assert (record.best["f1"], record.best["step"], record.best["accuracy"]) == (0.6, 10, 0.9)
    assert (record.parent, record.sample, record.examples) == ("t1", {LR: 2e-4}, 200)
    assert len(record.reports) == 3


def test_a_torn_record_is_said_and_left_out(tmp_path: Path, clock: Clock) -> None:
    kept = opened(tmp_path, clock)
    begin(kept, 0)
    begin(kept, 1)
    (tmp_path / "trials/t0/record.json").write_text('{"id": "t0", "num')
    found, torn = ledger.read(Folder(str(tmp_path)))
    assert [trial.id for trial in found] == ["t1"]
    assert len(torn) == 1
    assert "trials/t0/record.json" in torn[0]


def test_the_most_common_cause_is_found_whatever_the_numbers_in_it() -> None:
    causes = ["the loss became nan at step 7", "no rows", "the loss became nan at step 12", None]
    trials = [TrialRecord(id=f"t{n}", number=n, sample={}, status="failed", error=cause) for n, cause in enumerate(causes)]
    assert ledger.most_common_cause(trials) == causes[0]
    assert ledger.most_common_cause([]) is None
