"""Deploys a bundle as an endpoint on the connected Ray cluster, watches it come up, and takes it down."""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from orchestrator.config import ServingSection
from orchestrator.errors import InputError, StageError
from orchestrator.progress import Display, Silent
from serving import auth, haproxy
from serving.deployment import CAUSE, Replica, Spec

READY_TIMEOUT_S = 300.0
"""Until when a replica must have loaded its model."""
MAX_ONGOING_REQUESTS = 10_000
"""Per replica; the batcher's queue is what limits."""


@dataclass(frozen=True)
class Endpoint:
    url: str
    name: str
    version: int | None
    digest: str
    app: str
    """Name of the Serve application."""


def a_key(section: ServingSection) -> str | None:
    """One of the endpoint's API keys, for this process's own requests; None where it is open."""
    known = auth.keys(section)
    return known[0] if known else None


def deploy(
    bundle_uri: str,
    section: ServingSection,
    *,
    name: str,
    version: int | None,
    display: Display | None = None,
    timeout_s: float = READY_TIMEOUT_S,
) -> Endpoint:
    """Starts the endpoint, or replaces the model of one that runs under this `name`, without a failed request.

    Ray must be connected. Returns when it answers. Raises `InputError` for a port in use, missing API keys or a bundle that
    is none; `StageError` with the reason where the new replica doesn't come up (an endpoint that ran before goes on).
    """
    from ray import serve

    from orchestrator import bundle as bundles

    display = display or Silent()
    bundle = bundles.load(bundle_uri)
    hashes = tuple(auth.hashed(key) for key in auth.keys(section))
    spec = Spec(bundle=bundle_uri, name=name, version=version, section=section, key_hashes=hashes)
    address = _start(section, display)
    app_name = _app_name(name)
    ran_before = app_name in status()
    prefix = _prefix(app_name, display)
    _run(spec, app_name, prefix)
    try:
        _wait_until_running(app_name, timeout_s, display)
    except StageError:
        if not ran_before:  # Nothing would answer, and it would take its place as soon as there is room.
            serve.delete(app_name, _blocking=False)
        raise
    url = f"http://{address}{prefix if prefix != '/' else ''}"
    _wait_until_answering(url, spec, bundle.digest, timeout_s)
    return Endpoint(url=url, name=name, version=version, digest=bundle.digest, app=app_name)


def status() -> dict[str, dict[str, Any]]:
    """Serve application -> status, message, replicas by state; empty where Serve doesn't run."""
    from ray import serve

    return {
        name: {
            "status": app.status.value,
            "message": app.message,
            "replicas": {state: count for deployment in app.deployments.values() for state, count in deployment.replica_states.items()},
        }
        for name, app in serve.status().applications.items()
    }


def delete(app_name: str) -> None:
    """Takes one application down, after its requests are answered."""
    from ray import serve

    serve.delete(app_name)


def shutdown() -> None:
    """Takes every endpoint of the connected cluster down, after its requests are answered."""
    from ray import serve

    serve.shutdown()


def hold(endpoint: Endpoint, display: Display | None = None) -> None:
    """Waits until Ctrl-C or SIGTERM, then takes the endpoint down; a second Ctrl-C doesn't wait for its requests."""
    display = display or Silent()
    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        display.say(f"Serving {endpoint.name} at {endpoint.url} until Ctrl-C.")
        while not stop.wait(1.0):
            pass
        display.say("Stopping: requests that are here are answered first.")
        if status().keys() - {endpoint.app}:
            delete(endpoint.app)
        else:
            shutdown()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- Serve itself --------------------------------------------------------------------------------------------
def _start(section: ServingSection, display: Display) -> str:
    """Starts Serve where it doesn't run; the address (host:port) to reach it at."""
    import ray
    from ray import serve

    try:
        controller = _controller()
    except ValueError:
        controller = None
    if controller is not None:
        running: Any = ray.get(controller.get_http_config.remote(), timeout=30)
        if (running.host, running.port) != (section.host, section.port):
            display.warn(
                f"Serve runs on this cluster already, at {running.host}:{running.port}; it stays there "
                f"(asked for: {section.host}:{section.port}), since the address of a running Serve can't change."
            )
            if not auth.is_loopback(running.host or "0.0.0.0"):
                auth.keys(section.model_copy(update={"host": running.host or "0.0.0.0"}))
        return _reachable(running.host or "0.0.0.0", running.port)

    require_free(section)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    environment = haproxy.environment()
    if environment and len(nodes) > 1 and auth.is_loopback(section.host):
        display.warn(
            f"serving.host is {section.host}: HAProxy couldn't reach replicas on the other {len(nodes) - 1} nodes, so Ray's slower "
            "proxy is used. With serving.host: 0.0.0.0 and API keys HAProxy is."
        )
        environment = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    serve.start(
        http_options={"host": section.host, "port": section.port},
        controller_options={"runtime_env": {"env_vars": environment}} if environment else None,
    )
    return _reachable(section.host, section.port)


def require_free(section: ServingSection) -> None:
    """`InputError` that names who has the port; only what this machine sees, which is where the driver and the head are."""
    host = "127.0.0.1" if section.host == "localhost" else section.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), section.port))
            return
        except OSError as error:
            reason = error.strerror
            in_use = error.errno == 98 or "in use" in (reason or "").lower()
    if not in_use:
        raise InputError(f"serving.host, serving.port: {section.host}:{section.port} can't be listened on: {reason}.")
    raise InputError(
        f"serving.port: {section.port} on {section.host} is in use{_owner(section.port)}. Choose another with --set serving.port=PORT."
    )


def _owner(port: int) -> str:
    import psutil

    try:
        pids = {
            connection.pid
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
        }
        pid = next(iter(pids - {None}), None)
        if pid is None:
            return ""
        process = psutil.Process(pid)
        name, parent = process.name(), process.ppid()
    except psutil.Error:
        return ""
    if name == "haproxy" and parent == 1:
        return f" by an HAProxy that a killed Ray left behind (process {pid}; `kill {pid}` ends it)"
    return f" by process {pid} ({name})"


def _reachable(host: str, port: int) -> str:
    """host:port at which this machine reaches what listens on `host`."""
    if host in ("0.0.0.0", "::"):
        import ray

        host = ray.util.get_node_ip_address()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _app_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def _prefix(app_name: str, display: Display) -> str:
    """The path under which the application answers: what it has already, else / where that is free, else /NAME."""
    taken = {other: about.get("route_prefix") for other, about in details().get("applications", {}).items()}
    if own := taken.get(app_name):
        return own
    if "/" not in taken.values():
        return "/"
    display.say(f"The endpoint serves another model at /, so {app_name} answers under /{app_name}.")
    return f"/{app_name}"


def details() -> dict[str, Any]:
    """All that Serve's controller knows: applications, their deployments, and each replica's node and process."""
    import ray

    return ray.get(_controller().get_serve_instance_details.remote(), timeout=30)


def _controller() -> Any:
    """Serve's controller on the connected cluster; `ValueError` where Serve doesn't run."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


def _run(spec: Spec, app_name: str, prefix: str) -> None:
    from ray import serve
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import LoggingConfig

    section = spec.section
    replicas = section.replicas
    scaling: dict[str, Any] = (
        {"num_replicas": replicas.max}
        if replicas.min == replicas.max
        else {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.min,
                initial_replicas=max(1, replicas.min),
                max_replicas=replicas.max,
                target_ongoing_requests=replicas.target,
            )
        }
    )
    deployment: Any = serve.deployment(
        serve.ingress()(Replica),
        name="replica",
        ray_actor_options={"num_cpus": section.cpus_per_replica, "num_gpus": section.gpus_per_replica},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_surge_percent=100,
        max_constructor_retry_count=2,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=min(section.request_timeout_s, 30.0) + haproxy.DRAIN_S,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        **scaling,
    )
    serve._run(deployment.bind(spec.to_json()), name=app_name, route_prefix=prefix, _blocking=False)


def _wait_until_running(app_name: str, timeout_s: float, display: Display) -> None:
    """Until every replica that was asked for is up; `StageError` with the reason where one fails or time is over."""
    from ray import serve

    deadline = time.monotonic() + timeout_s
    said = ""
    while True:
        app = serve.status().applications.get(app_name)
        state = app.status.value if app else "gone"
        if app and state == "RUNNING":
            return
        messages = [app.message, *(deployment.message for deployment in app.deployments.values())] if app else []
        if state in ("DEPLOY_FAILED", "UNHEALTHY", "gone"):
            raise StageError(f"The endpoint {app_name!r} could not be deployed: {root_cause(messages)}")
        if time.monotonic() > deadline:
            raise StageError(
                f"The endpoint {app_name!r} did not come up within {timeout_s:.0f} s ({state.lower()}): {_waits_for(messages)}"
            )
        waiting = f"waiting for the replica: {state.lower()}"
        if waiting != said:
            display.step(0, None, unit="replicas", state=state.lower())
            said = waiting
        time.sleep(0.1)


def root_cause(messages: list[str]) -> str:
    """The sentence in Ray's messages that says why: ours where there is one, else the last line of the traceback."""
    text = "\n".join(message for message in messages if message)
    if CAUSE in text:
        sentence = text.rsplit(CAUSE, 1)[1].strip().splitlines()[0]
        return sentence.rstrip(".") + "."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray Serve does not say why."


def _waits_for(messages: list[str]) -> str:
    import ray

    free, total = ray.available_resources(), ray.cluster_resources()
    text = " ".join(" ".join(message.split()) for message in messages if message)
    return f"{text[-500:] or 'no replica has started'} Free on the cluster: {free.get('CPU', 0):g} of {total.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} of {total.get('GPU', 0):g} GPUs."


def _wait_until_answering(url: str, spec: Spec, digest: str, timeout_s: float) -> None:
    """Until the address answers with this version: the proxy hears of a replica a moment after it is ready."""
    import httpx

    deadline = time.monotonic() + min(60.0, timeout_s)
    found = "nothing answers"
    with httpx.Client(timeout=10.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                answer = client.get(f"{url}/info")
                if answer.status_code == 200 and answer.json().get("digest") == digest:
                    return
                found = f"status {answer.status_code}: {answer.text[:200]}"
            except httpx.TransportError as error:
                found = str(error) or type(error).__name__
            time.sleep(0.1)
    raise StageError(f"The replica of {spec.name!r} is up, but {url} does not answer with it: {found}")
