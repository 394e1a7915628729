"""Processors: what turns raw input into a model's numbers, by modality; from transformers, saved with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.tasks.base import Task


def of(task: Task, base: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The processor with which a task reads its rows, of a base model (local folder or hub id) or a bundle."""
    from_hub = ({"revision": revision} if revision else {}) | ({"trust_remote_code": True} if trust_remote_code else {})
    own = task.processor(base, **from_hub)
    return load(base, task.modality, trust_remote_code, revision) if own is None else own


def load(base: str, modality: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer (text), image processor (image) or feature extractor (audio) of a local folder or hub id.

    A tokenizer comes with a padding token: its own, else its end-of-text token. `InputError` where the model has no
    such processor.
    """
    import transformers

    classes = {"text": "AutoTokenizer", "image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
    try:
        auto = getattr(transformers, classes[modality])
    except KeyError:
        raise ValueError(f"no processor for the modality {modality!r}") from None
    options = {"revision": revision} if revision else {}
    if modality == "image":
        options["backend"] = "pil"  # The same numbers wherever it runs: torchvision, where there is one, resizes otherwise.
    try:
        processor = auto.from_pretrained(base, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = {"text": "tokenizer", "image": "image processor", "audio": "feature extractor"}[modality]
        raise InputError(f"model.base: the {what} of {base!r} can't be loaded: {_sentence(error)}") from error
    names = getattr(processor, "vocab_files_names", {}).values()
    if Path(base).is_dir() and names and not any((Path(base) / name).is_file() for name in names):
        # transformers 5 makes an empty tokenizer here, to which every word is unknown.
        raise InputError(f"model.base: the folder {base!r} has no tokenizer: there is no {' or '.join(sorted(names))} in it.")
    if modality == "text" and processor.pad_token is None:
        if processor.eos_token is None:
            raise InputError(f"model.base: the tokenizer of {base!r} has neither a padding token nor an end-of-text token to pad with.")
        processor.pad_token = processor.eos_token
    return processor


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."
