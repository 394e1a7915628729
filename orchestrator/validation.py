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
        self._media = {role for role, column in task.columns().items() if column.kind in ("image", "audio")}

    def __call__(self, model: Any) -> dict[str, float]:
        import torch.distributed as dist

        losses = predictor.Losses()
        answers: list[tuple[int, Row, Prediction]] = []
        most = self._task.most_predicted
        for chunk in self._rows:
            for infer in (True, False):
                some = [entry for entry in chunk if (most is None or entry[0] < most) == infer]
                found = iter(self._forward(model, [example for _, _, its in some for example in its], losses, infer))
                answers += [
                    (position, self._scored(row), self._task.decode(row, [next(found) for _ in its]))
                    for position, row, its in some
                    if infer
                ]
        part = (answers, losses.total, losses.items)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self._score([part])
        first = dist.get_rank() == 0
        parts: list[Any] | None = [None] * dist.get_world_size() if first else None
        dist.gather_object(part, parts, dst=0)
        answer: list[Any] = [self._score(parts) if parts else None]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def _scored(self, row: Row) -> Row:
        """What a score asks of a row: not the image or sound, whose bytes may be in it."""
        return {role: value for role, value in row.items() if role not in self._media}

    def _forward(self, model: Any, examples: Sequence[Example], losses: predictor.Losses, infer: bool) -> list[Any]:
        return predictor.forward(
            self._task, model, self._processor, examples, tokens=self._tokens, precision=self._precision, losses=losses, infer=infer
        )

    def _score(self, parts: Sequence[tuple[list[tuple[int, Row, Prediction]], float, float]]) -> dict[str, float]:
        answers = sorted((answer for part, _, _ in parts for answer in part), key=lambda answer: answer[0])
        rows, predictions = [row for _, row, _ in answers], [prediction for _, _, prediction in answers]
        loss = sum(total for _, total, _ in parts) / (sum(items for _, _, items in parts) or 1.0)
        metrics = {**self._task.score(predictions, rows), **self._task.of_loss(loss), "loss": loss}
        if missing := [name for name in self._wanted if name not in metrics]:
            metrics = {**self._task.score(predictions, rows, missing), **metrics}
        return metrics
