"""One optimiser step: gradients in micro-batches, gradient sync, clipping, AdamW.

    step = TrainStep(task, settings)
    loss, skipped = step(indices, number, lr)     # tensors: nothing waits for the device

graph_step.GraphStep is the same step with CUDA graphs.
"""

import gc
import math
import re

import numpy as np
import torch

from common import InputError
from distributed import Worker
from encoder import FlatEncoder
from settings import TrainingSettings
from task import Task
from tokens import within_tokens

LAYER = re.compile(r"encoder\..*?\.(\d+)\.")  # the number in a parameter's name

# --- the optimiser ----------------------------------------------------------------------------


def make_optimizer(model: FlatEncoder, settings: TrainingSettings) -> torch.optim.AdamW:
    """Fused AdamW. A group's learning rate is `scale` times that of the step.

    Weight decay applies to matrices only: vectors are biases and the scales of norms.
    """
    groups, named = {}, [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    # not the configuration's number: all layers of ALBERT share the weights of one
    found = [LAYER.match(name) for name, _ in named]
    n_layers = 1 + max((int(layer[1]) for layer in found if layer), default=0)
    for name, parameter in named:
        scale = settings.layer_decay ** layers_above(name, n_layers)
        weight_decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "scale": scale, "weight_decay": weight_decay}
        groups.setdefault((scale, weight_decay), group)["params"].append(parameter)
    betas = (0.9, settings.beta2)
    return torch.optim.AdamW(list(groups.values()), lr=settings.lr, betas=betas, fused=True)


def layers_above(name: str, n_layers: int) -> int:
    """How many layers are above a parameter, by its name; the head counts as one layer.

    New parameters, such as entity embeddings, are treated like the head.
    """
    if not name.startswith("encoder."):
        return 0
    norms = "norm|norm_f|final_norm|ln_f|ln_out|layer_norm|final_layer_norm"
    if re.match(rf"encoder\.(decoder\.)?({norms})\.", name):  # after the last layer
        return 1
    found = LAYER.match(name)
    return n_layers - int(found[1]) if found else n_layers + 1


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """Linear warmup from 0 to --lr, then linear decay to 0."""
    warmup = math.ceil(settings.warmup_ratio * steps)
    return settings.lr * min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1))


# --- one step ---------------------------------------------------------------------------------


def micro_batches(indices, lengths, worker: Worker, max_tokens: int, n_targets: int):
    """(this process's micro-batches of a batch, the weight of their summed losses).

    The loss of a batch is the mean over its `n_targets` loss terms, whatever the number of
    processes and micro-batches. DistributedDataParallel averages over processes, hence world_size.
    """
    mine = indices[worker.rank :: worker.world_size]
    if len(mine):
        return within_tokens(mine, lengths, max_tokens), worker.world_size / n_targets
    return [indices[:1]], 0.0  # fewer sentences than processes: take part in the gradient sync


class TrainStep:
    """One optimiser step: gradients of a batch in micro-batches, gradient sync, clipping, AdamW.

    When memory runs out, the step is repeated with smaller micro-batches. `settings` are resolved.
    """

    def __init__(self, task: Task, settings: TrainingSettings):
        self.task, self.settings, self.worker = task, settings, task.worker
        self.optimizer = make_optimizer(task.model, settings)
        is_fp16 = self.worker.amp == torch.float16
        self.scaler = torch.amp.GradScaler(self.worker.device.type, enabled=is_fp16)
        self.max_tokens = settings.max_tokens
        self.wrapped = None

    def prepare(self, batches: list[np.ndarray]):
        """Called with the batches of an epoch before its first step."""

    def __call__(self, indices: np.ndarray, step: int, lr: float):
        """(this process's share of the mean loss, 1 if skipped else 0), both on the device."""
        self.set_lr(lr)
        max_tokens = self.max_tokens
        while (loss := self.gradients(indices, step)) is None:
            self.shrink_micro_batches(indices)
        if self.max_tokens < max_tokens:
            found = f"out of memory at step {step + 1}"
            self.task.log(f"{found}: {self.max_tokens} tokens per micro-batch from now on")
        return loss, self.update()

    def set_lr(self, lr: float):
        for group in self.optimizer.param_groups:  # a run with CUDA graphs may have saved another
            group |= {"lr": lr * group["scale"], "capturable": False}

    def micro_batches(self, indices: np.ndarray):
        n_targets = self.task.n_targets[indices].sum()
        return micro_batches(indices, self.task.lengths, self.worker, self.max_tokens, n_targets)

    def zero_grad(self):
        self.optimizer.zero_grad()

    def dropout_seed(self, step: int) -> int:
        """Dropout is a pure function of seed, step and rank."""
        key = [self.settings.seed, step, self.worker.rank]
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def gradients(self, indices: np.ndarray, step: int) -> torch.Tensor | None:
        """Accumulate the gradients; returns this process's share of the mean loss, on the device.

        None if any process ran out of memory.
        """
        if self.wrapped is None:
            self.wrapped = self.worker.wrap(self.task.model)
        self.wrapped.train()
        worker, scaler = self.worker, self.scaler
        torch.manual_seed(self.dropout_seed(step))
        parts, weight = self.micro_batches(indices)
        total, out_of_memory = torch.zeros((), device=worker.device), False
        try:
            for part in parts:
                sync = worker.world_size > 1 and part is parts[-1]
                self.wrapped.require_backward_grad_sync = sync  # what no_sync() of DDP sets
                batch = self.task.batch(part, step).to(worker.device)
                loss = self.task.loss(self.wrapped, batch)
                total += (loss.detach() * weight / worker.world_size).nan_to_num(0, 0, 0)
                loss = scaler.scale(loss * weight)
                if not sync:
                    loss.backward()
        except torch.OutOfMemoryError:
            out_of_memory = True
        if worker.any(out_of_memory):
            return None
        if worker.world_size > 1:  # all processes got here: the gradient sync cannot hang
            loss.backward()
        return total

    def shrink_micro_batches(self, indices: np.ndarray):
        lengths = self.task.lengths[indices]
        if self.max_tokens < lengths.min():
            hint = "use a smaller --max-length or --model"
            raise InputError(f"out of memory with one sentence per micro-batch; {hint}")
        share = math.ceil(lengths.sum() / self.worker.world_size)
        self.max_tokens = min(self.max_tokens, share) // 2
        self.zero_grad()
        torch.cuda.empty_cache()
        self.wrapped = None  # a DistributedDataParallel interrupted in its forward is unusable
        gc.collect()  # reference cycles keep it, and its hooks would reduce gradients too

    def update(self) -> torch.Tensor:
        """Clip the gradients and update the weights; a non-finite gradient skips the update."""
        self.scaler.unscale_(self.optimizer)
        max_norm = self.settings.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), max_norm)
        skipped = 1 - norm.isfinite().float()
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = skipped  # a fused optimiser skips without a device sync
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.zero_grad()
        return skipped
