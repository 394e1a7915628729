"""What turns a sound into a model's numbers and, where the model writes, a transcript into its labels."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import InputError
from orchestrator.tasks import heads
from orchestrator.tasks.base import Example
from orchestrator.tasks.sound_augmentation import SoundAugment

if TYPE_CHECKING:
    import numpy as np
    import torch

Family = Literal["ctc", "whisper", "classifier"]
FACTS = "sounds.json"
SAMPLES_PER_TOKEN = 320
"""Samples that count as one token of a token budget: what wav2vec 2.0 makes one frame of, and Whisper one position."""
ALONE = 1 << 20
"""Tokens that an example is said to have where it must be in a micro-batch of its own: more than any budget."""


class SoundProcessor:
    """A feature extractor of transformers, and for transcripts a tokenizer; saved together, as transformers saves them.

    `window_s` is the length that a spectrogram of Whisper has; None: as long as the sound, or what the extractor does.
    `alone` says that the model can't tell padding from silence, so that sounds of several lengths don't share a batch.
    """

    def __init__(
        self,
        features: Any,
        tokenizer: Any = None,
        *,
        family: Family,
        alone: bool,
        multilingual: bool = False,
        window_s: float | None = None,
    ):
        self.features, self.tokenizer = features, tokenizer
        self.family, self.alone, self.multilingual, self.window_s = family, alone, multilingual, window_s
        if window_s is not None:
            features.chunk_length = int(window_s) if float(window_s).is_integer() else window_s
            features.n_samples = round(window_s * features.sampling_rate)
            features.nb_max_frames = features.n_samples // features.hop_length

    @property
    def rate(self) -> int:
        """Samples a second."""
        return int(self.features.sampling_rate)

    @property
    def input_name(self) -> str:
        return self.features.model_input_names[0]

    def to(self, *_: Any, **__: Any) -> SoundProcessor:
        """Itself: it goes with a batch's tensors, so that what the model writes can be read."""
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        self.features.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        facts = {"family": self.family, "alone": self.alone, "multilingual": self.multilingual, "window_s": self.window_s}
        (Path(folder) / FACTS).write_text(json.dumps(facts))

    def encode(self, samples: np.ndarray, augment: SoundAugment | None = None, rng: np.random.Generator | None = None) -> Example:
        """The input of the model for one sound (float32 samples at `rate`), and `length` in tokens of a budget."""
        import numpy as np

        given = self.features(samples, sampling_rate=self.rate, return_tensors="np")
        values = np.asarray(given[self.input_name][0], dtype=np.float32)
        if augment is not None and rng is not None and values.ndim == 2:
            # Whisper's is (bins, frames), those of all others (frames, bins).
            values = augment.of_spectrogram(values, rng, axis=1 if self.window_s is None else 0)
        length = -(-len(values) // SAMPLES_PER_TOKEN) if values.ndim == 1 else max(values.shape) // 2
        return {self.input_name: values, "length": ALONE if self.alone else length}

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The inputs as one tensor; where they may differ in length padded, with `attention_mask` (1: the sound, 0: padding)."""
        import numpy as np
        import torch

        values = [example[self.input_name] for example in examples]
        if values[0].ndim > 1 and not self.alone:
            return {self.input_name: torch.from_numpy(np.stack(values))}
        longest = max(len(one) for one in values)
        padded = np.zeros((len(values), longest, *values[0].shape[1:]), dtype=np.float32)
        mask = np.zeros((len(values), longest), dtype=np.int64)
        for place, one in enumerate(values):
            padded[place, : len(one)], mask[place, : len(one)] = one, 1
        return {self.input_name: torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask)}

    # ---- transcripts -----------------------------------------------------------------------------------------
    def pieces(self) -> list[str]:
        """CTC: what each output of the model writes; nothing for the blank and other special tokens, a space between words."""
        tokens = {place: token for token, place in self.tokenizer.get_vocab().items()}
        silent = set(self.tokenizer.all_special_tokens)
        between = getattr(self.tokenizer, "word_delimiter_token", None)
        texts = []
        for place in range(max(tokens) + 1):
            token = tokens.get(place, "")
            texts.append(" " if token == between else "" if token in silent else token.replace("▁", " "))
        return texts

    def cased(self, text: str) -> str:
        """CTC: in capitals where the vocabulary has no other letters."""
        letters = [token for token in self.tokenizer.get_vocab() if len(token) == 1 and token.isalpha()]
        return text.upper() if letters and all(letter == letter.upper() for letter in letters) else text

    def prompt(self, language: str | None, task: str) -> list[int]:
        """Whisper: the tokens that the decoder is given before it writes."""
        names = ["<|startoftranscript|>"]
        if self.multilingual:
            names += [f"<|{language}|>", f"<|{task}|>"]
        ids = self.tokenizer.convert_tokens_to_ids([*names, "<|notimestamps|>"])
        known = self.tokenizer.get_vocab()
        if unknown := [name for name in names if name not in known]:
            raise InputError(f"task.language: the base model's tokenizer has no token {unknown[0]!r}.")
        return list(ids)


def of_base(
    base: str, *, transcripts: bool, characters: Sequence[str] | None = None, window_s: float | None = None, **from_hub: Any
) -> SoundProcessor:
    """The processor of a base model (local folder or hub id), or of a bundle's `processor` folder.

    `characters` are a CTC model's vocabulary where the base has no tokenizer; `window_s` is the longest sound that is heard at once.
    """
    from transformers import AutoConfig, AutoFeatureExtractor

    trusted = heads.from_hub(from_hub)
    try:
        features = AutoFeatureExtractor.from_pretrained(base, **trusted)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model.base: the feature extractor of {base!r} can't be loaded: {' '.join(str(error).split())}") from error
    if (Path(base) / FACTS).is_file():
        facts = json.loads((Path(base) / FACTS).read_text())
        tokenizer = _tokenizer(base, trusted) if transcripts else None
        return SoundProcessor(features, tokenizer, **facts)
    config = AutoConfig.from_pretrained(base, **trusted)
    from orchestrator.tasks.sound_models import MASKED

    if config.model_type == "whisper":
        whole = config.max_source_positions / 50
        window_s = min(window_s or whole, whole)
        tokenizer = _tokenizer(base, trusted) if transcripts else None
        kind: Family = "whisper" if transcripts else "classifier"
        return SoundProcessor(
            features, tokenizer, family=kind, alone=False, multilingual=is_multilingual(base, config, trusted), window_s=window_s
        )
    fixed = config.model_type == "audio-spectrogram-transformer"
    alone = not fixed and config.model_type not in MASKED
    if not transcripts:
        return SoundProcessor(features, family="classifier", alone=alone)
    if characters is None and has_tokenizer(base, trusted):
        return SoundProcessor(features, _tokenizer(base, trusted), family="ctc", alone=alone)
    if characters is None:
        raise InputError("task.characters is not known yet: `fit` completes the task from the training rows.")
    return SoundProcessor(features, character_tokenizer(characters), family="ctc", alone=alone)


def has_tokenizer(base: str, from_hub: dict[str, Any]) -> bool:
    """Does the base model say what its outputs write?"""
    from transformers.utils.hub import cached_file

    options = {key: from_hub[key] for key in ("revision", "token", "cache_dir") if key in from_hub}
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(base, name, **options, **quiet) is not None for name in ("vocab.json", "tokenizer.json"))


def character_tokenizer(characters: Sequence[str]) -> Any:
    """A CTC tokenizer of these characters, `|` between words; the blank is token 0."""
    from transformers import Wav2Vec2CTCTokenizer

    tokens = ["[PAD]", "|", *(character for character in characters if not character.isspace() and character != "|"), "[UNK]"]
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({token: place for place, token in enumerate(tokens)}), encoding="utf-8")
        special: dict[str, Any] = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": None, "eos_token": None}
        return Wav2Vec2CTCTokenizer(str(file), word_delimiter_token="|", **special)


def is_bundled(base: str) -> bool:
    """Whether this is the model of a bundle: a folder whose processor lies elsewhere, and whose config needs nothing from it."""
    return Path(base).is_dir() and not any((Path(base) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


def _tokenizer(base: str, trusted: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if Path(base).is_dir() and not any((Path(base) / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise InputError(f"model.base: the folder {base!r} has no tokenizer: there is no tokenizer.json or vocab.json in it.")
    try:
        return AutoTokenizer.from_pretrained(base, **trusted)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model.base: the tokenizer of {base!r} can't be loaded: {' '.join(str(error).split())}") from error


def is_multilingual(base: str, config: Any, from_hub: dict[str, Any]) -> bool:
    """Whether a Whisper model is told the language; English-only ones know no tokens for it."""
    from transformers import GenerationConfig

    try:
        said = getattr(GenerationConfig.from_pretrained(base, **from_hub), "is_multilingual", None)
    except (OSError, ValueError):
        said = None
    return config.vocab_size >= 51865 if said is None else bool(said)
