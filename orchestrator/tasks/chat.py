"""Conversations as tokens: through the model's chat template, and which of the tokens the assistant says."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import InputError
from orchestrator.tasks.conversations import Turn

TEMPLATE = """\
{{ bos_token or '' }}
{%- for message in messages -%}
{{ message['role'] | capitalize }}:{{ '\\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ message['content'] }}{{ eos_token or '' }}{%- endgeneration -%}
{%- else -%}
{{ message['content'] }}
{%- endif -%}
{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{{ '\\n' }}{%- endif -%}
"""
"""For a tokenizer that has none. It needs no special token that a base model doesn't have, and a line end stands between
a name and what is said, since most tokenizers glue a space to the word behind it."""
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Tokens:
    """A conversation for the model."""

    prompt: list[int]
    """Up to where the assistant's last answer begins, as it is also asked for that answer."""
    answer: list[int]
    """That answer, with the token that ends it; empty where there is none."""
    said: list[bool]
    """Of prompt and answer: whether the assistant says the token."""


def with_template(tokenizer: Any, template: str | None) -> Any:
    """The tokenizer with a chat template: the given one, its own, or else `TEMPLATE`."""
    if template is not None:
        tokenizer.chat_template = template
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokens(tokenizer: Any, turns: Sequence[Turn], answer: str | None) -> Tokens:
    """The tokens of a conversation that ends with a user's turn, and of the assistant's answer to it.

    `InputError` where the template refuses it, or gives no place for the answer.
    """
    prompt = _render(tokenizer, turns, asks=True)
    if answer is None:
        ids = _ids(tokenizer, prompt)[0]
        return Tokens(ids, [], [False] * len(ids))
    whole = _render(tokenizer, [*turns, {"role": "assistant", "content": answer}])
    if whole.startswith(prompt):
        begin = len(prompt)
    else:  # The template begins an answer otherwise when it asks for one; the model is to learn what it will be asked.
        begin = _find(tokenizer, whole, answer, 0, last=True)
        whole, begin = prompt + whole[begin:], len(prompt)
    spans = _marked(tokenizer, turns, answer, whole) or _searched(tokenizer, turns, answer, whole, begin)
    end = spans[-1][1]
    ids, offsets = _ids(tokenizer, whole[:end])
    prompt_ids = _ids(tokenizer, prompt)[0]
    if ids[: len(prompt_ids)] != prompt_ids:
        # A token spans the border. What the model is asked with is fixed, so the answer is cut into tokens by itself.
        rest, places = _ids(tokenizer, whole[begin:end])
        ids, offsets = prompt_ids + rest, _ids(tokenizer, prompt)[1] + [(begin + first, begin + last) for first, last in places]
    said = [any(first < stop and last > start for start, stop in spans) for first, last in offsets]
    if not _special_at(tokenizer, whole, end, before=True) and tokenizer.eos_token_id is not None:
        ids, said = [*ids, tokenizer.eos_token_id], [*said, True]  # A template without an end: the model would never learn to stop.
    return Tokens(ids[: len(prompt_ids)], ids[len(prompt_ids) :], said)


def ends(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of text, and what the template writes behind an answer."""
    found = tokens(tokenizer, [{"role": "user", "content": "a"}], "b").answer[-1:]
    own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return sorted({*own, *(token for token in found if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder)})


def _render(tokenizer: Any, turns: Sequence[Turn], *, asks: bool = False) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asks)
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise InputError(f"The chat template of the model can't write a conversation of {roles}: {' '.join(str(error).split())}") from None


def _ids(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text and the characters each stands for."""
    if not tokenizer.is_fast:
        raise InputError(
            f"model.base: {type(tokenizer).__name__} does not say which characters a token stands for; a fast tokenizer is needed."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _marked(tokenizer: Any, turns: Sequence[Turn], answer: str, whole: str) -> list[tuple[int, int]]:
    """Characters that a template marks as the assistant's by `{% generation %}`; none where it doesn't, or wrote another text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    if not _MARKS_ANSWERS.search(template):
        return []
    every = [*turns, {"role": "assistant", "content": answer}]
    texts, spans = render_jinja_template(
        conversations=[every], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    found: Any = spans[0]
    return [(first, last) for first, last in found if last > first] if texts[0] == whole else []


def _searched(tokenizer: Any, turns: Sequence[Turn], answer: str, whole: str, begin: int) -> list[tuple[int, int]]:
    """The same, from what the template writes of the conversation's beginnings.

    An answer begins where the text ends that asks for it, and ends behind its content and the special token that follows.
    """
    spans = []
    reached = 0
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        asked = _render(tokenizer, turns[:place], asks=True)
        content = _find(tokenizer, whole, turn["content"], len(asked) if whole.startswith(asked) else reached)
        start = len(asked) if whole.startswith(asked) else content
        reached = _end(tokenizer, whole, content + len(_written(whole, turn["content"], content)))
        spans.append((start, reached))
    content = _find(tokenizer, whole, answer, begin)
    return [*spans, (begin, _end(tokenizer, whole, content + len(_written(whole, answer, content))))]


def _find(tokenizer: Any, whole: str, content: str, start: int, *, last: bool = False) -> int:
    """Where the content of a turn stands in what the template wrote; many templates strip it."""
    for text in (content, content.strip()):
        found = whole.rfind(text) if last else whole.find(text, start)
        if found >= 0:
            return found
    raise InputError(
        "The chat template of the model does not write an assistant's answer as it is, so it can't be told which tokens are its own. "
        "Set task.chat_template to one that marks them with {% generation %} … {% endgeneration %}."
    )


def _written(whole: str, content: str, place: int) -> str:
    return content if whole.startswith(content, place) else content.strip()


def _end(tokenizer: Any, whole: str, place: int) -> int:
    """Behind the special token that ends an answer, where one follows at once or after a space."""
    token = _special_at(tokenizer, whole, place)
    if token is None and whole[place : place + 1] == " ":
        token = _special_at(tokenizer, whole, place + 1)
        return place + 1 + len(token) if token else place
    return place + len(token) if token else place


def _special_at(tokenizer: Any, whole: str, place: int, *, before: bool = False) -> str | None:
    """The special token of which the text begins at a place, or ends before it."""
    text = whole[:place]
    return next((name for name in _specials(tokenizer) if (text.endswith(name) if before else whole.startswith(name, place))), None)


@functools.lru_cache(maxsize=4)
def _specials(tokenizer: Any) -> tuple[str, ...]:
    names = {*tokenizer.all_special_tokens, *(str(token) for token in tokenizer.added_tokens_decoder.values())} - {""}
    return tuple(sorted(names, key=lambda name: -len(name)))
