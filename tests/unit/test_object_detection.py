"""What is special about finding objects: a loss that adds up, boxes in pixels of the original image, COCO's metrics."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import predictor, processors
from orchestrator.errors import InputError
from orchestrator.tasks import boxes, create
from orchestrator.tasks.base import RowError
from orchestrator.tasks.detection_loss import PerImage
from orchestrator.tasks.object_detection import ObjectDetectionParameters
from tests.fixtures.tiny_images import DETR_BACKBONE, image_base, look_pretrained, picture, png, uri
from tests.unit import live

RED, GREEN = (220, 40, 30), (40, 200, 50)
ROWS: list[dict[str, Any]] = [
    {"image": uri(picture(RED, 20, 16, (2, 3, 10, 12))), "objects": [{"box": [2, 3, 10, 12], "label": "red"}]},
    {
        "image": uri(picture(GREEN, 16, 30, (4, 4, 12, 20))),
        "objects": [{"box": [4, 4, 12, 20], "label": "green"}, {"box": [0, 0, 3, 3], "label": "red"}],
    },
    {"image": uri(picture((0, 0, 0), 30, 30)), "objects": []},
    {"image": uri(picture(RED, 40, 20, (0, 0, 20, 20))), "objects": [{"box": [0, 0, 20, 20], "label": "red"}]},
]


def task(**fields: Any) -> Any:
    one = create({"name": "object-detection", **fields})
    return one.fit({"train": one.observe([one.clean(row) for row in ROWS])})


def clean(one: Any) -> list[dict[str, Any]]:
    return [{**one.clean(row), "row_id": f"rows:{place}"} for place, row in enumerate(ROWS)]


# ---- boxes ---------------------------------------------------------------------------------------------------
SIZE = (20, 16)
CANONICAL = {"xmin": 2.0, "ymin": 3.0, "xmax": 10.0, "ymax": 12.0}


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ([{"box": [2, 3, 10, 12], "label": "a"}], "xyxy"),
        ([{"bbox": (2, 3, 8, 9), "category": "a"}], "xywh"),
        ([{"bbox": [0.3, 0.46875, 0.4, 0.5625], "class": "a"}], "yolo"),
        ([{"box": CANONICAL, "label": "a"}], "yolo"),
        ([{"box": {"x": 2, "y": 3, "width": 8, "height": 9}, "label": "a"}], "xyxy"),
        ([{"box": {"x_center": 0.3, "y_center": 0.46875, "width": 0.4, "height": 0.5625}, "label": "a"}], "xyxy"),
        ({"bbox": [[2, 3, 8, 9]], "category": ["a"], "id": [7]}, "xywh"),
        ({"boxes": [[2, 3, 10, 12]], "labels": ["a"]}, "xyxy"),
        ('[{"box": [2, 3, 10, 12], "label": "a"}]', "xyxy"),
    ],
)
def test_a_box_is_read_in_every_usual_form(value: Any, form: Any) -> None:
    [found] = boxes.clean_objects("objects", value, SIZE, form)
    assert found == {"label": "a", "box": pytest.approx(CANONICAL), "crowd": False}
    assert boxes.clean_objects("objects", [found], SIZE, form) == [found]


def test_a_box_that_leaves_its_image_by_less_than_a_pixel_is_cut() -> None:
    [found] = boxes.clean_objects("objects", [{"box": [-0.4, -1, 20.9, 16], "label": 1}], SIZE, "xyxy")
    assert found == {"label": "1", "box": {"xmin": 0.0, "ymin": 0.0, "xmax": 20.0, "ymax": 16.0}, "crowd": False}


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([1, 1, 22, 5], "within the image of 20 x 16 pixels"),
        ([-3, 1, 5, 5], "within the image"),
        ([20.5, 1, 20.9, 5], "within the image"),
        ([5, 1, 5, 5], "above 0"),
        ([5, 5, 1, 9], "above 0"),
        ([1, 1, float("nan"), 5], "finite"),
        ([1, 1, float("inf"), 5], "finite"),
        ([1, 1, 5], "four numbers"),
        ([1, 1, 5, True], "four numbers"),
        ([1, 1, 5, "5"], "four numbers"),
        ({"xmin": 1, "ymin": 2}, "four numbers"),
        (None, "four numbers"),
    ],
)
def test_a_wrong_box_says_what_would_be_right(box: Any, said: str) -> None:
    with pytest.raises(RowError, match=said) as raised:
        boxes.clean_objects("objects", [{"box": box, "label": "a"}], SIZE, "xyxy")
    assert raised.value.column == "objects"
    json.dumps(raised.value.found, allow_nan=False)


def test_labels_that_the_job_does_not_name_are_bad_rows() -> None:
    with pytest.raises(RowError, match="'blue'"):
        task(labels=["red", "green"]).clean({"image": ROWS[0]["image"], "objects": [{"box": [1, 1, 3, 3], "label": "blue"}]})


def test_a_split_without_a_box_is_refused() -> None:
    one = create("object-detection")
    train = one.observe([one.clean(row) for row in ROWS])
    empty = one.observe([one.clean(ROWS[2])])
    with pytest.raises(InputError, match="nothing to learn"):
        one.fit({"train": empty})
    with pytest.raises(InputError, match="1 images of the test split has a box, so there is nothing to score"):
        one.fit({"train": train, "test": empty})
    assert one.fit({"train": train, "test": one.observe([])}).labels == ("green", "red")


def test_one_kind_of_object_is_enough() -> None:
    one = create("object-detection")
    assert one.fit({"train": one.observe([one.clean(ROWS[0])] * 3)}).labels == ("red",)


# ---- the loss ------------------------------------------------------------------------------------------------
SMALL: dict[str, dict[str, Any]] = {
    "ConditionalDetr": {"num_queries": 6, "encoder_layers": 1, "decoder_layers": 2, "auxiliary_loss": True},
    "DeformableDetr": {
        "num_queries": 6, "encoder_layers": 1, "decoder_layers": 2, "auxiliary_loss": True, "num_feature_levels": 1,
    },
    "RTDetr": {
        "num_queries": 6, "decoder_layers": 2, "encoder_layers": 1, "encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16],
        "decoder_in_channels": [32, 32, 32], "decoder_attention_heads": 2, "num_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "backbone_config": {
            "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic",
            "out_features": ["stage2", "stage3", "stage4"],
        },
    },
}  # fmt: skip


def family(name: str, folder: Path) -> str:
    """A tiny detector of another family than the fixtures', with its processor."""
    import transformers

    sizes = dict(SMALL[name])
    if "backbone_config" not in sizes:
        sizes |= {"use_timm_backbone": False, "backbone_config": DETR_BACKBONE, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.3}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(d_model=32, **sizes)
    model = getattr(transformers, f"{name}Model")(config)
    look_pretrained(model)
    model.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    settings = {"image_processor_type": f"{name}ImageProcessor", "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("name", SMALL)
def test_the_loss_of_every_family_is_a_sum_over_images_also_while_training(name: str, tmp_path: Path) -> None:
    one = task()
    base = family(name, tmp_path)
    processor = processors.of(one, base)
    noise = np.random.default_rng(0)  # In a picture of one colour places are equal, and which of them is chosen is left open.
    rows = [{**row, "image": uri(png(noise.integers(0, 255, (30, 40, 3))))} for row in clean(one)]
    examples = [example for [example] in one.encode(rows, processor)]
    torch.manual_seed(0)
    model = one.model(base, dtype=torch.float32).train()

    def trained(groups: list[list[Any]]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        total = 0.0
        for group in groups:
            loss, count = one.loss(model, one.collate(group, processor))
            loss.backward()
            total += float(loss.detach())
            assert count == len(group)
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole, together = trained([examples])
    parts, apart = trained([examples[:1], examples[1:]])
    assert whole == pytest.approx(parts, rel=1e-4)
    assert abs(together - apart).max() < 1e-3 * abs(together).max()


def test_the_loss_of_one_image_is_the_models_own(tmp_path: Path) -> None:
    one = task()
    base = image_base(tmp_path, "detr")
    processor = processors.of(one, base)
    [[example]] = one.encode(clean(one)[1:2], processor)
    model = one.model(base, dtype=torch.float32)
    batch = one.collate([example], processor)
    labels = [{"class_labels": batch["classes"][0], "boxes": batch["boxes"][0]}]
    assert isinstance(model.loss_function, PerImage)
    with torch.no_grad():
        total, _ = one.loss(model, dict(batch))
        model.loss_function = model.loss_function.own
        assert float(total) == pytest.approx(float(model(pixel_values=batch["pixel_values"], labels=labels).loss), rel=1e-5)


def test_the_loss_asks_no_other_worker(tmp_path: Path) -> None:
    """With several workers transformers would exchange numbers of boxes for each image, of which each worker has as many as it has."""
    from accelerate import PartialState

    seen = []
    loss = PerImage(lambda logits, *_: (seen.append(PartialState._shared_state) or logits.sum(), None, None))
    before = PartialState._shared_state
    total, *_ = loss(torch.ones(3, 2, 4), [{}, {}, {}], "cpu", torch.ones(3, 2, 4), None)
    assert float(total) == 24
    assert seen == [{}, {}, {}]
    assert PartialState._shared_state is before


@pytest.mark.parametrize(("layers", "first"), [((5, 3), True), ((3, 5), False), ((3, 3), True), ((3, 3), False)])
def test_outputs_of_layers_are_cut_by_image_whichever_way_they_lie(layers: tuple[int, int], first: bool) -> None:
    every = torch.randn(*layers, 2, 4)
    logits = every[-1] if first else every[:, -1]
    count = len(logits)
    seen: list[torch.Tensor] = []
    loss = PerImage(lambda logits, labels, device, boxes, config, classes: (seen.append(classes) or logits.sum(), None, None))
    loss(logits, [{}] * count, "cpu", logits, None, every)
    for place, found in enumerate(seen):
        assert torch.equal(found, every[:, place : place + 1] if first else every[place : place + 1])


def test_label_smoothing_is_refused_rather_than_ignored() -> None:
    with pytest.raises(InputError, match="label_smoothing"):
        task().loss(torch.nn.Identity(), {}, label_smoothing=0.1)


def test_loss_and_boxes_take_one_pass(tmp_path: Path) -> None:
    one = task()
    base = image_base(tmp_path, "yolos")
    processor = processors.of(one, base)
    examples = [example for [example] in one.encode(clean(one), processor)]
    model = one.model(base, dtype=torch.float32)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    both = predictor.forward(one, model, processor, examples, tokens=1000, precision="fp32", losses=predictor.Losses())
    assert len(calls) == 1
    alone = predictor.forward(one, model, processor, examples, tokens=1000, precision="fp32")
    assert max(abs(a - b).max() for a, b in zip(both, alone, strict=True)) < 1e-4


def test_half_precision_trains_and_answers_in_32_bits(tmp_path: Path) -> None:
    one = task()
    base = image_base(tmp_path, "yolos")
    processor = processors.of(one, base)
    examples = [example for [example] in one.encode(clean(one), processor)]
    losses = predictor.Losses()
    outputs = predictor.forward(one, one.model(base), processor, examples, tokens=100, precision="bf16", losses=losses)
    assert np.isfinite(losses.total)
    assert losses.items == len(ROWS)
    assert all(output.dtype == np.float32 for output in outputs)


def test_what_a_model_would_draw_by_itself_is_off(tmp_path: Path) -> None:
    model = task().model(family("RTDetr", tmp_path), dtype=torch.float32)
    assert model.config.num_denoising == 0
    detr = task().model(image_base(tmp_path / "detr", "detr"), dtype=torch.float32)
    assert not [
        module for module in detr.modules() if getattr(module, "dropout", 0.0) not in (0.0, None) and isinstance(module.dropout, float)
    ]


# ---- base models ---------------------------------------------------------------------------------------------
def test_bases_that_can_not_be_trained_are_refused_with_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DetrConfig, ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="'vit' model"):
        task().check_base(str(tmp_path / "vit"))
    monkeypatch.setitem(sys.modules, "timm", None)
    DetrConfig().save_pretrained(tmp_path / "timm")
    with pytest.raises(InputError, match="no_timm"):
        task().check_base(str(tmp_path / "timm"))


# ---- answers -------------------------------------------------------------------------------------------------
def test_boxes_are_in_pixels_of_the_original_image() -> None:
    one = task()
    output = type("Output", (), {"logits": torch.tensor([[[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]]), "pred_boxes": torch.tensor([[[0.5, 0.5, 0.5, 0.25], [0.9, 0.9, 0.4, 0.4]]])})  # fmt: skip
    [found] = one._found(output, torch.tensor([[100, 200]])).numpy()
    assert found[0, :4] == pytest.approx([50, 37.5, 150, 62.5])
    assert found[1, :4] == pytest.approx([140, 70, 200, 100])
    said = one.decode({}, [found])
    assert [(item["label"], round(item["score"], 3)) for item in said["boxes"][:1]] == [("red", 1.0)]
    answer = one.answer([said], ObjectDetectionParameters(), single=True)
    assert answer == [{"label": "red", "score": pytest.approx(1.0, abs=1e-3), "box": {"xmin": 50, "ymin": 38, "xmax": 150, "ymax": 62}}]
    assert len(one.answer([said], ObjectDetectionParameters(threshold=0), single=True)) == len(said["boxes"])


def test_with_focal_loss_each_label_of_a_box_stands_for_itself() -> None:
    one = task(max_detections=3)
    output = type("Output", (), {"logits": torch.tensor([[[3.0, 2.0], [1.0, -9.0]]]), "pred_boxes": torch.full((1, 2, 4), 0.5)})
    [found] = one._found(output, torch.tensor([[10, 10]])).numpy()
    said = one.decode({}, [found])["boxes"]
    assert [item["label"] for item in said] == ["green", "red", "green"]
    assert [item["score"] for item in said] == pytest.approx([0.9526, 0.8808, 0.7311], abs=1e-4)


def boxed(*items: tuple[str, float, tuple[int, ...]]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score, "box": boxes.named(box)} for label, score, box in items]


def test_predictions_differ_by_what_would_be_answered_otherwise() -> None:
    one = [*boxed(("a", 0.9, (0, 0, 10, 20)), ("b", 0.6, (5, 5, 9, 9))), *boxed(("a", 0.1, (1, 1, 2, 2)))]
    assert boxes.difference(one, list(reversed(one)), 0.5) == 0
    assert boxes.difference(one, one[:2], 0.5) == 0
    moved = boxed(("a", 0.9, (0, 0, 10, 19)), ("b", 0.61, (5, 5, 9, 9)))
    assert boxes.difference(one, moved, 0.5) == pytest.approx(0.05)
    assert boxes.difference(one, moved, 0.5, slack=1.0) == pytest.approx(0.01)
    assert boxes.difference(one, one[:1], 0.5) == pytest.approx(0.1)
    assert boxes.difference([], boxed(("a", 0.9, (0, 0, 1, 1))), 0.5) == pytest.approx(0.4)
    assert boxes.difference([], [], 0.5) == 0


def test_metrics_are_cocos() -> None:
    one = create({"name": "object-detection", "labels": ["a", "b", "c"]})
    objects = [
        {"label": "a", "box": boxes.named((0, 0, 10, 10)), "crowd": False},
        {"label": "b", "box": boxes.named((20, 20, 60, 60)), "crowd": False},
    ]
    rows = [{"objects": objects}, {"objects": []}]
    right = {"boxes": boxed(("a", 0.9, (0, 0, 10, 10)), ("b", 0.8, (20, 20, 60, 60)))}
    nothing: dict[str, Any] = {"boxes": []}
    assert one.score([right, nothing], rows) == pytest.approx({"map": 1.0, "map_50": 1.0, "map_75": 1.0, "mar_100": 1.0})
    assert one.score([nothing, nothing], rows) == {"map": 0.0, "map_50": 0.0, "map_75": 0.0, "mar_100": 0.0}
    # IoU of 10 x 8 in 10 x 10 is 0.8: right for 7 of the 10 thresholds, 0.50 to 0.80.
    near = {"boxes": boxed(("a", 0.9, (0, 0, 10, 8)), ("b", 0.8, (20, 20, 60, 60)))}
    assert one.score([near, nothing], rows, ["map/a", "map/b", "map/c", "map_50", "map_medium"]) == pytest.approx(
        {"map/a": 0.7, "map/b": 1.0, "map_50": 1.0, "map_medium": 1.0}
    )
    [a, b] = one.tables([near, nothing], rows)["per_class"]
    assert (a["label"], a["map"], b["objects"]) == ("a", pytest.approx(0.7), 1)
    assert one.score([], []) == {}
    with pytest.raises(InputError, match="map_50"):
        one.score([right], rows[:1], ["map50"])


def test_a_box_in_a_crowd_counts_neither_way() -> None:
    one = create({"name": "object-detection", "labels": ["a"]})
    crowd = {"label": "a", "box": boxes.named((0, 0, 50, 50)), "crowd": True}
    alone = {"label": "a", "box": boxes.named((60, 60, 80, 80)), "crowd": False}
    found = {"boxes": boxed(("a", 0.9, (0, 0, 20, 20)), ("a", 0.8, (60, 60, 80, 80)))}
    assert one.score([found], [{"objects": [crowd, alone]}])["map"] == pytest.approx(1.0)


def test_scoring_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    test_metrics_are_cocos()
    assert capsys.readouterr() == ("", "")


# ---- HTTP ----------------------------------------------------------------------------------------------------
def test_an_unmodified_client_of_hugging_face_gets_boxes(tmp_path: Path) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    engine = live.predictor(task(threshold=0.0), image_base(tmp_path / "base", "yolos"), tmp_path / "bundle")
    content = picture(RED, 200, 100, (20, 20, 90, 60))
    [expected] = engine([{"image": uri(content)}])
    with live.endpoint(engine) as url:
        client = InferenceClient(model=url)
        found = client.object_detection(content)
        assert len(found) == len(expected["boxes"]) > 0
        assert (found[0].label, found[0].score) == (expected["boxes"][0]["label"], pytest.approx(expected["boxes"][0]["score"], abs=1e-4))
        assert found[0].box.xmax == pytest.approx(expected["boxes"][0]["box"]["xmax"], abs=1)
        assert client.object_detection(content, threshold=1.0) == []
        with pytest.raises(HfHubHTTPError, match="422"):
            client.object_detection(content[:-40])
