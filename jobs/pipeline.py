"""The whole job, on the cluster this process finds: `python -m jobs.pipeline job.json`.

`orchestrator run` calls `main` by this module's name in its own process; `orchestrator submit` sends the same module
and the same `job.json` to a cluster. One path, two places.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from jobs import validate
from orchestrator import cluster, parents, pipeline, preflight, tuning
from orchestrator.config import JobConfig, load
from orchestrator.progress import Display
from orchestrator.records import DeployRecord, EvaluateRecord, PreparedData, RegisterRecord

SHOWN = 3
"""Test rows whose answers from the endpoint are shown."""


def main(
    job: JobConfig,
    *,
    until: pipeline.Until = "deploy",
    promote: bool = False,
    keep_serving: bool = False,
    fresh: bool = False,
    display: Display,
    verbose: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Runs the job's stages up to `until`; returns the result that `--json` prints.

    With `keep_serving` the endpoint stays up until Ctrl-C. On a cluster that outlives this process it stays anyway.
    """
    display.stage("check")
    job = parents.settled(job, fresh=fresh)
    if job.model.parent is not None:
        display.say(f"{job.model.base} is {job.model.parent}, now and whenever this run goes on; --fresh looks for the newest")
    run = pipeline.Run(job, display)
    for sentence in cluster.sweep():  # what a killed run left behind may hold the endpoint's port
        display.say(sentence)
    validate.require(job, register=until in ("register", "deploy"), serve=until == "deploy", address=address)
    with run.alone(fresh=fresh), cluster.session(address, log_dir=run.log_dir, verbose=verbose) as session:
        found = cluster.resources()
        # What an autoscaler may still add isn't on a node yet; then only the sums can be asked about.
        nodes = list(found.nodes) if found.maximum == found.total else [found.maximum]
        preflight.require_resources(job, nodes) if job.search is None else tuning.look(job, nodes)
        if found.maximum.get("GPU", 0) > found.total.get("GPU", 0) and "auto" in (job.resources.num_workers, job.resources.gpus_per_worker):
            display.warn(
                "The cluster can grow by GPUs that aren't there yet: to train on them, set resources.num_workers and gpus_per_worker."
            )
        deploy = Deployment(display, stays=not session.embedded, keep=keep_serving)
        result = pipeline.run(run, until=until, promote=promote, deploy=deploy if until == "deploy" else None)
        if until == "deploy":
            deploy.finish()
    return result


class Deployment:
    """The last stage: the endpoint, checked, three answers from it, and what becomes of it afterwards."""

    def __init__(self, display: Display, *, stays: bool, keep: bool):
        self.display, self.stays, self.keep = display, stays, keep

    def __call__(self, job: JobConfig, prepared: PreparedData, evaluated: EvaluateRecord, registered: RegisterRecord) -> DeployRecord:
        from orchestrator.evaluation import read_predictions
        from serving import app, replay

        self.endpoint = app.deploy(registered.bundle, job.serving, name=registered.name, version=registered.version, display=self.display)
        split = "validation" if evaluated.predictions.get("validation") else "test"
        entries = read_predictions(evaluated.predictions[split], limit=job.serving.replay_rows)
        rows, predictions = [{"row_id": entry["row_id"], **entry["row"]} for entry in entries], [entry["prediction"] for entry in entries]
        task, key, url = prepared.task, app.a_key(job.serving), self.endpoint.url
        replayed = replay.replay(url, task, rows, predictions, job.serving.tolerance, api_key=key)
        self.display.say(
            f"{replayed.rows} {split} rows answered over HTTP as offline (largest difference {replayed.largest_difference:.1e})"
        )
        unseen = read_predictions(evaluated.predictions.get("test") or evaluated.predictions[split], limit=SHOWN)
        for inputs, answer in replay.ask(url, task, [entry["row"] for entry in unseen], api_key=key):
            self.display.say(f"{_short(inputs)}\n  -> {json.dumps(_rounded(answer), ensure_ascii=False)}")
        return DeployRecord(
            url=self.endpoint.url,
            model=registered.name,
            version=registered.version,
            replayed=replayed.rows,
            largest_difference=replayed.largest_difference,
        )

    def finish(self) -> None:
        """Leaves the endpoint running, holds it, or takes it down."""
        from serving import app

        if self.keep:
            app.hold(self.endpoint, self.display)
        if not self.stays:
            app.shutdown()


def _short(inputs: Any, most: int = 120) -> str:
    text = json.dumps(inputs, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}…"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _run_file(
    job_file: Annotated[str, typer.Argument(help="The resolved job (job.json).")],
    until: Annotated[str, typer.Option(help="Last stage: train, evaluate, register or deploy.")] = "deploy",
    promote: Annotated[bool, typer.Option(help="Move the alias to the new version whatever it scores.")] = False,
    fresh: Annotated[bool, typer.Option(help="Forget the stages that are done.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose")] = False,
) -> None:
    from orchestrator.commands import console
    from orchestrator.commands.job import closing

    with console.command(verbose=verbose, json=True) as output:
        job = load(job_file)
        result = main(job, until=until, promote=promote, fresh=fresh, display=output.display, verbose=verbose)  # pyright: ignore[reportArgumentType]
        output.display.close()
        output.text(closing(job, result))
        output.result({"status": "done", **result})


if __name__ == "__main__":
    typer.run(_run_file)
