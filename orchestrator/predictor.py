"""Predictor: rows in, predictions out. Evaluation, batch prediction and the endpoint all run this one."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator import batching, models, processors
from orchestrator.bundle import Bundle
from orchestrator.errors import InputError, StageError
from orchestrator.tasks.base import Example, Prediction, Row, Task

TOKENS_PER_BATCH = 4096
Setting = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass
class Losses:
    """The sum of the losses of examples, and of how many items."""

    total: float = 0.0
    items: float = 0.0


def forward(
    task: Task,
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    *,
    tokens: int,
    precision: str,
    losses: Losses | None = None,
    infer: bool = True,
) -> list[Any]:
    """The task's output for each example, in their order (None where not `infer`); adds their losses to `losses`.

    Micro-batches of similar length hold at most `tokens` padded tokens; neither they nor the padding change an
    output by more than floating-point noise. `precision` is fp32, bf16 or fp16 (autocast); the model's mode is left as it was.
    """
    import torch

    outputs: list[Any] = [None] * len(examples)
    device = next(model.parameters()).device
    autocast = contextlib.nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=_dtype(precision))
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast:
            for places in batching.micro_batches([task.length(example) for example in examples], tokens):
                batch = task.collate([examples[place] for place in places], processor)
                batch = {key: value.to(device) for key, value in batch.items()}
                once: Any = model if losses is None else _Once(model)
                if losses is not None:
                    loss, items = task.loss(once, batch)
                    losses.total += float(loss)
                    losses.items += items
                if infer:
                    for place, output in zip(places, task.spell(task.infer(once, batch), processor), strict=True):
                        outputs[place] = output
    finally:
        model.train(was_training)
    return outputs


class _Once:
    """A model that remembers its last answer: asked again about the same tensors, it does not compute."""

    def __init__(self, model: Any):
        self._model, self._inputs, self._output = model, None, None

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        given = (*args, *(item for pair in sorted(inputs.items()) for item in pair))
        if (
            self._inputs is None
            or len(given) != len(self._inputs)
            or any(one is not other for one, other in zip(given, self._inputs, strict=True))
        ):
            self._inputs, self._output = given, self._model(*args, **inputs)
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Predictor:
    """The model of a bundle, ready to answer.

    `encode` and `decode` may run in several threads at once, also while `infer` runs; `infer` runs one call at a time.
    `threads` sets torch's threads for the whole process (None: left as they are). The model goes to the GPU where there is one.
    """

    def __init__(
        self, bundle: Bundle, *, precision: Setting = "auto", threads: int | None = None, tokens_per_batch: int = TOKENS_PER_BATCH
    ):
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        trust = bool(bundle.job.get("model", {}).get("trust_remote_code", False))
        self.bundle, self.task, self.tokens_per_batch = bundle, bundle.task, tokens_per_batch
        self.precision = models.hardware_precision(precision)
        self.processor = processors.of(self.task, str(bundle.processor), trust_remote_code=trust)
        options = {"trust_remote_code": True} if trust else {}
        with models.quiet():
            model = self.task.model(str(bundle.model), dtype=torch.float32, **options).eval()
        if self.precision != "fp32":
            _cast_layers(model, _dtype(self.precision))
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._one_inference = threading.Lock()
        self._first_encoding = threading.Lock()
        self._encoded_once = False

    def __call__(self, rows: Sequence[Row]) -> list[Prediction]:
        """The predictions for clean rows, in their order."""
        encoded = self.encode(rows)
        outputs = iter(self.infer([example for examples in encoded for example in examples]))
        return [self.decode(row, [next(outputs) for _ in examples]) for row, examples in zip(rows, encoded, strict=True)]

    def score(self, rows: Sequence[Row], losses: Losses, *, predict: bool = True) -> list[Prediction | None]:
        """As calling it, for rows with their targets, whose losses are added to `losses`; without `predict` only that."""
        encoded = self.task.encode(rows, self.processor)
        examples = [example for its in encoded for example in its]
        with self._one_inference:
            found = iter(
                forward(
                    self.task,
                    self.model,
                    self.processor,
                    examples,
                    tokens=self.tokens_per_batch,
                    precision=self.precision,
                    losses=losses,
                    infer=predict,
                )
            )
        outputs = [[next(found) for _ in its] for its in encoded]
        return [self.decode(row, its) if predict else None for row, its in zip(rows, outputs, strict=True)]

    def encode(self, rows: Sequence[Row]) -> list[list[Example]]:
        """The examples of each clean row; targets in the rows are left out."""
        columns = self.task.columns()
        inputs = [{role: value for role, value in row.items() if role not in columns or not columns[role].target} for row in rows]
        if not inputs:
            return []
        if self._encoded_once:
            return self.task.encode(inputs, self.processor)
        # A fast tokenizer takes its settings from the first call; other threads must not be inside it then ("Already borrowed").
        with self._first_encoding:
            encoded = self.task.encode(inputs, self.processor)
            self._encoded_once = True
            return encoded

    def infer(self, examples: Sequence[Example]) -> list[Any]:
        """The model's output for each example, in their order."""
        with self._one_inference:
            return forward(self.task, self.model, self.processor, examples, tokens=self.tokens_per_batch, precision=self.precision)

    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        return self.task.decode(row, outputs)


def check_golden(predictor: Predictor, tolerance: float = 0.02) -> float:
    """The largest difference between what the predictor says of the bundle's golden rows and what it should.

    Raises `StageError` where a prediction does not agree within `tolerance`, `InputError` where the bundle has no golden rows.
    """
    bundle = predictor.bundle
    if not bundle.golden:
        raise InputError(f"The bundle {str(bundle.path)!r} has no golden rows to check against; evaluate the model first.")
    largest = 0.0
    predictions = predictor([entry["row"] for entry in bundle.golden])
    for entry, found in zip(bundle.golden, predictions, strict=True):
        expected = entry["prediction"]
        difference = predictor.task.difference(expected, found)
        if not predictor.task.agree(expected, found, tolerance):
            raise StageError(
                f"The bundle {bundle.name!r} does not predict what it did when it was evaluated: for the row {_short(entry['row'])} "
                f"{_short(found)} instead of {_short(expected)} (difference {difference:.3g}, allowed {tolerance:g})."
            )
        largest = max(largest, difference)
    return largest


def _dtype(precision: str) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _cast_layers(model: Any, dtype: Any) -> None:
    """Casts once what autocast would cast again in every forward pass: the weights of matrix products, with the same results.

    A weight that is also an embedding gets a copy: what is looked up in it stays fp32, as it was in training.
    """
    import torch

    layers = list(model.modules())
    looked_up = {id(layer.weight) for layer in layers if isinstance(layer, torch.nn.Embedding)}
    for layer in layers:
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)):
            if id(layer.weight) in looked_up:
                layer.weight = torch.nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
            layer.to(dtype)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
