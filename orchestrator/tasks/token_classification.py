"""Token classification: entities in a text (NER, chunks), or a tag for each word (parts of speech)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.errors import InputError
from orchestrator.tasks import heads, texts, token_answers, token_labels
from orchestrator.tasks import labels as label_rules
from orchestrator.tasks import tags as tag_rules
from orchestrator.tasks import words as word_rules
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task
from orchestrator.tasks.tags import OUTSIDE, Span
from orchestrator.tasks.words import Place

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label id of tokens that no loss is taken of, as everywhere in transformers."""
_TARGETS = ("tags", "spans")


class TokenClassification(Task):
    """Named entities and other spans of a text with their labels and places, or a tag for each word, such as its part of speech."""

    parameters: ClassVar[type[Parameters]] = token_answers.TokenClassificationParameters
    proposals: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"problem": "words"})

    problem: Literal["entities", "words"] = "entities"
    """entities: spans of words with a label, as names of persons and places; words: a tag for each word, as parts of speech."""
    scheme: tag_rules.Scheme = "auto"
    """entities: how tags mark where an entity begins and ends. auto: by their prefixes, which tell all but IO without prefixes."""
    labels: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Labels of entities (PER, not B-PER), or the tags of words; None: those of the training rows, by alphabet."""
    ignore_labels: tuple[str, ...] = ()
    """entities: labels in the data that are read as no entity."""
    tag_names: tuple[str, ...] | None = None
    """What numbers in the column of tags mean, in order: [O, B-PER, I-PER, …]; not needed where the file says it itself."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens of a window; a longer text is read in several. None: the tokenizer's limit, or 512 where it has none."""
    stride: Annotated[int, Field(ge=0)] | None = None
    """Tokens that neighbouring windows share, so that each word has context on both sides; None: a quarter of `max_length`."""

    @model_validator(mode="after")
    def _fits_the_problem(self) -> Self:
        if self.labels is not None and (twice := [name for name, count in Counter(self.labels).items() if count > 1]):
            raise ValueError(f"labels names {twice[0]!r} twice")
        if both := set(self.labels or ()) & set(self.ignore_labels):
            raise ValueError(f"{min(both)!r} is in labels and in ignore_labels")
        if self.problem == "words" and (self.scheme != "auto" or self.ignore_labels):
            raise ValueError("problem: words takes each tag as it stands and has neither a scheme nor ignore_labels")
        if self.max_length is not None and self.stride is not None and self.stride >= self.max_length:
            raise ValueError(f"stride is {self.stride}, and windows of max_length {self.max_length} can't share so much")
        tags = [name for name in self.labels or () if name == OUTSIDE or name.startswith(("B-", "I-"))]
        if tags and self.problem == "entities":
            raise ValueError(f"labels names {tags[0]!r}: labels of entities stand without B- and I-, and O is none")
        return self

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        entities = self.problem == "entities"
        found = {
            "tokens": Column(kind="any", unless="text", aliases=("words",), help="the words: a list, or a text with spaces between them"),
            "text": Column(kind="text", unless="tokens", aliases=("sentence",), help="the text, where words are not cut yet"),
            "tags": Column(
                kind="label",
                target=True,
                unless="spans" if entities else None,
                aliases=("ner_tags", "ner") if entities else ("pos_tags", "upos", "pos"),
                help="a tag for each word" + (", such as B-PER" if entities else ""),
            ),
        }
        if entities:
            what = "the entities of the text: a list of {start, end, label}, in characters"
            found["spans"] = Column(kind="label", target=True, unless="tags", aliases=("entities",), help=what)
        return found

    def clean(self, row: Row) -> Row:
        """`text`, and of rows that were given as words `tokens`, whose places in it are `words.find`; `tags` or `spans` where there are any."""
        given = [role for role in _TARGETS[: 2 if self.problem == "entities" else 1] if role in row]
        present = [role for role in given if not label_rules.missing(row[role])]
        if given and not present:
            raise RowError(given[0], "a tag for each word" if given[0] == "tags" else "a list of spans; empty: none", None)
        if "tags" in present or (not present and not label_rules.missing(row.get("tokens"))):
            if label_rules.missing(row.get("tokens")) and "spans" not in present:
                raise RowError("tokens", "the words that `tags` are of", row.get("tokens"))
            if not label_rules.missing(row.get("tokens")):
                return self._clean_words(row, tagged="tags" in present)
        if label_rules.missing(row.get("text")) and "text" not in row:
            raise RowError("tokens", "a list of words, or words with spaces between", row.get("tokens"))
        clean: Row = {"text": texts.clean_text("text", row.get("text"))}
        if "spans" in present:
            clean["spans"] = tag_rules.clean_spans(row["spans"], clean["text"])
        return clean

    def _clean_words(self, row: Row, *, tagged: bool) -> Row:
        tokens, given = tag_rules.clean_tokens(row["tokens"]), row.get("text")
        text = given if isinstance(given, str) and word_rules.find(tokens, given) is not None else None
        if text is None and not tagged and self.problem == "entities" and not label_rules.missing(given):
            return {"text": texts.clean_text("text", given)}  # Words that the text does not have say nothing of it.
        clean: Row = {"text": word_rules.join(tokens)[0] if text is None else text, "tokens": tokens}
        if tagged:
            clean["tags"] = tag_rules.clean_tags(row["tags"], len(tokens), self.tag_names)
            if self.problem == "entities":
                for tag in clean["tags"]:
                    if tag_rules.parse(tag, self.scheme) is None:
                        raise RowError("tags", tag_rules.expected(self.scheme), tag)
        return clean

    def entities(self, row: Row) -> list[Span]:
        """The entities that a row is labelled with, by their places in its text."""
        if "spans" in row:
            spans = row["spans"]
        else:
            places = self.words(row)
            found, _ = tag_rules.entities(row["tags"], self.scheme)
            spans = [{"start": places[first][0], "end": places[last - 1][1], "label": label} for first, last, label in found]
        return [span for span in spans if span["label"] not in self.ignore_labels] if self.ignore_labels else spans

    def words(self, row: Row) -> list[Place]:
        """The places of a row's words in its text: those that were given, else those of `words.split`.

        Entities are always looked for in the latter: the endpoint is given texts, so this is what must be learnt and scored.
        """
        found = word_rules.find(row["tokens"], row["text"]) if row.get("tokens") else None
        return word_rules.split(row["text"]) if found is None else found

    def units(self, row: Row) -> list[Place]:
        """The places that have a label each."""
        return self.words(row) if self.problem == "words" else word_rules.split(row["text"])

    def observe(self, rows: Sequence[Row]) -> Observation:
        counts: Counter[str] = Counter()
        repaired = cut = 0
        for row in rows:
            if self.problem == "words":
                counts.update(row.get("tags", ()))
            elif "tags" in row or "spans" in row:
                spans = self.entities(row)
                counts.update(span["label"] for span in spans)
                repaired += tag_rules.entities(row["tags"], self.scheme)[1] if "tags" in row else 0
                cut += word_rules.cut([(span["start"], span["end"]) for span in spans], word_rules.split(row["text"]))
        return {"rows": len(rows), "labels": dict(counts), "repaired": repaired, "cut": cut}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        """The task with its labels. Raises `InputError` where there is nothing to learn, or labels are not those that the job names."""
        token_labels.refuse(observed, self.labels, entities=self.problem == "entities")
        return self.model_copy(update={"labels": self.labels or label_rules.ordered(observed["train"]["labels"])})

    def remarks(self, observed: Mapping[str, Observation]) -> list[str]:
        """Tags that had to be repaired, borders within words, and labels that can't be learnt, by split."""
        return token_labels.remarks(observed)

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """Each row is as many examples as it needs windows. `units`: [token, start, end] of each word that an example answers for.

        `labels` has one for each unit: a word cut into several tokens has one label, at the first. Where entities are looked
        for, words that share a token are one unit.
        """
        from orchestrator.tasks.windows import windows

        most = texts.limit(processor, self.max_length)
        overlap = most // 4 if self.stride is None else self.stride
        places = [self.units(row) for row in rows]
        ids = {name: index for index, name in enumerate(self._names)} if any(role in row for row in rows for role in _TARGETS) else {}
        examples = []
        for row, words, its in zip(rows, places, windows([row["text"] for row in rows], places, processor, most, overlap), strict=True):
            found = [{**window.example, "units": _units(words, window.words, window.tokens, self.problem == "entities")} for window in its]
            if any(role in row for role in _TARGETS):
                right = iter(self.gold(row, [(start, end) for one in found for _, start, end in one["units"]]))
                for example in found:
                    example["labels"] = [ids.get(next(right), IGNORED) for _ in example["units"]]
            examples.append(found)
        return examples

    def gold(self, row: Row, units: Sequence[Place]) -> list[str]:
        """The right tag of each of these units of a row's text, which stand in order."""
        if self.problem == "words":
            by_start = {start: tag for (start, _), tag in zip(self.words(row), row["tags"], strict=True)}
            return [by_start[start] for start, _ in units]
        tags, spans, at, begun = [], self.entities(row), 0, False
        for start, end in units:
            while at < len(spans) and spans[at]["end"] <= start:
                at, begun = at + 1, False
            inside = at < len(spans) and spans[at]["start"] < end
            tags.append(f"{'I' if begun else 'B'}-{spans[at]['label']}" if inside else OUTSIDE)
            begun = inside
        return tags

    @property
    def _names(self) -> tuple[str, ...]:
        """What the model tells apart, in the order of its outputs."""
        if self.labels is None:
            raise InputError("task.labels is not known yet: `fit` completes the task from the training rows.")
        return self.labels if self.problem == "words" else (OUTSIDE, *(f"{sign}-{name}" for name in self.labels for sign in "BI"))

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        """Beside the model's inputs `units`, (examples, units, 3): token, start and end, -1 where there is none; and `labels` of tokens."""
        import torch

        batch = texts.pad(examples, processor)
        rows, length = batch["input_ids"].shape
        units = torch.full((rows, max(len(example["units"]) for example in examples), 3), -1)
        labels = torch.full((rows, length), IGNORED)
        for row, example in enumerate(examples):
            if not example["units"]:
                continue
            its = torch.tensor(example["units"])
            its[:, 0] += length - len(example["input_ids"]) if processor.padding_side == "left" else 0
            units[row, : len(its)] = its
            if "labels" in example:
                first = dict(zip(reversed(its[:, 0].tolist()), reversed(example["labels"]), strict=True))
                labels[row, list(first)] = torch.tensor(list(first.values()))  # of words that share a token the first one's
        return {**batch, "units": units, **({"labels": labels} if "labels" in examples[0] else {})}

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it has no such head or fewer positions than `max_length`."""
        advice = "an encoder such as BERT, RoBERTa, DeBERTa or ModernBERT"
        return heads.config_with_head(
            base, "AutoModelForTokenClassification", "token-classification head", advice, self.max_length, **from_hub
        )

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForTokenClassification` with this task's tags (BIO for entities); a head for others is replaced by a fresh one."""
        from transformers import AutoModelForTokenClassification

        from_hub = heads.from_hub(options)
        config = self.check_base(base, **from_hub)
        heads.name_labels(config, self._names)
        return AutoModelForTokenClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True, **options)

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Sum of the cross-entropies in fp32 over tokens that have a label, and their number."""
        from torch.nn import functional

        logits, target = _logits(model, batch), batch["labels"]
        total = functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
        )
        return total, float((target != IGNORED).sum())

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """For each example an array, a line for each unit: start and end in the text, then the logits; float64, which holds any place."""
        import numpy as np

        logits, units = _logits(model, batch), batch["units"]
        chosen = logits.gather(1, units[:, :, :1].clamp(min=0).expand(-1, -1, logits.shape[-1])).cpu().numpy().astype(np.float64)
        places = units.cpu().numpy()
        return [np.hstack([place[place[:, 0] >= 0, 1:], one[place[:, 0] >= 0]]) for place, one in zip(places, chosen, strict=True)]

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`text`, which places are of, and `words`: label (BIO for entities), score, word, start, end of each; with `entities` where asked for."""
        import numpy as np

        found = np.concatenate(outputs)
        logits = found[:, 2:]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = powers / powers.sum(axis=1, keepdims=True)
        best = scores.argmax(axis=1)
        text, names = row["text"], self._names
        words = [
            {"label": names[label], "score": float(score[label]), "word": text[start:end], "start": start, "end": end}
            for (start, end), score, label in zip(found[:, :2].astype(int).tolist(), scores, best.tolist(), strict=True)
        ]
        if self.problem == "words":
            return {"text": text, "words": words}
        return {"text": text, "entities": token_answers.groups(text, words, outside=False), "words": words}

    def metrics(self) -> tuple[str, ...]:
        """The default ones, then averages, then `f1/<label>`, `precision/<label>` and `recall/<label>`."""
        from orchestrator.tasks.token_scores import known

        return known(self.problem, self.labels or ())

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """entities: an entity is right where start, end and label are (seqeval); words: the share of words with the right tag."""
        from orchestrator.tasks import token_scores

        names = self.labels or ()
        if self.problem == "words":
            return token_scores.score_words(predictions, ((self.words(row), row["tags"]) for row in rows), names, metrics)
        return token_scores.score_entities(predictions, rows, self.entities, self.gold, names, metrics)

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`per_label`: precision, recall, F1 and counts of each; for entities `borders`: what no answer could get right, or had to repair."""
        from orchestrator.tasks import token_scores

        names = self.labels or ()
        if self.problem == "words":
            return token_scores.tables_of_words(predictions, ((self.words(row), row["tags"]) for row in rows), names)
        return token_scores.tables_of_entities(predictions, rows, self.entities, names)

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        """Scores of all words within `tolerance`; a label may differ only where that much could have changed it."""
        difference = self.difference(one, other)
        return math.isfinite(difference) and difference <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        return token_answers.difference(one["words"], other["words"])

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        words = {
            "type": "object",
            "properties": {"tokens": {"type": "array", "items": text, "minItems": 1}, "text": text},
            "required": ["tokens"],
            "additionalProperties": False,
        }
        return {"anyOf": [text, words, {"type": "array", "items": {"anyOf": [text, words]}, "minItems": 1}]}

    def inputs_example(self) -> Any:
        return "My name is Sarah Jessica Parker and I live in New York."

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """Rows of a text, `{"tokens": […]}` where words are cut already, or a list of these."""
        if isinstance(inputs, list):
            if not inputs:
                raise InputError("`inputs` is an empty list; give at least one text.")
            return [self._row_from(item, f"inputs[{place}]") for place, item in enumerate(inputs)]
        return [self._row_from(inputs, "inputs")]

    def _row_from(self, item: Any, where: str) -> Row:
        row = {"text": item} if isinstance(item, str) else item
        if not isinstance(row, dict) or not row or row.keys() - {"tokens", "text"} or (row is item and "tokens" not in row):
            raise InputError(f'`{where}` is {_short(item)}; it must be a text or {{"tokens": [words]}}.')
        if "tokens" in row and not (isinstance(row["tokens"], list) and all(isinstance(word, str) for word in row["tokens"])):
            raise InputError(f"`{where}.tokens` is {_short(row['tokens'])}; it must be a list of words.")
        if not isinstance(row.get("text", ""), str):
            raise InputError(f"`{where}.text` is {_short(row['text'])}; it must be a text.")
        try:
            return self.clean(row)
        except RowError as error:
            raise InputError(f"`{where}`: expected {error.expected}, found {_short(error.found)}.") from error

    def inputs_from(self, row: Row) -> Any:
        """The text; with `tokens` where the row has words."""
        return {"tokens": row["tokens"], "text": row["text"]} if row.get("tokens") else row["text"]

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """A list of {entity_group, score, word, start, end} for one text, a list of such lists for a list of texts."""
        found = [token_answers.answer(prediction, parameters, grouped=self.problem == "entities") for prediction in predictions]
        return found[0] if single else found

    def answer_schema(self) -> dict[str, Any]:
        return token_answers.SCHEMA

    def replay_parameters(self) -> Parameters:
        """Every word with its score: from grouped answers it can't be seen how near a word was to another label."""
        return token_answers.TokenClassificationParameters(aggregation_strategy="none", ignore_labels=[])

    def answer_difference(self, one: Any, other: Any) -> float:
        """As `difference` between answers of words; grouped ones must have the same groups."""
        return token_answers.answer_difference(one, other)


def _units(words: Sequence[Place], chosen: Sequence[int], tokens: Sequence[int], together: bool) -> list[list[int]]:
    """[token, start, end] of the chosen words; where `together`, one for all that share a token."""
    units: list[list[int]] = []
    for index, token in zip(chosen, tokens, strict=True):
        start, end = words[index]
        if together and units and units[-1][0] == token:
            units[-1][2] = end
        else:
            units.append([token, start, end])
    return units


def _logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**{key: value for key, value in batch.items() if key not in ("labels", "units")}).logits.float()


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
