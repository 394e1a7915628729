"""The job file: defaults < file < `--set`, relative paths, and the run's name."""

import json
from pathlib import Path

import pytest

from orchestrator.config import JobConfig, load
from orchestrator.errors import InputError

MINIMAL = "task: text-classification\nmodel: {base: example://minilm}\ndata: {train: reviews.csv, columns: {text: review, label: stars}}\n"


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    (tmp_path / "reviews.csv").write_text("review,stars\ngood,5\n", encoding="utf-8")
    path = tmp_path / "my reviews.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_task_model_and_data_are_enough_and_the_file_names_the_job(job_file):
    job = load(job_file)
    assert job.name == job.model_name == "my-reviews"
    assert job.training.learning_rate == 5e-5
    assert job.storage == str(Path("runs").absolute())


def test_set_comes_after_the_file_and_top_after_all(job_file):
    job_file.write_text(MINIMAL + "training: {learning_rate: 1.0e-4, num_train_epochs: 2}\nstorage: here\n", encoding="utf-8")
    job = load(job_file, ["training.learning_rate=3e-5", "registry.model=other"], storage="/there")
    assert (job.training.learning_rate, job.training.num_train_epochs, job.storage, job.model_name) == (3e-5, 2.0, "/there", "other")
    assert load(job_file, storage=None).storage == str(Path("here").absolute())


def test_a_job_that_names_no_storage_takes_the_environments(job_file, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", "s3://bucket/runs")
    assert load(job_file).storage == "s3://bucket/runs"
    assert load(job_file, ["storage=/mine"]).storage == "/mine"


def test_numbers_as_yaml_reads_them_are_numbers(job_file):
    """YAML 1.1 takes `5e-5` for text; people mean the number."""
    job_file.write_text(MINIMAL + "training: {learning_rate: 5e-5}\n", encoding="utf-8")
    assert load(job_file).training.learning_rate == 5e-5


def test_paths_are_relative_to_the_job_file_where_they_exist_there(job_file, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.csv").touch()
    job = load(job_file, ["model.base=model", "data.validation=[more/*.csv, elsewhere.csv, s3://bucket/x.csv, /abs.csv]"])
    assert job.data.train == str(tmp_path / "reviews.csv")
    assert job.data.validation == [str(tmp_path / "more/*.csv"), "elsewhere.csv", "s3://bucket/x.csv", "/abs.csv"]
    assert job.model.base == str(tmp_path / "model")
    assert load(job_file).model.base == "example://minilm"


def test_a_resolved_job_read_again_is_the_same_job(job_file, tmp_path):
    job = load(job_file, ["task.problem=multi-label", "training.max_steps=7"])
    resolved = tmp_path / "run" / "job.json"
    resolved.parent.mkdir()
    resolved.write_text(json.dumps(job.to_json()), encoding="utf-8")
    assert load(resolved) == job
    assert load(resolved).run_id == job.run_id


def test_a_run_is_named_after_the_question_not_after_where_it_is_answered(job_file):
    job = load(job_file)
    for assignment in ("resources.num_workers=4", "serving.port=9000", "registry.alias=x", "storage=/elsewhere"):
        assert load(job_file, [assignment]).run_id == job.run_id
    for assignment in (
        "training.seed=1",
        "task.problem=regression",
        "model.base=other",
        "data.train=b.csv",
        "evaluation.metrics=[accuracy]",
    ):
        assert load(job_file, [assignment]).run_id != job.run_id


def test_with_a_batch_size_per_device_the_number_of_workers_is_part_of_the_question(job_file):
    per_device = ["training.per_device_train_batch_size=8"]
    two, four = (load(job_file, [*per_device, f"resources.num_workers={count}"]) for count in (2, 4))
    assert two.run_id != four.run_id
    assert (two.training.global_batch(2), four.training.global_batch(4)) == (16, 32)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("trainin: {}\n", "my reviews.yaml: unknown key 'trainin'. Did you mean 'training'?"),
        ("training: {learningrate: 1}\n", "unknown key 'training.learningrate'. Did you mean 'learning_rate'?"),
        ("training: {global_batch_size: 8, per_device_train_batch_size: 8}\n", "give one of them"),
        ("name: a b\n", "name: String should match pattern"),
        ("serving: {replicas: {min: 3, max: 2}}\n", "serving.replicas: min is 3 and max is 2"),
        ("serving: {port: 99999}\n", "serving.port: .*65535.*given: 99999"),
        ("training: {lr_scheduler_type: cosin}\n", "training.lr_scheduler_type: .*'cosine'.*given: 'cosin'"),
    ],
)
def test_a_wrong_key_or_value_is_a_sentence(job_file, more, sentence):
    job_file.write_text(MINIMAL + more, encoding="utf-8")
    with pytest.raises(InputError, match=sentence):
        load(job_file)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("data.split={validation: 0.5, test: 0.5}", "leaves nothing to train on"),
        ("data.header=false", "data: header: false needs data.names"),
        ("task=text-clasification", "task: there is no task 'text-clasification'. Did you mean 'text-classification'?"),
        ("task=no_such_module:Task", "needs the module 'no_such_module'"),
        ("task=json:JSONDecoder", "is not a Task"),
        ("task=json:Nothing", "has no 'Nothing'"),
        ("task=[1]", "expected a task's name"),
        ("task.problm=x", "unknown key 'problm'. Did you mean 'problem'?"),
        ("task.max_length=1", r"^my reviews.yaml: task: max_length: [^.]*\(given: 1\)\.$"),
        ("task.labels=[]", r"^my reviews.yaml: task: labels: [^.]*\(given: \(\)\)\.$"),
    ],
)
def test_a_wrong_assignment_is_a_sentence(job_file, assignment, sentence):
    with pytest.raises(InputError, match=sentence):
        load(job_file, [assignment])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"- a\n", "has keys such as task, model and data; this one is list"),
        (b"", "this one is NoneType"),
        (b"a: [1\n", "not YAML"),
        (b"a: \xff\n", "not UTF-8 at byte 3"),
    ],
)
def test_what_is_not_a_job_file_is_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        load(path)


def test_a_missing_file_and_a_folder_are_sentences(tmp_path):
    with pytest.raises(InputError, match=r"There is no job file .*`orchestrator init` writes one"):
        load(tmp_path / "nope.yaml")
    with pytest.raises(InputError, match="is a folder, not a job file"):
        load(tmp_path)


def test_equal_jobs_are_equal_values(job_file):
    assert load(job_file) == load(job_file)
    assert isinstance(load(job_file), JobConfig)
