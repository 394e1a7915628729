"""The guard in `tests/conftest.py` itself."""

import contextlib
import socket

import pytest

from tests.conftest import network_refused


def test_a_connection_to_another_machine_is_refused():
    with socket.socket() as probe, pytest.raises(AssertionError, match=r"192\.0\.2\.1"), network_refused():
        probe.connect(("192.0.2.1", 80))


def test_a_look_up_of_another_machine_is_refused():
    with pytest.raises(AssertionError, match="huggingface"), network_refused():
        socket.create_connection(("huggingface.co", 443))


def test_catching_the_refusal_does_not_hide_it():
    with pytest.raises(AssertionError, match="went on"), network_refused(), contextlib.suppress(AssertionError):
        socket.getaddrinfo("huggingface.co", 443)


def test_this_machine_is_reachable():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with network_refused(), socket.create_connection(("localhost", server.getsockname()[1])):
            pass
