"""Whether a base model can have the head that a task needs, and what its config is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.errors import InputError


def config_with_head(base: str, auto: str, what: str, advice: str, max_length: int | None = None, **from_hub: Any) -> Any:
    """The config of a base model (local folder or hub id), if transformers has the class `auto` for it and it has `max_length` positions.

    `auto`: such as AutoModelForMaskedLM; `what`: the head in words; `advice`: models that have it. Reads no weights. Raises
    `InputError`.
    """
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base, **from_hub)
    remote = auto in (getattr(config, "auto_map", None) or {})
    if type(config) not in getattr(transformers, auto)._model_mapping and not remote:
        raise InputError(f"model.base: {base!r} is a {config.model_type!r} model, for which transformers has no {what}; choose {advice}.")
    positions = None if max_length is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and positions and max_length > positions:
        raise InputError(f"task.max_length is {max_length}, but the base model {base!r} has only {positions} positions.")
    return config


def name_labels(config: Any, names: Sequence[str]) -> None:
    """Tells the model's config its labels both ways, so that it answers with them in any program."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: place for place, name in enumerate(names)}


def from_hub(options: dict[str, Any]) -> dict[str, Any]:
    """Of the options for `from_pretrained` those that a config's loading knows too."""
    return {key: options[key] for key in ("revision", "trust_remote_code", "token", "cache_dir") if key in options}
