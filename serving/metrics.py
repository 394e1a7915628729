"""What a replica counts, in Prometheus' text format. Each replica has its own numbers: scrape them all, or sum over scrapes."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from serving.batcher import Batch, Timings

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    def __init__(self, *, model: str, version: str, replica: str, queued_rows: Callable[[], int]):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        info = Gauge("orchestrator_model_info", "The model this replica serves.", ["model", "version", "replica"], registry=registry)
        info.labels(model, version, replica).set(1)
        self.requests = Counter("orchestrator_requests", "Requests, by route and HTTP status.", ["route", "code"], registry=registry)
        self.errors = Counter("orchestrator_errors", "Requests not answered with a prediction, by kind.", ["kind"], registry=registry)
        self.rows = Counter("orchestrator_rows", "Rows answered.", registry=registry)
        self.tokens = Counter("orchestrator_tokens", "Tokens of answered rows, without padding.", registry=registry)
        self.padded_tokens = Counter("orchestrator_padded_tokens", "Tokens that went through the model, with padding.", registry=registry)
        self.batch_rows = Histogram("orchestrator_batch_examples", "Examples in a batch.", buckets=_ROWS, registry=registry)
        self.batch_seconds = Histogram(
            "orchestrator_batch_seconds", "Seconds of a batch in the model.", buckets=_SECONDS, registry=registry
        )
        self.stages = Histogram(
            "orchestrator_request_seconds",
            "Seconds of a request by stage: queue, tokenise, inference, total.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("orchestrator_requests_in_flight", "Requests being answered.", registry=registry)
        Gauge("orchestrator_queue_rows", "Rows admitted and not answered yet.", registry=registry).set_function(queued_rows)

    def batch(self, batch: Batch) -> None:
        self.batch_rows.observe(batch.examples)
        self.batch_seconds.observe(batch.seconds)
        self.padded_tokens.inc(batch.padded_tokens)

    def answered(self, rows: int, tokens: int, timings: Timings) -> None:
        self.rows.inc(rows)
        self.tokens.inc(tokens)
        self.stages.labels("tokenise").observe(timings.tokenise)
        self.stages.labels("queue").observe(timings.queue)
        self.stages.labels("inference").observe(timings.inference)

    def text(self) -> bytes:
        return generate_latest(self._registry)
