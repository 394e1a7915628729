"""Models: the base model from a hub id or a folder, LoRA adapters around it, and the precision that the hardware does fast."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.errors import InputError
from orchestrator.loading import Weights, listening, weightless
from orchestrator.tasks.base import Task

if TYPE_CHECKING:
    import torch

    from orchestrator.config import ModelSection

Precision = Literal["bf16", "fp16", "fp32"]

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
    """The module to train, with LoRA adapters and frozen weights where the job asks for them.

    Trained weights are fp32 whatever the precision (autocast casts what it computes with); the frozen base under
    adapters is bf16 where the precision is. Weights that the checkpoint lacks are drawn from `seed` and named in the log.
    """
    model, found = without_adapters(task, section, precision=precision, seed=seed)
    return with_adapters(model, section, found, seed=seed)


def without_adapters(task: Task, section: ModelSection, *, precision: Precision, seed: int = 42) -> tuple[torch.nn.Module, Weights]:
    """The first half of `load`: the base model with the task's head, and which of its weights are not the checkpoint's."""
    import torch

    base = resolve(section.base, section.revision)
    options = {"use_safetensors": True, "dtype": torch.bfloat16 if section.lora and precision == "bf16" else torch.float32}
    options |= from_hub(section)
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    with explained(task, section.base), quiet(), torch.random.fork_rng():
        torch.manual_seed(seed)
        with listening() as heard:
            model = task.model(base, **options)
    found = heard.weights(model)
    if sentence := found.sentence(section.base, seed):
        log.info("%s", sentence)
    return model, found


def with_adapters(model: torch.nn.Module, section: ModelSection, found: Weights, *, seed: int = 42) -> torch.nn.Module:
    """The second half of `load`: `model` itself, changed in place, as the job wants it trained."""
    import torch

    from orchestrator import adapters, freezing

    if section.head_dropout is not None:
        freezing.set_head_dropout(model, section.head_dropout)
    frozen = freezing.chosen(model, section.freeze, found.new) if section.freeze is not None else ()
    if section.lora is not None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = adapters.wrap(model, section.lora, found.new)
    if frozen:
        freezing.freeze(model, frozen)
    return model


def check(task: Task, section: ModelSection) -> None:
    """Raises `InputError` where the base model has not what a job wants to adapt, freeze or drop out; reads no weights.

    `task` is completed. A model that can't be made without its weights, as where a task tries it out, is looked at when it is loaded.
    """
    from orchestrator import adapters, anatomy, freezing

    if section.lora is None and section.freeze is None and section.head_dropout is None:
        return
    try:
        with quiet(), weightless():
            model = task.model(resolve(section.base, section.revision), **from_hub(section))
    except (AttributeError, NotImplementedError, OSError, RuntimeError, TypeError) as error:  # what torch and transformers raise on `meta`
        log.debug("The model can't be looked at before it is loaded: %s", error)
        return
    if section.head_dropout is not None:
        freezing.set_head_dropout(model, section.head_dropout)
    if section.freeze is not None:
        freezing.chosen(model, section.freeze.model_copy(update={"backbone": False}), ())  # which weights are new is not known
    if section.lora is not None:
        adapters.targets(model, section.lora, anatomy.trained_in_full(model, ())[0])


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
