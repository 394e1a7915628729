"""What a sound in a cell is, whoever wrote it; what a client may send; and what augmentation changes."""

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from orchestrator.config import DataSection
from orchestrator.data import files, readers, sources
from orchestrator.data.readers import BadRow
from orchestrator.errors import InputError
from orchestrator.tasks import sounds
from orchestrator.tasks.base import RowError
from orchestrator.tasks.sound_augmentation import SoundAugment
from tests.fixtures.tones import wav, whistle

SOUND = whistle("cab bad")


def clean(value: Any, **limits: float) -> str:
    return sounds.clean("audio", value, **{"longest_s": 60.0, **limits})


def refused(value: Any, says: str, **limits: float) -> None:
    with pytest.raises(RowError, match=says) as raised:
        clean(value, **limits)
    assert raised.value.column == "audio"


# ---- forms ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "subtype", "apart"), [("WAV", "PCM_16", 1e-3), ("FLAC", "PCM_16", 1e-3), ("OGG", "VORBIS", 0.2), ("MP3", None, 0.2)]
)
def test_every_form_of_a_sound_is_the_same_sound(kind: str, subtype: str | None, apart: float, tmp_path: Path) -> None:
    content = wav(SOUND, kind=kind, subtype=subtype)
    path = tmp_path / "a.sound"
    path.write_bytes(content)
    inside = clean(content)
    assert inside.startswith(f"data:audio/{({'MP3': 'mpeg'}).get(kind, kind.lower())};base64,")
    encoded = base64.b64encode(content).decode()
    for form in (
        encoded,
        f"data:;base64,{encoded}",
        f"DATA:audio/x-thing;base64,{encoded}",
        {"bytes": content, "path": "x.wav"},
        bytearray(content),
        inside,
    ):
        assert clean(form) == inside
    assert clean(str(path)) == clean({"path": str(path), "bytes": None}) == str(path)
    assert clean(path.as_uri()) == path.as_uri()
    assert sounds.self_contained("audio", path.as_uri()) == inside == sounds.self_contained("audio", inside)
    for form in (inside, str(path), path.as_uri()):
        found = sounds.load("audio", form, 8000)
        assert abs(found[200 : len(SOUND) - 200] - SOUND[200:-200]).max() < apart
        assert sounds.seconds("audio", form) == pytest.approx(len(SOUND) / 8000, abs=0.15)


def test_samples_are_written_as_a_file_of_16_bits() -> None:
    for array in (SOUND, SOUND.tolist(), np.stack([SOUND, SOUND])):
        found = clean({"array": array, "sampling_rate": 8000, "path": None})
        assert abs(sounds.load("audio", found, 8000) - SOUND).max() < 1e-4
    assert clean(json.dumps({"array": [0.5] * 2000, "sampling_rate": 8000})).startswith("data:audio/wav")


def test_channels_are_mixed_and_rates_changed(tmp_path: Path) -> None:
    stereo = np.stack([SOUND, -SOUND], axis=1)
    assert abs(sounds.load("audio", clean(wav(stereo, subtype="PCM_16")), 8000)).max() < 1e-3
    tone = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100)
    found = sounds.load("audio", clean(wav(tone, 44100, subtype="PCM_16")), 16000)
    wanted = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert found.dtype == np.float32 and len(found) == 16000
    assert abs(found - wanted)[100:-100].max() < 1e-3
    part = sounds.load("audio", clean(wav(tone, 44100, subtype="PCM_16")), 16000, start_s=0.5, most_s=0.25)
    assert len(part) == 4000 and abs(part - wanted[8000:12000])[100:-100].max() < 1e-3


def test_a_sound_of_a_few_samples_is_lengthened_by_silence() -> None:
    found = sounds.load("audio", clean(wav([0.5])), 16000)
    assert len(found) == 1600 and abs(found[800:]).max() < 1e-6


# ---- what is refused -----------------------------------------------------------------------------------------
def test_what_is_no_sound_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is no sound")
    (tmp_path / "folder.wav").mkdir()
    refused(None, "expected a sound, found None")
    refused(float("nan"), "expected a sound")
    refused("", "expected a sound")
    refused(b"", "expected a sound")
    refused({}, "expected a sound")
    refused({"bytes": None, "path": None}, "expected a sound")
    refused([0.1, 0.2], "bytes, path")
    refused(str(tmp_path / "none.wav"), "is there")
    refused(str(tmp_path / "empty.wav"), "wav, flac, mp3 or ogg")
    refused(str(tmp_path / "text.wav"), "wav, flac, mp3 or ogg")
    refused(str(tmp_path / "folder.wav"), "can be opened")
    refused("http://127.0.0.1:9/a.wav", "can be opened")
    refused("data:audio/wav;base64,", "not empty")
    refused("data:audio/wav,RIFF", "data:audio/wav;base64,…")
    refused("data:audio/wav;base64,%%%", "base64")
    refused(b"RIFFxxxxWAVE", "12 bytes")
    refused(wav([]), "not empty")
    refused({"array": [0.1]}, "sampling_rate")
    refused({"array": ["a"], "sampling_rate": 8000}, "numbers")
    refused({"array": [float("nan")], "sampling_rate": 8000}, "finite")
    refused(wav([0.1, float("inf")], subtype="FLOAT"), "finite")


def test_too_long_and_cut_short_ones_are_refused(tmp_path: Path) -> None:
    whole = wav(SOUND, kind="FLAC", subtype="PCM_16")
    refused(whole, r"at most 0\.1 s', found 'one of 0\.4 s|at most 0\.1 s, found 'one of 0\.4 s", longest_s=0.1)
    refused(whole[: len(whole) // 2], "wav, flac, mp3 or ogg")
    refused(wav(SOUND)[:-400], r"ends 0\.1 s before its header says")
    streamed = bytearray(wav(SOUND))  # by a program that did not know how much would follow
    streamed[streamed.index(b"data") + 4 : streamed.index(b"data") + 8] = b"\xff\xff\xff\xff"
    assert clean(bytes(streamed))
    longer = wav(np.tile(SOUND, 10), kind="FLAC", subtype="PCM_16")  # of several frames
    assert clean(longer[: len(longer) - 200], used_s=0.05)


def test_a_client_names_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.wav"
    path.write_bytes(wav(SOUND))
    monkeypatch.setattr(sounds, "Folder", lambda place: pytest.fail(f"opened {place}"))
    for value in (str(path), path.as_uri(), "https://127.0.0.1:9/a.wav", "../a.wav", "/etc/passwd", f"data:{path}", f"data:,{path}"):
        with pytest.raises(InputError):
            sounds.from_client("audio", value, longest_s=60)
    assert sounds.from_client("audio", wav(SOUND), longest_s=60) == sounds.from_client(
        "audio", base64.b64encode(wav(SOUND)).decode(), longest_s=60
    )
    with pytest.raises(InputError, match=r"inputs\[1\].*at most 0\.1 s") as raised:
        sounds.several_from_client(
            "audio", [base64.b64encode(wav([0.1] * 100)).decode(), base64.b64encode(wav(SOUND)).decode()], longest_s=0.1
        )
    assert isinstance(raised.value.__cause__, RowError)  # 422: well-formed and unusable


def test_what_breaks_off_is_told_of_a_client_s_sound_too() -> None:
    whole = wav(np.tile(SOUND, 10), kind="FLAC", subtype="PCM_16")
    for left in (200, len(whole) // 2):
        sent = sounds.from_client("audio", whole[:left], longest_s=60)  # it begins as a sound does
        with pytest.raises(RowError, match="wav, flac, mp3 or ogg"):
            sounds.load("audio", sent, 16_000)


# ---- windows -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("samples", "pieces"), [(1, 1), (1000, 1), (1001, 2), (1800, 2), (1801, 3), (5000, 6)])
def test_windows_cover_a_sound_and_none_lies_in_another(samples: int, pieces: int) -> None:
    sound = np.arange(samples, dtype=np.float32)
    found = sounds.windows(sound, 100, 10.0, 2.0)
    assert len(found) == pieces
    assert {sample for _, piece in found for sample in piece.tolist()} == set(sound.tolist())
    for (start, piece), (after, following) in itertools.pairwise(found):
        assert start + len(piece) / 100 == pytest.approx(after + 2.0)
        assert len(following) > 200


# ---- augmentation --------------------------------------------------------------------------------------------
ALL = {"speed": 0.1, "shift_s": 0.05, "gain_db": 6, "noise_snr_db": [10, 30], "time_masks": 2, "time_mask_s": 0.05, "frequency_masks": 2}


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    change = SoundAugment.parse(ALL)
    one, same, other = (change.of_samples(SOUND, 8000, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and one.dtype == np.float32
    assert len(one) != len(other) or not np.array_equal(one, other)
    assert np.array_equal(SoundAugment().of_samples(SOUND, 8000, np.random.default_rng(1)), SOUND)


@pytest.mark.parametrize("name", ["shift_s", "gain_db", "noise_snr_db", "time_masks", "speed"])
def test_each_change_does_what_it_says(name: str) -> None:
    change = SoundAugment.parse({name: ALL[name]} | ({"time_mask_s": 0.2} if name == "time_masks" else {}))
    for seed in range(20):
        found = change.of_samples(SOUND, 8000, np.random.default_rng(seed))
        assert np.isfinite(found).all() and found.dtype == np.float32
        if name == "speed":
            assert 0.9 <= len(SOUND) / len(found) <= 1.1
            assert len(change.of_samples(SOUND, 8000, np.random.default_rng(seed), most=len(SOUND))) <= len(SOUND)
            continue
        assert len(found) == len(SOUND)
        if name == "gain_db":
            assert 0.49 < abs(found).max() / abs(SOUND).max() < 2.01
        if name == "noise_snr_db":
            ratio = 10 * np.log10(np.mean(SOUND**2) / np.mean((found - SOUND) ** 2))
            assert 9 < ratio < 31
        if name == "time_masks":
            assert (found == 0).mean() < (SOUND == 0).mean() + 0.51


def test_bands_of_a_spectrogram_are_blanked_out() -> None:
    spectrogram = np.random.default_rng(0).normal(size=(40, 100)).astype(np.float32)
    found = SoundAugment.parse({"frequency_masks": 2, "frequency_mask_share": 0.5}).of_spectrogram(
        spectrogram, np.random.default_rng(3), axis=0
    )
    changed = (found != spectrogram).any(axis=1)
    assert 0 < changed.sum() < 40 and np.array_equal(found[~changed], spectrogram[~changed])


def test_a_range_the_wrong_way_round_is_refused() -> None:
    with pytest.raises(InputError, match="must not be above"):
        SoundAugment.parse({"noise_snr_db": [30, 10]})


# ---- where sounds stand in data ------------------------------------------------------------------------------
def table(path: Path, **options: Any) -> list[tuple[int, Any]]:
    section = DataSection.parse({"train": str(path), **options})
    found = []
    for file in files.find(section)["train"]:
        for number, values in readers.records(file, section):
            found.append(
                (
                    number,
                    values
                    if isinstance(values, BadRow)
                    else {name: sources.located(file, one) if name in ("audio", "file_name") else one for name, one in values.items()},
                )
            )
    return found


@pytest.fixture
def libri(tmp_path: Path) -> Path:
    chapter = tmp_path / "LibriSpeech" / "dev" / "84" / "121123"
    chapter.mkdir(parents=True)
    for number in (0, 1):
        soundfile.write(chapter / f"84-121123-000{number}.flac", SOUND, 16000)
    (chapter / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT IN LESS\n\n84-121123-0002 GONE\n")
    (tmp_path / "LibriSpeech" / "README.TXT").write_text("about")
    return tmp_path / "LibriSpeech"


def test_librispeech_is_read_as_it_lies_there(libri: Path) -> None:
    sound = libri / "dev" / "84" / "121123" / "84-121123-0000.flac"
    for options in ({}, {"format": "librispeech"}):
        rows = table(libri, **options)
        assert [number for number, _ in rows] == [1, 2, 4]
        assert rows[0][1] == {"audio": str(sound), "text": "GO DO YOU HEAR", "id": "84-121123-0000", "speaker": "84", "chapter": "121123"}
        assert rows[2][1].column == "audio" and "84-121123-0002" in rows[2][1].expected
    assert clean(rows[0][1]["audio"]) == str(sound)
    for path in libri.rglob("*.trans.txt"):
        path.unlink()
    with pytest.raises(InputError, match=r"no \*\.trans\.txt"):
        table(libri, format="librispeech")


def test_a_folder_with_metadata_is_read_by_it(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "a.wav", SOUND, 8000)
    (tmp_path / "metadata.csv").write_text("file_name,transcription\nclips/a.wav,cab bad\n")
    assert table(tmp_path) == [(2, {"file_name": str(tmp_path / "clips" / "a.wav"), "transcription": "cab bad"})]


def test_base64_in_a_column_is_no_path(tmp_path: Path) -> None:
    encoded = base64.b64encode(wav(SOUND)).decode()
    (tmp_path / "a.jsonl").write_text(json.dumps({"audio": encoded}) + "\n" + json.dumps({"audio": "b.wav"}) + "\n")
    assert [values["audio"] for _, values in table(tmp_path / "a.jsonl")] == [encoded, str(tmp_path / "b.wav")]
