"""Bad input ends with status 2 and one sentence that names the place; no traceback, nothing half-written.

What else rows can have wrong is in tests/ray/test_prepare.py, where it costs no start of Ray each time.
"""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


def change(job_file: Path, **sections: object) -> None:
    job = yaml.safe_load(job_file.read_text())
    for section, value in sections.items():
        job[section] = {**job.get(section, {}), **value} if isinstance(value, dict) else value
    job_file.write_text(yaml.safe_dump(job))


def reviews(folder: Path, change: Callable[[list[str]], list[str]]) -> None:
    path = folder / "reviews.csv"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def unknown_key(job: Path, folder: Path) -> None:
    change(job, training={"learning_rat": 1e-3})


def missing_file(job: Path, folder: Path) -> None:
    change(job, data={"train": "review.csv"})


def missing_column(job: Path, folder: Path) -> None:
    change(job, data={"columns": {"text": "reviews", "label": "stars"}})


def empty_file(job: Path, folder: Path) -> None:
    (folder / "reviews.csv").write_text("")


def header_only(job: Path, folder: Path) -> None:
    (folder / "reviews.csv").write_text("review,stars\n")


def too_many_fields(job: Path, folder: Path) -> None:
    reviews(folder, lambda lines: [*lines[:40], "the camera, they say, is good,positive", *lines[40:]])


def no_such_model(job: Path, folder: Path) -> None:
    change(job, model={"base": str(folder / "no-model")})


def no_such_head(job: Path, folder: Path) -> None:
    model = folder / "headless"
    shutil.copytree(yaml.safe_load(job.read_text())["model"]["base"], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "vit", "architectures": ["ViTModel"]}))
    change(job, model={"base": str(model)})


def too_many_workers(job: Path, folder: Path) -> None:
    change(job, resources={"num_workers": 500})


def dead_registry(job: Path, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    change(job, registry={"uri": f"http://127.0.0.1:{port}"})


CASES = [
    (unknown_key, ["training.learning_rat", "learning_rate"]),
    (missing_file, ["review.csv", "reviews.csv"]),
    (missing_column, ["reviews", "review", "stars"]),
    (empty_file, ["reviews.csv", "empty"]),
    (header_only, ["reviews.csv", "no rows"]),
    (too_many_fields, ["reviews.csv", "41", "4", "2"]),
    (no_such_model, ["no-model"]),
    (no_such_head, ["vit"]),
    (too_many_workers, ["500", "CPU"]),
    (dead_registry, ["MLflow", "127.0.0.1"]),
]


@pytest.mark.parametrize(("spoil", "named"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_bad_input_is_a_sentence_that_names_the_place(orchestrator, job_file: Path, tmp_path: Path, spoil, named: list[str]) -> None:
    spoil(job_file, tmp_path)
    done = orchestrator("run", job_file)
    assert done.status == 2, done.out + done.err
    assert "Traceback" not in done.err + done.out
    for word in named:
        assert word in done.err, done.err
    half_written = [
        str(path) for path in tmp_path.rglob("*") if path.name.endswith(".tmp") or "bundle" in path.name or path.suffix == ".parquet"
    ]
    assert not half_written


def test_a_port_in_use_is_named_with_a_free_one(orchestrator, job_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = orchestrator("run", job_file, "--set", f"serving.port={port}")
    assert done.status == 2
    assert str(port) in done.err
    assert "--set serving.port=" in done.err
