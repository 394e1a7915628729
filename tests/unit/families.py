"""Random models of many families, a few thousand weights each, and a batch for each: to try on all what must hold for any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from orchestrator.tasks.base import Task


@dataclass(frozen=True)
class Family:
    """A base as it is published, and the class that a task makes of it."""

    base: Callable[[], Any]
    """The model that is saved."""
    head: str
    """The Auto class that a task loads it with."""
    batch: Callable[[], dict[str, torch.Tensor]]
    settings: dict[str, Any]
    """Given to the config of the second, such as num_labels."""
    new: tuple[str, ...]
    """Beginnings of the names of weights that the base lacks."""
    layers: int
    trained: tuple[str, ...] = ()
    """Heads that are trained whole although the base may have them."""


def text(**more: Any) -> dict[str, torch.Tensor]:
    ids = torch.arange(2, 22).view(2, 10)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def picture() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}


def sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.sin(torch.arange(2 * 800) * 0.1).view(2, 800)}


def mel() -> dict[str, torch.Tensor]:
    return {
        "input_features": torch.sin(torch.arange(2 * 8 * 20) * 0.1).view(2, 8, 20),
        "decoder_input_ids": torch.arange(2, 10).view(2, 4),
    }


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
LLAMA = {**SMALL, "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4}
WAV = {**SMALL, **CONVOLUTIONS, "num_conv_pos_embedding_groups": 2, "vocab_size": 12, "classifier_proj_size": 8}
WHISPER = {
    "vocab_size": 32,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_source_positions": 10,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
VIT = {**SMALL, "image_size": 32, "patch_size": 16}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
DETR = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "num_queries": 3,
}


def _detr() -> Any:
    backbone = hf.ResNetConfig(**STAGES, layer_type="basic", out_features=["stage2"])
    return hf.DetrConfig(backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, **DETR)


THREE = {"num_labels": 3}
FAMILIES: dict[str, Family] = {
    "bert": Family(
        lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=32, **SMALL)),
        "AutoModelForSequenceClassification",
        text,
        THREE,
        ("classifier.", "bert.pooler."),
        3,
    ),
    "bert-filling": Family(lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=32, **SMALL)), "AutoModelForMaskedLM", text, {}, (), 3),
    "gpt2": Family(
        lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=32, pad_token_id=0)),
        "AutoModelForSequenceClassification",
        text,
        THREE,
        ("score.",),
        3,
    ),
    "gpt2-lm": Family(
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=32, pad_token_id=0)),
        "AutoModelForCausalLM",
        text,
        {},
        (),
        3,
    ),
    "llama": Family(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), "AutoModelForTokenClassification", text, THREE, ("score.",), 3),
    "t5": Family(
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        "AutoModelForSeq2SeqLM",
        lambda: text(decoder_input_ids=torch.arange(2, 10).view(2, 4)),
        {},
        (),
        4,
    ),
    "vit": Family(
        lambda: hf.ViTModel(hf.ViTConfig(**VIT), add_pooling_layer=False),
        "AutoModelForImageClassification",
        picture,
        THREE,
        ("classifier.",),
        3,
    ),
    "resnet": Family(
        lambda: hf.ResNetModel(hf.ResNetConfig(**STAGES, layer_type="bottleneck")),
        "AutoModelForImageClassification",
        picture,
        THREE,
        ("classifier.",),
        2,
    ),
    "convnext": Family(
        lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=32)),
        "AutoModelForImageClassification",
        picture,
        THREE,
        ("classifier.",),
        2,
    ),
    "mobilenet": Family(
        lambda: hf.MobileNetV2Model(hf.MobileNetV2Config(depth_multiplier=0.1, min_depth=8, image_size=32)),
        "AutoModelForImageClassification",
        picture,
        THREE,
        ("classifier.",),
        16,
    ),
    "wav2vec2-ctc": Family(
        lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAV)), "AutoModelForCTC", sound, {"pad_token_id": 0}, ("lm_head.",), 3
    ),
    "wav2vec2-classes": Family(
        lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAV)),
        "AutoModelForAudioClassification",
        sound,
        THREE,
        ("projector.", "classifier."),
        3,
    ),
    "whisper": Family(lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)), "AutoModelForSpeechSeq2Seq", mel, {}, (), 4),
    "detr": Family(
        lambda: hf.DetrForObjectDetection(_detr()),
        "AutoModelForObjectDetection",
        picture,
        THREE,
        ("class_labels_classifier.",),
        6,
        ("class_labels_classifier.", "bbox_predictor."),
    ),
}


def saved(family: Family, folder: Path) -> str:
    """The folder of its base."""
    torch.manual_seed(0)
    model = family.base()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):  # as if it had seen data
                buffer += torch.rand_like(buffer)
            elif name.endswith("running_mean"):
                buffer += torch.randn_like(buffer)
    model.save_pretrained(folder)
    return str(folder)


class Made(Task):
    """Loads a family's base with its Auto class, as a task would."""

    family: str

    @property
    def of(self) -> Family:
        return FAMILIES[self.family]

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        config = hf.AutoConfig.from_pretrained(base)
        for name, value in self.of.settings.items():
            setattr(config, name, value)
        return getattr(hf, self.of.head).from_pretrained(base, config=config, ignore_mismatched_sizes=True, **options)
