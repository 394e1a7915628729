"""What Python code calls: the same stages as the command line, with the record they leave as the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from orchestrator.config import JobConfig
    from orchestrator.progress import Display
    from orchestrator.records import SearchRecord


def tune(
    job: str | Path | Mapping[str, Any] | JobConfig,
    *,
    assignments: Sequence[str] = (),
    storage: str | None = None,
    until: Literal["train", "evaluate", "register"] = "register",
    address: str | None = None,
    promote: bool = False,
    fresh: bool = False,
    display: Display | None = None,
    verbose: bool = False,
) -> SearchRecord:
    """Sweeps the space of a job's `search` section, as `orchestrator tune JOB` does, and returns the record of it.

    `job` is a job file, its content, or a `JobConfig`; `assignments` are as `--set` takes them ("training.max_steps=20").
    The winner's bundle is at `record.train.bundle`, `record.frame()` is a table of the trials. A sweep that was interrupted goes on,
    and one that is done is not done again. Raises `InputError` for what can't be used as given and `StageError` for what failed.
    """
    import importlib

    from orchestrator.errors import InputError
    from orchestrator.progress import Silent
    from orchestrator.records import SearchRecord
    from orchestrator.storage import Folder

    resolved = _resolved(job, assignments, storage)
    if resolved.search is None:
        raise InputError("The job has no search section, so there is nothing to tune; add one, or run it as it is.")
    # By its name, as the command line does: jobs are what a cluster runs, and know the library, not the other way round.
    result = importlib.import_module("jobs.pipeline").main(
        resolved, until=until, promote=promote, fresh=fresh, display=display or Silent(), verbose=verbose, address=address
    )
    place = Folder(result["run_dir"]) / "records" / "search.json"
    return SearchRecord.parse(place.read_json()["record"], str(place))


def _resolved(job: str | Path | Mapping[str, Any] | JobConfig, assignments: Sequence[str], storage: str | None) -> JobConfig:
    from orchestrator.config import JobConfig, load
    from orchestrator.schema import override

    if isinstance(job, (str, Path)):
        return load(job, list(assignments), storage=storage)
    value = override(job.to_json() if isinstance(job, JobConfig) else dict(job), list(assignments))
    found = JobConfig.parse({**value, **({"storage": storage} if storage is not None else {})}, "job")
    if "://" in found.storage:
        return found
    return found.model_copy(update={"storage": str(Path(found.storage).expanduser().absolute())})
