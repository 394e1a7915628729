"""Scores of generated texts against the texts that were expected: sacreBLEU, ROUGE, exact match. All between 0 and 1."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator import metrics as modules
from orchestrator.errors import InputError, did_you_mean

KNOWN = ("bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match")
LOWER_IS_BETTER = frozenset({"ter"})
_WITHOUT_SPACES = ("zh", "ja", "th", "lo", "km", "my", "yue", "wuu")
_WORD = re.compile(r"\w+")
_SCRIPTS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def score(said: Sequence[str], expected: Sequence[str], wanted: Sequence[str], *, language: str | None = None) -> dict[str, float]:
    """The wanted scores over all pairs; `language` (such as zh, zh_CN or zho_Hans) says how BLEU cuts the expected texts into words.

    BLEU, chrF and TER are sacreBLEU's figures divided by 100. ROUGE is rouge-score's mean F-measure, with words of any
    script. A name that is none of `KNOWN` is a metric module of `evaluate`, given the texts.
    """
    found: dict[str, float] = {}
    if not said:
        return found
    rouges = [name for name in wanted if name.startswith("rouge")]
    found.update(_rouge(said, expected, [name for name in rouges if name in KNOWN]))
    for name in wanted:
        if name in _CORPUS:
            found[name] = _CORPUS[name](said, expected, language)
        elif name not in found:
            found.update(_other(name, said, expected))
    return {key: found[key] for name in wanted for key in found if key == name or key.startswith(f"{name}_")}


def _bleu(said: Sequence[str], expected: Sequence[str], language: str | None) -> float:
    import sacrebleu

    return sacrebleu.corpus_bleu(list(said), [list(expected)], tokenize=tokenization(language)).score / 100


def tokenization(language: str | None) -> str:
    """sacreBLEU's `tokenize` for a language: 13a, zh, or char where words are not written apart."""
    short = re.split(r"[-_]", (language or "").lower())[0]
    short = {"zho": "zh", "cmn": "zh", "jpn": "ja", "kor": "ko", "tha": "th", "lao": "lo", "khm": "km", "mya": "my"}.get(short, short)
    return "zh" if short == "zh" else "char" if short in _WITHOUT_SPACES else "13a"


def _chrf(said: Sequence[str], expected: Sequence[str], language: str | None) -> float:
    import sacrebleu

    return sacrebleu.corpus_chrf(list(said), [list(expected)]).score / 100


def _ter(said: Sequence[str], expected: Sequence[str], language: str | None) -> float:
    import sacrebleu

    return sacrebleu.corpus_ter(list(said), [list(expected)], asian_support=tokenization(language) != "13a").score / 100


def _exact_match(said: Sequence[str], expected: Sequence[str], language: str | None) -> float:
    """The share of texts that are the same but for spaces at and between words, and the way Unicode composes characters."""
    return sum(_plain(one) == _plain(other) for one, other in zip(said, expected, strict=True)) / len(said)


_CORPUS: dict[str, Callable[[Sequence[str], Sequence[str], str | None], float]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "ter": _ter,
    "exact_match": _exact_match,
}


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _rouge(said: Sequence[str], expected: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    if not kinds:
        return {}
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(list(kinds), tokenizer=_Words())
    pairs = [scorer.score(right, given) for given, right in zip(said, expected, strict=True)]
    return {kind: sum(pair[kind].fmeasure for pair in pairs) / len(pairs) for kind in kinds}


class _Words:
    """Words of any script, in lower case; each character where words are not written apart. rouge-score's own knows a-z and 0-9 only."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(_SCRIPTS.sub(lambda found: f" {found[0]} ", text.lower()))


def _other(name: str, said: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    try:
        module = modules.load(name)
        values: dict[str, Any] = module.compute(predictions=list(said), references=list(expected)) or {}
    except InputError as error:
        raise InputError(f"evaluation.metrics: {name!r} is no metric of this task.{did_you_mean(name, KNOWN)} {error}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"evaluation.metrics: {name!r} can't score texts: {' '.join(str(error).split())[:300]}") from None
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
    return {name if len(numbers) == 1 else f"{name}_{key}": value for key, value in numbers.items()}
