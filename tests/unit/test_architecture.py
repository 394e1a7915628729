"""The shape of the product: arrows point down, no task is asked its name, Ray is the outside."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.tasks import TASKS, task_class

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("orchestrator", "jobs", "serving")
INNER = ("tasks", "schema", "config", "loop", "batching", "bundle", "models", "processors", "predictor")
CONCRETE = {target.partition(":")[0] for target in TASKS.values()}
TASK_WORDS = {"task", "task_name", "task_type", "key"}


def sources(*, tasks: bool) -> list[Path]:
    """The product's modules, with or without those of the tasks."""
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path for path in found if tasks or "tasks" not in path.relative_to(ROOT).parts]


def name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def questions(tree: ast.AST, task_classes: set[str]) -> Iterator[tuple[int, str]]:
    """Places that ask a task what it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in TASKS:
            yield node.lineno, f"names the task {node.value!r}"
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = any(isinstance(part, ast.Constant) and isinstance(part.value, str) for side in sides for part in ast.walk(side))
            if texts and any(name(side) in TASK_WORDS and (name(side) != "key" or "task" in ast.unparse(side)) for side in sides):
                yield node.lineno, f"compares a task: {ast.unparse(node)}"
        elif isinstance(node, ast.Match) and "task" in ast.unparse(node.subject):
            yield node.lineno, f"matches on a task: {ast.unparse(node.subject)}"
        elif isinstance(node, ast.Call) and name(node.func) in ("isinstance", "issubclass") and len(node.args) == 2:
            # A layer may have the name of a task.
            classes = {name(part) for part in ast.walk(node.args[1]) if not ast.unparse(part).startswith("torch.nn.")}
            if classes & task_classes:
                yield node.lineno, f"asks for a task's class: {ast.unparse(node)}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", "") or ""
            imported = {alias.name for alias in node.names} | {module} | {f"{module}.{alias.name}" for alias in node.names}
            if imported & CONCRETE:
                yield node.lineno, f"imports a concrete task: {ast.unparse(node)}"


def task_classes() -> set[str]:
    classes = {base.__name__ for target in TASKS for base in task_class(target).__mro__}
    return classes - {"object", "Schema", "BaseModel"}


def test_no_task_is_asked_its_name_or_class_outside_the_tasks():
    classes = task_classes()
    found = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in sources(tasks=False)
        for line, what in questions(ast.parse(path.read_text(encoding="utf-8")), classes)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        'if task == "x": pass',
        'if "x" != job.task.name_: pass\nif job.task == "x": pass',
        'if task.key in ("a", "b"): pass',
        "isinstance(task, TextClassification)",
        "isinstance(value, (str, Task))",
        "issubclass(found, Task)",
        "match task:\n    case _: pass",
        f"chosen = {next(iter(TASKS))!r}",
        f"import {sorted(CONCRETE)[0]}",
        "from orchestrator.tasks import text_classification",
    ],
)
def test_the_scan_finds_what_it_looks_for(code):
    assert list(questions(ast.parse(code), task_classes()))


@pytest.mark.parametrize(
    "code", ['if key == "data": pass', 'if column == "text": pass', "isinstance(value, str)", "match kind:\n    case _: pass"]
)
def test_the_scan_finds_nothing_else(code):
    assert not list(questions(ast.parse(code), task_classes()))


def test_arrows_point_down_only():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_its_layer():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = {part.strip(" ()") for layer in contracts[0]["layers"] for part in layer.split("|")}
    root = ROOT / "orchestrator"
    modules = {f"orchestrator.{path.stem}" for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    inside = {f"orchestrator.search.{path.stem}" for path in (root / "search").glob("*.py")}
    modules = (modules | inside) - {"orchestrator.__init__", "orchestrator.search", "orchestrator.search.__init__"}
    assert layers - {"jobs", "serving"} == modules


def test_ray_is_the_outside():
    """The contract of import-linter reads the sources; this looks at what importing the inner modules brings in."""
    script = (
        f"import importlib, sys\nfor name in {INNER!r}: importlib.import_module('orchestrator.' + name)\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_modules_are_named_after_what_they_do():
    assert not {path.stem for path in sources(tasks=True)} & {"utils", "util", "helpers", "common", "misc"}
