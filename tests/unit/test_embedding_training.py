"""A loss of the whole global batch: the same whatever the micro-batches and the workers, with dropout on."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn import functional

from orchestrator import loop, models, step
from orchestrator.config import CheckpointSection, LoraSection, ModelSection
from orchestrator.errors import StageError
from orchestrator.loading import Weights
from orchestrator.storage import Folder
from orchestrator.tasks import create
from orchestrator.tasks.base import Task
from tests.unit import tiny

ROWS = 17  # With batches of 8 the last one has one row: the second worker borrows it.
PAIRS = {"name": "embedding", "matryoshka_dims": [32, 8]}
TRIPLETS = {"name": "embedding", "problem": "triplets", "pooling": "cls"}
SCORES = {"name": "embedding", "problem": "scored-pairs"}


class Tokens:
    """A tokenizer for texts that are numbers already."""

    model_max_length, truncation_side, padding_side = 64, "right", "right"
    pad_token_id = pad_token_type_id = 0
    model_input_names = ("input_ids", "attention_mask")

    def __call__(self, texts: list[str], pairs: Any, **_: Any) -> dict[str, list[list[int]]]:
        ids = [[1, *map(int, text.split())] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(tokens) for tokens in ids]}


def rows(task: Task, count: int = ROWS) -> list[dict[str, Any]]:
    """Texts of numbers; some anchors and positives stand in two rows."""
    made = tiny.rows(4 * count)
    texts = [" ".join(map(str, row["input_ids"][1:])) for row in made]
    found: list[dict[str, Any]] = []
    for place in range(count):
        first, second, third, fourth = texts[4 * place : 4 * place + 4]
        row = {
            "anchor": first if place % 5 else texts[0],
            "positive": second if place % 7 else texts[1],
            "negative": [third, fourth][: 1 + place % 2],
        }
        row |= {"text_a": first, "text_b": second, "score": place % 4}
        found.append({"row_id": f"rows.csv:{place}", **{role: row[role] for role in task.columns() if role in row}})
    return found


def encoder(dropout: float = 0.2) -> Any:
    return tiny.bert(dropout).bert


def train(
    given: dict[str, Any], folder: str, rank: int = 0, world: int = 1, model: Any = None, spoilt: int | None = None, **settings: Any
) -> dict[str, Any]:
    task = create(given)
    every = rows(task)
    encoded = [{"row_id": row["row_id"], "examples": its} for row, its in zip(every, task.encode(every, Tokens()), strict=True)]
    model = encoder() if model is None else model
    if hasattr(model, "pooler"):
        model.pooler = None
    if spoilt is not None:
        last = tiny.VOCABULARY - 1
        for example in (example for row in encoded for example in row["examples"]):
            example["input_ids"] = [2 if token == last else token for token in example["input_ids"]]
        encoded[spoilt]["examples"][1]["input_ids"][1] = last
        with torch.no_grad():
            model.embeddings.word_embeddings.weight[last] = float("nan")
    section = tiny.settings(**{"num_train_epochs": 2, "weight_decay": 0.1, **settings})
    try:
        history = list(
            loop.train(
                task, model, Tokens(), section, tiny.SplitBatches(encoded, 8, rank, world), folder=Folder(folder), validate=None, global_batch_size=8,
                identity="a job", checkpoint=CheckpointSection(),
            )
        )  # fmt: skip
    except StageError as error:
        return {"error": str(error)}
    return {
        "losses": [progress.loss for progress in history],
        "norms": [progress.grad_norm for progress in history],
        "rows": [progress.rows for progress in history],
        "weights": tiny.weights(model),
    }


def worker(rank: int, world: int, place: str, cases: dict[str, dict[str, Any]]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{place}/rendezvous", world), rank=rank, world_size=world)
    torch.save(
        {name: train(folder=f"{place}/{name}", rank=rank, world=world, **case) for name, case in cases.items()}, f"{place}/{rank}.pt"
    )
    dist.destroy_process_group()


CUT = {"tokens_per_micro_batch": 30}
CASES: dict[str, dict[str, Any]] = {
    "pairs": {"given": PAIRS, **CUT},
    "triplets": {"given": TRIPLETS, **CUT},
    "scores": {"given": SCORES, "tokens_per_micro_batch": 1000},
    "spoilt": {"given": PAIRS, "spoilt": 3, "tokens_per_micro_batch": 1},
}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What two workers made of each case."""
    place = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(worker, args=(2, str(place), CASES), nprocs=2)
    left = [torch.load(place / f"{rank}.pt") for rank in range(2)]
    return {name: [results[name] for results in left] for name in CASES}


@pytest.mark.parametrize("case", ["pairs", "triplets", "scores"])
def test_two_workers_are_one_and_the_cut_changes_nothing(case: str, group: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    given = CASES[case]["given"]
    alone = train(given, str(tmp_path / "alone"), tokens_per_micro_batch=100_000)
    cut = train(given, str(tmp_path / "cut"), tokens_per_micro_batch=20)
    first, second = group[case]
    assert alone["rows"] == first["rows"] == [8, 8, 1] * 2
    assert first["losses"] == second["losses"]
    for other in (cut, first):
        assert other["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert other["norms"] == pytest.approx(alone["norms"], rel=1e-3, abs=1e-4)
        assert tiny.differ(other["weights"], alone["weights"]) < 1e-4
    assert tiny.differ(first["weights"], second["weights"]) == 0
    assert (
        tiny.differ(alone["weights"], {name: weight for name, weight in tiny.weights(encoder()).items() if name in alone["weights"]}) > 1e-3
    )


def test_both_workers_name_the_row_that_has_no_finite_vector(group: dict[str, list[dict[str, Any]]]) -> None:
    for result in group["spoilt"]:
        assert "The loss became nan at step 1" in result["error"]
        assert "in the rows rows.csv:3. " in result["error"]


def test_the_loss_is_the_cross_entropy_that_everyone_means(tmp_path: Path) -> None:
    """Without dropout the first loss is that of the formula, over the 8 rows of the batch."""
    task = create({"name": "embedding"})
    every = [{**row, "anchor": f"{place + 2} 3", "positive": f"4 5 {place + 2}"} for place, row in enumerate(rows(task, 8))]
    model = encoder(0.0).eval()
    batch = task.collate([example for its in task.encode(every, Tokens()) for example in its], Tokens())
    found = functional.normalize(task.represent(model, batch), dim=1)
    expected = functional.cross_entropy(20 * found[0::2] @ found[1::2].T, torch.arange(8))
    relations = [task.relation(example) for its in task.encode(every, Tokens()) for example in its]
    loss, items = task.joint_loss(task.represent(model, batch), relations)
    assert items == 8
    assert float(loss.detach()) / items == pytest.approx(float(expected.detach()), abs=1e-5)


def test_both_passes_are_the_same_where_a_model_drops_by_the_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As models do that call `functional.dropout`, which no key reaches."""

    class Dropping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder(0.0)
            self.inner.pooler = None

        def forward(self, **inputs: Any) -> Any:
            output = self.inner(**inputs)
            output.last_hidden_state = functional.dropout(output.last_hidden_state, 0.3, training=self.training)
            return output

    seen: list[torch.Tensor] = []
    plain = step.Stepper._represent

    def noted(*args: Any) -> torch.Tensor:
        seen.append(plain(*args))
        return seen[-1]

    monkeypatch.setattr(step.Stepper, "_represent", noted)
    train({"name": "embedding"}, str(tmp_path), model=Dropping(), max_steps=1, **CUT)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) > 2
    assert not any(part.requires_grad for part in first)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_adapters_and_bf16(tmp_path: Path) -> None:
    """The pooling layer of the base is gone, so every adapter gets a gradient; vectors are compared in fp32."""
    base = encoder(0.1)
    base.pooler = None
    section = ModelSection(base="tiny", lora=LoraSection())
    adapted = models.with_adapters(base, section, Weights())
    before = tiny.weights(adapted)
    done = train(PAIRS, str(tmp_path), model=adapted, precision="bf16", **CUT)
    assert all(loss == loss and loss < 20 for loss in done["losses"])
    moved = {name for name, weight in before.items() if not torch.equal(weight, done["weights"][name])}
    assert moved
    assert all("lora_" in name for name in moved)
