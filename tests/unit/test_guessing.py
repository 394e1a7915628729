"""Which task some data look like, in which format, with which columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from orchestrator import scaffold
from orchestrator.config import load
from orchestrator.errors import InputError
from orchestrator.tasks import TASKS, guessing
from orchestrator.tasks.base import Column, Row, RowError, Task
from tests.unit.test_scaffold import rows


class Columns(Task):
    """A task with the columns that a test gives it, none of whose values may be missing."""

    roles: ClassVar[dict[str, Column]] = {}

    def columns(self) -> dict[str, Column]:
        return self.roles

    def clean(self, row: Row) -> Row:
        for role, value in row.items():
            if value in (None, ""):
                raise RowError(role, "something", value)
        return row


class Pictures(Columns):
    roles = {"image": Column(kind="image"), "label": Column(kind="label", target=True)}


class Sounds(Columns):
    roles = {"audio": Column(kind="audio"), "text": Column(kind="text", target=True)}


class Translation(Columns):
    roles = {"source": Column(kind="text"), "target": Column(kind="text", target=True)}


class Tags(Columns):
    roles = {"tokens": Column(kind="any"), "tags": Column(kind="any", target=True)}


class Questions(Columns):
    roles = {"question": Column(kind="text"), "context": Column(kind="text"), "answers": Column(kind="any", target=True)}


class Raw(Columns):
    roles = {"text": Column(kind="text")}


class Chat(Columns):
    roles = {"messages": Column(kind="any", required=False), "text": Column(kind="text", required=False)}


class Classes(Columns):
    roles = {"text": Column(kind="text"), "label": Column(kind="label", target=True)}


EVERY = (Classes, Tags, Questions, Chat, Translation, Raw, Pictures, Sounds)


@pytest.mark.parametrize(
    ("data", "task"),
    [
        (rows(text=lambda n: f"text number {n}", label=lambda n: n % 3), Classes),
        (rows(review=lambda n: f"text number {n}", stars=lambda n: n % 3), Classes),
        (rows(text=lambda n: f"text number {n}"), Raw),
        (rows(path=lambda n: f"pictures/{n}.jpg", kind=lambda n: "ab"[n % 2]), Pictures),
        (rows(image=lambda n: {"path": f"{n}.png", "bytes": None}, label=lambda n: "ab"[n % 2]), Pictures),
        (rows(audio=lambda n: f"{n}.wav", text=lambda n: f"what was said in {n}"), Sounds),
        (rows(file=lambda n: f"{n}.wav", transcript=lambda n: f"what was said in {n}"), Sounds),
        (rows(source=lambda n: f"a text {n}", target=lambda n: f"ein Text {n}"), Translation),
        (rows(english=lambda n: f"a text {n}", german=lambda n: f"ein Text {n}"), Translation),
        (rows(tokens=lambda n: ["a", "b"], tags=lambda n: ["O", "B-X"]), Tags),
        (rows(id=str, question=lambda n: f"who {n}?", context=lambda n: f"long text {n}", answers=lambda n: {"text": ["x"]}), Questions),
        (rows(messages=lambda n: [{"role": "user", "content": f"{n}"}]), Chat),
    ],
)
def test_the_likeliest_task(data: list[dict[str, Any]], task: type[Task]) -> None:
    found = {one.__name__: one.fits(list(data[0]), data, "jsonl") for one in EVERY}
    assert all(0 <= score <= 1 for score in found.values())
    assert found[task.__name__] == max(found.values()), found


def test_rows_that_can_not_be_used_count_against_a_task() -> None:
    whole, half = rows(text=lambda n: f"text {n}"), rows(text=lambda n: f"text {n}" if n % 2 else "")
    assert Raw.fits(["text"], half, "csv") == pytest.approx(Raw.fits(["text"], whole, "csv") / 2)
    assert Raw.fits([], [], "csv") == 0
    assert Pictures.fits(["text"], whole, "csv") == 0


def test_numbers_are_found_for_a_number() -> None:
    columns = {"text": Column(kind="text"), "value": Column(kind="number", target=True)}
    found = guessing.guess(columns, rows(text=lambda n: f"text {n}", kind=lambda n: "ab"[n % 2], price=lambda n: f"{n}.5"))
    assert found["value"].column == "price"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in TASKS if name != "text-classification"]:
        monkeypatch.delitem(TASKS, name)
    for task in EVERY:
        monkeypatch.setitem(TASKS, task.__name__.lower(), f"{__name__}:{task.__name__}")
    return tmp_path


def test_init_writes_a_job_for_what_the_data_look_like(here: Path) -> None:
    (here / "talk.jsonl").write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": f"{n}"}]}) for n in range(30)))
    text = scaffold.new(None, "talk.jsonl", here / "job.yaml")
    (here / "job.yaml").write_text(text)
    job = load(here / "job.yaml")
    assert job.task.key == "chat" and job.data.columns == {"messages": "messages"}
    assert "task: chat    # what the columns look like; " in text
    assert job.model.base == scaffold.EXAMPLE_MODEL


@pytest.mark.parametrize(
    ("data", "task", "columns"),
    [
        ("1\tAnna\tAnna\tPROPN\t_\t_\t2\tnsubj\t_\t_\n2\truns\trun\tVERB\t_\t_\t0\troot\t_\t_\n\n", {"name": "token-classification", "problem": "words"}, {"tokens": "tokens", "tags": "upos"}),
        ("Anna B-PER\nruns O\n\n", "token-classification", {"tokens": "tokens", "tags": "tags"}),
        ('{"query": "who?", "passage": "Anna", "negative": ["Otto"]}\n', {"name": "embedding", "problem": "triplets"}, {"anchor": "query", "positive": "passage", "negative": "negative"}),
        ('{"query": "who?", "passage": "Anna"}\n', "embedding", {"anchor": "query", "positive": "passage"}),
    ],
)  # fmt: skip
def test_init_proposes_the_settings_that_fit_the_data(tmp_path: Path, data: str, task: Any, columns: dict[str, str]) -> None:
    ending = "jsonl" if data.startswith("{") else "conllu" if data.startswith("1") else "conll"
    (tmp_path / f"data.{ending}").write_text(data * 30)
    job = yaml.safe_load(scaffold.new(None, str(tmp_path / f"data.{ending}"), tmp_path / "job.yaml"))
    assert job["task"] == task and job["data"]["columns"] == columns


def test_the_task_says_which_model_to_begin_with(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Raw, "example_model", "config://bert")
    (here / "raw.csv").write_text("text\n" + "\n".join(f"text {n}" for n in range(30)))
    (here / "job.yaml").write_text(scaffold.new("raw", "raw.csv", here / "job.yaml"))
    assert load(here / "job.yaml").model.base == "config://bert"


def test_a_second_choice_is_named(here: Path) -> None:
    (here / "data.csv").write_text("text,label\n" + "\n".join(f"text {n},{n % 2}" for n in range(30)))
    found = scaffold.propose("data.csv", list(TASKS))
    assert "text-classification" in (found.task, *found.others) and "classes" in (found.task, *found.others)
    assert "might be" in scaffold.new(None, "data.csv", here / "job.yaml")


def test_pictures_that_a_table_names_lie_beside_it(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    (tmp_path / "pictures.csv").write_text("image,label\n" + "\n".join(f"{n % 4}.png,{'ab'[n % 2]}" for n in range(30)))
    assert scaffold.propose(str(tmp_path / "pictures.csv"), list(TASKS)).task == "image-classification"


def test_data_for_no_task_is_said(here: Path) -> None:
    (here / "numbers.csv").write_text("a,b\n" + "\n".join(f"{n},{n}" for n in range(30)))
    with pytest.raises(InputError, match=r"init: no task fits the columns 'a', 'b' of 'numbers.csv'; say which it is with --task"):
        scaffold.new(None, "numbers.csv", here / "job.yaml")
    (here / "nothing.csv").write_text("")
    with pytest.raises(InputError, match=r"nothing\.csv"):
        scaffold.new(None, "nothing.csv", here / "job.yaml")


def test_a_wrong_value_does_not_hide_a_column_of_pictures() -> None:
    files = ["", "unknown", *(f"{n}.png" for n in range(9))]
    assert guessing.guess(Pictures.roles, [{"file": file, "label": "ab"[n % 2]} for n, file in enumerate(files)])["image"].column == "file"


def test_pictures_without_boxes_are_no_data_to_detect_objects_in(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text("file,label\n0.png,a\n")
    with pytest.raises(InputError, match=r"'0\.png' has no known format; name a glob such as .*\*\.csv"):
        scaffold.propose(str(tmp_path), list(TASKS))
    (tmp_path / "0.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "labels.csv").unlink()
    assert scaffold.propose(str(tmp_path), list(TASKS)).task == "object-detection"


@pytest.mark.parametrize("task", ["text2text", "text-generation"])
def test_a_job_without_a_column_for_its_task_says_which_there_are(tmp_path: Path, task: str) -> None:
    (tmp_path / "pairs.csv").write_text("english,german\n" + "\n".join(f"a house {n},ein Haus {n}" for n in range(9)))
    text = scaffold.new(task, str(tmp_path / "pairs.csv"), tmp_path / "job.yaml")
    assert "# no column looks like it; there is english, german" in text
    (tmp_path / "job.yaml").write_text(text)
    assert load(tmp_path / "job.yaml").data.columns


def test_the_languages_of_a_translation_are_found(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"translation": {"en": f"house {n}", "de": f"Haus {n}"}}) for n in range(9)))
    (tmp_path / "job.yaml").write_text(scaffold.new(None, str(tmp_path / "pairs.jsonl"), tmp_path / "job.yaml"))
    task: Any = load(tmp_path / "job.yaml").task
    assert (task.key, task.source_lang, task.target_lang) == ("text2text", "en", "de")


def test_pictures_of_ones_own_begin_with_a_pretrained_model(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "0.png")
    (tmp_path / "job.yaml").write_text(scaffold.new(None, str(tmp_path / "photos"), tmp_path / "job.yaml"))
    job = load(tmp_path / "job.yaml")
    assert (job.task.key, job.model.base, job.model.config) == ("image-classification", "example://efficientnet-lite0", {})
