"""Sessions on real Ray: the embedded cluster's whole life, however it ends, and joining one that is there."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from orchestrator import cluster
from orchestrator.errors import InputError

DRIVER = """
import json, os, sys
from pathlib import Path
from orchestrator import cluster
with cluster.session(log_dir=Path(sys.argv[1]), num_cpus=1) as session:
    Path(sys.argv[2]).write_text(json.dumps({"address": session.address, "token": os.environ["RAY_AUTH_TOKEN"]}))
    import time
    time.sleep(120)
"""


@contextlib.contextmanager
def driver(tmp_path: Path, log_dir: Path):
    """Another process with an embedded cluster: (process, what it told)."""
    told = tmp_path / "told.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with (tmp_path / "driver.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", DRIVER, str(log_dir), str(told)], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 90
        while not told.exists() or not told.read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "driver.log").read_text()
            time.sleep(0.1)
        yield process, json.loads(told.read_text())
    finally:
        process.kill()
        process.wait(30)


def servers(place: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] in ("raylet", "gcs_server") and any(str(place) in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def folder_of(pid: int) -> Path:
    owners = {place: json.loads((place / "owner.json").read_text())["pid"] for place in cluster._root().iterdir()}
    return next(place for place, owner in owners.items() if owner == pid)


def until(condition, seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_an_embedded_cluster_works_and_leaves_only_its_logs(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # ~/.ray/auth_token must not be written
    ours = ("RAY_AUTH_", "RAY_SERVE_", "RAY_TRAIN_", "TQDM_")
    before = {key: value for key, value in os.environ.items() if key.startswith(ours)}
    with cluster.session(log_dir=tmp_path / "logs", num_cpus=2) as session:
        import ray

        @ray.remote
        def seen() -> tuple[str | None, str | None, str | None]:
            return os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_USAGE_STATS_ENABLED")

        assert ray.get(seen.remote(), timeout=60) == ("token", os.environ["RAY_AUTH_TOKEN"], "0")
        assert session.embedded and [(node["CPU"], node["GPU"]) for node in session.nodes()] == [(2.0, 0.0)]
        found = cluster.resources()
        assert found.total["CPU"] == found.maximum["CPU"] == 2 and found.total["memory"] > 0
        os.system("echo a child speaks")
        place = folder_of(os.getpid())
        assert len(servers(place)) == 2
    assert not ray.is_initialized() and not place.exists() and until(lambda: not servers(place))
    assert "a child speaks" in (tmp_path / "logs/ray.log").read_text()
    assert list((tmp_path / "logs/ray").glob("session_*/raylet.out"))
    assert not (tmp_path / "home").exists()
    assert {key: value for key, value in os.environ.items() if key.startswith(ours)} == before


def test_a_killed_cluster_dies_and_the_next_start_clears_its_files(tmp_path):
    with driver(tmp_path, tmp_path / "logs") as (process, _):
        place = folder_of(process.pid)
        assert len(servers(place)) == 2
        process.kill()
        process.wait(30)
        assert until(lambda: not servers(place)), "Ray's servers outlived the driver"
        assert place.exists()
        cluster.sweep()
        assert not place.exists()
        assert list((tmp_path / "logs/ray").glob("session_*/raylet.out"))


def test_joining_a_cluster_says_what_is_wrong_and_sigterm_ends_it_in_order(tmp_path, monkeypatch):
    for key in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with driver(tmp_path, tmp_path / "logs") as (process, told):
        address = told["address"]
        with pytest.raises(InputError, match=r"wants a token and none is given.*RAY_AUTH_TOKEN"), cluster.session(address):
            pass
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 8)
        with pytest.raises(InputError, match="token given is not the cluster's"), cluster.session(address):
            pass
        monkeypatch.setenv("RAY_AUTH_TOKEN", told["token"])
        with cluster.session(address, log_dir=tmp_path / "mine") as session:
            assert not session.embedded and [node["CPU"] for node in session.nodes()] == [1.0]
        monkeypatch.setenv("RAY_ADDRESS", address)
        with cluster.session() as session:
            assert not session.embedded and session.address == address
        place = folder_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM, (tmp_path / "driver.log").read_text()
        assert not place.exists() and until(lambda: not servers(place))


def test_addresses_that_lead_nowhere_are_sentences(monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(InputError, match="doesn't answer as the head of a Ray cluster"), cluster.session(f"127.0.0.1:{port}"):
            pass
    with pytest.raises(InputError, match=f"nothing answers at 127.0.0.1:{port}"), cluster.session(f"127.0.0.1:{port}"):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ray")]
