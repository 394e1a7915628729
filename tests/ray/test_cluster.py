"""Sessions on real Ray: the embedded cluster's whole life, however it ends, and joining one that is there.

Each runs in a process of its own, since the tests beside these keep a Ray of theirs in this one.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator import cluster
from orchestrator.errors import InputError

EMBEDDED = """
import json, os, sys, time
from pathlib import Path
from orchestrator import cluster

ours = ("RAY_AUTH_", "RAY_SERVE_", "RAY_TRAIN_", "TQDM_")
def settings():
    return {key: value for key, value in os.environ.items() if key.startswith(ours)}

before = settings()
with cluster.session(log_dir=Path("logs"), num_cpus=2) as session:
    import ray

    @ray.remote
    def seen():
        return [os.environ.get(key) for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")]

    os.system("echo a child speaks")
    found = cluster.resources()
    told = {
        "address": session.address, "embedded": session.embedded, "token": os.environ["RAY_AUTH_TOKEN"],
        "seen": ray.get(seen.remote(), timeout=60), "nodes": list(found.nodes), "total": found.total, "maximum": found.maximum,
    }
    Path("told.json.new").write_text(json.dumps(told))
    os.rename("told.json.new", "told.json")
    time.sleep(float(sys.argv[1]))
assert not ray.is_initialized()
assert settings() == before, settings()
print("ended in order")
"""

JOIN = """
import json, sys
from pathlib import Path
from orchestrator import cluster
from orchestrator.errors import InputError

try:
    with cluster.session(*sys.argv[1:], log_dir=Path("joined-logs")) as session:
        told = {"address": session.address, "embedded": session.embedded, "nodes": list(cluster.resources().nodes)}
except InputError as error:
    told = {"refused": str(error)}
print(json.dumps(told))
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    return {**{key: value for key, value in os.environ.items() if not key.startswith("RAY_")}, "HOME": str(home), **more}


@contextlib.contextmanager
def embedded(tmp_path: Path, seconds: float = 120) -> Iterator[tuple[subprocess.Popen[str], dict]]:
    """Another process with an embedded cluster, and what it told of it."""
    told = tmp_path / "told.json"
    with (tmp_path / "out.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", EMBEDDED, str(seconds)], env=environment(tmp_path), cwd=tmp_path, stdout=log, stderr=log, text=True
        )
    try:
        deadline = time.monotonic() + 120
        while not told.exists():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out.log").read_text()
            time.sleep(0.1)
        yield process, json.loads(told.read_text())
    finally:
        process.kill()
        process.wait(30)


def join(tmp_path: Path, *address: str, **more: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", JOIN, *address], env=environment(tmp_path, **more), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def servers(place: Path) -> list[psutil.Process]:
    return cluster._servers_in([place])


def folder_of(pid: int) -> Path:
    owners = {}
    for place in cluster._root().iterdir():
        with contextlib.suppress(OSError, ValueError):  # other sessions come and go
            owners[json.loads((place / "owner.json").read_text())["pid"]] = place
    return owners[pid]


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_an_embedded_cluster_works_and_leaves_only_its_logs(tmp_path):
    with embedded(tmp_path, seconds=1) as (process, told):
        place = folder_of(process.pid)
        assert {server.name() for server in servers(place)} == {"gcs_server", "raylet"}
        assert process.wait(60) == 0, (tmp_path / "out.log").read_text()
    assert told["seen"] == ["token", told["token"], "0"]
    assert told["embedded"] and [(node["CPU"], node["GPU"]) for node in told["nodes"]] == [(2.0, 0.0)]
    assert told["total"]["CPU"] == told["maximum"]["CPU"] == 2 and told["total"]["memory"] > 0
    assert not place.exists() and until(lambda: not servers(place))
    assert (tmp_path / "out.log").read_text() == "ended in order\n"
    assert "a child speaks" in (tmp_path / "logs/ray.log").read_text()
    assert list((tmp_path / "logs/ray").glob("session_*/raylet.out"))
    assert not (tmp_path / ".ray").exists()  # no token of ours for others to find


def test_a_killed_cluster_dies_and_the_next_start_clears_its_files(tmp_path):
    with embedded(tmp_path) as (process, _):
        place = folder_of(process.pid)
        assert len(servers(place)) == 2
        process.kill()
        process.wait(30)
        assert until(lambda: not servers(place)), "Ray's servers outlived the driver"
        cluster.sweep()
        assert not place.exists()
        assert list((tmp_path / "logs/ray").glob("session_*/raylet.out"))


def test_joining_a_cluster_says_what_is_wrong_and_sigterm_ends_it_in_order(tmp_path):
    with embedded(tmp_path) as (process, told):
        address = told["address"]
        assert "it wants a token and none is given. Set RAY_AUTH_TOKEN" in join(tmp_path, address)["refused"]
        assert "the token given is not the cluster's" in join(tmp_path, address, RAY_AUTH_TOKEN="wrong" * 8)["refused"]
        for found in (
            join(tmp_path, address, RAY_AUTH_TOKEN=told["token"]),
            join(tmp_path, RAY_ADDRESS=address, RAY_AUTH_TOKEN=told["token"]),
        ):
            assert (found["address"], found["embedded"]) == (address, False) and [node["CPU"] for node in found["nodes"]] == [2.0]
        place = folder_of(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM, (tmp_path / "out.log").read_text()
        assert not place.exists() and until(lambda: not servers(place))


def test_addresses_that_lead_nowhere_are_sentences(monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(InputError, match="doesn't answer as the head of a Ray cluster"):
            cluster.probe(f"127.0.0.1:{port}")
    with pytest.raises(InputError, match=rf"nothing answers at 127\.0\.0\.1:{port}"):
        cluster.probe(f"127.0.0.1:{port}")
