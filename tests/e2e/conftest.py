"""A tiny pretrained model and small files of reviews, so that whole jobs run in seconds."""

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

GOOD = ["good", "great", "love", "perfect", "fast", "sharp"]
BAD = ["bad", "poor", "hate", "broken", "slow", "blurry"]
THINGS = ["camera", "phone", "battery", "screen", "player", "router", "lens", "case"]


def review_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        good = number % 2 == 0
        words = [rng.choice(GOOD if good else BAD) for _ in range(rng.randint(1, 3))]
        rest = [rng.choice(THINGS) for _ in range(rng.randint(2, 12))]
        text = words + rest
        rng.shuffle(text)
        rows.append((f"the {' '.join(text)} number {number}", "positive" if good else "negative"))
    return rows


def write_reviews(path: Path, count: int, seed: int = 0) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "stars"])
        writer.writerows(review_rows(count, seed))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers x 32 with a word-level vocabulary of the reviews, as a folder that `model.base` can name."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "number", *GOOD, *BAD, *THINGS]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64
    ).save_pretrained(folder)
    import torch

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64
    )
    BertModel(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Finished:
    status: int
    out: str
    err: str

    @property
    def result(self) -> dict:
        return json.loads(self.out.strip().splitlines()[-1])


@pytest.fixture
def orchestrator(tmp_path: Path) -> Callable[..., Finished]:
    """Runs the command line in `tmp_path` as a user would; never longer than four minutes."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.cli", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=240,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def job_file(tmp_path: Path, tiny_model: Path) -> Path:
    """A job on 240 small reviews that trains in seconds."""
    write_reviews(tmp_path / "reviews.csv", 240)
    path = tmp_path / "reviews.yaml"
    path.write_text(
        f"""task: text-classification
model: {{base: {tiny_model}}}
data: {{train: reviews.csv, columns: {{text: review, label: stars}}}}
training: {{learning_rate: 5.0e-3, num_train_epochs: 3, global_batch_size: 16}}
resources: {{num_workers: 1}}
serving: {{port: {free_port()}, replay_rows: 10}}
""",
        encoding="utf-8",
    )
    return path


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
