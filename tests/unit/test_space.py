"""The space of a sweep: what it refuses and why, the samples it gives, and the jobs it makes of them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from orchestrator.config import JobConfig
from orchestrator.errors import InputError
from orchestrator.search.space import Space, data_key

LR = "training.learning_rate"
BATCH = "training.global_batch_size"
LORA = "model.lora"
RATE = {LR: {"loguniform": [1e-5, 1e-3]}}


def job(space: dict[str, Any], sections: dict[str, Any] | None = None, **search: Any) -> JobConfig:
    base = {"task": "text-classification", "model": {"base": "example://minilm"}, "data": {"train": "reviews.csv"}}
    return JobConfig.parse({**base, **(sections or {}), "search": {"space": space, **search}})


def space(given: dict[str, Any], sections: dict[str, Any] | None = None, **search: Any) -> Space:
    return Space.of(job(given, sections, **search))


class First:
    """Of an Optuna trial's shape: the lowest or first of everything, or the last."""

    def __init__(self, last: bool = False):
        self.last, self.asked = last, {}

    def suggest_categorical(self, name, choices):
        self.asked[name] = choices
        return choices[-1 if self.last else 0]

    def suggest_float(self, name, low, high, *, step=None, log=False):
        self.asked[name] = (low, high, step, log)
        return high if self.last else low

    def suggest_int(self, name, low, high, *, log=False):
        self.asked[name] = (low, high, log)
        return high if self.last else low


# ---- the section -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("parameter", "sentence"),
    [
        ({}, "one distribution is needed, out of uniform, .*, as in"),
        ({"uniform": [0, 1], "int": [1, 2]}, "this has uniform and int"),
        ({"uniform": [2, 1]}, r"uniform: \[2, 1\] is upside down: the lower bound comes first, as in \[1, 2\]"),
        ({"quniform": [2, 1, 0.5]}, "upside down"),
        ({"int": [3, 3]}, "has one value only"),
        ({"loguniform": [0, 1]}, "logarithmic scale, so its lower bound must be above 0"),
        ({"logint": [0, 8]}, "logarithmic scale"),
        ({"uniform": [0, float("inf")]}, "not a finite number"),
        ({"quniform": [0, 1, 2]}, "needs a step above 0 and at most 1"),
        ({"choice": []}, "choice has no values"),
        ({"choice": [{"r": 4}, {"r": 4}]}, r"choice has \{'r': 4\} twice"),
        ({"int": [0.5, 2]}, "valid integer"),
        ({"uniforn": [0, 1]}, "Did you mean 'uniform'"),
    ],
)
def test_a_distribution_that_means_nothing_is_a_sentence(parameter, sentence):
    with pytest.raises(InputError, match=sentence):
        job({LR: parameter})


def test_numbers_that_yaml_takes_for_text_are_numbers():
    made = space({LR: {"loguniform": ["1e-5", "1e-3"]}, "training.weight_decay": {"choice": ["1e-2", 0]}}, start=[{LR: "3e-5"}])
    assert made.parameters[LR].loguniform == (1e-5, 1e-3)
    assert made.parameters["training.weight_decay"].choice == [0.01, 0]
    assert made.points()[1] == {LR: 3e-5, "training.weight_decay": 0.01}


@pytest.mark.parametrize(("given", "bytes"), [(5, 5), ("20 GB", 20_000_000_000), ("1.5 GiB", 3 * 2**29), ("10kB", 10_000), ("7 B", 7)])
def test_amounts_of_bytes(given, bytes):
    search = job(RATE, max_disk=given).search
    assert search is not None and search.max_disk == bytes
    assert JobConfig.parse(job(RATE, max_disk=given).to_json()).search == search


@pytest.mark.parametrize("given", ["much", "3 Gib", "-1 GB", 0, "0 GB"])
def test_what_is_no_amount_of_bytes_is_a_sentence(given):
    with pytest.raises(InputError, match=r"search\.max_disk"):
        job(RATE, max_disk=given)


def test_a_sweep_is_part_of_the_runs_question_but_not_how_long_it_may_take():
    plain = job(RATE).model_copy(update={"search": None}).run_id
    assert job(RATE).run_id != plain
    assert job(RATE, num_trials=50, max_seconds=10, max_disk="1 GB", max_concurrent_trials=1, max_failures=0).run_id == job(RATE).run_id
    assert job(RATE, seed=1).run_id != job(RATE).run_id
    assert job(RATE, workers_per_trial=2, scheduler="none").run_id == job(RATE, scheduler="none").run_id
    assert JobConfig.parse(job(RATE).to_json()).run_id == job(RATE).run_id


# ---- paths -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("training.learning_rte", "a job has no 'training.learning_rte'. Did you mean 'training.learning_rate'?"),
        ("learning_rate", "Did you mean 'training.learning_rate'?"),
        ("model.lora.rank", "a job has no 'model.lora.rank'. Did you mean 'model.lora.r'?"),
        ("task.max_lenght", "Did you mean 'task.max_length'?"),
        ("data.columns.txt", "Did you mean 'data.columns.text'?"),
        ("training.learning_rate.x", "a job has no"),
        ("name", "can't be searched: it names the run"),
        ("storage", "can't be searched"),
        ("search.num_trials", "a sweep doesn't search itself"),
        ("serving.port", "about the endpoint"),
        ("registry", "can't be searched"),
        ("resources.num_workers", "results don't depend on it"),
        ("evaluation.metrics", "the same for all trials"),
        ("data.validation", "scored on different rows"),
        ("data.split.seed", "scored on different rows"),
        ("data.columns.label", "trials would learn different things"),
        ("data.train", r"the validation rows are split off the training rows, .*set data\.split\.validation: 0"),
        ("task.name", "different tasks"),
        ("task", "is a whole section; name a key in it"),
        ("training", "is a whole section; name a key in it"),
        ("training.eval_steps", "search.report_every"),
        ("training.metric_for_best_model", "search.metric"),
        ("training.tokens_per_micro_batch", "halves it by itself"),
    ],
)
def test_a_path_that_is_not_there_or_can_not_be_searched_is_a_sentence(path, sentence):
    with pytest.raises(InputError, match=sentence):
        space({path: {"choice": ["a", "b"]}})


def test_a_path_inside_another_is_refused():
    with pytest.raises(InputError, match=r"model\.lora\.r is a part of model\.lora, which is searched too"):
        space({LORA: {"choice": [None, {}]}, "model.lora.r": {"int": [2, 8]}})


def test_data_is_prepared_before_so_its_values_are_listed():
    with pytest.raises(InputError, match=r"task\.max_length: data is prepared before the sweep.*as in \{choice: \[32, 128\]\}"):
        space({"task.max_length": {"int": [32, 128]}})


def test_training_files_can_be_searched_where_the_other_rows_stay():
    data = {"train": "a.csv", "validation": "v.csv", "test": "t.csv"}
    made = space({"data.train": {"choice": ["a.csv", ["a.csv", "b.csv"]]}}, {"data": data})
    assert [variant.data.train for variant in made.data_variants()] == ["a.csv", ["a.csv", "b.csv"]]


def test_a_section_that_is_left_out_can_be_searched_into():
    made = space({"model.lora.r": {"int": [2, 8]}})
    lora = made.apply({"model.lora.r": 2}).model.lora
    assert lora is not None and lora.r == 2
    assert made.points() == [{}], "the job as it is written has no such section"
    assert made.apply({}).model.lora is None


# ---- conditions ------------------------------------------------------------------------------------------------
SCHEDULE = "training.lr_scheduler_type"
WARM = "training.warmup_ratio"
CONDITIONAL = {
    WARM: {"uniform": [0.0, 0.2], "when": {SCHEDULE: ["linear", "cosine"]}},
    SCHEDULE: {"choice": ["linear", "cosine", "constant"]},
}


def test_a_conditional_path_is_in_the_samples_where_it_applies():
    made = space(CONDITIONAL)
    assert list(made.parameters) == [SCHEDULE, WARM], "what others wait for comes first"
    assert made.suggest(First()) == {SCHEDULE: "linear", WARM: 0.0}
    assert made.suggest(First(last=True)) == {SCHEDULE: "constant"}
    assert made.active({SCHEDULE: "cosine"}, WARM) and not made.active({SCHEDULE: "constant"}, WARM)


def test_conditions_on_conditional_paths_follow_through():
    made = space(
        {
            "training.weight_decay": {"choice": [0.0, 0.1], "when": {WARM: 0.1}},
            WARM: {"choice": [0.0, 0.1], "when": {SCHEDULE: "cosine"}},
            SCHEDULE: {"choice": ["linear", "cosine"]},
        }
    )
    assert made.grid_size == 4
    assert made.grid() == [
        {SCHEDULE: "linear"},
        {SCHEDULE: "cosine", WARM: 0.0},
        {SCHEDULE: "cosine", WARM: 0.1, "training.weight_decay": 0.0},
        {SCHEDULE: "cosine", WARM: 0.1, "training.weight_decay": 0.1},
    ]
    assert len(made.check()) > 4


def test_a_condition_on_what_the_job_says_anyway():
    waiting = {**RATE, "model.lora.r": {"int": [2, 8], "when": {"model.attn_implementation": "eager"}}}
    assert list(space(waiting).parameters) == [LR]
    assert list(space(waiting, {"model": {"base": "x", "attn_implementation": "eager"}}).parameters) == [LR, "model.lora.r"]
    with pytest.raises(InputError, match="no trial could have them"):
        space({LR: {"uniform": [0.1, 0.2], "when": {LORA: {"r": 4}}}})
    assert space({LR: {"uniform": [0.1, 0.2], "when": {LORA: {"r": 4}}}}, {"model": {"base": "x", "lora": {"r": 4}}}).parameters


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({LR: {"uniform": [0.1, 0.2], "when": {"training.wram": 1}}}, "when: a job has no 'training.wram'"),
        ({**CONDITIONAL, WARM: {"uniform": [0, 0.1], "when": {SCHEDULE: "cosin"}}}, r"lr_scheduler_type"),
        ({**CONDITIONAL, WARM: {"uniform": [0, 0.1], "when": {SCHEDULE: "polynomial"}}}, "is never 'polynomial'; it is one of"),
        ({**RATE, WARM: {"uniform": [0, 0.1], "when": {LR: 1e-4}}}, "is loguniform, so no trial has exactly 0.0001"),
        ({LORA: {"choice": [None, {}]}, WARM: {"uniform": [0, 0.1], "when": {"model.lora.r": 8}}}, "overlaps with model.lora"),
        (
            {WARM: {"choice": [0.0, 0.1], "when": {SCHEDULE: "linear"}}, SCHEDULE: {"choice": ["linear", "cosine"], "when": {WARM: 0.0}}},
            "depend on each other by their `when`, in a circle",
        ),
    ],
)
def test_a_condition_that_can_not_hold_is_a_sentence(given, sentence):
    with pytest.raises(InputError, match=sentence):
        space(given)


# ---- samples ---------------------------------------------------------------------------------------------------
def test_the_default_and_the_known_points_come_first_and_complete():
    made = space(
        {**RATE, LORA: {"choice": [None, {"r": 4}]}, BATCH: {"choice": [16, 32]}},
        {"training": {"learning_rate": 2e-4}},
        start=[{LORA: {"r": 4}}, {LR: 1e-5}, {LR: 2e-4}],
    )
    default = {LR: 2e-4, LORA: None, BATCH: 32}
    assert made.points() == [default, {**default, LORA: {"r": 4}}, {**default, LR: 1e-5}], "the last start is the default again"
    assert space(RATE, include_default=False, start=[{LR: 1e-4}]).points() == [{LR: 1e-4}]


def test_the_jobs_own_value_is_written_as_the_choice_that_it_is():
    made = space({LORA: {"choice": [None, {"r": 4}]}}, {"model": {"base": "x", "lora": {"r": 4}}})
    assert made.points() == [{LORA: {"r": 4}}]


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        ({LR: 1.0}, r"search\.start\[0\]: training\.learning_rate is 1\.0, outside the space: loguniform: \[1e-05, 0\.001\]"),
        ({LORA: {"r": 8}}, "outside the space: one of"),
        ({"training.seed": 1}, "'training.seed' is not in search.space"),
        ({"training.learning_rat": 1e-4}, "Did you mean 'training.learning_rate'?"),
        ({LR: "fast"}, "is no valid job: training.learning_rate"),
        ({SCHEDULE: "constant", WARM: 0.1}, "applies only when training.lr_scheduler_type is"),
    ],
)
def test_a_start_outside_the_space_is_a_sentence(start, sentence):
    with pytest.raises(InputError, match=sentence):
        space({**RATE, **CONDITIONAL, LORA: {"choice": [None, {"r": 4}]}}, start=[start])


def test_more_known_points_than_trials_are_refused():
    with pytest.raises(InputError, match="num_trials is 2, and 3 known settings run first"):
        space(RATE, num_trials=2, start=[{LR: 1e-5}, {LR: 1e-4}])


def test_each_distribution_asks_optuna_for_what_it_is():
    made = space(
        {
            **RATE,
            "training.weight_decay": {"uniform": [0, 0.1]},
            "training.num_train_epochs": {"quniform": [1, 3.2, 0.5]},
            "training.warmup_steps": {"int": [0, 10]},
            "model.lora.r": {"logint": [2, 64]},
            BATCH: {"choice": [16, 32]},
        }
    )
    low, high = First(), First(last=True)
    assert made.suggest(low) == dict(zip(made.parameters, [1e-5, 0, 1, 0, 2, 16], strict=True))
    assert made.suggest(high) == dict(zip(made.parameters, [1e-3, 0.1, 3.0, 10, 64, 32], strict=True))
    assert low.asked == dict(
        zip(
            made.parameters,
            [(1e-5, 1e-3, None, True), (0, 0.1, None, False), (1, 3, 0.5, False), (0, 10, False), (2, 64, True), [0, 1]],
            strict=True,
        )
    )
    for path, value in made.suggest(high).items():
        assert made.contains(path, value)
    assert not made.contains("training.num_train_epochs", 1.2) and not made.contains("training.warmup_steps", 1.5)
    assert not made.contains(BATCH, True) and not made.contains("training.warmup_steps", False)


def test_a_grid_has_every_combination_once():
    made = space({BATCH: {"choice": [16, 32]}, "training.num_train_epochs": {"quniform": [0.1, 0.4, 0.1]}}, algorithm="grid", num_trials=9)
    grid = made.grid()
    assert len(grid) == made.grid_size == 8
    assert grid[2] == {BATCH: 16, "training.num_train_epochs": 0.3}, "without the dust of binary fractions"
    assert space(RATE).grid_size is None
    with pytest.raises(InputError, match="endless settings, so there is no grid"):
        space(RATE).grid()


# ---- jobs ------------------------------------------------------------------------------------------------------
def test_a_trials_job_is_the_job_with_the_sample_set():
    made = space({**RATE, LORA: {"choice": [None, {"r": 4}]}}, metric="f1_macro", workers_per_trial=2)
    one = made.apply({LR: 1e-4, LORA: {"r": 4}})
    assert (one.training.learning_rate, one.model.lora and one.model.lora.r, one.search) == (1e-4, 4, None)
    assert (one.training.metric_for_best_model, one.resources.num_workers) == ("f1_macro", 2)
    assert pickle.loads(pickle.dumps(made)) == made
    assert made.key({LR: 1e-4, LORA: None}) == made.key({LORA: None, LR: 1e-4}) != made.key({LR: 1e-5, LORA: None})


@pytest.mark.parametrize(
    ("given", "sections", "sentence"),
    [
        ({LR: {"uniform": [-1, 1]}}, {}, r"training\.learning_rate: -1\.0\} is no valid job: training\.learning_rate: .*greater than 0"),
        ({"training.label_smoothing_factor": {"uniform": [0, 1.5]}}, {}, r"label_smoothing_factor: 1\.5\}"),
        ({LORA: {"choice": [None, {"rr": 4}]}}, {}, "unknown key 'model.lora.rr'. Did you mean 'r'"),
        ({"training.precision": {"choice": ["fp32", "bf17"]}}, {}, "'bf17'"),
        ({BATCH: {"choice": [16, 32]}}, {"training": {"per_device_train_batch_size": 8}}, "give one of them"),
        (
            {"task.problem": {"choice": ["single-label", "regression"]}},
            {},
            "'accuracy' is no metric of every trial",
        ),
    ],
)
def test_bounds_are_probed_before_anything_starts(given, sections, sentence):
    with pytest.raises(InputError, match=sentence):
        space(given, sections).check()


def test_what_is_wrong_only_together_is_found():
    both = {BATCH: {"choice": [16, 32]}, "training.per_device_train_batch_size": {"choice": [8, 16]}}
    with pytest.raises(InputError, match="give one of them"):
        space(both).check()


def test_variants_of_the_data_are_few_and_distinct():
    made = space({**RATE, "task.max_length": {"choice": [64, 128]}, "task.class_weights": {"choice": ["none", "balanced"]}})
    variants = made.data_variants()
    assert [(one.task.max_length, one.task.class_weights) for one in variants] == [  # type: ignore[attr-defined]
        (None, "none"), (64, "none"), (64, "balanced"), (128, "none"), (128, "balanced"),
    ]  # fmt: skip
    assert data_key(made.apply({**dict.fromkeys([LR], 1e-4), "task.max_length": 64})) == data_key(variants[1])
    assert len(space(RATE).data_variants()) == 1
    with pytest.raises(InputError, match=r"make 5 different preparations of the data.*more than the 4 trials"):
        space({"task.max_length": {"choice": [64, 128]}, "task.class_weights": {"choice": ["none", "balanced"]}}, num_trials=4).check()


# ---- lengths ---------------------------------------------------------------------------------------------------
def test_lengths_are_those_of_the_longest_trial():
    made = space({**RATE, "training.num_train_epochs": {"choice": [1, 4]}})
    assert made.most_examples(100) == 400
    assert made.report_every(100) == pytest.approx(4 / 9)
    assert space(RATE, {"training": {"num_train_epochs": 27}}).report_every(100) == 1.0, "at least once an epoch"
    assert space(RATE, report_every=0.5).report_every(100) == 0.5
    steps = space({**RATE, BATCH: {"choice": [8, 64]}}, {"training": {"max_steps": 10}})
    assert steps.most_examples(100) == 640
    assert steps.report_every(1000) == pytest.approx(0.64 / 9)


# ---- metric, algorithm, scheduler ------------------------------------------------------------------------------
def test_objectives_know_their_direction():
    assert space(RATE).objectives == (("accuracy", True),)
    assert space(RATE, {"training": {"metric_for_best_model": "eval_loss"}}).objectives == (("loss", False),)
    assert space(RATE, metric=["f1_macro", "loss"], scheduler="none").objectives == (("f1_macro", True), ("loss", False))
    assert space(RATE, metric="f1/spam").objectives == (("f1/spam", True),)
    assert space(RATE, {"task": {"name": "text-classification", "problem": "regression"}}, metric="mae").objectives == (("mae", False),)


PBT = {LR: {"loguniform": [1e-5, 1e-3]}, "training.weight_decay": {"uniform": [0, 0.1]}}


@pytest.mark.parametrize(
    ("given", "search", "sentence"),
    [
        (RATE, {"metric": "f1_makro"}, "the task has no metric 'f1_makro'. Did you mean 'f1_macro'?"),
        (RATE, {"metric": ["loss", "loss"], "scheduler": "none"}, "names 'loss' twice"),
        (RATE, {"metric": ["accuracy", "loss"]}, "asha stops trials by one metric, and search.metric has 2; set scheduler: none"),
        (RATE, {"metric": ["accuracy", "loss"], "scheduler": "none", "algorithm": "cmaes"}, "cmaes knows one metric only"),
        (RATE, {"algorithm": "grid"}, "a grid needs a list of values, and loguniform has endless ones"),
        (
            {BATCH: {"int": [1, 50]}},
            {"algorithm": "grid"},
            "num_trials is 20, and the grid of this space has 50 settings; set num_trials: 50",
        ),
        (
            {BATCH: {"choice": [16, 64]}, **RATE},
            {"algorithm": "cmaes"},
            "cmaes moves in a space of numbers, and .*global_batch_size is a choice",
        ),
        ({**CONDITIONAL}, {"algorithm": "cmaes"}, "use tpe"),
        (RATE, {"algorithm": "cmaes"}, "at least two paths"),
        (RATE, {"algorithm": "bohb"}, "bohb works with scheduler: hyperband only, not with asha"),
        (RATE, {"scheduler": "hyperband", "workers_per_trial": 2}, "hyperband pauses trials .*set workers_per_trial: 1"),
        (PBT, {"scheduler": "pbt", "workers_per_trial": 2}, "pbt pauses trials"),
        ({**PBT, BATCH: {"choice": [16, 32]}}, {"scheduler": "pbt"}, "global_batch_size can't change in the middle of a training"),
        ({**RATE, "training.weight_decay": {"choice": [0.0, 0.1]}}, {"scheduler": "pb2"}, "pb2 needs ranges of numbers"),
        (PBT, {"scheduler": "pbt", "algorithm": "cmaes"}, "cmaes has nothing to propose"),
        (PBT, {"scheduler": "pbt", "algorithm": "grid"}, "endless ones|nothing to propose"),
        (PBT, {"scheduler": "pbt", "num_trials": 1}, "moves weights between trials"),
        (
            RATE,
            {"report_every": 3},
            r"report_every: 3 epochs, and a trial has at most 3: it has one validation only, so asha can't do anything",
        ),
        (RATE, {"grace": 5}, "ends before that"),
        (PBT, {"scheduler": "pbt", "perturb_every": 4}, "ends before that"),
        (RATE, {"replay": "schedule.jsonl"}, "set scheduler: pbt"),
    ],
)
def test_what_can_not_work_together_is_a_sentence(given, search, sentence):
    with pytest.raises(InputError, match=sentence):
        space(given, **search)


def test_a_metric_that_differs_from_that_of_the_best_checkpoint_is_refused():
    with pytest.raises(InputError, match="leave one of them out"):
        space(RATE, {"training": {"metric_for_best_model": "loss"}}, metric="f1_macro")


def test_only_a_population_has_mutable_paths():
    assert space(PBT, scheduler="pbt").mutable == (LR, "training.weight_decay")
    assert space(PBT).mutable == ()


def test_a_job_without_a_search_has_no_space():
    with pytest.raises(InputError, match="no search section"):
        Space.of(job(RATE).model_copy(update={"search": None}))
