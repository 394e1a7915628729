"""Embedding: texts as vectors that are near each other where the texts belong together, for search, matching and clustering."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks import contrastive, embedding_requests, embedding_scores, heads, texts, vectors
from orchestrator.tasks import labels as label_rules
from orchestrator.tasks.base import Column, Example, Observation, Prediction, Row, RowError, Task
from orchestrator.tasks.contrastive import FIRST, Relation
from orchestrator.tasks.vectors import Pooling

if TYPE_CHECKING:
    import torch

Problem = Literal["pairs", "triplets", "scored-pairs", "labelled-pairs"]
ROLES: dict[str, tuple[str, ...]] = {
    "pairs": ("anchor", "positive"),
    "triplets": ("anchor", "positive", "negative"),
    "scored-pairs": ("text_a", "text_b"),
    "labelled-pairs": ("text_a", "text_b"),
}
"""The texts of a row; the place of each is its role in `contrastive`."""
_ALIASES = {
    "anchor": ("query", "question"),
    "positive": ("passage", "answer", "document"),
    "text_a": ("sentence1",),
    "text_b": ("sentence2",),
}
PROMPTS = {"anchor": "query", "text_a": "query", "text_b": "query", "positive": "passage", "negative": "passage"}
"""The prompt that stands before the texts of a role, where the job has one of this name."""
LOSS_ROWS = 32
"""Rows that are told from each other in the loss of a split: as many as a global batch has where the job does not say."""

log = logging.getLogger(__name__)


def _descending(value: Any) -> Any:
    whole = isinstance(value, (list, tuple)) and all(isinstance(size, int) for size in value)
    return tuple(sorted(set(value), reverse=True)) if whole else value


class Embedding(Task):
    """Vectors of texts, for search, matching and clustering: from pairs, triplets, pairs with a score or pairs with a label."""

    parameters: ClassVar[type[embedding_requests.EmbeddingParameters]] = embedding_requests.EmbeddingParameters
    joint: ClassVar[bool] = True
    proposals: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"problem": "triplets"})

    problem: Problem = "pairs"
    """What a row says, and so the loss: texts that belong together, also told from texts that don't, scored, or labelled 1 and 0."""
    pooling: Pooling = "mean"
    """What of the tokens becomes the vector: their mean, the first one (as BERT's [CLS]), or the last one (of a decoder)."""
    normalize: bool = True
    """Vectors have length 1, so that their dot product is their cosine. The loss always compares cosines."""
    max_length: Annotated[int, Field(ge=4)] | None = None
    """Tokens kept of a text; None: the tokenizer's limit, or 512 where it has none."""
    prompts: dict[str, str] = {}
    """Name -> what stands before a text. `query`: anchors, text_a, text_b; `passage`: positives and negatives. Requests name one: prompt_name."""
    matryoshka_dims: Annotated[tuple[Annotated[int, Field(gt=0)], ...] | None, BeforeValidator(_descending)] = None
    """Sizes of which the first numbers of a vector are trained to do as well, the full size among them: [384, 128, 64]."""
    scale: Annotated[float, Field(gt=0)] = 20.0
    """pairs, triplets and CoSENT: what cosines are multiplied by in the loss; 1 / temperature."""
    score_loss: Literal["cosent", "cosine"] = "cosent"
    """scored-pairs: compare the order of the scores, whatever their range, or the cosine with the score, which is in -1 to 1 then."""
    margin: Annotated[float, Field(gt=0, le=2)] = 0.5
    """labelled-pairs: the cosine distance beyond which texts that don't belong together are far enough apart."""
    evaluated_rows: Annotated[int, Field(gt=0)] = 5_000
    """Most rows of a split that are scored: a search goes through all their texts, and memory holds all their vectors."""

    @model_validator(mode="after")
    def _has_sizes(self) -> Self:
        if self.matryoshka_dims == ():
            raise ValueError("matryoshka_dims is empty; leave it out, or name the sizes, as in [384, 128, 64]")
        return self

    # ---- data ------------------------------------------------------------------------------------------------
    @property
    def _roles(self) -> tuple[str, ...]:
        return ROLES[self.problem]

    def columns(self) -> dict[str, Column]:
        helps = {
            "anchor": "a text, such as a question",
            "positive": "a text that belongs to the anchor, such as the passage with its answer",
            "negative": "a text, or a list of them, that does not",
            "text_a": "the first of two texts",
            "text_b": "the second of two texts",
        }
        columns = {
            role: Column(
                kind="any" if role == "negative" else "text", optional_at_prediction=True, aliases=_ALIASES.get(role, ()), help=helps[role]
            )
            for role in self._roles
        }
        if self.problem == "scored-pairs":
            columns["score"] = Column(kind="number", target=True, help="how near the two are: a number, more is nearer")
        if self.problem == "labelled-pairs":
            columns["label"] = Column(kind="label", target=True, help="1 (or true, yes): the two belong together; 0: they don't")
        columns["text"] = Column(kind="text", required=False, help="only for prediction: a text on its own")
        return columns

    def clean(self, row: Row) -> Row:
        """To train, all texts of a row must be there; to predict, those whose vectors are wanted, or `text` alone."""
        clean: Row = {role: _clean_texts(role, row[role]) for role in self._roles if role in row}
        if not clean:
            return {"text": texts.clean_text("text" if "text" in row else self._roles[0], row.get("text"))}
        for text in clean.get("negative", ()):
            if text == clean.get("positive"):
                raise RowError("negative", "texts other than the positive", text)
        if self.problem == "scored-pairs" and "score" in row:
            clean["score"] = label_rules.one_number(row["score"], "score")
        if self.problem == "labelled-pairs" and "label" in row:
            clean["label"] = _clean_label(row["label"])
        return clean

    def observe(self, rows: Sequence[Row]) -> Observation:
        found: Observation = {"rows": len(rows)}
        if self.problem == "pairs":
            keys = [float(contrastive.text_key(row["positive"]) >> 10) for row in rows if "positive" in row]
            found["bits"] = label_rules.bit_counts(keys)
        if self.problem == "scored-pairs":
            scores = [row["score"] for row in rows if "score" in row]
            found |= {"bits": label_rules.bit_counts(scores), "beyond": sum(abs(score) > 1 for score in scores)}
        if self.problem == "labelled-pairs":
            found["labels"] = dict(Counter(str(row["label"]) for row in rows if "label" in row))
        return found

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        if not observed.get("train", {}).get("rows"):
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        for split, observation in observed.items():
            if rows := int(observation["rows"]):
                self._refuse_unusable(split, rows, observation)
        return self

    def _refuse_unusable(self, split: str, rows: int, observation: Observation) -> None:
        """`InputError` for a split that can't be learnt from or scored."""
        same = all(count in (0, rows) for count in observation.get("bits", {}).values())
        if self.problem == "pairs" and split == "train" and same:
            raise InputError(f"All {rows:,} training rows have the same `positive`, so there is nothing to tell it from.")
        if self.problem == "scored-pairs" and same:
            raise InputError(f"All {rows:,} rows of the {split} split have the same `score`, so there is nothing to compare.")
        if self.score_loss == "cosine" and observation.get("beyond"):
            raise InputError(
                f"{int(observation['beyond']):,} of {rows:,} rows of the {split} split have a `score` beyond -1 to 1, which no cosine is: "
                "divide the scores, or set task.score_loss: cosent, for which their order counts alone."
            )
        if self.problem == "labelled-pairs" and len(observation["labels"]) < 2:
            raise InputError(
                f"All {rows:,} rows of the {split} split have the label {next(iter(observation['labels']))}; there must be 1 and 0."
            )

    def stratum(self, row: Row) -> str | None:
        return str(row["label"]) if "label" in row else None

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """One example for each text of a row, cut at the limit: in the order of the roles, its prompt before it."""
        every = [(index, role, text) for index, row in enumerate(rows) for role, _, text in self._texts(row)]
        encoded: list[Example] = [{} for _ in every]
        most = texts.limit(processor, self.max_length)
        for left in (None, True, False):  # As a request may ask; else the tokenizer's side.
            chosen = [place for place, (index, _, _) in enumerate(every) if _cut_left(rows[index]) is left]
            prompted = [self._prompt(rows[every[place][0]], every[place][1]) + every[place][2] for place in chosen]
            found = texts.encode(prompted, [None] * len(prompted), processor, most, cut_left=left)
            for place, example in zip(chosen, found, strict=True):
                encoded[place] = example
        examples: list[list[Example]] = [[] for _ in rows]
        for (index, role, text), example in zip(every, encoded, strict=True):
            row = rows[index]
            if row.get("truncate") is False and example["truncated"]:
                raise InputError(f"the text has more than {most} tokens, and truncate is false.")
            example |= {"role": self._roles.index(role) if role in self._roles else FIRST, "text_key": contrastive.text_key(text)}
            target = row.get("score", row.get("label"))
            if target is not None:
                example["target"] = float(target)
            examples[index].append(example)
        return examples

    def _texts(self, row: Row) -> list[tuple[str, int, str]]:
        """Role, place in the role and text of each text in a row."""
        found = []
        for role in self._roles if "text" not in row else ("text",):
            given = row.get(role)
            several = [] if given is None else [given] if isinstance(given, str) else given
            found += [(role, place, text) for place, text in enumerate(several)]
        return found

    def _prompt(self, row: Row, role: str) -> str:
        return self.prompts.get(row.get("prompt_name") or PROMPTS.get(role, ""), "")

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        """Padded on the right whatever the tokenizer does, so that a text has the same positions in any batch."""
        return texts.pad(examples, processor, left=False)

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it makes no vectors of texts, or not of this length or these sizes."""
        from transformers import MODEL_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(base, **from_hub)
        inner = config.get_text_config()
        remote = "AutoModel" in (getattr(config, "auto_map", None) or {})
        if (type(config) not in MODEL_MAPPING and not remote) or config.is_encoder_decoder or not getattr(inner, "vocab_size", None):
            raise InputError(
                f"model.base: {base!r} is a {config.model_type!r} model, of which there is no vector for each token of a text; "
                "choose an encoder such as BERT, MPNet or ModernBERT, or a decoder such as Llama or Qwen (with task.pooling: last)."
            )
        positions = getattr(inner, "max_position_embeddings", None)
        if self.max_length is not None and positions and self.max_length > positions:
            raise InputError(f"task.max_length is {self.max_length}, but the base model {base!r} has only {positions} positions.")
        if self.matryoshka_dims and self.matryoshka_dims[0] > inner.hidden_size:
            raise InputError(
                f"task.matryoshka_dims has {self.matryoshka_dims[0]}, but the vectors of {base!r} have only {inner.hidden_size} numbers."
            )
        return config

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModel` without the pooling layer of its pretraining, which no vector goes through."""
        from transformers import AutoModel

        from_hub = heads.from_hub(options)
        self.check_base(base, **from_hub)
        self._compare_pooling(base)
        model = AutoModel.from_pretrained(base, **options)
        if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
            model.pooler = None
        return model

    def _compare_pooling(self, base: str) -> None:
        """Says where sentence-transformers pools the base model in another way; as a rule it should be pooled as it was."""
        place = Path(base) / "1_Pooling" / "config.json"
        if not place.is_file():
            return
        said = json.loads(place.read_text(encoding="utf-8"))
        modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
        theirs = [mode for name, mode in modes.items() if said.get(name)]
        if theirs and self.pooling not in theirs:
            log.warning("%s was trained with task.pooling: %s; this job has %s.", base, theirs[0], self.pooling)

    def represent(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The vector of each text, float32 of shape (texts, size), not normalised."""
        import torch

        mask = batch.get("attention_mask")
        mask = torch.ones_like(batch["input_ids"]) if mask is None else mask
        return vectors.pool(model(**batch).last_hidden_state, mask, self.pooling)

    def relation(self, example: Example) -> Relation:
        return example["role"], example["text_key"], example.get("target", 0.0)

    def joint_loss(
        self, representations: torch.Tensor, relations: Sequence[Relation], *, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, float]:
        """Sum over the rows. pairs and triplets: all other texts of the global batch are negatives, but for those known to be right."""
        losses: dict[str, contrastive.Loss] = {
            "pairs": functools.partial(contrastive.in_batch_negatives, scale=self.scale, label_smoothing=label_smoothing),
            "labelled-pairs": functools.partial(contrastive.contrastive, margin=self.margin),
            "scored-pairs": contrastive.cosine_error
            if self.score_loss == "cosine"
            else functools.partial(contrastive.cosent, scale=self.scale),
        }
        loss = losses["pairs" if self.problem == "triplets" else self.problem]
        return contrastive.over_sizes(loss, representations, relations, self.matryoshka_dims), float(contrastive.rows_in(relations))

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """The vector of each text, float32 of shape (size,), not normalised."""
        return list(self.represent(model, batch).cpu().numpy())

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """Role -> vector (of `negative`: a list of them) for the texts that the row has."""
        normalize = self.normalize if row.get("normalize") is None else row["normalize"]
        prediction: Prediction = {}
        for (role, _, _), output in zip(self._texts(row), outputs, strict=True):
            vector = vectors.as_list(vectors.normalised(output) if normalize else output)
            if role == "negative":
                prediction.setdefault(role, []).append(vector)
            else:
                prediction[role] = vector
        return prediction

    @property
    def most_predicted(self) -> int | None:
        return self.evaluated_rows

    def split_loss(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> float:
        """The mean loss of a row among `LOSS_ROWS` rows that follow each other in the split."""
        import torch

        total, items = 0.0, 0.0
        group: list[list[float]] = []
        relations: list[Relation] = []

        def add() -> None:
            nonlocal total, items, group, relations
            if relations:
                loss, count = self.joint_loss(torch.tensor(group, dtype=torch.float32), relations)
                total, items = total + float(loss), items + count
            group, relations = [], []

        for place, (prediction, row) in enumerate(zip(predictions, rows, strict=True)):
            if place % LOSS_ROWS == 0:
                add()
            target = float(row.get("score", row.get("label", 0.0)))
            for role, index, text in self._texts(row):
                group.append(prediction[role][index] if role == "negative" else prediction[role])
                relations.append((self._roles.index(role), contrastive.text_key(text), target))
        add()
        return total / (items or 1.0)

    def metrics(self) -> tuple[str, ...]:
        return embedding_scores.METRICS[self.problem]

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Of a search: each anchor once, among all different positives (and negatives) of the rows."""
        for name in metrics or ():
            if name not in self.metrics():
                raise InputError(f"evaluation.metrics: {name!r} is no metric of this task.{did_you_mean(name, self.metrics())}")
        return embedding_scores.score(self.problem, predictions, rows, self.metrics() if metrics is None else metrics)

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`sizes`: what vectors of fewer numbers, of int8 and of bits take up, and how well they do."""
        lines = embedding_scores.sizes(self.problem, predictions, rows, self.matryoshka_dims)
        return {"sizes": lines} if lines else {}

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        """The largest over the vectors of one minus the cosine, or of the relative difference in length."""
        mine, theirs = (embedding_requests.flat(prediction) for prediction in (one, other))
        if one.keys() != other.keys() or len(mine) != len(theirs):
            return float("inf")
        return max((vectors.difference(a, b) for a, b in zip(mine, theirs, strict=True)), default=0.0)

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        return embedding_requests.INPUTS

    def inputs_example(self) -> Any:
        return "How do I change my password?"

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """Rows of a text, a list of texts, or `{"source_sentence": …, "sentences": […]}`."""
        asked = parameters or self.parameters()
        options = asked.options(self.prompts, self.matryoshka_dims)
        return [{**row, **options} for row in embedding_requests.rows(inputs, self._roles, self.clean)]

    def inputs_from(self, row: Row) -> Any:
        """The text of a row that has one; of several, the first as the source and the others to be compared with it."""
        first, *others = [text for _, _, text in self._texts(row)]
        return {"source_sentence": first, "sentences": others} if others else first

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """feature-extraction: a list of vectors, also for one text. sentence-similarity: the cosine of each sentence with the source."""
        normalize = self.normalize if parameters.normalize is None else parameters.normalize
        return embedding_requests.answer(predictions, parameters, normalize=normalize)

    def answer_schema(self) -> dict[str, Any]:
        return embedding_requests.ANSWERS


def _clean_texts(role: str, value: Any) -> str | list[str]:
    """The text in a cell; of negatives a list of one at least."""
    if role != "negative":
        return texts.clean_text(role, value)
    several = _listed(value) if not isinstance(value, (list, tuple)) else value
    if not several:
        raise RowError(role, "a text or a list of texts", value)
    return [texts.clean_text(role, text) for text in several]


def _listed(value: Any) -> list[Any]:
    """What JSON text of a list says, as a list stands in a CSV file or beside single texts; else the value alone."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except ValueError:
            return [value]
        if isinstance(found, list) and all(isinstance(text, str) for text in found):
            return found
    return [value]


def _clean_label(value: Any) -> int:
    name = label_rules.one_label(value, "1 or 0").lower()
    if name not in ("1", "true", "yes", "0", "false", "no"):
        raise RowError("label", "1, true or yes where the texts belong together, else 0, false or no", value)
    return int(name in ("1", "true", "yes"))


def _cut_left(row: Row) -> bool | None:
    side = row.get("truncation_direction")
    return None if side is None else side == "left"
