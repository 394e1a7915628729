"""Memory that a corpus larger than memory takes: each process and the object store, while it is prepared and trained on.

    .venv/bin/python benchmarks/stream.py      # 5 GB, 300 steps

All of the corpus is read, checked, split and prepared. Training then takes its steps from the prepared corpus, so with
`--steps` it reads only the first part of the epoch's order (32 rows a step: 300 steps are 9,600 rows of about 17 million);
`--steps 0` trains on all of it, once, which takes hours. Rows are distinct but made of few sentences, so prepared files
are smaller than those of real text; in memory a row is as large as a real one. The model is tiny, with random weights.

A process's memory is its USS, what would be free without it, every 0.2 s: a shorter peak can be missed. The store is the
memory of the files that the raylet keeps its objects in. Pages of them that only one process maps are in its USS too, so
the sum of all is an upper bound. Exit 1: a process took over 2 GB, or the store over 1 GB (10^9 bytes).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

GB, MARKER = 10**9, "ORCHESTRATOR_BENCHMARK"
COUNTER = b"########"
WORDS = {"positive": ["good", "great", "love", "perfect", "fast", "sharp"], "negative": ["bad", "poor", "hate", "broken", "slow", "blurry"]}
THINGS = ["the", "number", "camera", "phone", "battery", "screen", "player", "router", "lens", "case"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the corpus")
    parser.add_argument("--files", type=int, default=8, help="files that it lies in")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps; 0: one epoch")
    parser.add_argument("--folder", type=Path, help="where its files go while it runs; default: the temporary folder")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files and processes go then too
    with tempfile.TemporaryDirectory(prefix="stream-", dir=arguments.folder) as name:
        folder, size = Path(name), int(arguments.gigabytes * GB)
        if shutil.disk_usage(folder).free < 3 * size:
            sys.exit(f"{folder.parent} has less than {3 * size / GB:.1f} GB free; --folder names another disk.")
        rows = write_corpus(folder / "corpus", size, arguments.files)
        result, memory = train(write_job(folder, arguments.steps), folder)
    seconds, (which, largest) = result["timings"], max(memory.peaks.items(), key=lambda peak: peak[1])
    print("| corpus, GB | rows | steps | prepare, s | train, s | largest process | its USS, GB | object store, GB | all together, GB |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {size / GB:g} | {rows:,} | {result['train']['steps']:,} | {seconds['prepare']:.0f} | {seconds['train']:.0f} | {which} "
        f"| {largest / GB:.2f} | {memory.store / GB:.2f} | {memory.together / GB:.2f} |"
    )
    return int(largest > 2 * GB or memory.store > 1 * GB)


def write_corpus(folder: Path, size: int, files: int) -> int:
    """CSV files of `size` bytes together, always the same; returns their rows. A block is repeated with other numbers in its rows."""
    rng, lines = random.Random(0), []
    for number in range(10_000):
        label = ("positive", "negative")[number % 2]
        text, length = f"{COUNTER.decode()} {number}", rng.randint(60, 500)
        while len(text) < length:
            text += " " + rng.choice(rng.choice((WORDS[label], THINGS)))
        lines.append(f"{text},{label}\n")
    block, rows, count = "".join(lines).encode(), 0, 0
    folder.mkdir()
    for index in range(files):
        with (folder / f"part-{index}.csv").open("wb") as file:
            file.write(b"review,stars\n")
            while (left := size // files - file.tell()) > 0:
                piece = block if left >= len(block) else block[: block.index(b"\n", left) + 1]
                file.write(piece.replace(COUNTER, b"%08d" % count))
                rows, count = rows + piece.count(b"\n"), count + 1
    return rows


def write_model(folder: Path) -> Path:
    """A BERT of 2 layers x 32 with a word-level vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, set_seed

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *THINGS, *WORDS["positive"], *WORDS["negative"]]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special).save_pretrained(folder)
    set_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=128, **shape)).save_pretrained(folder)
    return folder


def write_job(folder: Path, steps: int) -> Path:
    split = {"validation": 0.001, "test": 0.0}  # nearly all of it is there to be trained on
    job = {
        "task": "text-classification",
        "model": {"base": str(write_model(folder / "tiny"))},
        "data": {"train": f"{folder}/corpus/*.csv", "columns": {"text": "review", "label": "stars"}, "split": split},
        "training": {"max_steps": steps} if steps else {"num_train_epochs": 1},
        "storage": str(folder / "runs"),
    }
    (folder / "stream.json").write_text(json.dumps(job))
    return folder / "stream.json"


@dataclass
class Memory:
    """Peaks of all processes that carry `mark` in their environment, and of their descendants."""

    mark: str
    peaks: dict[str, int] = field(default_factory=dict)
    store: int = 0
    together: int = 0
    processes: set[psutil.Process] = field(default_factory=set)
    foreign: set[psutil.Process] = field(default_factory=set)

    def sample(self) -> None:
        sizes = stores = 0
        for process in self.find():
            with contextlib.suppress(psutil.Error, OSError):  # it has just ended
                size, kind = private(process), label(process)
                stores += store(process) if kind == "raylet" else 0
                sizes += size
                self.peaks[kind] = max(size, self.peaks.get(kind, 0))
        self.store, self.together = max(self.store, stores), max(self.together, sizes + stores)

    def find(self) -> set[psutil.Process]:
        """Those that run now. Once found, a process stays: Ray's workers overwrite their environment with a title."""
        self.processes = {process for process in self.processes if process.is_running()}
        for process in set(psutil.process_iter()) - self.processes - self.foreign:
            with contextlib.suppress(psutil.Error):  # it has just ended, or is another user's
                environment = process.environ()
                if environment.get(MARKER) == self.mark or process.ppid() in {parent.pid for parent in self.processes}:
                    self.processes.add(process)
                elif environment:  # empty while a program is being started: look again
                    self.foreign.add(process)
        return self.processes

    def end(self, patience: float = 10) -> None:
        """Waits for all to end, and ends those that don't."""
        _, alive = psutil.wait_procs(self.find(), timeout=patience)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                print(f"still running, ended now: {label(process)} ({process.pid})", file=sys.stderr)
                process.kill()
        psutil.wait_procs(alive, timeout=patience)


def private(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.AccessDenied):
        return process.memory_full_info().uss
    return process.memory_info().rss - process.memory_info().shared


def store(raylet: psutil.Process) -> int:
    """Memory behind the store's files: they are deleted at once, and kept open."""
    size = 0
    for file in Path(f"/proc/{raylet.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            size += file.stat().st_blocks * 512 if "/plasma" in str(file.readlink()) else 0
    return size


def label(process: psutil.Process) -> str:
    """`ray::…` as Ray titles its workers, else the program and the word after it."""
    parts = process.cmdline() or [process.name()]
    title = parts[0] if parts[0].startswith("ray::") else " ".join([Path(part).name for part in parts if part[:1] != "-"][:2])
    return title.split("\n")[0].split("|")[0].strip()[:60]


def train(job: Path, folder: Path) -> tuple[dict[str, Any], Memory]:
    """Runs `orchestrator train`; what it answers, and the memory that it took."""
    memory = Memory(uuid.uuid4().hex)
    command = [sys.executable, "-m", "orchestrator.cli", "train", str(job), "--json"]
    with (folder / "answer").open("w") as answer:
        child = subprocess.Popen(command, stdout=answer, env={**os.environ, MARKER: memory.mark})
        try:
            while child.poll() is None:
                memory.sample()
                time.sleep(0.2)
        finally:
            child.terminate()
            memory.end()
    if child.returncode:
        sys.exit(f"orchestrator train failed with exit status {child.returncode}.")
    return json.loads((folder / "answer").read_text().strip().splitlines()[-1]), memory


if __name__ == "__main__":
    sys.exit(main())
