"""What is done to the configuration that Ray Serve writes for HAProxy; that HAProxy takes it is seen in tests/ray."""

from pathlib import Path

from serving import haproxy

CONFIGURATION = """global
    maxconn 4096
defaults
    mode http
    errorfile 502 /tmp/x/500.http
    errorfile 503 /tmp/x/500.http
    errorfile 504 /tmp/x/500.http
frontend prometheus
    bind :9101
    http-request use-service prometheus-exporter if { path /metrics }
    no log
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend default_backend
backend default_backend
    http-request return status 404
listen stats
  bind *:8404
  stats enable
"""


def test_ports_open_to_everyone_are_closed_and_the_rest_stays(tmp_path: Path) -> None:
    mended = haproxy.mend(CONFIGURATION, tmp_path)
    assert [line for line in mended.splitlines() if "bind" in line] == ["    bind 127.0.0.1:8000"]
    assert [line for line in mended.splitlines() if not line.startswith(" ")] == [
        "global",
        "defaults",
        "frontend http_frontend",
        "backend default_backend",
    ]
    assert haproxy.mend(mended, tmp_path) == mended


def test_errors_of_the_proxy_are_json(tmp_path: Path) -> None:
    mended = haproxy.mend(CONFIGURATION, tmp_path)
    for status, sent in ((502, b"503 "), (503, b"503 "), (504, b"504 ")):
        page = tmp_path / f"{status}.http"
        assert f"errorfile {status} {page}\n" in mended
        head, _, body = page.read_bytes().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + sent)
        assert f"Content-Length: {len(body)}".encode() in head
        assert b'"error_type"' in body


def test_without_a_binary_or_the_program_nothing_is_turned_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(haproxy, "binary", lambda: None)
    assert haproxy.environment() == {}
    monkeypatch.setattr(haproxy, "binary", lambda: "/bin/true")
    monkeypatch.setattr(haproxy, "program", lambda: None)
    assert haproxy.environment() == {}
    monkeypatch.setattr(haproxy, "program", lambda: "/somewhere/orchestrator-haproxy")
    settings = haproxy.environment()
    assert settings["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert settings["RAY_SERVE_HAPROXY_BINARY_PATH"] == "/somewhere/orchestrator-haproxy"
