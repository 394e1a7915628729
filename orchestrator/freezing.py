"""What of a model is not trained, and what is trained at another rate: freezing, layer-wise learning rates, dropout of the head."""

from __future__ import annotations

import fnmatch
import types
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from orchestrator import anatomy
from orchestrator.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from orchestrator.config import FreezeSection, TrainingSection

_HEAD_DROPOUTS = (
    "classifier_dropout",
    "classifier_dropout_prob",
    "cls_dropout",
    "seq_classif_dropout",
    "qa_dropout",
    "pooler_dropout",
    "final_dropout",
    "summary_first_dropout",
)
"""What configs of transformers call the dropout of a head."""


def chosen(model: torch.nn.Module, section: FreezeSection, new: Sequence[str]) -> set[str]:
    """The names of the weights of `model`, which has no adapters yet, that a job's `model.freeze` means.

    Raises `InputError` for what the model has not, with the nearest names.
    """
    kind = type(model).__name__
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    if section.backbone:
        kept = {*anatomy.of(model).head, *new}
        frozen |= {name for name in names if name not in kept}
        if not kept:
            raise InputError(f"model.freeze: backbone leaves nothing to train: {kind} has no head beside its backbone.")
    if section.layers is not None:
        parts = anatomy.of(model)
        if not parts.layers:
            raise InputError(f"model.freeze: {kind} has no numbered layers to count; name weights, as in freeze: [embeddings].")
        if section.layers > parts.layers:
            raise InputError(f"model.freeze: {kind} has {parts.layers} layers, so the first {section.layers} can't be frozen.")
        frozen |= {name for name in names if name in parts.embeddings or parts.depth[name] <= section.layers}
        frozen -= {*parts.head, *new}
    for pattern in section.names:
        found = [name for name in names if _matches(name, pattern)]
        if not found:
            modules = [name for name, _ in model.named_modules() if name]
            near = [*dict.fromkeys(name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()), *modules]
            raise InputError(f"model.freeze: {kind} has no weights called {pattern!r}.{did_you_mean(pattern, near)}")
        frozen |= set(found)
    return frozen


def freeze(model: torch.nn.Module, names: Collection[str]) -> None:
    """Freezes weights by the names that they have without adapters; the adapter of a frozen layer is frozen with it."""
    for name, weight in model.named_parameters():
        if anatomy.plain_name(name) in names:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise InputError(f"model.freeze leaves nothing to train: all {len(names):,} weights of {type(model).__name__} are frozen.")


def rates(model: torch.nn.Module, settings: TrainingSection) -> dict[str, float]:
    """Weight -> its share of the learning rate, for those that have one of their own.

    A layer has `layerwise_lr_decay` of the rate of the layer after it (Howard & Ruder 2018, arXiv 1801.06146; as in BEiT, Bao et al.
    2021, arXiv 2106.08254): what comes after the last layer has the whole rate, embeddings the least. The head has
    `head_learning_rate`, else the whole.
    """
    decay, head = settings.layerwise_lr_decay, settings.head_learning_rate
    if decay is None and head is None:
        return {}
    parts = anatomy.of(model)
    if decay is not None and not parts.layers:
        raise InputError(f"training.layerwise_lr_decay: {type(model).__name__} has no numbered layers to tell apart; leave it out.")
    if head is not None and not parts.head:
        raise InputError(f"training.head_learning_rate: {type(model).__name__} has no head beside its backbone; leave it out.")
    found = {} if decay is None else {name: decay ** (parts.layers + 1 - depth) for name, depth in parts.depth.items()}
    return found | ({} if head is None else dict.fromkeys(parts.head, head / settings.learning_rate))


def set_head_dropout(model: torch.nn.Module, rate: float) -> None:
    """Sets the dropout of the head, in its layers and in the config that is saved with it; `InputError` where it has none."""
    modules: dict[str, Any] = dict(model.named_modules())
    outside = anatomy.in_head(model, [name for name, module in modules.items() if name and type(module) is torch.nn.Dropout])
    if not outside:
        raise InputError(f"model.head_dropout: the head of {type(model).__name__} has no dropout; leave it out.")
    for name in outside:
        modules[name].p = rate
    config = getattr(anatomy.pretrained(model)[1], "config", None)
    for name in _HEAD_DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, rate)


@contextmanager
def still(model: torch.nn.Module) -> Iterator[None]:
    """Inside, frozen batch normalisations stay in eval mode: their statistics belong to the frozen weights and stay as they are."""
    held: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        and not any(weight.requires_grad for weight in module.parameters())
        and not all(weight.requires_grad for weight in model.parameters())
    ]
    for module in held:
        module.eval()
        module.train = types.MethodType(_stay, module)
    try:
        yield
    finally:
        for module in held:
            del module.train


def _stay(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    return module


def _matches(name: str, pattern: str) -> bool:
    """A weight's name matches as a whole, by a module that it is in, and both also from some part of the name on."""
    return any(fnmatch.fnmatchcase(name, f"{start}{pattern}{end}") for start in ("", "*.") for end in ("", ".*"))
