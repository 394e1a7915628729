"""Audio classification: one label of several for a sound: a command, a language, an instrument, a machine that is failing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from orchestrator.errors import InputError
from orchestrator.tasks import heads, rankings, sounds
from orchestrator.tasks import labels as label_rules
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task, largest_difference
from orchestrator.tasks.classification_scores import applied
from orchestrator.tasks.sound_augmentation import SoundAugment
from orchestrator.tasks.sound_processor import SoundProcessor, of_base

if TYPE_CHECKING:
    import numpy as np
    import torch


class AudioClassificationParameters(Parameters):
    """`parameters` of a Hugging Face audio-classification request."""

    top_k: Annotated[int, Field(gt=0)] | None = None
    """How many labels to answer, the likeliest first; None: all."""
    function_to_apply: Literal["softmax", "sigmoid", "none"] = "softmax"
    """What turns logits into scores."""


class AudioClassification(Task):
    """What is heard: a spoken command, a language, a mood, an event."""

    modality: ClassVar[Literal["text", "image", "audio"]] = "audio"
    parameters: ClassVar[type[Parameters]] = AudioClassificationParameters
    rows_at_once: ClassVar[int] = 32

    labels: label_rules.LabelNames = None
    """Label names in the order of the model's outputs; None: those of the training rows, numbers by size, names sorted."""
    max_length_s: Annotated[float, Field(ge=0.1, le=3600)] = 10.0
    """Seconds that are heard of a sound, from its beginning (while training with `augment` from anywhere in it); the share of longer ones is reported.
    Whisper pads all to this length, at most 30."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: rare labels count more in the loss, in inverse proportion to their rows."""
    weights: tuple[float, ...] | None = None
    """Weight of each label in the loss; set from the training rows when `class_weights` is balanced."""
    augment: SoundAugment = SoundAugment()
    """What is done to training sounds at random: {speed: 0.1, gain_db: 6, noise_snr_db: [10, 40]}; nothing by default."""

    @field_validator("labels")
    @classmethod
    def _each_once(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if twice := [name for name, count in Counter(labels or ()).items() if count > 1]:
            raise ValueError(f"labels names {twice[0]!r} twice (1, 1.0 and '1' are the same label)")
        return labels

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        return {
            "audio": Column(kind="audio", help="the sound: a path relative to the file, bytes, or what `datasets` writes"),
            "label": Column(kind="label", target=True, help="the one right label, a name or a number"),
        }

    def clean(self, row: Row) -> Row:
        clean: Row = {}
        if "label" in row:
            clean["label"] = label_rules.one_label(row["label"], "one label")
        used_s = None if self.augments else self.max_length_s
        return {"audio": sounds.clean("audio", row.get("audio"), longest_s=float("inf"), used_s=used_s), **clean}

    def observe(self, rows: Sequence[Row]) -> Observation:
        return {"rows": len(rows), "labels": dict(Counter(row["label"] for row in rows if "label" in row))}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        train = observed.get("train", {})
        rows = int(train.get("rows", 0))
        if not rows:
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        label_rules.refuse_look_alikes(observed)
        label_rules.refuse_unlearnable(observed, several=False)
        if self.labels is not None:
            label_rules.refuse_unlisted(self.labels, observed)
        label_rules.refuse_untrained(observed)
        counts = train["labels"]
        names = self.labels or label_rules.ordered(counts)
        weights = tuple(rows / (len(names) * counts[name]) for name in names) if self.class_weights == "balanced" else None
        return self.model_copy(update={"labels": names, "weights": weights})

    def stratum(self, row: Row) -> str | None:
        return row.get("label")

    def self_contained(self, row: Row) -> Row:
        return {**row, "audio": sounds.self_contained("audio", row["audio"])}

    # ---- tensors ---------------------------------------------------------------------------------------------
    @property
    def augments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.augment)

    def encode(self, rows: Sequence[Row], processor: SoundProcessor) -> list[list[Example]]:
        """Each row is one example, cut at the limit; `truncated` says whether it was."""
        return [[self._encode(row, processor, None)] for row in rows]

    def encode_to_train(self, rows: Sequence[Row], processor: SoundProcessor, seeds: Sequence[int]) -> list[list[Example]]:
        import numpy as np

        return [[self._encode(row, processor, np.random.default_rng(seed))] for row, seed in zip(rows, seeds, strict=True)]

    def _encode(self, row: Row, processor: SoundProcessor, rng: np.random.Generator | None) -> Example:
        most, start = processor.window_s or self.max_length_s, 0.0
        beyond = sounds.seconds("audio", row["audio"]) - most
        if rng is not None and self.augment and beyond > 0:
            start = float(rng.uniform(0, beyond))
        samples = sounds.load("audio", row["audio"], processor.rate, start_s=start, most_s=most)
        if rng is not None and self.augment:
            limit = round(most * processor.rate)
            samples = self.augment.of_samples(samples, processor.rate, rng)[:limit]
        example = processor.encode(samples, self.augment, rng)
        if "label" in row:
            places = {name: place for place, name in enumerate(self._names)}
            if row["label"] not in places:
                raise RowError("label", f"one of {label_rules.listed(self._names)}", row["label"])
            example["labels"] = places[row["label"]]
        return {**example, "truncated": beyond > 0}

    @property
    def _names(self) -> tuple[str, ...]:
        if self.labels is None:
            raise InputError("task.labels is not known yet: `fit` completes the task from the training rows.")
        return self.labels

    def length(self, example: Example) -> int:
        return example["length"]

    def collate(self, examples: Sequence[Example], processor: SoundProcessor) -> dict[str, torch.Tensor]:
        import torch

        batch = processor.collate(examples)
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def processor(self, base: str, **from_hub: Any) -> SoundProcessor:
        return of_base(base, transcripts=False, window_s=self.max_length_s, **from_hub)

    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where transformers has no such head for it."""
        advice = "wav2vec2, hubert, wavlm, an audio-spectrogram-transformer, or Whisper, whose encoder is used"
        return heads.config_with_head(base, "AutoModelForAudioClassification", "audio-classification head", advice, **from_hub)

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForAudioClassification` with this task's labels; a head for other labels is replaced by a fresh one."""
        from transformers import AutoModelForAudioClassification

        from orchestrator.tasks import sound_models

        from_hub = heads.from_hub(options)
        config = sound_models.settle(self.check_base(base, **from_hub))
        heads.name_labels(config, self._names)
        model = AutoModelForAudioClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True, **options)
        if config.model_type == "whisper":
            sound_models.shorten(model, self.max_length_s)
        return sound_models.steady(model)

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Cross-entropy in fp32, summed, and the number of rows (with `weights` the sum of theirs)."""
        import torch
        from torch.nn import functional

        from orchestrator.tasks import sound_models

        logits, target = sound_models.logits(model, batch)[0], batch["labels"]
        weight = None if self.weights is None else torch.tensor(self.weights, dtype=torch.float32, device=logits.device)
        total = functional.cross_entropy(logits, target, weight=weight, reduction="sum", label_smoothing=label_smoothing)
        return total, float(len(target)) if weight is None else float(weight[target].sum())

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """The logits of each example, float32 of shape (labels,)."""
        from orchestrator.tasks import sound_models

        return list(sound_models.logits(model, batch)[0].cpu().numpy())

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`label`, its `score`, `scores` of all labels, which add up to 1, and `logits`."""
        raw = [float(value) for value in outputs[0]]
        scores = dict(zip(self._names, applied("softmax", raw), strict=True))
        label = max(scores, key=lambda name: scores[name])
        return {"label": label, "score": scores[label], "scores": scores, "logits": raw}

    def metrics(self) -> tuple[str, ...]:
        """As those of text classification with one label."""
        from orchestrator.tasks.classification_scores import known

        return known("single-label", self.labels or ())

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        from orchestrator.tasks.classification_scores import score

        return score("single-label", self._names, predictions, rows, metrics)

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`per_class` (precision, recall, F1, rows of each label) and `confusion_matrix`."""
        from orchestrator.tasks.classification_scores import tables

        return tables("single-label", self._names, predictions, rows)

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        """Scores within `tolerance`; labels may differ only where a tie lies within it, which scores say already."""
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        return largest_difference(one["scores"], other["scores"])

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        return sounds.inputs_schema()

    def inputs_example(self) -> Any:
        return sounds.example()

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """The row of a sound (bytes, or base64), or those of a list of sounds."""
        return [{"audio": sound} for sound in sounds.several_from_client("audio", inputs, longest_s=float("inf"))]

    def inputs_from(self, row: Row) -> Any:
        return sounds.to_base64("audio", row["audio"])

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`[{label, score}, …]`, likeliest first; a list of these for a list."""
        answers = []
        for prediction in predictions:
            scores = prediction["scores"]
            if parameters.function_to_apply != "softmax":
                scores = dict(zip(self._names, applied(parameters.function_to_apply, prediction["logits"]), strict=True))
            answers.append(rankings.scored_labels(scores, parameters.top_k))
        return answers[0] if single else answers

    def answer_schema(self) -> dict[str, Any]:
        return {"anyOf": [rankings.SCORED_LABELS, {"type": "array", "items": rankings.SCORED_LABELS}]}

    def answer_difference(self, one: Any, other: Any) -> float:
        """Label by label; one that only one answer has counts from the least score of the other: it came just below."""
        return rankings.labels_difference(one, other)
