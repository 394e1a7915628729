"""For every test: no network, no telemetry. A test that must reach the package index says so: `@pytest.mark.network`."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a developer has set for daily use must not decide what the tests see.
for _name in ("ORCHESTRATOR_STORAGE", "ORCHESTRATOR_API_KEYS", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
    os.environ.pop(_name, None)


class NetworkReached(AssertionError):
    """A test tried to reach another machine."""


def _own_addresses() -> set[str]:
    return {address.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses}


OWN = _own_addresses()


def _is_here(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", "0.0.0.0", "::", socket.gethostname()) or name in OWN:
        return True
    try:
        return ipaddress.ip_address(str(name).partition("%")[0]).is_loopback
    except ValueError:
        return False  # the name of some other host


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest) -> Iterator[None]:
    """Connecting to, or looking up, anything but this machine fails the test, also when the error is caught on the way."""
    with contextlib.nullcontext() if request.node.get_closest_marker("network") else network_refused():
        yield


@contextlib.contextmanager
def network_refused() -> Iterator[None]:
    """Datagrams are let through: Ray "connects" one to learn this machine's address, which sends nothing."""
    reached: list[str] = []

    def refuse(where: Any) -> None:
        reached.append(str(where))
        raise NetworkReached(f"This test reaches for {where}; tests run without a network.")

    def guarded(real: Any) -> Any:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and self.type & socket.SOCK_STREAM and not _is_here(address[0]):
                refuse(address)
            return real(self, address)

        return connect

    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        if not _is_here(host) and not _is_number(host):
            refuse(host)
        return look_up(host, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield
    if reached:
        raise NetworkReached(f"This test reached for {', '.join(reached)} and went on; tests run without a network.")


def _is_number(host: Any) -> bool:
    try:
        ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return True
