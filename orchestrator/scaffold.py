"""Writes a first job file: commented, complete, with the columns of the user's data in the roles that they look like."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from orchestrator.config import DataSection
from orchestrator.data import files, sources
from orchestrator.errors import InputError
from orchestrator.tasks import TASKS, create, task_class
from orchestrator.tasks.guessing import Guess, guess

EXAMPLE_MODEL = "example://minilm"
LIKELY = 0.25
"""How well a task must fit data to be proposed for it (`Task.fits`)."""


@dataclass(frozen=True)
class Proposal:
    """The task that some data look like."""

    task: str
    peek: sources.Peek
    format: str | None
    """To be said in the job file; None: the reader finds it by itself."""
    others: tuple[str, ...] = ()
    """Tasks that the data might be for too, the likeliest first."""


def new(task: str | None, data: str | None, target: Path) -> str:
    """The text of the job file `target`: for `data`, or for the task's example data.

    Without `task` it is the one that the data look like; without data the first there is.
    """
    if task is not None:
        create(task)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).name.partition(".")[0] if data else target.stem).strip("-._") or "job"
    if data is None:
        return example(task or next(iter(TASKS)), name=name)
    return draft(propose(data, [task] if task else list(TASKS)), data_path(data, target), name=name)


def propose(data: str, tasks: Sequence[str]) -> Proposal:
    """The task of `tasks` that the files `data` look like, read in the format that makes most of them.

    Raises `InputError` where they can't be read, or look like none of several.
    """
    found: list[tuple[float, str, sources.Peek, str | None]] = []
    refusal: InputError | None = None
    for format in _formats():
        try:
            with files.called("--data"):
                peek = sources.peek(DataSection(train=data, format=format), "train")  # pyright: ignore[reportArgumentType]
        except InputError as error:
            refusal = error if format is None else refusal
            continue
        rows = [_beside(peek.files[0], row) for row in peek.rows]
        found += [(round(task_class(task).fits(peek.columns, rows, peek.format), 3), task, peek, format) for task in tasks]
        if format is None and peek.format != "json":  # every other format could be read as lines, or as nothing else
            break
    if not found:
        raise refusal or InputError(f"init: {data!r} can't be read.")
    # Of equals the format that finds more in the files: boxes beside images, rather than lines of text.
    score, task, peek, format = max(found, key=lambda one: (one[0], len(one[2].columns)))
    if score < LIKELY and refusal is not None:  # What the files are can't be told, and no format makes sense of them.
        raise refusal
    if score < LIKELY and len(tasks) > 1:
        columns = ", ".join(map(repr, found[0][2].columns))
        raise InputError(f"init: no task fits the columns {columns} of {data!r}; say which it is with --task: {', '.join(tasks)}.")
    near = [one for one in found if one[3] == format and one[1] != task and one[0] >= max(LIKELY, 0.6 * score)]
    return Proposal(task, peek, format, tuple(name for _, name, _, _ in sorted(near, key=lambda one: -one[0])))


def _beside(file: files.SourceFile, row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with paths of images and sounds that can be opened from here: such paths are relative to the first file."""
    return {
        name: sources.located(file, value) if isinstance(value, str) and files.media_kind(value) in ("image", "audio") else value
        for name, value in row.items()
    }


def _formats() -> list[str | None]:
    """What a reader finds by itself, then the formats that no ending of a file stands for."""
    named = [format for choice in get_args(DataSection.model_fields["format"].annotation) for format in get_args(choice)]
    return [None, *(format for format in named if format not in (*files.FORMATS.values(), "folder"))]


def draft(proposal: Proposal, data: str, *, name: str) -> str:
    """The text of a job file for the task of `proposal` on the files `data`."""
    task, lines = proposal.task, ["train: " + _scalar(data)]
    if proposal.format is not None:
        lines.append("format: " + proposal.format)
    proposed = task_class(task).proposed(proposal.peek.rows)
    settings = {key: value for key, value in proposed.model_dump(mode="json", exclude_defaults=True).items() if key != "name"}
    roles = proposed.columns()
    found = guess(roles, proposal.peek.rows)
    columns = {role: given for role, given in found.items() if roles[role].required or given.column is not None}
    alternatives = [role for role, column in roles.items() if column.alternative]
    if alternatives and not columns.keys() & set(alternatives):
        columns = {alternatives[0]: Guess(None, f"no column looks like it; there is {', '.join(proposal.peek.columns)}"), **columns}
    lines += ["columns:", *(f"  {role}: {_scalar(given.column or role)}{_comment(given.why)}" for role, given in columns.items())]
    why = f"what the columns look like{f'; might be {_or(proposal.others)} too' if proposal.others else ''}"
    return _file(
        {"name": task, **settings} if settings else task,
        name,
        {"base": task_class(task).example_model} if task_class(task).example_model else example_model(task),
        lines,
        why,
    )


def example_model(task: str) -> dict[str, Any]:
    """The `model` section of a task's first recipe."""
    recipe = _recipe(task)
    return {"base": EXAMPLE_MODEL} if recipe is None else recipe["model"]


def example(task: str, *, name: str) -> str:
    """The text of a job file for `task` on the data of its recipe, which can be run as it is."""
    recipe = _recipe(task)
    if recipe is None:
        raise InputError(f"init: there is no example data for the task {task!r}; name your own with --data FILE.")
    return _file(recipe["task"], name, recipe["model"], _yaml(recipe["data"]))


def _recipe(task: str) -> dict[str, Any] | None:
    """The first recipe that ships for a task."""
    folder = resources.files("jobs") / "recipes" / re.sub(r"\W", "-", task)
    found = [file for file in folder.iterdir() if file.name.endswith(".yaml")] if folder.is_dir() else []
    return yaml.safe_load(min(found, key=lambda file: file.name).read_text(encoding="utf-8")) if found else None


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


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)


def _yaml(value: Mapping[str, Any]) -> list[str]:
    return yaml.safe_dump(dict(value), allow_unicode=True, sort_keys=False, width=120).splitlines()


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()


def _comment(text: str) -> str:
    return f"    # {' '.join(text.split())}" if text else ""


def _file(task: Any, name: str, model: Mapping[str, Any], data: Sequence[str], why: str = "") -> str:
    said = {line.partition(":")[0] for line in data}
    more = [f"  #{line}" for line in DATA_KEYS if line.partition(":")[0] not in said]
    section = "\n".join([*(f"  {line}" for line in data), *more])
    base = f"{_scalar(model['base'])}    # hub id, folder, package://module/path, example://name or config://model_type"
    rest = [f"  {line}" for line in _yaml({key: value for key, value in model.items() if key != "base"})] if len(model) > 1 else []
    more = [f"  #{line}" for line in MODEL_KEYS if line.partition(":")[0] not in model]
    why = f"{why}; " if why else ""
    return TEMPLATE.format(
        task=_scalar(task), why=why, name=_scalar(name), model="\n".join([f"  base: {base}", *rest, *more]), data=section
    )


DATA_KEYS = (
    "validation: validation.csv    # files of its own; else a share of train",
    "test: test.csv",
    "split: {validation: 0.1, test: 0.1, seed: 42}",
    "max_bad_rows: 0.01    # share of rows that may be unusable before the job stops",
)
MODEL_KEYS = ("lora: {r: 8}    # train small adapters instead of all weights", "freeze: backbone    # or train the head only")
TEMPLATE = """\
# A job: orchestrator run FILE. Only task, model.base and data.train must be there; the rest has defaults.
# A line behind a single # is a key that may be set; `orchestrator schema` knows them all.

name: {name}    # names the run and the model
#storage: runs    # root of runs, checkpoints and the registry: folder, s3://, gs://, hdfs://

task: {task}    # {why}`orchestrator tasks` lists them; {{name: …}} takes a task's own keys

model:
{model}

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
