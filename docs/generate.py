"""Writes docs/reference: `make docs`. With `--check` it writes nothing and fails where a page is not what it would write."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from orchestrator import cli, reference
from orchestrator.examples import EXAMPLES
from orchestrator.tasks import TASKS

FOLDER = Path(__file__).parent / "reference"
HEAD = "<!-- Written by docs/generate.py (`make docs`) from the product itself. Don't edit it. -->\n\n"


def job_file() -> str:
    """The page on the job file, from its JSON Schema."""
    schema = reference.job_schema()
    sections = schema["properties"]
    lines = [
        "# The job file",
        "",
        "YAML, with a section for each part. Only `task`, `model.base` and `data.train` must be there. Any key can be set from the command line:",
        "`--set training.learning_rate=3e-5`. `orchestrator schema` prints this page as a JSON Schema, from which editors complete and check:",
        "`orchestrator schema > job.schema.json`, and `# yaml-language-server: $schema=job.schema.json` as the first line of the job.",
        "",
        "## Top level",
        "",
        *table(schema, {name: value for name, value in sections.items() if not nested(schema, value)}),
    ]
    for name, value in sections.items():
        if inner := nested(schema, value):
            lines += section(schema, name, inner, depth=2)
    lines += ["## Tasks", "", "`task: NAME`, or `task: {name: NAME, …}` with keys of its own.", ""]
    for name in TASKS:
        title = next(choice["$ref"] for choice in sections["task"]["anyOf"] if "$ref" in choice and const(schema, choice) == name)
        inner = resolve(schema, {"$ref": title})
        keys = {key: value for key, value in inner["properties"].items() if key != "name"}
        lines += section(schema, f"task: {name}", {**inner, "properties": keys}, depth=3)
    return "\n".join(lines)


def section(schema: dict[str, Any], path: str, inner: dict[str, Any], depth: int) -> list[str]:
    keys = inner["properties"]
    required = set(inner.get("required", []))
    flat = {name: value for name, value in keys.items() if not nested(schema, value)}
    lines = [f"{'#' * depth} {path}", "", " ".join(inner.get("description", "").split()), "", *table(schema, flat, required)]
    for name, value in keys.items():
        if deeper := nested(schema, value):
            lines += section(schema, f"{path}.{name}", deeper, depth + 1)
        elif isinstance(of := value.get("additionalProperties"), dict) and (deeper := nested(schema, of)):
            lines += section(schema, f"{path}.{name}.…", deeper, depth + 1)
    return lines


def table(schema: dict[str, Any], keys: dict[str, Any], required: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for name, value in keys.items():
        default = (
            "required" if name in required or "default" not in value else "" if value["default"] is None else f"`{shown(value['default'])}`"
        )
        meaning = " ".join(value.get("description", "").split()).replace("; None:", "; not set:").replace("None:", "Not set:")
        lines.append(" | ".join([f"| `{name}`", kind(schema, value), default, cell(meaning) + " |"]))
    return [*lines, ""]


def kind(schema: dict[str, Any], value: dict[str, Any]) -> str:
    value = resolve(schema, value)
    if "enum" in value or "const" in value:
        return ", ".join(f"`{shown(choice)}`" for choice in value.get("enum", [value.get("const")]))
    if "anyOf" in value:
        kinds = [kind(schema, choice) for choice in value["anyOf"] if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "prefixItems" in value:
        return f"[{', '.join(kind(schema, item) for item in value['prefixItems'])}]"
    if value.get("type") == "array":
        return f"list of {kind(schema, value['items'])}"
    if value.get("type") == "object":
        of = value.get("additionalProperties")
        return f"map of {kind(schema, of)}{'s' * bool(nested(schema, of))}" if isinstance(of, dict) else "map" if of else "section"
    if "type" not in value:
        return "anything"
    word = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`"}[value["type"]]
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{words} {value[key]:g}" for key, words in bounds.items() if key in value]
    return f"{word} {' and '.join(limits)}" if limits else word


def nested(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a key holds, None for a plain value. The task is not one: it is many."""
    if "anyOf" in value and sum("$ref" in choice for choice in value["anyOf"]) == 1 and len(value["anyOf"]) == 2:
        value = next(choice for choice in value["anyOf"] if "$ref" in choice)
    found = resolve(schema, value)
    return found if found.get("type") == "object" and "properties" in found else None


def resolve(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else value


def const(schema: dict[str, Any], choice: dict[str, Any]) -> str:
    return resolve(schema, choice)["properties"]["name"]["const"]


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def command_line() -> str:
    """The page on the command line, from its help."""
    command = typer.main.get_command(cli.app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="orchestrator", title="The command line")
    status = "Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted. The sentence that says what went wrong is the last line of standard error.\n\n"
    return re.sub(r"\n{3,}", "\n\n", text.replace("\n\n", f"\n\n{status}", 1))


def examples() -> str:
    """The page on the catalogue of examples."""
    lines = ["# Examples", "", "Data and base models by `example://NAME` ([how they are fetched](../guides/data.md#examples)).", ""]
    lines += ["| name | what | package | licence |", "|---|---|---|---|"]
    for name, one in sorted(EXAMPLES.items()):
        where = "Debian" if one.pool else "PyPI"
        lines.append(f"| `example://{name}` | {cell(one.about)} | {where} `{one.package}` {one.version} | {cell(one.licence)} |")
    return "\n".join(lines)


def main() -> None:
    stale = []
    for name, page in {"job-file.md": job_file(), "cli.md": command_line(), "examples.md": examples()}.items():
        target, text = FOLDER / name, HEAD + page.strip() + "\n"
        if "--check" in sys.argv:
            stale += [name] if not target.exists() or target.read_text(encoding="utf-8") != text else []
        else:
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
    if stale:
        sys.exit(f"docs/reference/{', '.join(stale)} is not what the product says now; `make docs` writes it.")


if __name__ == "__main__":
    main()
