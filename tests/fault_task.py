"""train.py with a fault, for test_faults.py, which names the fault in the variable FAULT:

    memory:300      out of memory in micro-batches of over 300 tokens
    nan:2,3,10      the loss of these steps is not a number
    signal:15       a signal to this process at step 7, on its first start only
    signals:15      the same, and once more after 1.1 seconds

With the variable GRAPHS the steps are those of CUDA graphs, which run eagerly.

If there are two processes, memory and signals concern rank 1 only.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import exit_on_error
from distributed import restart_count
from graphs import EagerRecorder
from settings import Settings, parse_settings
from task import RelationTask
from tests import varlen_on_cpu
from train import run


def fault(name: str) -> list[int]:
    """The numbers of the fault in FAULT; empty if it names another one."""
    found, _, numbers = os.environ.get("FAULT", "").partition(":")
    return [int(number) for number in numbers.split(",")] if found == name else []


class FaultyTask(RelationTask):
    recorder = EagerRecorder() if "GRAPHS" in os.environ else None

    def batch(self, indices: np.ndarray, step: int):
        n_tokens, self.step = self.lengths[indices].sum(), step
        is_last = self.worker.rank == self.worker.world_size - 1
        if is_last and any(n_tokens > limit for limit in fault("memory")):
            raise torch.OutOfMemoryError("planted")
        return super().batch(indices, step)

    def loss(self, model, batch) -> torch.Tensor:
        factor = float("nan") if self.step in fault("nan") else 1
        return super().loss(model, batch) * factor

    def log_evaluation(self, writer, step: int):
        pass  # drawing figures takes seconds


def on_step(step: int):
    if step != 7 or os.environ.get("RANK", "1") != "1" or restart_count():
        return
    for number in fault("signal") + fault("signals"):
        signal.raise_signal(number)
    for number in fault("signals"):
        time.sleep(1.1)
        signal.raise_signal(number)


@exit_on_error
def main():
    if FaultyTask.recorder:
        varlen_on_cpu.install()
    run(parse_settings(Settings, "train.py", ""), FaultyTask, on_step)


if __name__ == "__main__":
    main()
