"""The command line: `orchestrator COMMAND`. What each command does is in `orchestrator.commands`.

Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted. The sentence that says what went wrong is the last line of
standard error; with `--json` the last line of standard output is one JSON object either way.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands import about, cluster, job, model
from orchestrator.commands.console import command, errors_to_exit_status, root_cause
from orchestrator.errors import InputError
from orchestrator.terminal import display

__all__ = ["app", "command", "display", "errors_to_exit_status", "main", "root_cause"]

app = typer.Typer(
    name="orchestrator",
    help="Take raw data and a pretrained model to a live endpoint on Ray, from one job file.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"orchestrator {version('ray-orchestrator')}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for panel, commands in {
    "Jobs": (job.init, job.validate, job.run, job.train, job.tune, job.evaluate),
    "Models": (model.predict, model.graph, model.serve),
    "Clusters": (cluster.submit,),
    "About": (about.tasks, about.schema, about.doctor),
}.items():
    for function in commands:
        app.command(rich_help_panel=panel)(function)
app.add_typer(model.models, name="models", rich_help_panel="Models")
app.add_typer(cluster.jobs, name="jobs", rich_help_panel="Clusters")


def main() -> None:
    """The `orchestrator` command."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # For tasks of the user's own; last, so that nothing there takes the place of a package.
    with errors_to_exit_status(json="--json" in sys.argv):
        try:
            code = app(standalone_mode=False, prog_name="orchestrator")
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            hint = f" `{context.command_path} --help` says what there is." if context else ""
            sentence = error.format_message()
            raise InputError(f"{sentence}{'' if sentence.endswith(('.', '?')) else '.'}{hint}") from None
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
