"""Text classification: one label of several, any number of labels, or a number, for a text or a pair of texts."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.errors import InputError, nearest
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task, largest_difference

if TYPE_CHECKING:
    import numpy as np
    import torch

DEFAULT_MAX_LENGTH = 512
"""Tokens kept of a text where neither the task nor the tokenizer names a limit."""

_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))\.0+")


def label_name(value: Any) -> str:
    """The one spelling of a label: 1, 1.0, "1" and "1.0" are "1"; true, "True" and "TRUE" are "true"; other text stays as it is."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    text = str(value)
    if text.lower() in ("true", "false"):
        return text.lower()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def _label_names(value: Any) -> Any:
    return tuple(label_name(name) for name in value) if isinstance(value, (list, tuple)) else value


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
    labels: Annotated[tuple[str, ...] | None, BeforeValidator(_label_names)] = None
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
        clean: Row = {"text": _text("text", row.get("text"))}
        if not _missing(row.get("text_pair")):
            clean["text_pair"] = _text("text_pair", row["text_pair"])
        if "label" in row:
            clean["label"] = self._clean_label(row["label"])
        return clean

    def _clean_label(self, value: Any) -> Any:
        if self.problem == "multi-label":
            return self._clean_label_list(value)
        expected = "a label" if self.problem == "single-label" else "a number"
        if _missing(value) or (isinstance(value, str) and not value.strip()):
            raise RowError("label", expected, value)
        if self.problem == "single-label":
            return _one_label(value, "one label (for several, set task.problem: multi-label)")
        try:
            number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            raise RowError("label", expected, value) from None
        if not math.isfinite(number):
            raise RowError("label", "a finite number", value)
        return number

    def _clean_label_list(self, value: Any) -> list[str]:
        expected = "a list of labels, or text such as a|b (empty: none of them)"
        if _missing(value):
            raise RowError("label", expected, value)
        if isinstance(value, str):
            text = value.strip()
            if text.startswith("["):
                try:
                    parts = json.loads(text)
                except ValueError:
                    raise RowError("label", "a JSON list of labels", value) from None
            else:
                delimiter = self.delimiter or ("|" if "|" in text else ",")
                parts = [part.strip() for part in text.split(delimiter) if part.strip()]
        elif isinstance(value, (list, tuple)):
            parts = list(value)
        elif isinstance(value, (bool, int, float)):
            parts = [value]
        else:
            raise RowError("label", expected, value)
        if any(_missing(part) or (isinstance(part, str) and not part.strip()) for part in parts):
            raise RowError("label", "a list without empty labels", value)
        return sorted({_one_label(part, "a flat list of labels") for part in parts})

    def observe(self, rows: Sequence[Row]) -> Observation:
        targets = [row["label"] for row in rows if "label" in row]
        if self.problem == "regression":
            return {"rows": len(rows), "bits": _bit_counts(targets)}
        names = targets if self.problem == "single-label" else (name for labels in targets for name in labels)
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
        counts: dict[str, int] = {name: int(count) for name, count in train.get("labels", {}).items()}
        _refuse_look_alikes(observed)
        self._refuse_useless(counts, rows)
        if self.labels is not None:
            _refuse_unlisted(self.labels, observed)
        _refuse_untrained(counts, observed)
        if self.labels is not None and (unseen := [name for name in self.labels if name not in counts]):
            raise InputError(f"task.labels names {_listed(unseen)}, which no row has. The rows have {_counted(counts)}.")
        labels = self.labels or tuple(sorted(counts, key=_label_order(counts)))
        weights = None
        if self.class_weights == "balanced":
            if self.problem == "single-label":
                weights = tuple(rows / (len(labels) * counts[name]) for name in labels)
            else:
                weights = tuple((rows - counts[name]) / counts[name] for name in labels)
        return self.model_copy(update={"labels": labels, "weights": weights})

    def _refuse_useless(self, counts: Mapping[str, int], rows: int) -> None:
        if not counts:
            raise InputError(f"None of the {rows:,} training rows has a label, so there is nothing to learn.")
        if self.problem == "single-label" and len(counts) == 1:
            raise InputError(f"All {rows:,} training rows have the label {next(iter(counts))!r}; a classifier needs two labels or more.")
        if self.problem == "multi-label" and all(count == rows for count in counts.values()):
            raise InputError(f"All {rows:,} training rows have the same labels, {_listed(counts)}, so there is nothing to learn.")
        if len(counts) > 50 and 2 * len(counts) > rows:
            numbers = all(_number(name) is not None for name in counts)
            advice = "to predict a number, set task.problem: regression" if numbers else "is data.columns.label the right column?"
            raise InputError(f"The {rows:,} training rows have {len(counts):,} different labels, such as {_listed(counts)}: {advice}.")

    def stratum(self, row: Row) -> str | None:
        return row.get("label") if self.problem == "single-label" else None

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """Each row is one example, cut at the limit; `truncated` says whether it was.

        The tokenizer is called without truncation and padding, always: a fast tokenizer keeps these settings inside and
        can't change them while another thread encodes ("Already borrowed"). So cutting is done here, by the rules
        of `truncation=True` (the longer of two texts first, from the tokenizer's truncation side).
        """
        examples: list[Example | None] = [None] * len(rows)
        for paired in (False, True):
            chosen = [index for index, row in enumerate(rows) if (row.get("text_pair") is not None) == paired]
            if not chosen:
                continue
            texts = [rows[index]["text"] for index in chosen]
            pairs = [rows[index]["text_pair"] for index in chosen] if paired else None
            encoded = processor(texts, pairs, padding=False, truncation=False, verbose=False)
            limit = self.limit(processor)
            for place, index in enumerate(chosen):
                example: Example = {key: values[place] for key, values in encoded.items()}
                length = len(example["input_ids"])
                if length > limit:
                    example = _cut(encoded, place, processor, texts[place], pairs[place] if pairs else None, limit)
                elif length == 0:
                    filler = processor.eos_token_id if processor.eos_token_id is not None else processor.pad_token_id
                    example = {key: [{"input_ids": filler, "attention_mask": 1}.get(key, 0)] for key in example}
                example["truncated"] = length > limit
                if "label" in rows[index]:
                    example["labels"] = self._target(rows[index]["label"])
                examples[index] = example
        return [[example] for example in examples if example is not None]

    def limit(self, processor: Any) -> int:
        """Most tokens of an example, special tokens included."""
        known = int(processor.model_max_length) if processor.model_max_length < 1_000_000 else DEFAULT_MAX_LENGTH
        return self.max_length or known

    def _target(self, label: Any) -> int | float | list[float]:
        if self.problem == "regression":
            return float(label)
        places = {name: place for place, name in enumerate(self._names)}
        given = [label] if self.problem == "single-label" else label
        if unknown := [name for name in given if name not in places]:
            raise RowError("label", f"one of {_listed(self._names)}", unknown[0])
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
        import torch

        longest = max(len(example["input_ids"]) for example in examples)
        fillers = {"input_ids": processor.pad_token_id, "token_type_ids": processor.pad_token_type_id, "attention_mask": 0}
        left = processor.padding_side == "left"
        batch: dict[str, torch.Tensor] = {}
        for key in examples[0].keys() - {"labels", "truncated"}:
            filler = fillers.get(key, 0)
            rows = []
            for example in examples:
                values = list(example[key])
                padding = [filler] * (longest - len(values))
                rows.append(padding + values if left else values + padding)
            batch[key] = torch.tensor(rows, dtype=torch.long)
        if "labels" in examples[0]:
            kind = torch.long if self.problem == "single-label" else torch.float32
            batch["labels"] = torch.tensor([_plain(example["labels"]) for example in examples], dtype=kind)
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it has no such head or fewer positions than `max_length`."""
        from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(base, **from_hub)
        remote = "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {})
        if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not remote:
            raise InputError(
                f"model.base: {base!r} is a {config.model_type!r} model, for which transformers has no sequence-classification head; "
                "choose an encoder such as BERT, RoBERTa, DeBERTa or ModernBERT, or a decoder such as Llama or Qwen."
            )
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if self.max_length is not None and positions and self.max_length > positions:
            raise InputError(f"task.max_length is {self.max_length}, but the base model {base!r} has only {positions} positions.")
        return config

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForSequenceClassification` with this task's labels; a head for other labels is replaced by a fresh one.

        Raises `InputError` where the base model has no such head or fewer positions than `max_length`.
        """
        from transformers import AutoModelForSequenceClassification

        from_hub = {key: options[key] for key in ("revision", "trust_remote_code", "token", "cache_dir") if key in options}
        config = self.check_base(base, **from_hub)
        config.id2label = dict(enumerate(self._names))
        config.label2id = {name: place for place, name in enumerate(self._names)}
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
        scores = dict(zip(self._names, _apply(self._default_function, logits), strict=True))
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
            "properties": {"text": text, "text_pair": {"type": "string"}},
            "required": ["text"],
            "additionalProperties": False,
        }
        return {"anyOf": [text, pair, {"type": "array", "items": {"anyOf": [text, pair]}, "minItems": 1}]}

    def inputs_example(self) -> Any:
        return "I love this camera, but the battery is poor."

    def rows_from(self, inputs: Any) -> list[Row]:
        """Rows of a string, `{"text": …, "text_pair": …}`, or a list of these."""
        if isinstance(inputs, list):
            if not inputs:
                raise InputError("`inputs` is an empty list; give at least one text.")
            return [self._row_from(item, f"inputs[{place}]") for place, item in enumerate(inputs)]
        return [self._row_from(inputs, "inputs")]

    def _row_from(self, item: Any, where: str) -> Row:
        row = {"text": item} if isinstance(item, str) else item
        if not isinstance(row, dict):
            raise InputError(f'`{where}` is {_short(item)}; it must be a text or {{"text": …, "text_pair": …}}.')
        if unknown := row.keys() - {"text", "text_pair"}:
            raise InputError(f"`{where}` has the unknown key {min(unknown)!r}; it may have text and text_pair.")
        for key, value in row.items():
            if not isinstance(value, str):
                raise InputError(f"`{where}.{key}` is {_short(value)}; it must be a text.")
        try:
            return self.clean(row)
        except RowError as error:
            raise InputError(f"`{where}`: expected {error.expected}, found {_short(error.found)}.") from error

    def inputs_from(self, row: Row) -> Any:
        """The text, or `{"text": …, "text_pair": …}` where the row has a pair."""
        return {"text": row["text"], "text_pair": row["text_pair"]} if row.get("text_pair") is not None else row["text"]

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`[[{label, score}, …], …]`, likeliest first: a list a row also for one row, as Hugging Face clients need it."""
        function = parameters.function_to_apply or self._default_function
        answers = []
        for prediction in predictions:
            if self.problem == "regression":
                scores = dict(zip(self._names, _apply(function, [prediction["value"]]), strict=True))
            elif function == self._default_function:
                scores = prediction["scores"]
            else:
                scores = dict(zip(self._names, _apply(function, prediction["logits"]), strict=True))
            ranked = sorted(scores.items(), key=lambda item: -item[1])[: parameters.top_k]
            answers.append([{"label": name, "score": score} for name, score in ranked])
        return answers

    def answer_schema(self) -> dict[str, Any]:
        one = {
            "type": "object",
            "properties": {"label": {"type": "string"}, "score": {"type": "number"}},
            "required": ["label", "score"],
            "additionalProperties": False,
        }
        return {"type": "array", "items": {"type": "array", "items": one, "minItems": 1}}

    def answer_difference(self, one: Any, other: Any) -> float:
        """Label by label: labels whose scores are almost equal may stand in either order."""
        by_label = [[{entry["label"]: entry["score"] for entry in entries} for entries in answers] for answers in (one, other)]
        return largest_difference(*by_label)


# ---- rows ----------------------------------------------------------------------------------------------------
def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(column: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return label_name(value)
    if not isinstance(value, str):
        raise RowError(column, "a text", value)
    if not value.strip():
        raise RowError(column, "a text that is not empty", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(column, f"Unicode text (character {error.start} is half of a surrogate pair)", ascii(value[:80])) from None
    return value


def _one_label(value: Any, expected: str) -> str:
    if not isinstance(value, (str, bool, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise RowError("label", expected, value)
    return label_name(value)


def _bit_counts(values: Sequence[float]) -> dict[str, int]:
    """How often each bit of the 64 of a double is set: equal numbers, and only they, give 0 or all for every bit.

    So whether all targets are the same can be told from counts that merge by addition.
    """
    import numpy as np

    bits = np.unpackbits((np.asarray(values, dtype="<f8") + 0.0).view(np.uint8)).reshape(-1, 64).sum(axis=0)
    return {str(place): int(count) for place, count in enumerate(bits) if count}


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _label_order(names: Iterable[str]) -> Any:
    return _number if all(_number(name) is not None for name in names) else None


def _listed(names: Iterable[str], most: int = 5) -> str:
    every = list(names)
    shown = ", ".join(repr(name) for name in every[:most])
    return f"{shown} and {len(every) - most:,} more" if len(every) > most else shown


def _rows(count: float) -> str:
    return f"{int(count):,} row" if count == 1 else f"{int(count):,} rows"


def _counted(counts: Mapping[str, float]) -> str:
    most = sorted(counts, key=lambda name: -counts[name])
    shown = ", ".join(f"{name!r} ({_rows(counts[name])})" for name in most[:5])
    return f"{shown} and {len(most) - 5:,} more" if len(most) > 5 else shown


def _refuse_look_alikes(observed: Mapping[str, Observation]) -> None:
    total: Counter[str] = Counter()
    for observation in observed.values():
        total.update(observation.get("labels", {}))
    alike: dict[str, list[str]] = {}
    for name in total:
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    if groups := [names for names in alike.values() if len(names) > 1]:
        shown = "; ".join(
            " and ".join(f"{name!r} ({_rows(total[name])})" for name in sorted(names, key=lambda name: -total[name]))
            for names in groups[:5]
        )
        raise InputError(f"Labels differ only by case or spaces: {shown}. Write each label one way.")


def _refuse_unlisted(labels: Sequence[str], observed: Mapping[str, Observation]) -> None:
    for split, observation in observed.items():
        if unknown := {name: count for name, count in observation.get("labels", {}).items() if name not in labels}:
            closest = nearest(next(iter(unknown)), labels)[0]
            raise InputError(
                f"The {split} split has labels that task.labels does not name: {_counted(unknown)}. The nearest that it names is {closest!r}."
            )


def _refuse_untrained(counts: Mapping[str, int], observed: Mapping[str, Observation]) -> None:
    for split, observation in observed.items():
        if unknown := {name: count for name, count in observation.get("labels", {}).items() if name not in counts}:
            closest = nearest(next(iter(unknown)), counts)[0]
            raise InputError(
                f"The {split} split has labels that no training row has: {_counted(unknown)}. The nearest training label is {closest!r}."
            )


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


# ---- tensors -------------------------------------------------------------------------------------------------
def _cut(encoded: Any, place: int, processor: Any, text: str, pair: str | None, limit: int) -> Example:
    """The example at `place` with tokens of its texts left out until `limit` is met; special tokens stay."""
    if not encoded.is_fast:
        return dict(processor(text, pair, padding=False, truncation=True, max_length=limit))
    sources = encoded.sequence_ids(place)
    tokens = [[position for position, source in enumerate(sources) if source == which] for which in (0, 1)]
    counts = [len(positions) for positions in tokens]
    room = limit - (len(sources) - sum(counts))
    if room < (2 if counts[1] else 1):
        raise InputError(f"task.max_length is {limit}, which leaves no room for text beside {len(sources) - sum(counts)} special tokens.")
    shorter, longer = sorted((0, 1), key=lambda which: counts[which])
    keep = {shorter: min(counts[shorter], room // 2)}
    keep[longer] = room - keep[shorter]
    drops = [count - keep[which] for which, count in enumerate(counts)]
    left = processor.truncation_side == "left"
    dropped = {
        position
        for positions, count in zip(tokens, drops, strict=True)
        if count
        for position in (positions[:count] if left else positions[-count:])
    }
    return {key: [value for position, value in enumerate(values[place]) if position not in dropped] for key, values in encoded.items()}


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


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


def _apply(function: str, logits: Any) -> list[float]:
    import numpy as np

    values: np.ndarray = np.asarray(logits, dtype=np.float64)
    if function == "softmax":
        powers = np.exp(values - values.max())
        values = powers / powers.sum()
    elif function == "sigmoid":
        values = np.where(values >= 0, 1 / (1 + np.exp(-np.abs(values))), np.exp(-np.abs(values)) / (1 + np.exp(-np.abs(values))))
    return [float(value) for value in values]
