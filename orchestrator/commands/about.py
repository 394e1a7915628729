"""What there is and whether it works: tasks, schema, doctor."""

from __future__ import annotations

import json as jsons
from typing import Annotated

import typer

from orchestrator.commands import console, options


def tasks(json: options.Json = False, verbose: options.Verbose = False) -> None:
    """List the tasks: the columns each reads and the metrics it knows."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator import reference

        found = reference.tasks()
        output.table(
            ["task", "columns", "metrics", "for"],
            [[task["name"], ", ".join(task["columns"]), ", ".join(task["metrics"]), task["help"]] for task in found],
        )
        output.result({"status": "done", "tasks": found})


def schema(json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Print the JSON Schema of a job file; editors complete and check from it."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator import reference

        found = reference.job_schema()
        if json:
            output.result({"status": "done", "schema": found})
        else:
            output.text(jsons.dumps(found, indent=2))


def doctor(
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="RAY", help="Look at this running Ray cluster too (http://HEAD:8265).", show_default=False),
    ] = None,
    storage: options.Storage = "runs",
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Find what is wrong with this installation or cluster."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator import doctor as looks
        from orchestrator.errors import StageError

        checks = looks.checks(address=address, storage=storage)
        console.show_checks(output, checks)
        wrong = [check for check in checks if check.ok is False]
        if wrong:
            raise StageError("\n".join(check.sentence for check in wrong))
        output.result({"status": "done", "checks": [console.check_json(check) for check in checks]})
