"""One optimizer step on one worker's part of a global batch. Accelerate places the model, casts and synchronises.

What a step does to the weights depends on the global batch alone: losses are sums over items, gradients are sums over
micro-batches and workers, and both are divided by the global number of items.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from orchestrator import batching
from orchestrator.dropout import Keys, row_keys
from orchestrator.errors import Diverged, InputError, StageError
from orchestrator.freezing import rates
from orchestrator.models import Precision
from orchestrator.tasks.base import Example, Task

if TYPE_CHECKING:
    from orchestrator.config import TrainingSection

CPU_TOKENS, CPU_PASS = 2048, batching.PASS
GPU_TOKENS, GPU_PASS = 16384, 4096
"""Padded tokens of a micro-batch, and what one more micro-batch costs, in tokens. On a CPU larger ones are not faster."""
LARGE_EMBEDDING = 1 << 20
"""Elements from which on an embedding's gradient is kept as the rows that a step touched."""
_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
"""Names of weights that do not decay, as in transformers.Trainer."""


@dataclass(frozen=True)
class Share:
    """One worker's part of one global batch."""

    step: int
    """Within the epoch, from 0."""
    row_ids: list[str]
    """The row of each example; a row that became many examples stands once for each of them."""
    examples: list[Example]
    borrowed: bool = False
    """The examples are another worker's and only keep this one busy: weight 0, not counted."""


@dataclass(frozen=True)
class Outcome:
    loss: float
    """Mean over the items of the global batch."""
    grad_norm: float
    """Of the mean's gradient, before clipping."""
    rows: int
    """Rows of the global batch."""


class Stepper:
    """A model, its optimizer and its schedule, in this process or in one of a process group that is already there."""

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        processor: Any,
        settings: TrainingSection,
        *,
        precision: Precision,
        total_steps: int,
        global_batch_size: int,
        keys: Keys,
    ):
        self.task, self.processor, self.settings, self.keys = task, processor, settings, keys
        self.accelerator = _accelerator(precision, settings.torch_compile, global_batch_size)
        self.device, self.rank, self.world = self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes
        tokens, self.pass_cost = (CPU_TOKENS, CPU_PASS) if self.device.type == "cpu" else (GPU_TOKENS, GPU_PASS)
        self.tokens = settings.tokens_per_micro_batch or tokens
        if settings.gradient_checkpointing:
            _checkpoint_gradients(model)
        self.model = model.to(self.device).train()
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        by_rows = self.accelerator.scaler is None and not settings.torch_compile
        self.embeddings = [EmbeddingRows(module, self.world) for module in _large_embeddings(model)] if by_rows else []
        self.optimizer = self._optimizer()
        self._rate = self._schedule(total_steps)
        self._wrapped: Any = None

    # ---- one step --------------------------------------------------------------------------------------------
    def step(self, number: int, share: Share) -> Outcome:
        """Trains on the global batch of optimizer step `number` (from 1), of which `share` is this worker's part.

        Every worker calls it for the same steps. Raises `Diverged` on every worker where the loss is not finite.
        """
        from accelerate.utils import set_seed

        if not share.examples or len(share.row_ids) != len(share.examples):
            raise ValueError(
                f"a share has a row id for each of its examples, of which there is one at least: {len(share.row_ids)}, {len(share.examples)}"
            )
        set_seed(int.from_bytes(hashlib.blake2b(f"{self.settings.seed}/{number}/{self.rank}".encode(), digest_size=4).digest(), "little"))
        row_key = row_keys(self.settings.seed, number, share.row_ids)
        groups = batching.micro_batches([self.task.length(example) for example in share.examples], self.tokens, self.pass_cost)
        weight = 0.0 if share.borrowed else 1.0
        if self._wrapped is None:
            self._wrapped = self._wrap([share.examples[place] for place in groups[-1]])
        losses, items = [], 0.0
        for group in groups:
            synchronise = group is groups[-1]
            with contextlib.nullcontext() if synchronise or self.world == 1 else self._wrapped.no_sync():
                self.keys.set([row_key[place] for place in group], self.device)
                loss, count = self._loss(self._wrapped, [share.examples[place] for place in group])
                self._backward(loss * weight)
            losses.append(loss.detach())
            items += count
        rows = 0 if share.borrowed else len(set(share.row_ids))
        counts = torch.tensor([items * weight, rows], dtype=torch.float64, device=self.device)
        totals = torch.cat([torch.stack(losses).sum(dtype=torch.float64).reshape(1) * weight, counts])
        if self.world > 1:
            dist.all_reduce(totals)
        for embedding in self.embeddings:
            embedding.collect()
        outcome = self._apply(number, totals, lambda: self._suspects(share, groups, losses))
        self.optimizer.zero_grad(set_to_none=True)
        for embedding in self.embeddings:
            embedding.clear()
        return outcome

    def learning_rate(self, number: int) -> float:
        """What optimizer step `number` (from 1) is made with."""
        return self.settings.learning_rate * self._rate(number - 1)

    def _loss(self, model: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, float]:
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in self.task.collate(examples, self.processor).items()}
        return self.task.loss(model, batch, label_smoothing=self.settings.label_smoothing_factor)

    def _backward(self, loss: torch.Tensor) -> None:
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _apply(self, number: int, totals: torch.Tensor, suspects: Any) -> Outcome:
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]
        gradients += [embedding.values for embedding in self.embeddings]
        norm = torch.nn.utils.get_total_norm(gradients)
        total, items, rows, norm = torch.cat([totals, norm.to(totals).reshape(1)]).tolist()
        scale = self.world / (items or 1.0)  # DistributedDataParallel has divided the sum by the number of workers.
        loss, norm = total / (items or 1.0), norm * scale
        finite = math.isfinite(norm)
        if not math.isfinite(loss) or (not finite and scaler is None):
            what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient became {norm}"
            raise Diverged(
                f"The {what} at step {number} (learning rate {self.learning_rate(number):.3g}), in the rows {suspects()}. "
                "Look at these rows, then try a lower training.learning_rate, a longer warmup_ratio, or precision: fp32."
            )
        clip = self.settings.max_grad_norm
        if finite:
            torch._foreach_mul_(gradients, scale * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0))  # pyright: ignore[reportPrivateImportUsage]
        for embedding in self.embeddings:
            embedding.fill()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(number) * group["share"]
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        return Outcome(loss=loss, grad_norm=norm, rows=int(rows))

    def _suspects(self, share: Share, groups: list[list[int]], losses: list[torch.Tensor]) -> str:
        """Row ids of the micro-batches without a finite loss, of all workers; of the whole batch where every loss is finite."""
        bad = [group for group, loss in zip(groups, losses, strict=True) if not torch.isfinite(loss)]
        mine = [] if share.borrowed else [[share.row_ids[place] for place in group] for group in (bad or groups)]
        found = [(bool(bad), mine)]
        if self.world > 1:
            gathered: list[Any] = [None] * self.world
            dist.all_gather_object(gathered, found[0])
            found = gathered
        certain = any(sure for sure, _ in found)
        ids = sorted({row for sure, named in found if sure == certain for group in named for row in group})
        return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")

    # ---- building --------------------------------------------------------------------------------------------
    def _wrap(self, examples: Sequence[Example]) -> Any:
        """The model inside Accelerate's autocast and, with other workers, DistributedDataParallel.

        A first backward pass shows whether some weights get no gradient, which DDP must know.
        """
        if self.world == 1:
            return self.accelerator.prepare_model(self.model, evaluation_mode=True)
        self._loss(self.model, examples)[0].backward()
        unused = torch.tensor(float(any(parameter.grad is None for parameter in self.trained.values())), device=self.device)
        dist.all_reduce(unused, op=dist.ReduceOp.MAX)
        self.optimizer.zero_grad(set_to_none=True)
        ours = {id(embedding.weight) for embedding in self.embeddings}
        names = [name for name, parameter in self.model.named_parameters() if id(parameter) in ours]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)
        for embedding in self.embeddings:
            dist.broadcast(embedding.weight.detach(), src=0)
        self.accelerator.ddp_handler.find_unused_parameters = bool(unused.item())
        self.accelerator.ddp_handler.broadcast_buffers = any(
            isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in self.model.modules()
        )
        wrapped = self.accelerator.prepare_model(self.model)
        wrapped.config = getattr(self.model, "config", None)  # Tasks may ask the model for it.
        return wrapped

    def close(self) -> None:
        """Leaves the model as it was given, but trained."""
        if self._wrapped is not None:
            self.accelerator.unwrap_model(self._wrapped, keep_fp32_wrapper=False)
            for name in ("_ddp_params_and_buffers_to_ignore", "_is_accelerate_prepared", "_original_forward"):
                self.model.__dict__.pop(name, None)
        for embedding in self.embeddings:
            embedding.close()
        self.accelerator.free_memory()

    def _optimizer(self) -> torch.optim.AdamW:
        still = {
            id(weight)
            for module in self.model.modules()
            if isinstance(module, torch.nn.LayerNorm)
            for weight in module.parameters(recurse=False)
        }
        own = rates(self.model, self.settings)
        groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self.trained.items():
            decays = id(parameter) not in still and not _NOT_DECAYED.search(name.lower())
            groups.setdefault((decays, own.get(name, 1.0)), []).append(parameter)
        s = self.settings
        return torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": s.weight_decay if decays else 0.0, "share": share}
                for (decays, share), parameters in groups.items()
            ],
            lr=s.learning_rate,
            betas=(s.adam_beta1, s.adam_beta2),
            eps=s.adam_epsilon,
            fused=True,
        )

    def _schedule(self, total_steps: int) -> Any:
        """The learning rate's factor as a function of the steps done: nothing to save, nothing to restore."""
        from transformers import get_scheduler

        s = self.settings
        warmup = s.warmup_steps or math.ceil(total_steps * s.warmup_ratio)
        scheduler = get_scheduler(s.lr_scheduler_type, self.optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
        return scheduler.lr_lambdas[0]  # pyright: ignore[reportAttributeAccessIssue]

    # ---- state -----------------------------------------------------------------------------------------------
    def weights(self) -> dict[str, torch.Tensor]:
        """What training changes of the model: trained weights and the buffers that belong to its state."""
        stored = self.model.state_dict().keys()
        return {name: weight.detach() for name, weight in self.trained.items()} | {
            name: buffer for name, buffer in self.model.named_buffers() if name in stored
        }

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Copies on the CPU of all tensors that a resumed run needs."""
        names = {id(parameter): name for name, parameter in self.trained.items()}
        moments = {
            f"{key}:{names[id(parameter)]}": tensor for parameter, values in self.optimizer.state.items() for key, tensor in values.items()
        }
        return {
            which: {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for which, tensors in (("model", self.weights()), ("optimizer", moments))
        }

    def scaler_state(self) -> dict[str, Any] | None:
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_weights(self, tensors: dict[str, torch.Tensor] | None) -> None:
        """Rank 0 gives the tensors of `weights`; every rank has them afterwards."""
        tensors = self._from_first(tensors)
        mine = self.weights()
        if mine.keys() != tensors.keys():
            raise StageError(
                f"The checkpoint's weights are not this model's: they differ in {', '.join(sorted(mine.keys() ^ tensors.keys())[:5])}."
            )
        for name, weight in mine.items():
            weight.copy_(tensors[name])

    def load_moments(self, tensors: dict[str, torch.Tensor] | None, scaler: dict[str, Any] | None) -> None:
        """Rank 0 gives the optimizer's tensors; every rank has them afterwards."""
        for name, tensor in self._from_first(tensors).items():
            key, _, weight = name.partition(":")
            self.optimizer.state[self.trained[weight]][key] = tensor.clone()
        if scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)

    def _from_first(self, tensors: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        if self.world == 1:
            assert tensors is not None
            return {name: tensor.to(self.device) for name, tensor in tensors.items()}
        shapes: list[Any] = [None if tensors is None else [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]]
        dist.broadcast_object_list(shapes, src=0)
        result = {}
        for name, shape, dtype in shapes[0]:
            result[name] = torch.empty(shape, dtype=dtype, device=self.device) if tensors is None else tensors[name].to(self.device)
            dist.broadcast(result[name], src=0)
        return result


def _accelerator(precision: Precision, compiled: bool, global_batch_size: int) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs, TorchDynamoPlugin

    # Accelerate keeps its settings for the whole process, and sets the threads where nobody has said how many: the worker has.
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", dynamic=True) if compiled else None,  # pyright: ignore[reportArgumentType]
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            GradScalerKwargs(init_scale=65536.0 / global_batch_size),  # torch's, for a sum of losses in place of a mean.
        ],
    )


def _checkpoint_gradients(model: Any) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(f"training.gradient_checkpointing: {type(model).__name__} does not support it; set it to false.")
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # transformers before it was renamed.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class EmbeddingRows:
    """The gradient of a large embedding as the rows that a step touched, which are few.

    So of a vocabulary of 30,000 (or 250,000) only the tokens of the global batch are summed, exchanged, measured and
    scaled. The optimizer gets a dense gradient all the same, and does to the other rows what it always does.
    """

    def __init__(self, module: torch.nn.Embedding, world: int):
        self.module, self.weight, self.world = module, module.weight, world
        self._dense = torch.zeros_like(self.weight)
        self._was_sparse, module.sparse = module.sparse, True
        self.rows = torch.empty(0, dtype=torch.int64)
        self.values = torch.empty(0)

    def collect(self) -> None:
        """After the backward passes: `rows` that some worker touched, and `values`, their gradients' mean over the workers."""
        found, self.weight.grad = self.weight.grad, None
        if found is None:
            self.rows, self.values = self._dense.new_empty(0, dtype=torch.int64), self._dense[:0]
        else:
            found = (found if found.is_sparse else found.to_sparse(1)).coalesce()  # Dense where the model uses the weights elsewhere too.
            self.rows, self.values = found.indices()[0], found.values()
        if self.world > 1:
            touched = torch.zeros(len(self._dense), dtype=torch.uint8, device=self._dense.device)
            touched[self.rows] = 1
            dist.all_reduce(touched, op=dist.ReduceOp.MAX)
            self._dense[self.rows] = self.values
            self.rows = touched.nonzero().squeeze(1)
            self.values = self._dense[self.rows]
            dist.all_reduce(self.values)
            self.values /= self.world

    def fill(self) -> None:
        """Before the optimizer's step: `values` as a dense gradient; none where the step did not use the embedding."""
        if len(self.rows):
            self._dense[self.rows] = self.values
            self.weight.grad = self._dense

    def clear(self) -> None:
        """After the optimizer's step."""
        self._dense[self.rows] = 0.0

    def close(self) -> None:
        self.module.sparse = self._was_sparse


def _large_embeddings(model: torch.nn.Module) -> list[torch.nn.Embedding]:
    """Trained large embeddings whose weights no other module has, as an output layer may."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is not None:
                owners[id(weight)] = owners.get(id(weight), 0) + 1
    return [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        and module.weight.requires_grad
        and module.weight.numel() >= LARGE_EMBEDDING
        and owners[id(module.weight)] == 1
    ]
