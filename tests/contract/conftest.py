"""Every task of `TASKS` with the cases in `tests/fixtures/<task>.json`: rows, inputs, and a tiny base model."""

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest

from orchestrator import tasks

FIXTURES = Path(__file__).parent.parent / "fixtures"


@dataclass
class Case:
    """A task as a job would give it, and what to try on it."""

    given: dict[str, Any]
    base: str
    rows: list[dict[str, Any]]
    inputs: list[Any]
    bad_rows: list[dict[str, Any]]
    bad_inputs: list[Any]

    @cached_property
    def clean(self) -> list[dict[str, Any]]:
        task = tasks.create(self.given)
        return [{**task.clean(row), "row_id": f"rows.csv:{place}"} for place, row in enumerate(self.rows)]

    @cached_property
    def task(self) -> tasks.Task:
        task = tasks.create(self.given)
        return task.fit({"train": task.observe(self.clean)})

    @cached_property
    def unlabelled(self) -> list[dict[str, Any]]:
        targets = {role for role, column in self.task.columns().items() if column.target}
        return [{role: value for role, value in row.items() if role not in targets} for row in self.clean]


@cache
def every_case() -> dict[str, Case]:
    found = {}
    for name in tasks.TASKS:
        for place, case in enumerate(json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))):
            fields = {key: value for key, value in case.items() if key != "task"}
            found[f"{name}-{place}"] = Case(given=case["task"], **fields)
    return found


@pytest.fixture(scope="session", params=every_case())
def case(request: pytest.FixtureRequest) -> Case:
    return every_case()[request.param]


@pytest.fixture(scope="session")
def base(case: Case, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny base model for the case."""
    from tests.fixtures import tiny

    return tiny.BASES[case.base](tmp_path_factory.mktemp("base"), case.clean)


@pytest.fixture(scope="session")
def processor(case: Case, base: str) -> Any:
    from orchestrator import processors

    return processors.of(case.task, base)


@pytest.fixture
def model(case: Case, base: str) -> Any:
    """The case's model, the same each time."""
    import torch

    torch.manual_seed(0)
    return case.task.model(base, dtype=torch.float32)
