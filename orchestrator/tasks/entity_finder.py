"""Entities found by another model: the bundle of a token-classification job, kept inside the processor of the one that needs it.

It is asked as an endpoint would be: texts in, and out what `Task.answer` gives Hugging Face clients, a list of
`{start, end, entity_group, …}` for each text.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from orchestrator.errors import InputError
from orchestrator.storage import Folder
from orchestrator.tasks.base import Task

PLACE = "entities"
"""Folder of the finder within a saved processor."""
PARTS = ("model", "processor")
AT_ONCE = 16
"""Windows of text that go through the model together."""


def check(uri: str) -> Task:
    """The task of the bundle at `uri`; `InputError` where it is no bundle, or of a task that finds no mentions."""
    from orchestrator import tasks

    folder = Folder(uri)
    if not (folder / "task.json").exists() or not all((folder / part).exists() for part in PARTS):
        raise InputError(
            f"task.entities_from: {uri!r} is not the bundle of a token-classification job; it is the folder that `models show NAME` "
            "calls the bundle, or one that `models export NAME FOLDER` wrote."
        )
    task = tasks.create((folder / "task.json").read_json())
    schema = str(task.answer_schema())
    if not all(f"'{key}'" in schema for key in ("start", "end")):
        raise InputError(f"task.entities_from: {uri!r} is a model for {task.key}, which finds no entities; it must be one for NER.")
    return task


class TokenizerAndFinder:
    """A tokenizer, and the model that finds the entities of texts that come without. It pickles as the tokenizer and a place."""

    def __init__(self, tokenizer: Any, entities: str):
        self.tokenizer, self.entities = tokenizer, entities
        self._finder: EntityFinder | None = None
        self._lock = threading.Lock()

    @classmethod
    def load(cls, base: str, entities_from: str, **from_hub: Any) -> TokenizerAndFinder:
        """From a saved processor, which has its finder in it, or from a base model and the bundle that the job names."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base, **from_hub)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        inside = Path(base) / PLACE
        return cls(tokenizer, str(inside) if inside.is_dir() else entities_from)

    def save_pretrained(self, folder: str | Path) -> None:
        self.tokenizer.save_pretrained(folder)
        source, target = Folder(self.entities), Path(folder) / PLACE
        for part in PARTS:
            (target / part).mkdir(parents=True)
            pafs.copy_files(
                f"{source.path}/{part}",
                str(target / part),
                source_filesystem=source.filesystem,
                destination_filesystem=pafs.LocalFileSystem(),
            )
        (target / "task.json").write_bytes((source / "task.json").read_bytes())

    def find(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
        """The mentions of each text, as `{start, end, type}` in order; loads the model on first use."""
        with self._lock:
            if self._finder is None:
                self._finder = EntityFinder(self.entities)
            return self._finder(texts)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "entities": self.entities}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class EntityFinder:
    """The model of the bundle at `uri` (or of a part of it that was saved), ready to read texts; one call at a time."""

    def __init__(self, uri: str):
        import torch
        from transformers import AutoTokenizer

        self._task = check(uri)
        folder = Folder(uri).to_local()
        processor = str(folder / "processor")
        self._processor = self._task.processor(processor) or AutoTokenizer.from_pretrained(processor)
        model = self._task.model(str(folder / "model"), dtype=torch.float32, use_safetensors=True)
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
        rows = [self._task.rows_from(text)[0] for text in texts]
        encoded = self._task.encode(rows, self._processor)
        outputs = iter(self._outputs([example for examples in encoded for example in examples]))
        found = []
        for row, text, examples in zip(rows, texts, encoded, strict=True):
            prediction = self._task.decode(row, [next(outputs) for _ in examples])
            answer = self._task.answer([prediction], self._task.parameters(), single=True)
            found.append(_mentions(answer, text))
        return found

    def _outputs(self, examples: Sequence[dict[str, Any]]) -> list[Any]:
        import torch

        device = next(self._model.parameters()).device
        order = sorted(range(len(examples)), key=lambda place: self._task.length(examples[place]))
        outputs: list[Any] = [None] * len(examples)
        with torch.inference_mode():
            for low in range(0, len(order), AT_ONCE):
                places = order[low : low + AT_ONCE]
                batch = self._task.collate([examples[place] for place in places], self._processor)
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                for place, output in zip(places, self._task.infer(self._model, batch), strict=True):
                    outputs[place] = output
        return outputs


def _mentions(answer: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Each span once, without such as are empty."""
    kinds: dict[tuple[int, int], str] = {}
    for entity in answer:
        span = (int(entity["start"]), int(entity["end"]))
        if text[span[0] : span[1]].strip():
            kinds.setdefault(span, str(entity.get("entity_group") or entity.get("entity") or ""))
    return [{"start": start, "end": end, "type": kind} for (start, end), kind in sorted(kinds.items())]
