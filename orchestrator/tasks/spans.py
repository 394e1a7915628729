"""Extractive answers: contexts cut into windows of tokens, and the likeliest spans over all windows of a context."""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.errors import InputError
from orchestrator.tasks.base import Example, Prediction

N_BEST = 20
"""Spans of an answer that are kept, as in the scripts that came with SQuAD and BERT."""
UNANSWERABLE = 1e6
"""`null_score_diff` where the context has no token, so that nothing in it can be an answer."""


# ---- into windows --------------------------------------------------------------------------------------------
def windows(
    encoded: Any,
    place: int,
    processor: Any,
    *,
    limit: int,
    longest_question: int,
    overlap: int,
    labelled: bool,
    answer: tuple[int, int] | None = None,
) -> list[Example]:
    """The examples of one question and its context, tokenized as a pair without truncation (`encoded` at `place`).

    Each has the question's first `longest_question` tokens and as much of the context as `limit` allows; neighbours share
    `overlap` context tokens, or half of them where they are few. `labelled`: it is known whether there is an answer; `answer`
    is its first and last + 1 character. An example whose window does not hold the whole answer points at its null position,
    the token that stands before every text, as in BERT.

    In an example: `context` (place of its first context token), `offsets` (first and last + 1 character of each context
    token), `null`, `truncated` (whether the question was cut), and `start_positions`, `end_positions`.
    """
    sources, offsets = encoded.sequence_ids(place), encoded["offset_mapping"][place]
    question = [position for position, source in enumerate(sources) if source == 0]
    context = [position for position, source in enumerate(sources) if source == 1]
    specials = len(sources) - len(question) - len(context)
    keep = min(len(question), longest_question, max(1, (limit - specials) // 2))
    room = limit - specials - keep
    if room < 1:
        raise InputError(f"task.max_length is {limit}, which leaves no room for a context beside {specials} special tokens and a question.")
    dropped = set(question[keep:])
    first, last = (context[0], context[-1] + 1) if context else (len(sources), len(sources))
    head = [position for position in range(first) if position not in dropped]
    tail = [position for position in range(last, len(sources)) if position not in dropped]
    target = None if answer is None else _tokens_of(answer, [offsets[position] for position in context])
    examples = []
    for start, stop in _cuts(len(context), room, min(overlap, room // 2)):
        kept = [*head, *context[start:stop], *tail]
        example: Example = {
            key: [encoded[key][place][position] for position in kept] for key in processor.model_input_names if key in encoded
        }
        null = _null(example["input_ids"], [sources[position] for position in kept], processor)
        example |= {
            "context": len(head),
            "offsets": [list(offsets[position]) for position in context[start:stop]],
            "null": null,
            "truncated": bool(dropped),
        }
        if labelled:
            inside = target if target is not None and start <= target[0] and target[1] < stop else None
            ends = (null, null) if inside is None else tuple(len(head) + token - start for token in inside)
            example["start_positions"], example["end_positions"] = ends
        examples.append(example)
    return examples


def _cuts(count: int, room: int, overlap: int) -> Iterator[tuple[int, int]]:
    start = 0
    while True:
        yield start, min(start + room, count)
        if start + room >= count:
            return
        start += room - overlap


def _tokens_of(answer: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last of the tokens that hold some of the answer's characters; None where it has no token."""
    first = bisect.bisect_right([end for _, end in offsets], answer[0])
    last = bisect.bisect_left([start for start, _ in offsets], answer[1]) - 1
    return (first, last) if first <= last else None


def _null(ids: Sequence[int], sources: Sequence[int | None], processor: Any) -> int:
    """Where an example points that has no answer."""
    for token in (processor.cls_token_id, processor.bos_token_id):
        if token is not None:
            found = next((place for place, one in enumerate(ids) if one == token and sources[place] is None), None)
            if found is not None:
                return found
    return 0


# ---- out of windows ------------------------------------------------------------------------------------------
def best(context: str, outputs: Sequence[Any], *, longest: int, most: int = N_BEST, whole_words: bool = False) -> Prediction:
    """The likeliest spans of `context`: `answers` (answer, score, start, end), `null_score` and `null_score_diff`.

    `outputs`: for each window an array of shape (1 + context tokens, 4): start and end logit, first and last + 1 character; the
    first line is the null position. Spans have at most `longest` tokens. `score` is the probability of start and end over the
    tokens of all windows and the null position of the window that is surest of an answer, by which windows are compared in
    Devlin et al. 2019. `null_score_diff` is that position's logits less those of the best span.
    """
    import numpy as np

    null = min((output[0, :2] for output in outputs), key=lambda pair: pair.sum())
    totals = [np.logaddexp.reduce(np.concatenate([[null[side]], *(output[1:, side] for output in outputs)])) for side in (0, 1)]
    found: dict[tuple[int, int], float] = {}
    for output in outputs:
        for score, start, end in _candidates(output, longest, 2 * most):
            start, end = _whole_characters(context, start, end)
            if whole_words:
                start, end = _whole_words(context, start, end)
            if start < end:
                found[start, end] = max(score, found.get((start, end), score))
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:most]
    answers = [
        {"answer": context[start:end], "score": float(np.exp(score - sum(totals))), "start": start, "end": end}
        for (start, end), score in ranked
    ]
    return {
        "answers": answers,
        "null_score": float(np.exp(null.sum() - sum(totals))),
        "null_score_diff": float(null.sum() - ranked[0][1]) if ranked else UNANSWERABLE,
    }


def _candidates(output: Any, longest: int, most: int) -> Iterator[tuple[float, int, int]]:
    """Sum of logits, first and last + 1 character of the likeliest spans of one window."""
    import numpy as np

    count = len(output) - 1
    if not count:
        return
    start, end = output[1:, 0], output[1:, 1]
    sums = np.full((min(longest, count), count), -np.inf)
    for more in range(len(sums)):
        sums[more, : count - more] = start[: count - more] + end[more:]
    flat = sums.ravel()
    chosen = np.argpartition(-flat, most - 1)[:most] if most < len(flat) else np.arange(len(flat))
    for place in chosen.tolist():
        more, first = divmod(place, count)
        if first + more < count:
            yield float(flat[place]), int(output[1 + first, 2]), int(output[1 + first + more, 3])


def _whole_characters(context: str, start: int, end: int) -> tuple[int, int]:
    """Without white space around it, and with the accents that belong to its last letter: tokenizers may cut these off."""
    while start < end and context[start].isspace():
        start += 1
    while start < end and context[end - 1].isspace():
        end -= 1
    while start < end < len(context) and unicodedata.category(context[end]) in ("Mn", "Me"):
        end += 1
    return start, end


def _whole_words(context: str, start: int, end: int) -> tuple[int, int]:
    """Longer, where it begins or ends inside of a word."""
    before = re.search(r"\w+\Z", context[max(0, start - 100) : start])
    after = re.match(r"\w+", context[end : end + 100])
    if start < end and before and re.match(r"\w", context[start]):
        start -= len(before[0])
    if start < end and after and re.match(r"\w", context[end - 1]):
        end += len(after[0])
    return start, end


# ---- comparing -----------------------------------------------------------------------------------------------
def by_place(answers: Sequence[Mapping[str, Any]], **more: float) -> dict[Any, float]:
    """Span -> probability; `more` for what is no span."""
    return {**{(one["start"], one["end"]): one["score"] for one in answers}, **more}
