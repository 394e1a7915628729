"""A task's model behind the real HTTP application on a port of this machine, and Hugging Face's own client in front of it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from orchestrator import predictor, processors
from orchestrator.config import ServingSection
from orchestrator.tasks.base import Task
from serving import auth, web
from serving.batcher import Batcher
from serving.metrics import Metrics


class Engine:
    """What a `Predictor` does, for a base model that no bundle was made of."""

    def __init__(self, task: Task, base: str):
        import torch

        self.task, self.processor = task, processors.of(task, base)
        self.model = task.model(base, dtype=torch.float32).eval()

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return self.task.encode(rows, self.processor)

    def infer(self, examples: Sequence[dict[str, Any]]) -> list[Any]:
        return predictor.forward(self.task, self.model, self.processor, examples, tokens=4096, precision="fp32")

    def decode(self, row: dict[str, Any], outputs: Sequence[Any]) -> dict[str, Any]:
        return self.task.decode(row, outputs)


def engine(task: Task, base: str) -> Engine:
    return Engine(task, base)


@contextmanager
def client(engine: Engine) -> Iterator[Any]:
    """A `huggingface_hub.InferenceClient` that asks the endpoint of `engine`."""
    import uvicorn
    from huggingface_hub import InferenceClient, constants
    from huggingface_hub.utils import _detect_agent

    section = ServingSection()
    batcher = Batcher(engine, max_batch_tokens=4096, max_queue=section.max_queue)
    model = web.ServedModel(
        name="model",
        version=1,
        digest="d" * 64,
        task=engine.task,
        section=section,
        keys=auth.Keys([]),
        batcher=batcher,
        metrics=Metrics(model="model", version="1", replica="r", queued_rows=lambda: batcher.queued_rows),
        info={"model": "model", "version": 1},
        lineage={},
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(web.build(model, adds_request_id=True), log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start within 30 s"
            time.sleep(0.01)
        patch = pytest.MonkeyPatch()
        patch.setattr(constants, "HF_HUB_OFFLINE", False)  # it would not ask this machine either
        patch.setattr(_detect_agent, "_registry", {})  # which it would look up at huggingface.co
        try:
            yield InferenceClient(model=f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            patch.undo()
            server.should_exit = True
            thread.join(30)
            batcher.close()
