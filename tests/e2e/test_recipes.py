"""Every recipe that ships, from its real model and data to an answer, with a few steps of training."""

from pathlib import Path

import pytest

from tests.e2e.conftest import free_port

RECIPES = sorted((Path(__file__).parent.parent.parent / "jobs" / "recipes").rglob("*.yaml"))


@pytest.mark.network
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_runs(recipe: Path, orchestrator, tmp_path: Path) -> None:
    smoke = ["training.max_steps=2", "training.global_batch_size=8", "serving.replay_rows=4", f"serving.port={free_port()}"]
    ended = orchestrator("run", recipe, *[part for text in smoke for part in ("--set", text)], "--storage", tmp_path / "runs", "--json")
    assert ended.status == 0, ended.err
    assert ended.result["train"]["steps"] == 2
    assert ended.result["metrics"]["test"]
    assert ended.result["endpoint"]["replayed"] == 4
