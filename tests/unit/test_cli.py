"""The commands: what they hand on, what they print, and how they end. What they call is stood in for here."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from orchestrator import cli, tasks
from orchestrator.errors import InputError, StageError

JOB = "task: text-classification\nmodel: {base: minilm}\ndata: {train: reviews.csv}\n"
RESULT = {"run": "job-1", "run_dir": "/runs/job-1", "metrics": {"test": {"accuracy": 0.9, "loss": float("nan")}}, "timings": {"train": 1.5}}


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(JOB, encoding="utf-8")
    return path


class Ended:
    def __init__(self, status: int, out: str, err: str):
        self.status, self.out, self.err = status, out, err

    @property
    def result(self) -> dict:
        return json.loads(self.out.splitlines()[-1])


@pytest.fixture
def orchestrator(monkeypatch, capfd):
    """Runs the command line in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["orchestrator", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return Ended(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture
def stand_in(monkeypatch):
    """`stand_in("jobs.pipeline", main)` puts a module with that `main` in place; returns the calls it got."""

    def place(name: str, main=lambda *args, **options: RESULT) -> list:
        calls: list = []

        def called(*args, **options):
            calls.append((args, options))
            return main(*args, **options)

        module = types.ModuleType(name)
        module.main = called  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return place


COMMANDS = [
    "init",
    "validate",
    "run",
    "train",
    "evaluate",
    "predict",
    "serve",
    "models list",
    "models show",
    "models promote",
    "models export",
]
COMMANDS += ["submit", "jobs list", "jobs status", "jobs logs", "jobs stop", "tasks", "schema", "doctor"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json_and_verbose(command, orchestrator, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    ended = orchestrator(*command.split(), "--help")
    assert ended.status == 0
    assert "--json" in ended.out and "--verbose" in ended.out


def test_help_imports_nothing_heavy():
    script = """
import sys
sys.argv = ["orchestrator", "run", "--help"]
from orchestrator.cli import main
try:
    main()
except SystemExit:
    pass
heavy = {"ray", "torch", "transformers", "mlflow", "pyarrow", "pandas", "numpy", "sklearn", "datasets", "fastapi"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_without_a_command_there_is_help(orchestrator):
    ended = orchestrator()
    assert ended.status == 0 and "validate" in ended.out


@pytest.mark.parametrize(("command", "until"), [("run", "deploy"), ("train", "train"), ("evaluate", "evaluate")])
def test_stages_go_to_the_job_module_with_the_resolved_job(command, until, orchestrator, stand_in, job_file, tmp_path):
    calls = stand_in("jobs.pipeline")
    ended = orchestrator(command, job_file, "--set", "training.learning_rate=3e-5", "--set", "task.problem=regression", "--storage", "s")
    assert ended.status == 0
    [((job,), options)] = calls
    assert job.training.learning_rate == 3e-5
    assert job.task.problem == "regression"
    assert job.storage == str(tmp_path / "s")
    assert (options["until"], options["promote"], options["keep_serving"], options["fresh"]) == (until, False, False, False)


def test_switches_of_run(orchestrator, stand_in, job_file):
    calls = stand_in("jobs.pipeline")
    orchestrator("run", job_file, "--promote", "--keep-serving", "--fresh", "--address", "head:6379", "-v")
    [(_, options)] = calls
    assert {key: options[key] for key in ("promote", "keep_serving", "fresh", "verbose", "address")} == {
        "promote": True, "keep_serving": True, "fresh": True, "verbose": True, "address": "head:6379",
    }  # fmt: skip


def test_json_is_the_last_line_of_standard_output_and_people_read_standard_error(orchestrator, stand_in, job_file):
    def main(job, *, display, **_):
        display.stage("train")
        display.say("two workers")
        print("a library's chatter")
        return RESULT

    stand_in("jobs.pipeline", main)
    ended = orchestrator("run", job_file, "--json")
    assert ended.result == {"status": "done", **RESULT, "metrics": {"test": {"accuracy": 0.9, "loss": None}}}
    assert "two workers" in ended.err and "two workers" not in ended.out
    assert "two workers" in orchestrator("run", job_file).out


def test_dry_run_writes_the_resolved_job_and_stops(orchestrator, stand_in, job_file, tmp_path):
    calls = stand_in("jobs.pipeline")
    ended = orchestrator("run", job_file, "--dry-run", "--set", "training.seed=7", "--json")
    assert (ended.status, calls, ended.result["status"]) == (0, [], "dry-run")
    written = Path(ended.result["job"])
    assert written == tmp_path / "runs" / ended.result["run"] / "job.json"
    assert json.loads(written.read_text(encoding="utf-8"))["training"]["seed"] == 7
    assert str(written) in ended.err


def failing(error: BaseException):
    def main(*_, display, **__):
        display.stage("train")
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (InputError("data.train: there is no file."), 2, "data.train: there is no file."),
        (StageError("The worker on node a died."), 1, "The worker on node a died."),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (
            OSError(28, "No space left on device", "/data/x"),
            2,
            "storage: the disk is full at /data/x. Free some room, or give another --storage.",
        ),
        (OSError(5, "Input/output error"), 1, "OSError: [Errno 5] Input/output error"),
        (RuntimeError("first line\nsecond line"), 1, "RuntimeError: first line"),
        (RuntimeError(), 1, "RuntimeError: no message"),
    ],
)
def test_an_error_is_a_sentence_at_the_end_and_a_status(error, status, sentence, orchestrator, stand_in, job_file):
    stand_in("jobs.pipeline", failing(error))
    ended = orchestrator("run", job_file, "--json")
    assert ended.status == status
    assert ended.err.splitlines()[-1] == f"error: {sentence}"
    assert ended.result["status"] == "failed"
    kind = "InputError" if status == 2 else type(error).__name__
    assert (ended.result["error"], ended.result["error_type"]) == (sentence, kind)
    assert "Traceback" not in ended.err
    shown = orchestrator("run", job_file, "-v")
    assert "Traceback" in shown.err and shown.err.splitlines()[-1] == f"error: {sentence}"


def test_the_traceback_of_an_unexpected_error_is_kept_with_the_run(orchestrator, stand_in, job_file):
    orchestrator("run", job_file, "--dry-run")
    stand_in("jobs.pipeline", failing(KeyError("x")))
    ended = orchestrator("run", job_file, "--json")
    kept = Path(ended.result["traceback"])
    assert kept.name == "traceback.txt" and kept.parent.parent.name == "runs"
    assert "KeyError: 'x'" in kept.read_text(encoding="utf-8")
    assert str(kept) in ended.err


def test_ctrl_c_ends_with_130(orchestrator, stand_in, job_file):
    stand_in("jobs.pipeline", failing(KeyboardInterrupt()))
    ended = orchestrator("run", job_file, "--json")
    assert ended.status == 130
    assert ended.result["status"] == "interrupted"
    assert "the same command goes on from there" in ended.err


def test_the_sentence_is_found_behind_what_ray_wraps_around_it():
    class Wrapper(InputError, RuntimeError):
        """As Ray does: an instance of the original's class, whose text is a traceback."""

    inner = InputError("row 3 is empty")
    wrapped = Wrapper("ray::Worker.run() Traceback ...")
    wrapped.cause = inner  # type: ignore[attr-defined]
    outer = RuntimeError("training failed")
    outer.__cause__ = wrapped
    assert cli.root_cause(outer) is inner

    own = StageError("Training gave up after 3 failures.")
    own.__cause__ = outer
    assert cli.root_cause(own) is own

    looped = ValueError("a")
    looped.__cause__ = RuntimeError("b")
    looped.__cause__.__cause__ = looped
    assert cli.root_cause(looped) is looped.__cause__


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rum"], "No such command 'rum'. Did you mean 'run'? `orchestrator --help` says what there is."),
        (["run"], "Missing argument 'JOB'. `orchestrator run --help` says what there is."),
        (["run", "job.yaml", "--zzz"], "No such option: --zzz. `orchestrator run --help` says what there is."),
        (["models", "lst"], "No such command 'lst'. Did you mean 'list'? `orchestrator models --help` says what there is."),
        (["run", "nope.yaml"], "There is no job file 'nope.yaml'; `orchestrator init` writes one."),
        (
            ["run", "job.yaml", "--set", "training"],
            "--set 'training' is not of the form path=value, as in --set training.learning_rate=3e-5.",
        ),
        (["run", "job.yaml", "--set", "trainin.seed=1"], "job.yaml: unknown key 'trainin'. Did you mean 'training'?"),
    ],
)
def test_bad_arguments_are_a_sentence_and_status_2(arguments, sentence, orchestrator, job_file):
    ended = orchestrator(*arguments, "--json")
    assert ended.status == 2
    assert ended.err.splitlines()[-1] == f"error: {sentence}"
    assert ended.result["error"] == sentence


def test_control_characters_in_an_error_do_not_reach_the_terminal(orchestrator, stand_in, job_file):
    stand_in("jobs.pipeline", failing(InputError("found '\x1b[2J'")))
    assert "\x1b" not in orchestrator("run", job_file).err


def test_predict_and_serve_hand_on_what_was_asked(orchestrator, stand_in, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", "/from/environment")
    predicted = stand_in("jobs.predict")
    served = stand_in("jobs.serve")
    assert orchestrator("predict", "reviews@champion", "in.csv", "out.jsonl", "--set", "data.columns.text=body").status == 0
    assert orchestrator("serve", "reviews/3", "--host", "0.0.0.0", "--port", 9000, "--storage", "/given").status == 0
    [(arguments, options)] = predicted
    assert arguments == ("reviews@champion", "in.csv", "out.jsonl")
    assert (options["storage"], options["assignments"]) == ("/from/environment", ["data.columns.text=body"])
    [(arguments, options)] = served
    assert arguments == ("reviews/3",)
    assert (options["storage"], options["host"], options["port"]) == ("/given", "0.0.0.0", 9000)


def test_predict_refuses_an_input_before_it_starts_ray(tmp_path, monkeypatch):
    from jobs import predict
    from orchestrator import bundle, cluster
    from orchestrator.progress import Silent

    trained = {"columns": {"text": "review"}, "delimiter": None, "header": True, "names": None, "encoding": "utf-8"}
    model = types.SimpleNamespace(task=tasks.create("text-classification"), job={"data": trained})

    def no_session(*_, **__):
        raise AssertionError("Ray is started")

    monkeypatch.setattr(bundle, "load", lambda uri: model)
    monkeypatch.setattr(
        "orchestrator.registry.Registry.resolve", lambda self, name: types.SimpleNamespace(bundle="b", name="n", version=None)
    )
    monkeypatch.setattr(cluster, "session", no_session)
    (tmp_path / "in.csv").write_text("text,label\ngood,1\n")
    for source, target, says in (
        ("nothing.csv", "out.csv", "^INPUT: there is no file"),
        ("in.csv", "out.csv", "^INPUT: there is no column 'review'"),
        ("in.csv", "out.txt", "must end in"),
    ):
        with pytest.raises(InputError, match=says):
            predict.main("m", str(tmp_path / source), str(tmp_path / target), storage=str(tmp_path), display=Silent())


def test_an_empty_registry_is_said_and_makes_no_files(orchestrator, tmp_path):
    ended = orchestrator("models", "list", "--storage", tmp_path / "s", "--json")
    assert (ended.status, ended.result) == (0, {"status": "done", "models": []})
    assert "There are no models" in ended.err
    assert not (tmp_path / "s").exists()


def test_a_check_that_fails_is_status_2_and_the_table_is_still_shown(orchestrator, stand_in, job_file):
    from orchestrator.doctor import Check

    checks = [
        Check("data", True, "train: 1 csv file"),
        Check("model", False, "model.base: there is no 'minilm'."),
        Check("disk", None, "not known"),
    ]
    stand_in("jobs.validate", lambda job, **_: checks)
    ended = orchestrator("validate", job_file, "--json")
    assert ended.status == 2
    assert re.search(r"data +ok +train: 1 csv file", ended.err) and re.search(r"disk +unknown +not known", ended.err)
    assert ended.result["error"] == "model.base: there is no 'minilm'."
    stand_in("jobs.validate", lambda job, **_: checks[:1])
    assert orchestrator("validate", job_file, "--quick", "--json").result["checks"][0]["name"] == "data"


def test_validate_lists_the_rows_that_can_not_be_used(orchestrator, tmp_path, monkeypatch):
    from tests.fixtures.tiny import text_base

    monkeypatch.chdir(tmp_path)
    rows = [f"{'good' if number % 2 else 'bad'} phone {number},{number % 2}" for number in range(40)]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join([*rows, '"",1', "fine,"]) + "\n", encoding="utf-8")
    base = text_base(tmp_path / "base", ["good bad phone"])
    (tmp_path / "job.yaml").write_text(
        f"task: text-classification\nmodel: {{base: {base}}}\ndata: {{train: reviews.csv}}\n", encoding="utf-8"
    )
    ended = orchestrator("validate", "job.yaml", "--json")
    assert ended.status == 2
    assert ended.result["rows"] == {
        "usable": {"train": 40},
        "bad": 2,
        "bad_rows": [
            {"file": "reviews.csv", "row": 42, "field": "text", "expected": "a text that is not empty", "found": ""},
            {"file": "reviews.csv", "row": 43, "field": "label", "expected": "a label", "found": ""},
        ],
    }
    assert "2 of 42 rows can't be used (4.76%; data.max_bad_rows allows 0)" in ended.err
    assert re.search(r"reviews\.csv +42 +text +a text that is not empty", ended.err)
    (tmp_path / "wide.csv").write_text("text,label\ngood,0\nbad,1\nmore,fields,here\n", encoding="utf-8")
    unreadable = orchestrator("validate", "job.yaml", "--set", "data.train=wide.csv", "--json")
    assert re.search(r"wide\.csv +4 +2 fields \(text, label\)", unreadable.err)  # no field is to blame
    for asked in ("evaluation.metrics=[f1/2]", "training.metric_for_best_model=eval_f1/2"):
        of_no_label = orchestrator("validate", "job.yaml", "--set", "data.max_bad_rows=0.1", "--set", asked)
        assert of_no_label.status == 2 and "the task has no metric 'f1/2'. Did you mean 'f1/0'" in of_no_label.err
    allowed = orchestrator("validate", "job.yaml", "--set", "data.max_bad_rows=0.1", "--json")
    assert allowed.status == 0 and allowed.result["rows"]["bad"] == 2
    assert "40 train; 2 can't be used and will be left out (4.76%)" in allowed.err
    refused = orchestrator("validate", "job.yaml", "--set", "data.max_bad_rows=0.1", "--set", "model.freeze=[emmbeddings]", "--json")
    assert refused.status == 2 and "has no weights called 'emmbeddings'. Did you mean 'embeddings'?" in refused.result["error"]


def test_tasks_and_schema_list_every_task(orchestrator):
    listed = orchestrator("tasks", "--json").result["tasks"]
    assert [task["name"] for task in listed] == list(tasks.TASKS)
    assert all(task["help"] and task["columns"] and task["metrics"] for task in listed)
    schema = json.loads(orchestrator("schema").out)
    assert orchestrator("schema", "--json").result["schema"] == schema
    assert schema["properties"]["task"]["anyOf"][0]["enum"] == list(tasks.TASKS)


def test_the_schema_says_what_the_job_file_says():
    import jsonschema

    from orchestrator.reference import job_schema

    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    job = {"task": "text-classification", "model": {"base": "x"}, "data": {"train": "y"}}
    validator.validate(job)
    validator.validate(job | {"task": {"name": "text-classification", "problem": "multi-label"}})
    validator.validate(job | {"task": "my_pkg.my_task:MyTask"})
    for wrong in ({"task": "nope"}, {"task": {"name": "text-classification", "problm": 1}}, {"trainin": {}}, {"data": {}}):
        assert list(validator.iter_errors(job | wrong))


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    """`orchestrator schema | head -1`"""
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "schema"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")
