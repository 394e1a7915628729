"""Which files a `data.train` (or validation, test) means: paths, globs, folders, lists; local or on any store."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import pyarrow as pa
import pyarrow.fs as pafs

from orchestrator import catalog
from orchestrator.config import DataSection
from orchestrator.errors import InputError, nearest
from orchestrator.schema import Schema

SPLITS = ("train", "validation", "test")

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    **dict.fromkeys((".conll", ".conllu", ".bio", ".iob", ".iob2"), "conll"),
}
MEDIA = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff"), "audio"),
    ".txt": "text",
}
"""What a file of a folder per class is, by its ending."""
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
"""What the splits of a saved `datasets.DatasetDict` are called."""
TRANSCRIPTS = ".trans.txt"
"""Ending of the files that have LibriSpeech's transcripts."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables about the images or sounds that lie beside them, by the convention of `datasets`' ImageFolder and AudioFolder."""


class SourceFile(Schema):
    """One file to read."""

    uri: str
    """Local absolute path, or a URI."""
    name: str
    """How rows and messages call it: relative to the folder that all files of the job share."""
    format: str
    compression: str | None = None
    size: int
    """Bytes as stored."""
    modified_ns: int | None = None
    label: str | None = None
    """The class, for `folder` data: the name of the file's folder."""

    def beside(self, path: str) -> str:
        """The path or URI of a file that this one names: relative to the folder that this one lies in."""
        if "://" in path or path.startswith(("/", "data:")):
            return path
        folder = self.uri.rpartition("/")[0]
        return f"{folder}/{path}" if "://" in self.uri else os.path.normpath(f"{folder}/{path}")

    def names_beside(self) -> list[str]:
        """What else lies in its folder."""
        filesystem, path = place(self.uri)
        return [info.base_name for info in filesystem.get_file_info(pafs.FileSelector(posixpath.dirname(path)))]

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    def open_stream(self) -> pa.NativeFile:
        """The content in order, decompressed."""
        filesystem, path = place(self.uri)
        try:
            return filesystem.open_input_stream(path, compression=self.compression)
        except FileNotFoundError:
            raise self._gone() from None

    def open_random(self) -> pa.NativeFile:
        """The content for formats whose index stands at the end."""
        filesystem, path = place(self.uri)
        try:
            return filesystem.open_input_file(path)
        except FileNotFoundError:
            raise self._gone() from None

    def _gone(self) -> InputError:
        if not self.is_local:
            return InputError(f"{self.uri} is gone: it was there when the job began.")
        import socket

        return InputError(
            f"{self.uri} is not on {socket.gethostname()}, where it was to be read: put the data on storage that every node of the cluster reads."
        )


@dataclass(frozen=True)
class _Found:
    """A path on a file system, before it has a name."""

    uri: str
    path: str
    size: int
    modified_ns: int | None
    format: str
    compression: str | None
    label: str | None = None


def find(section: DataSection) -> dict[str, list[SourceFile]]:
    """Split -> its files, in reading order, for the splits that have files of their own.

    A folder saved by `datasets.DatasetDict` in `data.train` brings its validation and test splits along, unless the
    job names others. Raises `InputError` for whatever isn't there or can't be read by its name.
    """
    found: dict[str, list[_Found]] = {}
    for split in SPLITS:
        asked = getattr(section, split)
        if asked is not None:
            found[split] = _files(section, split, asked)
        elif isinstance(section.train, str) and (inner := _dict_split(catalog.local_path(section.train), split)):
            found[split] = _files(section, split, inner)
    everything = [file for files in found.values() for file in files]
    names = dict(zip((file.uri for file in everything), _names(everything), strict=True))
    return {
        split: [
            SourceFile(
                uri=file.uri,
                name=names[file.uri],
                format=file.format,
                compression=file.compression,
                size=file.size,
                modified_ns=file.modified_ns,
                label=file.label,
            )
            for file in files
        ]
        for split, files in found.items()
    }


@contextlib.contextmanager
def called(name: str) -> Iterator[None]:
    """What is wrong with `data.train` is said of `name`: the argument of a command whose user wrote no job file."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith("data.train"):
            raise
        raise InputError(name + str(error).removeprefix("data.train")) from None


def place(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path on it. Also `hf://`, through huggingface_hub."""
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if not scheme:
        return _file_system(""), uri
    if scheme == "hf":
        return _file_system("hf"), uri.removeprefix("hf://")
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise InputError(
            f"{uri!r} can't be opened: {error}. There is local, file://, s3://, gs://, hdfs://, hf://, package://, example://."
        ) from None


@cache
def _file_system(scheme: str) -> pafs.FileSystem:
    if not scheme:
        return pafs.LocalFileSystem()
    from huggingface_hub import HfFileSystem

    return pafs.PyFileSystem(pafs.FSSpecHandler(HfFileSystem()))


# ---- what a path means ---------------------------------------------------------------------------------------
def _files(section: DataSection, split: str, asked: str | Sequence[str]) -> list[_Found]:
    every: dict[str, _Found] = {}
    for one in [asked] if isinstance(asked, str) else asked:
        for file in _expand(section, split, one):
            every.setdefault(file.uri, file)
    if not every:
        raise InputError(f"data.{split} is an empty list; it needs at least one file.")
    formats = sorted({file.format for file in every.values()})
    if len(formats) > 1:
        examples = {file.format: posixpath.basename(file.path) for file in every.values()}
        listed = ", ".join(f"{name} ({examples[name]})" for name in formats)
        raise InputError(
            f"data.{split} mixes formats: {listed}. Name the files of one format, for example by a glob such as *.{formats[0]}."
        )
    return list(every.values())


def _expand(section: DataSection, split: str, asked: str) -> list[_Found]:
    uri = catalog.local_path(asked)
    if "://" not in uri:
        uri = os.path.abspath(os.path.expanduser(uri))
    if uri.startswith("file://"):
        uri = place(uri)[1]
    filesystem, path = place(uri)
    prefix = uri.removesuffix(path)
    where = f"data.{split}"
    try:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [_found(section, where, prefix, info)]
        if info.type == pafs.FileType.Directory:
            return _folder(section, split, filesystem, prefix, info.path, asked)
        if any(sign in path for sign in "*?["):
            matches = [match for match in _glob(filesystem, path) if match.type == pafs.FileType.File]
            if not matches:
                raise InputError(f"{where}: no file matches {asked!r}.{_nearby(filesystem, path)}")
            return [_found(section, where, prefix, match) for match in sorted(matches, key=lambda match: match.path)]
    except OSError as error:
        raise InputError(f"{where}: {asked!r} can't be read: {error}.") from None
    raise InputError(f"{where}: there is no file {asked!r}.{_nearby(filesystem, path)}")


def _found(section: DataSection, where: str, prefix: str, info: pafs.FileInfo) -> _Found:
    name = posixpath.basename(info.path)
    kind, compression = _kind(name)
    kind = section.format or kind
    if kind == "yolo" and media_kind(name) != "image":
        raise InputError(f"{where}: {info.path!r} is no image; format yolo needs images, or the folder that has them in images/.")
    if kind == "folder":
        raise InputError(
            f"{where}: {info.path!r} is a file; format folder needs a folder that has one folder of texts, images or sounds for each class."
        )
    if kind is None:
        known = ", ".join(FORMATS)
        raise InputError(f"{where}: the ending of {name!r} names no known format ({known}, each also with .gz); say it with data.format.")
    if compression and kind in ("parquet", "arrow"):
        raise InputError(f"{where}: {name!r} is compressed; {kind} files compress inside, unpack it.")
    return _Found(prefix + info.path, info.path, info.size, info.mtime_ns, kind, compression)


def _kind(name: str) -> tuple[str | None, str | None]:
    """Format and compression by the ending of a file name."""
    stem, ending = posixpath.splitext(name.lower())
    compression = COMPRESSIONS.get(ending)
    if compression:
        ending = posixpath.splitext(stem)[1]
    return FORMATS.get(ending), compression


def _folder(section: DataSection, split: str, filesystem: pafs.FileSystem, prefix: str, path: str, asked: str) -> list[_Found]:
    where = f"data.{split}"
    saved = _saved_dataset(filesystem, path, split, where)
    if saved is not None:
        infos = filesystem.get_file_info(saved)
        return [_Found(prefix + info.path, info.path, info.size, info.mtime_ns, "arrow", None) for info in infos]
    listed = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    files = [info for info in listed if info.type == pafs.FileType.File and not _hidden(_relative(info.path, path))]
    files.sort(key=lambda info: info.path)
    if section.format == "yolo":
        return _yolo(where, split, prefix, path, files)
    if section.format == "coco":
        named = [_relative(info.path, path) for info in files if info.base_name.lower().endswith((".json", ".json.gz"))]
        hint = f"name it, as in {asked.rstrip('/')}/{named[0]}" if named else "and there is none in it"
        raise InputError(f"{where}: {asked!r} is a folder; format coco needs the JSON file that lists the images and their boxes: {hint}.")
    if section.format in (None, "librispeech") and (found := [info for info in files if info.base_name.endswith(TRANSCRIPTS)]):
        return [_Found(prefix + info.path, info.path, info.size, info.mtime_ns, "librispeech", None) for info in found]
    if section.format == "librispeech":
        raise InputError(
            f"{where}: there is no *{TRANSCRIPTS} in {asked!r}; format librispeech needs SPEAKER/CHAPTER/ with transcripts beside the sounds."
        )
    if found := _metadata(section, files):
        return [_found(section, where, prefix, info) for info in found]
    kinds = {media_kind(info.base_name) for info in files}
    nested = all("/" in _relative(info.path, path) for info in files)
    if section.format == "folder" or (section.format is None and files and nested and None not in kinds):
        chosen = files
        if len(kinds) > 1:
            listed = ", ".join(sorted(kind or "something else" for kind in kinds))
            raise InputError(f"{where}: the folders of {asked!r} mix {listed}; format folder takes files of one kind.")
        loose = [info.base_name for info in chosen if "/" not in _relative(info.path, path)]
        if loose:
            raise InputError(
                f"{where}: {loose[0]!r} lies in {asked!r} itself; format folder needs one folder for each class, with its files in it."
            )
        if not chosen:
            raise InputError(f"{where}: there are no files in the folders of {asked!r}.")
        return [
            _Found(
                prefix + info.path,
                info.path,
                info.size,
                info.mtime_ns,
                "folder",
                _kind(info.base_name)[1],
                _relative(info.path, path).split("/")[0],
            )
            for info in chosen
        ]
    if not files:
        raise InputError(f"{where}: the folder {asked!r} has no files.")
    other = [info for info in files if section.format is None and _kind(info.base_name)[0] is None]
    if other:
        endings = Counter(posixpath.splitext(info.base_name)[1] for info in files if _kind(info.base_name)[0])
        usual = next((ending for ending, _ in endings.most_common(1)), None)
        hint = f"a glob such as {asked.rstrip('/')}/*{usual}" if usual else "the files, and their format with data.format"
        raise InputError(f"{where}: in the folder {asked!r}, {_relative(other[0].path, path)!r} has no known format; name {hint}.")
    return [_found(section, where, prefix, info) for info in files]


def _metadata(section: DataSection, files: Sequence[pafs.FileInfo]) -> list[pafs.FileInfo]:
    """The tables of a folder that has nothing else but images or sounds, to which their rows point; of one format where there are several."""
    tables = [info for info in files if info.base_name.lower() in METADATA and section.format in (None, _kind(info.base_name)[0])]
    others = [info for info in files if info.base_name.lower() not in METADATA]
    if not tables or not others or any(media_kind(info.base_name) not in ("image", "audio") for info in others):
        return []
    return tables


def _yolo(where: str, split: str, prefix: str, path: str, files: Sequence[pafs.FileInfo]) -> list[_Found]:
    """The images of a folder; of one that has images/ (with a folder for each split in it, perhaps) those in there."""
    images = {_relative(info.path, path): info for info in files if media_kind(info.base_name) == "image"}
    for inner in [*(f"images/{name}/" for name in SPLIT_NAMES[split]), "images/"]:
        if some := {name: info for name, info in images.items() if name.startswith(inner)}:
            images = some
            break
    if not images:
        raise InputError(f"{where}: there is no image in {path!r}; format yolo needs images in images/, and their boxes in labels/.")
    return [_Found(prefix + info.path, info.path, info.size, info.mtime_ns, "yolo", None) for info in images.values()]


def media_kind(name: str) -> str | None:
    """text, image or audio by the ending of a file's name; None for any other."""
    return MEDIA.get(posixpath.splitext(name.lower().removesuffix(".gz"))[1])


def _relative(path: str, folder: str) -> str:
    return path[len(folder.rstrip("/")) + 1 :]


def _hidden(relative: str) -> bool:
    """Not data: `.git/…`, `_SUCCESS`, `README.md`, `LICENSE`, the index files that stores and `datasets` write."""
    parts = relative.split("/")
    name = parts[-1].lower()
    return (
        any(part.startswith((".", "_")) for part in parts)
        or name.endswith((".md", ".tmp", ".crc"))
        or name.split(".")[0] in ("readme", "license", "licence", "copying")
        or name in ("dataset_info.json", "dataset_infos.json", "state.json")
    )


def _saved_dataset(filesystem: pafs.FileSystem, path: str, split: str, where: str) -> list[str] | None:
    """The Arrow files of a folder written by `datasets`' `save_to_disk`; None where it is no such folder."""
    names = {info.base_name: info for info in filesystem.get_file_info(pafs.FileSelector(path))}
    if "dataset_dict.json" in names:
        splits = _read_json(filesystem, f"{path}/dataset_dict.json").get("splits", [])
        chosen = next((name for name in SPLIT_NAMES[split] if name in splits), None)
        if chosen is None:
            raise InputError(
                f"{where}: the saved data set {path!r} has no split {split!r}; it has {', '.join(map(repr, splits))}: name one, as in {path}/{splits[0] if splits else 'train'}."
            )
        return _saved_dataset(filesystem, f"{path}/{chosen}", split, where)
    if "state.json" in names and "dataset_info.json" in names:
        return [f"{path}/{entry['filename']}" for entry in _read_json(filesystem, f"{path}/state.json")["_data_files"]]
    return None


def _dict_split(uri: str, split: str) -> str | None:
    """The folder of a split within a saved DatasetDict, where `uri` is one and has it."""
    if "://" not in uri:
        uri = os.path.abspath(os.path.expanduser(uri))
    if any(sign in uri for sign in "*?["):
        return None
    filesystem, path = place(uri)
    index = f"{path.rstrip('/')}/dataset_dict.json"
    if filesystem.get_file_info(index).type != pafs.FileType.File:
        return None
    splits = _read_json(filesystem, index).get("splits", [])
    return next((f"{uri.rstrip('/')}/{name}" for name in SPLIT_NAMES[split] if name in splits), None)


def _read_json(filesystem: pafs.FileSystem, path: str) -> dict:
    with filesystem.open_input_stream(path) as stream:
        return json.loads(stream.read())


def _glob(filesystem: pafs.FileSystem, pattern: str) -> Iterator[pafs.FileInfo]:
    """Files that match; `*`, `?` and `[…]` stay within a folder, `**` stands for any folders."""
    parts = pattern.split("/")
    fixed = next(index for index, part in enumerate(parts) if any(sign in part for sign in "*?["))
    yield from _descend(filesystem, "/".join(parts[:fixed]) or "/", parts[fixed:])


def _descend(filesystem: pafs.FileSystem, folder: str, parts: Sequence[str]) -> Iterator[pafs.FileInfo]:
    head, *rest = parts
    entries = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    if head == "**":
        yield from _descend(filesystem, folder, rest or ["*"])
        for entry in entries:
            if entry.type == pafs.FileType.Directory and not entry.base_name.startswith("."):
                yield from _descend(filesystem, entry.path, parts)
        return
    for entry in entries:
        if fnmatch.fnmatchcase(entry.base_name, head) and (head.startswith(".") or not entry.base_name.startswith(".")):
            if not rest:
                yield entry
            elif entry.type == pafs.FileType.Directory:
                yield from _descend(filesystem, entry.path, rest)


def _nearby(filesystem: pafs.FileSystem, path: str) -> str:
    """` In 'folder' there is …`: what lies where the path stops existing, the most similar names first."""
    missing = path.rstrip("/")
    folder = posixpath.dirname(missing)
    while folder not in ("", "/") and filesystem.get_file_info(folder).type != pafs.FileType.Directory:
        missing, folder = folder, posixpath.dirname(folder)
    entries = filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    names = nearest(posixpath.basename(missing), [entry.base_name for entry in entries if not entry.base_name.startswith(".")])
    if not names:
        return f" The folder {folder!r} is empty."
    if difflib.SequenceMatcher(None, posixpath.basename(missing).lower(), names[0].lower()).ratio() >= 0.8:
        return f" Did you mean {posixpath.join(folder, names[0])!r}?"
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f" In {folder!r} there is {', '.join(map(repr, names[:5]))}{more}."


def _names(files: Sequence[_Found]) -> list[str]:
    """A name for each file, unique and short: its path below the deepest folder that all share."""
    if len({file.uri.removesuffix(file.path) for file in files}) > 1:
        return [file.uri for file in files]
    folders = [posixpath.dirname(file.path) for file in files]
    if any(file.label is not None for file in files):
        # The class stays part of the name even where there is only one.
        folders = [posixpath.dirname(folder) for folder in folders]
    common = posixpath.commonpath(folders)
    shared = len(common.rstrip("/").split("/")) if common else 0
    return ["/".join(file.path.split("/")[shared:]) for file in files]
