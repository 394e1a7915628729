"""The commands that talk to a running Ray cluster: submit, and looking after what was submitted."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.commands import console, options
from orchestrator.commands.job import Fresh, Promote, write_resolved

jobs = typer.Typer(help="Look after jobs on a Ray cluster.")
JobId = Annotated[str, typer.Argument(metavar="ID", help="The id that `submit` printed.", show_default=False)]


def submit(
    job: options.Job,
    address: options.Head,
    assignments: options.Assignments = None,
    promote: Promote = False,
    fresh: Fresh = False,
    storage: options.JobStorage = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Run a job on a Ray cluster; the same job is not started twice."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator.config import load

        resolved = load(job, assignments, storage=storage, absolute_storage=False)
        if dry_run:
            write_resolved(resolved, output)
            return
        from orchestrator import submission

        submitted = submission.submit(resolved, address, promote=promote, fresh=fresh, display=output.display)
        output.text(submitted.id)
        output.result({"status": "done", "run": submitted.run, "job": submitted.id, "new": submitted.new, "job_status": submitted.status})


@jobs.command("list")
def list_jobs(address: options.Head, json: options.Json = False, verbose: options.Verbose = False) -> None:
    """List the jobs on a cluster."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator import submission

        found = submission.jobs(address)
        output.table(["id", "status", "run", "started"], [[job["id"], job["status"], job["run"], job["started"]] for job in found])
        output.result({"status": "done", "jobs": found})


@jobs.command()
def status(job: JobId, address: options.Head, json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Say how a job is doing."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator import submission

        found = submission.status(job, address)
        output.text(" ".join(filter(None, (found["status"], found["message"]))))
        output.result({"status": "done", "job": found})


@jobs.command()
def logs(
    job: JobId,
    address: options.Head,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Print what a job said."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator import submission

        for text in submission.logs(job, address, follow=follow):
            output.text(text)
        output.result({"status": "done", "job": job})


@jobs.command()
def stop(job: JobId, address: options.Head, json: options.Json = False, verbose: options.Verbose = False) -> None:
    """Stop a job; submitted again, it goes on from its last checkpoint."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator import submission

        found = submission.stop(job, address)
        output.text(f"{job}: {found['status']}")
        output.result({"status": "done", "job": found})
