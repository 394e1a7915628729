"""What one replica is: the bundle loaded and checked, the batcher, and the HTTP application, in one process."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from orchestrator.config import ServingSection
from orchestrator.errors import InputError, StageError
from orchestrator.schema import Schema

if TYPE_CHECKING:
    from orchestrator.predictor import Predictor
    from serving.web import ServedModel

logger = logging.getLogger("serving")

SWITCH_INTERVAL_S = 0.001
"""How long a thread keeps the interpreter when another wants it. Python's 5 ms is as long as a whole small batch: the event
loop and the inference thread would wait for each other."""
CAUSE = "cause: "
"""Stands before the sentence that says why a replica would not start, so that it is found in Ray's longer message."""


class Spec(Schema):
    """What a replica is told. It passes through Ray's records, so it has hashes of the API keys and never a key."""

    bundle: str
    name: str
    version: int | None
    section: ServingSection
    key_hashes: tuple[str, ...]


class Replica:
    """The deployment that Ray Serve runs; `serve.ingress()` gives it the HTTP application."""

    async def __init__(self, spec: dict[str, Any]):
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            self.model = await asyncio.to_thread(load, Spec.model_validate(spec), _replica_id())
        except (InputError, StageError, OSError, RuntimeError) as error:
            logger.exception("the replica does not start")
            raise RuntimeError(f"{CAUSE}{error}") from None

    def __serve_build_asgi_app__(self) -> Any:
        from serving import web

        return web.build(self.model, adds_request_id=False)

    async def check_health(self) -> None:
        await self.model.check()

    def __del__(self) -> None:
        if hasattr(self, "model"):
            self.model.batcher.close()


def load(spec: Spec, replica: str) -> ServedModel:
    """The served model, warm and checked against its bundle's golden rows; `InputError` or `StageError` where it isn't right."""
    started = time.perf_counter()
    from orchestrator import bundle as bundles
    from orchestrator.predictor import Predictor, check_golden
    from serving.auth import Keys
    from serving.batcher import Batch, Batcher
    from serving.metrics import Metrics
    from serving.web import ServedModel

    imported = time.perf_counter()
    bundle = bundles.load(spec.bundle)
    section = spec.section
    predictor = Predictor(bundle, threads=max(1, int(section.cpus_per_replica)), tokens_per_batch=section.max_batch_tokens)
    loaded = time.perf_counter()
    if bundle.golden:
        check_golden(predictor, section.tolerance)
    probe = predictor.task.probe()
    _warm_up(predictor, probe, section.max_batch_tokens)
    seconds = {
        "import": imported - started,
        "load": loaded - imported,
        "check and warm-up": time.perf_counter() - loaded,
    }
    logger.info("replica %s of %s is ready: %s", replica, spec.name, ", ".join(f"{part} {value:.2f} s" for part, value in seconds.items()))

    metrics: Metrics | None = None

    def on_batch(batch: Batch) -> None:
        if metrics is not None:
            metrics.batch(batch)

    batcher = Batcher(predictor, max_batch_tokens=section.max_batch_tokens, max_queue=section.max_queue, on_batch=on_batch)
    version = str(spec.version) if spec.version is not None else bundle.digest[:12]
    metrics = Metrics(model=spec.name, version=version, replica=replica, queued_rows=lambda: batcher.queued_rows)
    task = bundle.task.to_json()
    info = {
        "model": spec.name,
        "version": spec.version,
        "digest": bundle.digest,
        "task": task["name"],
        "labels": task.get("labels"),
        "settings": task,
        "precision": predictor.precision,
        "replica": replica,
        "ready_after_seconds": {part: round(value, 3) for part, value in seconds.items()},
        "limits": section.model_dump(mode="json", include={"max_inputs", "max_queue", "max_batch_tokens", "request_timeout_s"}),
    }
    served = ServedModel(
        name=spec.name,
        version=spec.version,
        digest=bundle.digest,
        task=bundle.task,
        section=section,
        keys=Keys(spec.key_hashes),
        batcher=batcher,
        metrics=metrics,
        info=info,
        lineage={"lineage": bundle.lineage, "metrics": bundle.metrics, "environment": bundle.environment, "job": bundle.job},
        probe_rows=probe,
        stuck_after_s=2 * section.request_timeout_s,
    )
    info["limits"]["max_body_bytes"] = served.max_body_bytes
    return served


def _warm_up(predictor: Predictor, probe: list[dict[str, Any]], tokens: int) -> None:
    """Runs short and long batches once, so that no client pays for first times."""
    (examples, *_) = predictor.encode(probe)
    if not examples:
        return
    for count in (1, max(1, min(8, tokens // predictor.task.length(examples[0])))):
        predictor.infer(examples[:1] * count)


def _replica_id() -> str:
    from ray import serve

    return serve.get_replica_context().replica_id.unique_id
