"""A knowledge graph out of predictions: every triple with the row that says it, or all of them merged as GraphML.

It knows no task: predictions that are triples have a list `triples` of `{head, relation, tail, score, …}`.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import sinks
from orchestrator.config import DataSection
from orchestrator.data import files
from orchestrator.data.readers import BadRow, records
from orchestrator.errors import InputError
from orchestrator.storage import Folder

GRAPHML = ".graphml"
ROWS_AT_ONCE = 10_000
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_PLACES = ("head_start", "head_end", "tail_start", "tail_end")


def write(source: str, target: str, *, min_score: float = 0.0, min_count: int = 1) -> dict[str, int]:
    """Reads what `orchestrator predict` wrote to `source` and writes the graph of it to `target`; counts what is in it.

    By the ending of `target`: Parquet, CSV or JSONL with a line for each triple of each row, whatever their number; or GraphML,
    in which equal names are one node and equal triples one edge, and for which the merged graph is held in memory. `min_score`
    leaves out triples with a lower score, `min_count` (GraphML) those that are said fewer times.
    """
    place = Folder(target)
    if not target.endswith((*sinks.ENDINGS, GRAPHML)):
        raise InputError(f"The output {target!r} must end in {', '.join(sinks.ENDINGS)} or {GRAPHML}.")
    if place.is_local and Path(place.path).is_dir():
        raise InputError(f"The output {target!r} is a folder; name a file.")
    if min_count > 1 and not target.endswith(GRAPHML):
        raise InputError(f"--min-count counts equal triples, which are merged in {GRAPHML} only; leave it out, or write {GRAPHML}.")
    found = (triple for triple in triples(source) if triple["score"] >= min_score)
    if target.endswith(GRAPHML):
        graph = Graph()
        for triple in found:
            graph.add(triple)
        place.write_bytes(graph.graphml(min_count))
        return graph.size(min_count)
    return {"triples": _write_lines(found, place)}


def triples(source: str) -> Iterator[dict[str, Any]]:
    """Every triple in the predictions of a file, glob or URI, with its `row_id`, one after the other."""
    section = DataSection(train=source)
    with files.called("PREDICTIONS"):
        found = files.find(section)["train"]
    for file in found:
        for number, row in records(file, section, ["row_id", "prediction"], ["prediction"]):
            if isinstance(row, BadRow):
                raise InputError(f"{file.name}, row {number}: expected {row.expected}, found {row.found}.")
            said = row.get("prediction")
            if said in (None, ""):
                continue
            try:
                prediction = json.loads(said) if isinstance(said, str) else said
                stated = prediction["triples"]
                each = [{key: triple[key] for key in ("head", "relation", "tail")} | {"score": float(triple["score"])} for triple in stated]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{file.name}, row {number}: the prediction has no triples (head, relation, tail, score); a graph is made of what "
                    "a model for relation-extraction or graph-completion predicts."
                ) from None
            for triple, whole in zip(each, stated, strict=True):
                yield {**whole, **triple, "row_id": row.get("row_id") or f"{file.name}:{number}"}


@dataclass
class _Node:
    spellings: Counter[str] = field(default_factory=Counter)
    types: Counter[str] = field(default_factory=Counter)


@dataclass
class _Edge:
    count: int = 0
    score: float = 0.0
    known: bool | None = None


class Graph:
    """Triples merged: names that are equal but for case, spaces and Unicode's ways to write a character are one node."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}
        self._edges: dict[tuple[str, str, str], _Edge] = {}

    def add(self, triple: dict[str, Any]) -> None:
        ends = []
        for end in ("head", "tail"):
            ends.append(merged_name(triple[end]))
            node = self._nodes.setdefault(ends[-1], _Node())
            node.spellings[triple[end]] += 1
            if kind := triple.get(f"{end}_type"):
                node.types[kind] += 1
        edge = self._edges.setdefault((ends[0], triple["relation"], ends[1]), _Edge())
        edge.count += 1
        edge.score = max(edge.score, triple["score"])
        edge.known = triple.get("known", edge.known)

    def size(self, min_count: int = 1) -> dict[str, int]:
        """`nodes` and `edges` of the graph that is written, and of how many `triples` they are merged."""
        edges = {key: edge for key, edge in self._edges.items() if edge.count >= min_count}
        nodes = {end for head, _, tail in edges for end in (head, tail)}
        return {"triples": sum(edge.count for edge in edges.values()), "nodes": len(nodes), "edges": len(edges)}

    def graphml(self, min_count: int = 1) -> bytes:
        """Nodes with `label` (the usual spelling), `type` (the usual one) and `count`; edges with `relation`, the highest `score` and `count`."""
        import networkx

        graph = networkx.MultiDiGraph()
        for (head, relation, tail), edge in self._edges.items():
            if edge.count < min_count:
                continue
            for name in (head, tail):
                if name not in graph:
                    node = self._nodes[name]
                    kind = {"type": _xml(node.types.most_common(1)[0][0])} if node.types else {}
                    label, count = node.spellings.most_common(1)[0][0], node.spellings.total()
                    graph.add_node(name, label=_xml(label), count=count, **kind)
            known = {} if edge.known is None else {"known": edge.known}
            graph.add_edge(head, tail, key=_xml(relation), relation=_xml(relation), score=edge.score, count=edge.count, **known)
        stream = io.BytesIO()
        networkx.write_graphml_xml(networkx.relabel_nodes(graph, {name: f"n{place}" for place, name in enumerate(graph)}), stream)
        return stream.getvalue()


def merged_name(name: str) -> str:
    """What equal names have in common."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _write_lines(found: Iterable[dict[str, Any]], target: Folder) -> int:
    import pyarrow as pa

    texts = [(name, pa.string()) for name in ("head", "relation", "tail")]
    more = [*((name, pa.int64()) for name in _PLACES), ("head_type", pa.string()), ("tail_type", pa.string()), ("known", pa.bool_())]
    schema = pa.schema([*texts, ("score", pa.float64()), ("row_id", pa.string()), *more])
    count, rest = 0, iter(found)
    with sinks.open_sink(target, schema) as sink:
        while some := list(itertools.islice(rest, ROWS_AT_ONCE)):
            sink.write(pa.Table.from_pylist(some, schema=schema))
            count += len(some)
    return count


def _xml(text: str) -> str:
    """Without the control characters that XML can't hold."""
    return _NO_XML.sub("", text)
