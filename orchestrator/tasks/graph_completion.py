"""Completing a knowledge graph: which entities are the likeliest tails of a head and a relation, or heads of a tail."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from orchestrator.errors import InputError
from orchestrator.tasks import labels as label_rules
from orchestrator.tasks import texts
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task
from orchestrator.tasks.known_triples import MOST_TRIPLES, KnownTriples, packed

if TYPE_CHECKING:
    import numpy as np
    import torch

MOST_RANKED = 100
"""Entities that a prediction ranks."""
MOST_COMPARED = 5000
"""Names among which the nearest to an unknown one is looked for; it takes milliseconds for each thousand."""
SCORES_PER_UNIT = 256
"""Scores that cost as much as a token does elsewhere: keeps the scores of a micro-batch within some megabytes."""
HITS = (1, 3, 10)
_ENDS = ("head", "tail")


class CompletionParameters(Parameters):
    """`parameters` of a request."""

    top_k: Annotated[int, Field(gt=0, le=MOST_RANKED)] = 10
    """How many triples to answer, the likeliest first."""
    new_only: bool = False
    """Leave out triples that are in the graph already."""


class NoProcessor:
    """Names need none: the task itself knows the place of each."""

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)


class GraphCompletion(Task):
    """Link prediction: a knowledge graph's missing triples, by embeddings of its entities and relations."""

    parameters: ClassVar[type[Parameters]] = CompletionParameters
    rows_at_once: ClassVar[int] = 64
    model_types: ClassVar[Mapping[str, str]] = {"graph-embedding": "orchestrator.tasks.graph_embedding:GraphEmbeddingConfig"}

    regularization: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the nuclear 3-norm (N3) of the embeddings of each query, in training."""
    entities: tuple[str, ...] | None = None
    """Every entity of the graph, in the order of the model's outputs; set from the rows of all splits."""
    relations: tuple[str, ...] | None = None
    """Every relation; set from the training rows."""
    known: str | None = None
    """The triples of all splits, packed; set from the rows. Ranks are filtered by them."""

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        return {
            "head": Column(kind="text", required=False, help="the entity that the relation goes out from; absent: asked for"),
            "relation": Column(kind="text", help="the relation"),
            "tail": Column(kind="text", required=False, help="the entity that it leads to; absent: asked for"),
        }

    def clean(self, row: Row) -> Row:
        """`relation` with `head`, `tail` or both. Of a graph that is known the names must be in it."""
        given = [end for end in _ENDS if not label_rules.missing(row.get(end)) and row.get(end) != ""]
        if not given:
            raise RowError("head", "a head or a tail", None)
        clean = {role: texts.clean_text(role, row.get(role)) for role in ("head", "relation", "tail") if role in (*given, "relation")}
        for role, name in clean.items():
            places = self._relation_places if role == "relation" else self._entity_places
            if places and name not in places:
                raise RowError(role, _nearest("a relation" if role == "relation" else "an entity", name, places), name)
        return clean

    def check_target(self, row: Row) -> None:
        """What is learnt and scored are triples; a question has no answer to learn."""
        if absent := [end for end in _ENDS if label_rules.missing(row.get(end))]:
            raise RowError(absent[0], "an entity, since the graph is made of whole triples (questions are for `predict`)", None)

    def observe(self, rows: Sequence[Row]) -> Observation:
        """The triples themselves: relation -> head -> tail -> rows. It grows with the graph, of which `fit` bounds the size."""
        triples: dict[str, dict[str, dict[str, int]]] = {}
        for row in rows:
            if "head" in row and "tail" in row:
                tails = triples.setdefault(row["relation"], {}).setdefault(row["head"], {})
                tails[row["tail"]] = tails.get(row["tail"], 0) + 1
        return {"rows": len(rows), "triples": triples}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        counts = {
            split: {"rows": observation.get("rows", 0), "labels": {name: _rows(heads) for name, heads in found.items()}}
            for split, observation in observed.items()
            if (found := observation.get("triples", {})) or split == "train"
        }
        train = counts.get("train", {"rows": 0, "labels": {}})
        if not train["labels"]:
            raise InputError(
                f"None of the {int(train['rows']):,} training rows is a triple: each needs head, relation and tail (data.columns)."
            )
        label_rules.refuse_look_alikes(counts)
        label_rules.refuse_untrained(counts)
        triples = {
            (head, relation, tail)
            for observation in observed.values()
            for relation, heads in observation.get("triples", {}).items()
            for head, tails in heads.items()
            for tail in tails
        }
        if len(triples) > MOST_TRIPLES:
            raise InputError(
                f"The graph has {len(triples):,} triples; this task takes up to {MOST_TRIPLES:,}, since all are needed to filter its ranks. "
                "Leave out relations or entities that you don't ask about."
            )
        entities = tuple(sorted({end for head, _, tail in triples for end in (head, tail)}))
        if len(entities) < 2:
            raise InputError(f"The graph has one entity only, {next(iter(entities))!r}; there is nothing to rank.")
        relations = tuple(sorted(train["labels"]))
        places = ({name: place for place, name in enumerate(names)} for names in (entities, relations))
        entity, relation = places
        known = packed((entity[head], relation[name], entity[tail]) for head, name, tail in triples)
        return self.model_copy(update={"entities": entities, "relations": relations, "known": known})

    def stratum(self, row: Row) -> str | None:
        return row["relation"]

    @cached_property
    def _entity_places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.entities or ())}

    @cached_property
    def _relation_places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.relations or ())}

    @cached_property
    def _known(self) -> KnownTriples:
        if self.known is None or self.relations is None:
            raise InputError("task.known is not known yet: `fit` completes the task from the rows.")
        return KnownTriples(self.known, len(self.relations))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Without what was computed of the fields before the update."""
        copy = super().model_copy(update=update, deep=deep)
        for name in ("_entity_places", "_relation_places", "_known"):
            vars(copy).pop(name, None)
        return copy

    def __getstate__(self) -> dict[Any, Any]:
        """Without what can be computed anew."""
        state = super().__getstate__()
        return {**state, "__dict__": {name: value for name, value in state["__dict__"].items() if name in type(self).model_fields}}

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """Each row is one example of two queries, for the tail and for the head; one that can't be asked has the source -1.

        `target` is the answer where the row has it, else -1.
        """
        entities, relations = self._entity_places, self._relation_places
        found = []
        for row in rows:
            head, tail = (entities[row[end]] if row.get(end) is not None else -1 for end in _ENDS)
            relation = relations[row["relation"]]
            found.append([{"source": [head, tail], "relation": [relation, relation + len(relations)], "target": [tail, head]}])
        return found

    def length(self, example: Example) -> int:
        return 1 + len(self._entity_places) // SCORES_PER_UNIT

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        import torch

        return {name: torch.tensor([example[name] for example in examples], dtype=torch.long) for name in ("source", "relation", "target")}

    # ---- model -----------------------------------------------------------------------------------------------
    def processor(self, base: str, **from_hub: Any) -> Any | None:
        return NoProcessor()

    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base; `InputError` where it is not one of graph embeddings, or of those of another graph."""
        from transformers import PreTrainedConfig

        from orchestrator.tasks.graph_embedding import GraphEmbeddingConfig

        kind = PreTrainedConfig.get_config_dict(base, **from_hub)[0].get("model_type")
        if kind != GraphEmbeddingConfig.model_type:
            raise InputError(
                f"model.base: {base!r} is a {kind!r} model; a graph is completed by embeddings of its own, from scratch: "
                "model: {base: config://graph-embedding, config: {scoring: complex, hidden_size: 256}}."
            )
        config = GraphEmbeddingConfig.from_pretrained(base, **from_hub)
        sizes = (config.num_entities, config.num_relations)
        if any(sizes) and self.entities is not None and sizes != (len(self.entities), len(self.relations or ())):
            raise InputError(
                f"model.base: {base!r} embeds another graph, of {sizes[0]:,} entities and {sizes[1]:,} relations; this one has "
                f"{len(self.entities):,} and {len(self.relations or ()):,}."
            )
        return config

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """Embeddings out of a bundle, or fresh ones of the sizes that the base's config says."""
        from orchestrator.tasks.graph_embedding import GraphEmbedding

        if self.entities is None or self.relations is None:
            raise InputError("task.entities is not known yet: `fit` completes the task from the rows.")
        config = self.check_base(base)
        options.pop("attn_implementation", None)
        if config.num_entities:
            return GraphEmbedding.from_pretrained(base, config=config, **options)
        config.num_entities, config.num_relations = len(self.entities), len(self.relations)
        return GraphEmbedding(config)

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Cross-entropy over all entities of both queries of each triple; in training with their N3 (Lacroix et al. 2018)."""
        from torch.nn import functional

        output = model(**batch)
        asked = (batch["source"] >= 0) & (batch["target"] >= 0)
        total = functional.cross_entropy(output.logits[asked], batch["target"][asked], reduction="sum", label_smoothing=label_smoothing)
        if model.training:
            total = total + self.regularization * output.penalty[asked].sum()
        return total, float(asked.sum())

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """Scores of all entities as tail and as head: float32 of shape (2, entities); of a query that is not asked they mean nothing."""
        asked = (batch["source"] >= 0).unsqueeze(-1)
        return list((model(**batch).logits.float() * asked).cpu().numpy())

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`triples`, likeliest first, each with `score` (its share among all entities) and `known` (is it in the graph?).

        Of a row with head and tail it is the one triple, with `tail_rank` and `head_rank`: its places among all entities
        once those of other known triples are left out, ties in the middle (Bordes et al. 2013; Berrendorf et al. 2020).
        """
        assert self.entities is not None
        [query] = self.encode([row], None)[0]
        asked = list(zip(outputs[0].astype("float64"), query["source"], query["relation"], query["target"], strict=True))
        if "head" in row and "tail" in row:
            scores, source, relation, target = asked[0]
            known = bool((self._known.answers(source, relation) == target).any())
            ranks = [_rank(scores, self._known.answers(source, relation), target) for scores, source, relation, target in asked]
            triple = {role: row[role] for role in ("head", "relation", "tail")}
            triple |= {"score": float(_shares(scores)[target]), "known": known}
            return {"triples": [triple], "tail_rank": ranks[0], "head_rank": ranks[1]}
        wanted = "tail" if "head" in row else "head"
        scores, source, relation, _ = asked[_ENDS.index(wanted) ^ 1]
        shares = _shares(scores)
        known = set(self._known.answers(source, relation).tolist())
        triples = []
        for place in _best(scores, MOST_RANKED):
            triple = {**row, wanted: self.entities[place]}
            triple = {role: triple[role] for role in ("head", "relation", "tail")}
            triples.append({**triple, "score": float(shares[place]), "known": place in known})
        return {"triples": triples}

    def metrics(self) -> tuple[str, ...]:
        """Filtered mean reciprocal rank and hits@k over heads and tails, then of each alone."""
        names = ("mrr", *(f"hits_at_{most}" for most in HITS))
        return (*names, *(f"{name}_{end}" for end in ("tail", "head") for name in names))

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Named numbers over the rows that are triples."""
        from orchestrator.errors import did_you_mean

        wanted = self.metrics() if metrics is None else metrics
        if unknown := [name for name in wanted if name not in self.metrics()]:
            raise InputError(f"evaluation.metrics: {unknown[0]!r} is no metric of this task.{did_you_mean(unknown[0], self.metrics())}")
        ranks = [(one["tail_rank"], one["head_rank"]) for one in predictions if "tail_rank" in one]
        values = _summary(ranks) if ranks else {}
        return {name: values[name] for name in wanted if name in values}

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`per_relation`: triples, MRR and hits@k of each."""
        ranks: dict[str, list[tuple[float, float]]] = {}
        for prediction, row in zip(predictions, rows, strict=True):
            if "tail_rank" in prediction:
                ranks.setdefault(row["relation"], []).append((prediction["tail_rank"], prediction["head_rank"]))
        lines = [{"relation": name, "triples": len(some), **_summary(some)} for name, some in sorted(ranks.items())]
        return {"per_relation": lines} if lines else {}

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        """The same question, with scores within `tolerance`: then ranks may differ only among entities whose scores lie within it."""
        return math.isfinite(difference := self.difference(one, other)) and difference <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        return self._apart(one["triples"], other["triples"])

    def _apart(self, one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
        """The largest difference of scores; one that stands in one list only is compared with the least score of the other list."""
        scores = [{(triple["head"], triple["relation"], triple["tail"]): triple["score"] for triple in triples} for triples in (one, other)]
        if not (scores[0].keys() & scores[1].keys()):
            return math.inf if scores[0] or scores[1] else 0.0
        largest = 0.0
        for here, there in (scores, scores[::-1]):
            least = min(there.values())
            for triple, score in here.items():
                largest = max(largest, abs(score - there[triple]) if triple in there else score - least)
        return largest

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        name = {"type": "string", "minLength": 1}
        one = {
            "type": "object",
            "properties": {"head": name, "relation": name, "tail": name},
            "required": ["relation"],
            "anyOf": [{"required": ["head"]}, {"required": ["tail"]}],
            "additionalProperties": False,
        }
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}

    def inputs_example(self) -> Any:
        return {"head": (self.entities or ("steroid",))[0], "relation": (self.relations or ("interacts_with",))[0]}

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """Rows of `{"head", "relation"}` (which tails?), `{"relation", "tail"}` (which heads?), all three (how likely?), or a list of these."""
        if not isinstance(inputs, list):
            return [self._row_from(inputs, "inputs")]
        if not inputs:
            raise InputError("`inputs` is an empty list; give at least one question.")
        return [self._row_from(item, f"inputs[{place}]") for place, item in enumerate(inputs)]

    def _row_from(self, item: Any, where: str) -> Row:
        if not isinstance(item, dict):
            raise InputError(f'`{where}` is {_short(item)}; it must be {{"head": …, "relation": …}} or {{"relation": …, "tail": …}}.')
        if unknown := [key for key in item if key not in ("head", "relation", "tail")]:
            raise InputError(f"`{where}` has the unknown key {_short(unknown[0])}; it may have head, relation and tail.")
        for key, value in item.items():
            if not isinstance(value, str):
                raise InputError(f"`{where}.{key}` is {_short(value)}; it must be a name.")
        try:
            return self.clean(item)
        except RowError as error:
            raise InputError(f"`{where}.{error.column}`: expected {error.expected}, found {_short(error.found)}.") from error

    def inputs_from(self, row: Row) -> Any:
        return {role: row[role] for role in ("head", "relation", "tail") if row.get(role) is not None}

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`[{head, relation, tail, score, known}, …]`, likeliest first; with `tail_rank` and `head_rank` where all three were given."""
        answers = []
        for prediction in predictions:
            ranks = {name: value for name, value in prediction.items() if name != "triples"}
            triples = [triple for triple in prediction["triples"] if not (parameters.new_only and triple["known"])]
            answers.append([{**triple, **ranks} for triple in triples[: parameters.top_k]])
        return answers[0] if single else answers

    def answer_schema(self) -> dict[str, Any]:
        name, number = {"type": "string"}, {"type": "number"}
        properties = {"head": name, "relation": name, "tail": name, "score": number, "known": {"type": "boolean"}}
        triple = {
            "type": "object",
            "properties": {**properties, "tail_rank": number, "head_rank": number},
            "required": list(properties),
            "additionalProperties": False,
        }
        one = {"type": "array", "items": triple}
        return {"anyOf": [one, {"type": "array", "items": one}]}

    def answer_difference(self, one: Any, other: Any) -> float:
        if one and isinstance(one[0], list):
            return max((self._apart(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
        return self._apart(one, other)


def _rows(heads: Mapping[str, Mapping[str, float]]) -> int:
    return int(sum(count for tails in heads.values() for count in tails.values()))


def _nearest(what: str, name: str, names: Mapping[str, int]) -> str:
    expected = f"{what} of the graph, which has {len(names):,}"
    if len(names) > MOST_COMPARED:
        return expected
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"{expected}; the nearest is {close[0]!r}"


def _shares(scores: np.ndarray) -> np.ndarray:
    """Softmax over the entities: what the cross-entropy trains."""
    import numpy as np

    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def _rank(scores: np.ndarray, known: np.ndarray, target: int) -> float:
    import numpy as np

    counts = np.ones(len(scores), dtype=bool)
    counts[known] = False
    counts[target] = False
    others = scores[counts]
    return 1.0 + float((others > scores[target]).sum()) + float((others == scores[target]).sum()) / 2


def _best(scores: np.ndarray, most: int) -> list[int]:
    """Places of the highest scores, highest first."""
    import numpy as np

    return np.argsort(-scores, kind="stable")[:most].tolist()


def _summary(ranks: Sequence[tuple[float, float]]) -> dict[str, float]:
    import numpy as np

    sides = np.array(ranks, dtype=np.float64)
    values: dict[str, float] = {}
    for suffix, some in (("", sides), ("_tail", sides[:, 0]), ("_head", sides[:, 1])):
        values[f"mrr{suffix}"] = float((1 / some).mean())
        values |= {f"hits_at_{most}{suffix}": float((some <= most).mean()) for most in HITS}
    return values


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
