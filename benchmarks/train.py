"""Training speed and accuracy beside transformers.Trainer, and scaling beside torchrun DDP: all sides in one run.

    .venv/bin/python benchmarks/train.py              # speed and accuracy on the reviews, then scaling
    .venv/bin/python benchmarks/train.py --only speed --seeds 1 2 3

Same machine, model (MiniLM, 22.7M), rows, threads, epochs and batch for every side; each side runs in a process of its
own, in turn, so that none warms the caches of another. Figures are examples per second of training, without start-up.
The tutorial recipe pads every row to 512 tokens, which makes it so slow that its speed is taken on part of the rows
(`--tutorial-rows`); padding is masked, so its accuracy is that of the same batches padded less, and is measured so.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
WARM_UP = 10
"""Steps that are not measured: the first ones of a process are slower."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["speed", "scaling"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tutorial-rows", type=int, default=96)
    parser.add_argument("--steps", type=int, default=40, help="steps measured for each scaling figure")
    parser.add_argument("--repeats", type=int, default=3, help="times that each scaling figure is measured, the sides in turn")
    parser.add_argument("--shapes", nargs="+", default=["32x24", "32x128", "128x24"], help="rows x tokens of a global batch")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](**json.loads(arguments.options))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "scaling":
            speed(arguments, Path(folder))
        if arguments.only != "speed":
            scaling(arguments, Path(folder))


def run_side(name: str, launcher: list[str] | None = None, env: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    command = [*(launcher or [sys.executable]), str(HERE), "--side", name, "--options", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env={**os.environ, **(env or {})})
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- speed and accuracy --------------------------------------------------------------------------------------
def speed(arguments: argparse.Namespace, folder: Path) -> None:
    table: dict[str, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        sides = sides_of(
            arguments, folder, split(folder, seed), {"seed": seed, "epochs": arguments.epochs, "learning_rate": arguments.learning_rate}
        )
        for name, side in sides.items():
            table.setdefault(name, []).append(side())
            print(f"seed {seed}: {name}: {json.dumps(table[name][-1])}", flush=True)
    base = statistics.median(run["examples_per_second"] for run in table["Trainer, best settings"])
    print(f"\n| side | examples/s (median) | of Trainer's best | accuracy (mean of {len(arguments.seeds)}) |\n|---|---|---|---|")
    for name, runs in table.items():
        rate = statistics.median(run["examples_per_second"] for run in runs)
        accuracy = "" if "speed" in name else f"{statistics.mean(run['accuracy'] for run in runs):.4f}"
        print(f"| {name} | {rate:.1f} | {rate / base:.2f}x | {accuracy} |")


def sides_of(
    arguments: argparse.Namespace, folder: Path, data: dict[str, str], common: dict[str, Any]
) -> dict[str, Callable[[], dict[str, float]]]:
    threads = os.cpu_count() or 1
    return {
        f"orchestrator, 1 worker x {threads} threads": lambda: ours(
            folder, data, workers=1, threads=threads, batch=arguments.batch, **common
        ),
        f"orchestrator, {threads} workers x 1 thread": lambda: ours(
            folder, data, workers=threads, threads=1, batch=arguments.batch, **common
        ),
        "Trainer, best settings": lambda: run_side("trainer", data=data, batch=arguments.batch, threads=threads, best=True, **common),
        "Trainer, batch 8 (accuracy of the tutorial recipe)": lambda: run_side(
            "trainer", data=data, batch=8, threads=threads, best=False, pad=None, **common
        ),
        "Trainer, tutorial recipe (speed)": lambda: run_side(
            "trainer", data=data, batch=8, threads=threads, best=False, pad=512, rows=arguments.tutorial_rows, **{**common, "epochs": 1}
        ),
    }


def split(folder: Path, seed: int) -> dict[str, str]:
    """The reviews cut once, so that all sides see the same rows."""
    import random

    from orchestrator import catalog

    with Path(catalog.local_path("example://reviews")).open(newline="", encoding="utf-8") as file:
        rows = [(row["review"], row["label"]) for row in csv.DictReader(file)]
    random.Random(seed).shuffle(rows)
    parts = {"test": rows[:300], "validation": rows[300:600], "train": rows[600:]}
    paths = {}
    for name, part in parts.items():
        paths[name] = str(folder / f"{name}-{seed}.csv")
        with Path(paths[name]).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("review", "label"), *part])
    return paths


def ours(
    folder: Path, data: dict[str, str], *, workers: int, threads: int, batch: int, seed: int, epochs: int, learning_rate: float
) -> dict[str, float]:
    job = {
        "task": "text-classification",
        "model": {"base": "example://minilm"},
        "data": {**data, "columns": {"text": "review"}},
        "training": {
            "seed": seed,
            "num_train_epochs": epochs,
            "learning_rate": learning_rate,
            "global_batch_size": batch,
            "warmup_ratio": 0.06,
        },
        "resources": {"num_workers": workers, "threads_per_worker": threads},
        "storage": str(folder / "runs"),
    }
    path = folder / f"bench-{workers}-{seed}.json"
    path.write_text(json.dumps(job))
    result = orchestrate("evaluate", path)
    return {
        "examples_per_second": result["train"]["examples_per_second"],
        "accuracy": result["metrics"]["test"]["accuracy"],
        "seconds": result["train"]["seconds"],
        "data_wait_share": result["train"]["data_wait_share"],
        **{f"first_step.{part}": seconds for part, seconds in result["train"]["timings"].items()},
    }


def orchestrate(command: str, job: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", command, str(job), "--json", *options], capture_output=True, text=True, timeout=3000
    )
    if done.returncode:
        sys.exit(f"orchestrator {command} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def trainer_side(
    data: dict[str, str], *, batch: int, threads: int, best: bool, seed: int, epochs: int, learning_rate: float, **options: Any
) -> dict[str, float]:
    """transformers.Trainer: dynamic padding, length grouping, fused AdamW and the hardware's precision, or the tutorial's settings."""
    import numpy as np
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    from orchestrator import catalog, models

    torch.set_num_threads(threads)
    base = catalog.local_path("example://minilm")
    tokenizer = AutoTokenizer.from_pretrained(base)
    names = {"negative": 0, "positive": 1}
    pad = options.get("pad")

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        padding = {"padding": "max_length", "max_length": pad} if pad else {}
        return {**tokenizer(rows["review"], truncation=True, **padding), "labels": [names[label] for label in rows["label"]]}

    with tempfile.TemporaryDirectory() as scratch:
        files = load_dataset("csv", data_files=data, cache_dir=scratch).map(encode, batched=True, remove_columns=["review", "label"])
        train = files["train"].select(range(options["rows"])) if options.get("rows") else files["train"]
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        precision = models.hardware_precision("auto") if best else "fp32"
        settings = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=64,
            warmup_steps=int(0.06 * epochs * -(-len(train) // batch)),
            weight_decay=0.01,
            seed=seed,
            bf16=precision == "bf16",
            optim="adamw_torch_fused" if best else "adamw_torch",
            train_sampling_strategy="group_by_length" if best else "random",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=10**6,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model, settings, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer
        )
        figures = trainer.train().metrics
        answers = trainer.predict(files["test"]) if not options.get("rows") else None
    accuracy = float((np.argmax(answers.predictions, -1) == answers.label_ids).mean()) if answers else 0.0
    return {"examples_per_second": figures["train_samples_per_second"], "accuracy": accuracy, "seconds": figures["train_runtime"]}


# ---- scaling -------------------------------------------------------------------------------------------------
def scaling(arguments: argparse.Namespace, folder: Path) -> None:
    print("\n| batch x tokens | side | 1 worker, ms a step | 2 workers, ms a step | scaling |\n|---|---|---|---|---|")
    for name in arguments.shapes:
        batch, tokens = map(int, name.split("x"))
        shape = {"batch": batch, "tokens": tokens, "steps": arguments.steps}
        sides = {"torchrun DDP": functools.partial(ddp_step, **shape), "orchestrator": functools.partial(own_step, folder=folder, **shape)}
        found: dict[tuple[str, int], list[float]] = {}
        for _ in range(arguments.repeats):
            for side, step in sides.items():
                for world in (1, 2):
                    found.setdefault((side, world), []).append(step(world))
                    print(f"{name} {side} {world}: {found[side, world][-1]:.0f} ms", file=sys.stderr, flush=True)
        for side in sides:
            one, two = (statistics.median(found[side, world]) for world in (1, 2))
            print(f"| {batch} x {tokens} | {side} | {one:.0f} | {two:.0f} | {one / two:.2f}x |", flush=True)


def ddp_step(world: int, **shape: int) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(port)]
    return run_side("ddp", launcher, {"OMP_NUM_THREADS": "1"}, **shape)["milliseconds"]


def ddp_side(batch: int, tokens: int, steps: int) -> dict[str, float]:
    """Bare DistributedDataParallel over gloo, a thread each, its share of the same global batch."""
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForSequenceClassification

    from orchestrator import catalog, models

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    bf16 = models.hardware_precision("auto") == "bf16"
    model = AutoModelForSequenceClassification.from_pretrained(catalog.local_path("example://minilm"), num_labels=2)
    parallel = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=False)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-5, fused=True)
    rows = batch // dist.get_world_size()
    seconds = []
    for _ in range(steps + WARM_UP):
        ids, labels = torch.randint(1000, 30000, (rows, tokens)), torch.randint(0, 2, (rows,))
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = parallel(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    slowest = torch.tensor(statistics.median(seconds[WARM_UP:]))
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.destroy_process_group()
    if int(os.environ["RANK"]):
        os._exit(0)  # only one rank prints the figure
    return {"milliseconds": 1000 * float(slowest)}


def own_step(workers: int, *, folder: Path, batch: int, tokens: int, steps: int) -> float:
    """Median seconds of a step of `orchestrator train`, from the run's history."""
    data = folder / f"rows-{batch}x{tokens}.csv"
    if not data.exists():
        import random

        rng = random.Random(0)
        words = [
            "time",
            "year",
            "people",
            "way",
            "day",
            "man",
            "thing",
            "woman",
            "life",
            "child",
            "world",
            "school",
            "state",
            "family",
            "part",
        ]
        with data.open("w", newline="") as file:
            rows = [(" ".join(rng.choices(words, k=tokens - 2)), number % 2) for number in range((steps + WARM_UP + 1) * batch + 64)]
            csv.writer(file).writerows([("text", "label"), *rows])
    job = {
        "task": "text-classification",
        "model": {"base": "example://minilm"},
        "data": {"train": str(data), "split": {"validation": 0.01, "test": 0.0}},
        "training": {"max_steps": steps + WARM_UP, "global_batch_size": batch, "save_steps": 10**6, "eval_steps": 10**6},
        "resources": {"num_workers": workers, "threads_per_worker": 1},
        "storage": tempfile.mkdtemp(dir=folder),  # trained anew each time
    }
    path = folder / f"scale-{batch}x{tokens}-{workers}.json"
    path.write_text(json.dumps(job))
    history = Path(orchestrate("train", path)["train"]["history"])
    seconds = [line["seconds"] for line in map(json.loads, history.read_text().splitlines()) if "seconds" in line]
    return 1000 * statistics.median(seconds[WARM_UP:])


SIDES = {"trainer": trainer_side, "ddp": ddp_side}

if __name__ == "__main__":
    main()
