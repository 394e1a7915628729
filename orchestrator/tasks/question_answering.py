"""Question answering: the span of a text that answers a question, or that none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from orchestrator.errors import InputError
from orchestrator.tasks import answer_scores, answers, heads, rankings, spans, texts
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_LENGTH = 384
_ASKED = ("max_seq_len", "max_question_len", "doc_stride", "max_answer_len", "align_to_words")
"""Parameters of a request that change what the model is asked or which spans are looked at."""
_OURS = ("spans", "null", "start_positions", "end_positions")
"""In a batch, but not for the model."""

Tokens = Annotated[int, Field(gt=0)]


class QuestionAnsweringParameters(Parameters):
    """`parameters` of a Hugging Face question-answering request; what is not given is as in training."""

    top_k: Annotated[int, Field(gt=0, le=spans.N_BEST)] | None = None
    """How many answers, the best first; more than 1 makes the answer a list."""
    handle_impossible_answer: bool | None = None
    """Whether there may be no answer (the empty text)."""
    max_answer_len: Annotated[int, Field(gt=0, le=1000)] | None = None
    """Most tokens of an answer."""
    max_seq_len: Annotated[int, Field(ge=32)] | None = None
    """Tokens of question and context that the model reads at once; no more than it was trained with."""
    max_question_len: Tokens | None = None
    """Tokens after which a question is cut."""
    doc_stride: Annotated[int, Field(ge=0)] | None = None
    """Tokens that neighbouring windows of a long context share."""
    align_to_words: bool | None = None
    """Make answers longer that begin or end inside of a word."""


class QuestionAnswering(Task):
    """Extractive question answering over contexts of any length, also where some questions have no answer (SQuAD 1.1 and 2.0)."""

    parameters: ClassVar[type[Parameters]] = QuestionAnsweringParameters
    rows_at_once: ClassVar[int] = 32
    lower_is_better: ClassVar[frozenset[str]] = frozenset({answer_scores.THRESHOLD})  # a setting that was found, better neither way

    max_length: Annotated[int, Field(ge=16)] | None = None
    """Tokens of question and context that the model reads at once; None: 384, or the tokenizer's limit where that is lower."""
    max_question_length: Tokens = 64
    """Tokens after which a question is cut."""
    doc_stride: Annotated[int, Field(ge=0)] = 128
    """Tokens that neighbouring windows of a long context share (transformers' meaning of the word)."""
    max_answer_length: Tokens = 30
    """Most tokens of a predicted answer."""
    handle_impossible_answer: bool | None = None
    """Whether the model may say that there is no answer; None: where training rows have questions without one."""
    null_score_diff_threshold: float | None = None
    """No answer is given where the score of having none is higher than that of the best span by more; None: tuned on the validation rows."""

    @model_validator(mode="after")
    def _windows_move_on(self) -> Self:
        if self.max_length is not None and self.doc_stride and self.doc_stride >= self.max_length:
            raise ValueError(f"doc_stride is {self.doc_stride}, and windows of max_length {self.max_length} can't share so much")
        return self

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        rights = "the right answers: a text, a list of texts, or text and answer_start as in SQuAD and `datasets`; empty: there is none"
        return {
            "question": Column(kind="text", help="the question"),
            "context": Column(kind="text", help="the text in which the answer stands"),
            "answers": Column(kind="any", target=True, help=rights),
            "answer_start": Column(
                kind="any", target=True, required=False, help="the place of the answer's first character in the context"
            ),
            "is_impossible": Column(kind="any", target=True, required=False, help="true where the context has no answer"),
        }

    def clean(self, row: Row) -> Row:
        clean: Row = {role: texts.clean_text(role, row.get(role)) for role in ("question", "context")}
        if "answers" in row:
            clean["answers"] = answers.clean_answers(row, clean["context"])
        return clean

    def observe(self, rows: Sequence[Row]) -> Observation:
        known = [row["answers"]["text"] for row in rows if "answers" in row]
        return {"rows": len(rows), "answered": sum(map(bool, known)), "unanswerable": sum(not given for given in known)}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        train = observed.get("train", {})
        if not train.get("rows"):
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        if not train["answered"]:
            raise InputError(f"None of the {int(train['rows']):,} training questions has an answer, so there is nothing to learn.")
        if self.handle_impossible_answer is not None:
            return self
        for split, counts in observed.items():
            if counts["unanswerable"] and not train["unanswerable"]:
                raise InputError(
                    f"{int(counts['unanswerable']):,} questions of the {split} split have no answer, and every training question has one, so "
                    "the model can't learn to tell them apart. Add such questions to the training rows, or set task.handle_impossible_answer: "
                    "false to have it always answer."
                )
        return self.model_copy(update={"handle_impossible_answer": bool(train["unanswerable"])})

    def stratum(self, row: Row) -> str | None:
        if "answers" not in row:
            return None
        return "answer" if row["answers"]["text"] else "no answer"

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """Each row is as many examples as its context has windows; `truncated` says whether the question was cut."""
        if not rows:
            return []
        if not processor.is_fast:
            raise InputError(
                f"model.base: the tokenizer {type(processor).__name__} can't say where in the text a token stands, which answers need; choose a model with a fast tokenizer."
            )
        questions, contexts = [row["question"] for row in rows], [row["context"] for row in rows]
        encoded = processor(questions, contexts, padding=False, truncation=False, return_offsets_mapping=True, verbose=False)
        limit = min(texts.limit(processor, self.max_length), self.max_length or DEFAULT_MAX_LENGTH)
        examples = []
        for place, row in enumerate(rows):
            asked = row.get("asked", {})
            examples.append(
                spans.windows(
                    encoded,
                    place,
                    processor,
                    limit=min(limit, asked.get("max_seq_len", limit)),
                    longest_question=asked.get("max_question_len", self.max_question_length),
                    overlap=asked.get("doc_stride", self.doc_stride),
                    labelled="answers" in row,
                    answer=_first(row.get("answers")),
                )
            )
        return examples

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        """Beside the model's inputs `spans`, the characters of each context token (-1 for other tokens), and `null`."""
        import numpy as np
        import torch

        batch = texts.pad(examples, processor)
        longest = batch["input_ids"].shape[1]
        places = np.full((len(examples), longest, 2), -1, dtype=np.int64)
        shifts = [longest - len(example["input_ids"]) if processor.padding_side == "left" else 0 for example in examples]
        for its, example, shift in zip(places, examples, shifts, strict=True):
            if example["offsets"]:
                first = example["context"] + shift
                its[first : first + len(example["offsets"])] = example["offsets"]
        batch["spans"] = torch.from_numpy(places)
        for key in ("null", "start_positions", "end_positions"):
            if key in examples[0]:
                batch[key] = torch.tensor([example[key] + shift for example, shift in zip(examples, shifts, strict=True)])
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it has no such head or fewer positions than `max_length`."""
        advice = "an encoder such as BERT, RoBERTa, DeBERTa or ModernBERT"
        return heads.config_with_head(base, "AutoModelForQuestionAnswering", "question-answering head", advice, self.max_length, **from_hub)

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForQuestionAnswering`: a logit for each token to be an answer's first, and one to be its last."""
        from transformers import AutoModelForQuestionAnswering

        config = self.check_base(base, **heads.from_hub(options))
        return AutoModelForQuestionAnswering.from_pretrained(base, config=config, **options)

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Sum over the examples of the cross-entropies of start and end, half of each, as in transformers; the number of examples.

        The probabilities are over the tokens of the context and the null position, those among which `decode` chooses, so
        neither padding nor the question's length changes them.
        """
        total = sum(
            _cross_entropy(logits, batch[f"{side}_positions"], label_smoothing)
            for side, logits in zip(("start", "end"), _logits(model, batch), strict=True)
        )
        return total / 2, float(len(batch["input_ids"]))  # pyright: ignore[reportReturnType]

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """For each example float64 of shape (1 + its context tokens, 4), as `spans.best` takes it."""
        import numpy as np

        start, end = (logits.double().cpu().numpy() for logits in _logits(model, batch))
        places, nulls = batch["spans"].cpu().numpy(), batch["null"].tolist()
        outputs = []
        for index, null in enumerate(nulls):
            tokens = np.flatnonzero(places[index, :, 0] >= 0)
            chosen = np.concatenate([[null], tokens])
            characters = np.concatenate([[[0, 0]], places[index, tokens]])
            outputs.append(np.column_stack([start[index, chosen], end[index, chosen], characters]))
        return outputs

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`answer` (empty: there is none), its `score`, `start` and `end`; then the best spans as `answers`, `null_score`, `null_score_diff`."""
        asked = row.get("asked", {})
        longest, whole_words = asked.get("max_answer_len", self.max_answer_length), asked.get("align_to_words", False)
        found = spans.best(row["context"], outputs, longest=longest, whole_words=whole_words)
        return {**self._ranked(found, bool(self.handle_impossible_answer))[0], **found}

    def _ranked(self, prediction: Prediction, abstains: bool) -> list[dict[str, Any]]:
        """The answers of a prediction, the one that is given first; the empty one among them where the model may give none."""
        none = {"answer": "", "score": prediction["null_score"], "start": 0, "end": 0}
        found = prediction["answers"]
        if not found or (abstains and prediction["null_score_diff"] > (self.null_score_diff_threshold or 0.0)):
            return [none, *found]
        return [found[0], *sorted([*found[1:], *([none] if abstains else [])], key=lambda one: -one["score"])]

    def calibrate(self, metrics: Mapping[str, float]) -> Self:
        """With the threshold that the best validation found, 0 where it found none."""
        if self.null_score_diff_threshold is not None:
            return self
        return self.model_copy(update={"null_score_diff_threshold": float(metrics.get(answer_scores.THRESHOLD, 0.0))})

    def metrics(self) -> tuple[str, ...]:
        return (*answer_scores.METRICS, *answer_scores.PARTS, answer_scores.THRESHOLD)

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """F1 and exact match from 0 to 1; where some questions have an answer and some have none, both for each kind.

        Until the task is calibrated, with the best threshold for these rows, which is then among the numbers.
        """
        abstains = bool(self.handle_impossible_answer)
        return answer_scores.score(predictions, rows, metrics, abstains=abstains, threshold=self.null_score_diff_threshold)

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`per_kind`: questions that have an answer and those that have none."""
        threshold = (self.null_score_diff_threshold or 0.0) if self.handle_impossible_answer else None
        return {"per_kind": answer_scores.table(answer_scores.details(predictions, rows, threshold))} if rows else {}

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        """The probabilities of all spans, and of none, within `tolerance`; then answers may differ only where these are as good as tied."""
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        sides = [spans.by_place(prediction["answers"], none=prediction["null_score"]) for prediction in (one, other)]
        return rankings.difference(*sides)

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        one = {
            "type": "object",
            "properties": {"question": text, "context": text},
            "required": ["question", "context"],
            "additionalProperties": False,
        }
        return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}

    def inputs_example(self) -> Any:
        return {"question": "Where do I live?", "context": "My name is Clara and I live in Berkeley."}

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """Rows of `{"question": …, "context": …}` or a list of these."""
        given = {name: getattr(parameters, name) for name in _ASKED if getattr(parameters, name, None) is not None}
        more = {"asked": given} if given else {}
        if isinstance(inputs, list):
            if not inputs:
                raise InputError("`inputs` is an empty list; give at least one question with its context.")
            return [{**self._row_from(item, f"inputs[{place}]"), **more} for place, item in enumerate(inputs)]
        return [{**self._row_from(inputs, "inputs"), **more}]

    def _row_from(self, item: Any, where: str) -> Row:
        if not isinstance(item, dict):
            raise InputError(f'`{where}` is {texts.short(item)}; it must be {{"question": …, "context": …}}.')
        if unknown := item.keys() - {"question", "context"}:
            raise InputError(f"`{where}` has the unknown key {texts.short(min(unknown))}; it may have question and context.")
        for key in ("question", "context"):
            if not isinstance(item.get(key), str):
                raise InputError(f"`{where}.{key}` is {texts.short(item[key]) if key in item else 'missing'}; it must be a text.")
        try:
            return self.clean(item)
        except RowError as error:
            raise InputError(f"`{where}.{error.column}`: expected {error.expected}, found {texts.short(error.found)}.") from error

    def inputs_from(self, row: Row) -> Any:
        return {"question": row["question"], "context": row["context"]}

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`{answer, score, start, end}` for one question, a list of these where `top_k` is above 1; for a list of questions a list of answers."""
        abstains = parameters.handle_impossible_answer
        abstains = bool(self.handle_impossible_answer) if abstains is None else abstains
        several = (parameters.top_k or 1) > 1
        found = []
        for prediction in predictions:
            ranked = self._ranked(prediction, abstains)[: parameters.top_k or 1]
            found.append(ranked if several else ranked[0])
        return found[0] if single else found

    def answer_schema(self) -> dict[str, Any]:
        place = {"type": "integer", "minimum": 0}
        one = {
            "type": "object",
            "properties": {"answer": {"type": "string"}, "score": {"type": "number"}, "start": place, "end": place},
            "required": ["answer", "score", "start", "end"],
            "additionalProperties": False,
        }
        ranked = {"type": "array", "items": one, "minItems": 1}
        return {"anyOf": [one, ranked, {"type": "array", "items": ranked, "minItems": 1}]}

    def answer_difference(self, one: Any, other: Any) -> float:
        """Of the scores. Other spans are another answer, but where neither is likelier than not they may be as good as tied."""
        pairs = [(one, other)] if isinstance(one, dict) else list(zip(one, other, strict=True))
        most = 0.0
        for a, b in pairs:
            if isinstance(a, list):
                most = max(most, rankings.difference(spans.by_place(a), spans.by_place(b)))
            elif (a["start"], a["end"]) != (b["start"], b["end"]) and max(a["score"], b["score"]) > 0.5:
                return float("inf")
            else:
                most = max(most, abs(a["score"] - b["score"]))
        return most


def _first(given: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """The first of several right answers is learnt, as by all who train on SQuAD."""
    if not given or not given["text"]:
        return None
    return given["answer_start"][0], given["answer_start"][0] + len(given["text"][0])


def _logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and end logits in fp32, of shape (examples, tokens); minus infinity where no answer can start or end."""
    output = model(**{key: value for key, value in batch.items() if key not in _OURS})
    possible = batch["spans"][:, :, 0] >= 0
    possible = possible.scatter(1, batch["null"][:, None], True)
    start, end = (logits.float().masked_fill(~possible, float("-inf")) for logits in (output.start_logits, output.end_logits))
    return start, end


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Its sum, the smoothing spread over the tokens that are possible."""
    chances = logits.log_softmax(dim=-1)
    total = -chances.gather(1, target[:, None]).sum()
    if not label_smoothing:
        return total
    possible = chances.isfinite()
    even = -(chances.masked_fill(~possible, 0.0).sum(dim=-1) / possible.sum(dim=-1)).sum()
    return (1 - label_smoothing) * total + label_smoothing * even
