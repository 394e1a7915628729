"""What goes along with a job to a cluster: the product's packages, and the small local files that the job names.

orchestrator/ jobs/ serving/   the product (and the package of a task of the user's own)
job_files/                     what the job names on this machine; as a Python package, since `package://job_files/…`
                               means the same in every process of the cluster, and so does the run's name
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import sysconfig
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator import tasks
from orchestrator.config import JobConfig
from orchestrator.errors import InputError
from orchestrator.progress import Display

MB = 10**6
UPLOAD_BYTES = 20 * MB
"""Most data and model that is sent along with a job; Ray takes 100 MiB in all."""
FILES = "job_files"
PACKAGES = ("orchestrator", "jobs", "serving")
_GLOB = re.compile(r"[*?\[]")


@dataclass
class Upload:
    """What goes along, for the sentence that says so."""

    files: int = 0
    size: int = 0
    named: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Local:
    """What a job names on this machine, to go along: a file, the files of a folder, or (`each`) the matches of a glob."""

    key: str
    """Of the job, for example data.train."""
    root: Path
    files: tuple[Path, ...]
    each: bool = False

    @cached_property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def place(self) -> str:
        """Where `root` lies in `FILES`. Named by its content: the same files make the same run, others another."""
        sha = hashlib.sha256()
        for file in self.files:
            sha.update(f"{file.relative_to(self.root)}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
        return f"{self.key.partition('.')[0]}/{sha.hexdigest()[:12]}/{self.root.resolve().name or 'files'}"

    @property
    def uris(self) -> list[str]:
        """What the job says in its place."""
        inside = [f"/{file.relative_to(self.root)}" for file in self.files] if self.each else [""]
        return [f"package://{FILES}/{self.place}{inner}" for inner in inside]


def stage(job: JobConfig, folder: Path, *, here: bool, sent: Upload, display: Display) -> JobConfig:
    """The job as the cluster can run it: with absolute paths on this machine, else with its files copied into `folder`."""
    locals_: list[_Local] = []

    def moved(key: str, given: str) -> list[str]:
        found = _find(key, given, here=here, display=display)
        if isinstance(found, str):
            return [found]
        locals_.append(found)
        return found.uris

    data: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        given = getattr(job.data, split)
        if given is not None:
            paths = [path for each in ([given] if isinstance(given, str) else given) for path in moved(f"data.{split}", each)]
            data[split] = paths[0] if isinstance(given, str) and len(paths) == 1 else paths
    base = job.model.base
    if "://" not in base and Path(base).expanduser().is_dir():
        base = moved("model.base", base)[0]
        if base.startswith(f"package://{FILES}/") and job.model.lora is not None and job.model.lora.save == "adapter":
            raise InputError(
                f"model.lora.save: an adapter's bundle names its base, and {job.model.base!r} would go along with this job only. Put it where "
                "the endpoint reads it too and name that, or take save: merged."
            )
    staged = job.model_copy(
        update={
            "storage": _storage(job.storage, here=here, display=display),
            "data": job.data.model_copy(update=data),
            "model": job.model.model_copy(update={"base": base}),
        }
    )
    _copy(locals_, folder, sent)
    return staged


def _find(key: str, given: str, *, here: bool, display: Display) -> str | _Local:
    """A path or URI that the cluster can read as it is, or the local files that must go along."""
    if "://" in given:
        return given
    path = Path(given).expanduser()
    if here:
        return os.path.abspath(path)
    if is_glob := bool(_GLOB.search(given)):
        depth = next(index for index, part in enumerate(path.parts) if _GLOB.search(part))
        root = Path(*path.parts[:depth])
        files = tuple(sorted(file for file in root.glob("/".join(path.parts[depth:])) if file.is_file()))
    else:
        root = path
        files = tuple(sorted(file for file in path.rglob("*") if file.is_file())) if path.is_dir() else (path,) if path.is_file() else ()
    if files:
        return _Local(key, root, files, each=is_glob)
    if path.is_absolute():
        display.warn(f"{key}: {given} is not on this machine; it is taken to be on every node of the cluster.")
        return given
    raise InputError(f"{key}: there is no file {given!r} on this machine to send to the cluster.")


def _copy(found: list[_Local], folder: Path, sent: Upload) -> None:
    total = sum(item.size for item in found)
    if total > UPLOAD_BYTES:
        each = ", ".join(f"{item.key} {item.root} ({size_text(item.size)})" for item in found)
        raise InputError(
            f"The job names {size_text(total)} of files on this machine: {each}; up to {size_text(UPLOAD_BYTES)} are sent along. Put them where the "
            "cluster reads them and name that: s3://…, gs://…, a hub id, or file:///path for a file system that all nodes share."
        )
    if found:
        (folder / FILES).mkdir()
        (folder / FILES / "__init__.py").write_text('"""Files that this job names, from the machine that submitted it."""\n')
    for item in found:
        for file in item.files:
            copy = folder / FILES / item.place / file.relative_to(item.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        sent.files += len(item.files)
        sent.size += item.size
        sent.named.append(f"{item.key} ({item.root.name}, {size_text(item.size)})")


def _storage(storage: str, *, here: bool, display: Display) -> str:
    if "://" in storage:
        return storage
    path = Path(storage).expanduser()
    if here:
        return os.path.abspath(path)
    if not path.is_absolute():
        raise InputError(
            f"storage: {storage!r} would be a temporary folder of the cluster. Give what all its nodes share and what outlives it: "
            "--storage s3://bucket/runs, gs://…, or the absolute path of a shared file system."
        )
    display.warn(f"storage: {storage} must be a folder that all nodes of the cluster share.")
    return storage


def stage_packages(job: JobConfig, folder: Path, sent: Upload) -> None:
    """The product's packages, which lie beside each other in a checkout as in site-packages, and the user's own task."""
    beside = Path(__file__).resolve().parent.parent
    sources = {name: beside / name for name in PACKAGES}
    module = job.task.key.partition(":")[0]
    if job.task.key not in tasks.TASKS and module and not module.startswith("orchestrator."):
        sources.update(_own_package(module.partition(".")[0]))
    for name, source in sources.items():
        if source.is_file():
            shutil.copyfile(source, folder / source.name)
        else:
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "node_modules"))
        files = [file for file in ([folder / source.name] if source.is_file() else (folder / name).rglob("*")) if file.is_file()]
        sent.files += len(files)
        sent.size += sum(file.stat().st_size for file in files)


def _own_package(name: str) -> dict[str, Path]:
    """Where the package or module of a user's task lies; nothing for one that is installed, which the cluster must have too."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    origin = Path(places[0]) if places else Path(spec.origin) if spec and spec.origin else None
    if origin is None or any(origin.is_relative_to(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib")):
        return {}
    return {name: origin}


def size_text(size: int) -> str:
    return f"{size / MB:.1f} MB" if size >= MB / 10 else f"{max(size, 1000) / 1000:.0f} kB"
