"""The commands around a job file: init, validate, run, train, tune, evaluate."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orchestrator.commands import console, options
from orchestrator.errors import InputError

if TYPE_CHECKING:
    from orchestrator.config import JobConfig

Promote = Annotated[bool, typer.Option("--promote", help="Move the alias to the new version whatever it scores.")]
BAD_ROWS = 20
"""That `validate` shows."""
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget the stages of this run that are done and start over.")]


def init(
    task: Annotated[str | None, typer.Option(help="The task; `orchestrator tasks` lists them.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Your data: columns and labels are guessed from it. Without it: example data.", show_default=False
        ),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="JOB", help="The file to write.")] = Path("job.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the file instead of writing it.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a first job file, with comments."""
    with console.command(verbose=verbose, json=json) as out:
        from orchestrator import scaffold

        text = scaffold.new(task, data, output)
        if dry_run:
            out.text(text)
        else:
            scaffold.write(output, text, force=force)
            out.text(f"{output} is written. Next: orchestrator validate {output}")
        out.result({"status": "dry-run" if dry_run else "done", "job": str(output)})


def validate(
    job: options.Job,
    assignments: options.Assignments = None,
    quick: Annotated[bool, typer.Option("--quick", help="Look at the first rows only.")] = False,
    storage: options.JobStorage = None,
    address: options.Ray = None,
    show_tokens: Annotated[
        int, typer.Option("--show-tokens", metavar="N", min=0, help="Show the tokens of N training rows, and which count in the loss.")
    ] = 0,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Check a job without training: keys, model, whether it fits this machine, and every row of its data."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator.config import load

        resolved = load(job, assignments, storage=storage)
        jobs = importlib.import_module("jobs.validate")
        checks = jobs.main(resolved, address=address)
        found = None
        if not quick and all(check.ok is not False for check in checks):
            check, found = jobs.every_row(resolved, output.display)
            output.display.close()
            checks.append(check)
        console.show_checks(output, checks)
        bad = list(found.listed) if found is not None else []
        if found is not None and bad:
            lines = [{**row, "field": row["field"] or ""} for row in bad[:BAD_ROWS]]  # A row that can't be read has none.
            output.table(["file", "row", "field", "expected", "found"], [[str(value) for value in line.values()] for line in lines])
            if found.bad > BAD_ROWS:
                output.text(f"… and {found.bad - BAD_ROWS:,} more; --json lists the first {len(bad):,}.")
        rows = None if found is None else {"usable": found.rows, "bad": found.bad, "bad_rows": bad}
        result: dict[str, Any] = {"run": resolved.run_id, "checks": [console.check_json(check) for check in checks], "rows": rows}
        wrong = [check.sentence for check in checks if check.ok is False]
        if wrong:
            raise console.Refused("\n".join(wrong), **result)
        if show_tokens:
            from orchestrator import preflight

            views = preflight.token_views(resolved, show_tokens)
            console.show_tokens(output, views)
            result["tokens"] = views
        output.result({"status": "done", **result})


def run(
    job: options.Job,
    assignments: options.Assignments = None,
    keep_serving: Annotated[bool, typer.Option("--keep-serving", help="Leave the endpoint up until Ctrl-C.")] = False,
    promote: Promote = False,
    fresh: Fresh = False,
    storage: options.JobStorage = None,
    address: options.Ray = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Run all stages: prepare, train (or sweep), evaluate, register, deploy. A run that died goes on from where it was."""
    _stages(
        job, assignments, storage, dry_run, json, verbose,
        until="deploy", keep_serving=keep_serving, promote=promote, fresh=fresh, address=address,
    )  # fmt: skip


def train(
    job: options.Job,
    assignments: options.Assignments = None,
    fresh: Fresh = False,
    storage: options.JobStorage = None,
    address: options.Ray = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Prepare and train, and stop there."""
    _stages(job, assignments, storage, dry_run, json, verbose, until="train", fresh=fresh, address=address)


def tune(
    job: options.Job,
    assignments: options.Assignments = None,
    promote: Promote = False,
    fresh: Fresh = False,
    storage: options.JobStorage = None,
    address: options.Ray = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Sweep the space of a job's `search` section; score and register the winner. A sweep that died goes on from where it was."""
    _stages(
        job, assignments, storage, dry_run, json, verbose, until="register", promote=promote, fresh=fresh, address=address, searches=True
    )  # fmt: skip


def evaluate(
    job: options.Job,
    assignments: options.Assignments = None,
    storage: options.JobStorage = None,
    address: options.Ray = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Score a job's model with the predictor that is served; trains first where that is not done."""
    _stages(job, assignments, storage, dry_run, json, verbose, until="evaluate", address=address)


def write_resolved(job: JobConfig, output: console.Output) -> None:
    """What `--dry-run` does: the resolved job in its run's folder, and where that is."""
    from orchestrator.storage import Folder

    place = Folder(job.storage) / job.run_id / "job.json"
    place.write_json(job.to_json())
    output.display.say(f"Nothing was run. The resolved job is in {place}.")
    output.result({"status": "dry-run", "run": job.run_id, "run_dir": str(Folder(job.storage) / job.run_id), "job": str(place)})


def closing(job: JobConfig, result: dict[str, Any]) -> str:
    """What a person should know when a job has ended: scores, model, where its files are, and what to type next."""
    from orchestrator.bundle import without_secrets
    from orchestrator.storage import Folder

    where = "" if Folder(job.storage).path == str(Path("runs").absolute()) else f" --storage {job.storage}"
    if job.registry.uri:
        where += f" --registry {without_secrets(job.registry.uri)}"
    name = result.get("model", {}).get("name")
    lines = [f"{split:<11} {_figures(scores)}" for split, scores in result["metrics"].items()]
    if "search" in result:
        lines += [f"{what:<11} {said}" for what, said in _sweep(result).items()]
    if name:
        lines.append(f"{'model':<11} {name} version {result['model']['version']}")
    lines.append(f"{'files':<11} {result['run_dir']}")
    program = (
        "orchestrator"
        if shutil.which("orchestrator")
        else f"{os.path.relpath(sys.executable)[: -len(Path(sys.executable).name)]}orchestrator"
    )
    commands = {
        f"{program} serve {name}{where}": "the endpoint, until Ctrl-C",
        f"{program} predict {name} INPUT.csv OUTPUT.csv{where}": "a whole file",
        f"{program} models show {name}{where}": "its versions",
    }
    if name:
        width = max(map(len, commands))
        lines += ["", "next:", *(f"  {command:<{width}}   {what}" for command, what in commands.items())]
    return "\n".join(["", *lines])


def _figures(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if "/" not in name)


def _sweep(result: dict[str, Any]) -> dict[str, str]:
    """What a sweep has found: the winner, its setting, and what it is worth beside the job as it is written."""
    from orchestrator.records import Comparison
    from orchestrator.search.view import say_value, short_names

    found = result["search"]
    best = next(trial for trial in found["trials"] if trial["id"] == found["best"])
    names = short_names(found["sample"])
    said = {"winner": f"trial {best['number']} of {found['trials_run']}"}
    if found["stopped_by"]:
        said["ended by"] = found["stopped_by"]
    said["setting"] = ", ".join(f"{names[path]} {say_value(value)}" for path, value in found["sample"].items())
    if "comparison" in result:
        said["score"] = Comparison.parse(result["comparison"]).sentence()
    return {**said, **({"report": found["report"]} if found["report"] else {})}


def _stages(
    file: Path,
    assignments: list[str] | None,
    storage: str | None,
    dry_run: bool,
    json: bool,
    verbose: bool,
    *,
    until: Literal["train", "evaluate", "register", "deploy"],
    address: str | None,
    keep_serving: bool = False,
    promote: bool = False,
    fresh: bool = False,
    searches: bool = False,
) -> None:
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator.config import load

        job = load(file, assignments, storage=storage)
        if searches and job.search is None:
            raise InputError(
                f"{file}: there is no search section, so there is nothing to tune; add one, as in "
                "search: {space: {training.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}}}."
            )
        if dry_run:
            write_resolved(job, output)
            return
        from orchestrator.storage import Folder

        folder = Folder(job.storage) / job.run_id
        if folder.is_local:
            output.log_dir = Path(folder.path)
        result: dict[str, Any] = importlib.import_module("jobs.pipeline").main(
            job,
            until=until,
            promote=promote,
            keep_serving=keep_serving,
            fresh=fresh,
            display=output.display,
            verbose=verbose,
            address=address,
        )
        output.display.close()
        output.text(closing(job, result))
        output.result({"status": "done", **result})
