"""Metric modules for the `evaluate` library that ship with the package, so that scoring needs no network.

Each module beside this file is loaded by its path. In such a module every import stands on a line of its own: `evaluate`
reads them to check that they are installed. A name that is no module here is one of the Hugging Face hub or a path to a module.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from orchestrator.errors import InputError

HERE = Path(__file__).parent


@functools.cache
def load(name: str, config: str | None = None) -> Any:
    """The `evaluate` module `name`, loaded once in a process; `InputError` where there is none or the hub can't be reached."""
    import evaluate
    import evaluate.config
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE:  # `evaluate` knows a variable of its own only.
        evaluate.config.HF_EVALUATE_OFFLINE = True
    shipped = HERE / f"{name}.py"
    try:
        return evaluate.load(str(shipped) if shipped.is_file() else name, config_name=config, keep_in_memory=True)
    except (OSError, ImportError) as error:
        raise InputError(
            f"There is no module {name!r} of `evaluate` here, and the hub gave none: {' '.join(str(error).split())[:300]}"
        ) from None


def compute(name: str, config: str | None = None, **values: Any) -> dict[str, Any]:
    """What the metric module `name` says of `predictions`, `references` and whatever else it takes.

    A module that ships here is given the arrays as they are: `evaluate` would write them to an Arrow table first, which takes longer
    than the scores, and a bootstrap asks a thousand times.
    """
    module = load(name, config)
    return dict((module._compute(**values) if (HERE / f"{name}.py").is_file() else module.compute(**values)) or {})
