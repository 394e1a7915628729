"""What is said of the labels of tokens before anything is learnt from them: refused, or remarked on.

Counts are observations of `TokenClassification.observe`: split -> {"rows": …, "labels": {name: number}, "repaired": …, "cut": …}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from orchestrator.errors import InputError, nearest
from orchestrator.tasks.base import Observation
from orchestrator.tasks.labels import listed


def refuse(observed: Mapping[str, Observation], labels: Sequence[str] | None, *, entities: bool) -> None:
    """`InputError` where there is nothing to learn, labels look alike, or they are not those that the job names (None: it names none)."""
    train = observed.get("train", {})
    rows, counts = int(train.get("rows", 0)), train.get("labels", {})
    if not rows:
        raise InputError("The training split has no rows, so there is nothing to learn from.")
    if entities and not counts:
        raise InputError(f"None of the {rows:,} training rows has an entity, so there is nothing to learn.")
    if not entities and len(counts) < 2:
        raise InputError(f"All words of the training rows have the tag {next(iter(counts), None)!r}; a tagger needs two or more.")
    if len(counts) > 50 and 2 * len(counts) > sum(counts.values()):
        raise InputError(f"The training rows have {len(counts):,} different labels, such as {listed(counts)}: is data.columns right?")
    _refuse_look_alikes(observed)
    if labels is not None:
        _refuse_unlisted(observed, labels, " Name it there, or in task.ignore_labels." if entities else "")


def _refuse_look_alikes(observed: Mapping[str, Observation]) -> None:
    total: Counter[str] = Counter()
    for observation in observed.values():
        total.update(observation.get("labels", {}))
    alike: dict[str, list[str]] = {}
    for name in sorted(total, key=lambda name: -total[name]):
        alike.setdefault("".join(name.casefold().split()), []).append(name)
    if groups := [names for names in alike.values() if len(names) > 1]:
        shown = "; ".join(" and ".join(f"{name!r} ({int(total[name]):,} times)" for name in names) for names in groups[:5])
        raise InputError(f"Labels differ only by case or spaces: {shown}. Write each label one way.")


def _refuse_unlisted(observed: Mapping[str, Observation], labels: Sequence[str], advice: str) -> None:
    for split, observation in observed.items():
        if unknown := [name for name in observation.get("labels", {}) if name not in labels]:
            raise InputError(
                f"The {split} split has labels that task.labels does not name: {listed(unknown)}. "
                f"The nearest that it names is {nearest(unknown[0], labels)[0]!r}.{advice}"
            )
    counts = observed["train"]["labels"]
    if unseen := [name for name in labels if name not in counts]:
        raise InputError(f"task.labels names {listed(unseen)}, which no training row has. The rows have {listed(counts)}.")


def remarks(observed: Mapping[str, Observation]) -> list[str]:
    """Tags that had to be repaired, borders within words, and labels that can't be learnt, by split."""
    said = []
    known = observed["train"]["labels"]
    for split, seen in observed.items():
        if repaired := int(seen.get("repaired", 0)):
            said.append(
                f"{repaired:,} tag{'s' * (repaired != 1)} of the {split} rows fit no entity, such as I-PER after O: read as where it begins "
                "or ends (in the scheme IOB1 that is the rule: task.scheme: IOB1)."
            )
        if cut := int(seen.get("cut", 0)):
            one = cut == 1
            said.append(
                f"{cut:,} {'entity' if one else 'entities'} of the {split} rows {'begins or ends' if one else 'begin or end'} within a word: "
                "the whole word is learnt, and the exact border is never found."
            )
        if unknown := {name: count for name, count in seen.get("labels", {}).items() if name not in known}:
            shown = ", ".join(f"{name!r} ({count:,})" for name, count in sorted(unknown.items())[:5])
            said.append(
                f"The {split} rows have labels that no training row has: {shown}. They count as missed. "
                f"The nearest training label is {nearest(min(unknown), known)[0]!r}."
            )
    return said
