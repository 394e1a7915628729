"""The commands that take a model or its predictions: predict, graph, serve, and the registry's."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.commands import console, options
from orchestrator.progress import figure

if TYPE_CHECKING:
    from orchestrator.registry import Registry, ResolvedModel

models = typer.Typer(help="The registry: models, their versions and aliases.")


def predict(
    model: options.Model,
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="File, glob or URI to read, in any format a job reads.", show_default=False)
    ],
    target: Annotated[str, typer.Argument(metavar="OUTPUT", help="File to write: .parquet, .csv or .jsonl.", show_default=False)],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Read the input otherwise than the model's job did, as in data.columns.text=body. Repeatable.",
        ),
    ] = None,
    storage: options.Storage = "runs",
    registry: options.Registry = None,
    address: options.Ray = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Predict every row of a file or of many, in order."""
    with console.command(verbose=verbose, json=json) as output:
        if dry_run:
            _say_which(output, _registry(storage, registry).resolve(model), f"would read {source} and write {target}")
            return
        result: dict[str, Any] = importlib.import_module("jobs.predict").main(
            model,
            source,
            target,
            storage=storage,
            registry=registry,
            assignments=assignments,
            display=output.display,
            verbose=verbose,
            address=address,
        )
        output.display.close()
        output.result({"status": "done", **result})


def graph(
    source: Annotated[
        str, typer.Argument(metavar="PREDICTIONS", help="What `predict` wrote with a model whose answers are triples.", show_default=False)
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT",
            help="File to write: .graphml with equal names and triples merged; .parquet, .csv or .jsonl with each one.",
            show_default=False,
        ),
    ],
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Leave out triples with a lower score.")] = 0.0,
    min_count: Annotated[int, typer.Option(min=1, help="Leave out triples of the merged graph that are said fewer times.")] = 1,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Make a knowledge graph of predicted triples."""
    with console.command(verbose=verbose, json=json) as output:
        from orchestrator import knowledge_graph

        counts = knowledge_graph.write(source, target, min_score=min_score, min_count=min_count)
        output.text(f"{target}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
        output.result({"status": "done", "output": target, **counts})


def serve(
    model: options.Model,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; the model's job says which by default.", show_default=False)
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default=False)] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change the endpoint, as in serving.replicas.max=4. Repeatable."),
    ] = None,
    storage: options.Storage = "runs",
    registry: options.Registry = None,
    address: options.Ray = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve a model over HTTP until Ctrl-C."""
    with console.command(verbose=verbose, json=json) as output:
        if dry_run:
            _say_which(output, _registry(storage, registry).resolve(model), "would be served")
            return
        result: dict[str, Any] = importlib.import_module("jobs.serve").main(
            model,
            storage=storage,
            registry=registry,
            host=host,
            port=port,
            assignments=assignments,
            display=output.display,
            verbose=verbose,
            address=address,
        )
        output.display.close()
        output.result({"status": "done", **result})


@models.command("list")
def list_models(
    storage: options.Storage = "runs",
    registry: options.Registry = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """List the registered models."""
    with console.command(verbose=verbose, json=json) as output:
        found = _registry(storage, registry).list_models()
        if found:
            rows = [
                [
                    model["name"],
                    str(model["versions"]),
                    str(model["latest"]),
                    ", ".join(f"{alias} -> {version}" for alias, version in model["aliases"].items()),
                ]
                for model in found
            ]
            output.table(["model", "versions", "latest", "aliases"], rows)
        else:
            output.text(f"There are no models in {_registry(storage, registry).shown} yet; `orchestrator run JOB` makes one.")
        output.result({"status": "done", "models": found})


@models.command("show")
def show_model(
    model: options.Model,
    storage: options.Storage = "runs",
    registry: options.Registry = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show a model's versions: aliases, metrics, where the bundle is and what it was made from."""
    with console.command(verbose=verbose, json=json) as output:
        versions = _registry(storage, registry).show(model)
        for version in versions:
            facts = {"aliases": ", ".join(version.aliases), "bundle": version.bundle, **version.tags}
            facts |= {
                split: ", ".join(f"{name} {figure(value)}" for name, value in named.items()) for split, named in version.metrics.items()
            }
            output.table([_title(version), ""], [[key, str(value)] for key, value in facts.items() if value])
        output.result({"status": "done", "versions": [asdict(version) for version in versions]})


@models.command()
def promote(
    model: options.Model,
    alias: Annotated[str, typer.Option(help="The alias to move.")] = "champion",
    storage: options.Storage = "runs",
    registry: options.Registry = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Point an alias at a version: name/3, or a name for its latest version."""
    with console.command(verbose=verbose, json=json) as output:
        place = _registry(storage, registry)
        if dry_run:
            _say_which(output, place.resolve(model), f"would become {alias}")
            return
        version = place.promote(model, alias)
        output.text(f"{_title(version)} is {alias} now.")
        output.result({"status": "done", "model": {"name": version.name, "version": version.version}, "alias": alias})


@models.command()
def export(
    model: options.Model,
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder, or an archive (.zip, .tar.gz).", show_default=False)],
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Only model and processor, in a folder that transformers (AutoModel, pipeline) and the hub read."),
    ] = False,
    storage: options.Storage = "runs",
    registry: options.Registry = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Copy a model to a folder or archive: its bundle, or what other programs read."""
    with console.command(verbose=verbose, json=json) as output:
        place = _registry(storage, registry)
        version = place.resolve(model)
        if dry_run:
            _say_which(output, version, f"would be copied to {target}")
            return
        written = place.export(model, target, plain=plain)
        output.text(f"{_title(version)} is in {written}.")
        output.result({"status": "done", "model": {"name": version.name, "version": version.version}, "output": str(written)})


def _registry(storage: str, uri: str | None) -> Registry:
    from orchestrator.registry import Registry
    from orchestrator.storage import Folder

    return Registry(uri, Folder(storage))


def _title(model: ResolvedModel) -> str:
    return f"{model.name} version {model.version}" if model.version is not None else model.name


def _say_which(output: console.Output, model: ResolvedModel, what: str) -> None:
    output.text(f"Nothing was done. {_title(model)} ({model.bundle}) {what}.")
    output.result({"status": "dry-run", "model": {"name": model.name, "version": model.version}, "bundle": model.bundle})
