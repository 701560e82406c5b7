"""CUDA graphs: record what a function launches once, and replay it in one launch.

    recorder = CudaRecorder()
    recorder.warm_up(function)             # once on the recorder's stream
    replay = recorder.record(function)
    result = replay()                      # the tensors that function() returned, with new values

    forward = GraphedForward(model, worker, n_sentences=500, longest=256)
    logits = forward(batch)

Shapes and addresses are constant in a graph: batches are padded to a few sizes (tokens.Batch.pad)
and copied into the same memory. graph_step.py records training steps.
"""

from contextlib import contextmanager
from functools import cache
from threading import get_ident

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from attention import LayerNorm, has_kernel
from distributed import Worker
from encoder import FlatEncoder
from tokens import Batch, padded_size


@cache
def capture_stream(device: int, thread: int):
    """One stream for all recorders of a GPU and a thread: cuBLAS keeps a workspace for each stream,
    and what another thread launches on it would be recorded too."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Records what functions launch on the current GPU. Its graphs share a memory pool."""

    def __init__(self):
        self.stream = capture_stream(torch.cuda.current_device(), get_ident())
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function):
        """Run a function on the recorder's stream: libraries initialise, memory may run out."""
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                function()
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, function):
        """A function that replays what `function` launches, and returns the same tensors."""
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the stream: that of a failed capture stays the current one.
        # thread_local: the thread that saves may use CUDA meanwhile.
        how = {"stream": self.stream, "capture_error_mode": "thread_local"}
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.stream(current), torch.cuda.graph(graph, self.pool, **how):
                result = function()
        except RuntimeError:
            # torch 2.11 leaves the generator of dropout in its state of a capture; another ends it
            with torch.cuda.graph(torch.cuda.CUDAGraph(), **how):
                torch.zeros((), device="cuda")
            raise

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


def is_capturable(model: FlatEncoder, worker: Worker) -> bool:
    """Whether the encoder never waits for the GPU: it needs the attention kernel."""
    if not model.is_flat:
        return False
    config = model.encoder.config
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return head_dim > 0 and has_kernel(worker.device, worker.amp, head_dim)


class HalfWeights:
    """Copies in half precision of the weights that autocast would cast in each pass."""

    def __init__(self, model: nn.Module, worker: Worker):
        kinds = nn.Linear, Conv1D
        if worker.amp == torch.bfloat16 and worker.device.type == "cuda":
            kinds += (LayerNorm,)
        owners = {}
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    owners.setdefault(weight, []).append((module, name))
        self.places, self.copies = [], {}  # (module, name, weight); the copy of each weight
        for weight, places in owners.items():
            only_here = all(isinstance(module, kinds) for module, _ in places)
            if worker.amp and weight.requires_grad and only_here:
                self.copies[weight] = weight.detach().to(worker.amp).requires_grad_()
                self.places += [(*place, weight) for place in places]

    def refresh(self):
        """Copy the weights after an update."""
        if self.copies:
            with torch.no_grad():
                torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    @contextmanager
    def in_use(self):
        """The modules compute with the copies in this block."""
        for module, name, weight in self.places:
            module._parameters[name] = self.copies[weight]
        try:
            yield
        finally:
            for module, name, weight in self.places:
                module._parameters[name] = weight


class GraphedForward:
    """The logits of batches of at most n_sentences sentences, by one graph per padded size.

    Call it inside inference mode and autocast, which keeps the cast weights until the block ends.
    """

    def __init__(self, model: FlatEncoder, worker: Worker, n_sentences: int, longest: int,
                 recorder=None):  # fmt: skip
        self.model, self.worker, self.recorder = model, worker, recorder or CudaRecorder()
        self.n_sentences, self.longest = n_sentences, longest
        self.passes = {}

    def __call__(self, batch: Batch) -> torch.Tensor:
        if self.recorder is None:
            return self.model(batch.to(self.worker.device))
        padded = batch.pad(padded_size(len(batch.ids)), self.n_sentences, self.longest)
        try:
            static, replay = self.pass_of(padded)
        except RuntimeError:  # also out of memory; the result is the same without graphs
            self.recorder = None
            self.passes.clear()
            torch.cuda.empty_cache()
            return self(batch)
        padded.copy_to(static)
        return replay()[: len(batch.indices)]

    def pass_of(self, padded: Batch):
        """(static inputs, function that computes the logits of what they hold)."""
        key = len(padded.ids)
        if key not in self.passes:
            static = padded.to(self.worker.device)
            self.recorder.warm_up(lambda: self.model(static))
            self.passes[key] = static, self.recorder.record(lambda: self.model(static))
        return self.passes[key]
