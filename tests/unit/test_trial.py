"""A trial of a sweep in this process, without Tune: what it computes, what it leaves, and how it goes on from anywhere."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import bundle, checkpoints, loop, models, step
from orchestrator.config import JobConfig
from orchestrator.errors import Diverged, InputError, StageError
from orchestrator.predictor import Predictor
from orchestrator.search import trial, warm
from orchestrator.search.space import Space, data_key
from orchestrator.search.sweep import Sweep, note_out_of_memory, read_state
from orchestrator.storage import Folder
from tests.fixtures.tiny import text_base
from tests.ray.conftest import WORDS, write_reviews

ROWS, BATCH, EPOCHS = 111, 16, 2
STEPS = 7  # an epoch
RATE = "training.learning_rate"
EVERY = 2 / STEPS
"""Epochs between reports: two steps."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With dropout, so that what a process has drawn before would show."""
    folder = Path(text_base(tmp_path_factory.mktemp("base"), WORDS))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.2}))
    return str(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_reviews(tmp_path_factory.mktemp("reviews"), [70, 41], 30)


@pytest.fixture
def sweep(base: str, prepared: Any, tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    """`sweep("asha", training={...})`: of the tiny model, in a folder of its own by name."""

    def make(scheduler: str = "asha", name: str = "sweep", space: dict[str, Any] | None = None, **training: Any) -> Sweep:
        population = scheduler in ("pbt", "pb2")
        space = space or {RATE: {"loguniform": [1e-5, 1e-1]}} | (
            {} if population else {"model.lora": {"choice": [None, {"r": 4}]}, "training.seed": {"choice": [1, 2, 42]}}
        )
        given = {"learning_rate": 2e-3, "num_train_epochs": EPOCHS, "global_batch_size": BATCH, "precision": "fp32", **training}
        job = JobConfig.parse(
            {
                "task": prepared.task.to_json(),
                "model": {"base": base},
                "data": {"train": "unused.csv"},
                "training": given,
                "search": {"space": space, "scheduler": scheduler, "algorithm": "random"},
            }
        )
        made = Space.of(job)
        return Sweep(job, made, Folder(str(tmp_path / name)), {data_key(job): prepared for job in made.data_variants()}, EVERY)

    warm.forget()
    yield make
    warm.forget()


class Ear:
    """Takes a trial's reports as Tune does, and stops it after so many."""

    def __init__(self, most: int | None = None):
        self.heard: list[dict[str, Any]] = []
        self.pointers: list[dict[str, Any] | None] = []
        self._most = most

    def __call__(self, values: dict[str, Any], pointer: dict[str, Any] | None) -> None:
        self.heard.append(values)
        self.pointers.append(pointer)
        if len(self.heard) == self._most:
            raise SystemExit(0)


def config(sample: dict[str, Any], number: int = 3) -> dict[str, Any]:
    return {"sample": sample, "number": number, "origin": "search"}


def go(sweep: Sweep, sample: dict[str, Any], *, number: int = 3, most: int | None = None, pointer: Any = None) -> tuple[Ear, Folder]:
    ear = Ear(most)
    try:
        trial.run(sweep, config(sample, number), trial_id="t", report=ear, pointer=pointer)
    except SystemExit:
        assert most is not None
    return ear, sweep.trial_folder(config(sample, number))


def history(folder: Folder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_bytes().splitlines()]


def losses(folder: Folder) -> list[float]:
    lines = history(folder)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def scores(ear: Ear) -> list[tuple[Any, ...]]:
    return [(one["step"], one["examples"], one["loss"], one["accuracy"], one["best_step"]) for one in ear.heard]


def test_a_trial_reports_by_the_sweeps_clock_and_is_the_same_first_or_fifth_in_a_process(
    sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_trials_run", 0)
    plain, adapted = {RATE: 3e-3, "model.lora": None}, {RATE: 1e-2, "model.lora": {"r": 4}}
    first = {name: go(sweep(name=f"first-{name}"), sample) for name, sample in (("plain", plain), ("adapted", adapted))}
    for seed in (1, 2):
        torch.manual_seed(seed)
        go(sweep(name=f"{seed}"), {RATE: 1e-2, "model.lora": None, "training.seed": seed})
    again = {name: go(sweep(name=f"again-{name}"), sample) for name, sample in (("adapted", adapted), ("plain", plain))}
    for name, (ear, folder) in first.items():
        assert losses(folder) == losses(again[name][1])
        assert scores(ear) == scores(again[name][0])
    assert losses(first["plain"][1]) != losses(first["adapted"][1])
    ear, folder = first["plain"]
    assert [one["step"] for one in ear.heard] == [2, 4, 6, 8, 10, 12, 14]
    assert [one["examples"] for one in ear.heard] == [round(number / STEPS * ROWS) for number in (2, 4, 6, 8, 10, 12, 14)]
    assert ear.heard[-1]["examples"] == EPOCHS * ROWS
    assert ear.pointers == [None] * 7
    assert not ear.heard[0]["warm"]
    assert again["plain"][0].heard[0]["warm"]
    assert ["first_step_seconds" in one for one in ear.heard] == [True] + [False] * 6
    assert 0 < ear.heard[0]["setup_seconds"] < ear.heard[0]["first_step_seconds"] <= ear.heard[0]["seconds"]
    assert ear.heard[1]["train_loss"] == pytest.approx(sum(losses(folder)[2:4]) / 2)
    best = max(ear.heard, key=lambda one: one[sweep().objective])
    assert ear.heard[-1]["best_value"] == best[sweep().objective]
    state = read_state(folder)
    assert state is not None
    assert (state["status"], state["number"], state["sample"], state["attempts"]) == ("done", 3, plain, 1)
    assert JobConfig.parse((folder / "job.json").read_json()).training.learning_rate == 3e-3


def test_it_computes_what_the_loop_computes_with_a_model_of_its_own(
    sweep: Callable[..., Sweep], prepared: Any, base: str, tmp_path: Path
) -> None:
    """Nothing that is kept between trials takes part: the model is loaded, the rows are encoded anew."""
    from orchestrator import processors
    from orchestrator.data.resident import Resident, ResidentStream
    from orchestrator.data.stream import Encoding

    sample = {RATE: 3e-3, "model.lora": {"r": 4}}
    for lora in (None, {"r": 8}):
        go(sweep(name=f"{lora}"), {RATE: 1e-2, "model.lora": lora} if lora is None else sample)
    _, folder = go(sweep(), sample)
    job = sweep().job_of(sample)
    processor = processors.load(base, "text")
    split = Resident.read(Encoding.of(prepared, "train", processor, rank=0, world=1))
    assert isinstance(split, Resident)
    rows = ResidentStream(split, seed=job.training.seed, global_batch=BATCH, group_by_length=True)
    steps = loop.train(
        prepared.task, models.load(prepared.task, job.model, precision="fp32", seed=job.training.seed), processor, job.training, rows,
        folder=Folder(str(tmp_path / "alone")), validate=None, global_batch_size=BATCH, identity="alone", checkpoint=job.checkpoint,
    )  # fmt: skip
    assert [progress.loss for progress in steps] == losses(folder)


@pytest.mark.parametrize("after", [1, 3])
def test_a_stopped_trial_writes_no_more_and_goes_on_as_if_it_had_not_been(sweep: Callable[..., Sweep], after: int) -> None:
    sample = {RATE: 3e-3, "model.lora": None}
    whole, never = go(sweep(name="never"), sample)
    ear, folder = go(sweep(), sample, most=after)
    assert scores(ear) == scores(whole)[:after]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    state = read_state(folder)
    assert state is not None
    assert state["status"] == "stopped"
    saved = checkpoints.at(folder, ear.heard[-1]["best_step"])
    assert saved is not None
    assert saved.state["best"]["step"] == ear.heard[-1]["best_step"]
    rest, folder = go(sweep(), sample)
    assert scores(rest) == scores(whole)  # what it had reported up to its checkpoint, then the rest
    assert losses(folder) == losses(never)
    state = read_state(folder)
    assert state is not None
    assert (state["status"], state["attempts"]) == ("done", 2)
    assert state["seconds"] > ear.heard[-1]["seconds"]


def test_a_finished_trial_reports_again_and_does_nothing_else(sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {RATE: 3e-3, "model.lora": None}
    ear, _ = go(sweep(), sample)
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("it was trained again"))
    again, _ = go(sweep(), sample)
    assert again.heard == ear.heard


def test_a_member_of_a_population_takes_over_weights_moments_and_standing(sweep: Callable[..., Sweep]) -> None:
    strong, weak = {RATE: 3e-3}, {RATE: 1e-5}
    whole, never = go(sweep("pbt", "never"), strong, number=1)
    ours = sweep("pbt")
    taught, teacher = go(ours, strong, number=1, most=3)
    assert taught.pointers == [{"folder": teacher.uri, "step": number} for number in (2, 4, 6)]
    _, own = go(ours, weak, number=2, most=2)
    assert losses(own) != losses(never)[:4]
    pointer = taught.pointers[2]
    rest, folder = go(ours, strong, number=2, pointer=pointer)
    assert folder == own
    assert losses(folder) == losses(never)
    assert scores(rest) == scores(whole)[3:]
    assert {one["parent"] for one in rest.heard} == {"member-001"}
    before, other = go(ours, {RATE: 2e-2}, number=3, pointer=pointer, most=2)
    assert losses(other)[:7] == losses(never)[:7]  # the seventh loss is that of the weights taken over
    assert losses(other)[7] != losses(never)[7]
    linked = Path(other.path) / "checkpoints" / f"step-{taught.heard[-1]['best_step']:08d}" / "model.safetensors"
    assert linked.stat().st_nlink > 1
    assert {one["best_step"] for one in before.heard} <= {taught.heard[-1]["best_step"], 8, 10}
    # Tune may know of no later checkpoint than the one taken over: it is not taken again
    after, _ = go(ours, {RATE: 2e-2}, number=3, pointer=pointer)
    assert [one["step"] for one in after.heard] == [8, 10, 12, 14]
    assert scores(after)[:2] == scores(before)


def test_a_checkpoint_that_its_run_has_left_behind_is_replaced_by_a_later_one(sweep: Callable[..., Sweep]) -> None:
    ours = sweep("pbt")
    _, teacher = go(ours, {RATE: 3e-3}, number=1)
    rest, _ = go(ours, {RATE: 1e-3}, number=2, pointer={"folder": teacher.uri, "step": 1})
    assert [one["step"] for one in rest.heard] == []  # that was the last one
    (teacher / "checkpoints").delete()
    with pytest.raises(StageError, match=r"no complete checkpoint of step 1 or later in '.*member-001'"):
        go(ours, {RATE: 1e-3}, number=4, pointer={"folder": teacher.uri, "step": 1})


def test_a_paused_trial_reports_nothing_twice(sweep: Callable[..., Sweep]) -> None:
    ours = sweep("hyperband")
    sample = {RATE: 3e-3, "model.lora": None}
    ear, _ = go(ours, sample, most=3)
    rest, _ = go(ours, sample, pointer=ear.pointers[-1])
    assert [one["step"] for one in ear.heard + rest.heard] == [2, 4, 6, 8, 10, 12, 14]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`small_memory(tokens)`: a micro-batch of more padded tokens does not fit, from the tenth step on."""

    def arrange(tokens: int) -> None:
        inner = step.Stepper.step

        def strained(self: Any, number: int, share: Any) -> Any:
            if number >= 10 and self.tokens > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return inner(self, number, share)

        monkeypatch.setattr(step.Stepper, "step", strained)

    return arrange


def test_where_memory_runs_out_the_micro_batch_is_halved_and_nothing_else_changes(
    sweep: Callable[..., Sweep], small_memory: Callable[[int], None]
) -> None:
    sample = {RATE: 3e-3, "model.lora": None}
    whole, never = go(sweep(name="never"), sample)
    small_memory(step.CPU_TOKENS // 4)
    ear, folder = go(sweep(), sample)
    assert [one["step"] for one in ear.heard] == [2, 4, 6, 8, 10, 12, 14]
    assert [one["micro_batch_halvings"] for one in ear.heard] == [0, 0, 0, 0, 2, 2, 2]
    assert losses(folder) == pytest.approx(losses(never), abs=1e-5)
    assert [one["accuracy"] for one in ear.heard] == [one["accuracy"] for one in whole.heard]
    state = read_state(folder)
    assert state is not None
    assert (state["halvings"], state["status"]) == (2, "done")
    replayed, _ = go(sweep(), sample)
    # Not the seconds: what was validated before the halving may have been validated again after it.
    assert [(one["step"], one["accuracy"]) for one in replayed.heard] == [(one["step"], one["accuracy"]) for one in ear.heard]


def test_a_process_killed_for_memory_starts_smaller_and_five_halvings_are_the_end(
    sweep: Callable[..., Sweep], small_memory: Callable[[int], None]
) -> None:
    sample = {RATE: 3e-3, "model.lora": None}
    _, folder = go(sweep(), sample, most=1)
    assert [note_out_of_memory(folder), note_out_of_memory(folder)] == [1, 2]
    small_memory(1)
    with pytest.raises(
        StageError, match=rf"^Memory ran out, with micro-batches of {step.CPU_TOKENS >> 5} padded tokens too: OutOfMemoryError"
    ):
        go(sweep(), sample)
    state = read_state(folder)
    assert state is not None
    assert (state["halvings"], state["status"]) == (3, "failed")


def test_a_training_that_leaves_the_numbers_fails_with_a_line_and_is_not_tried_again(
    sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = sweep(space={RATE: {"loguniform": [1e-3, 1e38]}}, warmup_ratio=0, max_grad_norm=0)
    with pytest.raises(Diverged, match=r"^The (loss|gradient) became .* in the rows train-") as raised:
        go(ours, {RATE: 1e38})
    folder = ours.trial_folder(config({RATE: 1e38}))
    assert "Traceback" in (folder / "failure.log").read_bytes().decode()
    state = read_state(folder)
    assert state is not None
    assert (state["status"], state["error"]) == ("failed", str(raised.value))
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("it was trained again"))
    with pytest.raises(Diverged, match=r"^The (loss|gradient) became"):
        go(ours, {RATE: 1e38})


def test_another_failure_is_one_line_and_is_tried_again(sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {RATE: 3e-3, "model.lora": None}
    with monkeypatch.context() as patched:
        patched.setattr(step.Stepper, "step", lambda *_: (_ for _ in ()).throw(OSError(5, "the disk\nis gone")))
        with pytest.raises(StageError, match=r"^OSError: \[Errno 5\] the disk is gone$") as raised:
            go(sweep(), sample)
    assert raised.value.__cause__ is None
    ear, _ = go(sweep(), sample)
    assert len(ear.heard) == 7


def test_an_objective_that_is_no_number_fails_the_trial(
    sweep: Callable[..., Sweep], prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = type(prepared.task).score
    name = sweep().objective
    monkeypatch.setattr(type(prepared.task), "score", lambda *args: {**score(*args), name: float("nan")})
    with pytest.raises(Diverged, match=rf"^The validation at step 2 gave {name} = nan"):
        go(sweep(), {RATE: 3e-3, "model.lora": None})


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_bundle_has_the_weights_of_the_step_that_was_asked_for(sweep: Callable[..., Sweep], prepared: Any, lora: Any) -> None:
    ours, sample = sweep(learning_rate=5e-2), {RATE: 3e-2, "model.lora": lora}
    ear, folder = go(ours, sample, most=6)
    best = ear.heard[-1]["best_step"]
    record = trial.write_bundle(ours, folder, best)
    reported = next(one for one in ear.heard if one["step"] == best)
    assert record.metrics == {name: reported[name] for name in record.metrics}
    assert (record.best_step, record.steps, record.num_workers, record.global_batch_size) == (best, 12, 1, BATCH)
    assert record.rows_seen == ROWS + 5 * BATCH
    made = bundle.load(record.bundle)
    assert made.lineage["search"] == {"folder": ours.folder.uri, "trial": "t", "number": 3, "sample": sample}
    assert (made.lineage["run"], made.lineage["best_step"]) == (ours.job.run_id, best)
    rows = [row for chunk in warm_rows(ours, prepared) for _, row, _ in chunk]
    found = prepared.task.score(Predictor(made, precision="fp32")(rows), rows)
    assert found["accuracy"] == pytest.approx(reported["accuracy"])
    with pytest.raises(StageError, match=r"The checkpoint of step 1 of the trial in .* is gone"):
        trial.write_bundle(ours, folder, 1)


def warm_rows(sweep: Sweep, prepared: Any) -> Any:
    from orchestrator.data.resident import ResidentRows

    return ResidentRows(warm.split(prepared, "validation", sweep.job.model, with_rows=True))


def test_the_job_of_a_trial_is_timed_and_judged_by_the_sweep(sweep: Callable[..., Sweep]) -> None:
    ours = sweep(space={"training.global_batch_size": {"choice": [8, 16, 111]}}, metric_for_best_model="f1/bad")
    for batch, every in ((8, 4), (16, 2), (111, 1)):
        settings = ours.job_of({"training.global_batch_size": batch}).training
        assert (settings.eval_steps, settings.metric_for_best_model) == (every, "f1/bad")
        assert settings.save_steps is not None
        assert settings.save_steps % every == 0
    member = sweep("pbt").job_of({RATE: 1e-3})
    assert (member.training.save_steps, member.checkpoint.keep) == (2, 2)
    ours = sweep("pbt")
    assert ours.identity(ours.job_of({RATE: 1e-3})) == ours.identity(ours.job_of({RATE: 1e-2}))
    assert sweep().identity(sweep().job_of({RATE: 1e-3})) != sweep().identity(sweep().job_of({RATE: 1e-2}))


def test_without_validation_rows_there_is_nothing_to_compare(sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    ours = sweep()
    ours.prepared[next(iter(ours.prepared))] = write_reviews(tmp_path / "few", [20])
    with pytest.raises(InputError, match=r"There are no validation rows to compare trials by; set data\.validation"):
        ours.job_of({})
