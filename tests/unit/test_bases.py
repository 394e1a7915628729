"""Adapters apart from their base, one base under many, bundles as bases, and models for other programs."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import bases, bundle, models, processors, scratch
from orchestrator.bundle import Bundle
from orchestrator.config import ModelSection
from orchestrator.errors import InputError, StageError
from orchestrator.predictor import Predictor
from orchestrator.storage import Folder
from orchestrator.tasks import create
from orchestrator.tasks.base import Task
from tests.fixtures.tiny import text_base
from tests.unit.families import Made

TEXTS = ["good phone", "bad battery", "a good screen and a bad battery", "phone"]
ROWS = [{"text": text} for text in TEXTS]
SIZE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORCHESTRATOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def base(tmp_path: Path) -> str:
    return text_base(tmp_path / "base", TEXTS, **SIZE)


def classes(*labels: str) -> Task:
    return create({"name": "text-classification", "labels": list(labels)})


def trained(task: Task, section: ModelSection, seed: int = 1) -> Any:
    """A model as training leaves it: all that is trained has moved."""
    model = models.load(task, bases.based(section), precision="fp32")
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    return model


def written(place: Path, task: Task, section: ModelSection, model: Any) -> Bundle:
    base = bases.named(section) if section.lora is not None and section.lora.save == "adapter" else None
    bundle.write(
        Folder(str(place)),
        model=model if base else models.merged(model),
        processor=processors.of(task, bases.based(section).base),
        task=task,
        job={"name": "reviews", "model": section.to_json()},
        lineage={},
        metrics={},
        base=base,
    )
    return bundle.load(str(place))


def on(base: str, **lora: Any) -> ModelSection:
    return ModelSection.parse({"base": base, "lora": {"r": 2, "save": "adapter", **lora}})


def scores(predictor: Predictor) -> torch.Tensor:
    return torch.tensor([list(one["scores"].values()) for one in predictor(ROWS)])


# ---- adapters ------------------------------------------------------------------------------------------------
def test_an_adapters_bundle_is_small_and_answers_as_the_merged_one(base: str, tmp_path: Path) -> None:
    task = classes("bad", "good")
    small = written(tmp_path / "small", task, on(base), trained(task, on(base)))
    whole = written(tmp_path / "whole", task, on(base, save="merged"), trained(task, on(base)))
    assert small.base == {"base": base, "revision": None, "digest": bases.digest(base)}
    assert not small.model.exists() and (small.adapter / "adapter_model.safetensors").is_file()

    def size(one: Bundle) -> int:
        return sum(file.stat().st_size for file in one.path.rglob("*.safetensors"))

    assert size(small) < size(whole) / 2
    expected = scores(Predictor(whole, precision="fp32"))
    assert torch.allclose(scores(Predictor(small, precision="fp32")), expected, atol=1e-5)
    assert torch.allclose(scores(Predictor(small, precision="fp32", share_base=True)), expected, atol=1e-5)
    assert float(expected.std()) > 0.01


def test_another_base_than_that_of_training_is_refused(base: str, tmp_path: Path) -> None:
    task = classes("bad", "good")
    small = written(tmp_path / "small", task, on(base), trained(task, on(base)))
    file = Path(base) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"is an adapter on '{base}', which has changed since: its digest is"):
        Predictor(small)
    shutil.rmtree(base)
    with pytest.raises(InputError, match=rf"is an adapter on '{base}', which can't be had: .*there is no folder"):
        Predictor(small)


def test_many_adapters_share_the_weights_of_one_base(base: str, tmp_path: Path) -> None:
    tasks = [classes("bad", "good"), classes("x", "y", "z"), classes("bad", "good")]
    bundles = [written(tmp_path / str(number), task, on(base), trained(task, on(base), seed=number)) for number, task in enumerate(tasks)]
    alone = [scores(Predictor(one, precision="fp32")) for one in bundles]
    together = [Predictor(one, precision="fp32", share_base=True) for one in bundles]
    for predictor, expected in zip(together, alone, strict=True):
        assert torch.allclose(scores(predictor), expected, atol=1e-5)
    assert not torch.allclose(alone[0], alone[2], atol=1e-3)

    def own(predictor: Predictor) -> dict[str, torch.Tensor]:
        return {
            name: weight for name, weight in predictor.model.named_parameters() if ".lora_" not in name and ".modules_to_save." not in name
        }

    first = own(together[0])
    for predictor in together[1:]:
        apart = [name for name, weight in own(predictor).items() if weight.data_ptr() not in {one.data_ptr() for one in first.values()}]
        assert all("classifier" in name or "pooler" in name for name in apart), apart
    assert len({weight.data_ptr() for predictor in together for weight in own(predictor).values()}) < 1.5 * len(first)
    kept = len(bases._shared)
    assert kept >= len(first) - 4
    del together, predictor, first
    gc.collect()
    assert len(bases._shared) < kept / 4


# ---- bundles as bases ----------------------------------------------------------------------------------------
def filled(place: Path, base: str, **lineage: Any) -> Bundle:
    """What domain adaptation leaves: a masked language model in a bundle."""
    task = Made(family="bert-filling")
    model = trained(task, ModelSection(base=base))
    bundle.write(Folder(str(place)), model=model, processor=processors.of(task, base), task=task, job={}, lineage=lineage, metrics={})
    return bundle.load(str(place))


def test_one_jobs_model_is_the_next_ones_base(base: str, tmp_path: Path) -> None:
    parent = filled(tmp_path / "parent", base)
    section = ModelSection(base="run:pretrain", parent=str(parent.path))
    ready = scratch.based(section, None, seed=1)  # pyright: ignore[reportArgumentType]
    assert ready.parent is None and {"config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in Path(ready.base).iterdir()
    }
    assert scratch.based(section, None, seed=1) == ready  # pyright: ignore[reportArgumentType]
    model, found = models.without_adapters(classes("bad", "good"), ready, precision="fp32")
    before = Made(family="bert-filling").model(str(parent.model), dtype=torch.float32).state_dict()
    kept = [name for name, weight in model.state_dict().items() if name in before and torch.equal(weight, before[name])]
    assert len(kept) > 30 and all(name.startswith("bert.") for name in kept)
    assert set(found.new) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert found.unused and all(name.startswith("cls.") for name in found.unused)
    assert (
        processors.of(classes("a", "b"), ready.base)("good phone")["input_ids"]
        == processors.of(classes("a", "b"), base)("good phone")["input_ids"]
    )


def test_an_adapters_bundle_is_a_base_too_and_carries_an_adapter(base: str, tmp_path: Path) -> None:
    first = classes("bad", "good")
    small = written(tmp_path / "small", first, on(base), trained(first, on(base)))
    place = bases.local(str(small.path))
    assert torch.allclose(
        scores(Predictor(small, precision="fp32")),
        torch.softmax(
            first.model(place, dtype=torch.float32).eval()(**processors.of(first, place)(TEXTS, padding=True, return_tensors="pt")).logits,
            -1,
        ),  # pyright: ignore
        atol=1e-5,
    )
    second = classes("x", "y", "z")
    child = written(tmp_path / "child", second, on(str(small.path)), trained(second, on(str(small.path))))
    assert child.base == {"base": str(small.path), "revision": None, "digest": small.digest}
    assert scores(Predictor(child, precision="fp32")).shape == (4, 3)


def test_links_to_a_bundle_that_has_gone_are_made_anew(base: str, tmp_path: Path) -> None:
    parent = filled(tmp_path / "parent", base, run="goes")
    place = bases.local(str(parent.path))
    shutil.copytree(parent.path, tmp_path / "elsewhere")
    shutil.rmtree(parent.path)
    assert not (Path(place) / "config.json").exists()
    assert bases.local(str(tmp_path / "elsewhere")) == place
    assert (Path(place) / "config.json").exists()


def test_what_is_looked_up_when_a_run_begins_is_no_base_before(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'run:pretrain' is looked up when a run begins"):
        bases.local("run:pretrain")


# ---- for other programs --------------------------------------------------------------------------------------
@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_an_exported_model_answers_in_transformers_with_its_labels(save: str, base: str, tmp_path: Path) -> None:
    from transformers import pipeline

    task = classes("bad", "good")
    made = written(tmp_path / "b", task, on(base, save=save), trained(task, on(base)))
    bases.export(made, tmp_path / "out")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in (tmp_path / "out").iterdir()}
    answers: Any = pipeline("text-classification", str(tmp_path / "out"), top_k=None)(TEXTS)
    for answer, expected in zip(answers, Predictor(made, precision="fp32")(ROWS), strict=True):
        assert {one["label"]: one["score"] for one in answer} == pytest.approx(expected["scores"], abs=1e-5)


def test_a_model_that_does_not_know_its_labels_is_not_written(base: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    task = classes("bad", "good")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)

    def write() -> None:
        place = Folder(str(tmp_path / "b"))
        bundle.write(place, model=model, processor=processors.of(task, base), task=task, job={}, lineage={}, metrics={})

    with pytest.raises(StageError, match=r"has the labels 'bad', 'good', but the model's config calls one 'LABEL_0'"):
        write()
    model.config.id2label = {0: "bad", 1: "good"}
    with pytest.raises(StageError, match="other numbers for labels in label2id"):
        write()
    model.config.label2id = {"bad": 0, "good": 1}
    write()
    assert not (tmp_path / "c").exists() and bundle.load(str(tmp_path / "b")).base is None
