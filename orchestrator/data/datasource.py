"""Ray Data over plain functions: each yields Arrow tables and runs as one read task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.context import DataContext
from ray.data.datasource import Datasource, ReadTask

Work = Callable[[], Iterable[pa.Table]]


class _Tasks(Datasource):
    def __init__(self, name: str, work: Sequence[Work], here: bool) -> None:
        super().__init__()
        self._name, self._work, self._here = name, list(work), here

    def get_name(self) -> str:
        return self._name

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    @property
    def supports_distributed_reads(self) -> bool:
        return not self._here

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(work, unknown, per_task_row_limit=per_task_row_limit) for work in self._work]


def read_tasks(name: str, work: Sequence[Work], *, here: bool) -> ray.data.Dataset:
    """A data set of the tables that `work` yields.

    `here`: the functions read or write this machine's disk, so on a cluster of several nodes they run on this one.
    Where this node gives Ray no CPUs they run anywhere: the path may be a disk that all nodes share.
    """
    return ray.data.read_datasource(_Tasks(name, work, here and _must_stay()), override_num_blocks=max(1, len(work)))


def _must_stay() -> bool:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    mine = ray.get_runtime_context().get_node_id()
    return len(nodes) > 1 and any(node["NodeID"] == mine and node["Resources"].get("CPU", 0) >= 1 for node in nodes)


def stream(name: str, work: Sequence[Work], *, here: bool) -> Generator[dict[str, Any], None, None]:
    """Runs `work` and yields the rows of its tables one by one as soon as they are there."""
    with warnings.catch_warnings():  # Copying touches settings that Ray itself deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    # Each row is a report of its own; blocks are not to be held back until they are large.
    context.target_max_block_size = 1
    with DataContext.current(context):
        tables = iter(read_tasks(name, work, here=here).iter_batches(batch_size=None, batch_format="pyarrow"))
    for table in tables:
        yield from pa.table(table).to_pylist()
