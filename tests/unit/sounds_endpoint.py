"""The product's own HTTP application around a predictor, on a port of this machine, without Ray."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.config import ServingSection
from serving import auth, web
from serving.batcher import Batcher
from serving.metrics import Metrics


@contextmanager
def served(engine: Any) -> Iterator[str]:
    """The URL at which `engine` answers."""
    import uvicorn

    section = ServingSection()
    batcher = Batcher(engine, max_batch_tokens=section.max_batch_tokens, max_queue=section.max_queue)
    model = web.ServedModel(
        name="sounds",
        version=1,
        digest="d" * 64,
        task=engine.task,
        section=section,
        keys=auth.Keys([]),
        batcher=batcher,
        metrics=Metrics(model="sounds", version="1", replica="r", queued_rows=lambda: batcher.queued_rows),
        info={"model": "sounds", "version": 1},
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
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)
    batcher.close()
