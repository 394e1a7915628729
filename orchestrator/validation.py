"""Validation while training: every worker predicts its part of the split, rank 0 scores the whole, all get the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator import predictor
from orchestrator.tasks.base import Example, Prediction, Row, Task


class Validation:
    """Called with the model on every worker at the same steps; gives each the same metrics, `loss` among them.

    `rows` are chunks of (position in the split, row, examples), this worker's part, the same at each call. The outputs
    come from `predictor.forward`, which evaluation and the endpoint run too. `wanted` are metrics beside the defaults.
    """

    def __init__(
        self,
        task: Task,
        processor: Any,
        rows: Iterable[Sequence[tuple[int, Row, list[Example]]]],
        *,
        precision: str,
        tokens: int = predictor.TOKENS_PER_BATCH,
        wanted: Sequence[str] = (),
    ):
        self._task, self._processor, self._rows = task, processor, rows
        self._precision, self._tokens, self._wanted = precision, tokens, wanted

    def __call__(self, model: Any) -> dict[str, float]:
        import torch.distributed as dist

        losses = _WithLoss(self._task)
        answers: list[tuple[int, Row, Prediction]] = []
        for chunk in self._rows:
            examples = [example for _, _, its in chunk for example in its]
            found = iter(predictor.forward(losses, model, self._processor, examples, tokens=self._tokens, precision=self._precision))  # pyright: ignore[reportArgumentType]
            answers += [(position, row, self._task.decode(row, [next(found) for _ in its])) for position, row, its in chunk]
        part = (answers, losses.total, losses.items)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self._score([part])
        first = dist.get_rank() == 0
        parts: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(part, parts, dst=0)
        answer: list[Any] = [self._score(parts) if parts else None]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def _score(self, parts: Sequence[tuple[list[tuple[int, Row, Prediction]], float, float]]) -> dict[str, float]:
        answers = sorted((answer for part, _, _ in parts for answer in part), key=lambda answer: answer[0])
        rows, predictions = [row for _, row, _ in answers], [prediction for _, _, prediction in answers]
        metrics = self._task.score(predictions, rows)
        if missing := [name for name in self._wanted if name not in metrics and name != "loss"]:
            metrics = {**metrics, **self._task.score(predictions, rows, missing)}
        return {**metrics, "loss": sum(total for _, total, _ in parts) / (sum(items for _, _, items in parts) or 1.0)}


class _WithLoss:
    """A task whose `infer` adds up the loss of the batch too, in one pass through the model."""

    def __init__(self, task: Task):
        self._task = task
        self.length, self.collate = task.length, task.collate
        self.total = self.items = 0.0

    def infer(self, model: Any, batch: dict[str, Any]) -> list[Any]:
        once = _Once(model)
        loss, items = self._task.loss(once, batch)  # pyright: ignore[reportArgumentType]
        self.total += float(loss)
        self.items += items
        return self._task.infer(once, batch)  # pyright: ignore[reportArgumentType]


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
