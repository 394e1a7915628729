"""The base of everything that is written in a job file, a record or a bundle: frozen, strict, one error a sentence."""

import copy
from collections.abc import Mapping
from typing import Any, Self, get_origin

import pydantic
import yaml

from orchestrator.errors import InputError, did_you_mean


class Schema(pydantic.BaseModel):
    """A frozen value that refuses keys it does not know and is written as JSON."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        ser_json_inf_nan="strings",
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    @classmethod
    def parse(cls, value: Any, where: str = "") -> Self:
        """`value` as this schema, or an `InputError` with one sentence for each thing wrong in it.

        `where` is what the sentences call the source, for example `reviews.yaml`.
        """
        try:
            return cls.model_validate(value)
        except pydantic.ValidationError as error:
            raise InputError("\n".join(_sentence(cls, problem, where) for problem in error.errors())) from None

    def to_json(self) -> dict[str, Any]:
        """This value as plain JSON types."""
        return self.model_dump(mode="json")


def override(value: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A copy of the nested dict `value` with `a.b.c=text` assignments applied; the text is read as YAML.

    Raises `InputError` for an assignment without `=` or through something that is not a section.
    """
    result = copy.deepcopy(value)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise InputError(f"--set {assignment!r} is not of the form path=value, as in --set training.learning_rate=3e-5.")
        try:
            new = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"--set {assignment!r}: the value is not YAML: {error}.") from None
        *sections, last = path.strip().split(".")
        place = result
        for depth, section in enumerate(sections):
            if place.get(section) is None:
                place[section] = {}
            elif not isinstance(place[section], dict):
                if section == "task" and isinstance(place[section], str):
                    place[section] = {"name": place[section]}
                else:
                    raise InputError(
                        f"--set {assignment!r}: {'.'.join(sections[: depth + 1])} is {place[section]!r}, not a section with keys."
                    )
            place = place[section]
        place[last] = new
    return result


def _sentence(schema: type[pydantic.BaseModel], problem: Any, where: str) -> str:
    path = [part for part in problem["loc"] if isinstance(part, int) or not part.startswith(("function-", "lax-", "json-"))]
    dotted = ".".join(map(str, path))
    prefix = f"{where}: " if where else ""
    if problem["type"] == "extra_forbidden":
        known = _fields_at(schema, path[:-1])
        section = ".".join(map(str, path[:-1]))
        return f"{prefix}unknown key {dotted!r}.{did_you_mean(str(path[-1]), [f'{section}.{name}' if section else name for name in known]) if not known else _hint(str(path[-1]), known, section)}"
    if problem["type"] == "missing":
        return f"{prefix}{dotted!r} is missing."
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and message.endswith("."):  # a sentence already, as of a task within a job
        return f"{prefix}{message}" if not dotted or message.startswith(f"{dotted}: ") else f"{prefix}{dotted}: {message}"
    given = "" if problem["type"] == "value_error" and isinstance(problem["input"], Mapping) else f" (given: {problem['input']!r})"
    return f"{prefix}{dotted}: {message}{given}." if dotted else f"{prefix}{message}."


def _hint(wrong: str, known: list[str], section: str) -> str:
    hint = did_you_mean(wrong, known)
    return hint if not section else hint.replace("There is", f"{section} has")


def _fields_at(schema: type[pydantic.BaseModel], path: list[Any]) -> list[str]:
    """The keys that the section at `path` knows."""
    within = False  # of a list or map of sections: the next part of the path is a place or a key of it
    for part in path:
        if within:
            within = False
            continue
        field = schema.model_fields.get(str(part))
        inner = _schema_in(field.annotation) if field else None
        if field is None or inner is None:
            return []
        schema, within = inner, get_origin(field.annotation) in (list, dict, tuple)
    return list(schema.model_fields)


def _schema_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _schema_in(argument)) is not None:
            return found
    return None
