"""Jobs on a real `ray start --head` with token authentication, through the command line's own functions."""

import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from orchestrator import submission, upload
from orchestrator.config import JobConfig, load
from orchestrator.doctor import checks
from orchestrator.errors import InputError
from orchestrator.progress import Silent
from tests.ray.conftest import review

TOKEN = "a-token-of-this-test-" + "x" * 20

STAND_IN = '''
"""Stands in for jobs.pipeline: says what it sees of the job and of the cluster, then does what the job's name says."""
import json, os, sys, time
from pathlib import Path
import orchestrator, jobs, serving
from orchestrator.catalog import local_path
from orchestrator.config import load

job = load(sys.argv[1])
print("SEEN", json.dumps({
    "run": job.run_id, "train": job.data.train, "storage": job.storage, "options": sys.argv[2:],
    "data": Path(local_path(job.data.train)).read_text(), "package": str(Path(orchestrator.__file__).parent), "cwd": os.getcwd(),
    "ray": bool(os.environ.get("RAY_ADDRESS")), "secret": "ORCHESTRATOR_API_KEYS" in os.environ,
}))
if job.name == "fails":
    marker = Path(job.storage) / "failed-once"
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        sys.exit("the first attempt fails")
if job.name == "stops":
    for second in range(120):
        print("line", second)
        time.sleep(0.5)
print("the end")
'''


@dataclass
class Head:
    dashboard: str
    gcs: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head --block`, a child of this process, with ports, files and a token of its own."""
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # short: socket paths have 107 bytes at most
    gcs, dashboard, client, agent = (free_port() for _ in range(4))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        "--num-cpus=2", f"--object-store-memory={100 * 2**20}", f"--temp-dir={folder / 'ray'}", "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{url}/nodes?view=summary", headers={"Authorization": f"Bearer {TOKEN}"})
                if answer.status_code == 200 and answer.json()["data"]["summary"]:
                    break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.3)
        yield Head(url, f"127.0.0.1:{gcs}")
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=20)
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith("RAY_AUTH")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("ORCHESTRATOR_API_KEYS", "a-secret-of-this-machine")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that is sent along in the place of jobs.pipeline."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    staged = upload.stage_packages

    def with_stand_in(job: JobConfig, folder: Path, sent: upload.Upload) -> None:
        staged(job, folder, sent)
        shutil.copyfile(tmp_path / "stand_in.py", folder / "stand_in.py")

    monkeypatch.setattr(upload, "stage_packages", with_stand_in)
    return "stand_in"


def job_file(tmp_path: Path, name: str) -> JobConfig:
    (tmp_path / "reviews.csv").write_text(f"text,label\n{name},good\n")
    (tmp_path / f"{name}.yaml").write_text("task: text-classification\nmodel: {base: example://minilm}\ndata: {train: reviews.csv}\n")
    return load(tmp_path / f"{name}.yaml", storage=str(tmp_path / "runs"))


def wait(identifier: str, address: str) -> str:
    deadline = time.monotonic() + 600
    while (state := submission.status(identifier, address)["status"]) not in submission.ENDED:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return state


def seen(lines: list[str]) -> dict:
    return json.loads(next(line for line in lines if line.startswith("SEEN ")).removeprefix("SEEN "))


class Listening(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def test_a_job_runs_once_with_what_it_needs(head, stand_in, tmp_path):
    job = job_file(tmp_path, "runs")
    display = Listening()
    first = submission.submit(job, head.dashboard, module=stand_in, promote=True, display=display)
    assert (first.id, first.run, first.new) == (job.run_id, job.run_id, True)
    assert re.search(r"Sending \d+ files, [\d.]+ [kM]B: the product, the job\.", display.said[0])
    lines = list(submission.logs(first.id, head.dashboard, follow=True))
    assert lines[-1] == "the end" and submission.status(first.id, head.dashboard)["status"] == "SUCCEEDED"
    found = seen(lines)
    assert found["run"] == job.run_id and found["options"] == ["--promote"] and found["ray"]
    assert (found["storage"], found["data"]) == (str(tmp_path / "runs"), "text,label\nruns,good\n")
    # The packages are those that were sent, not the installed ones.
    assert found["package"] == f"{found['cwd']}/orchestrator"
    again = submission.submit(job, head.dashboard, module=stand_in, promote=True)
    assert (again.id, again.new, again.status) == (first.id, False, "SUCCEEDED")
    details = httpx.get(f"{head.dashboard}/api/jobs/{first.id}", headers={"Authorization": f"Bearer {TOKEN}"}).text
    assert "a-secret-of-this-machine" not in details and TOKEN not in details
    asked_otherwise = submission.submit(job, head.dashboard, module=stand_in)
    assert (asked_otherwise.id, asked_otherwise.new) == (f"{job.run_id}-a2", True)
    listed = submission.jobs(head.dashboard)
    assert {first.id, asked_otherwise.id} <= {item["id"] for item in listed}
    assert next(item for item in listed if item["id"] == first.id)["run"] == job.run_id
    wait(asked_otherwise.id, head.dashboard)


def test_the_whole_job_runs_on_a_cluster_and_its_endpoint_stays(head, tiny_model, tmp_path):
    rng = random.Random(0)
    rows = [review(number, rng) for number in range(160)]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    (tmp_path / "whole.yaml").write_text(
        f"task: text-classification\nmodel: {{base: {tiny_model}}}\ndata: {{train: reviews.csv}}\n"
        "training: {max_steps: 6, learning_rate: 1.0e-2}\nresources: {num_workers: 1}\n"
        f"serving: {{port: {free_port()}, replay_rows: 4, cpus_per_replica: 0.5}}\n"
    )
    job = load(tmp_path / "whole.yaml", storage=str(tmp_path / "runs"))
    sent = submission.submit(job, head.dashboard)
    assert wait(sent.id, head.dashboard) == "SUCCEEDED", "".join(submission.logs(sent.id, head.dashboard))
    result = json.loads([line for line in submission.logs(sent.id, head.dashboard) if line.strip()][-1])
    assert (result["status"], result["run"], result["model"]) == ("done", job.run_id, {"name": "whole", "version": 1})
    assert result["endpoint"]["replayed"] == 4
    answer = httpx.post(result["endpoint"]["url"], json={"inputs": "great camera"}, timeout=30)
    assert {entry["label"] for entry in answer.json()[0]} == {"good", "bad"}


def test_a_failed_job_is_tried_again_under_the_same_run(head, stand_in, tmp_path):
    job = job_file(tmp_path, "fails")
    first = submission.submit(job, head.dashboard, module=stand_in)
    assert wait(first.id, head.dashboard) == "FAILED"
    second = submission.submit(job, head.dashboard, module=stand_in)
    assert (second.id, second.run, second.new) == (f"{first.id}-a2", first.run, True)
    assert wait(second.id, head.dashboard) == "SUCCEEDED"


def test_a_running_job_is_found_followed_and_stopped(head, stand_in, tmp_path):
    job = job_file(tmp_path, "stops")
    first = submission.submit(job, head.dashboard, module=stand_in)
    for line in submission.logs(first.id, head.dashboard, follow=True):
        if line == "line 3":
            break
    again = submission.submit(job, head.dashboard, module=stand_in, fresh=True)
    assert (again.id, again.new, again.status) == (first.id, False, "RUNNING")
    assert submission.stop(first.id, head.dashboard)["status"] == "STOPPED"
    assert submission.stop(first.id, head.dashboard)["status"] == "STOPPED"


def test_what_is_elsewhere_gets_the_files(head, stand_in, tmp_path, monkeypatch):
    """As if the dashboard were a tunnel to another machine: the data goes along, and this Python's path does not."""
    monkeypatch.setattr(submission.Cluster, "is_this_machine", False)
    job = job_file(tmp_path, "elsewhere")
    with pytest.raises(InputError, match=r"storage: 'runs' would be a temporary folder of the cluster"):
        submission.submit(job.model_copy(update={"storage": "runs"}), head.dashboard, module=stand_in)
    display = Listening()
    sent = submission.submit(job, head.dashboard, module=stand_in, display=display, python=sys.executable)
    assert "and data.train (reviews.csv, 1 kB)" in display.said[0]
    wait(sent.id, head.dashboard)
    found = seen(list(submission.logs(sent.id, head.dashboard)))
    assert found["data"] == "text,label\nelsewhere,good\n" and found["run"] == sent.run
    # The same in every process of every cluster, so that the run has the same name wherever Ray unpacks what was sent.
    assert re.fullmatch(r"package://job_files/data/[0-9a-f]{12}/reviews\.csv", found["train"])


def test_a_job_that_is_not_there_is_named_with_those_that_are(head, stand_in, tmp_path):
    submission.submit(job_file(tmp_path, "known"), head.dashboard, module=stand_in)
    with pytest.raises(InputError, match=r"There is no job 'knwon'.*The nearest are known-"):
        submission.status("knwon", head.dashboard)
    with pytest.raises(InputError, match="There is no job"):
        list(submission.logs("knwon", head.dashboard))


def test_a_wrong_token_or_address_is_a_sentence(head, stand_in, tmp_path, monkeypatch):
    job = job_file(tmp_path, "refused")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(InputError, match=r"refuses this user: the token given is not the cluster's\. Set RAY_AUTH_TOKEN"):
        submission.submit(job, head.dashboard, module=stand_in)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="wants a token and none is given"):
        submission.jobs(head.dashboard)
    with pytest.raises(InputError, match="no Ray dashboard answers"):
        submission.jobs(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InputError, match=r"not a Ray dashboard|no Ray dashboard answers"):
        submission.jobs(f"http://{head.gcs}")


def test_the_doctor_looks_at_the_cluster(head, monkeypatch):
    found = {check.name: check for check in checks(head.dashboard) if check.name.startswith("cluster")}
    assert found["cluster"].ok is True and "1 node" in found["cluster"].sentence
    assert found["cluster access"].ok is True and "token" in found["cluster access"].sentence
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    refused = next(check for check in checks(head.dashboard) if check.name == "cluster")
    assert refused.ok is False and "token given is not the cluster's" in refused.sentence
