"""kill -9 of the whole run in the middle of training; the same command continues as if nothing had happened, with twice the workers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

OPTIONS = ["--set", "training.record_rows=true", "--set", "training.save_steps=5", "--set", "training.num_train_epochs=6"]


def losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step, the last one said where a step was taken twice."""
    (history,) = run_dir.glob("train-*/history.jsonl")
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_killed_run_continues_with_the_losses_of_one_that_never_died(orchestrator, job_file: Path, tmp_path: Path) -> None:
    whole = orchestrator("train", job_file, "--json", "--storage", tmp_path / "whole", *OPTIONS)
    assert whole.status == 0, whole.err
    whole_dir = tmp_path / "whole" / whole.result["run"]

    command = [sys.executable, "-m", "orchestrator.cli", "train", str(job_file), "--json", "--storage", str(tmp_path / "killed"), *OPTIONS]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed").glob("*/train-*/checkpoints/step-*/manifest.json")):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()

    second = orchestrator("train", job_file, "--json", "--storage", tmp_path / "killed", "--set", "resources.num_workers=2", *OPTIONS)
    assert second.status == 0, second.err
    assert second.result["run"] == whole.result["run"]
    resumed_from = second.result["train"]["resumed_from"]
    assert resumed_from is not None
    assert f"step {resumed_from}" in second.err
    killed_dir = tmp_path / "killed" / second.result["run"]
    expected, found = losses(whole_dir), losses(killed_dir)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-4), f"step {step}"

    seen: Counter[tuple[int, str]] = Counter()
    steps: dict[tuple[int, int], set[str]] = {}
    for path in killed_dir.glob("train-*/rows/*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            steps.setdefault((line["epoch"], line["step"]), set()).update(line["row_ids"])
    for (epoch, _), rows in steps.items():
        seen.update((epoch, row) for row in rows)
    assert set(seen.values()) == {1}
    assert len({row for _, row in seen}) * 6 == len(seen)
