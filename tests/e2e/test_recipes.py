"""Every recipe that ships, from its real model and data to its scores, with a few steps of training by one worker."""

from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parent.parent.parent / "jobs" / "recipes").rglob("*.yaml"))


@pytest.mark.network
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_runs(recipe: Path, orchestrator, tmp_path: Path) -> None:
    smoke = ["training.max_steps=2", "training.global_batch_size=8", "resources.num_workers=1"]
    ended = orchestrator(
        "evaluate", recipe, *[part for text in smoke for part in ("--set", text)], "--storage", tmp_path / "runs", "--json"
    )
    assert ended.status == 0, ended.err
    assert ended.result["train"]["steps"] == 2
    assert ended.result["metrics"]["test"]
