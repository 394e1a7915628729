"""The `Predictor` as a pool of Ray Data actors: how many, with what, and what is said when none can start."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator import bundle as bundles
from orchestrator.errors import StageError
from orchestrator.predictor import Predictor
from orchestrator.tasks.base import Prediction

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

ROWS_PER_ACTOR = 10_000
"""Loading a model takes as long as predicting some thousand rows, so fewer rows are not worth another actor."""
MOST_THREADS = 4


def load(bundle_uri: str, tokens: int, threads: int) -> Predictor:
    """The predictor inside an actor, which shares its machine: threads of torch and of the tokenizer are bounded."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    return Predictor(bundles.load(bundle_uri), threads=threads, tokens_per_batch=tokens)


def pool(arguments: dict[str, Any], *, rows: int | None, readers: bool) -> dict[str, Any]:
    """Arguments of `map_batches` for an actor class that takes `arguments` and `threads`, such that they fit the cluster.

    A GPU for each actor where there are GPUs, else threads of one machine. With `readers` one CPU stays free for the tasks
    that read, and where there is only one CPU the actor asks for none, so that it and they never wait for each other.
    """
    import ray
    from ray.data import ActorPoolStrategy

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    free = max(cpus, default=0) - readers
    if gpus:
        most, threads, asks = gpus, 1, {"num_gpus": 1, "num_cpus": 0}
    else:
        threads = max(1, min(MOST_THREADS, free))
        most = sum(count // threads for count in cpus) - readers
        asks = {"num_cpus": threads if free >= 1 else 0}
    wanted = most if rows is None else math.ceil(rows / ROWS_PER_ACTOR)
    size = max(1, min(most, wanted))
    return {"compute": ActorPoolStrategy(min_size=1, max_size=size), "fn_constructor_kwargs": {**arguments, "threads": threads}, **asks}


def tables(build: Callable[[], Dataset], timeout_s: float, **settings: Any) -> Iterator[pa.Table]:
    """The blocks of the data set that `build` makes, in order; `settings` are of Ray's `DataContext`.

    What goes wrong in an actor is raised here as it was raised there; `StageError` where none starts within `timeout_s`.
    """
    import ray
    from ray.data import DataContext
    from ray.exceptions import GetTimeoutError

    with warnings.catch_warnings():  # Copying touches settings that Ray itself deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = max(1, int(timeout_s))
    context.raise_original_map_exception = True
    for name, value in settings.items():
        setattr(context, name, value)
    with DataContext.current(context):
        blocks: Any = iter(build().iter_batches(batch_size=None, batch_format="pyarrow"))
    try:
        yield from (block for block in blocks if block.num_rows)
    except GetTimeoutError:
        free = ray.available_resources()
        raise StageError(
            f"No actor that predicts could start within {timeout_s:g} s: the cluster has {free.get('CPU', 0):g} CPUs and "
            f"{free.get('GPU', 0):g} GPUs free. Wait for what else runs there, or stop it."
        ) from None


def prediction_columns(predictions: Sequence[Prediction | None], *, vectors: bool = False) -> dict[str, list[Any]]:
    """The columns that predictions become: `prediction_<key>` for each text or number in them, and all of it as JSON.

    With `vectors` a list of numbers is a column too.
    """

    def fits(value: Any) -> bool:
        return not isinstance(value, (list, dict)) or (vectors and bool(value) and isinstance(value, list) and type(value[0]) is float)

    keys = dict.fromkeys(key for one in predictions if one for key, value in one.items() if fits(value))
    columns: dict[str, list[Any]] = {f"prediction_{key}": [one and one.get(key) for one in predictions] for key in keys}
    columns["prediction"] = [one and json.dumps(one, ensure_ascii=False) for one in predictions]
    return columns
