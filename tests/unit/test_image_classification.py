"""What is special about classifying images: heads, batch normalisation, metrics, answers to real clients."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import predictor, processors
from orchestrator.errors import InputError
from orchestrator.tasks import batch_norm, create
from orchestrator.tasks.base import RowError
from orchestrator.tasks.image_classification import ImageClassificationParameters
from tests.fixtures.tiny_images import image_base, picture, uri
from tests.unit import live

COLOURS = {"blue": (30, 40, 220), "green": (40, 200, 50), "red": (220, 40, 30)}


def rows(count: int = 6) -> list[dict[str, Any]]:
    names = sorted(COLOURS)
    return [{"image": uri(picture(COLOURS[names[n % 3]], 12 + n)), "label": names[n % 3]} for n in range(count)]


def task(**fields: Any) -> Any:
    one = create({"name": "image-classification", **fields})
    return one.fit({"train": one.observe(rows())})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return image_base(tmp_path_factory.mktemp("resnet"), "resnet")


def model_of(one: Any, base: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return one.model(base, dtype=torch.float32, **options)


def gradients(one: Any, model: Any, processor: Any, groups: list[list[Any]]) -> torch.Tensor:
    """Of the weights, after the examples went through the model in these groups."""
    model.train()
    model.zero_grad()
    for group in groups:
        one.loss(model, one.collate(group, processor))[0].backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


# ---- batch normalisation -------------------------------------------------------------------------------------
def test_in_a_pretrained_model_the_result_does_not_depend_on_the_micro_batch(base: str) -> None:
    one = task()
    processor = processors.of(one, base)
    examples = [example for [example] in one.encode(rows(), processor)]
    model = model_of(one, base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = gradients(one, model, processor, [examples])
    parts = gradients(one, model, processor, [examples[:1], examples[1:3], examples[3:]])
    assert abs(whole - parts).max() < 1e-4 * abs(whole).max()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert any("normalization.weight" in name for name, parameter in model.named_parameters() if parameter.grad is not None)


def test_a_model_from_scratch_learns_its_statistics(base: str, tmp_path: Path) -> None:
    from transformers import ResNetForImageClassification

    one = task()
    fresh = ResNetForImageClassification(one.check_base(base))
    fresh.save_pretrained(tmp_path)
    processor = processors.of(one, base)
    examples = [example for [example] in one.encode(rows(), processor)]
    model = model_of(one, str(tmp_path))
    gradients(one, model, processor, [examples, examples[:1]])
    statistics = {name: value for name, value in model.state_dict().items() if name.endswith("running_mean")}
    assert all(value.abs().sum() > 0 for value in statistics.values())
    assert not any(isinstance(module, batch_norm.FixedStatistics) for module in model.modules())
    # What was trained is frozen when it is the base of the next job, and answers as before.
    model.save_pretrained(tmp_path / "trained")
    again = model_of(one, str(tmp_path / "trained"))
    assert any(isinstance(module, batch_norm.FixedStatistics) for module in again.modules())
    batch = one.collate(examples, processor)
    with torch.no_grad():
        assert np.allclose(one.infer(model.eval(), batch), one.infer(again.eval(), batch), atol=1e-5)


def test_a_micro_batch_of_one_value_a_channel_does_not_stop_training() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
    batch_norm.settle(model, "trained")
    assert torch.isfinite(model.train()(torch.randn(1, 4, 1, 1))).all()
    assert model(torch.randn(2, 4, 1, 1)).mean().abs() < 1e-5


@pytest.mark.parametrize("setting", ["frozen", "trained"])
def test_one_picture_alone_has_the_gradient_that_it_has_twice(setting: Any) -> None:
    """torch's own is wrong where the features are transposed afterwards, as a detector's are."""
    image, wanted = torch.randn(1, 4, 3, 3), torch.randn(1, 9, 4)
    found = []
    for times in (1, 2):
        model = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
        batch_norm.settle(model.train(), setting)
        model(image.repeat(times, 1, 1, 1)).flatten(2).transpose(1, 2).backward(wanted.repeat(times, 1, 1) / times)
        found.append(torch.cat([parameter.grad for parameter in model.parameters() if parameter.grad is not None]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_the_job_may_decide(base: str) -> None:
    trained, frozen = (model_of(task(batch_norm=setting), base) for setting in ("trained", "frozen"))
    assert not any(isinstance(module, batch_norm.FixedStatistics) for module in trained.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen.modules())


# ---- base models ---------------------------------------------------------------------------------------------
def test_a_base_that_is_no_image_model_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, ResNetConfig

    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="'bert' model, for which transformers has no image-classification head"):
        task().check_base(str(tmp_path / "bert"))
    ResNetConfig(num_channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(InputError, match="4 channels"):
        task().check_base(str(tmp_path / "four"))


def test_a_processor_that_leaves_sizes_as_they_are_is_told_of() -> None:
    one = task()
    examples = [{"pixels": bytes(3 * height * 4), "shape": [3, height, 4]} for height in (4, 6)]
    with pytest.raises(InputError, match="different sizes"):
        one.collate(examples, None)


def test_torchvision_is_not_needed(base: str) -> None:
    assert processors.of(task(), base).backend == "pil"


# ---- labels --------------------------------------------------------------------------------------------------
def test_labels_are_learnt_from_the_rows_and_unknown_ones_are_refused() -> None:
    one = create("image-classification")
    observed = {"train": one.observe(rows()), "test": one.observe([{"image": "x", "label": "violet"}])}
    with pytest.raises(InputError, match="labels that no training row has: 'violet'"):
        one.fit(observed)
    with pytest.raises(InputError, match="twice"):
        create({"name": "image-classification", "labels": ["a", "a"]})
    with pytest.raises(InputError, match="nothing to learn"):
        one.fit({"train": one.observe([])})
    with pytest.raises(RowError, match="'violet'"):
        task()._target({"label": "violet"})


# ---- scores --------------------------------------------------------------------------------------------------
def prediction(**scores: float) -> dict[str, Any]:
    return {"label": max(scores, key=lambda name: scores[name]), "score": max(scores.values()), "scores": scores, "logits": []}


def test_the_right_label_may_be_among_the_likeliest() -> None:
    names = list("abcdefg")
    one = create({"name": "image-classification", "labels": names})
    given = [prediction(**{name: 0.3 - 0.04 * place for place, name in enumerate(names)}) for _ in names]
    rows = [{"label": name} for name in names]
    scores = one.score(given, rows)
    assert scores["accuracy"] == pytest.approx(1 / 7)
    assert scores["top_5_accuracy"] == pytest.approx(5 / 7)
    assert one.score(given, rows, ["top_3_accuracy", "top_1_accuracy"]) == pytest.approx({"top_3_accuracy": 3 / 7, "top_1_accuracy": 1 / 7})
    assert one.score(given, rows, ["top_7_accuracy"]) == {}
    assert one.score([], []) == {}
    with pytest.raises(InputError, match="top_accuracy"):
        one.score(given, rows, ["top_accuracy"])


def test_answers_that_end_at_different_labels_are_as_far_apart_as_their_scores() -> None:
    one = task()
    wanted = [{"label": "red", "score": 0.9}, {"label": "green", "score": 0.05}]
    found = [{"label": "red", "score": 0.9}, {"label": "blue", "score": 0.051}]
    assert one.answer_difference(wanted, found) == pytest.approx(0.001)
    assert one.answer_difference(wanted, [{"label": "green", "score": 0.9}, {"label": "red", "score": 0.05}]) == pytest.approx(0.85)


# ---- HTTP ----------------------------------------------------------------------------------------------------
def test_an_unmodified_client_of_hugging_face_gets_what_the_predictor_says(base: str, tmp_path: Path) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    engine = live.predictor(task(), base, tmp_path / "bundle")
    content = picture(COLOURS["red"], 30, 20)
    path = tmp_path / "red.png"
    path.write_bytes(content)
    expected = engine([{"image": str(path)}])[0]
    with live.endpoint(engine) as url:
        client = InferenceClient(model=url)
        for image in (content, str(path), path):
            found = client.image_classification(image)
            assert [answer.label for answer in found] == sorted(COLOURS, key=lambda name: -expected["scores"][name])
            assert found[0].score == pytest.approx(expected["score"], abs=1e-5)
        [best] = client.image_classification(content, top_k=1, function_to_apply="none")
        assert best.score == pytest.approx(max(expected["logits"]), abs=1e-4)
        with pytest.raises(HfHubHTTPError, match="422"):
            client.image_classification(content[:-30])


def test_five_labels_are_answered_unless_a_client_asks_for_more() -> None:
    names = [f"n{place}" for place in range(9)]
    one = create({"name": "image-classification", "labels": names})
    said = one.decode({}, [np.arange(9, dtype=np.float32)])
    assert len(one.answer([said], ImageClassificationParameters(), single=True)) == 5
    assert len(one.answer([said], ImageClassificationParameters(top_k=20), single=True)) == 9
    assert [len(each) for each in one.answer([said, said], ImageClassificationParameters(top_k=2), single=False)] == [2, 2]


def test_in_half_precision_answers_are_numbers_of_32_bits(base: str) -> None:
    one = task()
    processor = processors.of(one, base)
    examples = [example for [example] in one.encode(rows(), processor)]
    outputs = predictor.forward(one, model_of(one, base), processor, examples, tokens=100, precision="bf16", losses=predictor.Losses())
    assert all(output.dtype == np.float32 and np.isfinite(output).all() for output in outputs)
