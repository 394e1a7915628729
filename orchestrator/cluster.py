"""The Ray cluster that a command works on: the one it runs in, one it is told of, or one started here for its time.

An embedded cluster lives and dies with this process. It has a token of its own, no dashboard, its files in one private
folder that is gone afterwards (Ray's logs move to the run's), and what a killed one left is cleared at the next start.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from orchestrator.errors import InputError, StageError

if TYPE_CHECKING:
    import psutil

CONNECT_SECONDS = 5.0
"""How long a cluster may take to accept a connection, and then to answer."""
GB = 10**9
SHM_ENOUGH = 256 * 2**20
"""Bytes in /dev/shm below which the object store is better on disk."""
_SERVERS = ("gcs_server", "haproxy", "raylet")
"""The programs of Ray that could outlive a killed driver."""
_FRESH_SECONDS = 60.0
_OWNER = "owner.json"
_NOWHERE = b"127.0.0.1:9"
"""Stands in for the dashboard's address where there is none."""


@dataclass(frozen=True)
class Resources:
    """What a cluster has, by Ray's names: CPU, GPU, memory (bytes)."""

    nodes: tuple[dict[str, float], ...]
    """Of each live node."""
    total: dict[str, float]
    maximum: dict[str, float]
    """After autoscaling as far as it goes, where that is known; else the total."""


@dataclass(frozen=True)
class Session:
    """A connected cluster."""

    embedded: bool
    """Started here, and ends with the session."""
    address: str
    """Of its head, host:port."""
    cleared: tuple[str, ...] = ()
    """Sentences on what killed runs had left behind and was ended."""


@contextlib.contextmanager
def session(
    address: str | None = None,
    *,
    log_dir: Path | None = None,
    verbose: bool = False,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    dashboard: bool = False,
) -> Iterator[Session]:
    """Connects this process to Ray: to `address` (host:port or auto), `RAY_ADDRESS`, the job it runs in, else embedded.

    Unless `verbose`, all that this process and its libraries write to standard output and error goes to
    `log_dir/ray.log` meanwhile. `dashboard` is for what asks Ray's State API, and takes seconds longer to start.
    SIGTERM ends the session in order, as Ctrl-C does. Raises `InputError` for an address that can't be used, and
    `StageError` when Ray doesn't start.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    cleared = () if address else tuple(sweep())
    with contextlib.ExitStack() as stack:
        stack.enter_context(_orderly_sigterm())
        stack.enter_context(_environment(environment(verbose=verbose)))
        if log_dir is not None and not verbose:
            stack.enter_context(_into(log_dir / "ray.log"))
        if address is None:
            place = stack.enter_context(_private_folder(log_dir))
            stack.enter_context(_environment(_of_embedded(place)))
            _read_authentication()
            stack.callback(_disconnect)
            head = _start(place, log_dir, num_cpus=num_cpus, num_gpus=num_gpus, dashboard=dashboard, verbose=verbose)
        else:
            stack.enter_context(_environment(authentication()))
            _read_authentication()
            stack.callback(_disconnect)
            head = _connect(address, verbose=verbose)
        stack.enter_context(_orderly_sigterm())  # Ray set a handler of its own
        yield Session(embedded=address is None, address=head, cleared=cleared)


def resources() -> Resources:
    """What the connected cluster has."""
    import ray
    from ray._private.state import state

    nodes = tuple(
        {key: float(node["Resources"].get(key, 0.0)) for key in ("CPU", "GPU", "memory")} for node in ray.nodes() if node["Alive"]
    )
    total = {key: sum(node[key] for node in nodes) for key in ("CPU", "GPU", "memory")}
    autoscaled: Mapping[str, float] = state.get_max_resources_from_cluster_config() or {}
    return Resources(nodes, total, {key: max(value, float(autoscaled.get(key, 0))) for key, value in total.items()})


def has_dashboard() -> bool:
    """Whether the connected cluster has the API server that Ray's State API asks."""
    from ray._private import ray_constants
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(ray_constants.DASHBOARD_ADDRESS.encode(), namespace=ray_constants.KV_NAMESPACE_DASHBOARD)
    return found not in (None, b"", _NOWHERE)


def environment(*, verbose: bool = False) -> dict[str, str]:
    """Settings that Ray and the libraries must find in the environment before they start; the user's own go first."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would hide the GPUs from tasks that ask for none, and warns that this will change.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Each report of a training worker may wait so long for the controller to look.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        **({} if verbose else {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}),
    }
    return {key: value for key, value in settings.items() if key not in os.environ}


def authentication() -> dict[str, str]:
    """`RAY_AUTH_MODE` for a cluster that is there already: token where the user has a token, unless the mode is set."""
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    has_token = (
        bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")) or (Path.home() / ".ray/auth_token").exists()
    )
    return {"RAY_AUTH_MODE": "token" if has_token else "disabled"}


def sweep() -> list[str]:
    """Clears what embedded clusters of killed processes left: their servers, files and a port still held.

    Only this user's, known by the folder each runs in. Returns a sentence for each process that was ended.
    """
    dead = _dead()
    said = _end_servers(dead)
    for place in dead:
        with contextlib.suppress(OSError, ValueError, KeyError):
            _keep_logs(place, json.loads((place / _OWNER).read_text())["log_dir"])
        shutil.rmtree(place, ignore_errors=True)
    return said


def leftovers() -> list[str]:
    """What `sweep` would clear: folders of killed runs and the servers in them."""
    dead = _dead()
    return [f"{process.name()} (process {process.pid})" for process in _servers_in(dead)] + [str(place) for place in dead]


def store_bytes() -> int:
    """Size of an embedded cluster's object store: 1 GB, or 4% of a big machine's memory, within what is free.

    Where /dev/shm is as small as in a container by default, Ray keeps the objects in the temporary folder instead.
    """
    import psutil

    memory = psutil.virtual_memory()
    size = min(max(GB, memory.total // 25), memory.available * 3 // 10)
    shm = shm_free()
    if shm >= SHM_ENOUGH:
        size = min(size, int(shm * 0.9))
    return max(100 * 2**20, size)


def shm_free() -> int:
    """Bytes free in /dev/shm, 0 where there is none."""
    return shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0


# ---- starting and connecting -----------------------------------------------------------------------------------
def _start(place: Path, log_dir: Path | None, *, num_cpus: int | None, num_gpus: int | None, dashboard: bool, verbose: bool) -> str:
    import ray

    if ray.is_initialized():
        raise StageError("This process is connected to a Ray cluster already; ray.shutdown() ends that.")
    try:
        with contextlib.nullcontext() if dashboard else _lean_head():
            ray.init(
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=store_bytes(),
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.WARNING,
                _temp_dir=str(place),
            )
    except (ConnectionError, RuntimeError, TimeoutError, OSError, ValueError) as error:
        logs = f" Ray's logs are in {log_dir / 'ray'}." if log_dir else ""
        raise StageError(
            f"Ray did not start on this machine: {_first_line(error)}.{logs} `orchestrator doctor` looks for the reason."
        ) from error
    return ray.get_runtime_context().gcs_address


@contextlib.contextmanager
def _lean_head() -> Iterator[None]:
    """Starts a head without its API server and autoscaler, which nothing asks for in an embedded cluster.

    Ray starts both even without a dashboard and waits for the first: 1.2 to 2.4 s, 200 MB, and 1 s at the end. It also
    imports the dashboard's libraries (0.5 s) to see whether they are installed; this product depends on them.
    """
    from ray._private import ray_constants, utils
    from ray._private.node import Node

    def without_api_server(node: Any, **_: Any) -> None:
        node._webui_url = ""
        # The node's agent asks for this address every second, and logs an error, until it is there.
        key, namespace = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
        node.get_gcs_client().internal_kv_put(key, _NOWHERE, True, namespace)

    lean = {
        (Node, "start_api_server"): without_api_server,
        (Node, "start_monitor"): lambda node: None,
        (utils, "get_dashboard_dependency_error"): lambda: None,
    }
    kept = {(place, name): getattr(place, name, None) for place, name in lean}
    if not all(kept.values()):  # another Ray than the ones tested: as it comes
        yield
        return
    try:
        for (place, name), function in lean.items():
            setattr(place, name, function)
        yield
    finally:
        for (place, name), function in kept.items():
            setattr(place, name, function)


def _connect(address: str, *, verbose: bool) -> str:
    import ray
    from ray.exceptions import AuthenticationError

    if address.startswith(("http://", "https://")):
        raise InputError(
            f"--address: {address} is a cluster's dashboard; `orchestrator submit` takes that. To work on a cluster from "
            "one of its nodes, give host:port of its head, for example 10.0.0.1:6379."
        )
    if address.startswith("ray://"):
        raise InputError(
            f"--address: {address} is Ray Client, which training can't run through; use `orchestrator submit` with http://HEAD:8265."
        )
    if address not in ("auto", "local"):
        probe(address)
    try:
        ray.init(address=address, log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.WARNING)
    except AuthenticationError:
        raise InputError(_refused(address)) from None
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, AssertionError) as error:
        if "Version mismatch" in str(error):
            raise InputError(f"--address: the cluster {address} has other versions: {' '.join(str(error).split())}.") from None
        raise InputError(
            f"--address: this machine can't join the cluster {address}: {_first_line(error)}. "
            "It must be one of the cluster's nodes; from elsewhere use `orchestrator submit` with http://HEAD:8265."
        ) from error
    return ray.get_runtime_context().gcs_address


def probe(address: str) -> None:
    """Raises `InputError` unless a Ray head answers at host:port and takes our token; within twice `CONNECT_SECONDS`.

    `ray.init` would retry for 20 seconds and not say that it is the token.
    """
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
    from ray.exceptions import AuthenticationError, RpcError

    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise InputError(f"--address: {address!r} is not host:port, for example 10.0.0.1:6379.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"--address: nothing answers at {address} ({error}); is the cluster up, and is this its head's port (6379 by default)?"
        ) from None
    answer: list[BaseException | bytes | None] = []

    def ask() -> None:
        try:
            answer.append(GcsClient(address=address).internal_kv_get(b"session_name", b"session", timeout=CONNECT_SECONDS))
        except (AuthenticationError, RpcError, RuntimeError) as error:
            answer.append(error)

    # In a thread: what isn't Ray may take the connection and never answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if answer and isinstance(answer[0], AuthenticationError):
        raise InputError(_refused(address))
    if not answer or isinstance(answer[0], BaseException):
        raise InputError(f"--address: what listens at {address} doesn't answer as the head of a Ray cluster does.")


def _refused(address: str) -> str:
    has = "the token given is not the cluster's" if os.environ.get("RAY_AUTH_MODE") == "token" else "it wants a token and none is given"
    return f"--address: the cluster {address} refuses this user: {has}. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it."


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _read_authentication() -> None:
    """Ray reads the mode and the token once, when it is imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _of_embedded(place: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_urlsafe(32),
        # HAProxy's files in this cluster's own folder, where `sweep` knows them and no other user's are in the way.
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(place / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(place / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(place / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(place),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(place / "server-state"),
    }


# ---- this process ----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _into(file: Path) -> Iterator[None]:
    """Sends this process's standard output and error, and so its children's, to the end of `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {number: os.dup(number) for number in (1, 2)}
    with file.open("ab") as log:
        _flush()
        for number in kept:
            os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        _flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


@contextlib.contextmanager
def _orderly_sigterm() -> Iterator[None]:
    """SIGTERM unwinds this process like an exception, so that everything opened is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- the private folder ----------------------------------------------------------------------------------------
def _root() -> Path:
    """Where this user's embedded clusters have their folders. Short: a socket's path may have 107 characters."""
    base = tempfile.gettempdir()
    return Path(base if len(base) <= 12 else "/tmp") / f"orc-{os.getuid()}"


@contextlib.contextmanager
def _private_folder(log_dir: Path | None) -> Iterator[Path]:
    import psutil

    root = _root()
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.getuid():
        raise InputError(f"{root} belongs to somebody else; set TMPDIR to a folder of your own with a short name.")
    place = Path(tempfile.mkdtemp(prefix="", dir=root))
    owner = {"pid": os.getpid(), "created": psutil.Process().create_time(), "log_dir": str(log_dir.absolute()) if log_dir else None}
    (place / _OWNER).write_text(json.dumps(owner))
    try:
        yield place
    finally:
        _keep_logs(place, log_dir)
        shutil.rmtree(place, ignore_errors=True)


def _dead() -> list[Path]:
    """Folders whose process is gone."""
    root = _root()
    return [place for place in root.iterdir() if place.is_dir() and not _has_owner(place)] if root.is_dir() else []


def _has_owner(place: Path) -> bool:
    import psutil

    try:
        owner = json.loads((place / _OWNER).read_text())
        return abs(psutil.Process(owner["pid"]).create_time() - owner["created"]) < 1.0
    except psutil.NoSuchProcess:
        return False
    except (OSError, ValueError, KeyError):
        # Being made right now, or left half-made.
        with contextlib.suppress(OSError):
            return time.time() - place.stat().st_mtime < _FRESH_SECONDS
        return True


def _keep_logs(place: Path, log_dir: str | Path | None) -> None:
    """Moves Ray's own logs to `log_dir/ray`."""
    for logs in place.glob("session_2*/logs"):
        if log_dir is not None and not logs.is_symlink():
            target = Path(log_dir) / "ray" / logs.parent.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(logs, target)


def _servers_in(places: list[Path]) -> list[psutil.Process]:
    """This user's servers that run in the given folders."""
    import psutil

    found = []
    for process in psutil.process_iter() if places else ():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.name() in _SERVERS and process.uids().real == os.getuid():
                arguments = process.cmdline()
                if any(f"{place}/" in argument for place in places for argument in arguments):
                    found.append(process)
    return found


def _end_servers(places: list[Path]) -> list[str]:
    """Ends the servers that run in the given folders; a sentence each."""
    import psutil

    said, ended = [], []
    for process in _servers_in(places):
        with contextlib.suppress(psutil.NoSuchProcess):
            said.append(f"Ended {process.name()} (process {process.pid}), which a killed run had left behind.")
            process.terminate()
            ended.append(process)
    for process in psutil.wait_procs(ended, timeout=5)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return said


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
