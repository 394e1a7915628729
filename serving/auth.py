"""API keys: read where the endpoint is deployed, sent to replicas as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.config import ServingSection
from orchestrator.errors import InputError
from serving.problem import Problem

ENVIRONMENT = "ORCHESTRATOR_API_KEYS"
MIN_LENGTH = 16
"""Characters of a key: its hash is not salted, so the key itself must be beyond guessing."""


def keys(section: ServingSection) -> list[str]:
    """The API keys that this process knows for `serving.auth`; none: the endpoint is open.

    Raises `InputError` for a file that can't be read, a key too short to be one, and for an endpoint that others can
    reach without a key although `serving.auth` is not `none`.
    """
    if section.auth == "none":
        return []
    if section.auth == "auto":
        found = [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",")]
        source = ENVIRONMENT
    else:
        try:
            lines = Path(section.auth).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(
                f"serving.auth: the key file {section.auth!r} can't be read: {reason}. serving.auth is auto, none or a file with a key a line."
            ) from None
        found = [line.strip() for line in lines if not line.lstrip().startswith("#")]
        source = f"the key file {section.auth!r}"
    found = [key for key in found if key]
    for place, key in enumerate(found, 1):
        if len(key) < MIN_LENGTH or not (key.isascii() and key.isprintable()) or " " in key:
            raise InputError(
                f"serving.auth: key {place} of {source} must have at least {MIN_LENGTH} printable ASCII characters and no space "
                f"(it has {len(key)}); `openssl rand -hex 24` makes a good one."
            )
    if not found and section.auth != "auto":
        raise InputError(f"serving.auth: {source} has no keys; write one a line, or set serving.auth: none.")
    if not found and not is_loopback(section.host):
        raise InputError(
            f"serving.host is {section.host}, which other machines can reach, and there are no API keys. Set {ENVIRONMENT}=KEY[,KEY…] "
            f"or serving.auth to a file with a key a line; or set serving.host: 127.0.0.1, or serving.auth: none to leave the endpoint open."
        )
    return found


def is_loopback(host: str) -> bool:
    """Can only this machine reach `host`?"""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def hashed(key: str) -> str:
    """What replicas and Ray's records see of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """Lets requests in that carry one of the keys whose hashes it knows; all of them where it knows none."""

    def __init__(self, hashes: Sequence[str]):
        self._hashes = tuple(hashes)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def check(self, headers: Mapping[str, str]) -> None:
        """`Problem` 401 unless `headers` has `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
        if not self._hashes:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
        if not given:
            raise self._refused("This endpoint needs an API key: send Authorization: Bearer KEY.")
        # Every hash is compared, whichever fits, so that the time taken says nothing.
        fits = [hmac.compare_digest(hashed(given), known) for known in self._hashes]
        if not any(fits):
            raise self._refused("The API key is not one that this endpoint knows.")

    @staticmethod
    def _refused(sentence: str) -> Problem:
        return Problem(401, "unauthorized", sentence, {"WWW-Authenticate": 'Bearer realm="orchestrator"'})
