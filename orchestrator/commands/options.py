"""The options that more than one command has, each said once."""

from pathlib import Path
from typing import Annotated

import typer

Job = Annotated[Path, typer.Argument(metavar="JOB", help="The job file (YAML), or a resolved job.json.", show_default=False)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="name, name@alias, name/3 or a bundle folder.", show_default=False)]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Set a key of the job, as in training.learning_rate=3e-5. Repeatable.", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, write the resolved job, and stop.")]
Json = Annotated[
    bool, typer.Option("--json", help="Make the last line of standard output one JSON object; what people read goes to standard error.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what Ray and the libraries say, and tracebacks.")]
JobStorage = Annotated[
    str | None,
    typer.Option("--storage", metavar="FOLDER", help="Root of runs and registry, instead of the job's `storage`.", show_default=False),
]
Storage = Annotated[str, typer.Option("--storage", metavar="FOLDER", envvar="ORCHESTRATOR_STORAGE", help="Root of runs and registry.")]
Registry = Annotated[
    str | None,
    typer.Option("--registry", metavar="URI", help="MLflow server, instead of the SQLite file in the storage.", show_default=False),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="RAY",
        help="A running Ray cluster to use from here (HOST:6379); without it Ray is started in this process.",
        show_default=False,
    ),
]
Head = Annotated[
    str,
    typer.Option(
        "--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, http://HEAD:8265.", show_default=False
    ),
]
