"""Transcripts: how they are compared, and the words of chunks that overlap."""

import numpy as np
import pytest

from orchestrator.tasks import transcripts
from orchestrator.tasks.base import RowError
from orchestrator.tasks.transcripts import merged, normalised, of_frames, of_segments, prediction


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Hello,  World!", "hello world"),
        ("It’s 5 o'clock -- 'now'", "it's 5 o'clock now"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("नमस्ते, दुनिया।", "नमस्ते दुनिया"),
        ("你好，世界", "你好 世界"),
        ("😀 ... ♪", ""),
        ("ＡＢＣ", "abc"),
        ("a\r\nb\tc", "a b c"),
    ],
)
def test_texts_are_compared_without_case_and_signs(text: str, same: str) -> None:
    assert normalised(text) == same
    assert normalised(same) == same


def test_a_transcript_says_something() -> None:
    assert transcripts.clean("text", "  A\r\n b ") == "A b"
    assert transcripts.clean("text", 42) == "42"
    for value in (None, "", " ", "...", "😀", float("nan"), True, ["a"], "a\ud800b"):
        with pytest.raises(RowError):
            transcripts.clean("text", value)


@pytest.mark.parametrize(
    ("lowercase", "plain", "found"),
    [(True, True, "hi you"), (True, False, "hi, you!"), (False, True, "Hi You"), (False, False, "Hi, You!")],
)
def test_how_a_model_is_to_write(lowercase: bool, plain: bool, found: str) -> None:
    assert transcripts.written("Hi, You!", lowercase=lowercase, remove_punctuation=plain) == found


# ---- CTC -----------------------------------------------------------------------------------------------------
PIECES = ["", " ", "a", "b", "", "aː"]


def read(ids: list[int], start: float = 0.0, seconds: float = 0.1) -> dict:
    return prediction(merged([of_frames(ids, 0, PIECES, start, start + seconds * len(ids))]))


def test_repeated_outputs_are_one_and_blanks_go() -> None:
    assert read([0, 2, 2, 0, 2, 3, 3, 1, 1, 3, 0])["text"] == "aab b"
    assert read([])["text"] == read([0, 0])["text"] == read([1, 1])["text"] == ""
    assert read([4, 2, 5])["text"] == "aaː"
    assert read([2, 9])["text"] == "a"


def test_words_have_the_times_of_their_frames_and_a_pause_ends_a_segment() -> None:
    found = read([2, 3, 1, *[0] * 10, 2, 2, 1, 3], start=5.0)
    assert found["words"] == [
        {"text": "ab", "timestamp": [5.0, 5.2]},
        {"text": "a", "timestamp": [6.3, 6.5]},
        {"text": "b", "timestamp": [6.6, 6.7]},
    ]
    assert [segment["text"] for segment in found["segments"]] == ["ab", "a b"]


# ---- chunks --------------------------------------------------------------------------------------------------
def speech(words: int, seed: int) -> list[tuple[str, float, float]]:
    rng = np.random.default_rng(seed)
    found, now = [], 0.0
    for _ in range(words):
        length = rng.uniform(0.1, 0.6)
        found.append((str(rng.choice(["press", "one", "two", "to", "the", "for", "and"])), now, now + length))
        now += length + rng.uniform(0.02, 0.3)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_words_of_overlapping_chunks_stand_once(seed: int) -> None:
    """Words few and often repeated; at a chunk's edge half of a word is heard as another."""
    said = speech(60, seed)
    whole, length, overlap = said[-1][2], 6.0, 1.5
    chunks, start = [], 0.0
    while True:
        end = min(start + length, whole)
        heard = [word for word in said if word[1] >= start and word[2] <= end]
        cut = [("uh", max(start, a), min(end, b)) for _, a, b in said if (a < start < b) or (a < end < b)]
        signs: list[tuple[str, float, float]] = []
        for text, a, b in sorted([*heard, *cut], key=lambda word: word[1]):
            each = (b - a) / len(text)
            signs += [(sign, a + place * each, a + (place + 1) * each) for place, sign in enumerate(text)] + [(" ", b, b)]
        chunks.append(transcripts._array(signs, start, end, measured=True))
        if end >= whole:
            break
        start += length - overlap
    found = prediction(merged(chunks))
    assert found["text"] == " ".join(text for text, _, _ in said)
    assert [word["timestamp"][0] for word in found["words"]] == pytest.approx([a for _, a, _ in said], abs=1e-3)


def test_where_times_are_guessed_words_that_agree_join_chunks() -> None:
    one = of_segments([("the quick brown fox jumps over", 0.0, 30.0)], 0.0, 30.0)
    other = of_segments([("fox jumps over the lazy dog", 25.0, 55.0)], 25.0, 55.0)
    assert prediction(merged([one, other]))["text"] == "the quick brown fox jumps over the lazy dog"
    last = of_segments([("Lazy dog.", 50.0, 56.0)], 50.0, 56.0)
    assert prediction(merged([one, other, last]))["text"] == "the quick brown fox jumps over the lazy dog."


def test_silent_chunks_and_chunks_that_agree_on_nothing() -> None:
    silent = of_segments([], 25.0, 55.0)
    one = of_segments([("hello there", 0.0, 10.0)], 0.0, 30.0)
    assert prediction(merged([one, silent]))["text"] == prediction(merged([one]))["text"] == "hello there"
    assert prediction(merged([silent])) == {"text": "", "words": [], "segments": []}
    two = of_segments([("good bye", 40.0, 50.0)], 25.0, 55.0)
    assert prediction(merged([one, two]))["text"] == "hello there good bye"


def test_scripts_without_spaces_are_joined_by_their_characters() -> None:
    one = of_segments([("今天天气很好", 0.0, 30.0)], 0.0, 30.0)
    other = of_segments([("很好我们去", 25.0, 55.0)], 25.0, 55.0)
    assert prediction(merged([one, other]))["text"] == "今天天气很好我们去"
    assert prediction(merged([of_segments([("สวัสดี hello", 0.0, 1.0)], 0.0, 1.0)]))["text"] == "สวัสดี hello"


def test_segments_keep_their_times() -> None:
    found = prediction(merged([of_segments([("one two", 0.0, 2.0), ("", 2.0, 2.5), ("three", 3.0, 4.0)], 0.0, 5.0)]))
    assert found["segments"] == [{"text": "one two", "timestamp": [0.0, 2.0]}, {"text": "three", "timestamp": [3.0, 4.0]}]
