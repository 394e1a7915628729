"""The main job from the command line: every stage, run again, the registry, batch prediction."""

import csv
import json
from pathlib import Path


def test_one_command_takes_reviews_to_answers_and_again_reuses_them(orchestrator, job_file: Path, tmp_path: Path) -> None:
    first = orchestrator("run", job_file, "--json")
    assert first.status == 0, first.err
    result = first.result
    assert result["status"] == "done"
    assert result["metrics"]["test"]["accuracy"] >= 0.9
    assert result["model"] == {"name": "reviews", "version": 1}
    assert result["endpoint"]["replayed"] == 10
    assert {"prepare", "train", "evaluate", "register", "deploy"} <= result["timings"].keys()
    run_dir = Path(result["run_dir"]) if Path(result["run_dir"]).is_absolute() else tmp_path / result["run_dir"]
    assert json.loads((run_dir / "job.json").read_text())["data"]["columns"] == {"text": "review", "label": "stars"}
    assert list(run_dir.glob("evaluation/*confusion_matrix.csv"))

    again = orchestrator("run", job_file, "--json")
    assert again.status == 0, again.err
    assert again.result["model"] == {"name": "reviews", "version": 1}
    assert again.result["metrics"] == result["metrics"]
    assert again.result["timings"]["train"] == 0.0

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
    assert [row["prediction_label"] for row in rows] == ["positive", "negative"]
