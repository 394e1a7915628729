"""Batch normalisation whose result does not depend on how a global batch is cut into micro-batches and workers.

Batch normalisation (Ioffe & Szegedy 2015, arXiv 1502.03167) computes with the statistics of whatever is in the model at once. So:

frozen: a pretrained model keeps the statistics that it was pretrained with, in training too, as detectors have always done; scale and
shift are trained. The result is that of any cut.
trained: a model from scratch has no statistics to keep. It takes those of each micro-batch, and its result depends on their size
and, a little, on the number of workers. It can't be otherwise: the mean over a global batch is known only after all of it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

Setting = Literal["auto", "frozen", "trained"]


class FixedStatistics(torch.nn.Module):
    """A batch normalisation by its running statistics, with their names in the state dict. Scale and shift are trained.

    No subclass of torch's, so that what looks for statistics to exchange between workers finds none.
    """

    def __init__(self, norm: _BatchNorm):
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _by_statistics(self, input)


class LearntStatistics(torch.nn.BatchNorm2d):
    """torch's, but a micro-batch of one value a channel is normalised by the running statistics, where torch raises an error."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and input.numel() == input.shape[1]:
            return _by_statistics(self, input)
        return _right_gradient(super().forward(input))


def _by_statistics(norm: Any, input: torch.Tensor) -> torch.Tensor:
    return _right_gradient(functional.batch_norm(input, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps))


def _right_gradient(output: torch.Tensor) -> torch.Tensor:
    """torch 2.13 on a CPU: the gradient of a batch of one is wrong where what comes back lies in memory as a transposed tensor."""
    if output.requires_grad:
        output.register_hook(torch.Tensor.contiguous)
    return output


def settle(model: torch.nn.Module, setting: Setting) -> None:
    """Makes the batch normalisations of `model` frozen or trained, in place; auto: frozen where they have seen data."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and child.running_mean is not None:
                _settle(parent, name, child, setting)


def _settle(parent: torch.nn.Module, name: str, norm: Any, setting: Setting) -> None:
    seen = bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())
    if setting == "frozen" or (setting == "auto" and seen):
        setattr(parent, name, FixedStatistics(norm).train(norm.training))
    elif type(norm) is torch.nn.BatchNorm2d:
        norm.__class__ = LearntStatistics
