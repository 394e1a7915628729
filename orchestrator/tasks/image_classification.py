"""Image classification: one label of several, or any number of labels, for a picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.errors import InputError
from orchestrator.tasks import classification_scores, heads, images, rankings
from orchestrator.tasks import labels as label_rules
from orchestrator.tasks.augmentation import Augment
from orchestrator.tasks.base import PARTNER, Column, Example, Observation, Parameters, Prediction, Row, RowError, Task, largest_difference

if TYPE_CHECKING:
    import numpy as np
    import torch

TOP_K = 5
"""Labels answered where a client asks for no number of them, as in transformers' pipeline."""
_TOP = re.compile(r"top_([1-9]\d*)_accuracy")


class ImageClassificationParameters(Parameters):
    """`parameters` of a Hugging Face image-classification request."""

    top_k: Annotated[int, Field(gt=0)] | None = None
    """How many labels to answer, the likeliest first; None: 5."""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """What turns logits into scores; None: softmax for one label, sigmoid for several."""


class ImageClassification(Task):
    """What is in a picture: a product, a defect, a plant, a document's kind, …; one label or several."""

    modality: ClassVar[Literal["text", "image", "audio"]] = "image"
    parameters: ClassVar[type[Parameters]] = ImageClassificationParameters
    rows_at_once: ClassVar[int] = 128
    example_model: ClassVar[str | None] = "example://efficientnet-lite0"

    problem: Literal["single-label", "multi-label"] = "single-label"
    """One label for an image, or any number of labels."""
    labels: label_rules.LabelNames = None
    """Label names in the order of the model's outputs; None: those of the training rows, numbers by size, names sorted."""
    augment: Augment = Augment()
    """What is done to training images at random: {flip: true, crop: 0.5, color: 0.3, randaugment: {n: 2, m: 9}, mixup: 0.2, cutmix: 1}."""
    batch_norm: Literal["auto", "frozen", "trained"] = "auto"
    """frozen: batch normalisations keep their statistics while training, so that the result does not depend on micro-batches and workers;
    trained: they take those of each micro-batch. auto: frozen in a pretrained model, trained in one from scratch."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: rare labels count more in the loss, in inverse proportion to their rows."""
    weights: tuple[float, ...] | None = None
    """Weight of each label in the loss; set from the training rows when `class_weights` is balanced."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """multi-label: the score from which a label is given."""
    delimiter: str | None = None
    """multi-label: what stands between labels in a text column; None: `|` where there is one, else `,`."""

    @model_validator(mode="after")
    def _no_label_twice(self) -> Self:
        if twice := [name for name, count in Counter(self.labels or ()).items() if count > 1]:
            raise ValueError(f"labels names {twice[0]!r} twice (1, 1.0 and '1' are the same label)")
        return self

    @property
    def augments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.augment)

    @property
    def mixes(self) -> bool:
        return self.augment.mixes

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        label = {
            "single-label": Column(kind="label", target=True, help="the one right label, a name or a number"),
            "multi-label": Column(kind="any", target=True, help="the right labels: a list, a JSON list, or text such as a|b; empty: none"),
        }
        return {
            "image": Column(kind="image", help="the picture: a path (relative to the file it stands in) or URI, bytes, or base64"),
            "label": label[self.problem],
        }

    def clean(self, row: Row) -> Row:
        clean: Row = {"image": images.clean_image("image", row.get("image"))[0]}
        if "label" in row:
            clean["label"] = (
                label_rules.several_labels(row["label"], self.delimiter)
                if self.problem == "multi-label"
                else label_rules.one_label(row["label"], "one label (for several, set task.problem: multi-label)")
            )
        return clean

    def observe(self, rows: Sequence[Row]) -> Observation:
        targets = [row["label"] for row in rows if "label" in row]
        names = targets if self.problem == "single-label" else (name for given in targets for name in given)
        return {"rows": len(rows), "labels": dict(Counter(names))}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        train = observed.get("train", {})
        rows = int(train.get("rows", 0))
        if not rows:
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        label_rules.refuse_look_alikes(observed)
        label_rules.refuse_unlearnable(observed, several=self.problem == "multi-label")
        if self.labels is not None:
            label_rules.refuse_unlisted(self.labels, observed)
        label_rules.refuse_untrained(observed)
        counts = train["labels"]
        names = self.labels or label_rules.ordered(counts)
        weights = None
        if self.class_weights == "balanced" and self.problem == "single-label":
            weights = tuple(rows / (len(names) * counts[name]) for name in names)
        elif self.class_weights == "balanced":
            weights = tuple((rows - counts[name]) / counts[name] for name in names)
        return self.model_copy(update={"labels": names, "weights": weights})

    def stratum(self, row: Row) -> str | None:
        return row.get("label") if self.problem == "single-label" else None

    def self_contained(self, row: Row) -> Row:
        return {**row, "image": images.self_contained(row["image"])}

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """Each row is one example: uint8 pixels of the size that the model takes."""
        channels = images.channels(processor)
        examples = [images.example(images.pixels(images.load(row["image"], channels), processor)) for row in rows]
        for row, example in zip(rows, examples, strict=True):
            if "label" in row:
                example["labels"] = self._target(row)
        return [[example] for example in examples]

    def encode_to_train(self, rows: Sequence[Row], processor: Any, seeds: Sequence[int]) -> list[list[Example]]:
        """As `encode`, from images changed as `augment` says; where it mixes, the target is a share of each label."""
        import numpy as np

        if not self.augments:
            return self.encode(rows, processor)
        examples = []
        for row, seed in zip(rows, seeds, strict=True):
            rng = np.random.default_rng(seed)
            pixels = self._augmented(row, processor, rng)
            target: Any = self._target(row)
            if self.mixes:
                target = self._shares(row)
                if PARTNER in row:
                    pixels, target = self._mixed(pixels, target, row[PARTNER], processor, rng)
            examples.append([images.example(pixels) | {"labels": target}])
        return examples

    def _augmented(self, row: Row, processor: Any, rng: np.random.Generator) -> np.ndarray:
        image = self.augment.apply(images.load(row["image"], images.channels(processor)), rng)
        return images.pixels(image, processor)

    def _mixed(
        self, pixels: np.ndarray, target: list[float], partner: Row, processor: Any, rng: np.random.Generator
    ) -> tuple[np.ndarray, list[float]]:
        other = self._augmented(partner, processor, rng)
        _same_size([pixels.shape, other.shape])
        mixed, share = self.augment.mix(pixels, other, rng)
        return mixed, [share * one + (1 - share) * two for one, two in zip(target, self._shares(partner), strict=True)]

    def _target(self, row: Row) -> int | list[float]:
        return self._names.index(self._known(row)[0]) if self.problem == "single-label" else self._shares(row)

    def _shares(self, row: Row) -> list[float]:
        given = self._known(row)
        return [1.0 if name in given else 0.0 for name in self._names]

    def _known(self, row: Row) -> list[str]:
        given = [row["label"]] if self.problem == "single-label" else row["label"]
        if unknown := [name for name in given if name not in self._names]:
            raise RowError("label", f"one of {label_rules.listed(self._names)}", unknown[0])
        return given

    @property
    def _names(self) -> tuple[str, ...]:
        if self.labels is None:
            raise InputError("task.labels is not known yet: `fit` completes the task from the training rows.")
        return self.labels

    def length(self, example: Example) -> int:
        return images.length(example)

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        import torch

        _same_size([example["shape"] for example in examples])
        batch = {"pixel_values": torch.stack(images.numbers(examples, processor))}
        if "labels" in examples[0]:
            targets = [example["labels"] for example in examples]
            batch["labels"] = torch.tensor(targets, dtype=torch.float32 if isinstance(targets[0], list) else torch.long)
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it has no such head or reads no pictures of 1 or 3 channels."""
        advice = "one such as ResNet, ConvNeXt, ViT, Swin, DINOv2, MobileNet or EfficientNet"
        config = heads.config_with_head(base, "AutoModelForImageClassification", "image-classification head", advice, **from_hub)
        if getattr(config, "num_channels", 3) not in (1, 3):
            raise InputError(f"model.base: {base!r} reads images of {config.num_channels} channels; 3 (RGB) or 1 (grey) can be given.")
        return config

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForImageClassification` with this task's labels; a head for other labels is replaced by a fresh one."""
        from transformers import AutoModelForImageClassification

        from orchestrator.tasks import batch_norm

        from_hub = heads.from_hub(options)
        config = self.check_base(base, **from_hub)
        heads.name_labels(config, self._names)
        config.problem_type = {"single-label": "single_label_classification", "multi-label": "multi_label_classification"}[self.problem]
        model = AutoModelForImageClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True, **options)
        batch_norm.settle(model, self.batch_norm)
        return model

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Sum of the losses in fp32 and its count: images (with `weights` the weights of their labels), or images x labels for several.

        Targets are labels or, where images were mixed, shares of them. Label smoothing: Szegedy et al. 2015, arXiv 1512.00567; for
        several labels the targets move towards 1/2.
        """
        import torch
        from torch.nn import functional

        logits, target = _logits(model, batch), batch["labels"]
        weight = None if self.weights is None else torch.tensor(self.weights, dtype=torch.float32, device=logits.device)
        if self.problem == "multi-label":
            target = target * (1 - label_smoothing) + label_smoothing / 2
            total = functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="sum")
            return total, float(target.numel())
        total = functional.cross_entropy(logits, target, weight=weight, reduction="sum", label_smoothing=label_smoothing)
        if weight is None:
            return total, float(len(target))
        return total, float((weight[target] if target.dim() == 1 else target @ weight).sum())

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """The logits of each image, float32 of shape (labels,)."""
        return list(_logits(model, batch).cpu().numpy())

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """single-label: `label`, its `score`, `scores` of all labels; multi-label: `labels`, `scores`; both with `logits`."""
        logits = outputs[0].astype("float64")
        scores = dict(zip(self._names, classification_scores.applied(self._default_function, logits), strict=True))
        raw = [float(value) for value in logits]
        if self.problem == "multi-label":
            return {"labels": [name for name, score in scores.items() if score >= self.threshold], "scores": scores, "logits": raw}
        label = max(scores, key=lambda name: scores[name])
        return {"label": label, "score": scores[label], "scores": scores, "logits": raw}

    @property
    def _default_function(self) -> str:
        return {"single-label": "softmax", "multi-label": "sigmoid"}[self.problem]

    def metrics(self) -> tuple[str, ...]:
        """Those of a classifier and, for one label, `top_3_accuracy` and `top_5_accuracy` (of any number that is asked for)."""
        top = ("top_3_accuracy", "top_5_accuracy") if self.problem == "single-label" else ()
        known = classification_scores.known(self.problem, self.labels or ())
        defaults = len(classification_scores.DEFAULTS[self.problem])
        return known[:defaults] + top + known[defaults:]

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Named numbers; one that has no value here is left out, as is `top_5_accuracy` of five labels or fewer."""
        single = self.problem == "single-label"
        if metrics is None:
            wanted = [*classification_scores.DEFAULTS[self.problem], *(["top_5_accuracy"] if single else [])]
        else:
            wanted = list(metrics)
        if wrong := [name for name in wanted if single and name.startswith("top_") and not _TOP.fullmatch(name)]:
            raise InputError(
                f"evaluation.metrics: {wrong[0]!r} is no metric of this task. Did you mean 'top_5_accuracy' (or another number)?"
            )
        tops = {name: int(found[1]) for name in wanted if single and (found := _TOP.fullmatch(name))}
        scores = classification_scores.score(self.problem, self._names, predictions, rows, [name for name in wanted if name not in tops])
        tops = {name: count for name, count in tops.items() if count < len(self._names)}
        return scores | (_top_accuracies(predictions, rows, tops) if tops and len(rows) else {})

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`per_class` (precision, recall, F1, rows of each label) and, for one label a row, `confusion_matrix`."""
        return classification_scores.tables(self.problem, self._names, predictions, rows)

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        """Scores within `tolerance`: then labels may differ only where a tie or the threshold lies within it."""
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        return largest_difference(one["scores"], other["scores"])

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
        """`[{label, score}, …]`, likeliest first; for a list of images a list of these."""
        function = parameters.function_to_apply or self._default_function
        answers = []
        for prediction in predictions:
            scores = prediction["scores"]
            if function != self._default_function:
                scores = dict(zip(self._names, classification_scores.applied(function, prediction["logits"]), strict=True))
            answers.append(rankings.scored_labels(scores, parameters.top_k or TOP_K))
        return answers[0] if single else answers

    def answer_schema(self) -> dict[str, Any]:
        return {"anyOf": [rankings.SCORED_LABELS, {"type": "array", "items": rankings.SCORED_LABELS, "minItems": 1}]}

    def answer_difference(self, one: Any, other: Any) -> float:
        """Label by label; one that only one answer has counts from the least score of the other: it came just below."""
        return rankings.labels_difference(one, other)


def _logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(pixel_values=batch["pixel_values"]).logits.float()


def _same_size(shapes: Sequence[Sequence[int]]) -> None:
    sizes = sorted({tuple(shape[1:]) for shape in shapes})
    if len(sizes) > 1:
        raise InputError(
            f"model.base: its image processor leaves images of different sizes ({sizes[0]} and {sizes[-1]}, height and width), and a classifier "
            "takes one size; set `size` to a height and a width, or do_center_crop, in its preprocessor_config.json."
        )


def _top_accuracies(predictions: Sequence[Prediction], rows: Sequence[Row], tops: Mapping[str, int]) -> dict[str, float]:
    """The share of rows whose label is among the so many likeliest; labels of equal score count in its favour."""
    hits = dict.fromkeys(tops, 0)
    for prediction, row in zip(predictions, rows, strict=True):
        right = prediction["scores"][row["label"]]
        above = sum(score > right for score in prediction["scores"].values())
        for name, count in tops.items():
            hits[name] += above < count
    return {name: count / len(rows) for name, count in hits.items()}
