"""A run's folder: what starting over keeps, and that two processes never share it."""

from pathlib import Path

import pytest

from orchestrator.config import JobConfig
from orchestrator.errors import InputError
from orchestrator.pipeline import Run
from orchestrator.progress import Silent


@pytest.fixture
def run(tmp_path: Path) -> Run:
    job = {"storage": str(tmp_path), "task": "text-classification", "model": {"base": "b"}, "data": {"train": "a"}}
    return Run(JobConfig.parse(job), Silent())


def test_starting_over_forgets_stages_and_keeps_the_bundles_that_versions_point_at(run: Run) -> None:
    folder = Path(run.folder.path)
    with run.alone():
        assert run.attempt == 0
    for name in ("train-x/bundle", "train-x/checkpoints", "records", "evaluation"):
        (folder / name).mkdir(parents=True)
    with run.alone(fresh=True):
        assert run.attempt == 1  # goes into the question, so that training gets a folder of its own
        assert (folder / "train-x/bundle").is_dir()
        assert not any((folder / name).exists() for name in ("train-x/checkpoints", "records", "evaluation"))


def test_a_run_that_another_has_is_refused_with_its_process(run: Run) -> None:
    with run.alone(), pytest.raises(InputError, match=r"is being worked on by process \d+"), Run(run.job, Silent()).alone():
        pass
    with run.alone():  # it was let go
        pass
