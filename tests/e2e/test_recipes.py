"""Every recipe that ships is a job whose data, base model and metrics are there. Whole ones are run in test_run and by `make demo`."""

from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parent.parent.parent / "jobs" / "recipes").rglob("*.yaml"))


@pytest.mark.network
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_valid(recipe: Path, orchestrator, tmp_path: Path) -> None:
    checked = orchestrator("validate", recipe, "--storage", tmp_path / "runs", "--json")
    assert checked.status == 0, checked.err
