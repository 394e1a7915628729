"""What a sweep tries next and what it stops: the searcher and the schedulers, told what Ray Tune would tell them."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from orchestrator.errors import InputError
from orchestrator.records import TrialRecord
from orchestrator.search import population, searchers
from orchestrator.search.population import steps
from orchestrator.search.proposals import Proposals, worth
from orchestrator.search.space import Space
from orchestrator.storage import Folder
from tests.unit.test_space import BATCH, CONDITIONAL, LORA, LR, PBT, RATE, SCHEDULE, WARM, space

ROWS = 900
RICH = {**RATE, BATCH: {"choice": [16, 32, 64]}, LORA: {"choice": [None, {"r": 4}]}, **CONDITIONAL}
ALGORITHMS = ["random", "tpe", "cmaes", "bohb", "hyperopt"]


def spaces(algorithm: str, **search: Any) -> Space:
    if algorithm == "bohb":
        search = {"scheduler": "hyperband", **search}
    return space(PBT if algorithm == "cmaes" else RICH, algorithm=algorithm, metric="loss", **search)


def far(sample: dict[str, Any]) -> float:
    """How far a learning rate is from 1e-4, in orders of magnitude."""
    return abs(math.log10(sample[LR]) + 4)


def ask(proposals: Proposals, place: int) -> dict[str, Any]:
    config = proposals.suggest(f"trial-{place}")
    assert isinstance(config, dict), config
    return config


def end(proposals: Proposals, place: int, value: float, *, early: float | None = None) -> None:
    """A trial that reports twice, then ends; `early` was the better one of the two."""
    first = value + 1 if early is None else early
    proposals.on_trial_result(f"trial-{place}", {"examples": 100, "loss": first, "accuracy": 0.5, "config/x": 1})
    proposals.on_trial_complete(f"trial-{place}", {"examples": 200, "loss": value, "accuracy": 0.5, "done": True})


def run(proposals: Proposals, trials: int, first: int = 0) -> list[dict[str, Any]]:
    configs = []
    for place in range(first, first + trials):
        configs.append(ask(proposals, place))
        end(proposals, place, far(configs[-1]["sample"]))
    return configs


# ---- proposals -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_known_points_come_first_then_what_lies_in_the_space(algorithm):
    made = spaces(algorithm, start=[{LR: 3e-5}], num_trials=15)
    configs = run(searchers.searcher(made), 15)
    assert [config["number"] for config in configs] == list(range(15))
    assert [config["origin"] for config in configs] == ["default", "start", *["search"] * 13]
    assert [config["sample"] for config in configs[:2]] == made.points()
    for config in configs:
        sample = config["sample"]
        assert json.loads(json.dumps(sample)) == sample
        assert all(made.contains(path, value) for path, value in sample.items())
        assert all((path in sample) == made.active(sample, path) for path in made.parameters)
        made.apply(sample)
    assert len({made.key(config["sample"]) for config in configs}) == 15


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_seed_proposes_the_same(algorithm):
    made = spaces(algorithm, num_trials=30)
    proposals = searchers.searcher(made)
    assert run(proposals, 14) == run(searchers.searcher(made), 14)
    assert proposals.reports("trial-12")[0].keys() == {"examples", "loss"}, "what decides, and nothing else"


@pytest.mark.parametrize("algorithm", ALGORITHMS[1:])
def test_what_learns_comes_nearer_than_chance(algorithm):
    made = spaces(algorithm, num_trials=60)
    late = [far(config["sample"]) for config in run(searchers.searcher(made), 60)[40:]]
    # A third of bohb's are drawn at random; hyperopt's looks at each path alone.
    limit = {"bohb": 0.42, "hyperopt": 0.42}.get(algorithm, 0.35)
    assert sum(late) / len(late) < limit, "chance is 0.5: half of an order of magnitude"


def test_failed_trials_teach_nothing_and_the_best_report_is_what_a_trial_was_worth():
    made = space(RATE, metric=["loss", "accuracy"], scheduler="none")
    assert worth(made, [{"examples": 1, "loss": 0.5, "accuracy": 0.6}, {"examples": 2, "loss": 0.7, "accuracy": 0.9}]) == [0.5, 0.6]
    assert worth(made, [{"examples": 1, "loss": math.nan, "accuracy": 0.6}, {"examples": 2, "loss": 0.7}]) is None
    assert worth(space(RATE), [{"examples": 1, "accuracy": 0.4}, {"examples": 2, "accuracy": 0.3}]) == [0.4]
    proposals = searchers.searcher(spaces("tpe"))
    for place in range(8):
        ask(proposals, place)
        proposals.on_trial_complete(f"trial-{place}", error=True) if place % 2 else end(proposals, place, 0.7, early=0.2)
    told = proposals._engine._study.get_trials()  # type: ignore[union-attr]
    assert [trial.state.name for trial in told] == ["COMPLETE", "FAIL"] * 4
    assert {trial.value for trial in told if trial.value is not None} == {0.2}


def test_several_objectives_are_told_with_their_directions():
    proposals = searchers.searcher(space(RATE, metric=["accuracy", "loss"], scheduler="none", num_trials=30))
    for place in range(20):
        ask(proposals, place)
        end(proposals, place, 0.5)
    study = proposals._engine._study  # type: ignore[union-attr]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert study.trials[3].values == [0.5, 1.5], "both at the first of its best validations by the first"


@pytest.mark.parametrize("algorithm", ["random", "tpe", "grid"])
def test_a_finite_space_is_tried_once_and_that_is_the_end(algorithm):
    given = {SCHEDULE: CONDITIONAL[SCHEDULE], WARM: {"choice": [0.0, 0.1], "when": {SCHEDULE: "cosine"}}, BATCH: {"choice": [16, 32]}}
    made = space(given, algorithm=algorithm, metric="loss")
    assert made.grid_size == 8
    proposals = searchers.searcher(made)
    keys = set()
    for place in range(9):
        config = proposals.suggest(f"trial-{place}")
        if config == Proposals.FINISHED:
            break
        keys.add(made.key(config["sample"]))  # type: ignore[index]
        end(proposals, place, 0.5)
    assert len(keys) == place == 8 + (made.key(made.points()[0]) not in {made.key(sample) for sample in made.grid()})


def test_no_more_at_once_than_allowed_and_waiting_trials_do_not_count():
    proposals = searchers.searcher(space(RATE, scheduler="hyperband"))
    assert proposals.set_max_concurrency(2)
    ask(proposals, 0), ask(proposals, 1)
    assert proposals.suggest("trial-2") is None
    proposals.on_pause("trial-0")
    ask(proposals, 2)
    proposals.on_unpause("trial-0")
    proposals.on_trial_complete("trial-1")
    assert proposals.suggest("trial-3") is None
    proposals.on_trial_complete("trial-0")
    ask(proposals, 3)
    whole = searchers.searcher(space(PBT, scheduler="pbt"))
    whole.set_max_concurrency(1)
    ask(whole, 0), ask(whole, 1)


def record(number: int, config: dict[str, Any], status: str, *losses: float) -> TrialRecord:
    reports = [{"examples": 100 * (place + 1), "loss": loss, "epoch": 1.0} for place, loss in enumerate(losses)]
    return TrialRecord.parse(
        {"id": f"old-{number}", "number": number, **{k: config[k] for k in ("origin", "sample")}, "status": status, "reports": reports}
    )


def test_trials_of_an_earlier_start_are_known_and_those_that_ran_go_on_first():
    made = spaces("tpe", start=[{LR: 3e-5}, {LR: 4e-5}])
    before = run(searchers.searcher(made), 5)
    known = [
        record(0, before[0], "done", 0.9, 0.8),
        record(1, before[1], "failed"),
        record(3, before[3], "running", 0.6),
        record(4, before[4], "stopped", 0.7),
    ]
    proposals = searchers.searcher(made, known=known)
    first, second, third = ask(proposals, 0), ask(proposals, 1), ask(proposals, 2)
    assert first == before[3] and proposals.reports("trial-0") == [{"examples": 100, "loss": 0.6}]
    assert second == {**before[2], "number": 5}, "a known point that never began"
    assert third["number"] == 6 and third["origin"] == "search"
    told = proposals._engine._study.get_trials()  # type: ignore[union-attr]
    assert [trial.value for trial in told if trial.state.is_finished()] == [0.8, None, 0.7]
    assert set(proposals.ended) == {"old-0", "old-1", "old-4"}
    end(proposals, 0, 0.5)
    assert [report["loss"] for report in proposals.reports("trial-0")] == [0.6, 0.5], "what it says again counts once"


# ---- schedulers ------------------------------------------------------------------------------------------------
class Controller:
    """Of the shape of Tune's, as far as schedulers ask it."""

    def __init__(self, proposals: Proposals):
        self.search_alg = SimpleNamespace(searcher=SimpleNamespace(searcher=proposals))
        self.trials: list[Any] = []
        self.saved: list[Any] = []
        self.scheduler: Any = None

    def get_trials(self) -> list[Any]:
        return self.trials

    def pause_trial(self, trial: Any, should_checkpoint: bool = True) -> None:
        trial.status = Trial.PAUSED

    def stop_trial(self, trial: Any) -> None:
        trial.status = Trial.TERMINATED
        self.scheduler.on_trial_remove(self, trial)

    def _schedule_trial_save(self, trial: Any, result: dict[str, Any] | None = None) -> Any:
        self.saved.append(trial)
        return SimpleNamespace(resolve=lambda: f"checkpoint of {trial}")


class Fake:
    """Of the shape of Tune's trial."""

    is_saving = False

    def __init__(self, trial_id: str, config: dict[str, Any]):
        self.trial_id, self.config, self.status, self.experiment_tag = trial_id, config, Trial.RUNNING, trial_id
        self.run_metadata = SimpleNamespace(checkpoint_manager=SimpleNamespace(_latest_checkpoint_result=None))

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def __str__(self) -> str:
        return self.trial_id


class Sweep:
    """A searcher and a scheduler, and trials that report when told."""

    def __init__(self, made: Space, known: list[TrialRecord] | None = None, **options: Any):
        self.proposals = searchers.searcher(made, known=known or [])
        self.controller = Controller(self.proposals)
        self.scheduler: Any = searchers.scheduler(made, ROWS, **options)
        self.controller.scheduler = self.scheduler
        assert self.scheduler.set_search_properties(None, None)
        self.interval = made.report_every(ROWS) * ROWS

    def begin(self) -> Any:
        trial = Fake(f"trial-{len(self.controller.trials)}", ask(self.proposals, len(self.controller.trials)))
        self.controller.trials.append(trial)
        self.scheduler.on_trial_add(self.controller, trial)
        return trial

    def report(self, trial: Any, validation: float, accuracy: float) -> str:
        """The answer to a trial's so-many-th validation; it is a little off, as with another batch size."""
        result = {"examples": round(validation * self.interval), "accuracy": accuracy, "loss": 1 - accuracy}
        decision = self.scheduler.on_trial_result(self.controller, trial, dict(result))
        self.proposals.on_trial_result(trial.trial_id, result)
        if decision in (TrialScheduler.PAUSE, TrialScheduler.STOP):
            trial.status = Trial.PAUSED if decision == TrialScheduler.PAUSE else Trial.TERMINATED
        if decision == TrialScheduler.STOP:
            self.scheduler.on_trial_complete(self.controller, trial, result)
            self.proposals.on_trial_complete(trial.trial_id, result)
        return decision


def test_no_scheduler_lets_all_run():
    assert type(searchers.scheduler(space(RATE, scheduler="none"), ROWS)) is FIFOScheduler
    assert searchers.rungs(space(RATE, scheduler="none"), ROWS) == ()


def test_halving_judges_at_its_rungs_whatever_the_batch_size_makes_of_the_rows():
    sweep = Sweep(space(RATE))
    default, *trials = [sweep.begin() for _ in range(5)]
    assert sweep.report(default, 1.0, 0.9) == TrialScheduler.CONTINUE
    assert sweep.report(trials[0], 0.96, 0.5) == TrialScheduler.STOP, "its first validation, although a few rows early"
    assert sweep.report(trials[1], 1.04, 0.95) == TrialScheduler.CONTINUE
    assert sweep.report(trials[1], 2.08, 0.1) == TrialScheduler.CONTINUE, "no rung"
    assert sweep.report(trials[1], 2.9, 0.95) == TrialScheduler.CONTINUE, "the first at the second rung"
    assert sweep.report(trials[2], 1.0, 0.96) == TrialScheduler.CONTINUE
    assert sweep.report(trials[2], 3.0, 0.9) == TrialScheduler.STOP
    assert sweep.report(trials[3], 1.0, 0.99) == TrialScheduler.CONTINUE
    for trial, accuracy in ((trials[3], 0.1), (trials[1], 0.95), (trials[3], 0.1)):
        assert sweep.report(trial, 9.0, accuracy) == TrialScheduler.CONTINUE, "it has all but ended by itself"
    assert searchers.rungs(space(RATE), ROWS) == (150, 750)
    assert searchers.rungs(space(RATE, grace=1), ROWS) == (750,)


def test_the_job_as_it_is_written_runs_to_its_end():
    for scheduler in ("asha", "median", "hyperband"):
        sweep = Sweep(space(RATE, scheduler=scheduler))
        default, *trials = [sweep.begin() for _ in range(6)]
        for trial in trials:
            sweep.report(trial, 1, 0.9)
        for validation in range(1, 10):
            assert sweep.report(default, validation, 0.1) == TrialScheduler.CONTINUE


@pytest.mark.parametrize("scheduler", ["asha", "median"])
def test_after_a_death_trials_are_judged_beside_those_before(scheduler):
    made = space(RATE, scheduler=scheduler, include_default=False)
    known = [
        TrialRecord.parse(
            {"id": f"old-{number}", "number": number, "sample": {LR: 1e-4 + number * 1e-5}, "status": status, "reports": reports}
        )
        for number, (status, reports) in enumerate(
            [("done", [{"examples": 300, "accuracy": 0.9}])] * 3 + [("failed", []), ("running", [{"examples": 300, "accuracy": 0.8}])]
        )
    ]
    sweep = Sweep(made, known)
    going_on, fresh = sweep.begin(), sweep.begin()
    assert going_on.config["number"] == 4
    assert sweep.report(fresh, 1, 0.5) == TrialScheduler.STOP
    assert sweep.report(going_on, 2, 0.95) == TrialScheduler.CONTINUE
    assert sweep.report(sweep.begin(), 1, 0.91) == TrialScheduler.CONTINUE


def test_the_median_stops_what_is_worse_than_the_others_were():
    sweep = Sweep(space(RATE, scheduler="median", grace=0.6))
    trials = [sweep.begin() for _ in range(6)]
    for trial in trials[:4]:
        assert {sweep.report(trial, validation, 0.8) for validation in (1, 2, 3)} == {TrialScheduler.CONTINUE}
    assert sweep.report(trials[4], 1, 0.1) == TrialScheduler.CONTINUE, "within its grace"
    assert sweep.report(trials[4], 2, 0.1) == TrialScheduler.STOP
    assert sweep.report(trials[5], 3, 0.85) == TrialScheduler.CONTINUE


def test_hyperband_fills_its_bracket_before_it_halves():
    sweep = Sweep(space(RATE, scheduler="hyperband", include_default=False))
    sweep.proposals.set_max_concurrency(2)
    trials = []
    for place in range(9):
        trials.append(sweep.begin())
        wanted = TrialScheduler.PAUSE if place < 8 else TrialScheduler.STOP
        assert sweep.report(trials[-1], 1, 0.9 - place / 100) == wanted, f"trial {place}"
    assert [trial.status for trial in trials] == [Trial.PAUSED] * 3 + [Trial.TERMINATED] * 6
    chosen = sweep.scheduler.choose_trial_to_run(sweep.controller)
    assert chosen in trials[:3]
    for trial in trials[:3]:
        trial.status = Trial.RUNNING
    assert sweep.report(trials[0], 3, 0.9) == TrialScheduler.PAUSE
    assert sweep.report(trials[1], 3, 0.8) == TrialScheduler.PAUSE
    assert sweep.report(trials[2], 3, 0.95) == TrialScheduler.CONTINUE, "the best of three"
    assert sweep.report(trials[2], 4, 0.95) == TrialScheduler.CONTINUE


@pytest.mark.parametrize(("scheduler", "least"), [("asha", 2), ("hyperband", 3), ("pbt", 2)])
def test_a_trial_of_too_few_validations_is_a_sentence(scheduler, least):
    sections = {"training": {"max_steps": 10, "global_batch_size": 10}}
    short = space(RATE, sections, scheduler=scheduler, report_every=100 / ROWS)
    with pytest.raises(
        InputError, match=rf"{scheduler} decides at validations and needs {least} of a trial, and the longest has 1 \(one every 100 rows"
    ):
        searchers.scheduler(short, ROWS)


# ---- populations -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
def test_a_weak_trial_takes_over_a_strong_ones_checkpoint_with_new_settings_in_the_space(scheduler, tmp_path):
    random.seed(0)
    schedule = Folder(str(tmp_path / "schedule.jsonl"))
    made = space(PBT, scheduler=scheduler, num_trials=5, perturb_every=2 / 3)
    sweep = Sweep(made, schedule=schedule)
    default, *trials = [sweep.begin() for _ in range(5)]
    begun = [trial.config for trial in trials]
    for validation in (1, 2, 3, 4):
        for place, trial in enumerate(trials):
            trial.status = Trial.RUNNING
            sweep.report(trial, validation, 0.2 * place + validation / 100)
        assert sweep.report(default, validation, 0.0) == TrialScheduler.CONTINUE
    weak, strong = trials[0], trials[3]
    assert strong.config == begun[3] and default.config["origin"] == "default"
    assert weak.config["sample"] not in [config["sample"] for config in begun]
    assert all(made.contains(path, value) for path, value in weak.config["sample"].items())
    assert (weak.config["number"], weak.config["origin"]) == (1, "search"), "it stays the trial that it is"
    assert weak.run_metadata.checkpoint_manager._latest_checkpoint_result is not None
    assert default not in sweep.controller.saved and strong in sweep.controller.saved
    moves = [json.loads(line) for line in schedule.read_bytes().splitlines()]
    assert [move["trial"] for move in moves[:5]] == [f"member-00{number}" for number in range(5)]
    assert all(move["examples"] == 0 and move["parent"] is None for move in moves[:5])
    last = moves[-1]
    assert (last["trial"], last["parent"], last["sample"]) == ("member-001", "member-004", weak.config["sample"])
    assert last["examples"] in (round(2 * sweep.interval), round(4 * sweep.interval))

    population.conclude(schedule, "member-001")
    population.conclude(schedule, "member-001")
    assert steps(schedule) == [(0, begun[3]["sample"]), (last["examples"], weak.config["sample"])]
    population.conclude(schedule, "member-004")
    assert steps(schedule) == [(0, begun[3]["sample"])]


def test_a_schedule_is_replayed(tmp_path):
    file = tmp_path / "schedule.jsonl"
    settings = [{LR: rate, "training.weight_decay": 0.05} for rate in (1e-5, 2e-5, 3e-5, 4e-5)]
    moves = [
        {"trial": "member-000", "parent": None, "examples": 0, "sample": settings[0]},
        {"trial": "member-001", "parent": None, "examples": 0, "sample": settings[3]},
        {"trial": "member-001", "parent": "member-000", "examples": 600, "sample": settings[1]},
        {"trial": "member-000", "parent": "member-001", "examples": 1200, "sample": settings[3]},
        {"trial": "member-001", "parent": "member-001", "examples": 1500, "sample": settings[2]},
        {"best": "member-001"},
    ]
    file.write_text("".join(f"{json.dumps(move)}\n" for move in moves))
    made = space(PBT, scheduler="pbt", replay=str(file))
    sweep = Sweep(made)
    default, trial = sweep.begin(), sweep.begin()
    assert sweep.proposals.suggest("trial-2") is None, "the two are all there is, and they have not ended"
    assert (default.config["origin"], trial.config) == ("default", {"sample": settings[0], "number": 1, "origin": "search"})
    seen = []
    for validation in range(1, 10):
        assert sweep.report(default, validation, 0.5) == TrialScheduler.CONTINUE
        trial.status = Trial.RUNNING
        decision = sweep.report(trial, validation * 0.99, 0.5)
        assert (decision == TrialScheduler.NOOP) == (trial.status == Trial.PAUSED) == (validation in (2, 5))
        seen.append(settings.index(trial.config["sample"]))
    assert seen == [0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert trial not in sweep.controller.saved, "it finds its checkpoint in its own folder"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "there is no file"),
        ("{", "is not JSON lines"),
        ("[1]\n", "line 1: not a line of a schedule"),
        ("", "not the schedule of a finished population"),
        ('{"trial": "a", "parent": null, "examples": 0, "sample": {}}\n', "not the schedule of a finished population"),
        (
            '{"trial": "a", "parent": null, "examples": 0, "sample": {"training.seed": 1}}\n{"best": "a"}\n',
            "sets training.seed, and search.space has",
        ),
    ],
)
def test_what_is_no_schedule_is_a_sentence(text, sentence, tmp_path):
    file = tmp_path / "schedule.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=sentence):
        searchers.searcher(space(PBT, scheduler="pbt", replay=str(file)))
