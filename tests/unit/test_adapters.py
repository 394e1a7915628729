"""LoRA around models of many families: what is trained, what stays, and that merging and reloading change no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import adapters, anatomy, freezing, models
from orchestrator.config import FreezeSection, ModelSection, TrainingSection
from orchestrator.errors import InputError
from tests.unit.families import FAMILIES, Made, saved

LORA = {
    "plain": {"r": 2},
    "dora": {"r": 2, "use_dora": True},
    "rslora": {"r": 4, "use_rslora": True, "alpha": 8},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: saved(family, tmp_path_factory.mktemp(name)) for name, family in FAMILIES.items()}


def loaded(bases: dict[str, str], name: str, **section: Any) -> tuple[Made, ModelSection, torch.nn.Module]:
    task, given = Made(family=name), ModelSection.parse({"base": bases[name], **section})
    return task, given, models.load(task, given, precision="fp32")


def logits(model: torch.nn.Module, task: Made) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**task.of.batch())["logits"]


def shaken(model: torch.nn.Module) -> None:
    """As if it had been trained: everything that is trained has moved."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn_like(weight)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", LORA)
def test_an_adapter_merges_and_reloads_to_the_same_answers(name: str, kind: str, bases: dict[str, str], tmp_path: Path) -> None:
    task, _, model = loaded(bases, name, lora=LORA[kind])
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(".lora_A." in weight for weight in trained)
    frozen = {name: weight.detach().clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    for weight in frozen:
        assert not weight.startswith("classifier") and ".lora_" not in weight
    whole = task.of.trained or task.of.new
    in_full = {anatomy.plain_name(weight) for weight in trained if ".lora_" not in weight}
    assert all(any(weight.startswith(start) for weight in in_full) for start in whole)
    before = logits(model, task)
    shaken(model)
    expected = logits(model, task)
    assert float((expected - before).abs().max()) > 1e-3
    assert all(torch.equal(weight, dict(model.named_parameters())[name]) for name, weight in frozen.items())

    adapters.save(model, tmp_path / "adapter", bases[name])
    small = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert small > 0
    merged = models.merged(model)
    assert not [weight for weight in merged.state_dict() if "lora" in weight or "modules_to_save" in weight]
    assert torch.allclose(logits(merged, task), expected, atol=2e-5)

    fresh = task.model(bases[name], dtype=torch.float32)
    again = adapters.attach(fresh, tmp_path / "adapter")
    assert torch.allclose(logits(again, task), expected, atol=1e-6)
    assert not any(weight.requires_grad for weight in again.parameters())


def test_models_without_linear_layers_get_adapters_on_convolutions(bases: dict[str, str]) -> None:
    for name, inside in {"resnet": "convolution", "mobilenet": "convolution", "convnext": "pwconv"}.items():
        _, _, model = loaded(bases, name, lora={"r": 2})
        adapted = {weight for weight, _ in model.named_parameters() if ".lora_A." in weight}
        assert adapted and all(inside in weight for weight in adapted)


def test_output_layers_and_attention_of_torch_get_none(bases: dict[str, str]) -> None:
    _, _, model = loaded(bases, "t5", lora={"r": 2})
    assert not [weight for weight, _ in model.named_parameters() if "lm_head" in weight and "lora" in weight]

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 2)
            self.dense = torch.nn.Linear(8, 8)

    assert adapters.targets(Mixed(), ModelSection.parse({"base": "x", "lora": {}}).lora, ()) == ["dense"]  # pyright: ignore[reportArgumentType]


def test_new_weights_that_are_no_module_are_trained_and_kept(tmp_path: Path) -> None:
    """Such as the embedding of a mask, or a bias that the checkpoint lacks."""
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertForSequenceClassification

    from tests.unit.families import SMALL

    BertForSequenceClassification(BertConfig(vocab_size=32, num_labels=3, **SMALL)).save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    bias = "bert.encoder.layer.1.attention.self.query.bias"
    norm = "bert.encoder.layer.0.output.LayerNorm.bias"
    save_file(
        {name: weight for name, weight in weights.items() if name not in (bias, norm)},
        tmp_path / "base" / "model.safetensors",
        {"format": "pt"},
    )
    task, bases = Made(family="bert"), {"bert": str(tmp_path / "base")}
    _, _, model = loaded(bases, "bert", lora={"r": 2})
    trained = {anatomy.plain_name(name) for name, weight in model.named_parameters() if weight.requires_grad and ".lora_" not in name}
    assert trained == {bias, norm, "classifier.weight", "classifier.bias"}
    shaken(model)
    expected = logits(model, task)
    adapters.save(model, tmp_path / "adapter", "base")
    assert load_file(tmp_path / "adapter" / adapters.LOOSE).keys() == {bias, norm}
    assert torch.allclose(logits(adapters.attach(task.model(bases["bert"]), tmp_path / "adapter"), task), expected, atol=1e-6)
    assert torch.allclose(logits(models.merged(model), task), expected, atol=1e-5)


def test_half_precision_is_only_for_what_is_frozen(bases: dict[str, str]) -> None:
    task = Made(family="bert")
    model = models.load(task, ModelSection.parse({"base": bases["bert"], "lora": {}}), precision="bf16")
    kinds = {weight.requires_grad: weight.dtype for weight in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


# ---- anatomy, freezing, rates --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_counted_and_everything_has_its_place(name: str, bases: dict[str, str]) -> None:
    task, _, model = loaded(bases, name)
    parts = anatomy.of(model)
    assert parts.layers == task.of.layers
    assert parts.depth.keys() == {weight for weight, _ in model.named_parameters()}
    assert set(parts.depth.values()) == set(range(parts.layers + 1 + bool(parts.head or _after(parts))))
    assert parts.embeddings and not parts.embeddings & parts.head
    assert all(parts.depth[weight] == parts.layers + 1 for weight in parts.head)
    assert all(any(weight.startswith(start) for weight in parts.head | {"bert.pooler.dense.bias"}) for start in task.of.new)


def _after(parts: anatomy.Anatomy) -> bool:
    return parts.layers + 1 in parts.depth.values()


def test_adapters_have_the_place_of_their_layer(bases: dict[str, str]) -> None:
    _, _, plain = loaded(bases, "bert")
    _, _, wrapped = loaded(bases, "bert", lora={"r": 2})
    one, other = anatomy.of(plain), anatomy.of(wrapped)
    assert one.layers == other.layers
    for name, depth in other.depth.items():
        assert one.depth[anatomy.plain_name(name)] == depth, name


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.new])
def test_a_frozen_backbone_trains_head_and_new_weights(name: str, bases: dict[str, str]) -> None:
    task, _, model = loaded(bases, name, freeze="backbone")
    trained = [weight for weight, value in model.named_parameters() if value.requires_grad]
    starts = (*task.of.new, *task.of.trained)
    assert trained
    assert all(weight.startswith(starts) or "masked_spec_embed" in weight for weight in trained), trained
    assert all(any(weight.startswith(start) for weight in trained) for start in starts)


def test_the_first_layers_are_frozen_with_the_embeddings(bases: dict[str, str]) -> None:
    _, _, model = loaded(bases, "bert", freeze=2)
    trained = {weight for weight, value in model.named_parameters() if value.requires_grad}
    assert not [weight for weight in trained if "embeddings" in weight or ".layer.0." in weight or ".layer.1." in weight]
    assert [weight for weight in trained if ".layer.2." in weight] and "classifier.weight" in trained
    _, _, model = loaded(bases, "wav2vec2-ctc", freeze={"layers": 1})
    trained = {weight for weight, value in model.named_parameters() if value.requires_grad}
    assert not [weight for weight in trained if "feature_extractor" in weight or "encoder.layers.0." in weight]
    assert [weight for weight in trained if "encoder.layers.1." in weight]


def test_weights_are_frozen_by_name_and_pattern(bases: dict[str, str]) -> None:
    _, _, model = loaded(bases, "bert", freeze=["embeddings", "*.attention.*", "encoder.layer.2"])
    trained = {weight for weight, value in model.named_parameters() if value.requires_grad}
    assert not [weight for weight in trained if "embeddings" in weight or "attention" in weight or ".layer.2." in weight]
    assert [weight for weight in trained if ".layer.0.intermediate" in weight]
    _, _, model = loaded(bases, "bert", freeze="classifier", lora={"r": 2})
    trained = {weight for weight, value in model.named_parameters() if value.requires_grad}
    assert trained and not [weight for weight in trained if "classifier" in weight]
    _, _, model = loaded(bases, "bert", freeze=2, lora={"r": 2})
    trained = {weight for weight, value in model.named_parameters() if value.requires_grad}
    assert not [weight for weight in trained if ".layer.0." in weight or ".layer.1." in weight]
    assert [weight for weight in trained if ".layer.2." in weight and ".lora_A." in weight]


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"freeze": ["embedings"]}, r"BertForSequenceClassification has no weights called 'embedings'\. Did you mean 'embeddings'\?"),
        ({"freeze": 4}, "BertForSequenceClassification has 3 layers, so the first 4 can't be frozen"),
        ({"freeze": ["*"]}, "leaves nothing to train: all .* weights of BertForSequenceClassification are frozen"),
        ({"lora": {"target_modules": ["querry"]}}, r"has no module 'querry'\. Did you mean 'query'\?"),
    ],
)
def test_what_matches_nothing_is_refused(section: dict[str, Any], sentence: str, bases: dict[str, str]) -> None:
    with pytest.raises(InputError, match=sentence):
        loaded(bases, "bert", **section)
    task, given = Made(family="bert"), ModelSection.parse({"base": bases["bert"], **section})
    if "*" not in str(section):
        with pytest.raises(InputError, match=sentence):
            models.check(task, given)


def test_what_can_not_be_frozen_is_refused(bases: dict[str, str]) -> None:
    with pytest.raises(InputError, match="backbone leaves nothing to train: T5EncoderModel has no head"):
        from transformers import T5Config, T5EncoderModel

        from tests.unit.families import T5

        freezing.chosen(T5EncoderModel(T5Config(**T5)), FreezeSection(backbone=True), ())
    with pytest.raises(InputError, match="lora freezes the backbone already"):
        ModelSection.parse({"base": "x", "lora": {}, "freeze": "backbone"})
    with pytest.raises(InputError, match="freeze"):
        ModelSection.parse({"base": "x", "freeze": True})
    with pytest.raises(InputError, match="a model from scratch takes save: merged"):
        ModelSection.parse({"base": "config://bert", "lora": {"save": "adapter"}})


@pytest.mark.parametrize("name", FAMILIES)
def test_learning_rates_fall_towards_the_input(name: str, bases: dict[str, str]) -> None:
    task, _, model = loaded(bases, name)
    settings = TrainingSection.parse({"learning_rate": 1e-3, "layerwise_lr_decay": 0.5})
    shares = freezing.rates(model, settings)
    layers = task.of.layers
    assert {shares[weight] for weight in anatomy.of(model).head} <= {1.0}
    assert min(shares.values()) == pytest.approx(0.5 ** (layers + 1))
    assert freezing.rates(model, TrainingSection()) == {}


def test_the_head_has_a_rate_of_its_own(bases: dict[str, str]) -> None:
    _, _, model = loaded(bases, "bert", lora={"r": 2})
    shares = freezing.rates(model, TrainingSection.parse({"learning_rate": 1e-4, "head_learning_rate": 1e-3}))
    assert list(shares.values()) == pytest.approx([10.0] * len(shares))
    assert {anatomy.plain_name(name) for name in shares} == {"classifier.weight", "classifier.bias"}
    _, _, headless = loaded(bases, "gpt2-lm")
    with pytest.raises(InputError, match="GPT2LMHeadModel has no head beside its backbone"):
        freezing.rates(headless, TrainingSection(head_learning_rate=1e-3))


def test_the_dropout_of_the_head(bases: dict[str, str]) -> None:
    _, _, model = loaded(bases, "bert", head_dropout=0.4)
    assert model.dropout.p == 0.4 and model.config.classifier_dropout == 0.4  # pyright: ignore[reportAttributeAccessIssue]
    assert model.bert.embeddings.dropout.p == 0.1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="the head of ViTForImageClassification has no dropout"):
        loaded(bases, "vit", head_dropout=0.4)


def test_frozen_batch_normalisation_keeps_its_statistics(bases: dict[str, str]) -> None:
    _, _, model = loaded(bases, "resnet", freeze="backbone")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]  # pyright: ignore[reportOptionalMemberAccess]
    model.train()
    with freezing.still(model):
        model.train()
        assert model.training and not any(norm.training for norm in norms)
        model(**Made(family="resnet").of.batch())
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))  # pyright: ignore[reportArgumentType]
    model.train()
    assert all(norm.training for norm in norms)
    _, _, whole = loaded(bases, "resnet")
    with freezing.still(whole.train()):
        assert all(module.training for module in whole.modules())


def test_what_of_the_checkpoint_is_not_used_is_said(bases: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    task, section = Made(family="bert"), ModelSection(base=bases["bert"])
    with caplog.at_level("INFO"):
        _, found = models.without_adapters(task, section, precision="fp32")
    assert set(found.new) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert found.unused and all(name.startswith("cls.predictions") for name in found.unused)
    assert f"weights of {bases['bert']} are not used: cls.predictions" in caplog.text
