import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from orchestrator import models
from orchestrator.config import ModelSection
from orchestrator.errors import InputError
from orchestrator.tasks.base import Task
from tests.unit import tiny


class Classify(Task):
    key: ClassVar[str] = "classify"

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True, **options)


class Segment(Task):
    key: ClassVar[str] = "segment"

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        from transformers import AutoModelForSemanticSegmentation

        return AutoModelForSemanticSegmentation.from_pretrained(base, **options)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An encoder without a head, in half precision."""
    tiny.bert().bert.half().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def section(base: Any, **given: Any) -> ModelSection:
    return ModelSection.parse({"base": str(base)} | given)


def test_weights_are_fp32_and_new_ones_are_named_and_the_same_each_time(
    base: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        one = models.load(Classify(), section(base), precision="bf16")
    assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}
    assert "2 weights of the model are new and start from seed 42: classifier.weight, classifier.bias" in caplog.text
    assert capfd.readouterr() == ("", "")
    torch.manual_seed(123)
    again = models.load(Classify(), section(base), precision="fp32")
    assert tiny.differ(tiny.weights(one), tiny.weights(again)) == 0
    other = models.load(Classify(), section(base), precision="fp32", seed=7)
    assert not torch.equal(other.classifier.weight, one.classifier.weight)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def test_a_head_of_another_size_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.bert().save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        models.load(Classify(), section(tmp_path), precision="fp32")
    assert "classifier.weight, classifier.bias" in caplog.text


def test_lora_trains_adapters_and_head_and_merges_to_a_plain_model(base: Path, tmp_path: Path) -> None:
    model = models.load(Classify(), section(base, lora={"r": 2}), precision="fp32")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert any("lora_A" in name and "attention.self.query" in name for name in trained)
    assert [name for name in trained if "classifier" in name and "lora_" in name] == []
    assert len([name for name in trained if "modules_to_save" in name]) == 2
    before = tiny.weights(model)
    stream = tiny.Batches(tiny.rows(32), 8)
    tiny.run(model, stream, tmp_path / "run", tiny.settings(num_train_epochs=2, learning_rate=1e-2))
    changed = {name for name, weight in tiny.weights(model).items() if not torch.equal(weight, before[name])}
    assert changed == trained
    batch = tiny.Tiny().collate(stream.examples[:4], None)
    del batch["labels"]
    expected = model.eval()(**batch).logits
    plain = models.merged(model)
    assert type(plain).__name__ == "BertForSequenceClassification"
    assert not [name for name in plain.state_dict() if "lora" in name or "modules_to_save" in name]
    assert torch.allclose(plain(**batch).logits, expected, atol=1e-5)
    assert models.merged(plain) is plain


def test_a_lora_run_continues(base: Path, tmp_path: Path) -> None:
    section_, given = tiny.settings(save_steps=2), section(base, lora={"r": 2, "dropout": 0.1})
    stream = tiny.Batches(tiny.rows(37), 8)
    whole = models.load(Classify(), given, precision="fp32")
    history = tiny.run(whole, stream, tmp_path / "whole", section_)

    def die(step: int, ids: list[str]) -> None:
        if step == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tiny.run(models.load(Classify(), given, precision="fp32"), stream, tmp_path / "run", section_, on_rows=die)
    again = models.load(Classify(), given, precision="fp32")
    rest = tiny.run(again, stream, tmp_path / "run", section_)
    assert [(progress.step, progress.loss) for progress in rest] == [(progress.step, progress.loss) for progress in history[2:]]
    assert tiny.differ(tiny.weights(whole), tiny.weights(again)) == 0
    saved = (tmp_path / "run" / "checkpoints" / "step-00000005" / "model.safetensors").stat().st_size
    assert saved < (base / "model.safetensors").stat().st_size


def test_targets_that_are_not_there(base: Path) -> None:
    with pytest.raises(InputError, match=r"BertForSequenceClassification has no module 'querry'\. Did you mean 'query'\?"):
        models.load(Classify(), section(base, lora={"target_modules": ["querry"]}), precision="fp32")


def test_a_base_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no folder '/no/such/model'"):
        models.resolve("/no/such/model")
    with pytest.raises(InputError, match=r"has no config\.json"):
        models.resolve(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/no-such-model' is neither a folder here nor a model that the hub gave"):
        models.resolve("nobody/no-such-model")


def test_a_model_without_such_a_head(base: Path) -> None:
    with pytest.raises(InputError, match="no head for the task 'segment': AutoModelForSemanticSegmentation knows no BertConfig"):
        models.load(Segment(), section(base), precision="fp32")


def test_pickled_weights_are_refused(base: Path) -> None:
    weights = tiny.bert().bert.state_dict()
    torch.save(weights, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"only as a pickle \(pytorch_model\.bin\).*only safetensors"):
        models.load(Classify(), section(base), precision="fp32")


def test_damaged_weights(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="can't be loaded"):
        models.load(Classify(), section(base), precision="fp32")


def test_precision_is_what_the_hardware_does_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert models.hardware_precision("auto") == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert models.hardware_precision("auto") == "bf16"
    assert models.hardware_precision("fp32") == "fp32"
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        models.hardware_precision("fp16")
