"""What models that hear have in common: an output that depends on one sound alone, and no randomness but the row's.

Imported only where torch is there already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

INPUTS = ("input_values", "input_features")
"""What models call a sound: samples or a spectrogram."""
MASKED = frozenset({"hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm"})
"""Model types whose output for a sound does not change with padding, where the padding is masked and `steady` was called."""


def settle(config: Any) -> Any:
    """Turns off what draws from the process's generator, so that it would change with micro-batches and workers: LayerDrop and SpecAugment."""
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    if hasattr(config, "apply_spec_augment") or hasattr(config, "mask_time_prob"):
        config.apply_spec_augment = False
    return config


def steady(model: torch.nn.Module) -> torch.nn.Module:
    """`model` itself, whose first normalisation now leaves padding out and whose unused mask embedding is not trained.

    wav2vec2-base, hubert-base and their like normalise over the whole length of the first layer's output, padding
    included (`feat_extract_norm: group`), so as published a sound's output changes with its neighbours in the batch.
    """
    encoder: Any = getattr(model, "base_model", model)
    if hasattr(encoder, "masked_spec_embed"):
        encoder.masked_spec_embed.requires_grad_(False)
    if getattr(model.config, "model_type", None) in MASKED:
        layer = encoder.feature_extractor.conv_layers[0]
        if isinstance(getattr(layer, "layer_norm", None), torch.nn.GroupNorm):
            layer.layer_norm = _MaskedGroupNorm.of(layer.layer_norm)
            encoder.register_forward_pre_hook(_tell_what_is_padding, with_kwargs=True)
    return model


def shorten(model: Any, seconds: float) -> Any:
    """A Whisper model that hears `seconds` at a time instead of 30, at a cost in proportion.

    Its encoder takes an input of one length, padded with silence. Its positions are sinusoids, so that the first of them are
    those of a shorter model.
    """
    positions = round(seconds * 50)
    encoder = model.get_encoder() if hasattr(model, "get_encoder") else model.encoder
    if positions < model.config.max_source_positions:
        encoder.embed_positions = _Positions(encoder.embed_positions.weight.detach()[:positions].clone())
        encoder.max_source_positions = model.config.max_source_positions = positions
    return model


def logits(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits in float32 for a collated batch, and how many frames of them are each sound's own (where they have frames).

    They are the same for a sound whatever else is in the batch. Where a model can't mask padding, each sound goes through it
    alone; outputs of different lengths are padded with zeros.
    """
    name = next(name for name in INPUTS if name in batch)
    mask = batch.get("attention_mask")
    if mask is None:
        found = model(**{name: batch[name]}).logits.float()
        return found, torch.full((len(found),), found.shape[1])
    lengths = mask.sum(dim=-1)
    if model.config.model_type in MASKED:
        found = model(**{name: batch[name], "attention_mask": mask}).logits.float()
        return found, getattr(model, "module", model)._get_feat_extract_output_lengths(lengths).long()
    rows = [model(**{name: one[None, :length]}).logits.float()[0] for one, length in zip(batch[name], lengths.tolist(), strict=True)]
    return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


class _MaskedGroupNorm(torch.nn.GroupNorm):
    """A group norm with a group for each channel, over the frames that are no padding."""

    mask: torch.Tensor | None = None
    """(rows, 1, frames)."""

    @classmethod
    def of(cls, norm: torch.nn.GroupNorm) -> _MaskedGroupNorm:
        made = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine)
        made.weight, made.bias = norm.weight, norm.bias
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return super().forward(input)
        values, mask = input.float(), self.mask
        count = mask.sum(dim=-1, keepdim=True)
        centred = (values - (values * mask).sum(dim=-1, keepdim=True) / count) * mask
        variance = centred.square().sum(dim=-1, keepdim=True) / count
        scaled = centred * torch.rsqrt(variance + self.eps)
        return (scaled * self.weight[:, None] + self.bias[:, None]).to(input.dtype)


def _tell_what_is_padding(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask: torch.Tensor | None = kwargs.get("attention_mask")
    layer = encoder.feature_extractor.conv_layers[0]
    layer.layer_norm.mask = None
    if mask is not None:
        kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        valid = (mask.sum(dim=-1) - kernel) // stride + 1
        places = torch.arange((mask.shape[-1] - kernel) // stride + 1, device=mask.device)
        layer.layer_norm.mask = (places < valid[:, None])[:, None]


class _Positions(torch.nn.Module):
    """An embedding that is no parameter: it is kept with the model and never trained."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    @property
    def num_embeddings(self) -> int:
        return len(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.embedding(input, self.weight)
