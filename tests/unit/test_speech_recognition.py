"""Speech recognition: vocabularies, labels, chunks and answers; and a model that learns to read whistled letters."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator import bundle, predictor, processors
from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks import create
from orchestrator.tasks.base import RowError
from orchestrator.tasks.sound_processor import character_tokenizer
from tests.fixtures import tiny_sounds
from tests.fixtures.tones import data_uri, wav, whistle


def task(**given: Any) -> Any:
    return create({"name": "speech-recognition", **given})


def row(text: str) -> dict[str, Any]:
    return {"audio": data_uri(text), "text": text}


def fitted(rows: list[dict[str, Any]], **given: Any) -> Any:
    made = task(**given)
    return made.fit({"train": made.observe([made.clean(one) for one in rows])})


# ---- vocabularies --------------------------------------------------------------------------------------------
def test_the_vocabulary_is_that_of_the_training_rows(tmp_path: Path) -> None:
    made = fitted([{**row("cab"), "text": "Cab, d’abad - 7 É!"}])
    assert made.characters == ("'", "7", "a", "b", "c", "d", "é")
    processor = made.processor(tiny_sounds.wave_base(tmp_path / "base"))
    assert processor.pieces() == ["", " ", "'", "7", "a", "b", "c", "d", "é", ""]
    [[example]] = made.encode([made.clean({**row("cab"), "text": "BAD Z É"})], processor)
    assert [processor.pieces()[place] for place in example["labels"]] == ["b", "a", "d", " ", "", " ", "é"]
    model = made.model(str(tmp_path / "base"), dtype=torch.float32)
    assert model.config.vocab_size == model.lm_head.out_features == 10 and model.config.pad_token_id == 0


def test_a_base_that_writes_keeps_its_vocabulary_and_its_case(tmp_path: Path) -> None:
    from transformers import Wav2Vec2ForCTC

    base = tiny_sounds.wave_base(tmp_path / "base", vocab_size=6)
    character_tokenizer("ABC").save_pretrained(base)
    torch.manual_seed(1)
    Wav2Vec2ForCTC.from_pretrained(base).save_pretrained(base)
    made = fitted([row("cab")])
    processor, model = made.processor(base), made.model(base, dtype=torch.float32)
    assert processor.pieces() == ["", " ", "A", "B", "C", ""]
    assert torch.equal(model.lm_head.weight, Wav2Vec2ForCTC.from_pretrained(base).lm_head.weight)
    [[example]] = made.encode([made.clean(row("cab"))], processor)
    assert example["labels"] == [4, 2, 3]
    assert fitted([row("cad")], vocabulary="data").processor(base).pieces() == ["", " ", "a", "c", "d", ""]


def test_characters_that_no_training_row_has_are_counted() -> None:
    made = fitted([row("cab")])
    rows = [{"text": "cab a"}, {"text": "Dad d"}]
    predictions = [{"text": "cab"}, {"text": "dab d"}]
    tables = made.tables(predictions, rows)
    assert tables["unseen_characters"] == [{"character": "d", "times": 3}]
    assert tables["transcripts"][1] == {"text": "Dad d", "predicted": "dab d", "wer": 0.5, "cer": 0.2}
    assert "unseen_characters" not in made.tables(predictions[:1], rows[:1])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"chunk_length_s": 4, "chunk_overlap_s": 3}, "at most half"),
        ({"characters": ["ab"]}, "single ones"),
        ({"augment": {"sped": 1}}, "speed"),
        ({"num_beams": 0}, "num_beams"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        task(**given)


def test_nothing_to_learn_is_said() -> None:
    with pytest.raises(InputError, match="no rows"):
        task().fit({})
    with pytest.raises(InputError, match="None of the 2 training rows has a transcript"):
        task().fit({"train": task().observe([{"audio": "a"}, {"audio": "b"}])})
    with pytest.raises(RowError, match="letter or digit"):
        task().clean({**row("a"), "text": "?!"})


# ---- bases ---------------------------------------------------------------------------------------------------
def test_bases_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="'bert' model, which writes no transcripts"):
        task().check_base(str(tmp_path / "bert"))
    english = tiny_sounds.whisper_base(tmp_path / "en")
    fits = {"max_new_tokens": 20}
    assert task(**fits, language="en").check_base(english)
    for given, says in (
        ({"language": "de"}, "knows English only"),
        ({"translate": True}, "knows English only"),
        ({"chunk_length_s": 3}, "at most 2 s"),
        ({"max_new_tokens": 100}, "at most 60 tokens"),
    ):
        with pytest.raises(InputError, match=says):
            task(**{**fits, **given}).check_base(english)
    every = tiny_sounds.whisper_base(tmp_path / "every", multilingual=True)
    assert task(**fits, language="de").check_base(every)
    for language, says in ((None, "must be told the language"), ("dee", "Did you mean 'de'")):
        with pytest.raises(InputError, match=says):
            task(**fits, language=language).check_base(every)


def test_a_multilingual_whisper_is_told_language_and_task(tmp_path: Path) -> None:
    base = tiny_sounds.whisper_base(tmp_path, multilingual=True)
    made = task(language="de", translate=True, max_new_tokens=8, chunk_length_s=1.0)
    processor, model = made.processor(base), made.model(base, dtype=torch.float32)
    tokens = processor.tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|de|>", "<|translate|>", "<|notimestamps|>"])
    [[example]] = made.encode([made.clean(row("cab"))], processor)
    end = processor.tokenizer.eos_token_id
    assert example["labels"] == [*tokens, -1, *processor.tokenizer(" cab").input_ids, end]
    assert model.generation_config.language == "de" and model.generation_config.task == "translate"
    batch = made.collate([example], processor)
    asked = []
    forward = model.model.decoder.forward
    model.model.decoder.forward = lambda *args, **kwargs: asked.append(kwargs["input_ids"]) or forward(*args, **kwargs)
    model.eval()
    made.infer(model, batch)
    assert asked[0].tolist() == [tokens]


# ---- losses --------------------------------------------------------------------------------------------------
def test_the_loss_of_ctc_is_that_of_transformers(tmp_path: Path) -> None:
    base = tiny_sounds.wave_base(tmp_path, "layer")
    rows = [row("cab bad"), row("a"), row("bad a dab")]
    made = fitted(rows)
    processor, model = made.processor(base), made.model(base, dtype=torch.float32).eval()
    batch = made.collate([its[0] for its in made.encode([made.clean(one) for one in rows], processor)], processor)
    total, items = made.loss(model, batch)
    theirs = model(**{name: batch[name] for name in ("input_values", "attention_mask", "labels")}).loss
    assert model.config.ctc_loss_reduction == "sum"
    assert total.item() == pytest.approx(theirs.item(), rel=1e-5) and items == 7 + 1 + 9
    with pytest.raises(InputError, match="label_smoothing"):
        made.loss(model, batch, label_smoothing=0.1)


def test_a_transcript_longer_than_the_frames_counts_nothing(tmp_path: Path) -> None:
    base = tiny_sounds.wave_base(tmp_path, "layer")
    rows = [row("cab"), {**row("a"), "text": "ab" * 200}]
    made = fitted(rows)
    processor, model = made.processor(base), made.model(base, dtype=torch.float32).eval()
    examples = [its[0] for its in made.encode([made.clean(one) for one in rows], processor)]
    both, items = made.loss(model, made.collate(examples, processor))
    alone, its = made.loss(model, made.collate(examples[:1], processor))
    assert (items, its) == (3, 3) and both.item() == pytest.approx(alone.item(), rel=1e-5)


def test_a_transcript_of_more_tokens_than_are_written_is_counted_as_cut(tmp_path: Path) -> None:
    made = fitted([row("cab")], max_new_tokens=4)
    processor = made.processor(tiny_sounds.whisper_base(tmp_path))
    [[short], [long]] = made.encode([row("c"), row("cab bad dab")], processor)
    assert (short["truncated"], long["truncated"]) == (False, True)


def test_the_loss_of_whisper_is_that_of_transformers_after_the_prompt(tmp_path: Path) -> None:
    base = tiny_sounds.whisper_base(tmp_path)
    made = fitted([row("cab bad"), row("a")], max_new_tokens=20)
    processor, model = made.processor(base), made.model(base, dtype=torch.float32).eval()
    batch = made.collate([its[0] for its in made.encode([row("cab bad"), row("a")], processor)], processor)
    total, items = made.loss(model, batch)
    labels = torch.full((2, 11), -100)
    for place, text in enumerate((" cab bad", " a")):
        ids = processor.tokenizer(text).input_ids
        labels[place, 1 : len(ids) + 2] = torch.tensor([*ids, processor.tokenizer.eos_token_id])
    inputs = torch.full((2, 11), processor.tokenizer.eos_token_id)
    inputs[:, 0] = processor.prompt(None, "")[0]
    inputs[:, 1] = processor.prompt(None, "")[1]
    inputs[:, 2:] = labels[:, 1:-1].clamp(min=0)
    theirs = model(input_features=batch["input_features"], decoder_input_ids=inputs, labels=labels).loss
    assert items == 9 + 3
    assert total.item() / items == pytest.approx(theirs.item(), rel=1e-5)


# ---- chunks --------------------------------------------------------------------------------------------------
def test_a_long_sound_is_many_examples_one_answer_and_not_learnt_from(tmp_path: Path) -> None:
    base = tiny_sounds.wave_base(tmp_path)
    made = fitted([row("cab bad")], chunk_length_s=0.5, chunk_overlap_s=0.1)
    processor, model = made.processor(base), made.model(base, dtype=torch.float32).eval()
    short, long = made.encode([made.clean(row("cab")), made.clean(row("cab bad bad cab"))], processor)
    assert [example["truncated"] for example in short + long] == [False, True, True]
    assert [example["span"] for example in long] == [(0.0, 0.5), (0.4, 0.9)]
    assert [bool(example["labels"]) for example in short + long] == [True, False, False]
    total, items = made.loss(model, made.collate(long, processor))
    total.backward()
    assert (total.item(), items) == (0.0, 0.0)
    [both] = [made.loss(model, made.collate(short + long, processor))]
    assert both[0].item() == pytest.approx(made.loss(model, made.collate(short, processor))[0].item(), rel=1e-5)


def test_timestamps_are_asked_for_by_row(tmp_path: Path) -> None:
    base = tiny_sounds.whisper_base(tmp_path)
    made = task(max_new_tokens=8, chunk_length_s=1.0)
    processor, model = made.processor(base), made.model(base, dtype=torch.float32).eval()
    sound = base64.b64encode(wav(whistle("cab bad"))).decode()
    rows = [*made.rows_from(sound), *made.rows_from(sound, made.parameters(return_timestamps=True))]
    examples = [its[0] for its in made.encode(rows, processor)]
    plain, timed = made.infer(model, made.collate(examples, processor))
    [alone] = made.infer(model, made.collate(examples[1:], processor))
    assert np.array_equal(timed, alone)
    assert not np.array_equal(plain, timed)
    answer = made.answer([made.decode(rows[1], [timed])], made.parameters(return_timestamps="word"), single=True)
    assert answer.keys() == {"text", "chunks"}
    assert all(0 <= start <= end <= 1 for start, end in (chunk["timestamp"] for chunk in answer["chunks"]))


def test_training_sounds_are_changed_by_seed_and_others_are_not(tmp_path: Path) -> None:
    made = fitted([row("cab bad")], augment={"gain_db": 6, "noise_snr_db": [5, 10], "frequency_masks": 1})
    assert made.augments and not task().augments
    for base in (tiny_sounds.wave_base(tmp_path / "a"), tiny_sounds.whisper_base(tmp_path / "b")):
        processor = made.processor(base)
        rows = [made.clean(row("cab bad"))] * 3
        one, same, other = (its[0][processor.input_name] for its in made.encode_to_train(rows, processor, [1, 1, 2]))
        plain = made.encode(rows[:1], processor)[0][0][processor.input_name]
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other) and not np.array_equal(one, plain)


# ---- learning ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bundle of a CTC model from scratch that has learnt to read whistled letters."""
    folder = tmp_path_factory.mktemp("reader")
    base = tiny_sounds.wave_base(folder / "base", conv_dim=(32, 32), initializer_range=0.05)
    rng = np.random.default_rng(0)
    texts = [" ".join("".join(rng.choice(list("abcd"), rng.integers(1, 5))) for _ in range(3)) for _ in range(48)]
    rows = [row(text) for text in texts]
    made = fitted(rows, chunk_length_s=2.0)
    processor = processors.of(made, base)
    torch.manual_seed(0)
    model = made.model(base, dtype=torch.float32)
    examples = [its[0] for its in made.encode(rows, processor)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(120):
        batch = made.collate([examples[place] for place in np.random.default_rng(step).choice(len(examples), 12, replace=False)], processor)
        loss, items = made.loss(model, batch)
        optimizer.zero_grad()
        (loss / items).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    target = Folder(str(folder / "bundle"))
    bundle.write(target, model=model, processor=processor, task=made, job={"name": "reader"}, lineage={}, metrics={})
    return predictor.Predictor(bundle.load(target.uri), precision="fp32")


def test_a_model_from_scratch_learns_to_read_what_it_never_heard(reader: Any) -> None:
    texts = ["dab cab", "bad dad cad", "a b c d"]
    said = reader([row(text) for text in texts])
    scores = reader.task.score(said, [row(text) for text in texts])
    assert scores["cer"] < 0.1, said


def test_a_long_sound_is_read_as_if_it_were_heard_at_once(reader: Any) -> None:
    text = "dab cab bad a dad cab dab bad add bab cad dab"
    [said] = reader([row(text)])
    assert len(reader.encode([row(text)])[0]) > 1
    assert reader.task.score([said], [row(text)])["cer"] < 0.1, said["text"]
    assert [word["timestamp"][0] for word in said["words"]] == sorted(word["timestamp"][0] for word in said["words"])
    assert said["words"][-1]["timestamp"][1] == pytest.approx(len(text) * 0.06, abs=0.15)


@pytest.fixture(scope="module")
def endpoint(reader: Any) -> Iterator[str]:
    from tests.unit import live

    with live.endpoint(reader) as url:
        yield url


def test_the_clients_of_hugging_face_are_answered(endpoint: str) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=endpoint, token="none")
    content = wav(whistle("dab cab"))
    plain = client.automatic_speech_recognition(content)
    assert plain.text and plain.chunks is None
    timed = client.automatic_speech_recognition(content, extra_body={"return_timestamps": "word"})
    assert timed.text == plain.text == " ".join(chunk.text for chunk in timed.chunks)
    assert all(len(chunk.timestamp) == 2 for chunk in timed.chunks)


def test_what_is_no_sound_is_answered_with_a_sentence(endpoint: str) -> None:
    import httpx

    for body, status, says in (
        ({"content": b"no sound at all"}, 422, "wav, flac, mp3 or ogg"),
        ({"json": {"inputs": "/etc/passwd"}}, 422, "opens no path or URL"),
        ({"json": {"inputs": "file:///etc/passwd"}}, 422, "opens no path or URL"),
        ({"json": {"inputs": ["https://127.0.0.1/a.wav"]}}, 422, "opens no path or URL"),
        ({"json": {"inputs": 7}}, 400, "a number"),
        ({"content": b""}, 400, "empty"),
        ({"json": {"inputs": "a", "parameters": {"return_timestamp": True}}}, 400, "return_timestamps"),
    ):
        answer = httpx.post(endpoint, **body)
        assert answer.status_code == status, answer.text
        assert says in answer.json()["error"], answer.text
    listed = httpx.post(endpoint, json={"inputs": [base64.b64encode(wav(whistle(text))).decode() for text in ("dab", "cab")]})
    assert [one.keys() for one in listed.json()] == [{"text"}, {"text"}]
    assert json.loads(listed.content)
