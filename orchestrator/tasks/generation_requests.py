"""What clients send and get where texts are generated: the parameters of text-generation-inference, conversations as `inputs`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from orchestrator.errors import InputError
from orchestrator.tasks import generation
from orchestrator.tasks.base import Parameters, Row, RowError, Task
from orchestrator.tasks.generation import Generation, Stops

OF_ANSWERS = ("return_full_text",)
"""Settings of a row that say what its answer looks like, not how it is generated."""


class TextGenerationParameters(Parameters):
    """`parameters` of a Hugging Face text-generation request; what is not given is as in `task.generate`."""

    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    """Most tokens of the answer."""
    do_sample: bool | None = None
    """Draw tokens by their probability; not given: where temperature, top_k or top_p is."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """Below 1 likely tokens become likelier still; 0: always the likeliest."""
    top_k: Annotated[int, Field(gt=0)] | None = None
    """Draw from so many of the likeliest tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest tokens that together have this probability."""
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    """Above 1: tokens that have occurred become less likely."""
    stop: Stops | None = None
    """Texts before which the answer ends."""
    stop_sequences: Stops | None = None
    """The older name of `stop`."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """The same seed gives the same text."""
    return_full_text: bool | None = None
    """Answer with what was asked in front; of a conversation all its turns."""
    details: bool = False
    """Answer with the tokens, their log probabilities, and why the text ended."""
    decoder_input_details: Literal[False] | None = None
    """Not there: the prompt's tokens are not answered."""
    watermark: Literal[False] | None = None
    """Not there."""
    best_of: Literal[1] | None = None
    """Not there: one text is generated."""

    def settings(self) -> dict[str, Any]:
        """What of it goes into a row, since it changes what the model is asked."""
        names = (*Generation.model_fields, *OF_ANSWERS)
        given = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        if self.stop_sequences is not None and self.stop is None:
            given["stop"] = self.stop_sequences
        if self.temperature == 0:
            given = {name: value for name, value in given.items() if name != "temperature"} | {"do_sample": False}
        elif self.do_sample is None and given.keys() & {"temperature", "top_k", "top_p"}:
            given["do_sample"] = True
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def clean_settings(given: Any, base: Generation) -> dict[str, Any]:
    """The settings in a row's `generate`, or `RowError`."""
    if not isinstance(given, Mapping):
        raise RowError("generate", f"an object with some of {', '.join(type(base).model_fields)}", given)
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items() if value is not None}
    try:
        base.with_(of_generation(given))
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"])) or "settings"
        raise RowError("generate", f"{name}: {problem['msg'].removeprefix('Value error, ')}", given) from None
    return given


def of_generation(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a row that say how its text is generated."""
    return {name: value for name, value in (given or {}).items() if name not in OF_ANSWERS}


def rows(task: Task, inputs: Any, parameters: Any, *, text_role: str) -> list[Row]:
    """The clean rows in `inputs`: a text (in `text_role`), a conversation, `{"messages" or "text": …, "generate": …}`, or a list of these."""
    settings = parameters.settings() if parameters is not None else {}
    many = isinstance(inputs, list) and not _is_conversation(inputs)
    if many and not inputs:
        raise InputError("`inputs` is an empty list; give a text, or a conversation with a turn at least.")
    items = [(f"inputs[{place}]", item) for place, item in enumerate(inputs)] if many else [("inputs", inputs)]
    return [_row(task, item, settings, where, text_role) for where, item in items]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


def _row(task: Task, item: Any, settings: Mapping[str, Any], where: str, text_role: str) -> Row:
    if isinstance(item, str):
        row: Row = {text_role: item}
    elif isinstance(item, list):
        row = {"messages": item}
    elif isinstance(item, dict):
        if unknown := item.keys() - {"messages", "text", "generate"}:
            raise InputError(f"`{where}` has the unknown key {min(map(str, unknown))!r}; it may have messages or text, and generate.")
        row = dict(item)
    else:
        raise InputError(f"`{where}` is {_short(item)}; it must be a text or a conversation, [{{role, content}}, …].")
    if settings:
        row["generate"] = {**(row.get("generate") or {}), **settings}
    try:
        clean = task.clean(row)
    except RowError as error:
        column = "" if error.column in ("messages", "prompt", "text") else f" ({error.column})"
        raise InputError(f"`{where}`{column}: expected {error.expected}, found {_short(error.found)}.") from error
    if "completion" in clean:
        raise InputError(f"`{where}` ends with the assistant's turn; the last one must be the user's.")
    return clean


_TEXT = {"type": "string", "minLength": 1}
_TURN = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [_TEXT, {"type": "array", "items": {"type": "object"}, "minItems": 1}]},
    },
    "required": ["role", "content"],
}
_CONVERSATION = {"type": "array", "items": _TURN, "minItems": 1}
_OBJECT = {
    "type": "object",
    "properties": {"messages": _CONVERSATION, "text": _TEXT, "generate": {"type": "object"}},
    "additionalProperties": False,
    "oneOf": [{"required": ["messages"]}, {"required": ["text"]}],
}
INPUTS_SCHEMA: dict[str, Any] = {
    "anyOf": [_TEXT, _CONVERSATION, _OBJECT, {"type": "array", "items": {"anyOf": [_TEXT, _CONVERSATION, _OBJECT]}, "minItems": 1}]
}
"""A text, a conversation, an object with one of them, or a list of any of these."""


def answer_schema(key: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """Of a list of `{key: text}`, with `details` where they were asked for."""
    entry = {
        "type": "object",
        "properties": {key: dict(text), "details": generation.DETAILS_SCHEMA},
        "required": [key],
        "additionalProperties": False,
    }
    return {"type": "array", "items": entry, "minItems": 1}


def answer_difference(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], *, searched: bool = False) -> float:
    """The largest of the differences between entries: `generation.difference` where both have details, else 0 or inf."""
    if len(one) != len(other):
        return math.inf
    largest = 0.0
    for mine, its in zip(one, other, strict=True):
        if "details" in mine and "details" in its:
            largest = max(largest, generation.difference(generation.from_details(mine), generation.from_details(its), searched=searched))
        elif mine != its:
            return math.inf
    return largest


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
