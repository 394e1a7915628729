"""A two-class task on token ids, a BERT of two small layers and a stream of global batches, for tests of the loop."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn import functional

from orchestrator import freezing, loop, step
from orchestrator.config import CheckpointSection, FreezeSection, TrainingSection
from orchestrator.errors import StageError
from orchestrator.loop import Progress, Share
from orchestrator.storage import Folder
from orchestrator.tasks.base import Example, Task

VOCABULARY = 64
torch.set_num_threads(1)  # Models this small only wait for a second thread.


class Tiny(Task):
    """Rows are examples already: `row_id`, `input_ids`, `labels`."""

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        ids = [example["input_ids"] + [0] * (longest - len(example["input_ids"])) for example in examples]
        mask = [[1] * len(example["input_ids"]) + [0] * (longest - len(example["input_ids"])) for example in examples]
        labels = [example["labels"] for example in examples]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total = functional.cross_entropy(logits.float(), batch["labels"], reduction="sum", label_smoothing=label_smoothing)
        return total, float(len(batch["labels"]))

    def metrics(self) -> tuple[str, ...]:
        return ("accuracy",)


def rows(count: int, seed: int = 0) -> list[Example]:
    """Rows of 3 to 12 tokens; the label says whether the second token is in the upper half of the vocabulary."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        ids = [1, *(rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(2, 12)))]
        made.append({"row_id": f"rows.csv:{index}", "input_ids": ids, "labels": int(ids[1] >= VOCABULARY // 2)})
    return made


def bert(dropout: float = 0.0, seed: int = 0, **config: Any) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    return BertForSequenceClassification(
        BertConfig(**given | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout} | config)
    )


@dataclass
class Batches:
    """One worker's view of global batches in the order of the rows, the same in each epoch but rotated."""

    examples: list[Example]
    global_batch: int
    rank: int = 0
    world: int = 1

    @property
    def rows(self) -> int:
        return len(self.examples)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.global_batch)

    def batch(self, epoch: int, step: int) -> list[Example]:
        order = self.examples[epoch:] + self.examples[:epoch]
        return order[step * self.global_batch : (step + 1) * self.global_batch]

    def steps(self, epoch: int, start: int) -> Iterator[Share]:
        for place in range(start, self.steps_per_epoch):
            batch = self.batch(epoch, place)
            mine = batch[self.rank :: self.world]
            given = mine or batch[:1]
            yield Share(place, [example["row_id"] for example in given], given, borrowed=not mine)


class SplitBatches(Batches):
    """As the other, of rows that became several examples: `row_id`, `examples`."""

    def steps(self, epoch: int, start: int) -> Iterator[Share]:
        for share in super().steps(epoch, start):
            examples = [dict(example) for row in share.examples for example in row["examples"]]
            ids = [row["row_id"] for row in share.examples for _ in row["examples"]]
            yield Share(share.step, ids, examples, borrowed=share.borrowed)


def settings(**given: Any) -> TrainingSection:
    return TrainingSection.parse(
        {"learning_rate": 1e-3, "num_train_epochs": 1, "global_batch_size": 8, "precision": "fp32", "save_steps": 1000} | given
    )


def run(model: Any, stream: Any, folder: Path | str, section: TrainingSection, **given: Any) -> list[Progress]:
    options = {"validate": None, "global_batch_size": 8, "identity": "a job", "checkpoint": CheckpointSection()} | given
    return list(loop.train(Tiny(), model, None, section, stream, folder=Folder(str(folder)), **options))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def spoil(model: Any, examples: list[Example], index: int) -> None:
    """Makes the row at `index`, and no other, give a loss that is not a number: its last token has no finite embedding."""
    last = VOCABULARY - 1
    for example in examples:
        example["input_ids"] = [2 if token == last else token for token in example["input_ids"]]
    examples[index]["input_ids"][-1] = last
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[last] = float("nan")


def worker(rank: int, world: int, place: str, cases: dict[str, dict[str, Any]]) -> None:
    """One process of a group: trains each case and leaves its losses and weights in the folder."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{place}/rendezvous", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = {name: trained(rank, world, **case) for name, case in cases.items()}
    torch.save(results, f"{place}/{rank}.pt")
    dist.destroy_process_group()


def trained(rank: int, world: int, **case: Any) -> dict[str, Any]:
    step.LARGE_EMBEDDING = case.get("large_embedding", 1 << 20)
    model, examples = bert(**case["model"]), rows(case["rows"])
    if "freeze" in case:
        freezing.freeze(model, freezing.chosen(model, FreezeSection(layers=case["freeze"]), ()))
    if "spoilt" in case:
        spoil(model, examples, case["spoilt"])
    seen: list[tuple[int, list[str]]] = []

    def note(number: int, ids: list[str]) -> None:
        seen.append((number, ids))

    try:
        history = run(model, Batches(examples, 8, rank, world), case["folder"], settings(**case["settings"]), on_rows=note)
    except StageError as error:
        return {"error": str(error)}
    figures = {"losses": [p.loss for p in history], "norms": [p.grad_norm for p in history], "rows": [p.rows for p in history]}
    return {"weights": weights(model), "seen": seen, **figures}


def in_group(world: int, place: Path, **cases: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Trains each case in `world` processes; what each of them left."""
    place.mkdir()
    torch.multiprocessing.spawn(worker, args=(world, str(place), cases), nprocs=world)
    left = [torch.load(place / f"{rank}.pt") for rank in range(world)]
    return {name: [results[name] for results in left] for name in cases}
