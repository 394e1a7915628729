"""What the trials of a sweep share within a process: libraries, the processor, encoded rows and the base model's weights.

Each is loaded by the first trial that needs it and kept, within bounds, for the ones after it. What a trial gets is as if
it had been loaded for it alone: rows come out unpickled each time, the model is a copy of one that nothing has touched.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from orchestrator.config import ModelSection, digest
from orchestrator.records import PreparedData
from orchestrator.tasks.base import Task

if TYPE_CHECKING:
    import torch

    from orchestrator.models import Precision

MODELS = 2
"""Base models kept in a process: the whole weights, and those under adapters, which may be of another precision."""
MODEL_BYTES = 2 << 30
"""A larger base model is read again by each trial."""
SPLITS = 4
PROCESSORS = 2

log = logging.getLogger(__name__)


class Kept:
    """The last few things that were asked for, by key."""

    def __init__(self, most: int):
        self._most = most
        self._things: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any], keep: Callable[[Any], bool] = lambda thing: True) -> Any:
        """What was kept under `key`, else what `make` returns, kept unless `keep` says no."""
        if key in self._things:
            self._things.move_to_end(key)
            return self._things[key]
        while len(self._things) >= self._most:  # before the new one is there: memory is for one less
            self._things.popitem(last=False)
        made = make()
        if keep(made):
            self._things[key] = made
        return made

    def __contains__(self, key: Hashable) -> bool:
        return key in self._things

    def clear(self) -> None:
        self._things.clear()


_processors, _models, _splits = Kept(PROCESSORS), Kept(MODELS), Kept(SPLITS)


def processor(task: Task, section: ModelSection) -> Any:
    """The processor of a job's base model."""
    from orchestrator import models, processors

    def load() -> Any:
        base = models.resolve(section.base, section.revision)
        return processors.of(task, base, trust_remote_code=section.trust_remote_code, revision=section.revision)

    return _processors.get(_processor_key(task, section), load)


def model(task: Task, section: ModelSection, *, precision: Precision, seed: int) -> torch.nn.Module:
    """What `models.load` gives, to the bit, without reading the base model again."""
    from orchestrator import models

    halved = section.lora is not None and precision == "bf16"
    key = (digest([task.to_json(), section.model_dump(mode="json", exclude={"lora", "freeze", "head_dropout"})]), halved, seed)
    base, found = _models.get(
        key,
        lambda: models.without_adapters(task, section, precision=precision, seed=seed),
        keep=lambda made: sum(tensor.nbytes for tensor in made[0].state_dict().values()) <= MODEL_BYTES,
    )
    return models.with_adapters(copy.deepcopy(base) if key in _models else base, section, found, seed=seed)


def split(prepared: PreparedData, name: str, section: ModelSection, *, with_rows: bool = False) -> Any:
    """A `Resident` split; None where it is too large to keep, which the log says, or each epoch encodes it anew."""
    from orchestrator.data.resident import Resident
    from orchestrator.data.stream import Encoding

    def read() -> Resident | None:
        found = Resident.read(Encoding.of(prepared, name, processor(prepared.task, section), rank=0, world=1), with_rows=with_rows)
        if isinstance(found, str):
            log.warning("The %s split has %s.", name, found)
            return None
        return found

    if prepared.task.augments and not with_rows:
        return None
    key = (prepared.root, prepared.fingerprint, digest(prepared.task.to_json()), name, _processor_key(prepared.task, section))
    return _splits.get(key, read)


def forget() -> None:
    """Frees all of it."""
    for kept in (_processors, _models, _splits):
        kept.clear()


def _processor_key(task: Task, section: ModelSection) -> Hashable:
    return section.base, section.revision, section.trust_remote_code, digest(task.to_json())
