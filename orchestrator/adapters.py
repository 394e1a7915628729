"""LoRA (Hu et al. 2021, arXiv 2106.09685) through PEFT, around the model of any task: wrapping, saving, attaching.

What is adapted is every linear layer of the backbone, of attention and between it; in a model that has none, as ResNet,
every convolution. The head and new weights are trained in full, as PEFT's `modules_to_save`, or one by one where they are
no module of their own.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orchestrator import anatomy
from orchestrator.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from orchestrator.config import LoraSection

ADAPTER = "adapter_model.safetensors"
LOOSE = "loose_weights.safetensors"
"""New weights that are trained in full and are no module of their own, by the names of the model without adapters."""


def wrap(model: torch.nn.Module, lora: LoraSection, new: Sequence[str]) -> torch.nn.Module:
    """`model` itself, changed in place, with adapters; only they, the head and the weights in `new` are trained, in fp32.

    Raises `InputError` where `target_modules` names what the model has not.
    """
    import peft

    heads, loose = anatomy.trained_in_full(model, new)
    chosen = targets(model, lora, heads)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=chosen,
        modules_to_save=heads or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
    )
    try:
        with _quiet():
            wrapped = peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"model.lora: {_sentence(error)}") from error
    _look_like_their_layers(wrapped)
    wanted = set(loose)
    for name, weight in wrapped.named_parameters():
        if wanted and anatomy.plain_name(name) in wanted:
            weight.requires_grad_(True)
        if weight.requires_grad and weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()
    return wrapped


def targets(model: torch.nn.Module, lora: LoraSection, heads: Sequence[str]) -> list[str]:
    """The modules that get adapters, by their names in `model`; those of the job as they stand there."""
    if lora.target_modules == "auto":
        return _automatic(model, heads)
    names = [name for name, _ in model.named_modules() if name]
    for target in lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            kinds = sorted({name.rpartition(".")[2] for name in _adaptable(model, ())})
            raise InputError(f"model.lora.target_modules: {type(model).__name__} has no module {target!r}.{did_you_mean(target, kinds)}")
    return list(lora.target_modules)


def save(model: Any, folder: Path, base: str) -> None:
    """Writes what was trained of a wrapped model, as PEFT does (`PeftModel.from_pretrained` reads it); `base` is what the job calls its base."""
    import peft
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    with _quiet():
        # "auto" would ask the hub for the base's vocabulary size; embeddings are only ever trained as new weights.
        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(_plain(tensors), folder / ADAPTER, metadata={"format": "pt"})
    loose = {anatomy.plain_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad and not _is_peft(name)}
    if loose:
        save_file(_plain(loose), folder / LOOSE, metadata={"format": "pt"})


def attach(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """`model`, the base with the task's head, with the adapter in `folder` around it; nothing of it is trained."""
    import peft
    from safetensors.torch import load_file

    with _quiet(), torch.random.fork_rng():
        wrapped = peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu")  # pyright: ignore[reportArgumentType]
    _look_like_their_layers(wrapped)
    if (folder / LOOSE).is_file():
        places = {anatomy.plain_name(name): weight for name, weight in wrapped.named_parameters()}
        with torch.no_grad():
            for name, tensor in load_file(folder / LOOSE).items():
                places[name].copy_(tensor)
    return wrapped.requires_grad_(False)


def _look_like_their_layers(model: torch.nn.Module) -> None:
    """Models that pad by hand, as MobileNetV2 does, ask a convolution for its sizes, which PEFT's wrapper does not pass on."""
    for module in model.modules():
        inner = module._modules.get("base_layer")
        for name in ("stride", "kernel_size", "dilation", "padding", "groups"):
            if hasattr(inner, name) and not hasattr(module, name):
                setattr(module, name, getattr(inner, name))


def _is_peft(name: str) -> bool:
    """Whether PEFT saves a weight by itself."""
    return ".lora_" in name or ".modules_to_save." in name


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _automatic(model: torch.nn.Module, heads: Sequence[str]) -> list[str]:
    found = _adaptable(model, heads)
    if not found:
        raise InputError(f"model.lora: {type(model).__name__} has no linear layer and no convolution that LoRA could adapt.")
    return found


def _adaptable(model: torch.nn.Module, heads: Sequence[str]) -> list[str]:
    """Linear layers outside of heads and output layers, else convolutions; by names."""
    from transformers.pytorch_utils import Conv1D

    owners = Counter(id(weight) for module in model.modules() for weight in module._parameters.values() if weight is not None)
    modules = dict(model.named_modules())
    # Attention of torch uses the weights of the layer inside it, not the layer.
    shut = [f"{name}." for name, module in modules.items() if isinstance(module, torch.nn.MultiheadAttention)]
    shut += [f"{head}." for head in heads]
    output = _output_layer(model)
    free = {
        name: module
        for name, module in modules.items()
        if not any(f"{name}.".startswith(prefix) for prefix in shut)
        and module is not output
        and (weight := module._parameters.get("weight")) is not None
        and owners[id(weight)] == 1
    }
    linear = [name for name, module in free.items() if isinstance(module, (torch.nn.Linear, Conv1D))]
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    # A grouped convolution can't be merged with its adapter.
    return linear or [name for name, module in free.items() if isinstance(module, convolutions) and module.groups == 1]


def _output_layer(model: torch.nn.Module) -> Any:
    _, inner = anatomy.pretrained(model)
    try:
        return inner.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError):
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by names that are to be replaced in version 6.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")  # It sets what is right of each layer itself.
        yield


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."
