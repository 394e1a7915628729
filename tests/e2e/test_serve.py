"""`orchestrator serve` as a user has it: a bundle folder, an answer over HTTP, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from orchestrator import bundle as bundles
from orchestrator.config import ServingSection
from orchestrator.predictor import Predictor
from orchestrator.storage import Folder
from orchestrator.tasks import create
from tests.e2e.conftest import free_port

TEXTS = ["the great camera", "broken slow phone"]


def write_bundle(folder: Path, base: Path) -> list[dict]:
    """A bundle with a head of random weights; returns what it predicts for `TEXTS`."""
    import torch
    from transformers import AutoTokenizer

    task = create({"name": "text-classification", "labels": ["negative", "positive"]})
    torch.manual_seed(0)
    job = {"name": "reviews", "serving": ServingSection().to_json()}
    bundles.write(
        Folder(str(folder)), model=task.model(str(base), dtype=torch.float32), processor=AutoTokenizer.from_pretrained(base), task=task,
        job=job, lineage={}, metrics={},
    )  # fmt: skip
    rows = [{"text": text, "row_id": f"r:{number}"} for number, text in enumerate(TEXTS)]
    predictions = Predictor(bundles.load(str(folder)), threads=1)(rows)
    golden = [{"row": {"text": row["text"]}, "prediction": prediction} for row, prediction in zip(rows, predictions, strict=True)]
    bundles.complete(Folder(str(folder)), metrics={}, golden=golden)
    return predictions


def test_a_model_is_served_until_it_is_interrupted(tmp_path: Path, tiny_model: Path) -> None:
    predictions = write_bundle(tmp_path / "bundle", tiny_model)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "orchestrator.cli", "serve", "bundle", "--port", str(port), "--storage", "runs", "--json"]
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=err, env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"})
    try:
        deadline = time.monotonic() + 180
        while not (_is_ready(url) and "until Ctrl-C" in (tmp_path / "err").read_text()):
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < deadline, f"not ready in 180 s:\n{(tmp_path / 'err').read_text()}"
            time.sleep(0.3)
        answer = httpx.post(url, json={"inputs": TEXTS}, timeout=30).json()
        assert [labels[0]["label"] for labels in answer] == [prediction["label"] for prediction in predictions]
    finally:
        process.send_signal(signal.SIGINT)
        status = process.wait(90)
    said = (tmp_path / "err").read_text()
    assert status == 0, said
    assert url in said
    result = json.loads((tmp_path / "out").read_text().splitlines()[-1])
    assert result["status"] == "done"
    assert result["endpoint"]["url"] == url
    assert not _is_ready(url)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
