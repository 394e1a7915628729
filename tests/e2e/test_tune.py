"""`orchestrator tune` as a user types it: killed in the middle and typed again, then with more trials, to a registered winner."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SEARCH = """
search:
  space:
    training.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}
    model.lora: {choice: [null, {r: 4}]}
  num_trials: 4
"""


def read(run_dir: Path, name: str) -> dict[int, dict[str, Any]]:
    """Number -> what the driver (record.json) or the trial itself (trial.json) has written."""
    found = []
    for path in run_dir.glob(f"search-*/trials/*/{name}"):
        found.append(json.loads(path.read_text()))
    return {one["number"]: one for one in found}


def test_a_killed_sweep_goes_on_and_ends_with_a_registered_winner(orchestrator, job_file: Path, tmp_path: Path) -> None:
    job_file.write_text(job_file.read_text() + SEARCH)
    options = [job_file, "--json", "--storage", tmp_path / "runs", "--set", "training.num_train_epochs=8"]
    dry = orchestrator("tune", *options, "--dry-run")
    assert dry.status == 0, dry.err
    run_dir = Path(dry.result["run_dir"])
    command = [sys.executable, "-m", "orchestrator.cli", "tune", *map(str, options)]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 150
        while True:
            records = read(run_dir, "record.json").values()
            ended = [one for one in records if one["status"] in ("done", "stopped")]
            if ended and any(one["status"] == "running" and one["reports"] for one in records):
                break
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    ended_then = {number for number, one in read(run_dir, "record.json").items() if one["status"] in ("done", "stopped")}

    second = orchestrator("tune", *options)
    assert second.status == 0, second.err
    found = second.result
    assert f"continues: {len(ended_then)} of 4 trials have ended" in second.err
    trials = {trial["number"]: trial for trial in found["search"]["trials"]}
    assert sorted(trials) == list(range(4))
    states = read(run_dir, "trial.json")
    assert {states[number]["attempts"] for number in ended_then} == {1}  # not run again
    best = trials[next(number for number, trial in trials.items() if trial["id"] == found["search"]["best"])]
    assert found["metrics"]["validation"]["accuracy"] == best["best"]["accuracy"]
    assert found["comparison"]["split"] == "test"
    assert found["comparison"]["low"] <= found["comparison"]["score"] <= found["comparison"]["high"]
    assert found["model"] == {"name": "reviews", "version": 1}
    for said in (f"winner      trial {best['number']} of 4", "setting     learning_rate ", "score       test accuracy"):
        assert said in second.err
    assert Path(found["search"]["report"]).read_text().startswith("<!doctype html>")

    # From Python it is the same sweep, and it is done.
    code = (
        "import orchestrator, sys; print(orchestrator.tune(sys.argv[1], storage=sys.argv[2], assignments=sys.argv[3:]).frame().to_json())"
    )
    assignments = ["training.num_train_epochs=8"]
    more = subprocess.run(
        [sys.executable, "-c", code, job_file, tmp_path / "runs", *assignments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert more.returncode == 0, more.stderr
    frame = json.loads(more.stdout.strip().splitlines()[-1])
    assert frame["accuracy"] == pytest.approx({str(number): trial["best"]["accuracy"] for number, trial in trials.items()})
    assert read(run_dir, "trial.json") == states


def test_a_job_without_a_search_section_is_refused(orchestrator, job_file: Path) -> None:
    refused = orchestrator("tune", job_file)
    assert refused.status == 2
    assert "there is no search section" in refused.err
