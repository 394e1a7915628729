"""Text generation: a language model that answers in conversations, or that goes on with texts."""

from __future__ import annotations

import bisect
import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from orchestrator.errors import InputError
from orchestrator.tasks import chat, conversations, generation, generation_requests, heads, text_scores, texts
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task
from orchestrator.tasks.generation import Generation, Prompts
from orchestrator.tasks.labels import missing

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_LENGTH = 2048
"""Tokens of a conversation where neither the task nor the tokenizer says less."""
IGNORED = -100
"""The label of a token that the loss leaves out."""
DEFAULTS = ("rougeL", "bleu", "exact_match")


class TextGeneration(Task):
    """Dialogue and instruction tuning, and learning to go on with texts, by a decoder such as Llama, Qwen or GPT-2."""

    parameters: ClassVar[type[Parameters]] = generation_requests.TextGenerationParameters
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"perplexity"}) | text_scores.LOWER_IS_BETTER

    problem: Literal["dialogue", "text"] | None = None
    """dialogue: rows are conversations, and the assistant's answers are learnt; text: rows are texts, learnt as a whole. None: by what the rows are."""
    answers: Literal["all", "last"] = "all"
    """Which of the assistant's turns in a conversation count in the loss."""
    chat_template: str | None = None
    """Jinja template of a conversation, saved with the model; None: the tokenizer's own, else a simple one."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens of a conversation, the answer included: of longer ones the oldest turns are left out; None: the tokenizer's limit, at most 2048."""
    packing: bool = False
    """Put texts one behind the other, none seeing another, in place of padding; the same result, and faster where lengths differ."""
    generate: Generation = Generation()
    """How answers are generated in the evaluation and, unless a request says otherwise, by the endpoint."""
    most_generated: Annotated[int, Field(gt=0)] = 50
    """Rows of a split that are answered and scored while training and in the evaluation; the loss is of all."""

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        text = {"text": Column(kind="text", required=False, alternative=True, help="a text, learnt as a whole")}
        own = {"generate": Column(kind="any", required=False, help="settings of task.generate for this row")}
        spoken = {} if self.problem == "text" else conversations.COLUMNS
        return {**spoken, **({} if self.problem == "dialogue" else text), **own}

    def clean(self, row: Row) -> Row:
        """`messages` up to a user's turn and the `completion` to them, or `text`."""
        found: Row | None = None if self.problem == "text" else conversations.clean(row)
        if found is None:
            wanted = "messages" if self.problem == "dialogue" else "text"
            if self.problem == "dialogue" or missing(row.get("text")):
                column = next((role for role in row if role in self.columns() and role != "generate"), wanted)
                raise RowError(column, "a conversation" if self.problem == "dialogue" else "a conversation or a text", row.get(column))
            found = Row(text=texts.clean_text("text", row["text"]))
        if not missing(row.get("generate")) and (given := generation_requests.clean_settings(row["generate"], self.generate)):
            found["generate"] = given
        return found

    def check_target(self, row: Row) -> None:
        if "messages" in row and "completion" not in row:
            raise RowError(
                "completion", "an answer of the assistant at the end of the conversation", f"user: {row['messages'][-1]['content']}"
            )

    def observe(self, rows: Sequence[Row]) -> Observation:
        conversing = sum("messages" in row for row in rows)
        return {"rows": len(rows), "conversations": conversing, "texts": len(rows) - conversing}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        train = observed.get("train", {})
        if not train.get("rows"):
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        if self.problem is not None:
            return self
        return self.model_copy(update={"problem": "dialogue" if train["conversations"] else "text"})

    # ---- tensors ---------------------------------------------------------------------------------------------
    def complete_processor(self, processor: Any) -> Any:
        """The tokenizer with a chat template, so that it is saved with one."""
        return chat.with_template(processor, self.chat_template)

    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """A conversation is one example: `input_ids`, with which the answer is asked for, and with an answer `tokens` and `labels`.

        A text is one example for each `max_length` tokens of it, of which the last is gone on with.
        """
        return [self._encode_text(row, processor) if "text" in row else [self._encode_conversation(row, processor)] for row in rows]

    def _limits(self, row: Row, processor: Any) -> tuple[int, int, Generation]:
        """Most tokens of prompt and answer, and of the prompt; and how to generate within them."""
        limit = self.max_length or min(int(processor.model_max_length), DEFAULT_MAX_LENGTH)
        settings = self.generate.with_(generation_requests.of_generation(row.get("generate")))
        return limit, max(limit - settings.max_new_tokens, limit // 2), settings

    def _encode_conversation(self, row: Row, processor: Any) -> Example:
        limit, room, settings = self._limits(row, processor)
        turns, answer = row["messages"], row.get("completion")
        found = chat.tokens(processor, turns, answer)
        most = _droppable(turns)
        if cut := len(found.prompt) > room and most > 0:
            fits = bisect.bisect_left(
                range(most), True, lo=1, key=lambda count: len(chat.tokens(processor, _without(turns, count), None).prompt) <= room
            )
            found = chat.tokens(processor, _without(turns, fits), answer)
        drop = max(0, len(found.prompt) - room)
        prompt = found.prompt[drop:]
        example: Example = {"input_ids": prompt, "generate": _within(settings, limit - len(prompt)).to_json()}
        if found.answer:
            kept = found.answer[: limit - len(prompt)]
            said = found.said[drop:][: len(prompt) + len(kept)]
            if self.answers == "last":
                said[: len(prompt)] = [False] * len(prompt)
            example["tokens"] = [*prompt, *kept]
            example["labels"] = [
                token if counts and place else IGNORED for place, (token, counts) in enumerate(zip(example["tokens"], said, strict=True))
            ]
            example["truncated"] = cut or drop > 0 or len(kept) < len(found.answer)
        return example

    def _encode_text(self, row: Row, processor: Any) -> list[Example]:
        limit, room, settings = self._limits(row, processor)
        ids = list(processor(row["text"], padding=False, truncation=False, verbose=False)["input_ids"])
        end = processor.eos_token_id
        if end is not None and ids[-1:] == [end]:
            ids.pop()
        if not ids:
            ids = [processor.bos_token_id if processor.bos_token_id is not None else processor.pad_token_id]
        whole = [*ids, *([] if end is None else [end])]
        examples: list[Example] = []
        for start in range(
            0, max(1, len(whole) - 1), limit - 1
        ):  # A part begins with the last token of the one before, to foretell its next from.
            part = whole[start : start + limit]
            examples.append({"tokens": part, "labels": [IGNORED, *part[1:]], "input_ids": []})
        prompt = ids[-room:]
        examples[-1] |= {"input_ids": prompt, "generate": _within(settings, limit - len(prompt)).to_json()}
        return examples

    def token_view(self, row: Row, processor: Any) -> list[tuple[str, bool]]:
        view: list[tuple[str, bool]] = []
        for example in self.encode([row], processor)[0]:
            tokens = example.get("tokens", example["input_ids"])
            labels = example.get("labels", [IGNORED] * len(tokens))
            view += zip(generation.pieces(processor, tokens), (label != IGNORED for label in labels), strict=True)
        return view

    def length(self, example: Example) -> int:
        """Tokens that are learnt from; where there are none, of the prompt and the longest answer to it."""
        if "tokens" in example:
            return len(example["tokens"])
        return len(example["input_ids"]) + example["generate"]["max_new_tokens"]

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        """What is learnt from, padded on the right or packed into one line; and the prompts, which `infer` pads on the left."""
        batch: dict[str, Any] = {}
        if "tokens" in examples[0]:
            batch = _packed(examples) if self.packing else _padded(examples, processor.pad_token_id)
        settings = [Generation.model_validate(example.get("generate", {})) for example in examples]
        ends = chat.ends(processor) if self.problem != "text" else []
        batch["prompts"] = Prompts([example["input_ids"] for example in examples], settings, processor, ends)
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it is no decoder, has fewer positions than the tokens that are kept, or can't be packed."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(base, **from_hub)
        remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
        if (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or reads_both_ways or config.is_encoder_decoder) and not remote:
            raise InputError(
                f"model.base: {base!r} is a {config.model_type!r} model, which does not generate texts from left to right; "
                "choose a decoder such as Llama, Qwen, SmolLM or GPT-2."
            )
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        if self.max_length is not None and positions and self.max_length > positions:
            raise InputError(f"task.max_length is {self.max_length}, but the base model {base!r} has only {positions} positions.")
        if self.max_length is None and positions and positions < (known := _tokens_known(base, from_hub)):
            raise InputError(
                f"task.max_length: the base model {base!r} has {positions} positions and its tokenizer would keep {known} tokens; set it to {positions} or less."
            )
        if self.packing and "position_ids" not in _takes(config):
            raise InputError(
                f"task.packing: a {config.model_type!r} model takes no positions, so texts behind one another would be one text to it."
            )
        return config

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForCausalLM`. Raises `InputError` as `check_base`, and where a packed text sees the one before it."""
        from transformers import AutoModelForCausalLM

        self.check_base(base, **heads.from_hub(options))
        model = AutoModelForCausalLM.from_pretrained(base, **options)
        if self.packing and not _keeps_apart(model):
            raise InputError(
                f"task.packing: {type(model).__name__} lets texts that stand behind one another see each other, so packing would change what is learnt; "
                "set it to false."
            )
        return model

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Sum of the cross-entropies of the tokens that count, in fp32, and their number.

        Only at the places of these tokens are logits computed, where the model can: a vocabulary is often larger than the rest of a small model.
        """
        import torch
        from torch.nn import functional

        labels = batch["labels"]
        counts = labels[:, 1:] != IGNORED
        takes = _takes(model.config)
        inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        if "use_cache" in takes:
            inputs["use_cache"] = False
        if "logits_to_keep" in takes and _keeps_marked_logits():
            inputs["logits_to_keep"] = torch.cat([counts, torch.zeros_like(counts[:, :1])], 1)
            logits = model(**inputs).logits
        else:
            logits = model(**inputs).logits[:, :-1][counts]
        total = functional.cross_entropy(logits.float(), labels[:, 1:][counts], reduction="sum", label_smoothing=label_smoothing)
        return total, float(counts.sum())

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """What is generated for each example, as `generation.generate` says it; None for a text's parts before the last."""
        prompts: Any = batch["prompts"]
        asked = [place for place, tokens in enumerate(prompts.tokens) if tokens]
        outputs: list[Any] = [None] * len(prompts.tokens)
        for place, output in zip(asked, generation.generate(model, prompts.of(asked)), strict=True):
            outputs[place] = output
        return outputs

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`text`, `finish_reason`, and of each token `ids`, `pieces`, `special` and `logprobs`; `full_text` where the row asks for it."""
        output = outputs[-1]
        text = output["text"].strip() if "messages" in row else output["text"]
        prediction = {**output, "text": text}
        if (row.get("generate") or {}).get("return_full_text"):
            answer = {"role": "assistant", "content": text}
            prediction["full_text"] = [*row["messages"], answer] if "messages" in row else row["text"] + text
        return prediction

    @property
    def most_predicted(self) -> int | None:
        return self.most_generated

    def of_loss(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, 700.0))}

    def metrics(self) -> tuple[str, ...]:
        return ("loss", "perplexity", *DEFAULTS, *(name for name in text_scores.KNOWN if name not in DEFAULTS))

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Generated answers against those in the rows. Texts to go on with have none, so they are not scored but by the loss."""
        pairs = [(said["text"], row["completion"]) for said, row in zip(predictions, rows, strict=True) if "completion" in row]
        wanted = [name for name in (DEFAULTS if metrics is None else metrics) if name not in ("loss", "perplexity")]
        return text_scores.score([said for said, _ in pairs], [right for _, right in pairs], wanted)

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`samples`: what was asked, expected and generated."""
        samples = [
            {
                "prompt": conversations.said(row["messages"]) if "messages" in row else row["text"],
                "expected": row.get("completion", ""),
                "generated": said["text"],
                "finish_reason": said["finish_reason"],
            }
            for said, row in zip(predictions, rows, strict=True)
        ]
        return {"samples": samples} if samples else {}

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        """Of the tokens' probabilities, up to where rounding may have parted the texts (`generation.difference`)."""
        return generation.difference(one, other)

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        return generation_requests.INPUTS_SCHEMA

    def inputs_example(self) -> Any:
        return "Once upon a time" if self.problem == "text" else [{"role": "user", "content": "What is the capital of France?"}]

    def probe(self) -> list[Row]:
        return [{**row, "generate": {"max_new_tokens": 1}} for row in self.rows_from(self.inputs_example())]

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """Rows of a text, a conversation (a list of {role, content}), `{"messages" or "text": …, "generate": …}`, or a list of these.

        A text is a user's turn, and where the rows were texts a text to go on with.
        """
        return generation_requests.rows(self, inputs, parameters, text_role="text" if self.problem == "text" else "prompt")

    def inputs_from(self, row: Row) -> Any:
        """The conversation, or the text; with the row's settings where it has some."""
        kept = {role: row[role] for role in ("messages", "text", "generate") if role in row}
        if list(kept) == ["messages"]:
            return kept["messages"]
        return kept["text"] if list(kept) == ["text"] and self.problem == "text" else kept

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`[{"generated_text": …}, …]`, with `details` where they are asked for: a list also for one, as Hugging Face clients take it."""
        entries = []
        for prediction in predictions:
            entry = {"generated_text": prediction.get("full_text", prediction["text"])}
            entries.append({**entry, "details": generation.details(prediction)} if parameters.details else entry)
        return entries

    def answer_schema(self) -> dict[str, Any]:
        return generation_requests.answer_schema("generated_text", {"anyOf": [{"type": "string"}, {"type": "array"}]})

    def replay_parameters(self) -> Parameters:
        """With every token and its probability, so that a near tie is told from another answer."""
        return self.parameters.parse({"details": True})

    def answer_difference(self, one: Any, other: Any) -> float:
        """As `difference` where the answers have details; else 0 for the same texts and inf for others."""
        return generation_requests.answer_difference(one, other)


def _droppable(turns: Sequence[conversations.Turn]) -> int:
    """Most that `_without` can take of a conversation: all questions with their answers, and the system turn."""
    head = turns[0]["role"] == "system"
    return (len(turns) - head) // 2 + head


def _without(turns: Sequence[conversations.Turn], count: int) -> list[conversations.Turn]:
    """A conversation without its oldest `count` questions and answers; the system turn goes last, when only the last question is left."""
    head = list(turns[:1]) if turns[0]["role"] == "system" else []
    rest = turns[len(head) :]
    return [*head, *rest[2 * count :]] if 2 * count < len(rest) else list(rest[-1:])


def _within(settings: Generation, room: int) -> Generation:
    return settings.with_({"max_new_tokens": max(1, min(settings.max_new_tokens, room))})


def _padded(examples: Sequence[Example], pad: int) -> dict[str, Any]:
    import torch

    longest = max(len(example["tokens"]) for example in examples)

    def rows(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([[*example[name], *[filler] * (longest - len(example[name]))] for example in examples])

    mask = torch.tensor([[1] * len(example["tokens"]) + [0] * (longest - len(example["tokens"])) for example in examples])
    return {"input_ids": rows("tokens", pad), "attention_mask": mask, "labels": rows("labels", IGNORED)}


def _packed(examples: Sequence[Example]) -> dict[str, Any]:
    """One line of all examples. Positions begin anew with each, from which transformers makes a block-diagonal mask.

    No example foretells the next one's first token: that has no label.
    """
    import torch

    return {
        "input_ids": torch.tensor([[token for example in examples for token in example["tokens"]]]),
        "position_ids": torch.tensor([[place for example in examples for place in range(len(example["tokens"]))]]),
        "labels": torch.tensor([[label for example in examples for label in example["labels"]]]),
    }


def _keeps_apart(model: Any) -> bool:
    """Whether two packed texts get the logits that each gets alone, tried on four tokens."""
    import torch

    ids = torch.arange(4).reshape(1, 4) % model.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False).logits[0, 2:].float()
        alone = model(input_ids=ids[:, 2:], use_cache=False).logits[0].float()
    model.train(was_training)
    return bool((packed - alone).abs().mean() <= 0.02 * alone.std())


def _tokens_known(base: str, from_hub: Mapping[str, Any]) -> int:
    """The tokens that are kept of a conversation where the job names no limit; 0 for a bundle's model, whose tokenizer lies elsewhere."""
    from transformers import AutoTokenizer

    folder = Path(base)
    if folder.is_dir() and not (folder / "tokenizer_config.json").is_file():
        return 0
    return min(int(AutoTokenizer.from_pretrained(base, **from_hub).model_max_length), DEFAULT_MAX_LENGTH)


@functools.lru_cache(maxsize=8)
def _arguments(config_class: type) -> frozenset[str]:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return frozenset()
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return frozenset(inspect.signature(model.forward).parameters)


def _takes(config: Any) -> frozenset[str]:
    """What the model's `forward` takes by name; of a class that comes with a hub model nothing is known."""
    return _arguments(type(config))


@functools.cache
def _keeps_marked_logits() -> bool:
    """Does `logits_to_keep` take a mask over the batch? It does since transformers has this function."""
    from transformers import modeling_utils

    return hasattr(modeling_utils, "slice_logits_to_keep")
