"""Speech recognition: what is said in a sound, with times; by CTC models (wav2vec 2.0, HuBERT, …) and by Whisper."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks import heads, sounds, transcripts
from orchestrator.tasks.base import Column, Example, Observation, Parameters, Prediction, Row, Task
from orchestrator.tasks.sound_augmentation import SoundAugment
from orchestrator.tasks.sound_processor import SoundProcessor, has_tokenizer, is_bundled, is_multilingual, of_base

if TYPE_CHECKING:
    import numpy as np
    import torch

_DEFAULTS = ("wer", "cer")
_METRICS = (*_DEFAULTS, "substitutions", "deletions", "insertions")
_CHUNK_S = 30.0

log = logging.getLogger(__name__)


class TranscriptionParameters(Parameters):
    """`parameters` of a Hugging Face automatic-speech-recognition request."""

    return_timestamps: bool | Literal["word"] = False
    """true: `chunks` of the answer are stretches with [start, end] in seconds; word: they are the words."""


class SpeechRecognition(Task):
    """Transcribes speech: commands, calls, dictation, lectures, subtitles."""

    modality: ClassVar[Literal["text", "image", "audio"]] = "audio"
    parameters: ClassVar[type[Parameters]] = TranscriptionParameters
    rows_at_once: ClassVar[int] = 16
    lower_is_better: ClassVar[frozenset[str]] = frozenset(_METRICS)

    lowercase: bool | None = None
    """Whether the model learns transcripts in lower case; None: CTC does, Whisper learns them as they stand."""
    remove_punctuation: bool | None = None
    """Whether the model learns transcripts without punctuation and symbols; None: CTC does, Whisper doesn't."""
    vocabulary: Literal["auto", "data"] = "auto"
    """CTC: the characters that the model writes. auto: those of the base model where it has a tokenizer; else, and with data, those of the training rows."""
    characters: tuple[str, ...] | None = None
    """The vocabulary from the data; None: the characters of the training rows, sorted."""
    language: str | None = None
    """Whisper: the language that is spoken, such as en; multilingual models need it, English-only ones take none."""
    translate: bool = False
    """Whisper, multilingual: the transcripts are English translations of what is said."""
    max_length_s: Annotated[float, Field(gt=0)] = 3600.0
    """Longest sound, in seconds; a longer one is a bad row."""
    chunk_length_s: Annotated[float, Field(ge=0.5)] | None = None
    """Seconds that are heard at once; longer sounds are transcribed in overlapping chunks and not learnt from. None: 30, or what the base hears.
    Whisper pads all to this length: a shorter one costs less."""
    chunk_overlap_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds that a chunk shares with the one before; None: a sixth of a chunk."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 224
    """Whisper: tokens written for a chunk at most, in training and prediction."""
    num_beams: Annotated[int, Field(gt=0)] = 1
    """Whisper: beams of the search for the likeliest transcript; 1: greedy."""
    max_predicted_rows: Annotated[int, Field(gt=0)] | None = 1000
    """Rows of a split that are transcribed for its scores; None: all. The loss is of all rows."""
    augment: SoundAugment = SoundAugment()
    """What is done to training sounds at random: {speed: 0.1, gain_db: 6, noise_snr_db: [10, 40]}; nothing by default."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.chunk_overlap_s is not None and self.chunk_overlap_s > (self.chunk_length_s or _CHUNK_S) / 2:
            raise ValueError("chunk_overlap_s must be at most half of chunk_length_s")
        if self.characters is not None and (wrong := [one for one in self.characters if len(one) != 1]):
            raise ValueError(f"characters are single ones, not {wrong[0]!r}")
        return self

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        return {
            "audio": Column(kind="audio", help="the sound: a path relative to the file, bytes, or what `datasets` writes"),
            "text": Column(kind="text", target=True, help="what is said"),
        }

    def clean(self, row: Row) -> Row:
        clean: Row = {}
        if "text" in row:
            clean["text"] = transcripts.clean("text", row["text"])
        return {"audio": sounds.clean("audio", row.get("audio"), longest_s=self.max_length_s), **clean}

    def observe(self, rows: Sequence[Row]) -> Observation:
        texts = [self._written(row["text"], "ctc") for row in rows if "text" in row]
        return {"rows": len(rows), "transcripts": len(texts), "characters": dict(Counter(sign for text in texts for sign in text))}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        train = observed.get("train", {})
        if not train.get("rows"):
            raise InputError("The training split has no rows, so there is nothing to learn from.")
        if not train["transcripts"]:
            raise InputError(f"None of the {int(train['rows']):,} training rows has a transcript, so there is nothing to learn.")
        if self.characters is not None:
            return self
        return self.model_copy(update={"characters": tuple(sorted(sign for sign in train["characters"] if sign != " "))})

    def self_contained(self, row: Row) -> Row:
        return {**row, "audio": sounds.self_contained("audio", row["audio"])}

    def _written(self, text: str, family: str) -> str:
        ctc = family == "ctc"
        lowercase = ctc if self.lowercase is None else self.lowercase
        return transcripts.written(
            text, lowercase=lowercase, remove_punctuation=ctc if self.remove_punctuation is None else self.remove_punctuation
        )

    # ---- tensors ---------------------------------------------------------------------------------------------
    @property
    def augments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.augment)

    def encode(self, rows: Sequence[Row], processor: SoundProcessor) -> list[list[Example]]:
        """An example for each chunk of a row's sound; `labels` where the whole sound is one chunk."""
        return [self._encode(row, processor, None) for row in rows]

    def encode_to_train(self, rows: Sequence[Row], processor: SoundProcessor, seeds: Sequence[int]) -> list[list[Example]]:
        """As `encode`; of a sound that is not learnt from only the beginning goes through the model."""
        import numpy as np

        pairs = zip(rows, seeds, strict=True)
        return [self._encode(row, processor, np.random.default_rng(seed))[:1] for row, seed in pairs]

    def _encode(self, row: Row, processor: SoundProcessor, rng: np.random.Generator | None) -> list[Example]:
        rate = processor.rate
        heard = processor.window_s or self.chunk_length_s or _CHUNK_S
        samples = sounds.load("audio", row["audio"], rate)
        whole = len(samples) <= round(heard * rate)
        if rng is not None and self.augment:
            samples = self.augment.of_samples(samples, rate, rng, most=round(heard * rate) if whole else None)
        overlap = min(self.chunk_overlap_s or heard / 6, heard / 2)
        examples = []
        for start, piece in sounds.windows(samples, rate, heard, overlap):
            example = processor.encode(piece, self.augment, rng)
            example["span"] = (start, start + len(piece) / rate)
            if row.get("return_timestamps"):
                example["timestamps"] = True
            examples.append(example)
        if "text" in row:
            labels, cut = self._labels(row["text"], processor) if whole else ([], True)
            for example in examples:
                example["labels"], example["truncated"] = labels, cut
        return examples

    def _labels(self, text: str, processor: SoundProcessor) -> tuple[list[int], bool]:
        """CTC: the outputs that write it. Whisper: the decoder's prompt, -1, and what it is to write. And whether some of it is cut off."""
        written = self._written(text, processor.family)
        if processor.family == "ctc":
            return list(processor.tokenizer(processor.cased(written)).input_ids), False
        prompt = processor.prompt(self.language, self._speech_task)
        tokens = processor.tokenizer(f" {written}", add_special_tokens=False).input_ids
        most = self.max_new_tokens - 1
        return [*prompt, -1, *tokens[:most], processor.tokenizer.eos_token_id], len(tokens) > most

    @property
    def _speech_task(self) -> str:
        return "translate" if self.translate else "transcribe"

    def length(self, example: Example) -> int:
        return example["length"]

    def collate(self, examples: Sequence[Example], processor: SoundProcessor) -> dict[str, Any]:
        """Inputs, `spans` (start and end of each chunk), `timestamps`, and with targets `labels` (-100: none); and the `processor`, which reads what is written."""
        import torch

        batch: dict[str, Any] = {**processor.collate(examples), "processor": processor}
        batch["spans"] = torch.tensor([example["span"] for example in examples], dtype=torch.float64)
        batch["timestamps"] = torch.tensor([bool(example.get("timestamps")) for example in examples])
        if "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            longest = max(1, *map(len, labels))
            batch["labels"] = torch.tensor([[*one, *[-100] * (longest - len(one))] for one in labels])
        return batch

    # ---- model -----------------------------------------------------------------------------------------------
    def processor(self, base: str, **from_hub: Any) -> SoundProcessor:
        characters = self.characters or ()
        own = self.vocabulary == "data" or not has_tokenizer(base, from_hub)
        return of_base(base, transcripts=True, characters=characters if own else None, window_s=self.chunk_length_s, **from_hub)

    def check_base(self, base: str, **from_hub: Any) -> Any:
        """The config of the base model. Raises `InputError` where it writes no transcripts, or task.language does not fit it."""
        from transformers import MODEL_FOR_CTC_MAPPING, AutoConfig

        config = AutoConfig.from_pretrained(base, **from_hub)
        if config.model_type != "whisper":
            if type(config) not in MODEL_FOR_CTC_MAPPING and "AutoModelForCTC" not in (getattr(config, "auto_map", None) or {}):
                raise InputError(
                    f"model.base: {base!r} is a {config.model_type!r} model, which writes no transcripts here; choose Whisper, "
                    "or an encoder with CTC such as wav2vec2, hubert or wavlm."
                )
            return config
        if self.chunk_length_s is not None and self.chunk_length_s > config.max_source_positions / 50:
            raise InputError(
                f"task.chunk_length_s is {self.chunk_length_s:g}, but {base!r} hears at most {config.max_source_positions / 50:g} s at once."
            )
        if self.max_new_tokens > config.max_target_positions - 4:
            raise InputError(
                f"task.max_new_tokens is {self.max_new_tokens}, but {base!r} writes at most {config.max_target_positions - 4} tokens."
            )
        if is_multilingual(base, config, from_hub):
            from transformers.models.whisper.tokenization_whisper import LANGUAGES

            if self.language not in LANGUAGES:
                raise InputError(
                    f"task.language: {base!r} is multilingual and must be told the language that is spoken, such as en; "
                    f"found {self.language!r}.{did_you_mean(self.language, LANGUAGES) if self.language else ''}"
                )
        elif self.translate or self.language not in (None, "en"):
            raise InputError(f"task.language: {base!r} knows English only; leave language out and translate off.")
        return config

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """`AutoModelForCTC` with an output for each token of the vocabulary, or Whisper with this task's window and language."""
        from transformers import AutoModelForCTC, AutoModelForSpeechSeq2Seq

        from orchestrator.tasks import sound_models, speech_losses

        from_hub = heads.from_hub(options)
        config = sound_models.settle(self.check_base(base, **from_hub))
        processor = None if is_bundled(base) else self.processor(base, **from_hub)
        if config.model_type == "whisper":
            model = AutoModelForSpeechSeq2Seq.from_pretrained(base, config=config, **options)
            if processor is not None:
                told = {"language": self.language, "task": self._speech_task} if processor.multilingual else {}
                speech_losses.complete_generation(model, processor, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams, **told)
            return sound_models.shorten(model, self.chunk_length_s or _CHUNK_S)
        if processor is not None:
            config.vocab_size, config.pad_token_id = len(processor.pieces()), processor.tokenizer.pad_token_id
            known = processor.tokenizer.get_vocab()
            if lacking := [sign for sign in self.characters or () if processor.cased(sign) not in known]:
                log.warning(
                    "The vocabulary of %s lacks characters of the training rows, so the model can't write them: %s. "
                    "With task.vocabulary: data it learns a vocabulary of its own.",
                    base,
                    " ".join(lacking),
                )
        return sound_models.steady(AutoModelForCTC.from_pretrained(base, config=config, ignore_mismatched_sizes=True, **options))

    def loss(self, model: torch.nn.Module, batch: dict[str, Any], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Sum of the losses in fp32 and the number of tokens that were to be written (Whisper: the end among them).

        CTC (Graves et al. 2006): of each sound the negative log-probability of its transcript; a transcript that is longer than
        the model has frames counts nothing. Sounds of several chunks have no labels.
        """
        from orchestrator.tasks import speech_losses

        if batch["processor"].family == "ctc":
            return speech_losses.ctc(model, batch, label_smoothing)
        return speech_losses.seq2seq(model, batch, label_smoothing)

    def infer(self, model: torch.nn.Module, batch: dict[str, Any]) -> list[Any]:
        """For each example the characters that it says with their times, as `transcripts` describes them."""
        from orchestrator.tasks import speech_losses

        processor = batch["processor"]
        if processor.family == "ctc":
            return speech_losses.read_frames(model, batch, processor)
        return speech_losses.generate(model, batch, processor)

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """`text`, and `words` and `segments` as {text, timestamp: [start, end]} in seconds; the words of chunks that overlap stand once."""
        return transcripts.prediction(transcripts.merged(outputs))

    @property
    def most_predicted(self) -> int | None:
        return self.max_predicted_rows

    def metrics(self) -> tuple[str, ...]:
        return _METRICS

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Error rates over all rows together, of texts in lower case without punctuation."""
        from orchestrator import metrics as modules

        wanted = _DEFAULTS if metrics is None else metrics
        if unknown := [name for name in wanted if name not in _METRICS]:
            raise InputError(f"evaluation.metrics: {unknown[0]!r} is no metric of this task.{did_you_mean(unknown[0], _METRICS)}")
        pairs = [
            (transcripts.normalised(prediction["text"]), transcripts.normalised(row["text"]))
            for prediction, row in zip(predictions, rows, strict=True)
            if "text" in row
        ]
        if not pairs:
            return {}
        said, right = zip(*pairs, strict=True)
        values = modules.compute("transcription", predictions=said, references=right)
        return {name: values[name] for name in wanted}

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """`transcripts` with the error rate of each row, and the `unseen_characters` that no training row has."""
        lines, unseen = [], Counter()
        known = {*(self.characters or ()), " "}
        for prediction, row in zip(predictions, rows, strict=True):
            if "text" not in row:
                continue
            rates = self.score([prediction], [row])
            lines.append({"text": row["text"], "predicted": prediction["text"], **rates})
            unseen.update(sign for sign in self._written(row["text"], "ctc") if sign not in known)
        tables = {"transcripts": lines} if lines else {}
        if unseen and self.characters is not None:
            tables["unseen_characters"] = [{"character": sign, "times": count} for sign, count in unseen.most_common()]
        return tables

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        return self.difference(one, other) <= tolerance

    def difference(self, one: Prediction, other: Prediction) -> float:
        """The share of the texts that is not in both; times follow from the text."""
        return _apart(one["text"], other["text"])

    # ---- HTTP ------------------------------------------------------------------------------------------------
    def inputs_schema(self) -> dict[str, Any]:
        return sounds.inputs_schema()

    def inputs_example(self) -> Any:
        return sounds.example()

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """The row of a sound (bytes, or base64), or those of a list of sounds."""
        rows: list[Row] = [{"audio": sound} for sound in sounds.several_from_client("audio", inputs, longest_s=self.max_length_s)]
        if getattr(parameters, "return_timestamps", False):
            rows = [{**row, "return_timestamps": True} for row in rows]
        return rows

    def inputs_from(self, row: Row) -> Any:
        return sounds.to_base64("audio", row["audio"])

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """`{"text": …}`, with `chunks` where the client asked for timestamps; a list of these for a list."""
        answers = []
        for prediction in predictions:
            answer: dict[str, Any] = {"text": prediction["text"]}
            if parameters.return_timestamps:
                answer["chunks"] = prediction["words" if parameters.return_timestamps == "word" else "segments"]
            answers.append(answer)
        return answers[0] if single else answers

    def answer_schema(self) -> dict[str, Any]:
        time = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
        chunk = {"type": "object", "properties": {"text": {"type": "string"}, "timestamp": time}, "required": ["text", "timestamp"]}
        one = {
            "type": "object",
            "properties": {"text": {"type": "string"}, "chunks": {"type": "array", "items": chunk}},
            "required": ["text"],
            "additionalProperties": False,
        }
        return {"anyOf": [one, {"type": "array", "items": one}]}

    def answer_difference(self, one: Any, other: Any) -> float:
        pairs = zip(*([answer] if isinstance(answer, dict) else answer for answer in (one, other)), strict=True)
        return max((_apart(left["text"], right["text"]) for left, right in pairs), default=0.0)


def _apart(one: str, other: str) -> float:
    return 0.0 if one == other else 1 - difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()
