"""Embeddings of a knowledge graph as an ordinary transformers model: config.json and safetensors, from_pretrained and save_pretrained."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput


@strict
class GraphEmbeddingConfig(PreTrainedConfig):
    """How triples are scored, and how large the embeddings are."""

    model_type = "graph-embedding"

    scoring: Literal["complex", "distmult", "transe"] = "complex"
    """ComplEx (Trouillon et al. 2016, arXiv 1606.06357), DistMult (Yang et al. 2014, 1412.6575) or TransE (Bordes et al. 2013)."""
    hidden_size: int = 256
    """Numbers of an entity's and of a relation's embedding; ComplEx takes one half as real and the other as imaginary parts."""
    initializer_range: float = 0.1
    num_entities: int = 0
    num_relations: int = 0
    """Each is embedded twice: as it is asked from the head to the tail, and back (Lacroix et al. 2018)."""

    def validate_architecture(self) -> None:
        """transformers calls it for every config."""
        super().validate_architecture()
        if self.hidden_size < 1 or (self.scoring == "complex" and self.hidden_size % 2):
            raise ValueError(f"hidden_size is {self.hidden_size}; it must be above 0, and even for complex numbers")


@dataclass
class GraphEmbeddingOutput(ModelOutput):
    """What the model says of queries of the shape S."""

    logits: torch.Tensor | None = None
    """(*S, entities) float32: how well each entity answers."""
    penalty: torch.Tensor | None = None
    """(*S) float32: the nuclear 3-norm of source, relation and target (N3, Lacroix et al. 2018, arXiv 1806.07297); where a target is given."""


class GraphEmbedding(PreTrainedModel):
    """Scores every entity as the answer to (source, relation, ?); relation r asked backwards is r + num_relations."""

    config_class = GraphEmbeddingConfig
    base_model_prefix = ""
    main_input_name = "source"

    def __init__(self, config: GraphEmbeddingConfig):
        super().__init__(config)
        self.entities = torch.nn.Parameter(torch.empty(config.num_entities, config.hidden_size))
        self.relations = torch.nn.Parameter(torch.empty(2 * config.num_relations, config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, GraphEmbedding):
            for weight in (module.entities, module.relations):
                torch.nn.init.normal_(weight, std=self.config.initializer_range)

    def forward(self, source: torch.Tensor, relation: torch.Tensor, target: torch.Tensor | None = None, **_: Any) -> GraphEmbeddingOutput:
        """`source`, `relation` and `target` are places of the same shape; a negative one stands for nothing asked."""
        # In full precision whatever autocast says: the products are small, and ranks depend on the last digits.
        with torch.autocast(source.device.type, enabled=False):
            one = functional.embedding(source.clamp(min=0), self.entities.float())
            by = functional.embedding(relation.clamp(min=0), self.relations.float())
            everything = self.entities.float()
            if self.config.scoring == "transe":
                flat = (one + by).flatten(0, -2)
                logits = -torch.cdist(flat, everything).unflatten(0, source.shape)
            else:
                logits = (_times(one, by) if self.config.scoring == "complex" else one * by) @ everything.T
            penalty = None
            if target is not None:
                other = functional.embedding(target.clamp(min=0), everything)
                penalty = torch.stack([self._size(factor).pow(3).sum(-1) for factor in (one, by, other)]).sum(0)
        return GraphEmbeddingOutput(logits=logits, penalty=penalty)

    def _size(self, factor: torch.Tensor) -> torch.Tensor:
        """Absolute values of the embedding's numbers."""
        if self.config.scoring != "complex":
            return factor.abs()
        real, imaginary = factor.chunk(2, -1)
        return (real.square() + imaginary.square() + 1e-12).sqrt()


def _times(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The product of complex numbers, their real parts in the first half."""
    (a, b), (c, d) = one.chunk(2, -1), other.chunk(2, -1)
    return torch.cat([a * c - b * d, a * d + b * c], -1)
