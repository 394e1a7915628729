"""What a session does to this process and its files; no Ray."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from orchestrator import cluster
from orchestrator.errors import InputError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_root", lambda: tmp_path / "orc")
    return tmp_path / "orc"


def test_output_goes_to_the_file_and_comes_back(tmp_path):
    program = (
        "import os, sys; from pathlib import Path; from orchestrator import cluster\n"
        "print('before')\n"
        f"with cluster._into(Path({str(tmp_path / 'logs' / 'ray.log')!r})):\n"
        "    print('chatter'); print('complaint', file=sys.stderr); os.system('echo child')\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("before\nafter\n", "")
    assert sorted((tmp_path / "logs/ray.log").read_text().split()) == ["chatter", "child", "complaint"]


def test_output_comes_back_after_an_error(tmp_path, capfd):
    with pytest.raises(RuntimeError), cluster._into(tmp_path / "ray.log"):
        os.write(1, b"inside\n")
        raise RuntimeError
    os.write(1, b"outside\n")
    assert capfd.readouterr().out == "outside\n"


def test_the_environment_is_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("ORC_A", "mine")
    monkeypatch.delenv("ORC_B", raising=False)
    with cluster._environment({"ORC_A": "ours", "ORC_B": "ours"}):
        assert os.environ["ORC_A"] == os.environ["ORC_B"] == "ours"
    assert os.environ["ORC_A"] == "mine" and "ORC_B" not in os.environ


def test_a_users_own_settings_go_first(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    assert "RAY_USAGE_STATS_ENABLED" not in cluster.environment()
    assert "TQDM_DISABLE" in cluster.environment() and "TQDM_DISABLE" not in cluster.environment(verbose=True)


@pytest.mark.parametrize(
    ("given", "mode"), [({}, "disabled"), ({"RAY_AUTH_TOKEN": "t"}, "token"), ({"RAY_AUTH_TOKEN_PATH": "/t"}, "token")]
)
def test_the_authentication_mode_follows_the_token(given, mode, monkeypatch, tmp_path):
    for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    assert cluster.authentication() == {"RAY_AUTH_MODE": mode}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert cluster.authentication() == {}


def test_sigterm_unwinds():
    unwound = []
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, cluster._orderly_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            unwound.append(True)
    assert ended.value.code == 143 and unwound and signal.getsignal(signal.SIGTERM) is before


def test_sweep_ends_only_the_servers_of_dead_owners_and_keeps_their_logs(root, tmp_path):
    program = tmp_path / "haproxy"
    shutil.copy(shutil.which("dash") or shutil.which("sh") or "", program)

    def server(place) -> subprocess.Popen:
        return subprocess.Popen([str(program), "-c", "read line", str(place / "haproxy.cfg")], stdin=subprocess.PIPE)

    root.mkdir()
    gone = root / "gone"
    with cluster._private_folder(tmp_path / "logs") as mine:
        gone.mkdir()
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        owner = {"pid": dead.pid, "created": 0.0, "log_dir": str(tmp_path / "old-logs")}
        (gone / "owner.json").write_text(json.dumps(owner))
        (gone / "session_2026_1/logs").mkdir(parents=True)
        (gone / "session_2026_1/logs/raylet.out").write_text("last words")
        kept, left = server(mine), server(gone)
        try:
            assert psutil.Process(left.pid).name() == "haproxy"
            assert cluster.sweep() == [f"Ended haproxy (process {left.pid}), which a killed run had left behind."]
            assert not psutil.pid_exists(left.pid) and kept.poll() is None
            assert mine.is_dir() and not gone.exists()
            assert (tmp_path / "old-logs/ray/session_2026_1/raylet.out").read_text() == "last words"
            assert cluster.sweep() == []
        finally:
            for process in (kept, left):
                process.kill()
                process.communicate()
    assert list(root.iterdir()) == []


def test_a_recycled_process_number_is_not_the_owner(root):
    root.mkdir()
    place = root / "old"
    place.mkdir()
    (place / "owner.json").write_text(json.dumps({"pid": os.getpid(), "created": psutil.Process().create_time() - 60, "log_dir": None}))
    cluster.sweep()
    assert not place.exists()


def test_a_folder_that_is_just_being_made_stays(root):
    (root / "new").mkdir(parents=True)
    cluster.sweep()
    assert (root / "new").exists()
    old = time.time() - 1000
    os.utime(root / "new", (old, old))
    cluster.sweep()
    assert not (root / "new").exists()


def test_socket_paths_stay_short_whatever_the_temporary_folder(monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/home/somebody/a/very/long/temporary/folder/of/a/batch/system")
    node = "f" * 56
    assert len(str(cluster._root() / "abcdefgh" / node / "admin.sock.1234567.tmp")) <= 107
    assert len(str(cluster._root() / "abcdefgh" / "session_2026-11-23_00-58-25_175177_1234567/sockets/plasma_store")) <= 107


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://head:8265", "dashboard; `orchestrator submit` takes that"),
        ("ray://head:10001", "Ray Client"),
        ("head", "'head' is not host:port"),
    ],
)
def test_addresses_of_the_wrong_kind_are_sentences(address, sentence):
    with pytest.raises(InputError, match=sentence), cluster.session(address):
        pass


@pytest.mark.parametrize(
    ("total", "available", "shm", "size"),
    [
        (16 * 10**9, 12 * 10**9, 8 * 10**9, 10**9),
        (16 * 10**9, 2 * 10**9, 8 * 10**9, 6 * 10**8),
        (16 * 10**9, 12 * 10**9, 5 * 10**8, 45 * 10**7),
        (16 * 10**9, 12 * 10**9, 64 * 2**20, 10**9),  # a container's: the store goes to disk instead
        (500 * 10**9, 400 * 10**9, 200 * 10**9, 20 * 10**9),
    ],
)
def test_the_object_store_fits_the_machine(total, available, shm, size, monkeypatch):
    class Memory:
        pass

    memory = Memory()
    memory.total, memory.available = total, available  # type: ignore[attr-defined]
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr(cluster, "shm_free", lambda: shm)
    assert cluster.store_bytes() == size
