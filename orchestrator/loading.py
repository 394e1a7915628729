"""What transformers does when a task loads its model: which weights are new and which of the checkpoint are not used.

A task calls `from_pretrained` as it likes, with the class that it needs. What that method knows of the checkpoint is heard
here through its own `output_loading_info`, so that renamed, tied and converted weights are told apart as transformers does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SHOWN = 6


@dataclass(frozen=True)
class Weights:
    """What a model has that its checkpoint lacks, and the other way round."""

    new: tuple[str, ...] = ()
    """Parameters of the model that the checkpoint lacks or has in another shape."""
    unused: tuple[str, ...] = ()
    """Names in the checkpoint that the model has no place for, or one of another shape."""

    def sentence(self, base: str, seed: int) -> str | None:
        """For a person; None where the checkpoint and the model are one."""
        if not self.new and not self.unused:
            return None
        said = []
        if self.new:
            said.append(f"{_count(self.new, 'weight')} of the model {_are(self.new)} new and start from seed {seed}: {_some(self.new)}")
        if self.unused:
            said.append(f"{_count(self.unused, 'weight')} of {base} {_are(self.unused)} not used: {_some(self.unused)}")
        return "; ".join(said)


def condensed(names: Iterable[str]) -> list[str]:
    """Names that differ by numbers only as one, in order: `h.*.attn.bias (12)`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]


def _some(names: Iterable[str]) -> str:
    every = condensed(names)
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")


def _count(names: tuple[str, ...], what: str) -> str:
    return f"{len(names):,} {what}{'s' * (len(names) != 1)}"


def _are(names: tuple[str, ...]) -> str:
    return "is" if len(names) == 1 else "are"


class Heard:
    """What `from_pretrained` said inside of `listening`."""

    def __init__(self) -> None:
        self._said: list[tuple[Any, dict[str, Any]]] = []

    def add(self, model: Any, info: dict[str, Any]) -> None:
        self._said.append((model, info))

    def weights(self, model: torch.nn.Module) -> Weights:
        """Of the model that a task made of what it loaded; modules that it put beside are new. Nothing where nothing was loaded."""
        places = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
        said = [(places[id(loaded)], loaded, info) for loaded, info in self._said if id(loaded) in places]
        if not said:
            return Weights()
        loaded_ids = {id(weight) for _, loaded, _ in said for weight in loaded.parameters()}
        new, unused = set(), []
        for where, _, info in said:
            other_shape = [entry[0] for entry in info["mismatched_keys"]]
            new |= {f"{where}{name}" for name in (*info["missing_keys"], *other_shape)}
            unused += sorted({*info["unexpected_keys"], *other_shape})
        names = [name for name, weight in model.named_parameters() if name in new or id(weight) not in loaded_ids]
        return Weights(tuple(names), tuple(dict.fromkeys(unused)))


@contextmanager
def listening() -> Iterator[Heard]:
    """Inside, every model that is loaded is noted with what was missing, unexpected and of another shape in its checkpoint."""
    heard = Heard()

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
            model, info = original(cls, *args, output_loading_info=True, **options)
            heard.add(model, info)
            return (model, info) if output_loading_info else model

        return from_pretrained

    with _from_pretrained(make):
        yield heard


@contextmanager
def weightless() -> Iterator[None]:
    """Inside, models come with the modules that their config asks for and no weights, in no time and no memory."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(cls: Any, name: str, *args: Any, config: Any = None, output_loading_info: bool = False, **options: Any) -> Any:
            import torch

            hub = {key: options[key] for key in ("revision", "trust_remote_code", "token", "cache_dir") if key in options}
            with torch.device("meta"):
                model = cls(config if config is not None else cls.config_class.from_pretrained(name, **hub))
            info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
            return (model, info) if output_loading_info else model

        return from_pretrained

    with _from_pretrained(make):
        yield


@contextmanager
def _from_pretrained(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, `PreTrainedModel.from_pretrained` is what `make` makes of the function that it is."""
    from transformers import PreTrainedModel

    kept = PreTrainedModel.__dict__["from_pretrained"]
    PreTrainedModel.from_pretrained = classmethod(make(kept.__func__))  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = kept  # type: ignore[method-assign]
