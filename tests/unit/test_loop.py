import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import CheckpointSection
from orchestrator.errors import InputError, StageError
from tests.unit import tiny

ROWS = 37  # With batches of 8 the last one has 5 rows.


def losses(history: list[Any]) -> list[float]:
    return [progress.loss for progress in history]


@pytest.mark.parametrize("large_embedding", [1, 1 << 20])
def test_same_losses_and_weights_as_transformers_trainer(tmp_path: Path, large_embedding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer, TrainingArguments

    monkeypatch.setattr("orchestrator.step.LARGE_EMBEDDING", large_embedding)

    examples = tiny.rows(40)
    ours = tiny.bert()
    section = tiny.settings(num_train_epochs=2, warmup_ratio=0.2, weight_decay=0.1, max_grad_norm=0.5, lr_scheduler_type="cosine")
    stream = tiny.Batches(examples, 8)
    stream.batch = lambda epoch, step: examples[step * 8 : step * 8 + 8]  # pyright: ignore[reportAttributeAccessIssue]
    history = tiny.run(ours, stream, tmp_path / "ours", section)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]

    theirs = tiny.bert()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=8,
        num_train_epochs=2,
        learning_rate=1e-3,
        warmup_steps=0.2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = InOrder(theirs, arguments, train_dataset=examples, data_collator=lambda batch: tiny.Tiny().collate(batch, None))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == len(history) == 10
    for one, other in zip(history, logged, strict=True):
        assert one.loss == pytest.approx(other["loss"], abs=1e-5)
        assert one.grad_norm == pytest.approx(other["grad_norm"], abs=1e-4)
        assert one.learning_rate == pytest.approx(other["learning_rate"], rel=1e-6)
    assert tiny.differ(tiny.weights(ours), tiny.weights(theirs)) < 1e-5
    assert tiny.differ(tiny.weights(ours), tiny.weights(tiny.bert())) > 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("tokens", [1, 24, 40])
def test_the_cut_into_micro_batches_changes_nothing(tmp_path: Path, tokens: int, dropout: float) -> None:
    whole, cut = tiny.bert(dropout), tiny.bert(dropout)
    stream = tiny.Batches(tiny.rows(ROWS), 8)
    one = tiny.run(whole, stream, tmp_path / "whole", tiny.settings(tokens_per_micro_batch=10_000))
    other = tiny.run(cut, stream, tmp_path / "cut", tiny.settings(tokens_per_micro_batch=tokens))
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    assert tiny.differ(tiny.weights(whole), tiny.weights(cut)) < 1e-5


def test_dropout_and_label_smoothing_take_part(tmp_path: Path) -> None:
    stream = tiny.Batches(tiny.rows(ROWS), 8)
    plain = losses(tiny.run(tiny.bert(), stream, tmp_path / "a", tiny.settings()))
    assert losses(tiny.run(tiny.bert(0.2), stream, tmp_path / "b", tiny.settings())) != pytest.approx(plain, abs=1e-3)
    smooth = losses(tiny.run(tiny.bert(), stream, tmp_path / "c", tiny.settings(label_smoothing_factor=0.1)))
    model, first = tiny.bert(), stream.batch(0, 0)
    expected, count = tiny.Tiny().loss(model, tiny.Tiny().collate(first, None), label_smoothing=0.1)
    assert smooth[0] == pytest.approx(expected.item() / count, abs=1e-6)
    assert smooth[0] != pytest.approx(plain[0], abs=1e-5)


GROUP = {"num_train_epochs": 2, "tokens_per_micro_batch": 24, "weight_decay": 0.1, "max_grad_norm": 0.5}
RESUMED = {"num_train_epochs": 2, "save_steps": 3}
PARTLY: dict[str, Any] = {
    "rows": 33,
    "model": {"dropout": 0.1},
    "freeze": 1,
    "settings": GROUP | {"layerwise_lr_decay": 0.5, "head_learning_rate": 3e-3},
}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What two workers made of each case; starting them is what takes the time."""
    place = tmp_path_factory.mktemp("group")
    interrupted(tiny.bert(dropout=0.1), place / "killed", tiny.settings(**RESUMED), after=4)
    uneven = {"rows": 33, "model": {"dropout": 0.1}, "settings": GROUP}
    return tiny.in_group(
        2,
        place / "results",
        whole={"folder": str(place / "whole"), **uneven},
        touched={"folder": str(place / "touched"), "large_embedding": 1, **uneven},
        resumed={"folder": str(place / "killed"), "rows": ROWS, "model": {"dropout": 0.1, "seed": 9}, "settings": RESUMED},
        partly={"folder": str(place / "partly"), **PARTLY},
        spoilt={"folder": str(place / "spoilt"), **uneven, "spoilt": 12} | {"settings": GROUP | {"tokens_per_micro_batch": 1}},
    )


def test_layers_learn_at_their_own_rates_also_after_a_restart(tmp_path: Path) -> None:
    """Adam's first step is the learning rate itself, whatever the gradient."""
    rates: dict[str, Any] = {"layerwise_lr_decay": 0.1, "head_learning_rate": 2e-3, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    model, before = tiny.bert(), tiny.weights(tiny.bert())
    tiny.run(model, tiny.Batches(tiny.rows(8), 8), tmp_path / "one", tiny.settings(**rates, adam_epsilon=1e-12))
    moved = {name: float((weight - before[name]).abs().max()) for name, weight in tiny.weights(model).items()}
    for name, rate in {
        "classifier.weight": 2e-3,
        "bert.pooler.dense.weight": 1e-3,
        "encoder.layer.1.output": 1e-4,
        "layer.0.output": 1e-5,
    }.items():
        found = [step for weight, step in moved.items() if name in weight and "weight" in weight]
        assert found and max(found) == pytest.approx(rate, rel=0.02), name
    assert max(step for weight, step in moved.items() if "embeddings" in weight) == pytest.approx(1e-6, rel=0.1)

    given = tiny.settings(**RESUMED | rates)
    whole = tiny.bert(dropout=0.1)
    history = tiny.run(whole, tiny.Batches(tiny.rows(ROWS), 8), tmp_path / "whole", given)
    interrupted(tiny.bert(dropout=0.1), tmp_path / "killed", given, after=4)
    again = tiny.bert(dropout=0.1, seed=9)
    rest = tiny.run(again, tiny.Batches(tiny.rows(ROWS), 8), tmp_path / "killed", given)
    assert losses(rest) == losses(history)[-len(rest) :]
    assert tiny.differ(tiny.weights(whole), tiny.weights(again)) == 0


def test_two_workers_are_one_where_layers_are_frozen_or_learn_at_other_rates(
    tmp_path: Path, group: dict[str, list[dict[str, Any]]]
) -> None:
    alone = tiny.trained(0, 1, **PARTLY, folder=str(tmp_path))
    first, second = group["partly"]
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert tiny.differ(first["weights"], second["weights"]) == 0
    assert tiny.differ(first["weights"], alone["weights"]) < 1e-4
    before = tiny.weights(tiny.bert(dropout=0.1))
    changed = {name for name, weight in alone["weights"].items() if not torch.equal(weight, before[name])}
    assert changed and not [name for name in changed if "embeddings" in name or "layer.0" in name]


@pytest.mark.parametrize("case", ["whole", "touched"])
def test_two_workers_are_one(tmp_path: Path, group: dict[str, list[dict[str, Any]]], case: str) -> None:
    """33 rows in batches of 8: the last step has one row, and the second worker nothing of its own. `touched`: embeddings by rows."""
    alone = tiny.bert(dropout=0.1)
    history = tiny.run(alone, tiny.Batches(tiny.rows(33), 8), tmp_path, tiny.settings(**GROUP))
    first, second = group[case]
    assert first["rows"] == second["rows"] == [progress.rows for progress in history] == [8, 8, 8, 8, 1] * 2
    assert first["losses"] == second["losses"] == pytest.approx(losses(history), abs=1e-5)
    assert first["norms"] == pytest.approx([progress.grad_norm for progress in history], abs=1e-4)
    assert tiny.differ(first["weights"], second["weights"]) == 0
    assert tiny.differ(first["weights"], tiny.weights(alone)) < 1e-4
    for epoch in (range(1, 6), range(6, 11)):
        seen = [row for result in (first, second) for step, ids in result["seen"] if step in epoch for row in ids]
        assert sorted(seen) == sorted(example["row_id"] for example in tiny.rows(33))


def test_both_workers_name_the_row_that_spoils_the_loss(group: dict[str, list[dict[str, Any]]]) -> None:
    for result in group["spoilt"]:
        assert "The loss became nan at step 2" in result["error"]
        assert "in the rows rows.csv:12. " in result["error"]


class Killed(Exception):
    pass


def interrupted(model: Any, folder: Path, section: Any, after: int, **given: Any) -> None:
    """Trains until the step after `after`, in which the process is gone."""

    def die(step: int, ids: list[str]) -> None:
        if step > after:
            raise Killed

    with pytest.raises(Killed):
        tiny.run(model, tiny.Batches(tiny.rows(ROWS), 8), folder, section, on_rows=die, **given)


def test_a_resumed_run_is_one_that_was_never_stopped(tmp_path: Path) -> None:
    section = tiny.settings(num_train_epochs=3, save_steps=4)
    never = tiny.bert(dropout=0.1)
    history = tiny.run(never, tiny.Batches(tiny.rows(ROWS), 8), tmp_path / "never", section)
    interrupted(tiny.bert(dropout=0.1), tmp_path / "killed", section, after=7)
    again = tiny.bert(dropout=0.1, seed=5)
    rest = tiny.run(again, tiny.Batches(tiny.rows(ROWS), 8), tmp_path / "killed", section)
    assert [progress.step for progress in rest] == list(range(5, 16))
    assert [progress.resumed_from for progress in rest] == [4] + [None] * 10
    assert losses(rest) == losses(history)[4:]
    assert tiny.differ(tiny.weights(never), tiny.weights(again)) == 0


def test_a_run_resumed_by_two_workers_goes_on_as_it_would(tmp_path: Path, group: dict[str, list[dict[str, Any]]]) -> None:
    never = tiny.bert(dropout=0.1)
    history = tiny.run(never, tiny.Batches(tiny.rows(ROWS), 8), tmp_path, tiny.settings(**RESUMED))
    for result in group["resumed"]:
        assert result["losses"] == pytest.approx(losses(history)[3:], abs=1e-5)
        assert tiny.differ(result["weights"], tiny.weights(never)) < 1e-4


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    section = tiny.settings(num_train_epochs=2, save_steps=2)
    keep = CheckpointSection(keep=2)
    interrupted(tiny.bert(), tmp_path, section, after=7, checkpoint=keep)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000006"
    (newest / "optimizer.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        rest = tiny.run(tiny.bert(), tiny.Batches(tiny.rows(ROWS), 8), tmp_path, section, checkpoint=keep)
    assert rest[0].resumed_from == 4
    assert "step-00000006" in rest[0].notes[0]
    assert "optimizer.safetensors is missing" in caplog.text


def test_another_jobs_checkpoint_is_refused(tmp_path: Path) -> None:
    stream = tiny.Batches(tiny.rows(ROWS), 8)
    tiny.run(tiny.bert(), stream, tmp_path, tiny.settings())
    with pytest.raises(InputError, match="belongs to another job"):
        tiny.run(tiny.bert(), stream, tmp_path, tiny.settings(), identity="another")
    with pytest.raises(InputError, match="global_batch_size 8, this run has 16"):
        tiny.run(tiny.bert(), stream, tmp_path, tiny.settings(), global_batch_size=16)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    stream = tiny.Batches(tiny.rows(ROWS), 8)
    model, again = tiny.bert(), tiny.bert(seed=3)
    history = tiny.run(model, stream, tmp_path, tiny.settings())
    only = tiny.run(again, stream, tmp_path, tiny.settings())
    assert [(progress.step, progress.resumed_from, progress.rows) for progress in only] == [(5, 5, 0)]
    assert only[0].loss == history[-1].loss
    assert tiny.differ(tiny.weights(model), tiny.weights(again)) == 0


def test_a_loss_that_is_not_finite_stops_with_the_rows(tmp_path: Path) -> None:
    model, examples = tiny.bert(), tiny.rows(ROWS)
    tiny.spoil(model, examples, 12)
    with pytest.raises(StageError, match=r"loss became nan at step 2 \(learning rate .*\), in the rows rows.csv:12\. .*learning_rate"):
        tiny.run(model, tiny.Batches(examples, 8), tmp_path, tiny.settings(tokens_per_micro_batch=1, warmup_ratio=0.0))


def scripted(values: list[float], name: str = "accuracy") -> Any:
    left = iter(values)

    def validate(model: Any) -> dict[str, float]:
        assert not model.training
        return {name: next(left), "loss": 0.5}

    return validate


def test_the_best_weights_are_kept_and_come_back(tmp_path: Path) -> None:
    model = tiny.bert()
    kept: dict[int, Any] = {}
    values = scripted([0.5, 0.9, 0.7, 0.6])

    def validate(model: Any) -> dict[str, float]:
        kept[len(kept) + 1] = tiny.weights(model)
        return values(model)

    section = tiny.settings(num_train_epochs=2, eval_steps=3, save_steps=1)
    history = tiny.run(model, tiny.Batches(tiny.rows(ROWS), 8), tmp_path, section, validate=validate)
    assert [progress.step for progress in history if progress.metrics] == [3, 6, 9, 10]
    assert [progress.step for progress in history if progress.best] == [3, 6]
    assert tiny.differ(tiny.weights(model), kept[2]) == 0
    assert tiny.differ(kept[2], kept[4]) > 1e-4
    assert [place.name for place in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000006", "step-00000010"]


def test_training_stops_early_when_nothing_improves(tmp_path: Path) -> None:
    section = tiny.settings(num_train_epochs=4, eval_steps=2, early_stopping_patience=2, early_stopping_threshold=0.05)
    history = tiny.run(
        tiny.bert(), tiny.Batches(tiny.rows(ROWS), 8), tmp_path, section, validate=scripted([0.5, 0.6, 0.62, 0.64, 0.9, 0.9])
    )
    assert [progress.step for progress in history][-1] == 8
    assert history[-1].stopped == "accuracy has not improved by more than 0.05 in 2 validations; its best is 0.64 at step 8"
    again = tiny.run(tiny.bert(), tiny.Batches(tiny.rows(ROWS), 8), tmp_path, section, validate=scripted([]))
    assert [(progress.step, progress.stopped) for progress in again] == [(8, history[-1].stopped)]


def test_a_falling_metric_is_better(tmp_path: Path) -> None:
    section = tiny.settings(num_train_epochs=2, metric_for_best_model="eval_loss")
    values = iter([{"loss": 0.3}, {"loss": 0.4}])
    history = tiny.run(tiny.bert(), tiny.Batches(tiny.rows(ROWS), 8), tmp_path, section, validate=lambda model: next(values))
    assert [progress.step for progress in history if progress.best] == [5]


def test_a_metric_that_validation_does_not_give_is_named(tmp_path: Path) -> None:
    section = tiny.settings(metric_for_best_model="f2")
    with pytest.raises(InputError, match="gives no 'f2'; it gives accuracy, loss"):
        tiny.run(tiny.bert(), tiny.Batches(tiny.rows(ROWS), 8), tmp_path, section, validate=scripted([0.5]))


@pytest.mark.parametrize(("given", "steps"), [({"max_steps": 3}, 3), ({"num_train_epochs": 0.5}, 3), ({"num_train_epochs": 1.5}, 8)])
def test_the_number_of_steps(tmp_path: Path, given: dict[str, Any], steps: int) -> None:
    history = tiny.run(tiny.bert(), tiny.Batches(tiny.rows(ROWS), 8), tmp_path, tiny.settings(**given))
    assert len(history) == history[-1].total_steps == steps
    assert history[-1].saved


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    stream = tiny.Batches(tiny.rows(ROWS), 8)
    plain = tiny.run(tiny.bert(0.1), stream, tmp_path / "a", tiny.settings())
    spared = tiny.run(tiny.bert(0.1), stream, tmp_path / "b", tiny.settings(gradient_checkpointing=True))
    assert losses(plain) == pytest.approx(losses(spared), abs=1e-5)


def test_the_model_is_given_back_as_it_was(tmp_path: Path) -> None:
    model = tiny.bert(0.1)
    kinds = [type(module) for module in model.modules()]
    attributes = set(model.__dict__)
    tiny.run(model, tiny.Batches(tiny.rows(ROWS), 8), tmp_path, tiny.settings(precision="bf16"))
    assert [type(module) for module in model.modules()] == kinds
    assert set(model.__dict__) <= attributes | {"forward"}
    assert model(torch.tensor([[1, 2]])).logits.dtype == torch.float32
    assert model.bert.encoder.layer[0].attention.self.dropout.p == 0.1


def test_a_checkpoint_that_can_not_be_written_stops_training(tmp_path: Path) -> None:
    def spoil(step: int, ids: list[str]) -> None:
        if step == 1:
            (tmp_path / "checkpoints").write_text("a file in the way")

    with pytest.raises(StageError, match="can't be written"):
        tiny.run(tiny.bert(), tiny.Batches(tiny.rows(ROWS), 8), tmp_path, tiny.settings(save_steps=2), on_rows=spoil)
