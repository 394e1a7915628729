"""Masked language modelling: carry on a model's pretraining on texts of one's own, before fine-tuning it for another task."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks import heads, hidden_only, masks, rankings, texts
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task

if TYPE_CHECKING:
    import torch

TOP_K = 5
MOST_MASKS = 16
"""Masks of a text that are shown; of a longer list of answers the text of each would be too much."""
BYTES_OF_A_TOKEN = 4
"""About as many in any script, which is near enough to join texts before any is tokenized."""
MOST_CHARACTERS = 10_000_000
"""Of a request's texts times the tokens that it asks for, since each comes with the whole text."""
_OURS = ("positions", "labels", "counts", "shown", "offsets", "top_k", "targets")
"""In a batch, but not for the model."""


class FillMaskParameters(Parameters):
    """`parameters` of a Hugging Face fill-mask request."""

    top_k: Annotated[int, Field(gt=0, le=1000)] | None = None
    """How many tokens for each mask, the likeliest first; None: 5."""
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000)] | None = None
    """Look at these tokens only; of a text that is no token its first one."""


class MaskedLM(Task):
    """Some tokens of a text are hidden, and the model says what stood there."""

    parameters: ClassVar[type[Parameters]] = FillMaskParameters
    augments: ClassVar[bool] = True
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"perplexity"})

    max_length: Annotated[int, Field(ge=4)] | None = None
    """Tokens that the model reads at once; longer texts are cut into parts of about equal length. None: the tokenizer's limit, or 512."""
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are hidden; in training other ones in each epoch."""
    whole_word_mask: bool = False
    """Hide all tokens of a word together, which is harder to guess and teaches more."""
    group_texts: bool = False
    """Join rows that follow one another in a file to texts of about `max_length` tokens (4 bytes each), so that the model sees what stands around."""

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        return {"text": Column(kind="text", help="raw text")}

    def clean(self, row: Row) -> Row:
        return {"text": texts.clean_text("text", row.get("text"))}

    def joined(self, row: Row, following: Row) -> Row | None:
        text = f"{row['text']}\n{following['text']}"
        fits = self.group_texts and len(text.encode()) <= BYTES_OF_A_TOKEN * (self.max_length or texts.DEFAULT_MAX_LENGTH)
        return {"text": text} if fits else None

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        if not observed.get("train", {}).get("rows"):
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        return self

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """A text that has the mask token asks what stands there. Of any other some tokens are hidden, always the same ones."""
        seeds = [int.from_bytes(hashlib.blake2b(row["text"].encode(), digest_size=8).digest(), "little") for row in rows]
        return self._encode(rows, processor, seeds, training=False)

    def encode_to_train(self, rows: Sequence[Row], processor: Any, seeds: Sequence[int]) -> list[list[Example]]:
        """Hides tokens that depend on the row's seed: others in each epoch (Liu et al. 2019, arXiv 1907.11692)."""
        return self._encode(rows, processor, seeds, training=True)

    def _encode(self, rows: Sequence[Row], processor: Any, seeds: Sequence[int], *, training: bool) -> list[list[Example]]:
        """Examples have `positions` of hidden tokens, their `labels`, and of the first `shown` of them the `offsets` in the text."""
        if not rows:
            return []
        if processor.mask_token_id is None:
            raise InputError(
                f"model.base: the tokenizer {type(processor).__name__} has no mask token, so the model is no masked language model."
            )
        if not processor.is_fast:
            raise InputError(f"model.base: the tokenizer {type(processor).__name__} can't say which tokens make a word; choose a fast one.")
        encoded = processor([row["text"] for row in rows], padding=False, truncation=False, return_offsets_mapping=True, verbose=False)
        limit, special = texts.limit(processor, self.max_length), set(processor.all_special_ids)
        examples = []
        for index, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
            rng, its, asked = random.Random(seed), [], {} if training else self._asked(row, processor)
            left = MOST_MASKS
            ids, words = encoded["input_ids"][index], encoded.word_ids(index)
            asks = not training and processor.mask_token_id in ids
            for kept, own in masks.windows(encoded, index, processor, limit):
                example: Example = {
                    key: [encoded[key][index][position] for position in kept] for key in processor.model_input_names if key in encoded
                }
                if asks:
                    example["positions"] = [place for place in own if ids[kept[place]] == processor.mask_token_id]
                    example["labels"] = [masks.NOT_KNOWN] * len(example["positions"])
                    shown = min(left, len(example["positions"]))
                    left -= shown
                else:
                    own = [place for place in own if ids[kept[place]] not in special]
                    whole = masks.units([words[kept[place]] for place in own], own, whole_words=self.whole_word_mask)
                    masks.hide(example, whole, self.mlm_probability, processor, rng)
                    shown = int(not its and bool(example["positions"]))
                if not training:
                    example["offsets"] = [list(encoded["offset_mapping"][index][kept[place]]) for place in example["positions"][:shown]]
                    example |= {"shown": shown, **asked}
                its.append(example)
            examples.append(its)
        return examples

    def _asked(self, row: Row, processor: Any) -> Example:
        asked = row.get("asked", {})
        targets = {"targets": masks.target_ids(asked["targets"], processor)} if "targets" in asked else {}
        return {"top_k": asked.get("top_k", TOP_K), **targets}

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        """`positions` count through the padded batch, row after row; `counts` says how many are whose."""
        import torch

        batch = texts.pad(examples, processor)
        longest = batch["input_ids"].shape[1]
        positions: list[int] = []
        for row, example in enumerate(examples):
            shift = longest - len(example["input_ids"]) if processor.padding_side == "left" else 0
            positions += [row * longest + shift + place for place in example["positions"]]
        batch["positions"] = torch.tensor(positions, dtype=torch.long)
        batch["labels"] = torch.tensor([label for example in examples for label in example["labels"]], dtype=torch.long)
        if "shown" in examples[0]:
            batch["counts"] = torch.tensor([len(example["positions"]) for example in examples])
            for key in ("shown", "top_k"):
                batch[key] = torch.tensor([example[key] for example in examples])
            batch["offsets"] = torch.tensor([pair for example in examples for pair in example["offsets"]], dtype=torch.long).reshape(-1, 2)
            most = max(len(example.get("targets", ())) for example in examples)
            batch["targets"] = torch.tensor([[*(given := example.get("targets", [])), *[-1] * (most - len(given))] for example in examples])
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it has no such head or fewer positions than `max_length`."""
        advice = "an encoder such as BERT, RoBERTa, DeBERTa or ModernBERT"
        return heads.config_with_head(base, "AutoModelForMaskedLM", "masked-language-model head", advice, self.max_length, **from_hub)

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForMaskedLM`, with the head that the base model was pretrained with, or a fresh one where it has none."""
        from transformers import AutoModelForMaskedLM

        config = self.check_base(base, **heads.from_hub(options))
        model = AutoModelForMaskedLM.from_pretrained(base, config=config, **options)
        hidden_only.install(model)
        return model

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Sum of the cross-entropies of the hidden tokens, and their number."""
        from torch.nn import functional

        labels = batch["labels"]
        total = functional.cross_entropy(
            _logits(model, batch), labels, reduction="sum", ignore_index=masks.NOT_KNOWN, label_smoothing=label_smoothing
        )
        return total, float((labels != masks.NOT_KNOWN).sum())

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """For each example how many tokens are `hidden`, how many guessed `right`, the sum of their `loss`; for those to be shown,
        `masks`: `start` and `end` in the text, and `tokens` and `scores` of the likeliest."""
        chances = _logits(model, batch).log_softmax(dim=-1)
        labels, likeliest = batch["labels"], chances.argmax(dim=-1)
        known = labels != masks.NOT_KNOWN
        losses = -chances.gather(1, labels.clamp(min=0)[:, None])[:, 0] * known
        right = (likeliest == labels) & known
        offsets = iter(batch["offsets"].tolist())
        outputs, first = [], 0
        for index, count in enumerate(batch["counts"].tolist()):
            its = slice(first, first + count)
            shown = chances[first : first + int(batch["shown"][index])].exp()
            targets = [target for target in batch["targets"][index].tolist() if target >= 0]
            found = []
            for line in shown:
                scores = line[targets] if targets else line
                best = scores.topk(min(int(batch["top_k"][index]), len(scores)))
                tokens = [targets[place] if targets else place for place in best.indices.tolist()]
                start, end = next(offsets)
                found.append({"start": start, "end": end, "tokens": tokens, "scores": best.values.double().tolist()})
            totals = {"hidden": int(known[its].sum()), "right": int(right[its].sum()), "loss": float(losses[its].double().sum())}
            outputs.append({**totals, "masks": found})
            first += count
        return outputs

    def spell(self, outputs: Sequence[Any], processor: Any) -> list[Any]:
        """With the `texts` of the tokens."""
        return [
            {**output, "masks": [{**mask, "texts": [processor.decode([token]) for token in mask["tokens"]]} for mask in output["masks"]]}
            for output in outputs
        ]

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`sequence`: the text with its masks filled; `masks`: where they are in it, and for each its `fills` (score, token, token_str).

        Of a text without the mask token the first that was hidden is shown; `hidden`, `right` and `loss` are of all of those.
        """
        text, found, end = row["text"], [], 0
        pieces: list[str] = []
        for mask in (mask for output in outputs for mask in output["masks"]):
            pieces.append(text[end : mask["start"]])
            fills = [
                {"score": score, "token": token, "token_str": spelled}
                for score, token, spelled in zip(mask["scores"], mask["tokens"], mask["texts"], strict=True)
            ]
            start = sum(map(len, pieces))
            pieces.append(_written(fills[0]["token_str"], "".join(pieces), text[mask["start"] : mask["end"]]))
            found.append({"start": start, "end": start + len(pieces[-1]), "fills": fills})
            end = mask["end"]
        totals = {key: sum(output[key] for output in outputs) for key in ("hidden", "right", "loss")}
        return {"sequence": "".join([*pieces, text[end:]]), **totals, "masks": found}

    @property
    def most_predicted(self) -> int | None:
        """Enough for the accuracy; the perplexity is of all rows."""
        return 10_000

    def of_loss(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, 700.0))}

    def metrics(self) -> tuple[str, ...]:
        return ("perplexity", "accuracy")

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """`perplexity` and `accuracy` over the hidden tokens; neither where none was hidden whose right answer is known."""
        if unknown := [name for name in metrics or () if name not in self.metrics()]:
            raise InputError(f"evaluation.metrics: {unknown[0]!r} is no metric of this task.{did_you_mean(unknown[0], self.metrics())}")
        hidden = sum(prediction["hidden"] for prediction in predictions)
        if not hidden:
            return {}
        values = {
            **self.of_loss(sum(prediction["loss"] for prediction in predictions) / hidden),
            "accuracy": sum(prediction["right"] for prediction in predictions) / hidden,
        }
        return {name: values[name] for name in metrics or self.metrics()}

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        """The probabilities of the tokens that are shown within `tolerance`."""
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        return _difference([mask["fills"] for mask in one["masks"]], [mask["fills"] for mask in other["masks"]])

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        return {"anyOf": [text, {"type": "array", "items": text, "minItems": 1}]}

    def inputs_example(self) -> Any:
        return "The goal of life is [MASK]."

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """Rows of a text or a list of texts."""
        given = {name: getattr(parameters, name) for name in ("top_k", "targets") if getattr(parameters, name, None) is not None}
        more = {"asked": given} if given else {}
        if not isinstance(inputs, list):
            rows = [{**self._row_from(inputs, "inputs"), **more}]
        elif not inputs:
            raise InputError("`inputs` is an empty list; give at least one text.")
        else:
            rows = [{**self._row_from(item, f"inputs[{place}]"), **more} for place, item in enumerate(inputs)]
        characters, top_k = sum(len(row["text"]) for row in rows), given.get("top_k", TOP_K)
        if characters * top_k > MOST_CHARACTERS:
            raise InputError(
                f"`inputs` has {characters:,} characters, of which {top_k} versions are asked for; that is more than {MOST_CHARACTERS:,}."
            )
        return rows

    def _row_from(self, item: Any, where: str) -> Row:
        if not isinstance(item, str):
            raise InputError(f"`{where}` is {texts.short(item)}; it must be a text.")
        try:
            return self.clean({"text": item})
        except RowError as error:
            raise InputError(f"`{where}`: expected {error.expected}, found {texts.short(error.found)}.") from error

    def inputs_from(self, row: Row) -> Any:
        return row["text"]

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`[{score, token, token_str, sequence}, …]` for a text with one mask, a list of such lists for one with several; of a list of
        texts a list of these. `sequence` has the likeliest tokens at the other masks."""
        answers = []
        for prediction in predictions:
            lists = [_fills(prediction["sequence"], mask) for mask in prediction["masks"]]
            answers.append(lists[0] if len(lists) == 1 else lists)
        return answers[0] if single else answers

    def answer_schema(self) -> dict[str, Any]:
        fill = {
            "type": "object",
            "properties": {
                "score": {"type": "number"},
                "token": {"type": "integer"},
                "token_str": {"type": "string"},
                "sequence": {"type": "string"},
            },
            "required": ["score", "token", "token_str", "sequence"],
            "additionalProperties": False,
        }
        one = {"type": "array", "items": fill}
        text = {"anyOf": [one, {"type": "array", "items": one}]}
        return {"anyOf": [text, {"type": "array", "items": text}]}

    def answer_difference(self, one: Any, other: Any) -> float:
        """Token by token: tokens that are almost equally likely may stand in either order."""
        return _difference(list(_lists(one)), list(_lists(other)))


def _logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return hidden_only.logits(model, {key: value for key, value in batch.items() if key not in _OURS}, batch["positions"])


def _written(token: str, before: str, instead_of: str) -> str:
    """A token as it stands in a text after `before`: pieces of words without their mark, white space as it was."""
    gap = instead_of[: len(instead_of) - len(instead_of.lstrip())]
    if not gap and token[:1].isspace() and before and not before[-1].isspace():
        gap = " "
    return gap + token.strip().removeprefix("##")


def _fills(sequence: str, mask: Mapping[str, Any]) -> list[dict[str, Any]]:
    before, here, after = sequence[: mask["start"]], sequence[mask["start"] : mask["end"]], sequence[mask["end"] :]
    return [{**fill, "sequence": before + _written(fill["token_str"], before, here) + after} for fill in mask["fills"]]


def _difference(one: Sequence[Any], other: Sequence[Any]) -> float:
    """Of lists of fills, mask by mask."""
    if len(one) != len(other):
        return math.inf
    pairs = zip(one, other, strict=True)
    return max((rankings.difference(*({fill["token"]: fill["score"] for fill in fills} for fills in pair)) for pair in pairs), default=0.0)


def _lists(answer: Any) -> Any:
    """Every list of fills in an answer of any depth."""
    if answer and isinstance(answer[0], dict):
        yield answer
    else:
        for part in answer:
            yield from _lists(part)
