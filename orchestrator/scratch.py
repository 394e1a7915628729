"""Models from scratch: `config://MODEL_TYPE` becomes an ordinary base model, with a processor fitted on the training rows.

For languages and modalities that have no pretrained model at hand. The folder that is made has what a downloaded model
has (config, weights drawn from the job's seed, tokenizer or processor), so nothing after it knows the difference. It
lies beside the prepared data it was fitted on, and is made once.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.catalog import cache_folder
from orchestrator.config import ModelSection, digest
from orchestrator.errors import InputError, did_you_mean
from orchestrator.models import quiet, resolve
from orchestrator.records import PreparedData
from orchestrator.schema import Schema
from orchestrator.storage import Folder
from orchestrator.tasks.base import Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SCHEME = "config://"
FIT_ROWS = 200_000
"""Training rows that a tokenizer is fitted on; more make no other vocabulary."""
_SPECIALS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


class TokenizerSettings(Schema):
    """`model.processor` of a text model from scratch."""

    kind: Literal["wordpiece", "bpe", "unigram", "words", "characters"] = "unigram"
    """unigram (Kudo 2018, as SentencePiece), bpe (of bytes, as GPT-2), wordpiece (as BERT), whole words, or characters."""
    vocab_size: int = 8000
    """Most tokens of the vocabulary, special ones included."""
    lowercase: bool = False
    """Write texts in lower case before they are cut."""
    max_length: int | None = None
    """Most tokens of a text; None: the positions that the model has, else 512."""


def based(section: ModelSection, prepared: PreparedData, *, seed: int) -> ModelSection:
    """The section with a base that is there: of a model from scratch, the folder that was made for these rows."""
    if not section.base.startswith(SCHEME):
        return section
    return section.model_copy(update={"base": str(_made(section, prepared, seed)), "config": {}, "processor": {}})


def check(section: ModelSection, task: Task) -> str:
    """A folder with nothing but the config of a model from scratch, for `Task.check_base`; `InputError` for keys that it hasn't."""
    config = _config(section)
    _settings(section, task)
    place = Path(tempfile.gettempdir()) / f"orchestrator-config-{digest(section.to_json())[:16]}"
    config.save_pretrained(place)
    return str(place)


def local(section: ModelSection, task: Task) -> str:
    """What `Task.check_base` can look at: the base model, or the config of one from scratch."""
    return check(section, task) if section.base.startswith(SCHEME) else resolve(section.base, section.revision)


def _made(section: ModelSection, prepared: PreparedData, seed: int) -> Path:
    key = digest([section.model_dump(mode="json", include={"base", "config", "processor"}), prepared.fingerprint, seed])[:16]
    stored = Folder(prepared.root) / "bases" / key
    here = Path(stored.path) if stored.is_local else cache_folder() / "bases" / key
    if (here / "config.json").is_file():
        return here
    here.parent.mkdir(parents=True, exist_ok=True)
    beside = here.with_name(f".{key}.{uuid.uuid4().hex[:8]}")
    if not stored.is_local and (stored / "config.json").exists():
        Folder(str(beside)).put(stored.to_local())
    else:
        _make(section, prepared, seed, beside)
        if not stored.is_local:
            stored.put(beside)
    try:
        beside.rename(here)
    except OSError:  # Another process made the same at the same time, and its folder is as good.
        Folder(str(beside)).delete()
    return here


def _make(section: ModelSection, prepared: PreparedData, seed: int, folder: Path) -> None:
    import torch
    from transformers import AutoModel

    config, task = _config(section), prepared.task
    with quiet(), torch.random.fork_rng():
        if task.modality == "text":
            tokenizer = _tokenizer(section, task, config, _texts(prepared))
            tokenizer.save_pretrained(folder)
        else:
            folder.mkdir(parents=True)
            _save_processor(section, task, config, folder)
        torch.manual_seed(seed)
        AutoModel.from_config(config).save_pretrained(folder)


# ---- config --------------------------------------------------------------------------------------------------
def _config(section: ModelSection) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = section.base.removeprefix(SCHEME)
    if kind not in CONFIG_MAPPING:
        raise InputError(f"model.base: transformers has no model type {kind!r}.{did_you_mean(kind, CONFIG_MAPPING.keys())}")
    known = AutoConfig.for_model(kind).to_dict()
    if unknown := [name for name in section.config if name not in known]:
        raise InputError(f"model.config: a {kind!r} model has no {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
    try:
        return AutoConfig.for_model(kind, **section.config)
    except (TypeError, ValueError) as error:
        raise InputError(f"model.config: {' '.join(str(error).split())}") from None


def _settings(section: ModelSection, task: Task) -> TokenizerSettings | None:
    return TokenizerSettings.parse(section.processor, "model.processor") if task.modality == "text" else None


# ---- texts ---------------------------------------------------------------------------------------------------
def _texts(prepared: PreparedData) -> Iterator[str]:
    """Every text of the training rows, whatever it stands in; labels are none."""
    import pyarrow.parquet as pq

    root, rows = Folder(prepared.root), 0
    wanted = [role for role, column in prepared.task.columns().items() if column.kind in ("text", "any")]
    for file in prepared.splits["train"].files:
        place = root / file.path
        with place.filesystem.open_input_file(place.path) as source:
            table = pq.ParquetFile(source)
            names = [name for name in table.schema_arrow.names if name in wanted]
            for batch in table.iter_batches(batch_size=512, columns=names):
                for row in batch.to_pylist():
                    yield from _inside(row)
                rows += batch.num_rows
                if rows >= FIT_ROWS:
                    return


def _inside(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for inner in value.values() for text in _inside(inner))
    elif isinstance(value, list):
        yield from (text for inner in value for text in _inside(inner))


def _tokenizer(section: ModelSection, task: Task, config: Any, texts: Iterable[str]) -> Any:
    """A tokenizer fitted on `texts`; writes its size and special tokens into `config`."""
    from tokenizers import processors as post
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedTokenizerFast

    settings = _settings(section, task)
    assert settings is not None
    fitted = _fitted(settings, texts)
    ids = {name: fitted.token_to_id(token) for name, token in _SPECIALS.items()}
    decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    names: dict[str, Any] = {name: _SPECIALS[name] for name in ("pad_token", "unk_token")}
    if config.is_encoder_decoder or decoder:
        # [SEP] ends a text; a decoder's text has no mark before it.
        names |= {"eos_token": "[SEP]", "bos_token": "[CLS]"}
        if config.is_encoder_decoder:
            fitted.post_processor = post.TemplateProcessing(
                single="$A [SEP]", pair="$A $B [SEP]", special_tokens=[("[SEP]", ids["sep_token"])]
            )
    else:
        names = dict(_SPECIALS)
        special = [("[CLS]", ids["cls_token"]), ("[SEP]", ids["sep_token"])]
        fitted.post_processor = post.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special)
    inputs = ["input_ids", *(["token_type_ids"] if getattr(config, "type_vocab_size", 0) > 1 else []), "attention_mask"]
    limit = settings.max_length or getattr(config, "max_position_embeddings", None) or 512
    found = {
        "vocab_size": fitted.get_vocab_size(),
        "pad_token_id": ids["pad_token"],
        "bos_token_id": ids["cls_token"],
        "eos_token_id": ids["sep_token"],
        "decoder_start_token_id": ids["pad_token"],
        "decoder_vocab_size": fitted.get_vocab_size(),
        "forced_eos_token_id": ids["sep_token"],
    }
    for name, value in found.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=fitted, model_max_length=limit, model_input_names=inputs, **names)


def _fitted(settings: TokenizerSettings, texts: Iterable[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special, unknown = list(_SPECIALS.values()), _SPECIALS["unk_token"]
    size = settings.vocab_size
    if settings.kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token=unknown, show_progress=False)
    elif settings.kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    elif settings.kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token=unknown))
        characters = settings.kind == "characters"
        tokenizer.pre_tokenizer = pre_tokenizers.Split(_any_character(), "isolated") if characters else pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.Fuse() if characters else None
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    steps = [normalizers.NFKC() if settings.kind in ("unigram", "wordpiece") else normalizers.NFC()]
    tokenizer.normalizer = normalizers.Sequence([*steps, *([normalizers.Lowercase()] if settings.lowercase else [])])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _any_character() -> Any:
    from tokenizers import Regex

    return Regex(r"[\s\S]")


# ---- images and sounds ---------------------------------------------------------------------------------------
def _save_processor(section: ModelSection, task: Task, config: Any, folder: Path) -> None:
    """The processor that transformers has for this model type, with the settings of `model.processor`."""
    import transformers

    config.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    auto = transformers.AutoImageProcessor if task.modality == "image" else transformers.AutoFeatureExtractor
    path.write_text("{}")
    try:
        known = auto.from_pretrained(folder).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.base: {section.base} has no {task.modality} processor: {' '.join(str(error).split())}") from None
    if unknown := [name for name in section.processor if name not in known]:
        raise InputError(
            f"model.processor: {type(config).__name__} reads with a processor that has no {unknown[0]!r}.{did_you_mean(unknown[0], known)}"
        )
    path.write_text(json.dumps(section.processor))
    auto.from_pretrained(folder).save_pretrained(folder)
