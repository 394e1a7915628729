"""Fine-tune on Ray: one job file from raw data to a live endpoint."""

from orchestrator.api import tune

__all__ = ["tune"]
