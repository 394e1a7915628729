"""Text to text: translation and summarization with encoder-decoder models such as T5, BART, Marian, mBART and NLLB."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks import generation, generation_requests, guessing, heads, text_scores, texts
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, RowError, Task
from orchestrator.tasks.generation import BeamGeneration, Prompts
from orchestrator.tasks.labels import missing

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of padding."""
DEFAULTS = {"translation": ("chrf", "bleu", "exact_match"), "summarization": ("rougeL", "rouge1", "rouge2")}
"""The metrics reported where the job names none; the first one is the objective."""
ANSWERS = {"translation": "translation_text", "summarization": "summary_text"}
REQUESTED = {"max_new_tokens": "max_new_tokens", "max_length": "max_new_tokens"} | {
    name: name for name in BeamGeneration.model_fields if name != "max_new_tokens"
}
"""`generate_parameters` that a client may send -> setting."""


class Text2TextParameters(Parameters):
    """`parameters` of Hugging Face's translation and summarization requests."""

    src_lang: str | None = None
    """Language of the text: the one that the model was trained for."""
    tgt_lang: str | None = None
    """Language to translate to: the one that the model was trained for."""
    generate_parameters: dict[str, Any] | None = None
    """Settings of `task.generate` for this request."""
    truncation: Literal["do_not_truncate", "longest_first", "only_first", "only_second"] | None = None
    """A text longer than `max_source_length` is cut; do_not_truncate is refused."""
    clean_up_tokenization_spaces: bool | None = None
    """Take out the spaces that English tokenizers put before punctuation."""
    details: bool = False
    """Answer with the tokens, their log probabilities, and why the text ended."""


class Text2Text(Task):
    """Translation and summarization: a text is read, and another one written."""

    parameters: ClassVar[type[Parameters]] = Text2TextParameters
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"perplexity"}) | text_scores.LOWER_IS_BETTER

    problem: Literal["translation", "summarization"] = "translation"
    """What scores it, and how answers are called."""
    source_lang: str | None = None
    """translation: code of the language, as the model knows it (en, en_XX, eng_Latn) and as a key of the column `translation`."""
    target_lang: str | None = None
    """translation: code of the language to write; also says how BLEU cuts it into words."""
    prefix: str = ""
    """Written before each text, as T5 was taught: "translate English to German: "."""
    max_source_length: Annotated[int, Field(ge=4)] | None = None
    """Tokens kept of a text; None: the tokenizer's limit, or 512 where it has none."""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """Tokens kept of a target, and most that are generated."""
    generate: BeamGeneration = BeamGeneration()
    """How texts are generated; `max_new_tokens` is at most `max_target_length`."""
    most_generated: Annotated[int, Field(gt=0)] = 100
    """Rows of a split that are written and scored while training and in the evaluation; the loss is of all."""

    @model_validator(mode="after")
    def _languages_are_of_translations(self) -> Self:
        if self.problem == "summarization" and (self.source_lang or self.target_lang):
            raise ValueError("source_lang and target_lang are for problem: translation")
        return self

    # ---- data ------------------------------------------------------------------------------------------------
    @classmethod
    def fits(cls, columns: Sequence[str], rows: Sequence[Row], format: str) -> float:
        return guessing.fits(cls.proposed(rows), rows)

    @classmethod
    def proposed(cls, rows: Sequence[Row]) -> Self:
        """With the two languages of a column `translation`, the first one as the source."""
        languages = next((list(value) for row in rows if isinstance(value := row.get("translation"), Mapping)), [])
        return cls.parse({"source_lang": languages[0], "target_lang": languages[1]}) if len(languages) == 2 else super().proposed(rows)

    def columns(self) -> dict[str, Column]:
        what = "the text to translate" if self.problem == "translation" else "the text to summarize"
        columns = {"source": Column(kind="text", required=False, alternative=True, help=what)}
        if self.problem == "translation":
            about = "both texts by language, such as {en: …, zh: …}"
            columns["translation"] = Column(kind="any", required=False, alternative=True, help=about)
        columns["target"] = Column(kind="text", required=False, target=True, help="the text to write")
        columns["generate"] = Column(kind="any", required=False, help="settings of task.generate for this row")
        return columns

    def clean(self, row: Row) -> Row:
        if not missing(row.get("source")) or self.problem != "translation" or missing(row.get("translation")):
            found: Row = {"source": texts.clean_text("source", row.get("source"))}
            if not missing(row.get("target")):
                found["target"] = texts.clean_text("target", row["target"])
        else:
            found = self._of_languages(row["translation"])
        if not missing(row.get("generate")) and (given := generation_requests.clean_settings(row["generate"], self.generate)):
            found["generate"] = given
        return found

    def _of_languages(self, value: Any) -> Row:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise RowError("translation", "an object with a text for each language, or JSON text of one", value) from None
        if not isinstance(value, Mapping):
            raise RowError("translation", "an object with a text for each language", value)
        found = {}
        for role, code in (("source", self.source_lang), ("target", self.target_lang)):
            if code is None:
                raise RowError("translation", f"task.{role}_lang to say which of its languages is the {role}", sorted(map(str, value)))
            key = code if code in value else next((key for key in value if _language(str(key)) == _language(code)), None)
            if key is not None and value[key] is not None:
                found[role] = texts.clean_text("translation", value[key])
            elif role == "source":
                raise RowError("translation", f"a text for the language {code!r}", sorted(map(str, value)))
        return found

    def check_target(self, row: Row) -> None:
        if "target" not in row:
            raise RowError("target", "the text to write", None)

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        if not observed.get("train", {}).get("rows"):
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        return self

    # ---- tensors ---------------------------------------------------------------------------------------------
    def complete_processor(self, processor: Any) -> Any:
        """The tokenizer with its languages set, where it knows several. `InputError` for one that it doesn't know."""
        if self.problem == "translation" and hasattr(processor, "src_lang"):
            for name, code in (("source_lang", self.source_lang), ("target_lang", self.target_lang)):
                if code is None or _language_id(processor, code) is None:
                    known = _languages(processor)
                    hint = did_you_mean(code, known) if code else f" There is {', '.join(known[:12])}, …"
                    raise InputError(
                        f"task.{name}: the base model translates between languages and {'needs one' if code is None else f'has no {code!r}'}.{hint}"
                    )
            processor.src_lang, processor.tgt_lang = self.source_lang, self.target_lang
        return processor

    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """Each row is one example, cut at the limits; `truncated` says whether it was."""
        limit = texts.limit(processor, self.max_source_length)
        examples = texts.encode([self.prefix + row["source"] for row in rows], [None] * len(rows), processor, limit)
        for row, example in zip(rows, examples, strict=True):
            for name in example.keys() - {"input_ids", "attention_mask", "truncated"}:
                del example[name]
            settings = self.generate.with_(row.get("generate"))
            example["generate"] = settings.with_({"max_new_tokens": min(settings.max_new_tokens, self.max_target_length)}).to_json()
            if "target" in row:
                example["labels"], cut = self._target(row["target"], processor)
                example["truncated"] = example["truncated"] or cut
        return [[example] for example in examples]

    def _target(self, text: str, processor: Any) -> tuple[list[int], bool]:
        """Its tokens, which end with the end of text whether or not they are cut; and whether they are."""
        ids = list(processor(text_target=text, padding=False, truncation=False, verbose=False)["input_ids"])
        end = processor.eos_token_id
        if end is not None and end not in ids:
            ids.append(end)
        cut = len(ids) > self.max_target_length
        return ([*ids[: self.max_target_length - 1], ids[-1]] if cut else ids), cut

    def length(self, example: Example) -> int:
        return len(example["input_ids"]) + (len(example["labels"]) if "labels" in example else example["generate"]["max_new_tokens"])

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        import torch

        def padded(name: str, filler: int) -> torch.Tensor:
            longest = max(len(example[name]) for example in examples)
            return torch.tensor([[*example[name], *[filler] * (longest - len(example[name]))] for example in examples])

        settings = [BeamGeneration.model_validate(example["generate"]) for example in examples]
        batch: dict[str, Any] = {"prompts": Prompts([example["input_ids"] for example in examples], settings, processor)}
        batch["input_ids"] = padded("input_ids", processor.pad_token_id)
        batch["attention_mask"] = torch.tensor(
            [[place < len(example["input_ids"]) for place in range(batch["input_ids"].shape[1])] for example in examples]
        ).long()
        if "labels" in examples[0]:
            batch["labels"] = padded("labels", IGNORED)
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it is no encoder-decoder or has fewer positions than the lengths."""
        from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(base, **from_hub)
        remote = "AutoModelForSeq2SeqLM" in (getattr(config, "auto_map", None) or {})
        if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and not remote:
            raise InputError(
                f"model.base: {base!r} is a {config.model_type!r} model, which is no encoder-decoder; "
                "choose one such as T5, BART, Marian, mBART, M2M100 or NLLB."
            )
        positions = getattr(config, "max_position_embeddings", None)
        for name in ("max_source_length", "max_target_length"):
            if positions and (getattr(self, name) or 0) > positions:
                raise InputError(f"task.{name} is {getattr(self, name)}, but the base model {base!r} has only {positions} positions.")
        return config

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForSeq2SeqLM`, told which language to write where its tokenizer knows several. Raises `InputError` as `check_base`."""
        from transformers import AutoModelForSeq2SeqLM

        from_hub = heads.from_hub(options)
        self.check_base(base, **from_hub)
        model = AutoModelForSeq2SeqLM.from_pretrained(base, **options)
        if self.target_lang is not None and (first := _first_token(base, self.target_lang, from_hub)) is not None:
            model.generation_config.forced_bos_token_id = first
        return model

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Sum of the cross-entropies of the targets' tokens, in fp32, and their number. Label smoothing: Szegedy et al. 2015, arXiv 1512.00567."""
        from torch.nn import functional

        labels = batch["labels"]
        inputs = {
            name: batch[name] for name in ("input_ids", "attention_mask", "labels")
        }  # By the labels the model makes the decoder's input.
        logits = model(**inputs, use_cache=False).logits.float()
        total = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
        )
        return total, float((labels != IGNORED).sum())

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """What is generated for each example, as `generation.generate` says it."""
        prompts: Any = batch["prompts"]
        return generation.generate(model, prompts)

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`text`, `finish_reason`, and of each token `ids`, `pieces`, `special` and `logprobs`."""
        return {**outputs[0], "text": outputs[0]["text"].strip()}

    @property
    def most_predicted(self) -> int | None:
        return self.most_generated

    def of_loss(self, loss: float) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, 700.0))}

    def metrics(self) -> tuple[str, ...]:
        first = DEFAULTS[self.problem]
        return (*first, "loss", "perplexity", *(name for name in text_scores.KNOWN if name not in first))

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        pairs = [(said["text"], row["target"]) for said, row in zip(predictions, rows, strict=True)]
        wanted = [name for name in (DEFAULTS[self.problem] if metrics is None else metrics) if name not in ("loss", "perplexity")]
        return text_scores.score([said for said, _ in pairs], [right for _, right in pairs], wanted, language=self.target_lang)

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`samples`: what was read, expected and written."""
        samples = [
            {"source": row["source"], "expected": row["target"], "generated": said["text"], "finish_reason": said["finish_reason"]}
            for said, row in zip(predictions, rows, strict=True)
        ]
        return {"samples": samples} if samples else {}

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        """Of the tokens' probabilities, up to where rounding may have parted the texts (`generation.difference`)."""
        return generation.difference(one, other, searched=self._searches)

    @property
    def _searches(self) -> bool:
        return not self.generate.do_sample and self.generate.num_beams != 1

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1}
        row = {
            "type": "object",
            "properties": {"source": text, "generate": {"type": "object"}},
            "required": ["source"],
            "additionalProperties": False,
        }
        return {"anyOf": [text, row, {"type": "array", "items": {"anyOf": [text, row]}, "minItems": 1}]}

    def inputs_example(self) -> Any:
        return "The file can not be saved." if self.problem == "translation" else "A long report. It says much. All of it in a few words."

    def probe(self) -> list[Row]:
        return [{**row, "generate": {"max_new_tokens": 1, "num_beams": 1}} for row in self.rows_from(self.inputs_example())]

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """Rows of a text, `{"source": …, "generate": …}`, or a list of these."""
        settings = self._settings(parameters)
        items = [(f"inputs[{place}]", item) for place, item in enumerate(inputs)] if isinstance(inputs, list) else [("inputs", inputs)]
        if not items:
            raise InputError("`inputs` is an empty list; give at least one text.")
        rows = []
        for where, item in items:
            row: Any = {"source": item} if isinstance(item, str) else item
            if not isinstance(row, dict) or row.keys() - {"source", "generate"} or not isinstance(row.get("source"), str):
                raise InputError(f'`{where}` must be a text or {{"source": …, "generate": …}}, and is {ascii(item)[:80]}.')
            if settings:
                row = {**row, "generate": {**(row.get("generate") or {}), **settings}}
            try:
                rows.append(self.clean(row))
            except RowError as error:
                raise InputError(f"`{where}`: expected {error.expected}, found {ascii(error.found)[:80]}.") from error
        return rows

    def _settings(self, parameters: Any) -> dict[str, Any]:
        """The settings in a request's parameters. `InputError` for a language that the model was not trained for."""
        if parameters is None:
            return {}
        if parameters.truncation == "do_not_truncate":
            raise InputError("parameters.truncation: this model cuts texts that are too long; do_not_truncate is not there.")
        for name, asked, own in (
            ("src_lang", parameters.src_lang, self.source_lang),
            ("tgt_lang", parameters.tgt_lang, self.target_lang),
        ):
            if asked is not None and (own is None or _language(asked) != _language(own)):
                what = f"{own!r}" if own else "one language only, which the job does not name (task.source_lang, task.target_lang)"
                raise InputError(f"parameters.{name} is {asked!r}, but the model was trained for {what}.")
        given = parameters.generate_parameters or {}
        if unknown := [name for name in given if name not in REQUESTED]:
            raise InputError(f"parameters.generate_parameters: there is no {unknown[0]!r}.{did_you_mean(unknown[0], REQUESTED)}")
        return {REQUESTED[name]: value for name, value in given.items()}

    def inputs_from(self, row: Row) -> Any:
        """The text; with the row's settings where it has some."""
        return {"source": row["source"], "generate": row["generate"]} if "generate" in row else row["source"]

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`[{"translation_text": …}, …]` or `[{"summary_text": …}, …]`: a list also for one, as Hugging Face clients need it."""
        entries = []
        for prediction in predictions:
            text = _without_spaces(prediction["text"]) if parameters.clean_up_tokenization_spaces else prediction["text"]
            details = {"details": generation.details(prediction)} if parameters.details else {}
            entries.append({ANSWERS[self.problem]: text, **details})
        return entries

    def answer_schema(self) -> dict[str, Any]:
        return generation_requests.answer_schema(ANSWERS[self.problem], {"type": "string"})

    def replay_parameters(self) -> Parameters:
        """With every token and its probability, so that a near tie is told from another answer."""
        return self.parameters.parse({"details": True})

    def answer_difference(self, one: Any, other: Any) -> float:
        """As `difference` where the answers have details; else 0 for the same texts and inf for others."""
        return generation_requests.answer_difference(one, other, searched=self._searches)


def _language(code: str) -> str:
    """The language of a code: en of en_XX and EN-us."""
    return re.split(r"[-_]", code.lower())[0]


def _language_id(processor: Any, code: str) -> int | None:
    """The token that says the language to a multilingual model; None: it knows no such code."""
    known = getattr(processor, "lang_code_to_id", None) or {}
    if code in known:
        return known[code]
    names = getattr(processor, "lang_code_to_token", None) or {}
    token = processor.convert_tokens_to_ids(names.get(code, code))
    return None if token is None or token == processor.unk_token_id else token


def _languages(processor: Any) -> list[str]:
    known = getattr(processor, "lang_code_to_token", None) or getattr(processor, "lang_code_to_id", None)
    return (
        sorted(known)
        if known
        else sorted(token for token in processor.all_special_tokens if re.fullmatch(r"[a-z]{2,3}_[A-Za-z]{2,4}", token))
    )


def _first_token(base: str, code: str, from_hub: Mapping[str, Any]) -> int | None:
    """The token that a text in this language begins with, where the base's tokenizer knows languages. A bundle's model has it already."""
    from transformers import AutoTokenizer

    folder = Path(base)
    if folder.is_dir() and not (folder / "tokenizer_config.json").is_file():
        return None
    tokenizer = AutoTokenizer.from_pretrained(base, **from_hub)
    return _language_id(tokenizer, code) if hasattr(tokenizer, "src_lang") else None


def _without_spaces(text: str) -> str:
    return re.sub(r" ([.,!?]|n't|'m|'s|'ve|'re)", r"\1", text)
