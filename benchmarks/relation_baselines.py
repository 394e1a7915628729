"""What one scores without a model: baselines of the recipes for relations and graphs, on the test rows.

    python benchmarks/relation_baselines.py RUNS/prepared/FINGERPRINT

Relations: always the most frequent one, and the most frequent one of each head. Graphs: every entity alike, and entities by
how often they stand at that end of the relation in the training rows.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from orchestrator.data.place import MANIFEST
from orchestrator.records import PreparedData
from orchestrator.storage import Folder
from orchestrator.tasks.base import Row, Task


def rows(root: str, prepared: PreparedData, split: str) -> list[Row]:
    found = [row for file in prepared.splits[split].files for row in pq.read_table(f"{root}/{file.path}").to_pylist()]
    return [{role: value for role, value in row.items() if value is not None and role not in ("row_id", "_row")} for row in found]


def relations(task: Any, train: list[Row], test: list[Row]) -> dict[str, dict[str, float]]:
    def heads(row: Row) -> list[str]:
        if task.between == "names":
            return [row["head"]]
        mentions = row["entities"]
        return [row["text"][mentions[head]["start"] : mentions[head]["end"]] for head, _ in task._pairs(row)]

    each: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for head, names in zip(heads(row), task._right(row), strict=True):
            each[head].update(names)
    every = sum(each.values(), Counter())
    usual = every.most_common(1)[0][0]

    def said(choose: Callable[[str], str]) -> dict[str, float]:
        predictions = [{"pairs": [{"relations": [choose(head)]} for head in heads(row)]} for row in test]
        return task.score(predictions, test)

    return {
        f"always {usual!r}": said(lambda head: usual),
        "most frequent of the head": said(lambda head: (each[head] or every).most_common(1)[0][0]),
    }


def graph(task: Any, train: list[Row], test: list[Row]) -> dict[str, dict[str, float]]:
    counts = np.zeros((2, len(task.relations), len(task.entities)), dtype=np.float32)
    for row in train:
        relation = task.relations.index(row["relation"])
        for side, end in enumerate(("tail", "head")):
            counts[side, relation, task.entities.index(row[end])] += 1

    def said(scores: Callable[[Row], Any]) -> dict[str, float]:
        return task.score([task.decode(row, [scores(row)]) for row in test], test)

    return {
        "every entity alike": said(lambda row: np.zeros((2, len(task.entities)), dtype=np.float32)),
        "by frequency with the relation": said(lambda row: counts[:, task.relations.index(row["relation"])]),
    }


def main(root: str) -> None:
    prepared = PreparedData.parse((Folder(root) / MANIFEST).read_json())
    task: Task = prepared.task
    found = (graph if hasattr(task, "known") else relations)(task, rows(root, prepared, "train"), rows(root, prepared, "test"))
    for name, scores in found.items():
        print(f"{name}: {', '.join(f'{metric} {value:.4f}' for metric, value in scores.items())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
