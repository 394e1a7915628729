"""Paths of a job, such as training.learning_rate: which there are, what stands at one, and putting something there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from orchestrator.config import JobConfig
from orchestrator.errors import did_you_mean, nearest
from orchestrator.schema import Schema

ABSENT: Any = object()
"""What stands at a path whose section the job has not."""


def known(job: JobConfig) -> dict[str, Any]:
    """Every path that this job may set -> the type of what stands there; through sections that it leaves out, and its own task's keys."""
    return dict(_walk(JobConfig, "", job))


def is_section(annotation: Any) -> bool:
    """Is it a section that is always there, rather than a value or a section that may be left out?"""
    return isinstance(annotation, type) and issubclass(annotation, Schema)


def hint(wrong: str, job: JobConfig) -> str:
    """The right path for a wrong one, as a sentence to put behind another."""
    every = known(job)
    last = wrong.rpartition(".")[2]
    same = [path for path in every if path.rpartition(".")[2] == last]
    return did_you_mean(wrong, nearest(wrong, same)[:1] or nearest(wrong, every)[:5])


def get(value: dict[str, Any], path: str) -> Any:
    """What stands at a path of a job as JSON, or `ABSENT`."""
    place: Any = value
    for part in path.split("."):
        if not isinstance(place, dict) or part not in place:
            return ABSENT
        place = place[part]
    return place


def put(value: dict[str, Any], path: str, new: Any) -> None:
    """Sets a path of a job as JSON, in place; a section that is left out comes to be."""
    *sections, last = path.split(".")
    place = value
    for section in sections:
        if not isinstance(place.get(section), dict):
            place[section] = {}
        place = place[section]
    place[last] = new


def inside(path: str, section: str) -> bool:
    """Is `path` that section, or in it?"""
    return path == section or path.startswith(f"{section}.")


def _walk(schema: type[Schema], prefix: str, job: JobConfig) -> Iterator[tuple[str, Any]]:
    for name, field in schema.model_fields.items():
        path = f"{prefix}{name}"
        annotation = type(job.task) if path == "task" else field.annotation
        yield path, annotation
        if get_origin(annotation) is dict:  # roles of the task
            yield from ((f"{path}.{role}", str) for role in (job.task.columns() if path == "data.columns" else ()))
        for section in _sections(annotation):
            yield from _walk(section, f"{path}.", job)


def _sections(annotation: Any) -> list[type[Schema]]:
    if is_section(annotation):
        return [annotation]
    if get_origin(annotation) in (list, dict, tuple):
        return []
    return [section for argument in get_args(annotation) for section in _sections(argument)]
