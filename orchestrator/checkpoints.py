"""Resumable training state in a folder of any storage.

    checkpoints/step-00000120/
        model.safetensors       trained weights and buffers, by name
        optimizer.safetensors   the optimizer's tensors, by weight name
        state.json              where the run stands: step, best so far, identity of the job
        manifest.json           SHA-256 and size of each file above, written last: without it nothing is there

Nothing is pickled. A checkpoint that differs from its manifest is torn; the one before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import InputError, StageError
from orchestrator.storage import Folder

if TYPE_CHECKING:
    import torch

FORMAT = 1
CHUNK = 8 << 20
TRIES = 3
SLACK = 1 << 20
"""Bytes beside the tensors: headers, state.json, the manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose files are what its manifest says."""

    folder: Folder
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of `model` or `optimizer`, on the CPU."""
        import safetensors.torch

        file = self.folder / f"{name}.safetensors"
        return safetensors.torch.load_file(file.path) if file.is_local else safetensors.torch.load(file.read_bytes())


def save(folder: Folder, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Writes `<folder>/checkpoints/step-…` for `state["step"]`: a file for each entry of `tensors`, the manifest last.

    Raises `StageError` where it can't be written, naming the folder and the space.
    """
    place = folder / "checkpoints" / _name(state["step"])
    size = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    require_space(place, size)
    try:
        place.delete()
        place.make()
        files = {f"{name}.safetensors": _write(place / f"{name}.safetensors", named) for name, named in tensors.items()}
        content = json.dumps(dict(state), indent=2, ensure_ascii=False).encode()
        (place / "state.json").write_bytes(content)
        files["state.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (place / "manifest.json").write_json({"format": FORMAT, "files": files})
    except _write_errors() as error:
        raise StageError(f"The checkpoint {str(place)!r} ({_size(size)}) can't be written: {error}. {_space(place)}".rstrip()) from error


def latest(folder: Folder, identity: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint, and a sentence for each newer one that is torn and was passed over.

    Raises `InputError` where it was written by a job of another identity (see `loop.train`).
    """
    torn = []
    for name in reversed(_names(folder)):
        place = folder / "checkpoints" / name
        fault = _fault(place)
        if fault is not None:
            torn.append(f"The checkpoint {str(place)!r} is torn ({fault}), so the one before it is used.")
            continue
        found = Checkpoint(place, (place / "state.json").read_json())
        if found.state["identity"] != identity:
            raise InputError(
                f"The checkpoint {str(place)!r} belongs to another job: it was made from other data or other settings. "
                "Give this job another name or storage, or delete the folder."
            )
        return found, torn
    return None, torn


def at(folder: Folder, step: int) -> Checkpoint | None:
    """The checkpoint of a step, where it is complete."""
    place = folder / "checkpoints" / _name(step)
    return None if _fault(place) is not None else Checkpoint(place, (place / "state.json").read_json())


def best(folder: Folder, identity: str) -> Checkpoint | None:
    """The checkpoint with the best weights: by validation, else the newest. None: there is no complete one."""
    newest, _ = latest(folder, identity)
    if newest is None or newest.state.get("best") is None:
        return newest
    return at(folder, newest.state["best"]["step"])


def prune(folder: Folder, keep: int, best_step: int | None) -> None:
    """Deletes all but the `keep` newest checkpoints and the best one."""
    names = _names(folder)
    for name in names[:-keep]:
        if best_step is None or name != _name(best_step):
            (folder / "checkpoints" / name).delete()


def keep_only(folder: Folder, step: int) -> None:
    """Deletes all checkpoints but that of `step`, of a run that has ended."""
    for name in _names(folder):
        if name != _name(step):
            (folder / "checkpoints" / name).delete()


def take_over(source: Folder, target: Folder, step: int) -> int:
    """Puts another run's checkpoint of `step`, and the best one that it names, in the place of all in `target`.

    Where that one is gone or torn, since its run went on meanwhile, the newest after it is taken; returns the step. On one local
    disk the files are linked, not copied. Raises `StageError` where there is none.
    """
    for _ in range(TRIES):
        steps = [step, *sorted((_step(name) for name in _names(source) if _step(name) > step), reverse=True)]
        found = next(filter(None, (at(source, number) for number in steps)), None)
        if found is None:
            break
        best = (found.state.get("best") or {}).get("step")
        steps = [] if best in (None, found.step) or at(source, best) is None else [best]
        (target / "checkpoints").delete()
        try:
            for number in [*steps, found.step]:
                _link(source / "checkpoints" / _name(number), target / "checkpoints" / _name(number))
        except FileNotFoundError:  # deleted between the look and the copy: there is a newer one now
            continue
        if at(target, found.step) is not None:
            return found.step
    raise StageError(f"There is no complete checkpoint of step {step} or later in {str(source)!r} to go on from.")


def delete_torn(folder: Folder, newest: Checkpoint | None) -> None:
    """Deletes what lies after the newest complete checkpoint: writes that were cut off."""
    for name in _names(folder):
        if newest is None or name > _name(newest.step):
            (folder / "checkpoints" / name).delete()


def require_space(folder: Folder, size: int) -> None:
    """Raises `InputError` where a local disk has less than `size` bytes free for `folder`."""
    if folder.is_local:
        free = shutil.disk_usage(_existing(Path(folder.path))).free
        if free < size + SLACK:
            raise InputError(
                f"The disk of {str(folder)!r} is full: a checkpoint needs {_size(size + SLACK)} and {_size(free)} are free. "
                "Free some space or set storage to another place; the run continues from the checkpoint before."
            )


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _link(source: Folder, target: Folder) -> None:
    """A copy of a checkpoint; nobody writes into its files, so that on one disk two folders can share them."""
    target.make()
    for name in sorted(source.names(), key="manifest.json".__eq__):  # the manifest last, as when it was written
        if source.is_local and target.is_local:
            try:
                os.link((source / name).path, (target / name).path)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                    raise
                shutil.copyfile((source / name).path, (target / name).path)
        else:
            (target / name).write_bytes((source / name).read_bytes())


def _names(folder: Folder) -> list[str]:
    return [name for name in (folder / "checkpoints").names() if re.fullmatch(r"step-\d{8,}", name)]


def _write(file: Folder, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes one safetensors file, through a local file so that its bytes are never in memory as a whole."""
    import safetensors.torch

    if file.is_local:
        temporary = Path(f"{file.path}.tmp")
        safetensors.torch.save_file(dict(tensors), temporary)
        with temporary.open("rb") as stream:
            entry = {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": temporary.stat().st_size}
        temporary.replace(file.path)
        return entry
    with tempfile.TemporaryDirectory(prefix="orchestrator-checkpoint-") as scratch:
        temporary = Path(scratch) / "tensors"
        safetensors.torch.save_file(dict(tensors), temporary)
        digest = hashlib.sha256()
        with temporary.open("rb") as stream, file.filesystem.open_output_stream(file.path) as target:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
        return {"sha256": digest.hexdigest(), "bytes": temporary.stat().st_size}


def _fault(place: Folder) -> str | None:
    """What is wrong with a checkpoint; None: it is complete."""
    try:
        manifest = (place / "manifest.json").read_json()
        files = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return "it has no manifest.json"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its manifest.json is damaged"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')!r}, not {FORMAT}"
    for name, expected in files.items():
        digest, size = hashlib.sha256(), 0
        try:
            with place.filesystem.open_input_stream((place / name).path) as stream:
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
        except FileNotFoundError:
            return f"{name} is missing"
        if (digest.hexdigest(), size) != expected:
            return f"{name} differs from its manifest"
    return None


def _write_errors() -> tuple[type[Exception], ...]:
    import safetensors

    return (OSError, safetensors.SafetensorError)


def _space(place: Folder) -> str:
    return f"{_size(shutil.disk_usage(_existing(Path(place.path))).free)} are free there." if place.is_local else ""


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
