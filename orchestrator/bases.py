"""Base models by what a job or an adapter calls them, and the models of bundles, whole or as an adapter on a base.

A bundle can be a base: one job's result is where the next begins. To everything after this it is an ordinary folder, with
config, weights and processor in one place. An adapter's bundle names its base and the digest of the base's content, so
that nobody is answered by an adapter on other weights than it was trained on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import bundle as bundles
from orchestrator import models
from orchestrator.bundle import Bundle
from orchestrator.errors import InputError
from orchestrator.storage import Folder

if TYPE_CHECKING:
    import torch

    from orchestrator.config import ModelSection

SCHEMES = ("run:", "model:")
"""Of bases that are looked up when a run begins (`parents`)."""
_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")

_shared: weakref.WeakValueDictionary[tuple[Any, ...], torch.nn.Parameter] = weakref.WeakValueDictionary()


def based(section: ModelSection) -> ModelSection:
    """The section with a base that `from_pretrained` knows: of a bundle, its plain folder."""
    if section.source.startswith(SCHEMES) or _is_bundle(section.source):
        return section.model_copy(update={"base": local(section.source), "parent": None})
    return section


def local(base: str, revision: str | None = None) -> str:
    """What `models.resolve` says; of a bundle, a local folder with its model and its processor, adapters merged."""
    if base.startswith(SCHEMES):
        raise InputError(f"model.base: {base!r} is looked up when a run begins; here it needs the bundle's folder.")
    if not _is_bundle(base):
        return models.resolve(base, revision)
    loaded = bundles.load(base)
    place = bundles.cache().parent / "plain" / loaded.digest[:32]
    if all(file.exists() for file in place.glob("*")) and (place / "config.json").is_file():
        return str(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="plain-", dir=place.parent) as scratch:
        beside = Path(scratch) / "plain"
        export(loaded, beside, copy=os.symlink)
        shutil.rmtree(place, ignore_errors=True)  # Of links to a bundle that has gone.
        try:
            beside.rename(place)
        except OSError:
            if not (place / "config.json").is_file():  # else another process made the same at the same time
                raise
    return str(place)


def export(bundle: Bundle, folder: Path, *, copy: Callable[[Path, Path], Any] = shutil.copyfile) -> None:
    """Writes the folder that transformers reads: model (adapters merged, label names in its config) and processor in one place."""
    folder.mkdir(parents=True)
    sources = [bundle.processor] if bundle.base is not None else [bundle.model, bundle.processor]
    for source in sources:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                copy(file.absolute(), target)
    if bundle.base is not None:
        import torch

        model: Any = of_bundle(bundle, dtype=torch.float32)
        model.save_pretrained(folder)


# ---- adapters and their base ---------------------------------------------------------------------------------
def named(section: ModelSection) -> dict[str, Any]:
    """What an adapter's bundle says of the base model of a job."""
    return {"base": section.source, "revision": section.revision, "digest": digest(section.source, section.revision)}


def digest(base: str, revision: str | None = None) -> str:
    """SHA-256 of a base's content: of a bundle its own digest, else of the config and the weights, file by file."""
    if _is_bundle(base):
        return bundles.digest(Folder(base))
    from transformers.utils.hub import cached_file

    place = models.resolve(base, revision)

    def file(name: str) -> Path | None:
        found = cached_file(
            place, name, revision=revision, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        return Path(found) if found else None

    found = {name: path for name in _FILES if (path := file(name)) is not None}
    if (index := found.get("model.safetensors.index.json")) is not None:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        found |= {name: path for name in shards if (path := file(name)) is not None}
    content = "".join(f"{name}\0{_file_digest(path)}\n" for name, path in sorted(found.items()))
    return hashlib.sha256(content.encode()).hexdigest()


def of_bundle(bundle: Bundle, *, shared: bool = False, **options: Any) -> torch.nn.Module:
    """The model of a bundle, whole; `options` go to `from_pretrained`.

    An adapter is merged into its base, which is fetched, verified and loaded. With `shared` it stays beside the base's
    weights, so that `share` can give them to other adapters too. Raises `InputError` where the base is gone or another.
    """
    import torch

    if bundle.job.get("model", {}).get("trust_remote_code", False):
        options["trust_remote_code"] = True
    if bundle.base is None:
        with models.quiet():
            return bundle.task.model(str(bundle.model), **options)
    from orchestrator import adapters

    base, revision = bundle.base["base"], bundle.base["revision"]
    try:
        place, found = local(base, revision), digest(base, revision)
    except InputError as error:
        raise InputError(f"The bundle {bundle.name!r} is an adapter on {base!r}, which can't be had: {error}") from error
    if found != bundle.base["digest"]:
        raise InputError(
            f"The bundle {bundle.name!r} is an adapter on {base!r}, which has changed since: its digest is {found[:12]}…, and the adapter was "
            f"trained on {bundle.base['digest'][:12]}…. Put the old one in its place, pin model.revision, or train again."
        )
    if revision is not None and place == base:
        options["revision"] = revision
    with models.explained(bundle.task, base), models.quiet(), torch.random.fork_rng():
        model = bundle.task.model(place, use_safetensors=True, **options)
    wrapped = adapters.attach(model, bundle.adapter)
    return wrapped if shared else models.merged(wrapped)


def share(bundle: Bundle, model: torch.nn.Module) -> torch.nn.Module:
    """`model` (of `of_bundle(bundle, shared=True)`, in its final type and on its device) with the weights of its base in common with
    all others in this process that stand on the same base: many adapters then cost the memory of one base.

    Only equal weights are put in common. They live as long as one of the models does; nobody may write to them.
    """
    import torch

    if bundle.base is None:
        return model
    from orchestrator import anatomy

    where, inner = anatomy.pretrained(model)
    prefix = anatomy.plain_name(f"{where}{getattr(inner, 'base_model_prefix', '')}.")
    for path, module in model.named_modules():
        for name, weight in module._parameters.items():
            full = f"{path}.{name}"
            if weight is None or ".lora_" in full or ".modules_to_save." in full:
                continue
            plain = anatomy.plain_name(full).removeprefix(prefix)  # other classes of the same model have another prefix, or none
            key = (bundle.base["digest"], plain, weight.dtype, tuple(weight.shape), str(weight.device))
            known = _shared.setdefault(key, weight)
            if known is not weight and torch.equal(known, weight):
                module._parameters[name] = known
    return model


@functools.lru_cache(maxsize=256)
def _digest_of(path: str, size: int, modified_ns: int) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _file_digest(path: Path) -> str:
    """Of a file, read once as long as it stays as it is."""
    stat = path.stat()
    return _digest_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def _is_bundle(base: str) -> bool:
    if base.startswith(("package://", "example://", "config://")):
        return False
    return "://" in base or (Path(base).expanduser().is_dir() and bundles.is_bundle(base))
