"""The UMLS semantic network as a knowledge graph: triples, pairs of names, and sentences made from it."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.examples.base import Example

Triple = tuple[str, str, str]
SENTENCES = {"train": 1500, "validation": 200, "test": 300}
_FILES = {"train": "train", "validation": "valid", "test": "test"}

# A head {h}, a tail {t} and what is said of them {v}; {x} is one that is only named beside them.
TEMPLATES = (
    "{h} {v} {t}",
    "it is known that {h} {v} {t}",
    "{t} is what {h} {v}",
    "what {h} {v} is {t}",
    "{h}, unlike {x}, {v} {t}",
    "apart from {x}, {t} is what {h} {v}",
)
UNSEEN = ("it is {h} that {v} {t}", "as for {t}, {h} {v} it, not {x}")
"""Only in the test sentences."""
JOINTS = (", while ", "; ", ", and ", ", but ")
_VERBS = ("associated_with", "adjacent_to", "connected_to", "conceptually_related_to")
_PLAIN = ("consists_of", "assesses_effect_of")


def unpack(archive: Path, folder: Path) -> None:
    """`<split>.tsv` as they are (head, relation, tail, no header), `pairs.jsonl` and `sentences-<split>.jsonl`."""
    triples: dict[str, list[Triple]] = {}
    with zipfile.ZipFile(archive) as wheel:
        for split, name in _FILES.items():
            content = wheel.read(f"pykeen/datasets/umls/{name}.txt")
            (folder / f"{split}.tsv").write_bytes(content)
            triples[split] = [tuple(line.split("\t")) for line in content.decode("utf-8").splitlines()]  # type: ignore[misc]
    _write(folder / "pairs.jsonl", pairs([triple for some in triples.values() for triple in some]))
    for split, some in triples.items():
        templates = (*TEMPLATES, *UNSEEN) if split == "test" else TEMPLATES
        _write(folder / f"sentences-{split}.jsonl", sentences(some, SENTENCES[split], templates, seed=split))


def pairs(triples: Sequence[Triple]) -> Iterator[dict[str, object]]:
    """Each pair of names once, with all relations from the first to the second."""
    found: dict[tuple[str, str], set[str]] = {}
    for head, relation, tail in triples:
        found.setdefault((_name(head), _name(tail)), set()).add(relation)
    for (head, tail), relations in sorted(found.items()):
        yield {"head": head, "tail": tail, "relations": sorted(relations)}


def sentences(triples: Sequence[Triple], count: int, templates: Sequence[str], *, seed: str) -> Iterator[dict[str, object]]:
    """Sentences that say one or two of the triples, with all entities in them; what no sentence says is no relation of it.

    They are synthetic: a template decides who is head and who is tail, and other entities stand between them, so that neither
    order nor nearness gives the relation away. The words of the relation itself do.
    """
    draw = random.Random(f"umls sentences {seed}")
    everything = sorted({end for head, _, tail in triples for end in (head, tail)})
    for _ in range(count):
        text, entities, relations = "", [], []
        used: set[str] = set()
        for clause in range(draw.choice((1, 1, 2))):
            fits = [triple for triple in triples if not used & {triple[0], triple[2]} and triple[0] != triple[2]]
            if not fits:
                break
            asked = draw.choice(sorted({relation for _, relation, _ in fits}))  # each as often, so that none is missing
            head, relation, tail = draw.choice([triple for triple in fits if triple[1] == asked])
            other = draw.choice([name for name in everything if name not in {*used, head, tail}] or [head])
            used |= {head, tail, other}
            text += draw.choice(JOINTS) if clause else ""
            ends = {}
            for part in _parts(draw.choice(templates), head, relation, tail, other):
                if isinstance(part, tuple):
                    role, name = part
                    ends[role] = len(entities)
                    entities.append({"start": len(text), "end": len(text) + len(name), "text": name})
                    text += name
                else:
                    text += part
            relations.append({"head": ends["h"], "tail": ends["t"], "type": relation})
        yield {"text": f"{text}.", "entities": entities, "relations": relations}


def _parts(template: str, head: str, relation: str, tail: str, other: str) -> Iterator[str | tuple[str, str]]:
    """A template's text, and (role, name) where an entity stands."""
    names = {"h": _name(head), "t": _name(tail), "x": _name(other)}
    for piece in template.replace("{v}", phrase(relation)).split("{"):
        role, closed, rest = piece.partition("}")
        if not closed:
            yield piece
            continue
        yield role, names[role]
        yield rest


def phrase(relation: str) -> str:
    """A relation's name as a verb: `result_of` is "is a result of"."""
    words = _name(relation)
    if relation == "isa":
        return "is a kind of"
    if relation == "issue_in" or (relation.endswith("_of") and relation not in _PLAIN):
        return f"is {'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"is {words}" if relation in _VERBS else words


def _name(name: str) -> str:
    return name.replace("_", " ")


def _write(path: Path, rows: Iterator[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


EXAMPLES: dict[str, Example] = {
    "umls": Example(
        package="pykeen",
        version="1.11.1",
        archive="pykeen-1.11.1-py3-none-any.whl",
        sha256="b6cc0ab012fc6ba4f37b58fb7081a409a5c1f04cbbb0e0e9c2256e911757d4ba",
        unpack=unpack,
        main=None,
        licence="MIT (package); UMLS semantic network: McCray 2003, as a graph: Kok & Domingos 2007",
        about="6,529 triples between 135 kinds of medical entity by 46 relations; also as pairs of names and as synthetic sentences",
    ),
}
