"""Relation extraction: which relation holds between entities that a text mentions, or between two that are only named."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.errors import InputError
from orchestrator.tasks import entity_finder, mentions, relation_scores, texts, triples
from orchestrator.tasks import labels as label_rules
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task
from orchestrator.tasks.text_classification import TextClassification

if TYPE_CHECKING:
    import torch

MOST_MENTIONS = 100
"""In one text: all their pairs are nearly 10,000 passes of the model. Of more that a finder finds the first ones count."""
IGNORED = -100
"""Target of an example that stands for a row without pairs."""
_RELATION = ("relation", "relations")


class RelationParameters(Parameters):
    """`parameters` of a request."""

    top_k: Annotated[int, Field(gt=0)] | None = None
    """How many relations to answer for each pair, the likeliest first; None: those that the model says there are."""
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Answer only triples with at least this score."""


def _absolute(value: Any) -> Any:
    """Workers run in folders of their own, where a relative path is another place."""
    return str(Path(value).expanduser().absolute()) if isinstance(value, str) and "://" not in value else value


class RelationExtraction(Task):
    """Triples (head, relation, tail) out of texts with their entities, for knowledge graphs; or the relation of two names."""

    parameters: ClassVar[type[Parameters]] = RelationParameters
    rows_at_once: ClassVar[int] = 64

    between: Literal["mentions", "names"] = "mentions"
    """Between entities that a text mentions, or between two names without a text."""
    problem: Literal["single-label", "multi-label"] = "single-label"
    """One relation for a pair at most, or any number of them."""
    labels: label_rules.LabelNames = None
    """Relations in the order of the model's outputs; None: those of the training rows, sorted."""
    no_relation: str | None = "no_relation"
    """The label of pairs that are not related; it is no triple and counts in no F1. None: every pair is related."""
    entity_types: tuple[str, ...] | None = None
    """Types of the entities in the training rows; set from them."""
    entities_from: Annotated[str | None, BeforeValidator(_absolute)] = None
    """Bundle (folder or URI) of a token-classification job that finds the entities of texts without any; it is copied into this model's."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens kept of a text, those nearest to the two entities; None: the tokenizer's limit, or 512 where it has none."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """multi-label: the score from which a relation is given."""
    negatives_per_row: Annotated[int, Field(ge=0)] | None = None
    """How many of a training row's unrelated pairs are learnt from, drawn anew in each epoch; None: all of them."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.labels is not None and (twice := [name for name, count in Counter(self.labels).items() if count > 1]):
            raise ValueError(f"labels names {twice[0]!r} twice")
        if self.between == "names" and self.entities_from is not None:
            raise ValueError("entities_from finds entities in texts, and between: names reads none")
        return self

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        if self.between == "names":
            return {
                "head": Column(kind="text", help="the name that the relation goes out from"),
                "tail": Column(kind="text", help="the name that it leads to"),
                "label": Column(
                    kind="label",
                    target=True,
                    aliases=_RELATION,
                    help="the relation from head to tail; several: a list, or text such as a|b",
                ),
            }
        span, number = "{start, end} in characters of the text, with or without a type", "in place of head and tail"
        return {
            "text": Column(kind="text", help="the text; head and tail may stand in it as <e1>…</e1> and <e2>…</e2>"),
            "label": Column(
                kind="any",
                target=True,
                aliases=_RELATION,
                help="the relation from head to tail; of entities: a list of {head, tail, label}",
            ),
            "head": Column(kind="any", required=False, help=f"where the relation goes out from: {span}"),
            "tail": Column(kind="any", required=False, help=f"where it leads to: {span}"),
            "entities": Column(kind="any", required=False, help="all mentions of a text, in place of head and tail: a list of these"),
            "pairs": Column(kind="any", required=False, help="the pairs of entities to look at: [[head, tail], …]; otherwise all"),
            **{
                f"{end}_{key}": Column(kind="text" if key == "type" else "number", required=False, help=number)
                for end in ("head", "tail")
                for key in ("start", "end", "type")
            },
        }

    def clean(self, row: Row) -> Row:
        """Names: `head`, `tail`, `label` (a list). Mentions: `text`, `entities`, `pairs` (absent: all), `label` (a list of {head, tail, label})."""
        if self.between == "names":
            clean: Row = {end: texts.clean_text(end, row.get(end)) for end in ("head", "tail")}
            if "label" in row:
                clean["label"] = self._of_one_pair(row["label"])
            return clean
        clean = self._clean_mentions(row)
        if "label" not in row:
            if "entities" not in clean and self.entities_from is None:
                expected = "a mention {start, end}; or entities, or <e1>…</e1> and <e2>…</e2> in the text"
                raise RowError("head", expected, row.get("head"))
            return clean
        if "entities" not in clean:
            raise RowError("entities", "the entities that the label is about", None)
        return self._with_relations(clean, row["label"])

    def _clean_mentions(self, row: Row) -> Row:
        text = texts.clean_text("text", row.get("text"))
        if not label_rules.missing(row.get("entities")):
            found = mentions.clean_mentions("entities", row["entities"], text)
            clean: Row = {"text": text, "entities": found}
            if not label_rules.missing(row.get("pairs")):
                clean["pairs"] = mentions.clean_pairs("pairs", row["pairs"], len(found))
            most = MOST_MENTIONS * (MOST_MENTIONS - 1)
            if "pairs" not in clean and len(found) > MOST_MENTIONS:
                raise RowError("entities", f"at most {MOST_MENTIONS} mentions, or the pairs of them to look at", f"{len(found):,} mentions")
            if len(clean.get("pairs", ())) > most:
                raise RowError("pairs", f"at most {most:,} pairs", f"{len(clean['pairs']):,} pairs")
            return clean
        flat = {end: {key: row.get(f"{end}_{key}") for key in ("start", "end", "type")} for end in ("head", "tail")}
        given = {end: row[end] if not label_rules.missing(row.get(end)) else flat[end] for end in flat}
        absent = [end for end in given if isinstance(given[end], dict) and label_rules.missing(given[end].get("start"))]
        if not absent:
            head, tail = (mentions.clean_mention(end, given[end], text) for end in ("head", "tail"))
            column = "tail"
        elif len(absent) == 2 and mentions.has_marks(text):
            text, (head, tail) = mentions.unmarked("text", text)
            column = "text"
        elif len(absent) == 2 and all(label_rules.missing(row.get(end)) for end in absent):
            return {"text": text}
        else:
            raise RowError(absent[0], "a mention such as {start: 0, end: 7}, in characters of the text", row.get(absent[0]))
        if (head["start"], head["end"]) == (tail["start"], tail["end"]):
            raise RowError(column, "a head and a tail that differ", {"start": tail["start"], "end": tail["end"]})
        return {"text": text, "entities": [head, tail], "pairs": [[0, 1]]}

    def _with_relations(self, clean: Row, value: Any) -> Row:
        value = mentions.parsed("label", value)
        pairs = [tuple(pair) for pair in clean.get("pairs", ())]
        if isinstance(value, (list, tuple)) and all(isinstance(one, Mapping) for one in value):
            named = [self._relation(one, len(clean["entities"])) for one in value]
        elif len(pairs) == 1:
            named = [(*pairs[0], name) for name in self._of_one_pair(value)]
        else:
            raise RowError("label", "a list of relations such as [{head: 0, tail: 1, label: works_for}, …]", value)
        named = list(dict.fromkeys((head, tail, name) for head, tail, name in named if name != self.no_relation))
        related = list(dict.fromkeys((head, tail) for head, tail, _ in named))
        if self.problem == "single-label" and len(related) < len(named):
            raise RowError("label", "one relation for a pair (for several, set task.problem: multi-label)", value)
        if pairs and (other := [pair for pair in related if pair not in pairs]):
            raise RowError("label", "relations of the pairs that the row names", list(other[0]))
        if self.no_relation is None and self.problem == "single-label":
            if set(pairs) - set(related) or not related:
                raise RowError("label", "a relation for every pair (task.no_relation is not set)", value)
            clean["pairs"] = [list(pair) for pair in (pairs or related)]
        return {**clean, "label": [{"head": head, "tail": tail, "label": name} for head, tail, name in named]}

    def _relation(self, value: Mapping[str, Any], entities: int) -> tuple[int, int, str]:
        name = next((value[key] for key in ("label", "relation", "type") if key in value), None)
        return (*mentions.clean_pair("label", value, entities), label_rules.one_label(name, "the name of a relation"))

    def _of_one_pair(self, value: Any) -> list[str]:
        """The relations of one pair, sorted; none where it says "no relation"."""
        if self.problem == "multi-label":
            names = label_rules.several_labels(value, None)
        elif isinstance(value, (list, tuple)):
            names = [label_rules.one_label(name, "the name of a relation") for name in value]
        else:
            names = [label_rules.one_label(value, "one relation (for several, set task.problem: multi-label)")]
        if self.problem == "single-label" and len(names) > 1:
            raise RowError("label", "one relation (for several, set task.problem: multi-label)", value)
        names = [name for name in names if name != self.no_relation]
        if not names and self.no_relation is None and self.problem == "single-label":
            raise RowError("label", "a relation", value)
        return names

    def _pairs(self, row: Row) -> list[list[int]]:
        return row["pairs"] if row.get("pairs") is not None else mentions.all_pairs(len(row["entities"]))

    def _right(self, row: Row) -> list[list[str]]:
        """The relations of each pair of a row with targets."""
        if self.between == "names":
            return [list(row["label"])]
        named: dict[tuple[int, int], list[str]] = {}
        for one in row["label"]:
            named.setdefault((one["head"], one["tail"]), []).append(one["label"])
        return [named.get((head, tail), []) for head, tail in self._pairs(row)]

    def observe(self, rows: Sequence[Row]) -> Observation:
        """`labels` and `rows` count pairs: what a label is said of."""
        labels: Counter[str] = Counter()
        right = [names for row in rows if "label" in row for names in self._right(row)]
        for names in right:
            unrelated = [self.no_relation] if self.no_relation is not None and self.problem == "single-label" else []
            labels.update(names or unrelated)
        types = Counter(one["type"] for row in rows for one in row.get("entities", ()) if one["type"])
        return {"rows": len(right), "labels": dict(labels), "types": dict(types)}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        train = observed.get("train", {})
        if not train.get("rows"):
            raise InputError("The training split has no pair of entities with a label, so there is nothing to learn from.")
        label_rules.refuse_look_alikes(observed)
        label_rules.refuse_unlearnable(observed, several=self.problem == "multi-label")
        if self.labels is not None:
            label_rules.refuse_unlisted(self.labels, observed)
        label_rules.refuse_untrained(observed)
        counts = train["labels"]
        if self.no_relation is not None and self.no_relation not in counts:
            plain = re.sub(r"\W|_", "", self.no_relation).casefold()
            if alike := [name for name in counts if re.sub(r"\W|_", "", name).casefold() == plain]:
                raise InputError(
                    f"task.no_relation is {self.no_relation!r}, which no row has, and {counts[alike[0]]:,} rows have {alike[0]!r}: "
                    f"set task.no_relation: {alike[0]!r}."
                )
        names = self.labels or label_rules.ordered(counts)
        return self.model_copy(update={"labels": names, "entity_types": tuple(sorted(train["types"]))})

    def stratum(self, row: Row) -> str | None:
        """The relation, where a row has one pair."""
        if "label" not in row or (self.between == "mentions" and len(self._pairs(row)) != 1):
            return None
        return next(iter(self._right(row)[0]), self.no_relation)

    # ---- tensors ---------------------------------------------------------------------------------------------
    @property
    def _names(self) -> tuple[str, ...]:
        if self.labels is None:
            raise InputError("task.labels is not known yet: `fit` completes the task from the training rows.")
        return self.labels

    @property
    def _relations(self) -> tuple[str, ...]:
        """The labels that make triples."""
        return tuple(name for name in self._names if name != self.no_relation)

    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """An example for each pair of a row; for a row without pairs one that is ignored, so that every row is seen.

        `pair` says which it is: where head and tail start and end, and their types (places in `entity_types`, -1: none).
        """
        tokenizer = processor.tokenizer if isinstance(processor, entity_finder.TokenizerAndFinder) else processor
        most = texts.limit(tokenizer, self.max_length)
        if self.between == "names":
            examples = texts.encode([row["head"] for row in rows], [row["tail"] for row in rows], tokenizer, most)
            found = [[{**example, "pair": [-1] * 6}] for example in examples]
        else:
            found = self._encode_mentions(rows, processor, tokenizer, most)
        if any("label" in row for row in rows):
            places = {name: place for place, name in enumerate(self._names)}
            for row, pairs in zip(rows, found, strict=True):
                if "label" in row:
                    right = self._right(row) or [None]
                    for example, names in zip(pairs, right, strict=True):
                        example["labels"] = self._target(names, places)
        return found

    @property
    def augments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.between == "mentions" and self.negatives_per_row is not None

    def encode_to_train(self, rows: Sequence[Row], processor: Any, seeds: Sequence[int]) -> list[list[Example]]:
        """All related pairs, and `negatives_per_row` unrelated ones (Eberts & Ulges 2020, arXiv 1909.07755)."""
        if not self.augments:
            return self.encode(rows, processor)
        return self.encode([{**row, "pairs": self._drawn(row, seed)} for row, seed in zip(rows, seeds, strict=True)], processor)

    def _drawn(self, row: Row, seed: int) -> list[list[int]]:
        pairs, related = self._pairs(row), {(one["head"], one["tail"]) for one in row["label"]}
        unrelated = [place for place, pair in enumerate(pairs) if tuple(pair) not in related]
        drawn = set(random.Random(seed).sample(unrelated, min(self.negatives_per_row or 0, len(unrelated))))
        return [pair for place, pair in enumerate(pairs) if place in drawn or tuple(pair) in related]

    def _encode_mentions(self, rows: Sequence[Row], processor: Any, tokenizer: Any, most: int) -> list[list[Example]]:
        without = [place for place, row in enumerate(rows) if "entities" not in row]
        if without:
            found = iter(processor.find([rows[place]["text"] for place in without]))
            rows = [row if "entities" in row else {**row, "entities": next(found)[:MOST_MENTIONS]} for row in rows]
        types = {name: place for place, name in enumerate(self.entity_types or ())}
        asked = [[(row["entities"][head], row["entities"][tail]) for head, tail in self._pairs(row)] for row in rows]
        marked = [mentions.marked(row["text"], pair) for row, pairs in zip(rows, asked, strict=True) for pair in pairs]
        encoded = iter(mentions.encode(marked, tokenizer, most))
        found = []
        for pairs in asked:
            examples = []
            for head, tail in pairs:
                places = [head["start"], head["end"], tail["start"], tail["end"]]
                examples.append({**next(encoded), "pair": [*places, types.get(head["type"], -1), types.get(tail["type"], -1)]})
            if not examples:
                [nothing] = texts.encode([""], [None], tokenizer, most)
                examples = [{**nothing, "pair": [-1] * 6}]
            found.append(examples)
        return found

    def _target(self, names: Sequence[str] | None, places: Mapping[str, int]) -> int | list[float]:
        if names is None:
            return IGNORED if self.problem == "single-label" else [float(IGNORED)] * len(places)
        if unknown := [name for name in names if name not in places]:
            raise RowError("label", f"one of {label_rules.listed(self._names)}", unknown[0])
        if self.problem == "multi-label":
            return [1.0 if name in names else 0.0 for name in places]
        name = names[0] if names else self.no_relation
        if name is None or name not in places:
            raise RowError("label", f"one of {label_rules.listed(self._names)}", name)
        return places[name]

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        import torch

        tokenizer = processor.tokenizer if isinstance(processor, entity_finder.TokenizerAndFinder) else processor
        batch = texts.pad(examples, tokenizer)
        batch["pair"] = torch.tensor([example["pair"] for example in examples], dtype=torch.long)
        if "labels" in examples[0]:
            kind = torch.long if self.problem == "single-label" else torch.float32
            batch["labels"] = torch.tensor([example["labels"] for example in examples], dtype=kind)
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    @property
    def _classifier(self) -> TextClassification:
        """The task of the model itself: a label for each marked text."""
        return TextClassification(problem=self.problem, labels=self.labels, max_length=self.max_length)

    def processor(self, base: str, **from_hub: Any) -> Any | None:
        """The tokenizer with the finder of entities, where the job names one."""
        return None if self.entities_from is None else entity_finder.TokenizerAndFinder.load(base, self.entities_from, **from_hub)

    def check_base(self, base: str, **from_hub: Any) -> None:
        self._classifier.check_base(base, **from_hub)
        if self.entities_from is not None:
            entity_finder.check(self.entities_from)

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForSequenceClassification` with the relations as its labels."""
        if self.labels is None:
            raise InputError("task.labels is not known yet: `fit` completes the task from the training rows.")
        return self._classifier.model(base, **options)

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """single-label: cross-entropy over pairs; multi-label: binary cross-entropy over pairs x relations."""
        from torch.nn import functional

        logits, target = _logits(model, batch), batch["labels"]
        if self.problem == "single-label":
            total = functional.cross_entropy(logits, target, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
            return total, float((target != IGNORED).sum())
        counts = target >= 0
        smoothed = target.clamp(min=0) * (1 - label_smoothing) + label_smoothing / 2
        losses = functional.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
        return (losses * counts).sum(), float(counts.sum())

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """Of each example the six numbers of its `pair`, then the logits: float64 of shape (6 + labels,)."""
        import numpy as np

        logits = _logits(model, batch).cpu().numpy().astype(np.float64)
        return list(np.concatenate([batch["pair"].cpu().numpy().astype(np.float64), logits], axis=1))

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`triples` that hold, likeliest first; `pairs`, each with the `scores` of all relations from `triples.LEAST` on."""
        pairs: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for output in outputs:
            if self.between == "mentions" and output[0] < 0:
                continue
            pair = self._pair(row, [int(number) for number in output[:6]])
            scores = dict(zip(self._names, _scores(output[6:], self.problem), strict=True))
            said = self._said(scores)
            found += [triples.made(pair, name, scores[name]) for name in said]
            pairs.append({**pair, "relations": said, "scores": {name: score for name, score in scores.items() if score >= triples.LEAST}})
        return {"triples": sorted(found, key=lambda triple: -triple["score"]), "pairs": pairs}

    def _pair(self, row: Row, numbers: Sequence[int]) -> dict[str, Any]:
        if self.between == "names":
            return {"head": row["head"], "tail": row["tail"]}
        pair: dict[str, Any] = {}
        for end, start, stop, kind in (("head", numbers[0], numbers[1], numbers[4]), ("tail", numbers[2], numbers[3], numbers[5])):
            pair |= {end: row["text"][start:stop], f"{end}_start": start, f"{end}_end": stop}
            if kind >= 0 and self.entity_types:
                pair[f"{end}_type"] = self.entity_types[kind]
        return pair

    def _said(self, scores: Mapping[str, float]) -> list[str]:
        if self.problem == "multi-label":
            return [name for name in self._relations if scores[name] >= self.threshold]
        best = max(scores, key=lambda name: scores[name])
        return [] if best == self.no_relation else [best]

    def metrics(self) -> tuple[str, ...]:
        """Micro F1, precision and recall without "no relation", macro F1, accuracy of pairs; then `f1/<relation>` and so on."""
        return relation_scores.known(() if self.labels is None else self._relations)

    def _compared(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> tuple[list[list[str]], list[list[str]]]:
        said: list[list[str]] = []
        right: list[list[str]] = []
        for prediction, row in zip(predictions, rows, strict=True):
            said += [pair["relations"] for pair in prediction["pairs"]]
            right += self._right(row)
        return said, right

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        return relation_scores.score(self._relations, *self._compared(predictions, rows), metrics)

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`per_relation`: precision, recall, F1 and pairs of each."""
        said, right = self._compared(predictions, rows)
        return {"per_relation": relation_scores.per_relation(self._relations, said, right)} if right else {}

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        """The same pairs with scores within `tolerance`; then relations may differ only where a tie or the threshold lies within it."""
        return math.isfinite(difference := self.difference(one, other)) and difference <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        if [triples.which(pair) for pair in one["pairs"]] != [triples.which(pair) for pair in other["pairs"]]:
            return math.inf
        both = zip(one["pairs"], other["pairs"], strict=True)
        return max((triples.scores_apart(a["scores"], b["scores"]) for a, b in both), default=0.0)

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        if self.between == "names":
            one: dict[str, Any] = _object({"head": text, "tail": text}, "head", "tail")
        else:
            place = {"type": "integer", "minimum": 0}
            mention = {"type": "object", "properties": {"start": place, "end": place}, "required": ["start", "end"]}
            pairs = {"type": "array", "items": {"type": "array", "items": place, "minItems": 2, "maxItems": 2}}
            of_entities = {"text": text, "entities": {"type": "array", "items": mention}, "pairs": pairs}
            required = ("text",) if self.entities_from else ("text", "entities")
            of_two = _object({"text": text, "head": mention, "tail": mention}, "text", "head", "tail")
            marks = {} if self.entities_from else {"pattern": "<e1>[\\s\\S]+</e1>|<e2>[\\s\\S]+</e2>"}
            one = {"anyOf": [{**text, **marks}, _object(of_entities, *required), of_two, _object({"text": {**text, **marks}}, "text")]}
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}

    def inputs_example(self) -> Any:
        if self.between == "names":
            return {"head": "aspirin", "tail": "headache"}
        return "Aspirin relieves headaches." if self.entities_from else "<e1>Aspirin</e1> relieves <e2>headaches</e2>."

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """Rows of `{"head", "tail"}`; or of a text with marks, `{"text", "entities", "pairs"}` or `{"text", "head", "tail"}`; or of a list of these."""
        if not isinstance(inputs, list):
            return [self._row_from(inputs, "inputs")]
        if not inputs:
            raise InputError("`inputs` is an empty list; give at least one.")
        return [self._row_from(item, f"inputs[{place}]") for place, item in enumerate(inputs)]

    def _row_from(self, item: Any, where: str) -> Row:
        keys = ("head", "tail") if self.between == "names" else ("text", "entities", "pairs", "head", "tail")
        row = {"text": item} if isinstance(item, str) and self.between == "mentions" else item
        if not isinstance(row, dict):
            shape = '{"head": …, "tail": …}' if self.between == "names" else 'a text or {"text": …, "entities": [{"start": …, "end": …}]}'
            raise InputError(f"`{where}` is {_short(item)}; it must be {shape}.")
        if unknown := [key for key in row if key not in keys]:
            raise InputError(f"`{where}` has the unknown key {_short(min(map(str, unknown)))}; it may have {', '.join(keys)}.")
        for key in ("text",) if self.between == "mentions" else keys:
            if not isinstance(row.get(key), str):
                raise InputError(f"`{where}.{key}` is {_short(row.get(key))}; it must be a text.")
        for key in ("entities", "pairs"):
            if key in row and not isinstance(row[key], list):
                raise InputError(f"`{where}.{key}` is {_short(row[key])}; it must be a list.")
        try:
            return self.clean(row)
        except RowError as error:
            raise InputError(f"`{where}.{error.column}`: expected {error.expected}, found {_short(error.found)}.") from error

    def inputs_from(self, row: Row) -> Any:
        return {key: row[key] for key in ("text", "head", "tail", "entities", "pairs") if row.get(key) is not None}

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`[{head, relation, tail, score, head_start, head_end, tail_start, tail_end, …}, …]`, likeliest first; a list of these for a list."""
        answers = []
        for prediction in predictions:
            found = prediction["triples"]
            if parameters.top_k is not None:
                found = [triple for pair in prediction["pairs"] for triple in self._likeliest(pair, parameters.top_k)]
                found.sort(key=lambda triple: -triple["score"])
            answers.append([triple for triple in found if triple["score"] >= parameters.min_score])
        return answers[0] if single else answers

    def _likeliest(self, pair: dict[str, Any], count: int) -> list[dict[str, Any]]:
        scores = {name: score for name, score in pair["scores"].items() if name != self.no_relation}
        ranked = sorted(scores.items(), key=lambda item: -item[1])[:count]
        which = {key: value for key, value in pair.items() if key not in ("scores", "relations")}
        return [triples.made(which, name, score) for name, score in ranked]

    def answer_schema(self) -> dict[str, Any]:
        one = {"type": "array", "items": triples.schema(places=self.between == "mentions")}
        return {"anyOf": [one, {"type": "array", "items": one}]}

    def answer_difference(self, one: Any, other: Any) -> float:
        """The smallest difference of scores that explains both answers, above 0 where they differ."""
        if one and isinstance(one[0], list):
            return max((self.answer_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
        if self.problem == "multi-label":
            return triples.apart_by_threshold(one, other, self.threshold)
        return triples.apart_by_rank(one, other, always=self.no_relation is None)


def _logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**{key: value for key, value in batch.items() if key not in ("labels", "pair")}).logits.float()


def _scores(logits: Any, problem: str) -> list[float]:
    import numpy as np

    if problem == "multi-label":
        small = np.exp(-np.abs(logits))
        return np.where(logits >= 0, 1 / (1 + small), small / (1 + small)).tolist()
    powers = np.exp(logits - logits.max())
    return (powers / powers.sum()).tolist()


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
