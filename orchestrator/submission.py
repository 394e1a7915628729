"""Jobs on a Ray cluster from outside, through Ray Jobs: submit, list, status, logs, stop.

What is sent is what `orchestrator run` runs: `python -m jobs.pipeline` with the resolved job in `job/job.json`. It goes in
one folder with the product's three packages, from wherever they are installed, and the job's small local files (`upload`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from orchestrator import bundle as bundles
from orchestrator import registry, upload
from orchestrator.config import JobConfig, digest
from orchestrator.errors import InputError, StageError, nearest
from orchestrator.progress import Display, Silent
from orchestrator.storage import Folder

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

REQUEST_SECONDS = 60.0
CONNECT_SECONDS = 5.0
STOP_SECONDS = 60
"""How long a job that is told to stop may take to end in order, before Ray kills it."""
POLL_SECONDS = 1.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Job(TypedDict):
    """A job on a cluster."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    run: str
    """The run's id; empty for a job that this product did not submit."""
    started: str
    """ISO 8601 in UTC; empty until it is known."""
    ended: str
    message: str


@dataclass(frozen=True)
class Submitted:
    id: str
    """Of the job, for `orchestrator jobs`."""
    run: str
    """Of the run on the cluster."""
    new: bool
    """False: the cluster had this very job already, and nothing was started."""
    status: str


def submit(
    job: JobConfig,
    address: str,
    *,
    promote: bool = False,
    fresh: bool = False,
    display: Display | None = None,
    module: str = "jobs.pipeline",
    python: str | None = None,
) -> Submitted:
    """Sends `job` to the cluster whose dashboard is at `address`, unless it has it already.

    The same job that is waiting, running or done is not started again; one that failed or was stopped is, and continues
    its run. `fresh` starts over. `python` is the interpreter on the cluster: by default this one when the cluster is this
    machine, else `python` or `python3` there. Raises `InputError` for what can't be sent or reached.
    """
    display = display or Silent()
    cluster = Cluster(address)
    here = cluster.is_this_machine
    with tempfile.TemporaryDirectory(prefix="orchestrator-submit-") as scratch:
        folder = Path(scratch)
        sent = upload.Upload()
        staged = upload.stage(job, folder, here=here, sent=sent, display=display)
        registry.locate(staged.registry.uri, Folder(staged.storage))  # says what is missing now, not in the job's log
        options = [name for name, on in (("--promote", promote), ("--fresh", fresh)) if on]
        asked = digest([staged.to_json(), options, module])[:16]
        number, running = _next(cluster.jobs(), staged.run_id, asked, again=fresh)
        if running is not None:
            display.say(f"The cluster has this job already: {running['id']} is {running['status']}.")
            return Submitted(running["id"], staged.run_id, False, running["status"])
        upload.stage_packages(staged, folder, sent)
        (folder / "job").mkdir()
        (folder / "job" / "job.json").write_text(json.dumps(staged.to_json(), indent=2, ensure_ascii=False), encoding="utf-8")
        sent.files += 1
        also = f" and {', '.join(sent.named)}" if sent.named else ""
        display.say(f"Sending {sent.files} files, {upload.size_text(sent.size)}: the product, the job{also}.")
        interpreter = shlex.quote(python or sys.executable) if python or here else '"$(command -v python || command -v python3)"'
        identifier = staged.run_id if number == 1 else f"{staged.run_id}-a{number}"
        new = cluster.start(
            identifier,
            entrypoint=" ".join([interpreter, "-m", module, "job/job.json", *options]),
            folder=folder,
            metadata={"run": staged.run_id, "name": job.name, "asked": asked, "attempt": str(number)},
        )
    display.say(f"Submitted {identifier}; `orchestrator jobs logs {identifier} -f --address {cluster.shown}` follows it.")
    return Submitted(identifier, staged.run_id, new, "PENDING")


def jobs(address: str) -> list[Job]:
    """The jobs that the cluster knows, latest first."""
    return [_shown(details) for details in Cluster(address).jobs()]


def status(job: str, address: str) -> Job:
    """How one job is doing."""
    return _shown(Cluster(address).job(job))


def logs(job: str, address: str, *, follow: bool = False) -> Iterator[str]:
    """The lines that a job printed; with `follow` until it ends."""
    cluster = Cluster(address)
    cluster.job(job)
    seen = 0
    while True:
        # Asked before the logs, so that the last lines are in them.
        ended = str(cluster.job(job).status.value) in ENDED or not follow
        text = cluster.logs(job)
        whole = text if ended else text[: text.rfind("\n") + 1]
        yield from whole[seen:].splitlines()
        seen = max(seen, len(whole))
        if ended:
            return
        time.sleep(POLL_SECONDS)


def stop(job: str, address: str) -> Job:
    """Stops a job and waits until it has ended; one that had ended stays as it is. `StageError` when it doesn't end."""
    cluster = Cluster(address)
    if str(cluster.job(job).status.value) not in ENDED:
        cluster.stop(job)
        deadline = time.monotonic() + STOP_SECONDS + 30
        while str(cluster.job(job).status.value) not in ENDED:
            if time.monotonic() > deadline:
                raise StageError(f"The job {job} was told to stop and has not ended after {STOP_SECONDS + 30} s; see its logs.")
            time.sleep(POLL_SECONDS / 2)
    return _shown(cluster.job(job))


class Cluster:
    """A Ray cluster by its dashboard, which must answer: `InputError` otherwise, within seconds."""

    def __init__(self, address: str):
        self.address = _dashboard(address)
        self.shown = bundles.without_secrets(self.address)
        self.version = self._get("/api/version")["ray_version"]

    @cached_property
    def nodes(self) -> list[dict[str, Any]]:
        """Host name and address of each live node."""
        summary = self._get("/nodes?view=summary")["data"]["summary"]
        return [
            {"hostname": node.get("hostname"), "ip": node.get("ip")} for node in summary if node.get("raylet", {}).get("state") == "ALIVE"
        ]

    @property
    def host(self) -> str:
        return urllib.parse.urlsplit(self.address).hostname or ""

    @property
    def needs_token(self) -> bool:
        """Does it refuse who has none?"""
        import httpx

        return httpx.get(f"{self.address}/api/jobs/", timeout=REQUEST_SECONDS / 4).status_code in (401, 403)

    @property
    def is_this_machine(self) -> bool:
        """Does every node run here? A loopback address may as well be a tunnel's."""
        import psutil

        mine = {item.address for items in psutil.net_if_addrs().values() for item in items}
        return bool(self.nodes) and all(node["hostname"] == socket.gethostname() and node["ip"] in mine for node in self.nodes)

    def jobs(self) -> list[JobDetails]:
        """Jobs that were submitted, latest first."""
        with self._errors():
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: -(job.start_time or 0))

    def job(self, identifier: str) -> JobDetails:
        """One job; `InputError` with the nearest ids where there is none."""
        known = {job.submission_id: job for job in self.jobs()}
        if identifier not in known:
            near = nearest(identifier, [str(name) for name in known])[:3]
            here = f" The nearest are {', '.join(near)}." if near else " It has no jobs yet."
            raise InputError(f"There is no job {identifier!r} on {self.shown}.{here}")
        return known[identifier]

    def logs(self, identifier: str) -> str:
        with self._errors():
            return self._client.get_job_logs(identifier)

    def stop(self, identifier: str) -> None:
        with self._errors():
            self._client.stop_job(identifier)

    def start(self, identifier: str, *, entrypoint: str, folder: Path, metadata: dict[str, str]) -> bool:
        """Uploads `folder` and starts the job in it; False when another submission of it came first."""
        runtime_env = {
            "working_dir": str(folder),
            # Everybody who sees the dashboard sees these: no secrets here.
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "PYTHONUNBUFFERED": "1"},
        }
        with self._errors():
            try:
                self._client.submit_job(entrypoint=entrypoint, submission_id=identifier, runtime_env=runtime_env, metadata=metadata)
            except RuntimeError:
                if identifier not in {job.submission_id for job in self._client.list_jobs()}:
                    raise
                return False
        return True

    @cached_property
    def _client(self) -> JobSubmissionClient:
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard", "ray._private.runtime_env.packaging", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)

        class Client(JobSubmissionClient):
            """Ray's, with a deadline on every request."""

            def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
                return super()._do_request(method, endpoint, **{"timeout": (CONNECT_SECONDS, REQUEST_SECONDS), **options})

        with self._errors():
            return Client(self.address, headers=_authorization())

    def _get(self, path: str) -> Any:
        import httpx

        try:
            answer = httpx.get(
                f"{self.address}{path}", headers=_authorization(), timeout=httpx.Timeout(REQUEST_SECONDS / 4, connect=CONNECT_SECONDS)
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise InputError(
                f"--address: no Ray dashboard answers at {self.shown} ({error or type(error).__name__}); is the cluster up, and "
                "is this its dashboard's address (port 8265 by default; `ray dashboard cluster.yaml` makes a tunnel to it)?"
            ) from None
        if answer.status_code in (401, 403):
            raise InputError(_refused(self.shown))
        try:
            if answer.status_code != 200:
                raise ValueError
            return answer.json()
        except ValueError:
            raise InputError(
                f"--address: what answers at {self.shown} is not a Ray dashboard (HTTP {answer.status_code} for {path})."
            ) from None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise InputError(_refused(self.shown)) from None
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise StageError(f"The cluster {self.shown} stopped answering: {' '.join(str(error).split())[:300]}.") from error
        except RuntimeError as error:
            raise StageError(f"The cluster {self.shown} (Ray {self.version}) refused: {' '.join(str(error).split())[:600]}") from error


def _next(known: Sequence[JobDetails], run: str, asked: str, *, again: bool) -> tuple[int, Job | None]:
    """The number of the next attempt at a run, and the job that makes it needless."""
    attempts = {int((details.metadata or {}).get("attempt", 0)): details for details in known if (details.metadata or {}).get("run") == run}
    if not attempts:
        return 1, None
    last = attempts[max(attempts)]
    state = str(last.status.value)
    if state not in ENDED:
        return max(attempts), _shown(last)
    if state == "SUCCEEDED" and not again and (last.metadata or {}).get("asked") == asked:
        return max(attempts), _shown(last)
    return max(attempts) + 1, None


def _shown(details: JobDetails) -> Job:
    def moment(milliseconds: int | None) -> str:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds") if milliseconds else ""

    return Job(
        id=details.submission_id or "",
        status=str(details.status.value),
        run=(details.metadata or {}).get("run", ""),
        started=moment(details.start_time),
        ended=moment(details.end_time),
        message=" ".join((details.message or "").split()),
    )


def _dashboard(address: str) -> str:
    """The dashboard's URL, from what people type."""
    url = address if "://" in address else f"http://{address}"
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--address: {address!r} is not a dashboard's address, for example http://head:8265.")
    try:
        port = parts.port
    except ValueError:
        raise InputError(f"--address: {address!r} has a port that is no number.") from None
    if port == 6379:
        raise InputError(
            f"--address: {address!r} is the port of the cluster's head; jobs are submitted to its dashboard, http://{parts.hostname}:8265."
        )
    return url.rstrip("/") if port or parts.scheme == "https" else f"{url.rstrip('/')}:8265"


def _authorization() -> dict[str, str]:
    """The token's header, by Ray's own order of places; empty where there is none."""
    place = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    token = os.environ.get("RAY_AUTH_TOKEN") or (place.read_text().strip() if place.is_file() else "")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _refused(shown: str) -> str:
    has = "the token given is not the cluster's" if _authorization() else "it wants a token and none is given"
    return f"--address: the cluster {shown} refuses this user: {has}. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it."
