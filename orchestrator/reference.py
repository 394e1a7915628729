"""What a job file may hold, as data: the JSON Schema with every task's own keys, and the list of tasks."""

from __future__ import annotations

from typing import Any

from orchestrator.config import JobConfig
from orchestrator.tasks import TASKS, task_class

OWN_TASK = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""How a task from outside is named: my_pkg.my_task:MyTask."""


def tasks() -> list[dict[str, Any]]:
    """Each task by name: what it is for, its columns, its metrics (the default objective first)."""
    found = []
    for name in TASKS:
        task = task_class(name)()
        found.append(
            {
                "name": name,
                "help": " ".join((type(task).__doc__ or "").split("\n\n")[0].split()),
                "columns": {role: column.to_json() for role, column in task.columns().items()},
                "metrics": list(task.metrics()),
            }
        )
    return found


def job_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a job file; `task` knows the keys of every task in the registry."""
    schema = JobConfig.model_json_schema()
    definitions = schema["$defs"]
    choices: list[dict[str, Any]] = [{"enum": list(TASKS)}, {"type": "string", "pattern": OWN_TASK}]
    for name in TASKS:
        section = task_class(name).model_json_schema()
        definitions.update(section.pop("$defs", {}))
        section["properties"] = {"name": {"const": name}, **section["properties"]}
        section["required"] = ["name", *section.get("required", [])]
        definitions[section["title"]] = section
        choices.append({"$ref": f"#/$defs/{section['title']}"})
    choices.append({"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "pattern": OWN_TASK}}})
    schema["properties"]["task"] = {"description": "The task by name, or {name: …} with keys of its own.", "anyOf": choices}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Job file of the orchestrator"}
