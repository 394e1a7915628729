"""Object detection: what is in a picture, and where."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.errors import InputError
from orchestrator.tasks import boxes as box_rules
from orchestrator.tasks import detection_scores, heads, images
from orchestrator.tasks import labels as label_rules
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task

if TYPE_CHECKING:
    import torch
    from PIL import Image

FLOOR = 0.001
"""Boxes of a lower score are not kept: they change no metric and fill the predictions."""
_FAMILIES = (
    "detr", "conditional_detr", "dab-detr", "deformable_detr", "d_fine", "rt_detr", "rt_detr_v2", "table-transformer", "yolos",
)  # fmt: skip
"""Model types whose loss is one of sets of boxes, matched; see `detection_loss`."""
_DRAWN = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")


class ObjectDetectionParameters(Parameters):
    """`parameters` of a Hugging Face object-detection request."""

    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """The score from which a box is answered; None: the task's `threshold`."""


class ObjectDetection(Task):
    """Boxes with labels in photographs, scans, aerial pictures, …"""

    modality: ClassVar[Literal["text", "image", "audio"]] = "image"
    parameters: ClassVar[type[Parameters]] = ObjectDetectionParameters
    rows_at_once: ClassVar[int] = 16

    labels: label_rules.LabelNames = None
    """Label names in the order of the model's outputs; None: those of the training rows, numbers by size, names sorted."""
    box_format: box_rules.BoxFormat = "xyxy"
    """How a box of four bare numbers is meant: xyxy (corners), xywh (corner and size), both in pixels, or yolo (middle and size, as shares)."""
    augment: box_rules.BoxAugment = box_rules.BoxAugment()
    """What is done to training images and their boxes at random: {flip: true, crop: 0.5, scale: 0.7, color: 0.3}."""
    batch_norm: Literal["auto", "frozen", "trained"] = "auto"
    """frozen: batch normalisations keep their statistics while training, so that the result does not depend on micro-batches and workers;
    trained: they take those of each micro-batch. auto: frozen in a pretrained model, trained in one from scratch."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The score from which the endpoint answers a box. Metrics look at all of them."""
    max_detections: Annotated[int, Field(ge=1)] = 100
    """Boxes kept of an image, the best ones; COCO's metrics look at 100."""

    @model_validator(mode="after")
    def _no_label_twice(self) -> Self:
        if twice := [name for name, count in Counter(self.labels or ()).items() if count > 1]:
            raise ValueError(f"labels names {twice[0]!r} twice (1, 1.0 and '1' are the same label)")
        return self

    @property
    def augments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.augment)

    # ---- data ------------------------------------------------------------------------------------------------
    @classmethod
    def fits(cls, columns: Sequence[str], rows: Sequence[Row], format: str) -> float:
        """As any other, but for pictures without a text file beside them: every folder of images can be read as YOLO's."""
        return 0.0 if format == "yolo" and not any(row["objects"] for row in rows) else super().fits(columns, rows, format)

    def columns(self) -> dict[str, Column]:
        return {
            "image": Column(kind="image", help="the picture: a path (relative to the file it stands in) or URI, bytes, or base64"),
            "objects": Column(kind="any", target=True, help="the boxes in it with their labels: a list, empty where there is none"),
        }

    def clean(self, row: Row) -> Row:
        image, size = images.clean_image("image", row.get("image"))
        if "objects" not in row:
            return {"image": image}
        objects = box_rules.clean_objects("objects", row["objects"], size, self.box_format)
        if self.labels is not None and (unknown := [item["label"] for item in objects if item["label"] not in self.labels]):
            raise RowError("objects", f"labels out of {label_rules.listed(self.labels)}", unknown[0])
        return {"image": image, "objects": objects}

    def observe(self, rows: Sequence[Row]) -> Observation:
        """`labels`: in how many rows each occurs."""
        given = [{item["label"] for item in row["objects"]} for row in rows if "objects" in row]
        labels = dict(Counter(name for names in given for name in names))
        return {"rows": len(rows), "boxes": sum(len(row.get("objects", ())) for row in rows), "labels": labels}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        train = observed.get("train", {})
        if not train.get("rows"):
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        for split, observation in observed.items():
            if observation.get("rows") and not observation.get("boxes"):
                why = "nothing to learn" if split == "train" else "nothing to score"
                raise InputError(f"None of the {int(observation['rows']):,} images of the {split} split has a box, so there is {why}.")
        label_rules.refuse_look_alikes(observed)
        if self.labels is not None:
            label_rules.refuse_unlisted(self.labels, observed)
        label_rules.refuse_untrained(observed)
        return self.model_copy(update={"labels": self.labels or label_rules.ordered(train["labels"])})

    def self_contained(self, row: Row) -> Row:
        return {**row, "image": images.self_contained(row["image"])}

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """Each row is one example: uint8 pixels of the size that the model takes, `original` height and width, and its boxes as shares."""
        return [[self._example(row, processor, None)] for row in rows]

    def encode_to_train(self, rows: Sequence[Row], processor: Any, seeds: Sequence[int]) -> list[list[Example]]:
        """As `encode`, from images and boxes changed as `augment` says."""
        return [[self._example(row, processor, seed if self.augments else None)] for row, seed in zip(rows, seeds, strict=True)]

    def _example(self, row: Row, processor: Any, seed: int | None) -> Example:
        image = images.load(row["image"], images.channels(processor))
        targets = {}
        if "objects" in row:
            image, targets = self._targets(image, [item for item in row["objects"] if not item.get("crowd")], seed)
        return images.example(images.pixels(image, processor)) | {"original": [image.height, image.width]} | targets

    def _targets(self, image: Image.Image, objects: Sequence[Mapping[str, Any]], seed: int | None) -> tuple[Image.Image, dict[str, Any]]:
        """Classes and boxes (middle and size, as shares of the image), with the image that they are in."""
        import numpy as np

        classes = [self._place(item["label"]) for item in objects]
        found = np.array([box_rules.corners(item["box"]) for item in objects], dtype=np.float64).reshape(-1, 4)
        if seed is not None:
            image, found, kept = self.augment.apply(image, found, np.random.default_rng(seed))
            classes = [classes[place] for place in kept]
        found = found / ([image.width, image.height] * 2)
        shares = np.concatenate([(found[:, :2] + found[:, 2:]) / 2, found[:, 2:] - found[:, :2]], axis=1)
        return image, {"classes": classes, "boxes": shares.tolist()}

    def _place(self, label: str) -> int:
        if label not in self._names:
            raise RowError("objects", f"labels out of {label_rules.listed(self._names)}", label)
        return self._names.index(label)

    @property
    def _names(self) -> tuple[str, ...]:
        if self.labels is None:
            raise InputError("task.labels is not known yet: `fit` completes the task from the training rows.")
        return self.labels

    def length(self, example: Example) -> int:
        return images.length(example)

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        """`pixel_values`, padded, with the `sizes` that each image has in them; targets padded with class -1."""
        import torch

        tensors = images.numbers(examples, processor)
        sizes = torch.tensor([tensor.shape[1:] for tensor in tensors])
        height, width = sizes.amax(dim=0).tolist()
        pixel_values = torch.zeros(len(tensors), tensors[0].shape[0], height, width)
        for place, tensor in enumerate(tensors):
            pixel_values[place, :, : tensor.shape[1], : tensor.shape[2]] = tensor
        batch = {"pixel_values": pixel_values, "sizes": sizes, "original": torch.tensor([example["original"] for example in examples])}
        if "classes" in examples[0]:
            most = max(len(example["classes"]) for example in examples)
            batch["classes"] = torch.full((len(examples), most), -1)
            batch["boxes"] = torch.zeros(len(examples), most, 4)
            for place, example in enumerate(examples):
                count = len(example["classes"])
                batch["classes"][place, :count] = torch.tensor(example["classes"], dtype=torch.long)
                batch["boxes"][place, :count] = torch.tensor(example["boxes"], dtype=torch.float32).reshape(-1, 4)
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it is no detector of a known family, or needs a package that isn't there."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(base, **from_hub)
        if config.model_type not in _FAMILIES:
            raise InputError(
                f"model.base: {base!r} is a {config.model_type!r} model, which this task can't train as a detector; choose one such as DETR, "
                f"Deformable or Conditional DETR, RT-DETR or YOLOS (model types {', '.join(_FAMILIES)})."
            )
        backbone = getattr(config, "backbone_config", None)
        if getattr(backbone, "model_type", None) == "timm_backbone" and importlib.util.find_spec("timm") is None:
            raise InputError(
                f"model.base: {base!r} takes its backbone from timm, which is not installed. Checkpoints without it are often on a branch "
                "(model.revision: no_timm); a model from scratch says use_timm_backbone: false and a backbone_config in model.config."
            )
        return config

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForObjectDetection` with this task's labels and a loss that is a sum over images.

        What the model would draw at random by itself is off, since that could not be the same in any micro-batch: dropout, and the noise of
        RT-DETR's denoising queries.
        """
        from transformers import AutoModelForObjectDetection

        from orchestrator.tasks import batch_norm
        from orchestrator.tasks.detection_loss import PerImage

        from_hub = heads.from_hub(options)
        config = self.check_base(base, **from_hub)
        heads.name_labels(config, self._names)
        for name in _DRAWN:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        if hasattr(config, "num_denoising"):
            config.num_denoising = 0
        model = AutoModelForObjectDetection.from_pretrained(base, config=config, ignore_mismatched_sizes=True, **options)
        batch_norm.settle(model, self.batch_norm)
        model.loss_function = PerImage(model.loss_function)
        return model

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """The sum over images of the model's own loss of each, and the number of images.

        Images of one size go through the model together and see no padding: a convolution would carry it into the picture.
        Where no gradients are asked for, what was found is left in the batch for `infer`.
        """
        import torch

        if label_smoothing:
            raise InputError("training.label_smoothing_factor: object detection has no label smoothing; set it to 0.")
        total: Any = 0.0
        found: dict[int, torch.Tensor] = {}
        for places, pixels in _of_one_size(batch):
            there = [batch["classes"][place] >= 0 for place in places]
            labels = [
                {"class_labels": batch["classes"][place][mask], "boxes": batch["boxes"][place][mask]}
                for place, mask in zip(places, there, strict=True)
            ]
            output = model(pixel_values=pixels, labels=labels)
            total = total + output.loss
            if not torch.is_grad_enabled():
                found |= zip(places, self._found(output, batch["original"][places]), strict=True)
        if found:
            batch["found"] = torch.stack([found[place] for place in range(len(found))])
        return total, float(len(batch["sizes"]))

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """For each image, float32 of shape (queries, 4 + labels): corners of a box in pixels of the original image, a score for each label."""
        if "found" in batch:
            return list(batch["found"].cpu().numpy())
        found: dict[int, torch.Tensor] = {}
        for places, pixels in _of_one_size(batch):
            found |= zip(places, self._found(model(pixel_values=pixels), batch["original"][places]), strict=True)
        return [found[place].cpu().numpy() for place in range(len(found))]

    def _found(self, output: Any, original: torch.Tensor) -> torch.Tensor:
        """One more logit than labels is "nothing": then a box has one label. Else each label of a box stands for itself (focal loss)."""
        import torch

        logits, boxes = output.logits.float(), output.pred_boxes.float()
        if logits.shape[-1] == len(self._names) + 1:
            scores = logits.softmax(-1)[..., :-1]
            scores = scores * (scores == scores.amax(-1, keepdim=True))
        else:
            scores = logits.sigmoid()
        middle, size = boxes[..., :2], boxes[..., 2:]
        corners = torch.cat([middle - size / 2, middle + size / 2], dim=-1).clamp(0, 1)
        return torch.cat([corners * original.flip(-1).repeat(1, 2)[:, None, :], scores], dim=-1)

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`boxes`: label, score and box of each object found, the best first."""
        import numpy as np

        corners, scores = outputs[0][:, :4].astype("float64"), outputs[0][:, 4:].astype("float64")
        best = np.argsort(-scores, axis=None, kind="stable")[: self.max_detections]
        found = []
        for query, label in zip(*np.unravel_index(best, scores.shape), strict=True):
            if scores[query, label] >= FLOOR:
                box = box_rules.named(corners[query].tolist())
                found.append({"label": self._names[label], "score": float(scores[query, label]), "box": box})
        return {"boxes": found}

    def metrics(self) -> tuple[str, ...]:
        """COCO's: `map` (over IoU 0.50 to 0.95), `map_50`, `map_75`, `mar_100`, then by size, then `map/<label>`."""
        return detection_scores.known(self.labels or ())

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Named numbers; one that has no value here (a label or size of which there is no object) is left out."""
        return detection_scores.score(self._names, predictions, rows, metrics)

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        return detection_scores.tables(self._names, predictions, rows)

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        """Of the boxes that would be answered: in score, or in place relative to their size."""
        return box_rules.difference(one["boxes"], other["boxes"], self.threshold)

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        return images.INPUTS_SCHEMA

    def inputs_example(self) -> Any:
        return images.EXAMPLE

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        return images.rows_from(inputs)

    def inputs_from(self, row: Row) -> Any:
        return images.inputs_from(row)

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`[{label, score, box: {xmin, ymin, xmax, ymax}}, …]` in whole pixels, the best first; for a list of images a list of these."""
        threshold = self.threshold if parameters.threshold is None else parameters.threshold
        answers = [
            [
                {**found, "box": {name: round(value) for name, value in found["box"].items()}}
                for found in prediction["boxes"]
                if found["score"] >= threshold
            ]
            for prediction in predictions
        ]
        return answers[0] if single else answers

    def answer_schema(self) -> dict[str, Any]:
        corner = {"type": "integer", "minimum": 0}
        box = {"type": "object", "properties": dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), corner), "additionalProperties": False}
        one = {
            "type": "object",
            "properties": {"label": {"type": "string"}, "score": {"type": "number"}, "box": {**box, "required": list(box["properties"])}},
            "required": ["label", "score", "box"],
            "additionalProperties": False,
        }
        found = {"type": "array", "items": one}
        return {"anyOf": [found, {"type": "array", "items": found, "minItems": 1}]}

    def answer_difference(self, one: Any, other: Any) -> float:
        """Whole pixels may round either way."""
        return box_rules.difference(one, other, self.threshold, slack=1.0)


def _of_one_size(batch: Mapping[str, torch.Tensor]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The places of the images of each size in the batch, and those images without padding."""
    pixel_values = batch["pixel_values"]
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, size in enumerate(batch["sizes"].tolist()):
        groups.setdefault(tuple(size), []).append(place)
    for (height, width), places in groups.items():
        whole = len(groups) == 1 and (height, width) == tuple(pixel_values.shape[2:])
        yield places, pixel_values if whole else pixel_values[places, :, :height, :width]
