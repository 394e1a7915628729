"""Model versions, aliases and lineage, on MLflow: an SQLite file in the storage by default, any MLflow server by address.

A version points at its bundle by URI (tag `bundle`); the weights are not copied. The MLflow run beside it holds the
parameters, the metrics over time and the tables. MLflow takes seconds to import, so nothing here does before it must.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import bases
from orchestrator import bundle as bundles
from orchestrator.config import JobConfig, digest
from orchestrator.errors import InputError, StageError, did_you_mean, nearest
from orchestrator.records import RegisterRecord, SearchRecord
from orchestrator.search import runs
from orchestrator.search.runs import text
from orchestrator.storage import Folder
from orchestrator.tasks.base import Task

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

PROBE_SECONDS = 5.0
"""How long a registry server may take to accept a connection and answer."""
POINTS = 2000
"""Most points of one curve that go to MLflow; the whole history is an artifact of the run."""
ARCHIVES = {".zip": "zip", ".tar.gz": "gztar", ".tgz": "gztar"}
_NAME = re.compile(r"[^/:]+")
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


@dataclass(frozen=True)
class ResolvedModel:
    """What a MODEL argument stands for."""

    name: str
    bundle: str
    """URI or local path of the bundle."""
    version: int | None = None
    """None for a bundle folder that was named directly."""
    aliases: tuple[str, ...] = ()
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """Split -> metric -> value."""
    tags: dict[str, str] = field(default_factory=dict)


def check(uri: str | None, storage: Folder) -> str:
    """Says in a sentence which registry will be used; `InputError` within `PROBE_SECONDS` when it can't be. Imports no MLflow."""
    address = locate(uri, storage)
    shown = bundles.without_secrets(address)
    scheme = urllib.parse.urlsplit(address).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        _probe_http(address, shown)
    elif scheme in _PORTS:
        _probe_port(address, shown, scheme)
    return f"MLflow at {shown}"


def locate(uri: str | None, storage: Folder) -> str:
    """The MLflow address: `uri`, or the SQLite file in a local `storage`."""
    if uri:
        return uri
    if not storage.is_local:
        raise InputError(
            f"registry.uri is missing: the storage {storage.uri!r} is not a local folder, so the registry can't be an SQLite file in it; "
            "set registry.uri to an MLflow server, for example http://mlflow.example.com:5000."
        )
    return f"sqlite:///{storage.path}/mlflow.db"


class Registry:
    """The models of one MLflow registry.

    `uri` is any MLflow address; None: the SQLite file in `storage`, which is made when first written to.
    """

    def __init__(self, uri: str | None, storage: Folder):
        self.storage = storage
        self.address = locate(uri, storage)
        self.shown = bundles.without_secrets(self.address)
        """The address without user or password."""

    def warm(self) -> None:
        """Imports MLflow and makes its tables in the background, so that registering later finds them there."""

        def work() -> None:
            # What goes wrong here goes wrong again, with a sentence, where the registry is needed.
            with contextlib.suppress(InputError, StageError):
                self.client.search_registered_models(max_results=1)

        threading.Thread(target=work, name="registry-warm", daemon=True).start()

    # ---- writing ---------------------------------------------------------------------------------------------
    def register(
        self,
        job: JobConfig,
        task: Task,
        *,
        bundle: Folder,
        metrics: Mapping[str, Mapping[str, float]],
        test_fingerprint: str,
        lineage: Mapping[str, Any],
        run_dir: Folder,
        run_id: str | None = None,
        searched: SearchRecord | None = None,
        history: str | None = None,
        tables: Mapping[str, str] | None = None,
        champion_score: float | None = None,
        promote: bool = False,
    ) -> RegisterRecord:
        """A new version of the job's model for `bundle`, with its MLflow run; the same bundle again is the same version.

        `run_id` is the job's where `job` is a trial's; the trials of the sweep `searched` become child runs of the version's.

        `metrics` are split -> metric -> value; `history` the JSONL file of metrics over steps and `tables` name -> CSV
        file, both in any storage. `test_fingerprint` tells whether two versions were scored on the same test rows;
        `champion_score` is the present champion's score on these test rows, where the caller measured it again.
        The alias moves to the new version when there is none yet, with `promote`, or when its objective (on the test
        split, else validation) is better than the champion's on the same rows.
        Raises `InputError` for a name MLflow can't take and `StageError` when the registry fails.
        """
        name = job.model_name
        if not _NAME.fullmatch(name):
            raise InputError(f"registry.model: {name!r} can't name a model; it must not contain '/' or ':'.")
        sha = bundles.digest(bundle)
        with self._errors():
            client = self.client
            split, objective = _objective(task, metrics)
            champion = self._by_alias(name, job.registry.alias)
            version = self._of_bundle(name, sha)
            if version is None:
                tags = {
                    "bundle": str(bundle),
                    "bundle_digest": sha,
                    "test_fingerprint": test_fingerprint,
                    "objective": f"{split}_{objective}",
                    "job_digest": digest(job.to_json()),
                    "job_run": run_id or job.run_id,
                    "run_dir": str(run_dir),
                    **(runs.lineage(searched) if searched is not None else {}),
                    "base_model": job.model.base,
                    "host": socket.gethostname(),
                    **({"parent": f"{name}/{champion.version}"} if champion else {}),
                    **_git(),
                    **{f"library.{key}": value for key, value in bundles.environment()["libraries"].items() if value},
                    **{f"lineage.{key}": value for key, value in lineage.items() if value is not None},
                }
                tags = {key: text(value) for key, value in tags.items()}
                mlflow_run = self._run(job, name, metrics, tags, history, tables or {}, bundle, searched)
                version = self._version(name, mlflow_run, bundle, tags)
            assert version.run_id is not None
            moved, reason = _verdict(
                int(version.version), champion, split, objective, metrics, test_fingerprint, champion_score, self._metrics_of(champion),
                higher=task.higher_is_better(objective), promote=promote, alias=job.registry.alias, name=name,
            )  # fmt: skip
            if moved:
                client.set_registered_model_alias(name, job.registry.alias, version.version)
            holds = moved or (champion is not None and champion.version == version.version)
            return RegisterRecord(
                name=name,
                version=int(version.version),
                uri=self.shown,
                mlflow_run=version.run_id,
                bundle=str(bundle),
                alias=job.registry.alias if holds else None,
                reason=reason,
            )

    def promote(self, model: str, alias: str = "champion") -> ResolvedModel:
        """Points `alias` at a version: `name/3`, `name@alias`, or `name` for its latest version."""
        name, version = self._find(model, latest=True)
        with self._errors():
            self.client.set_registered_model_alias(name, alias, version.version)
        return self._resolved(name, self.client.get_model_version(name, version.version))

    def export(self, model: str, target: str | Path, *, plain: bool = False) -> Path:
        """Copies a model's bundle to the folder or archive (.zip, .tar.gz) `target`, which must not exist yet.

        `plain`: only what transformers reads, in one folder as it does: model (adapters merged, label names in its config) and processor.
        """
        resolved = self.resolve(model)
        place = Path(target).absolute()
        if place.exists() and (place.is_file() or any(place.iterdir())):
            raise InputError(f"{str(place)!r} exists already; name a new folder or archive to export to.")
        loaded = bundles.load(resolved.bundle)
        ending = next((ending for ending in ARCHIVES if place.name.endswith(ending)), None)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=place.parent) as scratch:
            source = loaded.path
            if plain:
                source = Path(scratch) / "plain"
                bases.export(loaded, source)
            if ending is None:
                shutil.copytree(source, Path(scratch) / "bundle")
                if place.exists():
                    place.rmdir()
                (Path(scratch) / "bundle").rename(place)
            else:
                archive = shutil.make_archive(str(Path(scratch) / "archive"), ARCHIVES[ending], root_dir=source)
                Path(archive).rename(place)
        return place

    # ---- reading ---------------------------------------------------------------------------------------------
    def resolve(self, model: str, alias: str = "champion") -> ResolvedModel:
        """What `name` (its `alias`, else its latest version), `name@alias`, `name/3` or a bundle folder stands for.

        `InputError` with the nearest names, or with the versions and aliases there are.
        """
        if "://" in model or Path(model).expanduser().is_dir():
            folder = Folder(model)
            if "://" in model or (folder / "task.json").exists():
                if not (folder / "manifest.json").exists():
                    raise InputError(f"MODEL: there is no bundle at {model!r}: it has no manifest.json.")
                return ResolvedModel(name=folder.path.rstrip("/").rsplit("/", 1)[-1], bundle=str(folder))
        name, version = self._find(model, alias=alias)
        return self._resolved(name, version)

    def list_models(self) -> list[dict[str, Any]]:
        """Each model by name: its number of versions, latest version and aliases."""
        if not self._exists():
            return []
        with self._errors():
            return [
                {
                    "name": model.name,
                    "versions": len(versions := self._versions(model.name)),
                    "latest": int(versions[0].version) if versions else None,
                    "aliases": {alias: int(version) for alias, version in sorted(model.aliases.items())},
                }
                for model in self._models()
            ]

    def show(self, model: str) -> list[ResolvedModel]:
        """The versions of a model, latest first; only the one that `name/3` or `name@alias` names."""
        if re.search(r"[@/]", model):
            return [self.resolve(model)]
        name, _ = self._find(model)
        with self._errors():
            return [self._resolved(name, version) for version in self._versions(name)]

    # ---- inside ----------------------------------------------------------------------------------------------
    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client, connected; `InputError` when the server doesn't answer."""
        if urllib.parse.urlsplit(self.address).scheme not in ("sqlite", ""):
            check(self.address, self.storage)
        if self._is_own_file:
            self.storage.make()
        with self._errors():
            from mlflow.tracking import MlflowClient

            return MlflowClient(tracking_uri=self.address, registry_uri=self.address)

    @property
    def _is_own_file(self) -> bool:
        return self.storage.is_local and self.address == locate(None, self.storage)

    def _exists(self) -> bool:
        return not self._is_own_file or (self.storage / "mlflow.db").exists()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        _quiet_mlflow()
        import sqlalchemy.exc
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
            sentence = bundles.without_secrets(" ".join(str(error).split()))[:600]
            raise StageError(f"The registry {self.shown} failed: {sentence.rstrip('.')}.") from error

    def _models(self) -> list[Any]:
        found, token = [], None
        while True:
            page = self.client.search_registered_models(max_results=100, page_token=token)
            found += page
            if not (token := page.token):
                return sorted(found, key=lambda model: model.name)

    def _versions(self, name: str) -> list[ModelVersion]:
        """All versions, latest first."""
        found, token = [], None
        quoted = name.replace("'", "\\'")
        while True:
            page = self.client.search_model_versions(f"name='{quoted}'", max_results=1000, page_token=token)
            found += page
            if not (token := page.token):
                return sorted(found, key=lambda version: -int(version.version))

    def _aliases(self, name: str) -> dict[str, int]:
        model = next((model for model in self._models() if model.name == name), None)
        return {alias: int(version) for alias, version in model.aliases.items()} if model else {}

    def _by_alias(self, name: str, alias: str) -> ModelVersion | None:
        version = self._aliases(name).get(alias)
        return self.client.get_model_version(name, str(version)) if version is not None else None

    def _of_bundle(self, name: str, sha: str) -> ModelVersion | None:
        return next((version for version in self._versions(name) if version.tags.get("bundle_digest") == sha), None)

    def _find(self, model: str, *, alias: str = "champion", latest: bool = False) -> tuple[str, ModelVersion]:
        if not self._exists():
            raise InputError(
                f"MODEL: there is no registry at {self.shown} and no bundle folder {model!r}; "
                "run a job first, or name its storage with --storage."
            )
        name, mark, wanted = re.fullmatch(r"([^@/]*)([@/]?)(.*)", model, re.DOTALL).groups()  # type: ignore[union-attr] - it matches anything
        with self._errors():
            models = {found.name: found for found in self._models()}
            if name not in models:
                what = f"there is no model {name!r}" if name else f"{model!r} names no model"
                here = did_you_mean(name, models) or " It has no models yet."
                raise InputError(f"MODEL: {what} in the registry {self.shown}, and {model!r} is not a bundle folder.{here}")
            versions = {int(version.version): version for version in self._versions(name)}
            aliases = {key: int(value) for key, value in models[name].aliases.items()}
        has = f"{name} has the versions {_some(versions)} and the aliases {', '.join(aliases) or 'none'}."
        if mark == "/":
            if not wanted.isdigit() or int(wanted) not in versions:
                raise InputError(f"MODEL: {name} has no version {wanted!r}. {has}")
            return name, versions[int(wanted)]
        if mark == "@":
            if wanted not in aliases:
                near = f" The nearest alias is {nearest(wanted, aliases)[0]!r}." if aliases else ""
                raise InputError(f"MODEL: {name} has no alias {wanted!r}. {has}{near}")
            return name, versions[aliases[wanted]]
        if not versions:
            raise InputError(f"MODEL: {name} has no versions yet in the registry {self.shown}.")
        return name, versions[aliases[alias] if alias in aliases and not latest else max(versions)]

    def _resolved(self, name: str, version: ModelVersion) -> ResolvedModel:
        bundle = version.tags.get("bundle")
        if bundle is None:
            raise InputError(f"MODEL: {name}/{version.version} in {self.shown} was not registered by this product: it has no tag 'bundle'.")
        aliases = tuple(sorted(alias for alias, number in self._aliases(name).items() if number == int(version.version)))
        return ResolvedModel(name, bundle, int(version.version), aliases, self._metrics_of(version), dict(version.tags))

    def _metrics_of(self, version: ModelVersion | None) -> dict[str, dict[str, float]]:
        """Split -> metric -> value, as the version's run has them."""
        if version is None or version.run_id is None:
            return {}
        with self._errors():
            flat = self.client.get_run(version.run_id).data.metrics
        metrics: dict[str, dict[str, float]] = {}
        for key, value in flat.items():
            split, _, metric = key.partition("_")
            if split in ("train", "validation", "test") and metric:
                metrics.setdefault(split, {})[metric] = value
        return metrics

    def _run(
        self,
        job: JobConfig,
        name: str,
        metrics: Mapping[str, Mapping[str, float]],
        tags: dict[str, str],
        history: str | None,
        tables: Mapping[str, str],
        bundle: Folder,
        searched: SearchRecord | None,
    ) -> str:
        """The MLflow run that describes a version, with its trials as runs below it; returns its id."""
        from mlflow.entities import Metric, Param

        client = self.client
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            place = str(self.storage / "mlflow-artifacts" / name) if self._is_own_file else None
            experiment_id = client.create_experiment(name, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        run = client.create_run(experiment_id, run_name=tags["job_run"], tags=tags)
        run_id, now = run.info.run_id, run.info.start_time
        params = [Param(key, value) for key, value in parameters(job).items()]
        for start in range(0, len(params), 100):
            client.log_batch(run_id, params=params[start : start + 100])
        points = [Metric(key, value, moment, step) for key, value, step, moment in _curves(history, now)]
        points += [Metric(f"{split}_{key}", value, now, 0) for split, each in metrics.items() for key, value in each.items()]
        for start in range(0, len(points), 1000):
            client.log_batch(run_id, metrics=points[start : start + 1000])
        with tempfile.TemporaryDirectory(prefix="orchestrator-register-") as scratch:
            _collect(Path(scratch), job, bundle, history, tables)
            if searched is not None and searched.report is not None and Folder(searched.report).exists():
                (Path(scratch) / "report.html").write_bytes(Folder(searched.report).read_bytes())
            client.log_artifacts(run_id, scratch)
        if searched is not None:
            runs.log(client, experiment_id, run_id, searched, now)
        client.set_terminated(run_id)
        return run_id

    def _version(self, name: str, run_id: str, bundle: Folder, tags: dict[str, str]) -> ModelVersion:
        client = self.client
        if name not in {model.name for model in self._models()}:
            client.create_registered_model(name)
        # A server refuses a source on the client's own disk, so there it is the run, and the tag alone names the bundle.
        served = urllib.parse.urlsplit(self.address).scheme in ("http", "https")
        source = f"runs:/{run_id}/bundle" if served and bundle.is_local else str(bundle)
        version = client.create_model_version(name, source, run_id, tags=tags)
        return client.get_model_version(name, version.version)


def parameters(job: JobConfig) -> dict[str, str]:
    """The job as flat `section.key` parameters, without secrets."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}" if path else str(key))
        else:
            yield runs.key(path), text(value)

    return dict(walk(bundles.without_secrets(job.to_json()), ""))


def _some(versions: Mapping[int, Any]) -> str:
    numbers = sorted(versions)
    return ", ".join(map(str, numbers)) if len(numbers) <= 8 else f"1 to {numbers[-1]}"


def _objective(task: Task, metrics: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """Split and metric by which versions are compared: the task's objective where it was measured, on the test split if there is one."""
    for split in ("test", "validation"):
        named = metrics.get(split)
        if named:
            return split, task.objective if task.objective in named else next(iter(named))
    raise InputError("evaluation: there are no metrics on the test or validation split, so this model can't be compared or registered.")


def _verdict(
    version: int,
    champion: ModelVersion | None,
    split: str,
    objective: str,
    metrics: Mapping[str, Mapping[str, float]],
    test_fingerprint: str,
    champion_score: float | None,
    champion_metrics: Mapping[str, Mapping[str, float]],
    *,
    higher: bool,
    promote: bool,
    alias: str,
    name: str,
) -> tuple[bool, str]:
    """Whether the alias moves to `version`, and why."""
    if champion is None:
        return True, f"it is the first {alias} of {name}."
    old = int(champion.version)
    if old == version:
        return False, f"version {version} is the {alias} already."
    by_hand = f"`orchestrator models promote {name}/{version}` moves it"
    if promote:
        return True, f"the {alias} moved from version {old}, as --promote asked."
    new_score = metrics[split][objective]
    if champion_score is not None:
        old_score: float | None = champion_score
    elif champion.tags.get("test_fingerprint") != test_fingerprint:
        return False, f"the {alias} stays at version {old}, which was scored on other {split} rows; {by_hand}."
    else:
        old_score = champion_metrics.get(split, {}).get(objective)
    if old_score is None:
        return False, f"the {alias} stays at version {old}, which has no {split} {objective} to compare with; {by_hand}."
    figures = f"{split} {objective} {new_score:.4g} against {old_score:.4g} of version {old}"
    if not math.isnan(new_score) and (math.isnan(old_score) or (new_score > old_score if higher else new_score < old_score)):
        return True, f"it is the new {alias}: {figures}."
    return False, f"the {alias} stays at version {old}: {figures}; {by_hand}."


def _curves(history: str | None, start: int) -> Iterator[tuple[str, float, int, int]]:
    """(name, value, step, milliseconds) for the points of a history file, thinned to `POINTS` lines and every validation."""
    if history is None or not Folder(history).exists():
        return
    lines = [json.loads(line) for line in Folder(history).read_bytes().splitlines() if line.strip()]
    stride = max(1, math.ceil(len(lines) / POINTS))
    for index, line in enumerate(lines):
        if index % stride and not line.get("metrics"):
            continue
        named = {key: line.get(key) for key in ("loss", "learning_rate", "epoch", "grad_norm")}
        named |= {f"validation_{key}": value for key, value in (line.get("metrics") or {}).items()}
        for key, value in named.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                # Curves keep names of their own: the plain names are the final figures.
                yield f"curve/{key}", float(value), int(line.get("step", index)), start


def _collect(scratch: Path, job: JobConfig, bundle: Folder, history: str | None, tables: Mapping[str, str]) -> None:
    """What is small and worth reading in MLflow's pages: the job, what the bundle says of itself, history and tables."""
    (scratch / "job.json").write_text(json.dumps(bundles.without_secrets(job.to_json()), indent=2, ensure_ascii=False), encoding="utf-8")
    for name in ("task.json", "environment.json", "lineage.json", "metrics.json", "manifest.json"):
        if (bundle / name).exists():
            (scratch / "bundle").mkdir(exist_ok=True)
            (scratch / "bundle" / name).write_bytes((bundle / name).read_bytes())
    if history is not None and Folder(history).exists():
        (scratch / "history.jsonl").write_bytes(Folder(history).read_bytes())
    for name, path in tables.items():
        (scratch / "tables").mkdir(exist_ok=True)
        (scratch / "tables" / f"{name}.csv").write_bytes(Folder(path).read_bytes())


def _git() -> dict[str, str]:
    """Commit of the working directory, and whether there are changes beside it; nothing outside a repository."""
    try:
        asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
        commit, status = (subprocess.run(args, capture_output=True, text=True, timeout=5, check=True).stdout.strip() for args in asked)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_commit": commit, "git_dirty": "true" if status else "false"}


def _quiet_mlflow() -> None:
    """Settings that MLflow reads when it is imported: say only what is wrong, wait a short while, send no telemetry."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _probe_http(address: str, shown: str) -> None:
    import httpx

    try:
        response = httpx.get(f"{address.rstrip('/')}/health", timeout=PROBE_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(
            f"registry.uri: the MLflow server {shown} doesn't answer ({error or type(error).__name__}); "
            "start it, correct the address, or leave registry.uri out for an SQLite file in the storage."
        ) from None
    if response.status_code in (401, 403):
        raise InputError(
            f"registry.uri: the MLflow server {shown} refuses this user (HTTP {response.status_code}); "
            "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        )
    if response.status_code != 200:
        raise InputError(f"registry.uri: {shown} is not an MLflow server: it answers /health with HTTP {response.status_code}.")


def _probe_port(address: str, shown: str, scheme: str) -> None:
    parts = urllib.parse.urlsplit(address)
    host, port = parts.hostname or "localhost", parts.port or _PORTS[scheme]
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise InputError(f"registry.uri: the database {shown} doesn't answer on {host}:{port} ({error}).") from None
