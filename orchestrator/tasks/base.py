"""The Task protocol: a task says its columns, its tensors, its model and its answer. Everything else asks it.

A task is a frozen value: the `task:` section of the job file, what pickles to the workers, and `task.json` in the
bundle, so that training and serving cannot drift apart. Importing a task imports neither torch, transformers nor ray;
methods that need them import them when called.

Words: a *row* is what stands in the data (a dict from role to value, plus `row_id`); an *example* is one encoded
input of the model (one row may become many); a *batch* is collated tensors; an *output* is what the model says of
one example (numpy); a *prediction* is the JSON-able answer to one row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_serializer

from orchestrator.schema import Schema

if TYPE_CHECKING:
    import torch

BASE64_FILE = re.compile(r"[A-Za-z0-9+/\s]{100,}={0,2}\s*")
"""A file's content in a column of images or sounds. No path is so long without a dot, a dash or an underscore."""
PARTNER = "_partner"
"""Where a row to train on carries another one, for a task that `mixes`."""

Row = dict[str, Any]
Example = dict[str, Any]
Prediction = dict[str, Any]
Observation = dict[str, Any]
"""Nested dicts whose leaves are numbers; two observations are merged by adding the leaves."""


class RowError(ValueError):
    """One row cannot be used: prepare writes it to the quarantine with `column`, `expected` and `found`."""

    def __init__(self, column: str, expected: str, found: Any):
        super().__init__(f"column {column!r}: expected {expected}, found {found!r}")
        self.column, self.expected, self.found = column, expected, found

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.column, self.expected, self.found))


class Column(Schema):
    """One role that a task reads, for example `text` or `label`."""

    kind: Literal["text", "label", "number", "image", "audio", "any"]
    """image and audio: a path or URI (relative to the file it stands in), bytes, or what `datasets` writes."""
    required: bool = True
    target: bool = False
    """True for what the model learns to say: absent at prediction time."""
    optional_at_prediction: bool = False
    """A row to predict may have other inputs of the task instead, such as one text of a pair."""
    alternative: bool = False
    """One of the roles with this mark is enough, and one must be there: the same thing in several forms."""
    unless: str | None = None
    """Another role that may stand in for this one: where that has a column, this needs none."""
    aliases: tuple[str, ...] = ()
    """Other names that such a column often has: one is taken where the job names none and there is none of the role's name."""
    help: str = ""


class Parameters(Schema):
    """What a client may ask for beside its inputs; a task adds fields."""


class Task(Schema):
    """Base of all tasks. Subclasses are named by the key they have in `TASKS` or by `module:Class`."""

    modality: ClassVar[Literal["text", "image", "audio"]] = "text"
    """Of the processor that `processors.of` loads where the task has none of its own, and of what a request's raw body is."""
    parameters: ClassVar[type[Parameters]] = Parameters
    rows_at_once: ClassVar[int] = 512
    """Rows that are encoded and predicted together: fewer where an encoded row is large."""
    example_model: ClassVar[str | None] = None
    """What `init` writes as `model.base`; None: the model of the task's first recipe."""
    proposals: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Settings of which `init` proposes those that fit the data best; the first where several do."""
    model_types: ClassVar[Mapping[str, str]] = {}
    """Kinds of model that are the task's own and unknown to transformers: model type -> `module:ConfigClass`, for `config://`."""
    augments: ClassVar[bool] = False
    """Whether `encode_to_train` differs from `encode`, so that each epoch encodes anew."""
    joint: ClassVar[bool] = False
    """Whether the loss is one of the whole global batch, as where rows are told from each other: no sum of what each row loses.
    Such a task has `represent`, `relation`, `joint_loss` and `split_loss` in place of `loss`."""

    @property
    def mixes(self) -> bool:
        """Whether `encode_to_train` is to find another row of the same file in `row[PARTNER]`: one drawn anew in each epoch."""
        return False

    @property
    def key(self) -> str:
        """Its name in the `task:` section; of a task from outside the product `my_pkg.my_task:MyTask`."""
        from orchestrator.tasks import name_of

        return name_of(type(self))

    @model_serializer(mode="wrap")
    def _with_name(self, handler: Any) -> dict[str, Any]:
        return {"name": self.key, **handler(self)}

    # ---- data ------------------------------------------------------------------------------------------------
    def columns(self) -> dict[str, Column]:
        """Role -> what must stand in it. Checked against the files before any row is read."""
        raise NotImplementedError

    def clean(self, row: Row) -> Row:
        """The canonical form of a row (roles only, JSON-able values), or `RowError`. Idempotent.

        Targets may be absent (prediction). Called once for every row before anything else sees it.
        """
        raise NotImplementedError

    def check_target(self, row: Row) -> None:
        """Raises `RowError` where a clean row lacks what is learnt from it or what scores it: asked by prepare, not for prediction.

        For tasks whose target stands within an input, so that the columns alone don't say whether a row has it.
        """

    def joined(self, row: Row, following: Row) -> Row | None:
        """One clean row in place of two that follow one another in a file, or None: they stay two rows.

        Asked by prepare, not for prediction; the row keeps the id of its first. For tasks that read neighbouring rows as one text.
        """
        return None

    def observe(self, rows: Sequence[Row]) -> Observation:
        """What `fit` must know of these clean rows, as counts: small, and independent of the number of rows."""
        return {"rows": len(rows)}

    def fit(self, observed: Mapping[str, Observation]) -> Self:
        """The completed task (label names, class weights, …) from each split's merged observation.

        Raises `InputError` for what can't be learnt from: one class only, labels in `test` that `train` lacks, …
        """
        return self

    def remarks(self, observed: Mapping[str, Observation]) -> list[str]:
        """Sentences on each split's rows that a person should read before training on them; what can't be used, `fit` refuses."""
        return []

    def stratum(self, row: Row) -> str | None:
        """The group within which a split keeps its shares, usually the label; None: no stratification."""
        return None

    @classmethod
    def fits(cls, columns: Sequence[str], rows: Sequence[Row], format: str) -> float:
        """How likely some data are this task's, from 0 (no row can be used) to 1: `init` proposes the likeliest.

        `columns` and `rows` are as they stand in files of that `format`. The default looks for columns with the names of the roles,
        else with such values, and cleans the rows.
        """
        from orchestrator.errors import InputError
        from orchestrator.tasks.guessing import fits

        try:
            return max(fits(cls.parse(settings), rows) for settings in cls.proposals)
        except InputError:  # it has keys without a default
            return 0.0

    @classmethod
    def proposed(cls, rows: Sequence[Row]) -> Self:
        """The task with those of its `proposals` that fit the data best."""
        from orchestrator.tasks.guessing import fits

        return max(map(cls.parse, cls.proposals), key=lambda task: fits(task, rows))

    def self_contained(self, row: Row) -> Row:
        """The row with all that it refers to in it (files as `data:` URIs): it is kept in the bundle, to be asked again elsewhere."""
        return row

    # ---- tensors ---------------------------------------------------------------------------------------------
    def encode(self, rows: Sequence[Row], processor: Any) -> list[list[Example]]:
        """For each row its examples; with targets where the row has them. Batched because tokenizers are."""
        raise NotImplementedError

    def encode_to_train(self, rows: Sequence[Row], processor: Any, seeds: Sequence[int]) -> list[list[Example]]:
        """As `encode`, augmented or masked at random where the task says `augments`.

        What is drawn for a row depends on its seed alone, which is another in each epoch and the same on any number of workers.
        """
        return self.encode(rows, processor)

    def token_view(self, row: Row, processor: Any) -> list[tuple[str, bool]]:
        """The tokens of a clean row as the model learns from it, and whether each counts in the loss; empty where nothing is left out."""
        return []

    def length(self, example: Example) -> int:
        """What an example costs of a token budget, before padding."""
        return len(example["input_ids"])

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
        """Pads examples to one batch. Extra keys that the model does not take must not be in it."""
        raise NotImplementedError

    # ---- model -----------------------------------------------------------------------------------------------
    def processor(self, base: str, **from_hub: Any) -> Any | None:
        """A processor of the task's own, from the base model (local folder or hub id) or a bundle; None: that of the modality."""
        return None

    def complete_processor(self, processor: Any) -> Any:
        """The processor as this task needs it, from the one that was loaded: a chat template, language codes. It is saved with the model."""
        return processor

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of labels that answers have, which the model's config must know too; None: answers have none."""
        return getattr(self, "labels", None)

    def check_base(self, base: str, **from_hub: Any) -> None:
        """Raises `InputError` where the base model (local folder or hub id) can't do this task; reads its config, no weights."""

    def model(self, base: str, **options: Any) -> torch.nn.Module:
        """The module to train, from a local folder or hub id; `options` go to `from_pretrained`."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor], *, label_smoothing: float = 0.0) -> tuple[torch.Tensor, float]:
        """Sum (not mean) of the losses of a batch, and the number of items it is a sum over."""
        raise NotImplementedError

    def represent(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What `joint_loss` sees of each example of a batch: float32 of shape (examples, …), one row each."""
        raise NotImplementedError

    def relation(self, example: Example) -> Any:
        """What `joint_loss` must know of an example beside its representation: small, and plain enough to go to other workers."""
        raise NotImplementedError

    def joint_loss(
        self, representations: torch.Tensor, relations: Sequence[Any], *, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, float]:
        """Sum of the losses of a global batch, and the number of items it is a sum over; a row's examples stand together, in order.

        It depends on nothing else, not on the model's weights either, and not on the order of the rows.
        """
        raise NotImplementedError

    def infer(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[Any]:
        """One numpy output for each example; the model is in eval mode and gradients are off. Ignores targets."""
        raise NotImplementedError

    def spell(self, outputs: Sequence[Any], processor: Any) -> list[Any]:
        """Outputs of `infer` with what only the processor knows of them, such as the texts of tokens, for `decode`."""
        return list(outputs)

    # ---- answers ---------------------------------------------------------------------------------------------
    def decode(self, row: Row, outputs: Sequence[Any]) -> Prediction:
        """The prediction for a row from the outputs of its examples."""
        raise NotImplementedError

    @property
    def most_predicted(self) -> int | None:
        """Rows of a split that are predicted and scored while training and in the evaluation; None: all. The loss is of all rows.

        For tasks whose `infer` costs far more than their `loss`, as where a text is generated.
        """
        return None

    def split_loss(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> float:
        """The loss per item of a split, for `joint` tasks: of fixed groups of its rows, so that it is the same wherever they are predicted."""
        raise NotImplementedError

    def of_loss(self, loss: float) -> dict[str, float]:
        """Metrics that follow from the loss per item of a whole split, such as the perplexity."""
        return {}

    def metrics(self) -> tuple[str, ...]:
        """Names that `score` and `of_loss` know, the default ones first."""
        raise NotImplementedError

    def calibrate(self, metrics: Mapping[str, float]) -> Self:
        """The task as it is served: with the thresholds that `score` found in the best validation (empty: there was none).

        Asked once, when the bundle is written; evaluation, golden rows and the endpoint have what it gives.
        """
        return self

    @property
    def objective(self) -> str:
        """The metric by which checkpoints and versions are compared when the job names none."""
        return self.metrics()[0]

    def higher_is_better(self, metric: str) -> bool:
        """The direction of a metric; every metric named `*loss*` or in `lower_is_better` falls."""
        return "loss" not in metric and metric not in self.lower_is_better

    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    def score(self, predictions: Sequence[Prediction], rows: Sequence[Row], metrics: Sequence[str] | None = None) -> dict[str, float]:
        """Named numbers over predictions and the rows they answer; `metrics` chooses, None: the defaults."""
        raise NotImplementedError

    def tables(self, predictions: Sequence[Prediction], rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """Tables for the run folder, each a list of flat dicts, for example `per_class` and `confusion_matrix`."""
        return {}

    def agree(self, one: Prediction, other: Prediction, tolerance: float) -> bool:
        """Do two predictions for the same row say the same, numbers within `tolerance`?"""
        return close(one, other, tolerance)

    def difference(self, one: Prediction, other: Prediction) -> float:
        """The largest difference between numbers of two predictions that `agree` compares; inf where they are of another shape."""
        return largest_difference(one, other)

    # ---- HTTP ------------------------------------------------------------------------------------------------

    def inputs_schema(self) -> dict[str, Any]:
        """JSON Schema of the `inputs` of a request."""
        raise NotImplementedError

    def inputs_example(self) -> Any:
        """An example of `inputs`, shown on the endpoint's pages."""
        raise NotImplementedError

    def probe(self) -> list[Row]:
        """Clean rows that cost little, asked of an idle endpoint again and again: does it still answer?"""
        return self.rows_from(self.inputs_example())

    def rows_from(self, inputs: Any, parameters: Any = None) -> list[Row]:
        """The clean rows in the `inputs` of a Hugging Face Inference request; `InputError` where they don't fit.

        `inputs` is bytes where the body was an image or a sound. `parameters` (of the class `self.parameters`; None: its
        defaults) matter here only where they change what the model is asked. Raised from a `RowError` it means well-formed
        inputs that cannot be used, such as an empty text.
        """
        raise NotImplementedError

    def inputs_from(self, row: Row) -> Any:
        """The `inputs` that ask for one row: `rows_from(inputs_from(row))` is this row without its targets."""
        raise NotImplementedError

    def answer(self, predictions: Sequence[Prediction], parameters: Any, *, single: bool) -> Any:
        """The JSON body that Hugging Face clients expect; `single` when `inputs` was one item, not a list."""
        raise NotImplementedError

    def answer_schema(self) -> dict[str, Any]:
        """JSON Schema of what `answer` returns."""
        raise NotImplementedError

    def replay_parameters(self) -> Parameters:
        """The parameters with which an endpoint is asked where its answers are compared: such that the answers say all that may differ."""
        return self.parameters()

    def answer_difference(self, one: Any, other: Any) -> float:
        """The largest difference between numbers of two answers to the same request; inf where they say different things."""
        return largest_difference(one, other)


def close(one: Any, other: Any, tolerance: float) -> bool:
    """Equality of JSON values, numbers within `tolerance` (absolute)."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=0.0, abs_tol=tolerance) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(close(one[key], other[key], tolerance) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other, strict=True))
    return one == other


def largest_difference(one: Any, other: Any) -> float:
    """The largest absolute difference between the numbers in two JSON values; inf where anything else differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return max((largest_difference(one[key], other[key]) for key in one), default=0.0) if one.keys() == other.keys() else math.inf
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return max((largest_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0) if len(one) == len(other) else math.inf
    if isinstance(one, (int, float)) and isinstance(other, (int, float)) and not isinstance(one, bool) and not isinstance(other, bool):
        return abs(one - other)
    return 0.0 if one == other else math.inf
