"""What a model that finds entities must beat: the names of the training rows, looked up in the held-out ones.

    python benchmarks/entity_baseline.py RUNS/prepared/FINGERPRINT

Prints the scores, of each held-out split, of finding nothing and of a dictionary: every run of words that is an entity more often
than not in the training rows, with its most frequent label; the longest match wins.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from orchestrator.data.place import MANIFEST
from orchestrator.records import PreparedData
from orchestrator.storage import Folder
from orchestrator.tasks import words


def rows(root: str, prepared: PreparedData, split: str) -> Iterator[dict[str, Any]]:
    for file in prepared.splits[split].files:
        for row in pq.read_table(f"{root}/{file.path}").to_pylist():
            yield {role: value for role, value in row.items() if value is not None}


def key(text: str, places: list[words.Place]) -> tuple[str, ...]:
    return tuple(text[start:end].casefold() for start, end in places)


def learn(task: Any, examples: list[dict[str, Any]]) -> dict[tuple[str, ...], str]:
    labels: dict[tuple[str, ...], Counter[str]] = {}
    for row in examples:
        places = words.split(row["text"])
        for span in task.entities(row):
            inside = [place for place in places if span["start"] <= place[0] < span["end"]]
            labels.setdefault(key(row["text"], inside), Counter())[span["label"]] += 1
    longest = max(map(len, labels), default=0)
    seen: Counter[tuple[str, ...]] = Counter()
    for row in examples:
        line = key(row["text"], words.split(row["text"]))
        seen.update(line[first:last] for first in range(len(line)) for last in range(first + 1, min(first + longest, len(line)) + 1))
    return {name: found.most_common(1)[0][0] for name, found in labels.items() if 2 * found.total() > seen[name]}


def look_up(task: Any, names: dict[tuple[str, ...], str], row: dict[str, Any]) -> dict[str, Any]:
    places, at, found = words.split(row["text"]), 0, []
    longest = max(map(len, names), default=0)
    while at < len(places):
        last = next((end for end in range(min(at + longest, len(places)), at, -1) if key(row["text"], places[at:end]) in names), None)
        if last is not None:
            found.append({"start": places[at][0], "end": places[last - 1][1], "label": names[key(row["text"], places[at:last])]})
        at = last or at + 1
    tags = task.gold({"text": row["text"], "spans": found}, places)
    return {
        "entities": found,
        "words": [{"label": tag, "start": start, "end": end} for tag, (start, end) in zip(tags, places, strict=True)],
    }


def main() -> None:
    root = sys.argv[1]
    prepared = PreparedData.parse((Folder(root) / MANIFEST).read_json())
    task: Any = prepared.task
    names = learn(task, list(rows(root, prepared, "train")))
    result = {}
    for split in ("validation", "test"):
        held_out = list(rows(root, prepared, split))
        nothing = [look_up(task, {}, row) for row in held_out]
        known = [look_up(task, names, row) for row in held_out]
        result[split] = {"nothing": task.score(nothing, held_out), "dictionary": task.score(known, held_out)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
