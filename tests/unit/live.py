"""A model behind the product's HTTP application on a port of this machine, for clients that are what users have."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator import bundle
from orchestrator.predictor import Predictor
from orchestrator.storage import Folder


def predictor(task: Any, base: str, place: Path) -> Predictor:
    """A predictor of the untrained model that `task` makes of `base`, through a bundle in `place`."""
    import torch

    from orchestrator import processors

    torch.manual_seed(0)
    model = task.model(base, dtype=torch.float32)
    folder = Folder(str(place))
    bundle.write(folder, model=model, processor=processors.of(task, base), task=task, job={"name": "live"}, lineage={}, metrics={})
    return Predictor(bundle.load(folder.uri), precision="fp32")


@contextlib.contextmanager
def endpoint(engine: Any) -> Iterator[str]:
    """The URL at which `engine` (a predictor, or what else the batcher takes) answers."""
    import uvicorn

    from orchestrator.config import ServingSection
    from serving import auth, web
    from serving.batcher import Batcher
    from serving.metrics import Metrics

    section = ServingSection()
    batcher = Batcher(engine, max_batch_tokens=section.max_batch_tokens, max_queue=section.max_queue)
    model = web.ServedModel(
        name="live",
        version=1,
        digest="d" * 64,
        task=engine.task,
        section=section,
        keys=auth.Keys([]),
        batcher=batcher,
        metrics=Metrics(model="live", version="1", replica="r", queued_rows=lambda: batcher.queued_rows),
        info={"model": "live", "version": 1},
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
            time.sleep(0.02)
        try:
            with pytest.MonkeyPatch.context() as patch:
                nothing = {"standardEnvVars": [], "harnesses": {}}
                patch.setattr("huggingface_hub.utils._detect_agent._registry", nothing)  # Else a client fetches it.
                patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # It refuses this machine too.
                yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            batcher.close()


def client(url: str, monkeypatch: Any) -> Any:
    """An unmodified `huggingface_hub.InferenceClient` that asks the endpoint, and looks nothing up on the hub."""
    from huggingface_hub import InferenceClient
    from huggingface_hub.utils import _detect_agent

    monkeypatch.setattr(_detect_agent, "_registry", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return InferenceClient(model=url)
