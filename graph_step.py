"""The optimiser step with CUDA graphs: a few launches instead of thousands.

step = make_step(task, settings)     # GraphStep where CUDA graphs are possible, else TrainStep
step.prepare(batches)                # records one graph per size, before an epoch
loss, skipped = step(batches[0], 0, lr)
"""

import warnings
from dataclasses import replace

import numpy as np
import torch

from graphs import CudaRecorder, EagerRecorder, HalfWeights, is_capturable
from settings import TrainingSettings
from step import TrainStep
from task import Task
from tokens import Batch, padded_size


def make_step(task: Task, settings: TrainingSettings) -> TrainStep:
    """A GraphStep if all processes can record their steps."""
    recorder = task.recorder
    capturable = settings.cuda_graphs and is_capturable(task.model, task.worker)
    if recorder is None and not task.worker.any(not capturable):
        recorder = CudaRecorder()
    return GraphStep(task, settings, recorder) if recorder else TrainStep(task, settings)


class GraphStep(TrainStep):
    """A TrainStep whose gradients and update are graphs.

    The gradients are views of one fp32 tensor, which all processes sum in one all-reduce. The
    weights of linear layers have half-precision copies, which spare a cast in every pass.
    """

    def __init__(self, task: Task, settings: TrainingSettings, recorder):
        super().__init__(task, settings)
        self.recorder, self.model, device = recorder, task.model, self.worker.device
        for tensor in self.model.state_dict().values():
            self.worker.broadcast(tensor)
        self.half = HalfWeights(self.model, self.worker)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        parameters.sort(key=lambda p: p not in self.half.copies)
        sizes = [-(-p.numel() // 128) * 128 for p in parameters]  # aligned for vector loads
        self.flat = torch.zeros(sum(sizes), device=device)
        n_half = sum(sizes[: len(self.half.copies)])
        self.flat_half = torch.zeros(n_half, dtype=self.worker.amp, device=device)
        self.buffers = {}  # where the gradient of each parameter goes
        for p, part in zip(parameters, self.flat.split(sizes)):
            self.buffers[p] = p.grad = part[: p.numel()].view_as(p)
        for p, part in zip(self.half.copies, self.flat_half.split(sizes[: len(self.half.copies)])):
            self.buffers[p] = part[: p.numel()].view_as(p)
        self.pairs = [(p, self.half.copies.get(p, p)) for p in parameters]
        self.scale = torch.zeros((), device=device)  # of the losses in this step
        scales = [group["scale"] for group in self.optimizer.param_groups]
        self.scales = torch.tensor(scales, device=device)
        self.rates = torch.zeros_like(self.scales)  # learning rates
        self.longest = -(-int(task.lengths.max()) // 128) * 128
        self.passes, self.replay_update = {}, None

    # --- recording ----------------------------------------------------------------------------

    def prepare(self, batches: list[np.ndarray]):
        """Record the passes of an epoch's batches, the largest first: the others fit its memory."""
        self.model.train()  # an evaluation has changed it
        if self.replay_update is None:
            self.prepare_update()
        lengths, max_tokens = self.task.lengths, self.max_tokens
        while True:
            missing = {}
            for indices in batches:
                for i, part in enumerate(self.micro_batches(indices)[0]):
                    key = padded_size(int(lengths[part].sum())), self.slots(len(part)), i > 0
                    if key not in self.passes:
                        missing[key] = part
            try:
                for key in sorted(missing, reverse=True):
                    self.pass_of(self.padded_batch(missing[key], 0), key[2])
                out_of_memory = False
            except torch.OutOfMemoryError:
                out_of_memory = True
            if not self.worker.any(out_of_memory):
                break
            self.shrink_micro_batches(max(batches, key=lambda indices: lengths[indices].sum()))
        if self.max_tokens < max_tokens:
            self.task.log(f"out of memory: {self.max_tokens} tokens per micro-batch from now on")

    def slots(self, n: int) -> int:
        """The number of sentences that a micro-batch of n is padded to."""
        if getattr(self.settings, "norm", "") == "batch":
            return n  # its statistics would count missing sentences
        return -(-self.settings.batch_size // self.worker.world_size)

    def padded_batch(self, part: np.ndarray, step: int) -> Batch:
        batch = self.task.batch(part, step)
        return batch.pad(padded_size(len(batch.ids)), self.slots(len(part)), self.longest)

    def pass_of(self, batch: Batch, add: bool):
        """(static inputs, function that computes the gradients of what they hold)."""
        key = len(batch.ids), len(batch.labels), add
        if key not in self.passes:
            static = batch.to(self.worker.device)
            saved = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
            try:
                self.passes[key] = static, self.recorded(lambda: self.record_pass(static, add))
            finally:
                for buffer, before in saved:  # a warm-up must not change running statistics
                    buffer.copy_(before)
        return self.passes[key]

    def recorded(self, record):
        """The result of `record`, which from the first failed capture on runs eagerly."""
        try:
            return record()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(self.recorder, EagerRecorder):
                raise
            reason = str(error).splitlines()[0]
            self.task.log(f"CUDA graphs failed, training continues without them: {reason}")
            self.recorder = EagerRecorder()
            return record()

    def record_pass(self, static: Batch, add: bool):
        if hasattr(self.model, "rnn"):
            return self.record_around_rnn(static, add)

        def forward_backward():
            with self.half.in_use():
                loss = self.task.loss(self.model, static) * self.scale
            self.store(self.pairs, self.gradients_of(self.scaler.scale(loss), self.pairs), add)
            self.store_half(add)
            return loss.detach()

        self.recorder.warm_up(forward_backward)
        replay = self.recorder.record(forward_backward)
        return lambda batch: replay()

    def record_around_rnn(self, static: Batch, add: bool):
        """Two graphs: the forward and the backward pass of the encoder. The head runs eagerly.

        An RNN over packed sequences needs the lengths on the CPU.
        """
        names = ("encoder", "entity_embeddings")
        below = {p for name in names for p in getattr(self.model, name).parameters()}
        inside = [pair for pair in self.pairs if pair[0] in below]
        above = [pair for pair in self.pairs if pair[0] not in below]
        states_gradient, held = None, {}

        def forward():
            with self.half.in_use(), self.worker.autocast():
                held["states"] = self.model.encode(static)
            return held["states"].detach()

        def backward():
            self.store(inside, self.gradients_of(held["states"], inside, states_gradient), add)
            self.store_half(add)

        def warm_up():
            nonlocal states_gradient
            states_gradient = torch.zeros_like(forward())
            backward()

        self.recorder.warm_up(warm_up)
        replay_forward = self.recorder.record(forward)
        replay_backward = self.recorder.record(backward)

        def run(batch: Batch) -> torch.Tensor:
            states = replay_forward().detach().requires_grad_()
            current = replace(static, lengths=batch.lengths, indices=batch.indices)

            def read(batch: Batch) -> torch.Tensor:
                return self.model.classify(self.model.last_rnn_states(states, batch))

            with self.half.in_use():
                loss = self.task.loss(read, current) * self.scale
            head = [(states, states), *above]
            gradient, *gradients = self.gradients_of(self.scaler.scale(loss), head)
            self.store(above, gradients, add)
            states_gradient.copy_(gradient)
            replay_backward()
            return loss.detach()

        return run

    @staticmethod
    def gradients_of(outputs, pairs, gradient=None) -> tuple:
        inputs = [used for _, used in pairs]
        return torch.autograd.grad(outputs, inputs, gradient, allow_unused=True)

    def store(self, pairs, gradients, add: bool):
        """Copy or add gradients to p.grad, for pairs (parameter p, its copy in use).

        Those in half precision are only collected: `store_half` converts all of them at once.
        """
        half, full = [], []
        for (p, _), gradient in zip(pairs, gradients):
            if gradient is None:
                p.grad = None  # unused: a zero gradient would let weight decay change it
            else:
                (half if p in self.half.copies else full).append((self.buffers[p], gradient))
        for found, is_sum in ((half, False), (full, add)):
            if found:
                (torch._foreach_add_ if is_sum else torch._foreach_copy_)(*map(list, zip(*found)))

    def store_half(self, add: bool):
        flat = self.flat[: len(self.flat_half)]
        flat.add_(self.flat_half) if add else flat.copy_(self.flat_half)

    # --- one step -----------------------------------------------------------------------------

    def gradients(self, indices: np.ndarray, step: int) -> torch.Tensor | None:
        if not self.model.training:  # an evaluation within the epoch has changed it
            self.model.train()
        parts, weight = self.micro_batches(indices)
        total, out_of_memory = torch.zeros((), device=self.worker.device), False
        try:
            batches = [self.padded_batch(part, step) for part in parts]
            passes = [self.pass_of(batch, i > 0) for i, batch in enumerate(batches)]
            torch.manual_seed(self.dropout_seed(step))  # after warm-ups, which draw numbers too
            self.scale.fill_(weight / self.worker.world_size)
            for batch, (static, run) in zip(batches, passes):
                batch.copy_to(static)
                total += run(batch).nan_to_num(0, 0, 0)
        except torch.OutOfMemoryError:
            out_of_memory = True
        if self.worker.any(out_of_memory):
            return None
        self.worker.sum(self.flat)
        return total

    def shrink_micro_batches(self, indices: np.ndarray):
        self.passes.clear()
        self.recorder = type(self.recorder)()  # a new pool: the old one is freed
        super().shrink_micro_batches(indices)

    def set_lr(self, lr: float):
        if self.scaler.is_enabled():
            super().set_lr(lr)
        else:
            torch.mul(self.scales, lr, out=self.rates)

    def zero_grad(self):
        """Nothing: the first pass of a step overwrites the gradients."""

    def prepare_update(self):
        """Record the update. Called after a resumed run has loaded weights and optimiser."""
        self.half.refresh()
        self.replay_update = super().update
        if self.scaler.is_enabled():  # its scale is a number on the CPU
            return
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group |= {"lr": rate, "capturable": self.worker.device.type == "cuda"}
        self.replay_update = self.recorded(self.record_update)

    def record_update(self):
        recorder = type(self.recorder)()  # a pool of its own: that of the passes may be freed
        self.flat.fill_(float("nan"))  # the warm-up creates the optimiser's state and is skipped
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*capturable=True")  # a warm-up is not captured
            recorder.warm_up(self.clip_and_step)
        self.flat.zero_()
        return recorder.record(self.clip_and_step)

    def clip_and_step(self) -> torch.Tensor:
        norm = self.flat.norm()
        skipped = 1 - norm.isfinite().float()
        self.optimizer.found_inf = skipped
        if self.settings.clip_norm:  # AdamW divides by it: spares a pass over the gradients
            self.optimizer.grad_scale = ((norm + 1e-6) / self.settings.clip_norm).clamp(min=1)
        self.optimizer.step()
        self.half.refresh()
        return skipped

    def update(self) -> torch.Tensor:
        skipped = self.replay_update()
        if self.scaler.is_enabled():
            self.half.refresh()
        return skipped
