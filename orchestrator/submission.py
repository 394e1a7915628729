"""Jobs on a Ray cluster from outside, through Ray Jobs: submit, list, status, logs, stop.

What is sent is what `orchestrator run` runs: `python -m jobs.pipeline` with the resolved job. It goes in one folder with
the product's three packages, from wherever they are installed, and with the job's small local files:

    orchestrator/ jobs/ serving/   the product (and the package of a task of the user's own)
    job/job.json                   the job
    job_files/                     what it names on this machine; as a Python package, since `package://job_files/…` means
                                   the same in every process of the cluster, and so does the run's name
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import sysconfig
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from orchestrator import bundle as bundles
from orchestrator import registry, tasks
from orchestrator.config import JobConfig, digest
from orchestrator.errors import InputError, StageError, nearest
from orchestrator.progress import Display, Silent
from orchestrator.storage import Folder

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

MB = 10**6
UPLOAD_BYTES = 20 * MB
"""Most data and model that is sent along with a job; Ray takes 100 MiB in all."""
REQUEST_SECONDS = 60.0
CONNECT_SECONDS = 5.0
STOP_SECONDS = 60
"""How long a job that is told to stop may take to end in order, before Ray kills it."""
POLL_SECONDS = 1.0
FILES = "job_files"
PACKAGES = ("orchestrator", "jobs", "serving")
_GLOB = re.compile(r"[*?\[]")
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


@dataclass
class _Upload:
    """What goes along, for the sentence that says so."""

    files: int = 0
    size: int = 0
    named: list[str] = field(default_factory=list)


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
        upload = _Upload()
        staged = _stage(job, folder, here=here, upload=upload, display=display)
        registry.locate(staged.registry.uri, Folder(staged.storage))  # says what is missing now, not in the job's log
        options = [name for name, on in (("--promote", promote), ("--fresh", fresh)) if on]
        asked = digest([staged.to_json(), options, module])[:16]
        number, running = _next(cluster.jobs(), staged.run_id, asked, again=fresh)
        if running is not None:
            display.say(f"The cluster has this job already: {running['id']} is {running['status']}.")
            return Submitted(running["id"], staged.run_id, False, running["status"])
        _stage_packages(staged, folder, upload)
        (folder / "job").mkdir()
        (folder / "job" / "job.json").write_text(json.dumps(staged.to_json(), indent=2, ensure_ascii=False), encoding="utf-8")
        upload.files += 1
        also = f" and {', '.join(upload.named)}" if upload.named else ""
        display.say(f"Sending {upload.files} files, {_size(upload.size)}: the product, the job{also}.")
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


# ---- what is sent ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Local:
    """What a job names on this machine, to go along: a file, the files of a folder, or (`each`) the matches of a glob."""

    key: str
    """Of the job, for example data.train."""
    root: Path
    files: tuple[Path, ...]
    each: bool = False

    @cached_property
    def size(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def place(self) -> str:
        """Where `root` lies in `FILES`. Named by its content: the same files make the same run, others another."""
        sha = hashlib.sha256()
        for file in self.files:
            sha.update(f"{file.relative_to(self.root)}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                sha.update(hashlib.file_digest(stream, "sha256").digest())
        return f"{self.key.partition('.')[0]}/{sha.hexdigest()[:12]}/{self.root.resolve().name or 'files'}"

    @property
    def uris(self) -> list[str]:
        """What the job says in its place."""
        inside = [f"/{file.relative_to(self.root)}" for file in self.files] if self.each else [""]
        return [f"package://{FILES}/{self.place}{inner}" for inner in inside]


def _stage(job: JobConfig, folder: Path, *, here: bool, upload: _Upload, display: Display) -> JobConfig:
    """The job as the cluster can run it: with absolute paths on this machine, else with its files copied into `folder`."""
    locals_: list[_Local] = []

    def moved(key: str, given: str) -> list[str]:
        found = _find(key, given, here=here, display=display)
        if isinstance(found, str):
            return [found]
        locals_.append(found)
        return found.uris

    data: dict[str, Any] = {}
    for split in ("train", "validation", "test"):
        given = getattr(job.data, split)
        if given is not None:
            paths = [path for each in ([given] if isinstance(given, str) else given) for path in moved(f"data.{split}", each)]
            data[split] = paths[0] if isinstance(given, str) and len(paths) == 1 else paths
    base = job.model.base
    if "://" not in base and Path(base).expanduser().is_dir():
        base = moved("model.base", base)[0]
    staged = job.model_copy(
        update={
            "storage": _storage(job.storage, here=here, display=display),
            "data": job.data.model_copy(update=data),
            "model": job.model.model_copy(update={"base": base}),
        }
    )
    _copy(locals_, folder, upload)
    return staged


def _find(key: str, given: str, *, here: bool, display: Display) -> str | _Local:
    """A path or URI that the cluster can read as it is, or the local files that must go along."""
    if "://" in given:
        return given
    path = Path(given).expanduser()
    if here:
        return os.path.abspath(path)
    if is_glob := bool(_GLOB.search(given)):
        depth = next(index for index, part in enumerate(path.parts) if _GLOB.search(part))
        root = Path(*path.parts[:depth])
        files = tuple(sorted(file for file in root.glob("/".join(path.parts[depth:])) if file.is_file()))
    else:
        root = path
        files = tuple(sorted(file for file in path.rglob("*") if file.is_file())) if path.is_dir() else (path,) if path.is_file() else ()
    if files:
        return _Local(key, root, files, each=is_glob)
    if path.is_absolute():
        display.warn(f"{key}: {given} is not on this machine; it is taken to be on every node of the cluster.")
        return given
    raise InputError(f"{key}: there is no file {given!r} on this machine to send to the cluster.")


def _copy(found: list[_Local], folder: Path, upload: _Upload) -> None:
    total = sum(item.size for item in found)
    if total > UPLOAD_BYTES:
        each = ", ".join(f"{item.key} {item.root} ({_size(item.size)})" for item in found)
        raise InputError(
            f"The job names {_size(total)} of files on this machine: {each}; up to {_size(UPLOAD_BYTES)} are sent along. Put them where the "
            "cluster reads them and name that: s3://…, gs://…, a hub id, or file:///path for a file system that all nodes share."
        )
    if found:
        (folder / FILES).mkdir()
        (folder / FILES / "__init__.py").write_text('"""Files that this job names, from the machine that submitted it."""\n')
    for item in found:
        for file in item.files:
            copy = folder / FILES / item.place / file.relative_to(item.root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        upload.files += len(item.files)
        upload.size += item.size
        upload.named.append(f"{item.key} ({item.root.name}, {_size(item.size)})")


def _storage(storage: str, *, here: bool, display: Display) -> str:
    if "://" in storage:
        return storage
    path = Path(storage).expanduser()
    if here:
        return os.path.abspath(path)
    if not path.is_absolute():
        raise InputError(
            f"storage: {storage!r} would be a temporary folder of the cluster. Give what all its nodes share and what outlives it: "
            "--storage s3://bucket/runs, gs://…, or the absolute path of a shared file system."
        )
    display.warn(f"storage: {storage} must be a folder that all nodes of the cluster share.")
    return storage


def _stage_packages(job: JobConfig, folder: Path, upload: _Upload) -> None:
    """The product's packages, which lie beside each other in a checkout as in site-packages, and the user's own task."""
    beside = Path(__file__).resolve().parent.parent
    sources = {name: beside / name for name in PACKAGES}
    module = job.task.key.partition(":")[0]
    if job.task.key not in tasks.TASKS and module and not module.startswith("orchestrator."):
        sources.update(_own_package(module.partition(".")[0]))
    for name, source in sources.items():
        if source.is_file():
            shutil.copyfile(source, folder / source.name)
        else:
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "node_modules"))
        files = [file for file in ([folder / source.name] if source.is_file() else (folder / name).rglob("*")) if file.is_file()]
        upload.files += len(files)
        upload.size += sum(file.stat().st_size for file in files)


def _own_package(name: str) -> dict[str, Path]:
    """Where the package or module of a user's task lies; nothing for one that is installed, which the cluster must have too."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    origin = Path(places[0]) if places else Path(spec.origin) if spec and spec.origin else None
    if origin is None or any(origin.is_relative_to(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib")):
        return {}
    return {name: origin}


def _size(size: int) -> str:
    return f"{size / MB:.1f} MB" if size >= MB / 10 else f"{max(size, 1000) / 1000:.0f} kB"
