"""Text classification: one label of several, any number of labels, or a number, for a text or a pair of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.errors import InputError
from orchestrator.tasks import heads, rankings, texts
from orchestrator.tasks import labels as label_rules
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task, largest_difference
from orchestrator.tasks.classification_scores import applied

if TYPE_CHECKING:
    import torch


class ClassificationParameters(Parameters):
    """`parameters` of a Hugging Face text-classification request."""

    top_k: Annotated[int, Field(gt=0)] | None = None
    """How many labels to answer, the likeliest first; None: all."""
    function_to_apply: Literal["softmax", "sigmoid", "none"] | None = None
    """What turns logits into scores; None: softmax for one label, sigmoid for several, none for a number."""


class TextClassification(Task):
    """Sentiment, topic, spam, toxicity, entailment, …, and scores such as ratings or the similarity of two texts."""

    parameters: ClassVar[type[Parameters]] = ClassificationParameters
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"mse", "mae"})

    problem: Literal["single-label", "multi-label", "regression"] = "single-label"
    """One label for a text, any number of labels, or a number."""
    labels: label_rules.LabelNames = None
    """Label names in the order of the model's outputs; None: those of the training rows, numbers by size, names sorted."""
    max_length: Annotated[int, Field(ge=4)] | None = None
    """Tokens kept of a text (or pair); None: the tokenizer's limit, or 512 where it has none."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: rare labels count more in the loss, in inverse proportion to their rows."""
    weights: tuple[float, ...] | None = None
    """Weight of each label in the loss; set from the training rows when `class_weights` is balanced."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """multi-label: the score from which a label is given."""
    delimiter: str | None = None
    """multi-label: what stands between labels in a text column; None: `|` where there is one, else `,`."""

    @model_validator(mode="after")
    def _fits_the_problem(self) -> Self:
        if self.labels is not None:
            twice = [name for name, count in Counter(self.labels).items() if count > 1]
            if twice:
                raise ValueError(f"labels names {twice[0]!r} twice (1, 1.0 and '1' are the same label)")
        if self.problem == "regression" and (self.labels is not None or self.class_weights != "none"):
            raise ValueError("problem: regression predicts a number and takes neither labels nor class_weights")
        return self

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        kind, what = {
            "single-label": ("label", "the one right label, a name or a number"),
            "multi-label": ("any", "the right labels: a list, a JSON list, or text such as a|b; empty: none"),
            "regression": ("number", "the number to predict"),
        }[self.problem]
        return {
            "text": Column(kind="text", help="the text"),
            "text_pair": Column(kind="text", required=False, help="a second text, where the question is about two"),
            "label": Column.parse({"kind": kind, "target": True, "help": what}),
        }

    def clean(self, row: Row) -> Row:
        clean: Row = {"text": texts.clean_text("text", row.get("text"))}
        if not label_rules.missing(row.get("text_pair")):
            clean["text_pair"] = texts.clean_text("text_pair", row["text_pair"])
        if "label" in row:
            clean["label"] = self._clean_label(row["label"])
        return clean

    def _clean_label(self, value: Any) -> Any:
        if self.problem == "multi-label":
            return label_rules.several_labels(value, self.delimiter)
        if self.problem == "regression":
            return label_rules.one_number(value)
        return label_rules.one_label(value, "one label (for several, set task.problem: multi-label)")

    def observe(self, rows: Sequence[Row]) -> Observation:
        targets = [row["label"] for row in rows if "label" in row]
        if self.problem == "regression":
            return {"rows": len(rows), "bits": label_rules.bit_counts(targets)}
        names = targets if self.problem == "single-label" else (name for given in targets for name in given)
        return {"rows": len(rows), "labels": dict(Counter(names))}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        train = observed.get("train", {})
        rows = int(train.get("rows", 0))
        if not rows:
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        if self.problem == "regression":
            if all(count in (0, rows) for count in train.get("bits", {}).values()):
                raise InputError(f"All {rows:,} training rows have the same number in `label`, so there is nothing to learn.")
            return self
        label_rules.refuse_look_alikes(observed)
        label_rules.refuse_unlearnable(observed, several=self.problem == "multi-label")
        if self.labels is not None:
            label_rules.refuse_unlisted(self.labels, observed)
        label_rules.refuse_untrained(observed)
        counts = train["labels"]
        names = self.labels or label_rules.ordered(counts)
        weights = None
        if self.class_weights == "balanced":
            if self.problem == "single-label":
                weights = tuple(rows / (len(names) * counts[name]) for name in names)
            else:
                weights = tuple((rows - counts[name]) / counts[name] for name in names)
        return self.model_copy(update={"labels": names, "weights": weights})

    def stratum(self, row: Row) -> str | None:
        return row.get("label") if self.problem == "single-label" else None

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """Each row is one example, cut at the limit; `truncated` says whether it was."""
        pairs = [row.get("text_pair") for row in rows]
        examples = texts.encode([row["text"] for row in rows], pairs, processor, texts.limit(processor, self.max_length))
        if any("label" in row for row in rows):
            places = {name: place for place, name in enumerate(self._names)}
            for row, example in zip(rows, examples, strict=True):
                if "label" in row:
                    example["labels"] = self._target(row["label"], places)
        return [[example] for example in examples]

    def _target(self, label: Any, places: Mapping[str, int]) -> int | float | list[float]:
        if self.problem == "regression":
            return float(label)
        given = [label] if self.problem == "single-label" else label
        if unknown := [name for name in given if name not in places]:
            raise RowError("label", f"one of {label_rules.listed(self._names)}", unknown[0])
        if self.problem == "single-label":
            return places[label]
        return [1.0 if name in given else 0.0 for name in self._names]

    @property
    def _names(self) -> tuple[str, ...]:
        if self.problem == "regression":
            return ("value",)
        if self.labels is None:
            raise InputError("task.labels is not known yet: `fit` completes the task from the training rows.")
        return self.labels

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        import numpy as np
        import torch

        batch = texts.pad(examples, processor)
        if "labels" in examples[0]:
            kind = torch.long if self.problem == "single-label" else torch.float32
            batch["labels"] = torch.as_tensor(np.asarray([example["labels"] for example in examples]), dtype=kind)
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it has no such head or fewer positions than `max_length`."""
        advice = "an encoder such as BERT, RoBERTa, DeBERTa or ModernBERT, or a decoder such as Llama or Qwen"
        return heads.config_with_head(
            base, "AutoModelForSequenceClassification", "sequence-classification head", advice, self.max_length, **from_hub
        )

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForSequenceClassification` with this task's labels; a head for other labels is replaced by a fresh one.

        Raises `InputError` where the base model has no such head or fewer positions than `max_length`.
        """
        from transformers import AutoModelForSequenceClassification

        from_hub = heads.from_hub(options)
        config = self.check_base(base, **from_hub)
        heads.name_labels(config, self._names)
        config.problem_type = {"single-label": "single_label_classification", "multi-label": "multi_label_classification"}.get(
            self.problem, "regression"
        )
        if config.get_text_config().pad_token_id is None:
            _set_pad_token(config, base, from_hub)
        return AutoModelForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True, **options)

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Sum of the losses in fp32 and its count, such that sum / count is the mean that transformers reports.

        Cross-entropy counts rows (with `weights` their weights, as torch's weighted mean does), binary cross-entropy
        rows x labels, squared error rows. Label smoothing: Szegedy et al. 2015, arXiv 1512.00567; for several labels the
        targets move towards 1/2.
        """
        import torch
        from torch.nn import functional

        logits = _logits(model, batch)
        target = batch["labels"]
        weight = None if self.weights is None else torch.tensor(self.weights, dtype=torch.float32, device=logits.device)
        if self.problem == "single-label":
            total = functional.cross_entropy(logits, target, weight=weight, reduction="sum", label_smoothing=label_smoothing)
            return total, float(len(target)) if weight is None else float(weight[target].sum())
        if self.problem == "multi-label":
            target = target * (1 - label_smoothing) + label_smoothing / 2
            total = functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="sum")
            return total, float(target.numel())
        return functional.mse_loss(logits.squeeze(-1), target, reduction="sum"), float(len(target))

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """The logits of each example, float32 of shape (labels,); of shape (1,) for a number."""
        return list(_logits(model, batch).cpu().numpy())

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """single-label: `label`, its `score`, `scores` of all labels; multi-label: `labels`, `scores`; both with `logits`. regression: `value`."""
        logits = outputs[0].astype("float64")
        if self.problem == "regression":
            return {"value": float(logits[0])}
        scores = dict(zip(self._names, applied(self._default_function, logits), strict=True))
        raw = [float(value) for value in logits]
        if self.problem == "multi-label":
            return {"labels": [name for name, score in scores.items() if score >= self.threshold], "scores": scores, "logits": raw}
        label = max(scores, key=lambda name: scores[name])
        return {"label": label, "score": scores[label], "scores": scores, "logits": raw}

    @property
    def _default_function(self) -> str:
        return {"single-label": "softmax", "multi-label": "sigmoid", "regression": "none"}[self.problem]

    def metrics(self) -> tuple[str, ...]:
        """The default ones, then micro and weighted averages, then `f1/<label>`, `precision/<label>` and `recall/<label>`."""
        from orchestrator.tasks.classification_scores import known

        return known(self.problem, self.labels or ())

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Named numbers; one that has no value here (ROC AUC where the rows have one label only) is left out."""
        from orchestrator.tasks.classification_scores import score

        return score(self.problem, self._names, predictions, rows, metrics)

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`per_class` (precision, recall, F1, rows of each label) and, for one label a row, `confusion_matrix`."""
        from orchestrator.tasks.classification_scores import tables

        return {} if self.problem == "regression" else tables(self.problem, self._names, predictions, rows)

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        """Scores within `tolerance`; then labels may differ only where a tie or the threshold lies within it, which scores say already.

        A number may differ by `tolerance` of its size, or of 1 where it is smaller. Logits are not compared: far from
        zero they differ without a difference to the answer.
        """
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        if self.problem == "regression":
            return abs(one["value"] - other["value"]) / max(1.0, abs(one["value"]))
        return largest_difference(one["scores"], other["scores"])

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        pair = {
            "type": "object",
            "properties": {"text": text, "text_pair": text},
            "required": ["text"],
            "additionalProperties": False,
        }
        return {"anyOf": [text, pair, {"type": "array", "items": {"anyOf": [text, pair]}, "minItems": 1}]}

    def inputs_example(self) -> Any:
        return "I love this camera, but the battery is poor."

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """Rows of a string, `{"text": …, "text_pair": …}`, or a list of these."""
        if isinstance(inputs, list):
            if not inputs:
                raise InputError("`inputs` is an empty list; give at least one text.")
            return [self._row_from(item, f"inputs[{place}]") for place, item in enumerate(inputs)]
        return [self._row_from(inputs, "inputs")]

    def _row_from(self, item: Any, where: str) -> Row:
        row = {"text": item} if isinstance(item, str) else item
        if not isinstance(row, dict):
            raise InputError(f'`{where}` is {texts.short(item)}; it must be a text or {{"text": …, "text_pair": …}}.')
        if unknown := row.keys() - {"text", "text_pair"}:
            raise InputError(f"`{where}` has the unknown key {min(unknown)!r}; it may have text and text_pair.")
        for key, value in row.items():
            if not isinstance(value, str):
                raise InputError(f"`{where}.{key}` is {texts.short(value)}; it must be a text.")
        try:
            return self.clean(row)
        except RowError as error:
            raise InputError(f"`{where}`: expected {error.expected}, found {texts.short(error.found)}.") from error

    def inputs_from(self, row: Row) -> Any:
        """The text, or `{"text": …, "text_pair": …}` where the row has a pair."""
        return {"text": row["text"], "text_pair": row["text_pair"]} if row.get("text_pair") is not None else row["text"]

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`[[{label, score}, …], …]`, likeliest first: a list a row also for one row, as Hugging Face clients need it."""
        function = parameters.function_to_apply or self._default_function
        answers = []
        for prediction in predictions:
            if self.problem == "regression":
                scores = dict(zip(self._names, applied(function, [prediction["value"]]), strict=True))
            elif function == self._default_function:
                scores = prediction["scores"]
            else:
                scores = dict(zip(self._names, applied(function, prediction["logits"]), strict=True))
            answers.append(rankings.scored_labels(scores, parameters.top_k))
        return answers

    def answer_schema(self) -> dict[str, Any]:
        return {"type": "array", "items": rankings.SCORED_LABELS}

    def answer_difference(self, one: Any, other: Any) -> float:
        """Label by label: labels whose scores are almost equal may stand in either order."""
        by_label = [[{entry["label"]: entry["score"] for entry in entries} for entries in answers] for answers in (one, other)]
        return largest_difference(*by_label)


def _logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()


def _set_pad_token(config: Any, base: str, from_hub: Mapping[str, Any]) -> None:
    """A decoder's head reads the last token that is not padding, so it must know which token the tokenizer pads with."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, **from_hub)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise InputError(f"model.base: the tokenizer of {base!r} has neither a padding nor an end token, so texts can't be batched.")
    config.get_text_config().pad_token_id = pad
    config.pad_token_id = pad
