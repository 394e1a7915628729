"""The parts of a model, told from the names of its weights: head, embeddings, and layers in the order of computation.

The names are those of transformers, of any architecture: `bert.encoder.layer.3.attention…`, `model.layers.3…`,
`encoder.block.3…`, `resnet.encoder.stages.3…`. A layer is a member of the outermost numbered list of modules; where a model
has several one after the other (encoder and decoder, backbone and encoder), their layers are counted through.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

HEADS = (
    "classifier",
    "score",
    "qa_outputs",
    "classification_head",
    "class_labels_classifier",
    "bbox_predictor",
    "projector",
    "cls_classifier",
    "distillation_classifier",
)
"""What transformers calls the heads of tasks: trained in full beside adapters, also where the checkpoint has one."""
_OUTPUTS = (*HEADS, "lm_head", "proj_out", "cls")
"""Names of heads where a model's class doesn't say what its backbone is called."""
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$|^shared$|(^|_)stem$|^feature_extractor$|^feature_projection$")
"""A part of a name by which weights belong to the way in: embeddings of tokens and patches, convolutions before the first layer."""
_ADAPTER = re.compile(r"\.lora_\w+\.default(\.weight)?$")


@dataclass(frozen=True)
class Anatomy:
    """Where each weight of a model stands. Names are as in `named_parameters`, those of adapters too."""

    head: frozenset[str]
    embeddings: frozenset[str]
    depth: dict[str, int]
    """0: before the first layer; 1 to `layers`: in that layer; `layers` + 1: after the last one, the head among them."""
    layers: int


def plain_name(name: str) -> str:
    """The name that a weight has, or belongs to, in the model without adapters: `….query.weight` of `….query.lora_A.default.weight`."""
    name = name.removeprefix("base_model.model.")
    for part in (".modules_to_save.default", ".original_module", ".base_layer"):
        name = name.replace(part, "")
    return _ADAPTER.sub(".weight", name)


def of(model: torch.nn.Module) -> Anatomy:
    """The anatomy of a model of transformers, of one inside other modules, or inside adapters."""
    names = [name for name, _ in model.named_parameters()]
    head = frozenset(in_head(model, names))
    rest = [name for name in names if name not in head]
    sizes = Counter(container for container, _ in {layer for name in rest for layer in _numbered(name)})
    place = {name: next((layer for layer in _numbered(name) if sizes[layer[0]] > 1), None) for name in rest}
    order = {layer: position for position, layer in enumerate(dict.fromkeys(layer for layer in place.values() if layer), start=1)}
    depth, embeddings, current = {name: len(order) + 1 for name in head}, set(), 0
    for name in rest:
        layer = place[name]
        if layer is not None:
            current = depth[name] = order[layer]
        elif current == 0 or any(_EMBEDDING.search(part) for part in name.split(".")[:-1]):
            embeddings.add(name)
            depth[name] = current if current < len(order) else 0
        else:
            depth[name] = current if current < len(order) else current + 1
    return Anatomy(head, frozenset(embeddings), depth, len(order))


def _numbered(name: str) -> list[tuple[str, str]]:
    """Every list of modules that a weight lies in, outermost first, and its place there; none behind a part that is an embedding."""
    parts = name.split(".")
    found = []
    for index, part in enumerate(parts[:-1]):
        if _EMBEDDING.search(part):
            break
        if part.isdigit():
            found.append((".".join(parts[:index]), part))
    return found


def pretrained(model: torch.nn.Module) -> tuple[str, Any]:
    """The outermost model of transformers in `model`, with its name there and a dot; `model` itself where there is none."""
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return f"{name}." if name else "", module
    return "", model


def in_head(model: torch.nn.Module, names: Iterable[str]) -> list[str]:
    """Those names of modules or weights that lie outside of the backbone."""
    where, inner = pretrained(model)
    backbone = getattr(inner, "base_model_prefix", "")
    if backbone and backbone in dict(inner.named_children()):
        prefix = f"{where}{backbone}"
        return [name for name in names if name != prefix and not name.startswith(f"{prefix}.")]
    if inner is model:
        return [name for name in names if name.split(".")[0] in _OUTPUTS]
    return [name for name in names if not name.startswith(where) or name.removeprefix(where).split(".")[0] in _OUTPUTS]


def trained_in_full(model: torch.nn.Module, new: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is trained whole beside adapters: modules (the task's head, and the largest that are all new), and new weights outside of these.

    Modules whose weights others have too, as an output layer tied to the embeddings, are none of them.
    """
    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values() if weight is not None)
    where, inner = pretrained(model)
    modules = dict(model.named_modules())
    heads = set()
    for name, module in inner.named_children():
        weights = list(module.parameters())
        if name in HEADS and weights and all(owners[id(weight)] == 1 for weight in weights):
            heads.add(f"{where}{name}")
    fresh, loose = set(new), []
    for name in new:
        if any(name.startswith(f"{head}.") for head in heads):
            continue
        parts = name.split(".")[:-1]
        larger = (".".join(parts[: count + 1]) for count in range(len(parts)))
        found = next((one for one in larger if not _is_list(modules[one]) and _all_in(modules[one], one, fresh)), None)
        if found is None:
            loose.append(name)
        else:
            heads.add(found)
    return sorted(heads), loose


def _all_in(module: torch.nn.Module, name: str, weights: set[str]) -> bool:
    return all(f"{name}.{inner}" in weights for inner, _ in module.named_parameters())


def _is_list(module: torch.nn.Module) -> bool:
    """What PEFT can't keep a copy of as a whole."""
    return isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.ParameterList, torch.nn.ParameterDict))
