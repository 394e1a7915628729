"""The job file: one frozen value with a section for each part. Defaults < file < `--set` < a trial's sample."""

from __future__ import annotations

import builtins
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, WithJsonSchema, model_serializer, model_validator

from orchestrator.errors import InputError
from orchestrator.schema import Schema, override
from orchestrator.tasks import AnyTask

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


class SplitSection(Schema):
    """How rows are shared out where a split has no files of its own."""

    validation: Share = 0.1
    """Share of the training rows that becomes the validation split; not used when `data.validation` is given."""
    test: Share = 0.1
    """Share of the training rows that becomes the test split; not used when `data.test` is given."""
    seed: int = 42
    """Of the shares: which row goes where depends on it and on the row's id."""
    stratify: bool = True
    """Keep each label's share in every split."""
    group: str | None = None
    """A column of the files: rows with the same value in it never land in different splits. Turns `stratify` off."""

    @model_validator(mode="after")
    def _leaves_rows_to_train(self) -> SplitSection:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test shares add up to {self.validation + self.test:g}, which leaves nothing to train on; they must stay below 1"
            )
        return self


class DataSection(Schema):
    """Where the rows are and how to read them."""

    train: str | list[str]
    """Path, glob or list of them: local, s3://, gs://, hdfs://, hf://, package://module/path or example://name."""
    validation: str | list[str] | None = None
    """As `train`, for choosing the best checkpoint; not set: split off `train`."""
    test: str | list[str] | None = None
    """As `train`, for the final scores; not set: split off `train`."""
    split: SplitSection = SplitSection()
    columns: dict[str, str] = {}
    """Role -> column of the files, for example {text: review, label: stars}; a role not named is its own column."""
    format: Literal["csv", "tsv", "jsonl", "json", "squad", "text", "parquet", "arrow", "folder"] | None = None
    """None: by the ending of the file. `folder`: texts, images or sounds, one folder per class; `squad`: questions in SQuAD's nested JSON
    (a .json file of that form is recognised); `text`: plain text, a paragraph a line."""
    delimiter: str | None = None
    """Between the fields of a line; not set: comma for csv, tab for tsv."""
    header: bool = True
    """Whether the first line names the columns."""
    names: list[str] | None = None
    """Column names for a file without a header line (with header: false)."""
    encoding: str = "utf-8"
    """Of text files, by Python's names: utf-8, cp1252, gb18030, utf-16, …"""
    max_bad_rows: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of rows that may go to the quarantine file; over it the job stops. 0: any bad row stops it."""

    @model_validator(mode="after")
    def _names_need_no_header(self) -> DataSection:
        if self.names is None and not self.header:
            raise ValueError("header: false needs data.names, the names of the columns in order")
        return self


class LoraSection(Schema):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) through PEFT; the head is trained in full."""

    r: Positive = 8
    """Rank of the adapters: more learns more and costs more."""
    alpha: float | None = None
    """Scale of the adapter; None: twice `r`."""
    dropout: Share = 0.0
    """Share of the adapters' inputs dropped while training."""
    target_modules: Literal["auto"] | list[str] = "auto"
    """Names of the layers that get adapters; auto: all linear layers."""


class ModelSection(Schema):
    """The pretrained model to start from."""

    base: Annotated[str, Field(min_length=1)]
    """Hub id, local folder, package://module/path for a model inside an installed package, example://name, or config://model_type."""
    config: dict[str, Any] = {}
    """config://: sizes of the model from scratch, by the names of its class in transformers, such as {hidden_size: 256}."""
    processor: dict[str, Any] = {}
    """config://: of texts {kind: unigram, vocab_size: 8000, lowercase: false}, fitted on the training rows; else settings of the processor."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; not set: its main branch."""
    lora: LoraSection | None = None
    """Train adapters instead of all weights; `{}` takes the defaults."""
    attn_implementation: str | None = None
    """As in transformers: sdpa, eager, flash_attention_2, …; not set: the fastest that the model supports."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. It can do whatever this user can."""

    @model_validator(mode="after")
    def _sizes_are_of_a_model_from_scratch(self) -> ModelSection:
        if (self.config or self.processor) and not self.base.startswith("config://"):
            name = "config" if self.config else "processor"
            raise ValueError(f"{name} is for models from scratch (base: config://bert); {self.base!r} brings its own")
        return self


class TrainingSection(Schema):
    """Hyperparameters, by the names of `transformers.TrainingArguments`."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    """Peak of the schedule."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Times that every training row is seen; a part of one is a part of the rows."""
    max_steps: int = -1
    """Stops after so many optimizer steps; -1: by epochs."""
    global_batch_size: Positive | None = None
    """Rows per optimizer step over all workers; the result depends on it alone. Default 32."""
    per_device_train_batch_size: Positive | None = None
    """Rows per worker and accumulation step; with it the global batch is this x accumulation x workers."""
    gradient_accumulation_steps: Positive = 1
    """Only with `per_device_train_batch_size`: how many of those make a step."""
    tokens_per_micro_batch: Positive | None = None
    """Padded tokens that go through the model at once; memory depends on it, results do not. None: by the hardware."""
    group_by_length: bool = True
    """Rows of similar length share a global batch, as `train_sampling_strategy="group_by_length"` of transformers."""
    warmup_ratio: Share = 0.06
    """Share of the steps in which the learning rate rises from zero."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Overrides warmup_ratio when above 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of AdamW; biases and normalisation layers are left out."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = "linear"
    """How the learning rate falls after the warm-up."""
    adam_beta1: Share = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: Share = 0.999
    """Decay of the mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of AdamW's update."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients of a larger norm are scaled down to it; 0: no clipping."""
    label_smoothing_factor: Share = 0.0
    """Share of each label's probability that is spread over all labels."""
    seed: int = 42
    """Of the new layers' weights, the order of rows and dropout."""
    early_stopping_patience: Positive | None = None
    """Evaluations without improvement after which training stops; None: never."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """How much better counts as an improvement."""
    metric_for_best_model: str | None = None
    """None: the task's objective. `loss` and `eval_loss` both mean the validation loss."""
    eval_steps: Positive | None = None
    """Evaluate every so many steps; None: at the end of each epoch."""
    save_steps: Positive | None = None
    """Checkpoint every so many steps; None: twice an epoch, at most every 500 steps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the arithmetic; the weights that are trained stay fp32. auto: what this hardware does fast."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, about a third slower."""
    torch_compile: bool = False
    """Compile the model with torch.compile; takes minutes at first."""
    record_rows: bool = False
    """Write which rows each worker saw at which step to the run folder."""

    def global_batch(self, num_workers: int) -> int:
        """Rows per optimizer step."""
        if self.per_device_train_batch_size is not None:
            return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_workers
        return self.global_batch_size or 32

    @model_validator(mode="after")
    def _one_batch_size(self) -> TrainingSection:
        if self.global_batch_size is not None and self.per_device_train_batch_size is not None:
            raise ValueError("global_batch_size and per_device_train_batch_size both say how many rows make a step; give one of them")
        return self


class ResourcesSection(Schema):
    """What training asks of the cluster."""

    num_workers: Positive | Literal["auto"] = "auto"
    """Data-parallel workers. auto: one per GPU of the cluster, else one."""
    cpus_per_worker: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """CPUs that Ray sets aside for a worker. auto: as many as each worker can have, less what encoding needs."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """auto: 1 where the cluster has GPUs, else 0."""
    threads_per_worker: Positive | Literal["auto"] = "auto"
    """Threads of torch in a worker. auto: its CPUs."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker deaths after which training gives up; each restart continues from the last checkpoint."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """How long to wait for workers to get their CPUs and GPUs before saying what is missing."""


class CheckpointSection(Schema):
    """Resumable training state."""

    keep: Positive = 1
    """Latest checkpoints kept beside the best one."""


class EvaluationSection(Schema):
    """How the trained model is scored."""

    metrics: list[str] | None = None
    """None: the task's defaults."""
    tokens_per_batch: Positive | None = None
    """Padded tokens that go through the model at once."""


class RegistrySection(Schema):
    """Where versions of the model are kept."""

    uri: str | None = None
    """MLflow tracking and registry server; None: an SQLite file in the storage."""
    model: str | None = None
    """Name of the registered model; None: the job's name."""
    alias: str = "champion"
    """Moved to a new version only when it scores better on the same test set, or with --promote."""


class ReplicasSection(Schema):
    """How many copies of the model answer."""

    min: Annotated[int, Field(ge=0)] = 1
    """Replicas kept ready; 0 lets the endpoint sleep."""
    max: Positive = 1
    """Replicas under load."""
    target: Annotated[float, Field(gt=0)] = 16
    """Requests in flight per replica that autoscaling aims at."""

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasSection:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; min must not be above max")
        return self


class ServingSection(Schema):
    """The endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is reachable from outside."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    replicas: ReplicasSection = ReplicasSection()
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray sets aside for a replica, and threads of its model."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """GPUs for a replica; a part of one is shared."""
    auth: Literal["auto", "none"] | str = "auto"
    """auto: keys from ORCHESTRATOR_API_KEYS, required on any host but loopback. A path: a file with a key a line. none: open."""
    max_batch_tokens: Positive = 4096
    """Padded tokens that go through the model at once."""
    max_queue: Positive = 1024
    """Rows waiting in a replica; beyond them requests are answered 429."""
    max_body_bytes: Positive | None = None
    """Largest request; beyond it the answer is 413. None: 2 MB for texts, 20 MB for images, 50 MB for sounds."""
    max_inputs: Positive = 1024
    """Rows in one request; beyond them it is answered 413."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest that a request may take; beyond it the answer is 504."""
    replay_rows: Annotated[int, Field(ge=0)] = 20
    """Validation rows replayed over HTTP before the endpoint counts as deployed."""
    tolerance: Annotated[float, Field(gt=0)] = 0.02
    """Largest difference of a score between the endpoint and the offline prediction."""


class Parameter(Schema):
    """One path of the search space: exactly one kind of distribution, and when it applies."""

    uniform: tuple[float, float] | None = None
    """[low, high]: any number between, all alike."""
    loguniform: tuple[float, float] | None = None
    """[low, high]: any number between, each order of magnitude alike."""
    quniform: tuple[float, float, float] | None = None
    """[low, high, step]: low, low + step, … up to high."""
    int: tuple[builtins.int, builtins.int] | None = None
    """[low, high]: any whole number from low to high, both included."""
    logint: tuple[builtins.int, builtins.int] | None = None
    """[low, high]: as `int`, each order of magnitude alike."""
    choice: list[Any] | None = None
    """One of these values, which may be whole sections: [null, {r: 4}]."""
    when: dict[str, Any] = {}
    """Only in trials where another path has a value, or one of a list: {training.lr_scheduler_type: [linear, cosine]}."""

    @model_serializer(mode="wrap")
    def _as_given(self, handler: Any) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in (self.kind, "when") and value != {}}

    @property
    def kind(self) -> str:
        """The name of its distribution."""
        return next(name for name in _DISTRIBUTIONS if getattr(self, name) is not None)

    @property
    def low(self) -> float:
        """The least number of a range."""
        return getattr(self, self.kind)[0]

    @property
    def high(self) -> float:
        """The greatest number of a range."""
        return getattr(self, self.kind)[1]

    @model_validator(mode="after")
    def _one_distribution(self) -> Parameter:
        given = [name for name in _DISTRIBUTIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"one distribution is needed, out of {', '.join(_DISTRIBUTIONS)}"
                + (f"; this has {' and '.join(given)}" if given else ", as in {uniform: [0, 0.1]}")
            )
        if self.choice is not None:
            _check_choices(self.choice)
        else:
            _check_range(self.kind, getattr(self, self.kind))
        return self


_DISTRIBUTIONS = ("uniform", "loguniform", "quniform", "int", "logint", "choice")


def _check_choices(values: list[Any]) -> None:
    if not values:
        raise ValueError("choice has no values; give at least two, as in {choice: [16, 32]}")
    texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
    if twice := [value for value, text in zip(values, texts, strict=True) if texts.count(text) > 1]:
        raise ValueError(f"choice has {twice[0]!r} twice; each value stands once")


def _check_range(kind: str, bounds: tuple[float, ...]) -> None:
    low, high = bounds[:2]
    shown = f"{kind}: [{', '.join(f'{bound:g}' for bound in bounds)}]"
    if not all(math.isfinite(bound) for bound in bounds):
        raise ValueError(f"{shown} has a bound that is not a finite number")
    if low == high:
        raise ValueError(f"{shown} has one value only; set the path in the job instead, or make the upper bound larger")
    if low > high:
        raise ValueError(f"{shown} is upside down: the lower bound comes first, as in [{high:g}, {low:g}]")
    if kind.startswith("log") and low <= 0:
        raise ValueError(f"{shown} is on a logarithmic scale, so its lower bound must be above 0")
    if kind == "quniform" and not 0 < bounds[2] <= high - low:
        raise ValueError(f"{shown} needs a step above 0 and at most {high - low:g}, the distance of its bounds")


def _bytes(value: Any) -> Any:
    """20_000_000_000 for "20 GB", as disks are sold; other values as they are."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|[kKMGT]B|[KMGT]iB)?\s*", value)
    if found is None:
        raise ValueError('an amount is a number of bytes, or a number with kB, MB, GB or TB, as in "20 GB"')
    unit = found[2] or "B"
    power = " KMGT".index(unit[0].upper()) if unit != "B" else 0
    return round(float(found[1]) * (1024 if "i" in unit else 1000) ** power)


Bytes = Annotated[
    int, Field(gt=0), BeforeValidator(_bytes), WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}]})
]
"""A number of bytes; in a job file also text such as "20 GB"."""


class SearchSection(Schema):
    """A sweep: many trials of this job with other settings, the best of which takes the place of training."""

    space: Annotated[dict[str, Parameter], Field(min_length=1)]
    """Path of this job, such as training.learning_rate -> the values to try."""
    metric: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Validation metric to make best; a list: the best trade-offs of several. None: that of the best checkpoint."""
    num_trials: Positive = 20
    """Trials in all, the known points included."""
    algorithm: Literal["random", "grid", "tpe", "cmaes", "bohb", "hyperopt"] = "tpe"
    """What proposes settings. tpe (Optuna) learns from the trials before; random and grid do not."""
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt", "pb2"] = "asha"
    """What stops weak trials early (asha, hyperband, median), or changes the settings of running ones (pbt, pb2)."""
    start: list[dict[str, Any]] = []
    """Known good settings, run first: {training.learning_rate: 3.0e-5}. Paths not named keep the job's value."""
    include_default: bool = True
    """Run the job as it is written first of all, so that the winner is compared with it."""
    seed: int = 42
    """Of the settings that are proposed. What a trial computes has training.seed."""
    report_every: Annotated[float, Field(gt=0)] | None = None
    """Epochs from one validation of a trial to the next. None: about nine a trial, at least one an epoch."""
    grace: Annotated[float, Field(gt=0)] | None = None
    """Epochs before a trial may be stopped early. None: up to its first validation."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    """asha and hyperband: one in so many goes on at each rung."""
    perturb_every: Annotated[float, Field(gt=0)] | None = None
    """pbt and pb2: epochs after which weak trials take over the weights of strong ones. None: at each validation."""
    workers_per_trial: Positive = 1
    """Data-parallel workers of a trial. Several trials side by side are faster than several workers."""
    cpus_per_trial: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """CPUs that Ray sets aside for a trial of one worker. auto: 1."""
    gpus_per_trial: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs for a trial of one worker; a part of one is shared. auto: by the model's size where the cluster has GPUs."""
    max_concurrent_trials: Positive | Literal["auto"] = "auto"
    """Trials at once. auto: as many as the cluster holds."""
    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Wall time after which no trial goes on, restarts included; None: no limit."""
    max_examples: Positive | None = None
    """Training rows over all trials after which none goes on; None: no limit."""
    max_disk: Bytes = "20 GB"  # pyright: ignore[reportAssignmentType]
    """Bytes that the trials may take, the bundles of the winner and the default included; checkpoints that can't win are deleted first."""
    plateau: Positive | None = None
    """The sweep ends when the best has not improved in so many finished trials; None: never."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of one trial, each from its last checkpoint."""
    refit: bool = False
    """Train the winning setting once more, on training and validation rows together."""
    replay: str | None = None
    """File with the schedule of an earlier pbt or pb2 sweep, followed by one trial instead of searching."""

    @property
    def question(self) -> dict[str, Any]:
        """What decides which settings are tried and how they are judged: how many, how long and on what hardware is left out.

        So a sweep that is given more trials, time or machines is the same sweep and goes on.
        """
        asked = {"space", "metric", "algorithm", "scheduler", "start", "include_default", "seed", "report_every", "grace"}
        return self.model_dump(mode="json", include=asked | {"reduction_factor", "perturb_every", "replay"})


class JobConfig(Schema):
    """One job: from raw data and a base model to a live endpoint."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "job"
    """Names the run and, by default, the model; taken from the job file's name."""
    storage: str = "runs"
    """Root of runs, checkpoints and, by default, the registry's SQLite file: local folder or any pyarrow URI."""
    task: AnyTask
    model: ModelSection
    data: DataSection
    training: TrainingSection = TrainingSection()
    resources: ResourcesSection = ResourcesSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    registry: RegistrySection = RegistrySection()
    serving: ServingSection = ServingSection()
    search: SearchSection | None = None
    """Not set: one training with the settings above."""

    @property
    def model_name(self) -> str:
        """The name under which this job's models are registered and served."""
        return self.registry.model or self.name

    @property
    def run_id(self) -> str:
        """Name of the run folder: the same for the same question, whatever machine answers it.

        Where it runs (resources, storage, serving, registry) is not part of the question, so that a run that died
        continues on another number of workers.
        """
        question = self.model_dump(mode="json", include={"task", "model", "data", "training", "evaluation"})
        if self.training.per_device_train_batch_size is not None:
            question["num_workers"] = self.resources.num_workers if self.search is None else self.search.workers_per_trial
        if self.search is not None:
            question["search"] = self.search.question
        return f"{self.name}-{digest(question)[:8]}"


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, the same for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def load(path: str | Path, assignments: list[str] | None = None, *, absolute_storage: bool = True, **top: Any) -> JobConfig:
    """The job in a YAML (or resolved JSON) file, with `--set` assignments; `top` sets top-level keys when not None.

    Where neither says so, the storage is ORCHESTRATOR_STORAGE or ./runs; a local one becomes
    absolute, unless that is for another machine to say.

    Relative data paths and model folders are taken from the job file's folder where they exist there, else from the
    working directory. Raises `InputError`.
    """
    file = Path(path)
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no job file {str(file)!r}; `orchestrator init` writes one.") from None
    except IsADirectoryError:
        raise InputError(f"{str(file)!r} is a folder, not a job file.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: a job file has keys such as task, model and data; this one is {type(value).__name__}.")
    value = override(value, assignments or [])
    value.update({key: setting for key, setting in top.items() if setting is not None})
    value.setdefault("storage", os.environ.get("ORCHESTRATOR_STORAGE") or "runs")
    value.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "job")
    job = JobConfig.parse(value, file.name)
    job = _from_folder(job, file.resolve().parent)
    if "://" in job.storage or not absolute_storage:
        return job
    # Workers run in folders of their own, so a relative storage would be another place for each.
    return job.model_copy(update={"storage": str(Path(job.storage).expanduser().absolute())})


def _from_folder(job: JobConfig, folder: Path) -> JobConfig:
    def place(path: str) -> str:
        if "://" in path or Path(path).is_absolute():
            return path
        beside = folder / path
        try:
            found = beside.exists() or any(folder.glob(path))
        except (ValueError, NotImplementedError):  # not a glob either: who reads it will say so
            found = False
        return str(beside) if found else str(Path(path).absolute()) if Path(path).exists() else path

    def places(paths: str | list[str] | None) -> str | list[str] | None:
        return place(paths) if isinstance(paths, str) else [place(path) for path in paths] if paths else paths

    data = job.data.model_copy(update={key: places(getattr(job.data, key)) for key in ("train", "validation", "test")})
    base = job.model.base
    model = job.model.model_copy(update={"base": place(base)} if (folder / base).is_dir() or Path(base).is_dir() else {})
    return job.model_copy(update={"data": data, "model": model})
