"""The one registry of tasks: name -> `module:Class`, loaded on first use. A task from outside is named the same way."""

import importlib
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, WithJsonSchema

from orchestrator.errors import InputError, did_you_mean
from orchestrator.tasks.base import Task

TASKS: dict[str, str] = {
    "text-classification": "orchestrator.tasks.text_classification:TextClassification",
    "text-generation": "orchestrator.tasks.text_generation:TextGeneration",
    "text2text": "orchestrator.tasks.text2text:Text2Text",
    "question-answering": "orchestrator.tasks.question_answering:QuestionAnswering",
    "masked-lm": "orchestrator.tasks.masked_lm:MaskedLM",
}


def task_class(name: str) -> type[Task]:
    """The class of a task by its name in `TASKS` or by `module:Class`; `InputError` where there is none."""
    target = TASKS.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        raise InputError(f"task: there is no task {name!r}.{did_you_mean(name, TASKS)} A task of your own is named my_pkg.my_task:MyTask.")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as error:
        raise InputError(f"task: {name!r} needs the module {error.name!r}, which is not installed or not on the Python path.") from None
    except AttributeError:
        raise InputError(f"task: the module {module_name!r} has no {class_name!r}.") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise InputError(f"task: {name!r} is not a Task: it must be a subclass of orchestrator.tasks.base.Task.")
    return found


def name_of(task: type[Task]) -> str:
    """The name by which `task_class` finds a class, in any process."""
    place = f"{task.__module__}:{task.__qualname__}"
    return next((name for name, target in TASKS.items() if target == place), place)


def create(value: Any) -> Task:
    """A task from what stands in a job file, a record or a bundle: a name, or a dict with `name` and the task's fields."""
    if isinstance(value, Task):
        return value
    fields = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else {}
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise InputError(f"task: expected a task's name or {{name: …}}, found {value!r}. There is {', '.join(TASKS)}.")
    return task_class(name).parse(fields, "task")


AnyTask = Annotated[
    SerializeAsAny[Task],
    BeforeValidator(create),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}]}),
]
"""A field of a Schema that holds a task."""
