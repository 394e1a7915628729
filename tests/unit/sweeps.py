"""Made-up sweeps, for tests of what is made of their records."""

from __future__ import annotations

import math
import random
from typing import Any

from orchestrator.records import SearchRecord, TrainRecord, TrialRecord

LR, BATCH, LORA, SMOOTHING = "training.learning_rate", "training.global_batch_size", "model.lora", "training.label_smoothing_factor"
ALPHA = "model.lora.alpha"
SPACE: dict[str, Any] = {
    LR: {"loguniform": [1e-5, 1e-3]},
    BATCH: {"choice": [16, 32, 64]},
    LORA: {"choice": [None, {"r": 4}, {"r": 16}]},
    SMOOTHING: {"uniform": [0.0, 0.2]},
}
ROWS, REPORTS, EPOCHS = 2000, 9, 3.0


def trained(**fields: Any) -> TrainRecord:
    given: dict[str, Any] = {
        "bundle": "/runs/search/bundle", "metrics": {"f1": 0.9}, "best_step": 100, "steps": 180, "epochs": EPOCHS, "rows_seen": 6000,
        "global_batch_size": 32, "num_workers": 1, "precision": "fp32", "seconds": 60.0, "examples_per_second": 100.0,
        "data_wait_share": 0.0, "peak_memory_bytes": 10**9, "history": "/runs/search/history.jsonl",
    }  # fmt: skip
    return TrainRecord(**given | fields)


def sweep(number: int = 24, *, scheduler: str = "asha", objectives: Any = (("f1", True),), seed: int = 0, **fields: Any) -> SearchRecord:
    """A sweep of `number` trials, three at a time, whose best learning rate is 1e-4; trial 5 fails."""
    rng = random.Random(seed)
    trials: list[TrialRecord] = []
    free = [0.0, 0.0, 0.0]
    for place in range(number):
        sample = {LR: 5e-5, BATCH: 32, LORA: None, SMOOTHING: 0.0} if place == 0 else _sample(rng)
        started = min(free)
        trial = _trial(rng, place, sample, started, scheduler)
        free[free.index(started)] = started + trial.seconds + 0.3
        trials.append(trial)
    metric, higher = objectives[0]
    scored = [trial for trial in trials if trial.best]
    best = (max if higher else min)(scored, key=lambda trial: trial.best[metric]) if scored else trials[0]
    front = [trial.id for trial in scored if not any(all(_gain(other, trial, one) > 0 for one in objectives) for other in scored)]
    given: dict[str, Any] = {
        "search": {"space": SPACE, "metric": [name for name, _ in objectives], "num_trials": number, "algorithm": "tpe", "scheduler": scheduler},
        "objectives": tuple(objectives), "trials": tuple(trials), "best": best.id, "pareto": tuple(front) if len(objectives) > 1 else (),
        "sample": best.sample, "train": trained(), "seconds": max(free), "trials_run": number, "folder": "/runs/reviews/search-1a2b3c4d",
    }  # fmt: skip
    return SearchRecord(**given | fields)


def _gain(one: TrialRecord, other: TrialRecord, objective: tuple[str, bool]) -> float:
    metric, higher = objective
    assert one.best and other.best
    return (one.best[metric] - other.best[metric]) * (1 if higher else -1)


def _sample(rng: random.Random) -> dict[str, Any]:
    lora = rng.choice([None, {"r": 4}, {"r": 16}])
    return {LR: 10 ** rng.uniform(-5, -3), BATCH: rng.choice([16, 32, 64]), LORA: lora, SMOOTHING: rng.uniform(0, 0.2)}


def _trial(rng: random.Random, place: int, sample: dict[str, Any], started: float, scheduler: str) -> TrialRecord:
    reports: list[dict[str, Any]] = []
    status, error, rung, speed = "done", None, 0, rng.uniform(0.8, 1.2)
    for count in range(1, REPORTS + 1):
        score = 0.93 - 0.12 * abs(math.log10(sample[LR]) + 4) - 0.15 / count - sample[SMOOTHING] / 4 + rng.uniform(-0.01, 0.01)
        reports.append(
            {"f1": score, "loss": 1.2 - score - (sample[BATCH] == 16) * 0.1, "epoch": EPOCHS * count / REPORTS, "step": 20 * count}
            | {"examples": round(EPOCHS * ROWS * count / REPORTS), "seconds": 6.5 * count * speed + 0.4, "train_loss": 0.5 / count}
        )  # fmt: skip
        if place == 5 and count == 2:
            status, error = "failed", "the loss is not a number at step 45; lower training.learning_rate or set training.precision: fp32"
            break
        if scheduler == "asha" and count in (1, 3) and score < 0.62 + 0.055 * count and place:
            status = "stopped"
            break
        rung += count in (1, 3, 9)
    best = max(reports, key=lambda report: report["f1"])
    folder = f"/runs/reviews/search-1a2b3c4d/trials/{place:012x}"
    return TrialRecord(
        id=f"t{place}", number=place, origin="default" if place == 0 else "search", sample=sample, status=status, reports=tuple(reports),
        best=best, rung=rung, started=started, seconds=reports[-1]["seconds"], examples=reports[-1]["examples"], error=error, folder=folder,
        log=f"{folder}/failure.log" if error else None, warm=place > 2, first_step_seconds=0.06 if place > 2 else 3.4, restarts=int(place == 7),
    )  # fmt: skip


def schedule(record: SearchRecord, at: int = 2000) -> list[dict[str, Any]]:
    """How each trial began, and the worst half taking over the best one's weights after `at` rows."""
    starts = [{"trial": trial.id, "parent": None, "examples": 0, "sample": trial.sample} for trial in record.trials]
    order = sorted((trial for trial in record.trials if trial.best), key=lambda trial: trial.best["f1"] if trial.best else 0.0)
    moved = {**order[-1].sample, LR: order[-1].sample[LR] * 0.8}
    exploits = [{"trial": trial.id, "parent": order[-1].id, "examples": at, "sample": moved} for trial in order[: len(order) // 2]]
    return [*starts, *exploits, {"best": record.best}]
