"""The first job file: guessed columns, comments that hold, nothing written over."""

import csv
import re
from pathlib import Path

import pytest
import yaml

from orchestrator import scaffold
from orchestrator.config import load
from orchestrator.errors import InputError
from orchestrator.tasks import TASKS, create
from orchestrator.tasks.base import Column

COLUMNS = create("text-classification").columns()
SENTENCES = ["The battery lasts for days and the screen is sharp.", "It broke after a week, and nobody answers.", "Does what it says."]


def rows(count: int = 60, **columns) -> list[dict]:
    return [{name: make(number) for name, make in columns.items()} for number in range(count)]


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        ({"id": str, "review": lambda n: SENTENCES[n % 3] + str(n), "stars": lambda n: n % 5 + 1}, "review", "stars"),
        ({"text": lambda n: "short", "title": lambda n: SENTENCES[n % 3], "label": lambda n: n % 2}, "text", "label"),
        ({"body": lambda n: SENTENCES[n % 3] + str(n), "author": lambda n: f"author {n}", "kind": lambda n: "ab"[n % 2]}, "body", "kind"),
        (
            {"Review Text": lambda n: SENTENCES[n % 3] + str(n), "country": lambda n: "DE", "Sentiment Class": lambda n: n % 3},
            "Review Text",
            "Sentiment Class",
        ),
        ({"uid": lambda n: n, "tweet": lambda n: SENTENCES[n % 3] * 2 + str(n), "target": lambda n: n % 2}, "tweet", "target"),
    ],
)
def test_columns_are_guessed(columns, text, label):
    found = scaffold.guess(COLUMNS, rows(**columns))
    assert {role: guess.column for role, guess in found.items()} == {"text": text, "label": label}


def test_what_nothing_looks_like_is_said():
    found = scaffold.guess(COLUMNS, rows(text=lambda n: f"all different {n}"))
    assert found["label"].column is None
    assert "there is text" in found["label"].why


def test_a_row_without_a_value_does_not_count_as_a_label():
    found = scaffold.guess(
        COLUMNS, [*rows(text=lambda n: f"{n} words", label=lambda n: n % 2), {"text": "x", "label": None}, {"text": "y"}]
    )
    assert found["label"].why == "2 different: 0, 1"


def test_optional_roles_are_taken_by_their_name_only():
    columns = {"text": Column(kind="text"), "note": Column(kind="text", required=False)}
    assert list(scaffold.guess(columns, rows(text=lambda n: "x", more=lambda n: "y"))) == ["text"]
    assert list(scaffold.guess(columns, rows(text=lambda n: "x", Note=lambda n: "y"))) == ["text", "note"]


@pytest.fixture
def reviews(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data" / "my reviews: 2024.csv"
    path.parent.mkdir()
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "what's said: here", "stars"], *[[n, SENTENCES[n % 3], n % 5 + 1] for n in range(40)]])
    return path


def test_a_job_for_a_file_loads_and_finds_it_from_anywhere(reviews, tmp_path, monkeypatch):
    target = tmp_path / "jobs" / "mine.yaml"
    target.parent.mkdir()
    scaffold.write(target, scaffold.new(None, str(Path("data") / reviews.name), target), force=False)
    monkeypatch.chdir("/")
    job = load(target)
    assert Path(str(job.data.train)).resolve() == reviews
    assert job.data.columns == {"text": "what's said: here", "label": "stars"}
    assert job.name == "my-reviews-2024"
    assert job.task == create(next(iter(TASKS)))


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_has_an_example_job_that_loads(task, tmp_path):
    target = tmp_path / "job.yaml"
    scaffold.write(target, scaffold.new(task, None, target), force=False)
    job = load(target)
    assert job.task.key == task
    assert job.name == "job"


@pytest.mark.parametrize("data", [True, False])
def test_every_key_in_the_comments_is_a_key(data, reviews, tmp_path):
    """Each commented line, uncommented alone, still makes a job."""
    text = scaffold.new(None, str(reviews) if data else None, tmp_path / "job.yaml")
    commented = [line for line in text.splitlines() if re.match(r"\s*#\w+: ", line)]
    assert len(commented) > 8
    for line in commented:
        path = tmp_path / "job.yaml"
        path.write_text(text.replace(line, line.replace("#", "", 1)), encoding="utf-8")
        load(path)
        assert yaml.safe_load(path.read_text(encoding="utf-8")) != yaml.safe_load(text)


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    target = tmp_path / "job.yaml"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists already; --force writes over it"):
        scaffold.write(target, "new", force=False)
    assert target.read_text(encoding="utf-8") == "mine"
    scaffold.write(target, "new", force=True)
    assert target.read_text(encoding="utf-8") == "new"


def test_sentences_for_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"There is no folder .*no/such"):
        scaffold.write(tmp_path / "no" / "such" / "job.yaml", "x", force=False)
    with pytest.raises(InputError, match="there is no task 'nope'"):
        scaffold.new("nope", None, tmp_path / "job.yaml")
    with pytest.raises(InputError, match=r"nope\.csv"):
        scaffold.new(None, str(tmp_path / "nope.csv"), tmp_path / "job.yaml")
