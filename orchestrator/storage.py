"""Folders on any file system that pyarrow knows (local, s3://, gs://, hdfs://, …), with whole-file writes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from orchestrator.errors import InputError


@dataclass(frozen=True)
class Folder:
    """A folder by URI or local path; `folder / "name"` is what lies in it, file or folder."""

    uri: str

    @cached_property
    def _place(self) -> tuple[pafs.FileSystem, str]:
        if "://" not in self.uri:
            return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(self.uri))
        try:
            return pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise InputError(f"storage: {self.uri!r} can't be opened: {error}.") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    @property
    def filesystem(self) -> pafs.FileSystem:
        return self._place[0]

    @property
    def path(self) -> str:
        """The path on `filesystem`: no scheme."""
        return self._place[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.path if self.is_local else self.uri

    def exists(self) -> bool:
        return self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound

    def make(self) -> Folder:
        self.filesystem.create_dir(self.path, recursive=True)
        return self

    def names(self) -> list[str]:
        """What lies in this folder, sorted; empty where there is no such folder."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def delete(self) -> None:
        info = self.filesystem.get_file_info(self.path)
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path)
        elif info.type == pafs.FileType.File:
            self.filesystem.delete_file(self.path)

    def move(self, to: Folder) -> None:
        self.filesystem.move(self.path, to.path)

    def read_bytes(self) -> bytes:
        with self.filesystem.open_input_stream(self.path) as stream:
            return stream.read()

    def write_bytes(self, content: bytes) -> None:
        """The whole file or nothing: written beside it, then renamed (an object store's put is whole by itself)."""
        self.filesystem.create_dir(os.path.dirname(self.path), recursive=True)
        temporary = f"{self.path}.{uuid.uuid4().hex[:8]}.tmp" if self.is_local else self.path
        with self.filesystem.open_output_stream(temporary) as stream:
            stream.write(content)
        if temporary != self.path:
            os.replace(temporary, self.path)

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def write_json(self, value: Any) -> None:
        self.write_bytes(json.dumps(value, indent=2, ensure_ascii=False).encode())

    def to_local(self) -> Path:
        """This folder on the local disk: itself, or a copy in a temporary folder that the caller owns."""
        if self.is_local:
            return Path(self.path)
        target = Path(tempfile.mkdtemp(prefix="orchestrator-"))
        pafs.copy_files(self.path, str(target), source_filesystem=self.filesystem, destination_filesystem=pafs.LocalFileSystem())
        return target

    def put(self, source: Path) -> None:
        """Copies the local folder `source` here: beside first, then renamed, so that a torn copy is never seen."""
        if self.is_local:
            temporary = Path(f"{self.path}.{uuid.uuid4().hex[:8]}.tmp")
            shutil.copytree(source, temporary)
            self.delete()
            os.replace(temporary, self.path)
        else:
            self.filesystem.create_dir(self.path, recursive=True)
            pafs.copy_files(str(source), self.path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self.filesystem)
