"""The optimiser step with CUDA graphs: a few launches instead of thousands.

    step = make_step(task, settings)     # GraphStep where CUDA graphs are possible, else TrainStep
    step.prepare(batches)                # records one graph per size, before an epoch
    loss, skipped = step(batches[0], 0, lr)

A graph records the kernels of a forward and backward pass once, and launches all of them at once
in each later step. Shapes and addresses are constant in it: batches are padded to a few sizes
(tokens.Batch.pad), and inputs, weights and gradients stay in the same memory.
"""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from attention import LayerNorm, has_kernel
from encoder import FlatEncoder
from settings import TrainingSettings
from step import TrainStep
from task import Task
from tokens import Batch, padded_size


class CudaRecorder:
    """Records what functions launch. All graphs share a stream and a memory pool."""

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, function):
        """Run a function on the recorder's stream: libraries initialise, memory may run out."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function):
        """A function that replays what `function` launches, and returns the same tensors."""
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the stream: that of a failed capture stays the current one.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
        ):
            result = function()

        def replay():
            graph.replay()
            return result

        return replay


class EagerRecorder:
    """Runs functions instead of recording them."""

    def warm_up(self, function):
        function()

    def record(self, function):
        return function


def make_step(task: Task, settings: TrainingSettings) -> TrainStep:
    recorder = task.recorder
    if recorder is None and settings.cuda_graphs and is_capturable(task.model, task.worker):
        recorder = CudaRecorder()
    return GraphStep(task, settings, recorder) if recorder else TrainStep(task, settings)


def is_capturable(model: FlatEncoder, worker) -> bool:
    """Whether no part of a training step waits for the GPU: needs the attention kernel."""
    config = model.encoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return model.is_flat and has_kernel(worker.device, worker.amp, head_dim)


class GraphStep(TrainStep):
    """A TrainStep whose gradients and update are graphs.

    The gradients are views of one fp32 tensor, which all processes sum in one all-reduce. The
    weights of linear layers have half-precision copies, which spare a cast in every pass.
    """

    def __init__(self, task: Task, settings: TrainingSettings, recorder, fuse=False):
        super().__init__(task, settings)
        self.recorder, self.model, device = recorder, task.model.train(), self.worker.device
        for tensor in self.model.state_dict().values():
            self.worker.broadcast(tensor)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        sizes = [-(-p.numel() // 128) * 128 for p in parameters]  # aligned for vector loads
        self.flat = torch.zeros(sum(sizes), device=device)
        for p, part in zip(parameters, self.flat.split(sizes)):
            p.grad = part[: p.numel()].view_as(p)
        self.half = half_weights(self.model, device, self.worker.amp)
        in_use = {weight: half for _, _, weight, half in self.half}
        self.pairs = [(p, in_use.get(p, p)) for p in parameters]
        self.scale = torch.zeros((), device=device)  # of the losses in this step
        scales = [group["scale"] for group in self.optimizer.param_groups]
        self.scales = torch.tensor(scales, device=device)
        self.rates = torch.zeros_like(self.scales)  # learning rates
        self.longest = -(-int(task.lengths.max()) // 128) * 128
        self.passes, self.replay_update = {}, None
        # the last layer has another hook in each pass
        self.fused = [
            (layer, torch.compile(layer._call_impl, dynamic=True, fullgraph=True))
            for layer in (self.model.layers()[:-1] if fuse else [])
        ]

    # --- recording ----------------------------------------------------------------------------

    def prepare(self, batches: list[np.ndarray]):
        """Record the passes of an epoch's batches, the largest first: the others fit its memory."""
        if self.replay_update is None:
            self.prepare_update()
        lengths = self.task.lengths
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
                return
            self.shrink_micro_batches(max(batches, key=lambda indices: lengths[indices].sum()))

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
            self.passes[key] = static, self.recorded(lambda: self.record_pass(static, add))
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
            with self.training_weights():
                loss = self.task.loss(self.model, static) * self.scale
            self.store(self.pairs, self.gradients_of(self.scaler.scale(loss), self.pairs), add)
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
            with self.training_weights(), self.worker.autocast():
                held["states"] = self.model.encode(static)
            return held["states"].detach()

        def backward():
            self.store(inside, self.gradients_of(held["states"], inside, states_gradient), add)

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

            with self.training_weights():
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

    @staticmethod
    def store(pairs, gradients, add: bool):
        """Copy or add gradients to p.grad, for pairs (parameter p, its copy in use)."""
        stored = []
        for (p, _), gradient in zip(pairs, gradients):
            if gradient is None:
                p.grad = None  # unused: a zero gradient would let weight decay change it
            else:
                stored.append((p.grad, gradient))
        (torch._foreach_add_ if add else torch._foreach_copy_)(*map(list, zip(*stored)))

    @contextmanager
    def training_weights(self):
        """Use the half-precision copies of the weights, and compiled layers."""
        for module, name, _, half in self.half:
            module._parameters[name] = half
        for layer, fused in self.fused:
            layer._compiled_call_impl = fused
        try:
            yield
        finally:
            for layer, _ in self.fused:
                layer._compiled_call_impl = None
            for module, name, weight, _ in self.half:
                module._parameters[name] = weight

    # --- one step -----------------------------------------------------------------------------

    def gradients(self, indices: np.ndarray, step: int) -> torch.Tensor | None:
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
        self.copy_weights()
        self.replay_update = super().update
        if self.scaler.is_enabled():  # its scale is a number on the CPU
            return
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group |= {"lr": rate, "capturable": self.worker.device.type == "cuda"}
        self.flat.fill_(float("nan"))  # the warm-up creates the optimiser's state and is skipped
        self.recorder.warm_up(self.clip_and_step)
        self.flat.zero_()
        self.replay_update = self.recorded(lambda: self.recorder.record(self.clip_and_step))

    def clip_and_step(self) -> torch.Tensor:
        norm = self.flat.norm()
        skipped = 1 - norm.isfinite().float()
        self.optimizer.found_inf = skipped
        if self.settings.clip_norm:  # AdamW divides by it: spares a pass over the gradients
            self.optimizer.grad_scale = ((norm + 1e-6) / self.settings.clip_norm).clamp(min=1)
        self.optimizer.step()
        self.copy_weights()
        return skipped

    def update(self) -> torch.Tensor:
        skipped = self.replay_update()
        if self.scaler.is_enabled():
            self.copy_weights()
        return skipped

    def copy_weights(self):
        if self.half:
            with torch.no_grad():
                weights, halves = ([place[i] for place in self.half] for i in (2, 3))
                torch._foreach_copy_(halves, weights)


def half_weights(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> list[tuple]:
    """(module, name, weight, copy in half precision) of the weights that autocast would cast."""
    if dtype is None:
        return []
    kinds = nn.Linear, Conv1D
    if dtype == torch.bfloat16 and device.type == "cuda":
        kinds += (LayerNorm,)
    places = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                places.setdefault(weight, []).append((module, name))
    found = []
    for weight, owners in places.items():
        if weight.requires_grad and all(isinstance(module, kinds) for module, _ in owners):
            half = weight.detach().to(dtype).requires_grad_()
            found += [(module, name, weight, half) for module, name in owners]
    return found
