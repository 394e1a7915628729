"""Batch prediction over any readable source: what `orchestrator predict MODEL INPUT OUTPUT` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator import batch_prediction, cluster, sinks
from orchestrator import bundle as bundles
from orchestrator.config import DataSection
from orchestrator.progress import Display
from orchestrator.registry import Registry
from orchestrator.schema import override
from orchestrator.storage import Folder


def main(
    model: str,
    source: str,
    output: str,
    *,
    storage: str,
    registry: str | None = None,
    assignments: list[str] | None = None,
    display: Display,
    verbose: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Every row of `source` with its prediction in `output` (.parquet, .csv or .jsonl), in order.

    Columns and reader options are those of the job that trained the model; `assignments` (`data.columns.text=body`) override them.
    """
    display.stage("predict")
    resolved = Registry(registry, Folder(storage)).resolve(model)
    bundle = bundles.load(resolved.bundle)
    trained = bundle.job["data"]
    options = {key: trained[key] for key in ("columns", "delimiter", "header", "names", "encoding")}
    data = DataSection.parse(
        override(
            {"data": {**options, "train": source}}, [text if text.startswith("data.") else f"data.{text}" for text in assignments or []]
        )["data"],
        "data",
    )
    sinks.check(output)
    batch_prediction.inputs_of(bundle.task, data)  # What is wrong with the input is said before Ray is started.
    log_dir = Path(Folder(storage).path) / "predict" / "logs" if Folder(storage).is_local else Path.cwd() / "predict-logs"
    with cluster.session(address, log_dir=log_dir, verbose=verbose):
        counted = batch_prediction.predict(resolved.bundle, data, output, display=display)
    return {"model": {"name": resolved.name, "version": resolved.version}, "output": str(output), **counted}
