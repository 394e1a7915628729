"""Writes a first job file: commented, complete, with the columns of the user's data in the roles that they look like."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config import DataSection
from orchestrator.data import sources
from orchestrator.errors import InputError
from orchestrator.tasks import TASKS, create
from orchestrator.tasks.base import Column

TARGET_NAMES = (
    "label",
    "class",
    "target",
    "category",
    "sentiment",
    "stars",
    "star",
    "rating",
    "score",
    "polarity",
    "intent",
    "topic",
    "tag",
    "tags",
    "answer",
    "answers",
)
EXAMPLE_MODEL = "example://minilm"


@dataclass(frozen=True)
class Guess:
    """The column taken for a role, and why; None: no column looks like it."""

    column: str | None
    why: str


def new(task: str | None, data: str | None, target: Path) -> str:
    """The text of the job file `target`: for `data`, or for the task's example data. The default task is the first there is."""
    task = task or next(iter(TASKS))
    create(task)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).name.partition(".")[0] if data else target.stem).strip("-._") or "job"
    if data is None:
        return example(task, name=name)
    peek = sources.peek(DataSection(train=data), "train")
    return draft(task, peek.rows, data_path(data, target), name=name)


def guess(columns: Mapping[str, Column], rows: Sequence[Mapping[str, Any]]) -> dict[str, Guess]:
    """Role -> column for the required roles of a task, from some rows: names first, then what stands in them."""
    names = list(rows[0]) if rows else []
    taken: set[str] = set()
    found: dict[str, Guess] = {}
    # Targets first: few values repeat in them, while any column of words could be the text.
    for role, column in sorted(columns.items(), key=lambda item: not item[1].target):
        if not column.required:
            continue
        free = [name for name in names if name not in taken]
        found[role] = _target(role, free, rows) if column.target else _input(role, column, free, rows)
        taken.add(found[role].column or "")
    return {role: found[role] for role in columns if role in found}


def draft(task: str, rows: Sequence[Mapping[str, Any]], data: str, *, name: str) -> str:
    """The text of a job file for `task` on the files `data`, whose first rows are `rows`."""
    lines = [
        f"  {role}: {_scalar(found.column or role)}{_comment(found.why)}" for role, found in guess(create(task).columns(), rows).items()
    ]
    return _file(task, name, EXAMPLE_MODEL, ["train: " + _scalar(data), "columns:", *lines])


def example(task: str, *, name: str) -> str:
    """The text of a job file for `task` on the data of its recipe, which can be run as it is."""
    folder = resources.files("jobs") / "recipes" / re.sub(r"\W", "-", task)
    recipes = (
        sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name) if folder.is_dir() else []
    )
    if not recipes:
        raise InputError(f"init: there is no example data for the task {task!r}; name your own with --data FILE.")
    recipe = yaml.safe_load(recipes[0].read_text(encoding="utf-8"))
    lines = yaml.safe_dump(recipe["data"], allow_unicode=True, sort_keys=False, width=120).splitlines()
    return _file(recipe["task"], name, recipe["model"]["base"], lines)


def write(target: Path, text: str, *, force: bool) -> None:
    """Writes the job file; an existing one only with `force`."""
    if target.exists() and not force:
        raise InputError(f"{str(target)!r} exists already; --force writes over it, --output names another file.")
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {str(target.parent)!r} to write {target.name!r} in.")
    target.write_text(text, encoding="utf-8")


def data_path(data: str, target: Path) -> str:
    """`data` as the job file at `target` should name it: relative to the job file, as it is read."""
    if "://" in data or Path(data).is_absolute():
        return data
    return os.path.relpath(data, target.resolve().parent)


def _target(role: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Guess:
    def rank(name: str) -> tuple[bool, int]:
        return (not _named(name, (role, *TARGET_NAMES)), len(_distinct(name, rows)))

    likely = [name for name in names if _named(name, (role, *TARGET_NAMES)) or 1 < len(_distinct(name, rows)) <= max(2, len(rows) // 4)]
    if not likely:
        return Guess(None, f"no column looks like it; there is {', '.join(names) or 'none'}")
    best = min(likely, key=rank)
    values = _distinct(best, rows)
    shown = ", ".join(sorted(str(value)[:20] for value in values)[:6])
    return Guess(best, f"{len(values)} different: {shown}" if len(values) <= 6 else f"{len(values)} different, such as {shown}")


def _input(role: str, column: Column, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Guess:
    def length(name: str) -> float:
        values = [row.get(name) for row in rows]
        return sum(len(value) for value in values if isinstance(value, str)) / max(1, len(values))

    exact = [name for name in names if _named(name, (role,))]
    texts = exact or [name for name in names if length(name) > 0]
    if not texts:
        return Guess(None, f"no column looks like it; there is {', '.join(names) or 'none'}")
    best = max(texts, key=length)
    return Guess(best, f"{length(best):.0f} characters on average" if column.kind == "text" else "")


def _distinct(name: str, rows: Sequence[Mapping[str, Any]]) -> set[Any]:
    return {repr(value) if isinstance(value, (list, dict)) else value for row in rows if (value := row.get(name)) not in (None, "")}


def _named(column: str, names: Sequence[str]) -> bool:
    return bool(set(re.split(r"[^a-z]+", column.lower())) & set(names))


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()


def _comment(text: str) -> str:
    return f"    # {' '.join(text.split())}" if text else ""


def _file(task: Any, name: str, base: str, data: Sequence[str]) -> str:
    said = {line.partition(":")[0] for line in data}
    more = [f"  #{line}" for line in DATA_KEYS if line.partition(":")[0] not in said]
    section = "\n".join([*(f"  {line}" for line in data), *more])
    return TEMPLATE.format(task=_scalar(task), name=_scalar(name), base=_scalar(base), data=section)


DATA_KEYS = (
    "validation: validation.csv    # files of its own; else a share of train",
    "test: test.csv",
    "split: {validation: 0.1, test: 0.1, seed: 42}",
    "max_bad_rows: 0.01    # share of rows that may be unusable before the job stops",
)
TEMPLATE = """\
# A job: orchestrator run FILE. Only task, model.base and data.train must be there; the rest has defaults.
# A line behind a single # is a key that may be set; `orchestrator schema` knows them all.

name: {name}    # names the run and the model
#storage: runs    # root of runs, checkpoints and the registry: folder, s3://, gs://, hdfs://

task: {task}    # `orchestrator tasks` lists them; {{name: …}} takes a task's own keys

model:
  base: {base}    # hub id, folder, package://module/path or example://name
  #lora: {{r: 8}}    # train small adapters instead of all weights

data:
{data}

training:
  num_train_epochs: 3
  learning_rate: 5.0e-5
  #global_batch_size: 32    # rows per optimizer step, over all workers
  #early_stopping_patience: 2
  #precision: fp32    # auto: what this hardware does fast

resources:
  num_workers: auto    # one per GPU, else one
  #cpus_per_worker: 1

registry:
  #uri: http://mlflow.example.com:5000    # else an SQLite file in the storage
  alias: champion    # moves to a new version only when it scores better

serving:
  port: 8000
  #replicas: {{min: 1, max: 4, target: 16}}
"""
