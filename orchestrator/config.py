"""The job file: one frozen value with a section for each part. Defaults < file < `--set` < a trial's sample."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

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
    format: Literal["csv", "tsv", "jsonl", "json", "parquet", "arrow", "folder"] | None = None
    """None: by the ending of the file. `folder`: text files, one folder per class."""
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
    """Hub id, local folder, package://module/path for a model inside an installed package, or example://name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; not set: its main branch."""
    lora: LoraSection | None = None
    """Train adapters instead of all weights; `{}` takes the defaults."""
    attn_implementation: str | None = None
    """As in transformers: sdpa, eager, flash_attention_2, …; not set: the fastest that the model supports."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. It can do whatever this user can."""


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
    max_body_bytes: Positive = 2_000_000
    """Largest request; beyond it the answer is 413."""
    max_inputs: Positive = 1024
    """Rows in one request; beyond them it is answered 413."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest that a request may take; beyond it the answer is 504."""
    replay_rows: Annotated[int, Field(ge=0)] = 20
    """Validation rows replayed over HTTP before the endpoint counts as deployed."""
    tolerance: Annotated[float, Field(gt=0)] = 0.02
    """Largest difference of a score between the endpoint and the offline prediction."""


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
            question["num_workers"] = self.resources.num_workers
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
