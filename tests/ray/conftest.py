"""One Ray of two CPUs for all tests here, a tiny pretrained model, and prepared data without the prepare stage."""

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

WORDS = ["good", "great", "love", "fine", "bad", "poor", "hate", "awful", "the", "a", "camera", "phone", "screen", "very", "not", "it"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:ray.data.context")  # Ray warns of its own settings


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """Ray on this machine: two CPUs, 100 MB of object store, no dashboard. Tests that need another cluster start their own."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: socket paths have 107 bytes at most
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, _temp_dir=folder, log_to_driver=False, logging_level="ERROR"
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT with 2 layers of 32, and a WordPiece tokenizer of 64 positions that knows `WORDS`."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *[f"##{digit}" for digit in range(10)], *map(str, range(10))]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


def review(number: int, rng: random.Random) -> dict[str, Any]:
    """A sentence whose label can be learnt from its words, of very different lengths."""
    good = rng.random() < 0.5
    words = rng.choices(WORDS[:4] if good else WORDS[4:8], k=rng.randint(1, 3)) + rng.choices(WORDS[8:], k=rng.choice([1, 3, 8, 20]))
    rng.shuffle(words)
    return {"text": f"{' '.join(words)} {number}", "label": "good" if good else "bad"}


@pytest.fixture(scope="session")
def prepare_reviews(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`prepare_reviews([50, 30], validation=20)`: prepared reviews in a folder of their own, rows of each training file given."""
    return lambda files, validation=0: write_reviews(tmp_path_factory.mktemp("reviews") / "prepared", files, validation)


def write_reviews(root: Path, files: Sequence[int], validation: int = 0) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from orchestrator.records import PreparedData, PreparedFile, PreparedSplit
    from orchestrator.tasks import create

    rng = random.Random(0)
    splits = {}
    for split, counts in {"train": files, "validation": [validation] if validation else [], "test": []}.items():
        parts = []
        for place, count in enumerate(counts):
            rows = [review(number, rng) for number in range(count)]
            path = root / split / f"part-{place:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table = (
                pa.Table.from_pylist(rows) if rows else pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())})
            )
            table = table.append_column("row_id", pa.array([f"{split}-{place}:{number}" for number in range(count)], pa.string()))
            pq.write_table(table.append_column("_row", pa.array(range(count), pa.int64())), path, row_group_size=17)
            parts.append(PreparedFile(path=f"{split}/part-{place:05d}.parquet", rows=count))
        splits[split] = PreparedSplit(rows=sum(counts), files=tuple(parts))
    task = create({"name": "text-classification", "labels": ["bad", "good"]})
    return PreparedData(
        root=str(root), fingerprint="test", task=task, splits=splits, observed={}, rows_read=sum(files) + validation, rows_bad=0
    )


def dies_at(step: int, marker: Path) -> Callable[[Any], Any]:
    """A `training._worker_function` with which the last worker's process ends at that step, as long as `marker` isn't there."""

    def wrap(work: Any) -> Any:
        def train_worker() -> Any:
            import ray.train

            from orchestrator import loop, worker

            context = ray.train.get_context()
            if context.get_world_rank() == context.get_world_size() - 1:
                inner = loop.train

                def deadly(*args: Any, **kwargs: Any) -> Iterator[Any]:
                    for progress in inner(*args, **kwargs):
                        yield progress
                        if progress.step == step and not marker.exists():
                            marker.touch()
                            os._exit(1)

                loop.train = deadly
            try:
                return worker.run(work)
            finally:
                if context.get_world_rank() == context.get_world_size() - 1:
                    loop.train = inner

        return train_worker

    return wrap
