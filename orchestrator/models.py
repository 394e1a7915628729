"""Models: the base model from a hub id or a folder, LoRA adapters around it, and the precision that the hardware does fast."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks.base import Task

if TYPE_CHECKING:
    import torch

    from orchestrator.config import LoraSection, ModelSection

Precision = Literal["bf16", "fp16", "fp32"]
HEADS = ("classifier", "score", "qa_outputs", "classification_head")
"""What transformers calls the head of a model that has one and whose weights are all there."""

log = logging.getLogger(__name__)


def resolve(base: str, revision: str | None = None) -> str:
    """The local folder of a base model, or the hub id that `base` is. `InputError` where there is no model's `config.json`."""
    from orchestrator import catalog

    place = catalog.local_path(base) if base.startswith(("package://", "example://")) else base
    folder = Path(place).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"model.base: the folder {str(folder)!r} has no config.json, so it is not a model.")
        return str(folder)
    if folder.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1:
        raise InputError(f"model.base: there is no folder {place!r}.")
    from transformers.utils.hub import cached_file

    try:
        cached_file(place, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"model.base: {place!r} is neither a folder here nor a model that the hub gave: {_sentence(error)}") from error
    return place


def load(task: Task, section: ModelSection, *, precision: Precision, seed: int = 42) -> torch.nn.Module:
    """The module to train, with LoRA adapters where the job asks for them.

    Trained weights are fp32 whatever the precision (autocast casts what it computes with); the frozen base under
    adapters is bf16 where the precision is. Weights that the checkpoint lacks are drawn from `seed` and named in the log.
    """
    model, new = without_adapters(task, section, precision=precision, seed=seed)
    return with_adapters(model, section, new, seed=seed)


def without_adapters(task: Task, section: ModelSection, *, precision: Precision, seed: int = 42) -> tuple[torch.nn.Module, list[str]]:
    """The first half of `load`: the base model with the task's head, and the names of the weights that were drawn from `seed`."""
    import torch

    base = resolve(section.base, section.revision)
    options = {"use_safetensors": True, "dtype": torch.bfloat16 if section.lora and precision == "bf16" else torch.float32}
    options |= from_hub(section)
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    with explained(task, section.base), quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.model(base, **options)
    new = _new_weights(model, base, section.revision)
    if new:
        log.info(
            "%d weights of %s are not in %s and start from seed %d: %s", len(new), type(model).__name__, section.base, seed, ", ".join(new)
        )
    return model, new


def with_adapters(model: torch.nn.Module, section: ModelSection, new: list[str], *, seed: int = 42) -> torch.nn.Module:
    """The second half of `load`: `model` itself, changed in place, with adapters where the job asks for them."""
    import torch

    if section.lora is None:
        return model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _with_adapters(model, section.lora, new)


def from_hub(section: ModelSection) -> dict[str, Any]:
    """What every `from_pretrained` of a job's base model is told."""
    revision = {} if section.revision is None else {"revision": section.revision}
    return revision | ({"trust_remote_code": True} if section.trust_remote_code else {})


@contextmanager
def explained(task: Task, base: str) -> Iterator[None]:
    """Turns what transformers says of a base model that it can't load into an `InputError` that says what would be right."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(_explain(error, task, base)) from error


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """The plain module, adapters merged into the weights that they adapt."""
    merge = getattr(model, "merge_and_unload", None)
    return model if merge is None else merge()


def hardware_precision(setting: Literal["auto", "bf16", "fp16", "fp32"]) -> Precision:
    """What to compute in. auto: bf16 where a GPU or a CPU (AMX, AVX512-BF16) multiplies it fast, else fp32."""
    import torch

    on_gpu = torch.cuda.is_available()
    if setting == "fp16" and not on_gpu:
        raise InputError("training.precision: fp16 needs a GPU and there is none here; use auto, bf16 or fp32.")
    if setting == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"training.precision: {torch.cuda.get_device_name()} does not compute in bf16; use auto, fp16 or fp32.")
    if setting != "auto":
        return setting
    if on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capable = torch.cpu.get_capabilities()
    return "bf16" if capable.get("amx_bf16") or capable.get("avx512_bf16") else "fp32"


def _with_adapters(model: torch.nn.Module, lora: LoraSection, new: list[str]) -> torch.nn.Module:
    import peft
    import torch

    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})
    for target in [] if lora.target_modules == "auto" else lora.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules()):
            raise InputError(f"model.lora.target_modules: {type(model).__name__} has no module {target!r}.{did_you_mean(target, linear)}")
    heads = sorted({_top_module(model, name) for name in new} | {name for name, _ in model.named_children() if name in HEADS})
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules == "auto" else lora.target_modules,
        exclude_modules=[name for name, _ in model.named_modules() if any(name == head or name.startswith(f"{head}.") for head in heads)]
        or None,
        modules_to_save=heads or None,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by names that are to be replaced in version 6.
            return peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise InputError(f"model.lora: {_sentence(error)}") from error


def _top_module(model: torch.nn.Module, weight: str) -> str:
    """The largest module that holds `weight` and nothing of the base model: `pooler` of `bert.pooler.dense.weight`."""
    parts = weight.split(".")
    within = 1 if parts[0] == getattr(model, "base_model_prefix", "") and len(parts) > 2 else 0
    return ".".join(parts[: within + 1])


def _new_weights(model: torch.nn.Module, base: str, revision: str | None) -> list[str]:
    """Names of the parameters that the checkpoint lacks or has in another shape."""
    stored = _stored_shapes(base, revision)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def plain(name: str) -> str:
        return name.removeprefix(prefix).replace(".gamma", ".weight").replace(".beta", ".bias")

    shapes = {plain(name): shape for name, shape in stored.items()}
    return [name for name, parameter in model.named_parameters() if shapes.get(plain(name)) != tuple(parameter.shape)] if shapes else []


def _stored_shapes(base: str, revision: str | None) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    def file(name: str) -> str | None:
        return cached_file(
            base, name, revision=revision, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )

    index = file("model.safetensors.index.json")
    names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values())) if index else ["model.safetensors"]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in filter(None, map(file, names)):
        with safe_open(path, framework="pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return shapes


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load report of transformers on the terminal: what matters of it is logged here."""
    from transformers.utils import logging as chatter

    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()


def _explain(error: Exception, task: Task, base: str) -> str:
    text = " ".join(str(error).split())
    if "Unrecognized configuration class" in text:
        kind = text.partition("for this kind of AutoModel: ")[2].split(".")[0] or "its Auto class"
        config = text.partition("configuration class ")[2].split(" ")[1:2]
        name = config[0].strip("'>").rpartition(".")[2] if config else "this"
        return f"model.base: {base!r} has no head for the task {task.key or type(task).__name__!r}: {kind} knows no {name}."
    folder = Path(base)
    pickled = [path.name for path in folder.glob("*.bin")] if folder.is_dir() else []
    if pickled and not list(folder.glob("*.safetensors")):
        return (
            f"model.base: {base!r} has its weights only as a pickle ({', '.join(sorted(pickled))}), which can run code when it is read; "
            "only safetensors are loaded. Save it once with save_pretrained of transformers, where you trust it."
        )
    return f"model.base: {base!r} can't be loaded: {_sentence(error)}"


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.endswith(".") else f"{text}."
