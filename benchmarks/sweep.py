"""Sweeps beside what else there is: all sides in one run, on the same space, rows, trials and seeds.

    .venv/bin/python benchmarks/sweep.py                          # everything, three seeds
    .venv/bin/python benchmarks/sweep.py --only search --seeds 1  # one part
    .venv/bin/python benchmarks/sweep.py --only start --trials 4 --rows 200 --epochs 1

Parts: `search` how long until the best score of a full random search is reached (tpe with asha, beside random without a
scheduler, both by this product); `trainer` the same trials by transformers.Trainer.hyperparameter_search with Optuna and
with Ray; `start` from a trial's start to the end of its first optimizer step, of the second trial in a process;
`leftovers` what many trials leave behind on a Ray cluster that goes on living.

Each side runs in processes of its own, in turn. Model: MiniLM (22.7M) on example://reviews.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train import split

HERE = Path(__file__).resolve()
PARTS = ("search", "trainer", "start", "leftovers")
LOW, HIGH, BATCHES, SMOOTHING = 1e-5, 1e-3, [16, 32, 64], 0.2
SPACE = {
    "training.learning_rate": {"loguniform": [LOW, HIGH]},
    "training.global_batch_size": {"choice": BATCHES},
    "training.label_smoothing_factor": {"uniform": [0.0, SMOOTHING]},
}
METRIC = "accuracy"
SMALL = 8
"""Rows of a step where the way to the first one is measured."""
CORES = os.cpu_count() or 1
CACHE: dict[str, Any] = {}
"""What a hand-written trial keeps in its process for the next."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rows", type=int, default=None, help="training rows; all by default")
    parser.add_argument("--validation-rows", type=int, default=None, help="all by default")
    parser.add_argument("--match", default="", help="of the part `start` only the sides that have this in their name")
    parser.add_argument("--many", type=int, default=200, help="trials of the part `leftovers`")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](**json.loads(arguments.options))))
        return
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        data = cut(split(Path(folder), 1), train=arguments.rows, validation=arguments.validation_rows)
        found: dict[str, list[dict[str, Any]]] = {}
        if "search" in arguments.only:
            search(arguments, Path(folder), data, found)
        if "trainer" in arguments.only:
            trainers(arguments, data, found)
        if found:
            show(found)
        if "start" in arguments.only:
            starts(arguments, Path(folder), data)
        if "leftovers" in arguments.only:
            leftovers(arguments, Path(folder), data)


def cut(data: dict[str, str], **rows: int | None) -> dict[str, str]:
    """The data with the first so many rows of a split."""
    for name, most in rows.items():
        if most is not None:
            with Path(data[name]).open(newline="", encoding="utf-8") as file:
                lines = list(csv.reader(file))[: most + 1]
            with Path(data[name]).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(lines)
    return data


# ---- the best score, and when it was reached -----------------------------------------------------------------
def search(arguments: argparse.Namespace, folder: Path, data: dict[str, str], found: dict[str, list[dict[str, Any]]]) -> None:
    # A search that stops nobody has no use for validations within an epoch, which cost it time.
    sides = {
        "random, no scheduler": {"algorithm": "random", "scheduler": "none", "report_every": 1},
        "tpe with asha": {"algorithm": "tpe", "scheduler": "asha"},
    }
    for seed in arguments.seeds:
        for name, kind in sides.items():
            asked = {"num_trials": arguments.trials, **kind, "seed": seed, "include_default": False}
            run = tune(
                folder, data, f"{kind['algorithm']}-{kind['scheduler']}-{seed}", asked, {"num_train_epochs": arguments.epochs, "seed": seed}
            )
            keep(found, f"orchestrator, {name}", seed, run)


def trainers(arguments: argparse.Namespace, data: dict[str, str], found: dict[str, list[dict[str, Any]]]) -> None:
    for seed in arguments.seeds:
        for backend in ("optuna", "ray"):
            run = run_side("trainer", data=data, backend=backend, trials=arguments.trials, epochs=arguments.epochs, seed=seed)
            keep(found, f"Trainer.hyperparameter_search, {backend}", seed, run)


def keep(found: dict[str, list[dict[str, Any]]], name: str, seed: int, run: dict[str, Any]) -> None:
    found.setdefault(name, []).append(run)
    shown = run.get("error") or f"best {max(value for _, value in run['moments']):.4f} in {run['seconds']:.0f} s, {run['trials']} trials"
    print(f"seed {seed}: {name}: {shown}", flush=True)


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """When each side reached the best score of the full random search of the same seed, less its noise.

    The noise is the standard deviation of that best score over the seeds.
    """
    full = [run for run in found.get("orchestrator, random, no scheduler", []) if "error" not in run]
    targets = [max(value for _, value in run["moments"]) for run in full]
    noise = statistics.stdev(targets) if len(targets) > 1 else 0.0
    print(f"\nNoise of the full random search's best {METRIC}: {noise:.4f} over {len(targets)} seeds; target: its best less that.\n")
    print(
        "| side | best (mean) | sweep, s (median) | to the target, s (median) | of random's wall time | seeds that reached it |\n|---|---|---|---|---|---|"
    )
    for name, runs in found.items():
        ran = [run for run in runs if "error" not in run]
        if not ran:
            print(f"| {name} | does not run: {runs[0]['error']} | | | | |")
            continue
        best = statistics.mean(max(value for _, value in run["moments"]) for run in ran)
        row = [f"{best:.4f}", f"{statistics.median(run['seconds'] for run in ran):.0f}"]
        pairs = [(reached(run["moments"], target - noise), base["seconds"]) for run, target, base in zip(ran, targets, full, strict=False)]
        hits = [(seconds, whole) for seconds, whole in pairs if seconds is not None]
        if hits:
            row += [
                f"{statistics.median(seconds for seconds, _ in hits):.0f}",
                f"{statistics.median(seconds / whole for seconds, whole in hits):.2f}",
            ]
        else:
            row += ["", ""]
        print(f"| {name} | {' | '.join(row)} | {len(hits)} of {len(pairs)} |")


def reached(moments: Sequence[Sequence[float]], target: float) -> float | None:
    """Seconds until a score was at least `target`."""
    return min((seconds for seconds, value in moments if value >= target - 1e-9), default=None)


# ---- start to first step -------------------------------------------------------------------------------------
def starts(arguments: argparse.Namespace, folder: Path, data: dict[str, str]) -> None:
    short = {"max_steps": 4, "save_steps": 4, "global_batch_size": SMALL}
    space = {"training.learning_rate": SPACE["training.learning_rate"]}
    asked = {
        "space": space,
        "num_trials": 6,
        "algorithm": "random",
        "scheduler": "none",
        "include_default": False,
        "max_concurrent_trials": 1,
    }
    trainer = {"data": data, "trials": 4, "epochs": 0.1, "seed": 1, "batches": [SMALL]}
    sides = {
        "orchestrator, trial of one worker": lambda: tune(folder, data, "start-1", asked, short),
        "bare Tune, model and rows kept by hand": lambda: run_side("bare", data=data, kept=True),
        "bare Tune, loading in each trial": lambda: run_side("bare", data=data, kept=False),
        "Ray Train in a Tune trial, one worker": lambda: run_side("nested", data=data),
        "Trainer.hyperparameter_search, optuna": lambda: run_side("trainer", backend="optuna", **trainer),
        "Trainer.hyperparameter_search, ray": lambda: run_side("trainer", backend="ray", **trainer),
    }
    print(
        f"\nSeconds from a trial's start to the beginning of its first step, and of that step ({SMALL} rows); medians but for the first trial.\n"
    )
    print(
        "| side | first trial | second in a process | the step | from a trial's end to the next one's first step |\n|---|---|---|---|---|"
    )
    for name, side in sides.items():
        if arguments.match not in name:
            continue
        run = side()
        if "error" in run:
            print(f"| {name} | does not run: {run['error']} | | | |", flush=True)
            continue
        spans = [span for span in run["spans"] if span["first"] is not None]
        cold = [span["first"] - span["step"] - span["began"] for span in spans if not span["warm"]]
        warm = [span["first"] - span["step"] - span["began"] for span in spans if span["warm"]]
        between = gaps(spans)
        row = [f"{cold[0]:.2f}", f"{statistics.median(warm):.3f}" if warm else "none: a process each"]
        row += [f"{statistics.median(span['step'] for span in spans):.3f}", f"{statistics.median(between):.3f}" if between else ""]
        print(f"| {name} | {' | '.join(row)} |", flush=True)


def gaps(spans: Sequence[dict[str, Any]]) -> list[float]:
    """From the end of a trial to the beginning of the first step of the one that took its place."""
    ends = sorted(span["ended"] for span in spans)
    found = []
    for span in sorted(spans, key=lambda span: span["first"]):
        before = [end for end in ends if end <= span["began"] + 1e-3]
        if before:
            ends.remove(before[-1])
            found.append(span["first"] - span["step"] - before[-1])
    return found


# ---- what is left behind -------------------------------------------------------------------------------------
def leftovers(arguments: argparse.Namespace, folder: Path, data: dict[str, str]) -> None:
    """Many short trials on a cluster that lives on: its placement groups, processes and the disk they took."""
    limit = 300_000_000  # two bundles of 90 MB, and with adapters a checkpoint is some MB: those of all trials would be over it
    asked = {"num_trials": arguments.many, "algorithm": "random", "scheduler": "asha", "max_disk": limit}
    small = cut({**data, "train": copied(data["train"]), "validation": copied(data["validation"])}, train=64, validation=16)
    with head(folder) as (address, process):
        before = workers_of(process)
        with watched(folder / "runs") as disk:
            run = tune(folder, small, "many", asked, {"num_train_epochs": 1}, "--address", address, "--set", "model.lora={r: 4}")
        time.sleep(10)  # Ray lets a process that has nothing to do live for a moment
        left = run_side("look", address=address)
        after = [name for name in workers_of(process) if name not in before and not name.startswith("ray::IDLE")]
    print(
        f"\n{run['trials']} trials in {run['seconds']:.0f} s leave {left['groups']} placement groups, {left['actors']} actors and {len(after)} busy"
    )
    print(
        f"processes{': ' + ', '.join(after) if after else ''}. Most disk meanwhile {disk['most'] / 1e6:.0f} MB, at the end {disk['last'] / 1e6:.0f} MB; max_disk is {limit / 1e6:.0f} MB."
    )


def copied(path: str) -> str:
    place = Path(path).with_name(f"few-{Path(path).name}")
    place.write_bytes(Path(path).read_bytes())
    return str(place)


@contextlib.contextmanager
def head(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A Ray cluster of one node, in a process tree of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", f"--num-cpus={CORES}"]
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as place, (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={place}"],
            stdout=log, stderr=log, env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while "Ray runtime started" not in (folder / "head.log").read_text(errors="replace"):
                if time.monotonic() > deadline or process.poll() is not None:
                    sys.exit(f"Ray did not start within 60 s:\n{(folder / 'head.log').read_text(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield f"127.0.0.1:{port}", process
        finally:
            process.terminate()
            process.wait(60)


def workers_of(process: subprocess.Popen[bytes]) -> list[str]:
    import psutil

    names = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            names.append(" ".join(" ".join(child.cmdline()).split())[:60])  # Ray pads the names of its processes with spaces
    return [name for name in names if name.startswith("ray::")]


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[dict[str, float]]:
    """The bytes in `folder`, the most and the last."""
    seen, stop = {"most": 0.0, "last": 0.0}, threading.Event()

    def look() -> None:
        while True:
            total = 0
            for root, _, files in os.walk(folder):
                for name in files:
                    with contextlib.suppress(OSError):
                        total += os.lstat(f"{root}/{name}").st_size
            seen.update(most=max(seen["most"], total), last=total)
            if stop.wait(0.5):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def look_side(address: str, scratch: str) -> dict[str, int]:
    """What the cluster at `address` still holds."""
    import ray
    from ray.util import placement_group_table

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address, log_to_driver=False)
    groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    actors = [actor for actor in ray._private.state.actors().values() if actor["State"] in ("ALIVE", "RESTARTING", "PENDING_CREATION")]
    return {"groups": len(groups), "actors": len(actors)}


# ---- sides ---------------------------------------------------------------------------------------------------
def tune(folder: Path, data: dict[str, str], name: str, asked: dict[str, Any], training: dict[str, Any], *options: str) -> dict[str, Any]:
    """`orchestrator tune`: the seconds of the sweep, its validations (seconds, score) and when its trials began, stepped and ended."""
    job = {
        "task": "text-classification",
        "model": {"base": "example://minilm"},
        "data": {**data, "columns": {"text": "review"}},
        "training": training,
        "search": {"space": SPACE, "metric": METRIC, **asked},
        "storage": str(folder / "runs"),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "orchestrator.cli", "tune", str(path), "--json", *options]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled"} if options else None
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200, env=env)
    if done.returncode:
        sys.exit(f"orchestrator tune failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    record = json.loads((Path(result["run_dir"]) / "records" / "search.json").read_text())["record"]
    trials = record["trials"]
    return {
        "seconds": record["seconds"],
        "trials": len(trials),
        "moments": [(trial["started"] + report["seconds"], report[METRIC]) for trial in trials for report in trial["reports"]],
        "spans": [
            {
                "began": trial["started"],
                "first": trial["started"] + trial["first_step_seconds"] if trial["first_step_seconds"] is not None else None,
                "step": first_step(trial["folder"]),
                "ended": trial["started"] + trial["seconds"],
                "warm": trial["warm"],
            }
            for trial in trials
        ],
    }


def first_step(trial: str) -> float:
    """Seconds of a trial's first optimizer step, from its history; 0 where that is gone."""
    place = Path(trial.removeprefix("file://")) / "history.jsonl"
    return json.loads(place.read_text().splitlines()[0])["seconds"] if place.exists() else 0.0


def run_side(name: str, **options: Any) -> dict[str, Any]:
    """What the side says, or the last line of what it failed with."""
    with tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True) as scratch:
        command = [sys.executable, str(HERE), "--side", name, "--options", json.dumps({**options, "scratch": scratch})]
        done = subprocess.run(command, capture_output=True, text=True, timeout=7200, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return {"error": (errors or done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def trainer_side(
    data: dict[str, str], *, backend: str, trials: int, epochs: float, seed: int, scratch: str, batches: Sequence[int] = BATCHES
) -> dict[str, Any]:
    """transformers.Trainer with its best settings; Optuna one trial after another on all cores, Ray one core a trial."""
    import numpy as np
    import torch
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from orchestrator import catalog, models

    base = catalog.local_path("example://minilm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    events = Path(scratch) / "events.jsonl"
    names = {"negative": 0, "positive": 1}
    threads = CORES if backend == "optuna" else 1
    torch.set_num_threads(threads)

    def say(**event: Any) -> None:
        with events.open("a") as file:
            file.write(json.dumps({"at": time.time(), "pid": os.getpid(), **event}) + "\n")

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                say(what="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                say(what="first")

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
            say(what="score", value=metrics[f"eval_{METRIC}"])

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            say(what="ended")

    def fresh_model(trial: Any = None) -> Any:
        torch.set_num_threads(threads)
        say(what="began")
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {**tokenizer(rows["review"], truncation=True), "labels": [names[label] for label in rows["label"]]}

    files = load_dataset("csv", data_files=data, cache_dir=scratch).map(encode, batched=True, remove_columns=["review", "label"])
    settings = TrainingArguments(
        output_dir=scratch, num_train_epochs=epochs, per_device_eval_batch_size=64, warmup_steps=0.06, weight_decay=0.01, seed=seed,
        bf16=models.hardware_precision("auto") == "bf16", optim="adamw_torch_fused", train_sampling_strategy="group_by_length",
        eval_strategy="epoch", save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=10**6, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        None, settings, model_init=fresh_model, train_dataset=files["train"], eval_dataset=files["validation"],
        data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer, callbacks=[Watch()],
        compute_metrics=lambda answers: {METRIC: float((np.argmax(answers.predictions, -1) == answers.label_ids).mean())},
    )  # fmt: skip
    began = time.time()
    asked: dict[str, Any] = {"n_trials": trials, "direction": "maximize", "backend": backend, "compute_objective": _objective}
    if backend == "optuna":
        import optuna

        def space(trial: Any) -> dict[str, Any]:
            return {
                "learning_rate": trial.suggest_float("learning_rate", LOW, HIGH, log=True),
                "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", batches),
                "label_smoothing_factor": trial.suggest_float("label_smoothing_factor", 0.0, SMOOTHING),
            }

        trainer.hyperparameter_search(hp_space=space, sampler=optuna.samplers.TPESampler(seed=seed), **asked)
    else:
        import ray
        from ray import tune as rays
        from ray.tune.schedulers import ASHAScheduler
        from ray.tune.search.optuna import OptunaSearch

        def space(trial: Any) -> dict[str, Any]:
            return {
                "learning_rate": rays.loguniform(LOW, HIGH),
                "per_device_train_batch_size": rays.choice(batches),
                "label_smoothing_factor": rays.uniform(0.0, SMOOTHING),
            }

        ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
        trainer.hyperparameter_search(
            hp_space=space, search_alg=OptunaSearch(metric="objective", mode="max", seed=seed), storage_path=scratch, verbose=0,
            scheduler=ASHAScheduler(metric="objective", mode="max", max_t=max(1, int(epochs))) if epochs >= 2 else None, **asked,
        )  # fmt: skip
    seconds = time.time() - began
    said = [json.loads(line) for line in events.read_text().splitlines()]
    moments = [(event["at"] - began, event["value"]) for event in said if event["what"] == "score"]
    spans = _spans(said)
    return {"seconds": seconds, "trials": len(spans), "moments": moments, "spans": spans}


def _objective(metrics: dict[str, float]) -> float:
    return metrics[f"eval_{METRIC}"]


def _spans(said: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A trial begins where it makes its model last before its first step."""
    spans: list[dict[str, Any]] = []
    for pid in dict.fromkeys(event["pid"] for event in said):
        began, begun, mine = 0.0, 0.0, 0
        for event in (event for event in said if event["pid"] == pid):
            if event["what"] == "began":
                began = event["at"]
            elif event["what"] == "step":
                begun = event["at"]
            elif event["what"] == "first":
                spans.append({"began": began, "first": event["at"], "step": event["at"] - begun, "ended": event["at"], "warm": mine > 0})
                mine += 1
            elif mine:
                spans[-1]["ended"] = event["at"]
    return sorted(spans, key=lambda span: span["began"])


def load_all(data: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """A model and a batch of a few rows, as a hand-written trial would."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from orchestrator import catalog

    base = catalog.local_path("example://minilm")
    with Path(data["train"]).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = tokenizer([row["review"] for row in rows], truncation=True)
    chosen = [{"input_ids": encoded["input_ids"][place]} for place in range(SMALL)]
    batch = dict(tokenizer.pad(chosen, return_tensors="pt"))
    import torch

    batch["labels"] = torch.tensor([int(row["label"] == "positive") for row in rows[:SMALL]])
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), batch


def one_step(model: Any, batch: dict[str, Any]) -> float:
    """Makes an optimizer and does a step; the seconds of the step."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()
    started = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    return time.perf_counter() - started


def bare_side(data: dict[str, str], *, kept: bool, scratch: str) -> dict[str, Any]:
    """A function trainable with reused actors, one at a time, that does one step."""
    import ray
    from ray import tune as rays

    def trial(config: dict[str, Any]) -> None:
        began, warm = time.time(), bool(CACHE)
        import copy

        if not (kept and "loaded" in CACHE):
            CACHE["loaded"] = load_all(data)
        model, batch = CACHE["loaded"]
        step = one_step(copy.deepcopy(model), batch)
        rays.report({"began": began, "step": step, "first": time.time(), "ended": time.time(), "warm": warm})

    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    return {"spans": _run_tune(rays, trial, scratch)}


def nested_side(data: dict[str, str], *, scratch: str) -> dict[str, Any]:
    """Ray's documented pattern: a Tune trial without CPUs that runs a TorchTrainer."""
    import ray
    import ray.train
    from ray import tune as rays
    from ray.train.torch import TorchTrainer

    def worker(config: dict[str, Any]) -> dict[str, float]:
        model, batch = load_all(data)
        step = one_step(model, batch)
        return {"step": step, "first": time.time()}

    def trial(config: dict[str, Any]) -> None:
        began, warm = time.time(), bool(CACHE)
        CACHE["used"] = True
        scaling = ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1})
        place = ray.train.RunConfig(storage_path=scratch)
        said = TorchTrainer(worker, scaling_config=scaling, run_config=place).fit().return_value
        rays.report({"began": began, "step": said["step"], "first": said["first"], "ended": time.time(), "warm": warm})

    ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False)
    return {"spans": _run_tune(rays, rays.with_resources(trial, {"cpu": 0.1}), scratch)}


def _run_tune(rays: Any, trial: Any, scratch: str) -> list[dict[str, Any]]:
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    run = rays.RunConfig(storage_path=scratch, verbose=0)
    grid = rays.Tuner(
        trial, tune_config=rays.TuneConfig(num_samples=5, max_concurrent_trials=1, reuse_actors=True), run_config=run, param_space={"a": 1}
    ).fit()
    if grid.errors:
        raise grid.errors[0]
    return [{key: result.metrics[key] for key in ("began", "step", "first", "ended", "warm")} for result in grid]


SIDES = {"trainer": trainer_side, "bare": bare_side, "nested": nested_side, "look": look_side}

if __name__ == "__main__":
    main()
