"""Where prepared data lies: whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs

from orchestrator.errors import InputError
from orchestrator.records import PreparedData
from orchestrator.storage import Folder

MANIFEST = "manifest.json"


def finished(target: Folder, key: str) -> PreparedData | None:
    """What was prepared in `target`, if it is whole."""
    manifest = target / MANIFEST
    if not manifest.exists():
        return None
    try:
        prepared = PreparedData.parse(manifest.read_json(), str(manifest))
    except (InputError, json.JSONDecodeError):
        return None
    files = [(target / file.path).path for split in prepared.splits.values() for file in split.files]
    if prepared.fingerprint != key or any(info.type != pafs.FileType.File for info in target.filesystem.get_file_info(files)):
        return None
    quarantine = str(target / "quarantine.jsonl") if prepared.quarantine else None
    return prepared.model_copy(update={"root": str(target), "quarantine": quarantine})


@contextlib.contextmanager
def workplace(root: Folder, target: Folder) -> Iterator[Folder]:
    """A folder to build in, which becomes `target` when all went well and is gone when not.

    On a local disk it lies beside `target` and is renamed, so that two processes don't meet. A store has no rename: there
    the files are written in place, equal input giving equal files, and count only once the manifest is there.
    """
    root.make()
    if root.is_local:
        _remove_leftovers(root)
        folder = root / f".{Path(target.path).name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:6]}.tmp"
    else:
        folder = target
        folder.delete()
    try:
        yield folder.make()
        if folder != target:
            target.delete()
            folder.move(target)
    except BaseException:
        folder.delete()
        raise


def _remove_leftovers(root: Folder) -> None:
    """Of builds on this machine whose process has ended."""
    import psutil

    for name in root.names():
        parts = name.rsplit(".", 4)
        if (
            len(parts) == 5
            and parts[-1] == "tmp"
            and parts[1] == socket.gethostname()
            and parts[2].isdigit()
            and not psutil.pid_exists(int(parts[2]))
        ):
            (root / name).delete()
