"""What the data is, by its bytes: equal for equal content, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from orchestrator.catalog import cache_folder
from orchestrator.data.files import SourceFile

REMEMBERED_FROM = 64_000_000
"""Digests of files of so many bytes or more are remembered with their size and time of change."""


def content(file: SourceFile) -> str:
    """SHA-256 of a local file; of size and time of change for one on a store, which isn't read for this."""
    if file.format == "yolo":
        from orchestrator.data import yolo

        return f"{_content(file)}+{hashlib.sha256(yolo.about(file).encode()).hexdigest()}"
    return _content(file)


def _content(file: SourceFile) -> str:
    if not file.is_local:
        return f"{file.size}@{file.modified_ns}"
    status = Path(file.uri).stat()
    if status.st_size < REMEMBERED_FROM:
        return _digest(file.uri)
    key = hashlib.sha256(f"{file.uri}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}".encode()).hexdigest()
    memory = cache_folder() / "digests" / f"{key}.json"
    if memory.is_file():
        return json.loads(memory.read_text())["sha256"]
    digest = _digest(file.uri)
    memory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(f"{memory}.{os.getpid()}.tmp")
    beside.write_text(json.dumps({"sha256": digest, "file": file.uri}))
    os.replace(beside, memory)
    return digest


def _digest(path: str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
