"""The bundle: what is served. Weights, processor, the completed task and what is needed to trust them, in one folder.

    model/            weights (safetensors) and config; or, of an adapter bundle,
    adapter/          the weights that were trained, and their settings, as PEFT keeps them
    base.json         what it was trained on: `base` and `revision` as a job names them, and `digest` of its content
    processor/        tokenizer or other processor
    task.json         the completed task
    job.json          the job that made it
    environment.json  versions of Python and the libraries
    lineage.json      data fingerprint, git commit, parent model, …
    metrics.json      split -> metric -> value
    golden.json       rows and the predictions that this bundle must give for them
    manifest.json     SHA-256 and size of each file above; written last, so a folder without it is no bundle

A bundle is read only through its manifest: a file that differs from it is an error, and one that it does not name is not
there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from orchestrator import tasks
from orchestrator.errors import InputError, StageError
from orchestrator.storage import Folder
from orchestrator.tasks.base import Task

FORMAT = 1
LIBRARIES = ("accelerate", "numpy", "peft", "pyarrow", "ray", "ray-orchestrator", "safetensors", "tokenizers", "torch", "transformers")

_NAMELESS = re.compile(r"LABEL_\d+")
"""What transformers calls a label of which it doesn't know the name."""
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on the local disk."""

    path: Path
    task: Task
    job: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    golden: list[dict[str, Any]]
    """`{"row": …, "prediction": …}` each; empty until `complete`."""
    lineage: dict[str, Any]
    environment: dict[str, Any]
    digest: str
    """SHA-256 of the manifest, and so of everything in the bundle."""
    base: dict[str, Any] | None = None
    """Of an adapter bundle: `base`, `revision` and `digest` of the model that the adapter belongs on."""

    @property
    def name(self) -> str:
        return f"{self.job.get('name', 'model')}-{self.digest[:8]}"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def processor(self) -> Path:
        return self.path / "processor"


def write(
    folder: Folder,
    *,
    model: Any,
    processor: Any,
    task: Task,
    job: dict[str, Any],
    lineage: dict[str, Any],
    metrics: dict[str, Any],
    base: dict[str, Any] | None = None,
) -> None:
    """Writes the bundle of a trained model; `folder` is replaced, and seen whole or not at all.

    `model` is a plain one, adapters merged; with `base` it is one in adapters, of which only what was trained is written.
    Raises `StageError` where the model doesn't know the names of the task's labels.
    """
    _require_label_names(task, getattr(model, "config", None))
    with tempfile.TemporaryDirectory(prefix="orchestrator-bundle-", dir=_near(folder)) as temporary:
        place = Path(temporary) / "bundle"
        place.mkdir()
        if base is None:
            model.save_pretrained(place / "model")
        else:
            from orchestrator import adapters

            adapters.save(model, place / "adapter", base["base"])
        processor.save_pretrained(place / "processor")
        contents = {
            "task": task.to_json(),
            "job": without_secrets(job),
            "environment": environment(),
            "lineage": without_secrets(lineage),
            "metrics": metrics,
            **({} if base is None else {"base": without_secrets(base)}),
        }
        for name, value in contents.items():
            (place / f"{name}.json").write_bytes(_json(value))
        files = sorted(path for path in place.rglob("*") if path.is_file())
        (place / "manifest.json").write_bytes(_manifest({path.relative_to(place).as_posix(): _entry(path) for path in files}))
        folder.put(place)


def _require_label_names(task: Task, config: Any) -> None:
    """The model answers in other programs too, which read names from its config: LABEL_0 would be all that they know."""
    labels = task.label_names
    names = getattr(config, "id2label", None)
    if not labels or not isinstance(names, dict):
        return
    if nameless := [name for name in names.values() if _NAMELESS.fullmatch(str(name)) and name not in labels]:
        raise StageError(
            f"The task has the labels {', '.join(map(repr, labels[:5]))}{', …' * (len(labels) > 5)}, but the model's config calls one {nameless[0]!r}: "
            "the task must give its label names to the config (id2label, label2id) when it makes the model."
        )
    back = {name: int(place) for name, place in (getattr(config, "label2id", None) or {}).items()}
    if back != {name: int(place) for place, name in names.items()}:
        raise StageError("The model's config says other numbers for labels in label2id than in id2label; the task must set both.")


def complete(folder: Folder, *, metrics: dict[str, dict[str, float]], golden: list[dict[str, Any]]) -> None:
    """Adds the evaluation's metrics and golden rows (`{"row": …, "prediction": …}` each) to a bundle, in place.

    Between the two writes of the manifest it does not name these files, so at every moment the folder is a whole bundle.
    """
    files = _files(folder)
    contents = {
        "metrics.json": _json(metrics),
        "golden.json": _json([{key: entry[key] for key in ("row", "prediction")} for entry in golden]),
    }
    kept = {name: entry for name, entry in files.items() if name not in contents}
    (folder / "manifest.json").write_bytes(_manifest(kept))
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        kept[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (folder / "manifest.json").write_bytes(_manifest(kept))


def load(uri: str) -> Bundle:
    """The bundle in a local folder or at any storage URI (then kept in `cache()`), verified.

    Raises `InputError` where there is none, or one that is torn or was altered, naming the file.
    """
    folder = Folder(uri)
    files = _files(folder)
    if not folder.is_local:
        folder = _download(folder, files)
    path = Path(folder.path)
    _verify(path, files, str(uri))

    def read(name: str, default: Any) -> Any:
        return json.loads((path / name).read_bytes()) if name in files else default

    return Bundle(
        path=path,
        task=tasks.create(read("task.json", None)),
        job=read("job.json", {}),
        metrics=read("metrics.json", {}),
        golden=read("golden.json", []),
        lineage=read("lineage.json", {}),
        environment=read("environment.json", {}),
        base=read("base.json", None),
        digest=digest(Folder(str(path))),
    )


def is_bundle(place: str) -> bool:
    """Whether a local folder or URI is a bundle's, rather than a model's or nothing."""
    folder = Folder(place)
    return (folder / "manifest.json").exists() and (folder / "task.json").exists()


def digest(folder: Folder) -> str:
    """SHA-256 of a bundle's manifest, and so of everything in it."""
    try:
        return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    except FileNotFoundError:
        raise InputError(f"{str(folder)!r} is not a bundle: it has no manifest.json.") from None


def cache() -> Path:
    """Where bundles from remote storage are kept: `ORCHESTRATOR_CACHE`, else `~/.cache/orchestrator`."""
    return Path(os.environ.get("ORCHESTRATOR_CACHE") or Path.home() / ".cache" / "orchestrator") / "bundles"


def environment() -> dict[str, Any]:
    """Versions of what made a bundle."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"python": platform.python_version(), "platform": platform.platform(), "libraries": versions}


def without_secrets(value: Any) -> Any:
    """A copy of a JSON value in which no URI carries a user or password."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return _CREDENTIALS.sub("", value) if isinstance(value, str) else value


def _files(folder: Folder) -> dict[str, dict[str, Any]]:
    """What the manifest names: path in the bundle -> sha256 and bytes."""
    try:
        content = (folder / "manifest.json").read_bytes()
    except FileNotFoundError:
        state = "it has no manifest.json, so it was never finished or is something else" if folder.exists() else "there is nothing"
        raise InputError(f"{str(folder)!r} is not a bundle: {state}.") from None
    except OSError as error:
        raise InputError(f"The bundle {str(folder)!r} can't be read: {error}.") from None
    try:
        manifest = json.loads(content)
        version, files = manifest["format"], manifest["files"]
        named = [(name, entry["sha256"], entry["bytes"]) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"The bundle {str(folder)!r} is damaged: its manifest.json is not a manifest.") from None
    if version != FORMAT:
        raise InputError(f"The bundle {str(folder)!r} has format {version}; this version of the orchestrator reads format {FORMAT}.")
    for name, _, _ in named:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"The bundle {str(folder)!r} is damaged: its manifest names {name!r}, which lies outside it.")
    return files


def _verify(path: Path, files: dict[str, dict[str, Any]], where: str) -> None:
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise InputError(f"The bundle {where!r} is torn: {name} is missing.")
        found = _entry(file)
        if found["bytes"] != entry["bytes"]:
            raise InputError(
                f"The bundle {where!r} is torn or was altered: {name} has {found['bytes']:,} bytes, its manifest says {entry['bytes']:,}."
            )
        if found["sha256"] != entry["sha256"]:
            raise InputError(f"The bundle {where!r} was altered: {name} differs from its manifest.")


def _download(folder: Folder, files: dict[str, dict[str, Any]]) -> Folder:
    """A local copy, by the manifest's digest; one that is there already is used where it is whole."""
    place = cache() / hashlib.sha256(_manifest(files)).hexdigest()[:32]
    if place.is_dir():
        try:
            _verify(place, files, str(place))
            return Folder(str(place))
        except InputError:
            shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=place.parent) as temporary:
        copy = Path(temporary) / "bundle"
        pafs.copy_files(folder.path, str(copy), source_filesystem=folder.filesystem, destination_filesystem=pafs.LocalFileSystem())
        _verify(copy, files, str(folder))
        with contextlib.suppress(OSError):  # Another process brought the same bundle here first: then theirs is used.
            copy.rename(place)
    return Folder(str(place))


def _near(folder: Folder) -> str | None:
    """Scratch space: where a local bundle will lie, since the default temporary folder may be small."""
    if not folder.is_local:
        return None
    parent = Path(folder.path).parent
    parent.mkdir(parents=True, exist_ok=True)
    return str(parent)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _manifest(files: dict[str, dict[str, Any]]) -> bytes:
    return _json({"format": FORMAT, "files": dict(sorted(files.items()))})


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).encode()
