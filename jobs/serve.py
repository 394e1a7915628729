"""The endpoint of a model, until Ctrl-C: what `orchestrator serve MODEL` runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from orchestrator import bundle as bundles
from orchestrator import cluster
from orchestrator.config import ServingSection
from orchestrator.progress import Display
from orchestrator.registry import Registry
from orchestrator.schema import override
from orchestrator.storage import Folder


def main(
    model: str,
    *,
    storage: str,
    registry: str | None = None,
    host: str | None = None,
    port: int | None = None,
    assignments: list[str] | None = None,
    display: Display,
    verbose: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Serves `model` (`name`, `name@alias`, `name/3` or a bundle folder) as its job says, with `serving.*` overridden."""
    from serving import app

    display.stage("deploy")
    resolved = Registry(registry, Folder(storage)).resolve(model)
    bundle = bundles.load(resolved.bundle)
    section = override(
        {"serving": bundle.job["serving"]}, [text if text.startswith("serving.") else f"serving.{text}" for text in assignments or []]
    )
    section["serving"].update({key: value for key, value in {"host": host, "port": port}.items() if value is not None})
    serving = ServingSection.parse(section["serving"], "serving")
    if not (address or os.environ.get("RAY_ADDRESS")):  # a running cluster may serve at this address already
        app.require_free(serving)
    log_dir = Path(Folder(storage).path) / "serve" / "logs" if Folder(storage).is_local else Path.cwd() / "serve-logs"
    with cluster.session(address, log_dir=log_dir, verbose=verbose):
        endpoint = app.deploy(resolved.bundle, serving, name=resolved.name, version=resolved.version, display=display)
        app.hold(endpoint, display)
    return {"model": {"name": resolved.name, "version": resolved.version}, "endpoint": {"url": endpoint.url}}
