"""The main job from the command line, on its real model and reviews with two steps of training: every stage, again, the registry, batch prediction."""

import csv
import json
from pathlib import Path

import pytest

from tests.e2e.conftest import free_port

RECIPE = Path(__file__).parent.parent.parent / "jobs" / "recipes" / "text-classification" / "reviews.yaml"


@pytest.mark.network
def test_one_command_takes_reviews_to_answers_and_again_reuses_them(orchestrator, tmp_path: Path) -> None:
    smoke = ["training.max_steps=2", "training.global_batch_size=8", "serving.replay_rows=10", f"serving.port={free_port()}"]
    options = [part for text in smoke for part in ("--set", text)]
    first = orchestrator("run", RECIPE, *options, "--json")
    assert first.status == 0, first.err
    result = first.result
    assert result["status"] == "done"
    assert (result["train"]["steps"], result["train"]["num_workers"]) == (2, 2)
    assert 0 <= result["metrics"]["test"]["accuracy"] <= 1
    assert result["model"] == {"name": "reviews", "version": 1}
    assert result["endpoint"]["replayed"] == 10
    assert {"prepare", "train", "evaluate", "register", "deploy"} <= result["timings"].keys()
    run_dir = Path(result["run_dir"]) if Path(result["run_dir"]).is_absolute() else tmp_path / result["run_dir"]
    assert json.loads((run_dir / "job.json").read_text())["training"]["max_steps"] == 2
    assert list(run_dir.glob("evaluation/*confusion_matrix.csv"))

    again = orchestrator("evaluate", RECIPE, *options, "--json")
    assert again.status == 0, again.err
    assert again.result["metrics"] == result["metrics"]
    assert again.result["timings"]["train"] == again.result["timings"]["evaluate"] == 0.0

    models = orchestrator("models", "list", "--json")
    assert models.status == 0, models.err
    assert "reviews" in models.out

    source = tmp_path / "new.csv"
    source.write_text('review,id\n"the great camera, love",1\nbroken slow phone,2\n', encoding="utf-8")
    predicted = orchestrator("predict", "reviews@champion", source, tmp_path / "out.csv", "--json")
    assert predicted.status == 0, predicted.err
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["1", "2"]
    assert {row["prediction_label"] for row in rows} <= {"positive", "negative"}
    assert all(0.5 <= float(row["prediction_score"]) <= 1 for row in rows)
