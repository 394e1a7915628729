"""Requests for vectors and similarities as Hugging Face's clients write them, and the answers they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks import vectors
from orchestrator.tasks.base import Parameters, Prediction, Row, RowError
from orchestrator.tasks.vectors import Precision

_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}
_SIMILARITY = {
    "type": "object",
    "properties": {"source_sentence": _TEXT, "sentences": _TEXTS},
    "required": ["source_sentence", "sentences"],
    "additionalProperties": False,
}
INPUTS: dict[str, Any] = {"anyOf": [_TEXT, _TEXTS, _SIMILARITY]}
_NUMBERS = {"type": "array", "items": {"type": "number"}}
ANSWERS: dict[str, Any] = {"anyOf": [{"type": "array", "items": _NUMBERS, "minItems": 1}, {**_NUMBERS, "minItems": 1}]}
MOST_IN_A_ROW = 64
"""Sentences that are one row with the source; more are rows of their own, so that the limit on rows counts them."""


class EmbeddingParameters(Parameters):
    """Beside `inputs` or in `parameters` of a Hugging Face feature-extraction or sentence-similarity request."""

    normalize: bool | None = None
    """Whether vectors have length 1; None: as the model was made."""
    truncate: bool | None = None
    """false: a text that is too long is an error, not cut."""
    truncation_direction: Annotated[
        Literal["left", "right"] | None, BeforeValidator(lambda side: side.lower() if isinstance(side, str) else side)
    ] = None
    """The side on which a text that is too long loses tokens; None: the tokenizer's."""
    prompt_name: str | None = None
    """One of the model's prompts, to stand before each text; None: none, and in a sentence-similarity request those of training."""
    dimensions: Annotated[int, Field(gt=0)] | None = None
    """Numbers of a vector: one of the sizes that the model was trained for."""
    precision: Precision = "float32"
    """int8: whole numbers from -127 to 127. ubinary: the signs as bits, eight to a number from 0 to 255."""
    encoding_format: Literal["float"] | None = None
    """Numbers, always."""

    def options(self, prompts: Mapping[str, str], sizes: Sequence[int] | None) -> Row:
        """What of it goes into the rows; `InputError` for a prompt or a size that the model does not have."""
        if self.prompt_name is not None and self.prompt_name not in prompts:
            hint = did_you_mean(self.prompt_name, prompts) if prompts else " The model has no prompts."
            raise InputError(f"parameters.prompt_name: there is no prompt {self.prompt_name!r}.{hint}")
        if self.dimensions is not None and self.dimensions not in (sizes or ()):
            have = f"vectors of {', '.join(map(str, sizes))} numbers" if sizes else "vectors of one size; ask without dimensions"
            raise InputError(f"parameters.dimensions is {self.dimensions}; this model has {have}.")
        names = ("normalize", "truncate", "truncation_direction", "prompt_name")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def rows(inputs: Any, roles: Sequence[str], clean: Callable[[Row], Row]) -> list[Row]:
    """The clean rows in `inputs`: a text each, or a source (the first of the `roles`) and what it is compared with (the second)."""
    if isinstance(inputs, dict):
        return _compared(inputs, roles, clean)
    if isinstance(inputs, list):
        if not inputs:
            raise InputError("`inputs` is an empty list; give at least one text.")
        return [_row({"text": text}, f"inputs[{place}]", clean) for place, text in enumerate(inputs)]
    return [_row({"text": inputs}, "inputs", clean)]


def _compared(inputs: dict[str, Any], roles: Sequence[str], clean: Callable[[Row], Row]) -> list[Row]:
    known = ("source_sentence", "sentences")
    if unknown := sorted(inputs.keys() - set(known)):
        raise InputError(f"`inputs` has the unknown key {unknown[0]!r}; it may have source_sentence and sentences.")
    if missing := [key for key in known if key not in inputs]:
        raise InputError(f"`inputs` has no {missing[0]!r}; it must have source_sentence and sentences.")
    source, sentences = inputs["source_sentence"], inputs["sentences"]
    if not isinstance(sentences, list) or not sentences:
        raise InputError(f"`inputs.sentences` is {_short(sentences)}; it must be a list of at least one text.")
    for place, text in enumerate(sentences):
        _require_text(text, f"inputs.sentences[{place}]")
    first, second, *third = roles
    if third and 1 < len(sentences) <= MOST_IN_A_ROW and sentences[0] not in sentences[1:]:
        return [_row({first: source, second: sentences[0], third[0]: sentences[1:]}, "inputs", clean)]
    _require_text(source, "inputs.source_sentence")
    head = _row({first: source, second: sentences[0]}, "inputs", clean)
    return [head, *(_row({second: text}, f"inputs.sentences[{place}]", clean) for place, text in enumerate(sentences[1:], 1))]


def _row(row: Row, where: str, clean: Callable[[Row], Row]) -> Row:
    for value in row.values():
        if not isinstance(value, list):
            _require_text(value, where)
    try:
        return clean(row)
    except RowError as error:
        raise InputError(f"`{where}`: expected {error.expected}, found {_short(error.found)}.") from error


def _require_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"`{where}` is {_short(value)}; it must be a text.")


def flat(prediction: Prediction) -> list[list[float]]:
    """All vectors of a prediction, in the order of its texts."""
    return [vector for value in prediction.values() for vector in ([value] if value and not isinstance(value[0], list) else value)]


def answer(predictions: Sequence[Prediction], parameters: EmbeddingParameters, *, normalize: bool) -> Any:
    """Vectors where texts came on their own, else the similarities of the first text with each of the others."""
    import numpy as np

    every = np.asarray([vector for prediction in predictions for vector in flat(prediction)], dtype=np.float32)
    if "text" in predictions[0]:
        return [_vector(vector, parameters, normalize) for vector in every]
    source, *others = vectors.comparable(every, parameters.dimensions, parameters.precision)
    return [min(1.0, max(-1.0, float(source @ other))) for other in others]


def _vector(vector: Any, parameters: EmbeddingParameters, normalize: bool) -> list[float]:
    vector = vector[: parameters.dimensions]
    if parameters.precision != "float32":
        return vectors.quantised(vector, parameters.precision).tolist()
    return vectors.as_list(vectors.normalised(vector) if normalize else vector)


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
