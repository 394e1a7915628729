"""The loss of DETR and its kin as a sum over images, so that it does not depend on what else is in a micro-batch or on the workers.

transformers divides a batch's box losses by its number of boxes, averages the class loss over its queries, and exchanges the number
of boxes between workers. Here the model's own loss is asked for one image at a time, matching and auxiliary layers included, and
the losses are added: an image counts the same with one object as with twenty, in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class PerImage:
    """Takes the place of `model.loss_function` and has its arguments; answers the sum of the losses of each image alone."""

    def __init__(self, own: Callable[..., Any]):
        self.own = own

    def __call__(
        self, logits: torch.Tensor, labels: Sequence[dict[str, torch.Tensor]], device: Any, pred_boxes: torch.Tensor, config: Any,
        *others: Any, **named: Any,
    ) -> tuple[torch.Tensor, None, None]:  # fmt: skip
        layers_first = _layers_first(logits, others)

        def one(value: Any, place: int) -> Any:
            if not isinstance(value, torch.Tensor) or value.dim() < 2:
                return value
            part = value[:, place : place + 1] if value.dim() == 4 and layers_first else value[place : place + 1]
            return part.float() if part.is_floating_point() else part

        total = logits.new_zeros((), dtype=torch.float32)
        with _alone(), torch.autocast(logits.device.type, enabled=False):
            for place, label in enumerate(labels):
                loss, *_ = self.own(
                    one(logits, place),
                    [label],
                    device,
                    one(pred_boxes, place),
                    config,
                    *(one(value, place) for value in others),
                    **{name: one(value, place) for name, value in named.items()},
                )
                total = total + loss
        return total, None, None


def _layers_first(logits: torch.Tensor, others: Sequence[Any]) -> bool:
    """Do the outputs of all layers come as (layers, images, …), as DETR gives them, or as (images, layers, …), as RT-DETR does?"""
    layers = next((value for value in others if isinstance(value, torch.Tensor) and value.dim() == 4), None)
    if layers is None or layers.shape[0] != len(logits):
        return True
    return layers.shape[1] == len(logits) and torch.equal(layers[-1], logits)


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, the loss finds no other workers: it would exchange numbers of boxes with them, image by image."""
    from accelerate import PartialState

    shared = PartialState._shared_state
    PartialState._shared_state = {}
    try:
        yield
    finally:
        PartialState._shared_state = shared
