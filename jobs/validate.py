"""Does a job fit its data, this machine and its endpoint? What `orchestrator validate JOB` runs, and every job first."""

from __future__ import annotations

import os

from orchestrator import parents, preflight, tuning
from orchestrator.config import JobConfig
from orchestrator.data import scan
from orchestrator.data.scan import Scan
from orchestrator.doctor import Check
from orchestrator.errors import InputError
from orchestrator.progress import Display


def main(job: JobConfig, *, register: bool = True, serve: bool = True, address: str | None = None) -> list[Check]:
    """All that can be known without starting anything, in seconds; a check that failed has `ok=False`.

    Without `register` the registry is left out, and without `serve` the endpoint: nothing up to evaluation needs them.
    """
    embedded = not (address or os.environ.get("RAY_ADDRESS"))
    try:
        job = parents.settled(job)
    except InputError as error:
        return [Check("model", False, str(error))]
    checks = preflight.check(job, serve=register, embedded=embedded)
    if job.search is not None and embedded and all(check.ok for check in checks):
        checks.append(_trials(job))
    return [*checks, _endpoint(job, embedded=embedded)] if serve else checks


def every_row(job: JobConfig, display: Display) -> tuple[Check, Scan | None]:
    """Reads and checks all rows; the second is what is in them, None where that can't be told."""
    try:
        found = scan.scan(job, display)
    except InputError as error:
        return Check("rows", False, str(error)), None
    try:
        scan.refuse(job, found)
        preflight.require_metrics(job, found.task)
        preflight.require_parts(parents.settled(job), found.task)
    except InputError as error:
        return Check("rows" if found.bad else "model", False, str(error)), found
    counts = ", ".join(f"{rows:,} {split}" for split, rows in found.rows.items())
    bad = f"; {found.bad:,} can't be used and will be left out ({found.share:.2%})" if found.bad else ", all of them usable"
    return Check("rows", True, f"{counts}{bad}"), found


def require(job: JobConfig, *, register: bool = True, serve: bool = True, address: str | None = None) -> None:
    """Raises `InputError` with every sentence that `main` found wrong."""
    wrong = [check.sentence for check in main(job, register=register, serve=serve, address=address) if check.ok is False]
    if wrong:
        raise InputError("\n".join(wrong))


def _trials(job: JobConfig) -> Check:
    """Of a sweep on this machine; a running cluster is asked once it is connected."""
    try:
        return Check("trials", True, tuning.look(job, [preflight.this_machine()]))
    except InputError as error:
        return Check("trials", False, str(error))


def _endpoint(job: JobConfig, *, embedded: bool) -> Check:
    from serving import app, auth

    section = job.serving
    try:
        keys = auth.keys(section)
        if embedded:  # a running cluster may serve at this address already
            app.require_free(section)
    except InputError as error:
        return Check("endpoint", False, str(error))
    return Check("endpoint", True, f"{section.host}:{section.port}, {f'{len(keys)} API keys' if keys else 'open'}")
