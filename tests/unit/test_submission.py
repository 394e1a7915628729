"""What is sent to a cluster and under which name; no Ray."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import submission, upload
from orchestrator.catalog import local_path
from orchestrator.config import JobConfig
from orchestrator.errors import InputError
from orchestrator.progress import Silent
from orchestrator.upload import Upload


class Listening(Silent):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, sentence: str) -> None:
        self.warned.append(sentence)


def job(train: str | list[str], **more: Any) -> JobConfig:
    value = {"storage": "s3://b/runs", "task": "text-classification", "model": {"base": "example://minilm"}, "data": {"train": train}}
    return JobConfig.parse({**value, **more})


def stage(asked: JobConfig, folder: Path, *, here: bool = False) -> tuple[JobConfig, Upload, list[str]]:
    display, along = Listening(), Upload()
    staged = upload.stage(asked, folder, here=here, sent=along, display=display)
    return staged, along, display.warned


@pytest.fixture
def sent(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder that is sent, and Python's path as in a process of the cluster."""
    folder = tmp_path / "sent"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("job_files", None)


def test_files_go_along_and_the_job_finds_them(tmp_path, sent):
    reviews = tmp_path / "reviews.csv"
    reviews.write_text("text,label\n")
    staged, upload, _ = stage(job(str(reviews)), sent)
    assert Path(local_path(staged.data.train)).read_text() == "text,label\n"
    assert Path(local_path(staged.data.train)).is_relative_to(sent)
    assert (upload.files, upload.size, upload.named) == (1, 11, ["data.train (reviews.csv, 1 kB)"])


def test_the_same_files_make_the_same_run_and_changed_ones_another(tmp_path):
    reviews = tmp_path / "reviews.csv"
    runs = []
    for index, content in enumerate(["a\n", "a\n", "b\n"]):
        reviews.write_text(content)
        (tmp_path / str(index)).mkdir()
        runs.append(stage(job(str(reviews)), tmp_path / str(index))[0].run_id)
    assert runs[0] == runs[1] != runs[2]


def test_folders_and_globs_keep_their_shape(tmp_path, sent):
    for name in ("good/1.txt", "bad/1.txt"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True)
        (tmp_path / "texts" / name).write_text(name)
    (tmp_path / "parts").mkdir()
    for name in ("a.csv", "b.csv", "c.txt"):
        (tmp_path / "parts" / name).write_text(name)
    staged, _, _ = stage(job([str(tmp_path / "texts"), str(tmp_path / "parts" / "*.csv")]), sent)
    folder, *files = staged.data.train
    assert sorted(path.relative_to(local_path(folder)).as_posix() for path in Path(local_path(folder)).rglob("*.txt")) == [
        "bad/1.txt",
        "good/1.txt",
    ]
    assert [Path(local_path(file)).read_text() for file in files] == ["a.csv", "b.csv"]


def test_a_model_folder_goes_along_and_uris_stay(tmp_path, sent):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    asked = job("s3://bucket/reviews.csv", model={"base": str(tmp_path / "model")})
    staged, _, _ = stage(asked, sent)
    assert staged.data.train == "s3://bucket/reviews.csv"
    assert (Path(local_path(staged.model.base)) / "config.json").read_text() == "{}"
    hub = job("s3://bucket/reviews.csv", model={"base": "org/model"})
    assert stage(hub, sent)[0] == hub


def test_too_much_is_refused_with_sizes_before_anything_is_copied(tmp_path, sent, monkeypatch):
    monkeypatch.setattr(upload, "UPLOAD_BYTES", 100_000)
    (tmp_path / "reviews.csv").write_bytes(b"x" * 300_000)
    with pytest.raises(InputError, match=r"0\.3 MB of files.*data\.train .*reviews\.csv \(0\.3 MB\); up to 0\.1 MB.*s3://"):
        stage(job(str(tmp_path / "reviews.csv")), sent)
    assert list(sent.iterdir()) == []


def test_what_is_not_here_may_be_there_only_by_its_whole_path(tmp_path, sent):
    staged, _, warned = stage(job("/shared/of/the/cluster.csv"), sent)
    assert staged.data.train == "/shared/of/the/cluster.csv" and "not on this machine" in warned[0]
    with pytest.raises(InputError, match=r"data\.train: there is no file 'reviews\.csv' on this machine"):
        stage(job("reviews.csv"), sent)


def test_on_this_machine_paths_become_absolute_and_nothing_is_copied(tmp_path, sent, monkeypatch):
    monkeypatch.chdir(tmp_path)
    staged, upload, _ = stage(job("reviews.csv", storage="runs"), sent, here=True)
    assert (staged.data.train, staged.storage) == (str(tmp_path / "reviews.csv"), str(tmp_path / "runs"))
    assert upload.files == 0 and list(sent.iterdir()) == []


def test_storage_on_a_cluster_is_shared(sent):
    with pytest.raises(InputError, match=r"storage: 'runs' would be a temporary folder.*s3://"):
        stage(job("s3://b/x.csv", storage="runs"), sent)
    assert "all nodes" in stage(job("s3://b/x.csv", storage="/mnt/runs"), sent)[2][0]
    assert stage(job("s3://b/x.csv"), sent)[2] == []


def test_the_three_packages_go_along_without_rubbish(sent):
    along = Upload()
    upload.stage_packages(job("a.csv"), sent, along)
    assert {path.name for path in sent.iterdir()} == {"orchestrator", "jobs", "serving"}
    assert (sent / "jobs/pipeline.py").is_file() and (sent / "jobs/recipes").is_dir() and (sent / "serving/app.py").is_file()
    files = [path for path in sent.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix == ".pyc" or path.name.startswith(".")]
    assert along.files == len(files) and along.size == sum(path.stat().st_size for path in files) < 5 * upload.MB


def test_a_task_of_the_users_own_goes_along(tmp_path, sent, monkeypatch):
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg/__init__.py").write_text("")
    (tmp_path / "my_pkg/mine.py").write_text(
        "from orchestrator.tasks.base import Task\nclass Mine(Task):\n    def metrics(self): return ('accuracy',)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    upload.stage_packages(job("a.csv", task="my_pkg.mine:Mine"), sent, Upload())
    assert (sent / "my_pkg/mine.py").is_file()
    assert upload._own_package("yaml") == upload._own_package("json") == {}  # installed: the cluster has them too


def details(identifier: str, status: str, attempt: int, asked: str = "q", run: str = "reviews-1") -> Any:
    return SimpleNamespace(
        submission_id=identifier, status=SimpleNamespace(value=status), start_time=1_700_000_000_000, end_time=None, message=None,
        metadata={"run": run, "asked": asked, "attempt": str(attempt)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("known", "again", "number", "running"),
    [
        ([], False, 1, None),
        ([("PENDING", 1)], False, 1, "reviews-1"),
        ([("RUNNING", 1)], True, 1, "reviews-1"),
        ([("SUCCEEDED", 1)], False, 1, "reviews-1"),
        ([("SUCCEEDED", 1)], True, 2, None),
        ([("FAILED", 1)], False, 2, None),
        ([("STOPPED", 1)], False, 2, None),
        ([("FAILED", 2), ("FAILED", 1)], False, 3, None),
        ([("RUNNING", 2), ("FAILED", 1)], False, 2, "reviews-1-a2"),
    ],
)
def test_a_job_is_started_once_and_again_only_after_it_failed(known, again, number, running):
    jobs = [details("reviews-1" if attempt == 1 else f"reviews-1-a{attempt}", status, attempt) for status, attempt in known]
    jobs.append(details("another", "FAILED", 5, run="another"))
    jobs.append(SimpleNamespace(submission_id="raysubmit_x", metadata=None, status=SimpleNamespace(value="RUNNING")))
    found = submission._next(jobs, "reviews-1", "q", again=again)
    assert (found[0], found[1] and found[1]["id"]) == (number, running)


def test_a_done_job_asked_otherwise_runs_again():
    assert submission._next([details("reviews-1", "SUCCEEDED", 1, asked="other")], "reviews-1", "q", again=False) == (2, None)


def test_a_job_is_shown_as_plain_json():
    shown = submission._shown(details("reviews-1", "RUNNING", 1))
    assert json.loads(json.dumps(shown)) == shown
    assert (shown["id"], shown["status"], shown["started"], shown["ended"]) == ("reviews-1", "RUNNING", "2023-11-14T22:13:20+00:00", "")


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("http://head:8265", "http://head:8265"),
        ("head", "http://head:8265"),
        ("127.0.0.1:9000/", "http://127.0.0.1:9000"),
        ("https://ray.example.com/", "https://ray.example.com"),
    ],
)
def test_what_people_type_becomes_the_dashboards_url(typed, url):
    assert submission._dashboard(typed) == url


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("ray://head:10001", "not a dashboard's address"),
        ("head:6379", r"jobs are submitted to its dashboard, http://head:8265"),
        ("h:x", "no number"),
    ],
)
def test_other_addresses_are_sentences(typed, sentence):
    with pytest.raises(InputError, match=sentence):
        submission._dashboard(typed)


def test_the_token_is_found_where_ray_looks(tmp_path, monkeypatch):
    for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert submission._authorization() == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of home\n")
    assert submission._authorization() == {"Authorization": "Bearer of home"}
    (tmp_path / "token").write_text("of path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert submission._authorization() == {"Authorization": "Bearer of path"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of environment")
    assert submission._authorization() == {"Authorization": "Bearer of environment"}
