"""Conversations as people keep them, and the one form that they are cleaned to.

Read are `messages` (OpenAI), `conversations` (ShareGPT), `prompt` and `completion` (texts, or messages as TRL writes them),
`instruction`, `input` and `output` (Alpaca). The one form: `messages`, turns up to a user's, and `completion`, what the
assistant says to them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.tasks.base import Column, Row, RowError
from orchestrator.tasks.labels import missing
from orchestrator.tasks.texts import clean_text

Turn = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
"""What the sides of a conversation are called, in messages and in ShareGPT's `from`."""

COLUMNS = {
    "messages": Column(kind="any", required=False, alternative=True, help="a conversation: a list of {role, content}"),
    "conversations": Column(
        kind="any", required=False, alternative=True, help="a conversation as ShareGPT writes it: a list of {from, value}"
    ),
    "prompt": Column(kind="any", required=False, alternative=True, help="what the user says: a text, or a list of {role, content}"),
    "instruction": Column(kind="text", required=False, alternative=True, help="what is to be done, as Alpaca has it"),
    "input": Column(kind="text", required=False, help="what the instruction is about"),
    "system": Column(kind="text", required=False, help="what the assistant is told before the conversation"),
    "completion": Column(kind="any", required=False, target=True, help="what the assistant answers to messages or prompt"),
    "output": Column(kind="text", required=False, target=True, help="what the assistant answers to an instruction"),
}


def clean(row: Row) -> Row | None:
    """`messages`, and `completion` where the row has an answer; None where no conversation stands in it. `RowError` for one that is none."""
    column = next((role for role, about in COLUMNS.items() if about.alternative and not missing(row.get(role))), None)
    if column is None:
        return None
    answer_column = "output" if column == "instruction" else "completion"
    if column == "instruction":
        asked = [clean_text(column, row[column])]
        if isinstance(row.get("input"), str) and row["input"].strip():
            asked.append(clean_text("input", row["input"]))
        turns = [{"role": "user", "content": "\n\n".join(asked)}]
    elif column == "prompt" and not isinstance(row[column], (list, tuple)):
        turns = [{"role": "user", "content": clean_text(column, row[column])}]
    else:
        turns = _turns(column, row[column])
    if not missing(row.get("system")) and turns[0]["role"] != "system" and str(row["system"]).strip():
        turns = [{"role": "system", "content": clean_text("system", row["system"])}, *turns]
    answer, whole = None if missing(row.get(answer_column)) else _answer(answer_column, row[answer_column]), list(turns)
    if turns[-1]["role"] == "assistant" and answer is None and column != "prompt":
        answer = turns.pop()["content"]
    _check_order(column, turns, whole)
    return {"messages": turns, **({} if answer is None else {"completion": answer})}


def said(turns: Sequence[Turn]) -> str:
    """A conversation in one line, for tables and sentences: its last turn."""
    return turns[-1]["content"]


def _turns(column: str, value: Any) -> list[Turn]:
    """The turns in a cell, in the order in which they stand there."""
    names = ("from", "value") if column == "conversations" else ("role", "content")
    expected = f"a list of {{{names[0]}, {names[1]}}}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(column, f"{expected}, or JSON text of one", value) from None
    if not isinstance(value, (list, tuple)) or not value:
        raise RowError(column, f"{expected} with a turn at least", value)
    return [_turn(column, place, turn, *names) for place, turn in enumerate(value, 1)]


def _turn(column: str, place: int, turn: Any, who: str, what: str) -> Turn:
    if not isinstance(turn, Mapping) or who not in turn:
        raise RowError(column, f"turn {place} to be {{{who}, {what}}}", turn)
    name = turn[who]
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None or turn.get("tool_calls"):
        raise RowError(
            column, f"turn {place} to be said by system, user or assistant, and to be a text", name if role is None else "tool_calls"
        )
    content = turn.get(what)
    if isinstance(content, (list, tuple)) and content and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    try:
        return {"role": role, "content": clean_text(column, content)}
    except RowError as error:
        raise RowError(column, f"{error.expected} in turn {place} ({role})", content) from None


def _answer(column: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        turns = _turns(column, value)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise RowError(column, "one turn of the assistant", _order(turns))
        return turns[0]["content"]
    return clean_text(column, value)


def _check_order(column: str, turns: Sequence[Turn], whole: Sequence[Turn]) -> None:
    """A system turn first at most; then user and assistant in turn, from a user's turn to a user's turn. `whole`: with the answer, where it stood there."""
    spoken = [turn["role"] for turn in turns[1 if turns and turns[0]["role"] == "system" else 0 :]]
    if not spoken:
        raise RowError(column, "a turn of the user before the assistant's answer", _order(whole) or "none")
    turn_about = all(role == ("user", "assistant")[place % 2] for place, role in enumerate(spoken))
    if not turn_about or (spoken[-1] != "user" and len(whole) > len(turns)):
        raise RowError(column, "user and assistant to take turns, the user first, after one system turn at most", _order(whole))
    if spoken[-1] != "user":
        raise RowError(column, "the user to have the last word before the answer", _order(whole))


def _order(turns: Sequence[Turn]) -> str:
    shown = ", ".join(turn["role"] for turn in turns[:8])
    return f"{shown}, …" if len(turns) > 8 else shown
