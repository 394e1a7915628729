"""One archive from the Python package index that pip is set up for, checked by SHA-256; no package code runs.

Speaks the simple repository API (packaging.python.org/specifications/simple-repository-api) over HTTP(S) and file
URLs, so it works behind the mirrors, proxies and certificates that pip's configuration names.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

if TYPE_CHECKING:
    import ssl

    import httpx

PYPI = "https://pypi.org/simple"
DEADLINE_SECONDS = 600.0


class NotFetched(Exception):
    """The archive can't be had; the text says why, for each place that was asked."""


def fetch(package: str, archive: str, sha256: str, target: Path) -> None:
    """Writes the file `archive` of `package` to `target`, whole or not at all."""
    import httpx

    settings = pip_settings()
    deadline = time.monotonic() + DEADLINE_SECONDS
    reasons = []
    with _client(settings) as client:
        for place in _places(settings, package):
            try:
                link = _link(client, place, archive)
                if link is None:
                    reasons.append(f"{_shown(place)} does not have it")
                    continue
                _download(client, link, sha256, target, deadline)
                return
            except httpx.HTTPStatusError as error:  # its own text would show a password in the URL
                reasons.append(f"{_shown(place)}: HTTP status {error.response.status_code}")
            except (httpx.HTTPError, httpx.InvalidURL, OSError, NotFetched) as error:
                reasons.append(f"{_shown(place)}: {error or type(error).__name__}")
    raise NotFetched("; ".join(reasons))


def download(urls: Sequence[str], sha256: str, target: Path) -> None:
    """Writes what the first of `urls` that has it holds to `target`, whole or not at all."""
    import httpx

    deadline = time.monotonic() + DEADLINE_SECONDS
    reasons = []
    with _client(pip_settings()) as client:
        for url in urls:
            try:
                _download(client, url, sha256, target, deadline)
                return
            except httpx.HTTPStatusError as error:
                reasons.append(f"{url}: HTTP status {error.response.status_code}")
            except (httpx.HTTPError, OSError, NotFetched) as error:
                reasons.append(f"{url}: {error or type(error).__name__}")
    raise NotFetched("; ".join(reasons))


def _client(settings: dict[str, str]) -> httpx.Client:
    import httpx

    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(30.0, connect=10.0),
        verify=_certificates(settings),
        proxy=settings.get("proxy") or None,
        headers={"Accept": "application/vnd.pypi.simple.v1+html, text/html;q=0.9"},
    )


def pip_settings() -> dict[str, str]:
    """pip's settings by name (`index-url`, `extra-index-url`, `find-links`, `cert`, `proxy`): files, then environment."""
    settings: dict[str, tuple[int, str]] = {}
    found = [re.fullmatch(r"(:env:|[\w-]+)\.([\w-]+)=(.*)", line) for line in _pip_config().splitlines()]
    entries = [(match[1], match[2], str(ast.literal_eval(match[3]))) for match in found if match]
    # Without pip (a uv environment has none) its environment variables still say where the index is.
    entries += [(":env:", key[4:].lower().replace("_", "-"), value) for key, value in os.environ.items() if key.startswith("PIP_")]
    for section, key, value in entries:
        rank = {"global": 1, "install": 0, "download": 2, ":env:": 3}.get(section, -1)
        if rank >= settings.get(key, (0, ""))[0]:
            settings[key] = (rank, value)
    return {key: value for key, (_, value) in settings.items()}


def _pip_config() -> str:
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=60, check=False)
    return listed.stdout if listed.returncode == 0 else ""


def _certificates(settings: dict[str, str]) -> ssl.SSLContext | bool:
    import ssl

    bundle = settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    return ssl.create_default_context(cafile=bundle) if bundle and Path(bundle).is_file() else True


def _places(settings: dict[str, str], package: str) -> Iterator[str]:
    """Pages that may link to the archive: the index's page of the package, then pip's further indexes and folders."""
    for page in settings.get("find-links", "").split():
        yield page if "://" in page else Path(page).expanduser().absolute().as_uri()
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return
    name = re.sub(r"[-_.]+", "-", package).lower()
    for index in [settings.get("index-url") or PYPI, *settings.get("extra-index-url", "").split()]:
        yield f"{index.rstrip('/')}/{name}/"


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _link(client: httpx.Client, page: str, archive: str) -> str | None:
    """URL of `archive` on a page of links or in a folder."""
    if page.startswith("file:"):
        place = _file(page)
        if place.is_dir() and (place / archive).is_file():
            return (place / archive).as_uri()
        index = place / "index.html" if place.is_dir() else place
        if not index.is_file():
            return None
        base, text = index.absolute().as_uri(), index.read_text(encoding="utf-8", errors="replace")
    else:
        answer = client.get(page)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        base, text = str(answer.url), answer.text
    parser = _Links()
    parser.feed(text)
    for link in parser.links:
        url = urldefrag(urljoin(base, link)).url
        if unquote(urlsplit(url).path).rsplit("/", 1)[-1] == archive:
            return _with_password(url, page)
    return None


def _download(client: httpx.Client, url: str, sha256: str, target: Path, deadline: float) -> None:
    digest = hashlib.sha256()
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            for chunk in _chunks(client, url):
                digest.update(chunk)
                stream.write(chunk)
                if time.monotonic() > deadline:
                    raise NotFetched(f"not done after {DEADLINE_SECONDS:.0f} s")
        if digest.hexdigest() != sha256:
            raise NotFetched(f"what came has SHA-256 {digest.hexdigest()}, expected {sha256}")
        temporary.chmod(0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _chunks(client: httpx.Client, url: str) -> Iterator[bytes]:
    if url.startswith("file:"):
        with _file(url).open("rb") as source:
            while chunk := source.read(1 << 20):
                yield chunk
        return
    with client.stream("GET", url, headers={"Accept": "*/*"}) as answer:
        answer.raise_for_status()
        yield from answer.iter_bytes(1 << 20)


def _file(url: str) -> Path:
    return Path(url2pathname(urlsplit(url).path))


def _with_password(url: str, page: str) -> str:
    """A user and password in the index's URL also count for files on the same host, as in pip."""
    asked, found = urlsplit(page), urlsplit(url)
    if "@" in asked.netloc and "@" not in found.netloc and asked.hostname == found.hostname:
        return found._replace(netloc=f"{asked.netloc.rpartition('@')[0]}@{found.netloc}").geturl()
    return url


def _shown(url: str) -> str:
    """Without user and password: it goes into messages."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
