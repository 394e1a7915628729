"""Every task learns the same from two workers as from one."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from orchestrator import loop, processors
from orchestrator.config import CheckpointSection
from orchestrator.storage import Folder
from tests.contract.conftest import Case, every_case
from tests.fixtures import tiny as bases
from tests.unit import tiny

GLOBAL_BATCH = 4


def train(case: Case, base: str, folder: str, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Two epochs of five rows in batches of four: of the last batch's single row two workers both look at it, and count it once."""
    processor = processors.of(case.task, base)
    rows = (case.clean * GLOBAL_BATCH)[: GLOBAL_BATCH + 1]
    encoded = case.task.encode_to_train([copy.deepcopy(row) for row in rows], processor, range(len(rows)))
    named = [{"row_id": f"rows.csv:{place}", "examples": examples} for place, examples in enumerate(encoded)]
    torch.manual_seed(0)
    model = case.task.model(base, dtype=torch.float32)
    section = tiny.settings(num_train_epochs=2, global_batch_size=GLOBAL_BATCH, learning_rate=1e-4, adam_epsilon=1e-4)
    history = list(
        loop.train(
            case.task, model, processor, section, tiny.SplitBatches(named, GLOBAL_BATCH, rank, world), folder=Folder(folder), validate=None,
            global_batch_size=GLOBAL_BATCH, identity="a job", checkpoint=CheckpointSection(),
        )
    )  # fmt: skip
    return {
        "losses": [progress.loss for progress in history],
        "norms": [progress.grad_norm for progress in history],
        "weights": tiny.weights(model),
    }


def worker(rank: int, world: int, place: str, made: dict[str, str]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{place}/rendezvous", world), rank=rank, world_size=world)
    results = {name: train(case, made[name], f"{place}/{name}", rank, world) for name, case in every_case().items()}
    torch.save(results, f"{place}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_are_one(tmp_path: Path) -> None:
    """One test of all cases: spread over pytest's processes, each of them would start two workers."""
    made = {name: bases.BASES[case.base](tmp_path / "bases" / name, case.clean) for name, case in every_case().items()}
    torch.multiprocessing.spawn(worker, args=(2, str(tmp_path), made), nprocs=2)
    group = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, case in every_case().items():
        alone = train(case, made[name], str(tmp_path / "alone" / name))
        first, second = (results[name] for results in group)
        assert first["losses"] == second["losses"], name
        assert tiny.differ(first["weights"], second["weights"]) == 0, name
        assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4), name
        assert first["norms"] == pytest.approx(alone["norms"], rel=1e-3), name
        assert tiny.differ(first["weights"], alone["weights"]) < 2e-5, name
