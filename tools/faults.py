"""Kill training runs at random moments, and check their files and final weights.

    python tools/faults.py                         # 20 runs on the sample
    python tools/faults.py --runs 4 --seed 7

The runs use one process and two processes in turn. Each is killed by SIGKILL up to three times,
half of the time while a checkpoint is being written. After each kill its files are read, and the
same command is run again. Its final weights must be bit-identical to those of an undisturbed run.
"""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

from checkpoint import MODEL_FORMAT, PROGRESS_FORMAT, DamagedFile, load_checkpoint  # noqa: E402
from common import Parser, exit_on_error  # noqa: E402
from data import Template  # noqa: E402
from rows import read_rows  # noqa: E402
from sample.tiny_encoder import make_tiny_encoder  # noqa: E402


def start(folder: Path, encoder: Path, n_processes: int) -> subprocess.Popen:
    """Start a short training run that saves every second step, or resume it."""
    command = [sys.executable]
    if n_processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        command += [*torchrun, f"--nproc_per_node={n_processes}"]
    command += ["train.py", "--data", "sample", "--model", encoder, "--out", folder]
    command += "--limit 400 --split stratified --batch-size 30 --epochs 3 --lr 1e-3".split()
    command += ["--head", "bilstm", "--save-every", "2"]
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def start_and_kill(folder: Path, encoder: Path, n_processes: int, rng: random.Random) -> bool:
    """Start the run and kill its processes at a random moment; False if it ended before.

    The moment is at most 2.5 seconds after its first save. Half of the time it is already the
    next moment in which a file is being written.
    """
    for path in folder.glob(".*.tmp"):  # left by the kill before
        path.unlink()
    before = time_of_save(folder)
    training = start(folder, encoder, n_processes)
    while time_of_save(folder) == before and training.poll() is None:
        time.sleep(0.01)
    deadline, while_writing = time.monotonic() + rng.uniform(0, 2.5), rng.random() < 0.5
    while training.poll() is None and time.monotonic() < deadline:
        if while_writing and is_being_written(folder):
            break
        time.sleep(0.0005)
    if training.poll() is not None:
        return False
    os.kill(training.pid, signal.SIGSTOP)  # so that torchrun starts no other process
    pids = [training.pid, *descendants(training.pid)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    training.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.01)
    return True


def time_of_save(folder: Path) -> float:
    path = folder / "last.pt"
    return path.stat().st_mtime if path.exists() else 0.0


def is_being_written(folder: Path) -> bool:
    return any(folder.glob(".*.tmp"))


def descendants(pid: int) -> list[int]:
    """The process ids of the children of a process, and of theirs."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [descendant for c in children for descendant in (int(c), *descendants(int(c)))]


def damaged_files(folder: Path) -> list[str]:
    """The names of the files in a run folder that cannot be read, or are incomplete."""
    damaged = []
    for path in folder.glob("*.pt"):
        try:
            load_checkpoint(path, MODEL_FORMAT if path.name == "ckpt.pt" else PROGRESS_FORMAT)
        except DamagedFile:
            damaged.append(path.name)
    for path in folder.glob("*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            n_cells = {len(cells) for cells in csv.reader(file, strict=True)}
        if len(n_cells) != 1:
            damaged.append(path.name)
    return damaged


def final_weights(training: subprocess.Popen, folder: Path) -> dict[str, torch.Tensor]:
    """Wait for the run to end; return its last weights."""
    if training.wait(timeout=300) != 0:
        raise RuntimeError(f"the run failed: see {folder.with_suffix('.log')}")
    return load_checkpoint(folder / "last.pt", PROGRESS_FORMAT)["weights"]


@exit_on_error
def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="number of runs (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    encoder = work / "encoder"
    texts = [Template().render(row).text for row in read_rows(ROOT / "sample/train.csv")]
    make_tiny_encoder(str(encoder), texts, seed=0)

    undisturbed = {}
    for n_processes in (1, 2):
        folder = work / f"undisturbed-{n_processes}"
        undisturbed[n_processes] = final_weights(start(folder, encoder, n_processes), folder)
    n_kills, n_while_writing, damaged, n_identical = 0, 0, [], 0
    for i in range(arguments.runs):
        n_processes, folder, killed = 1 + i % 2, work / f"run-{i}", 0
        for _ in range(rng.randint(1, 3)):
            if not start_and_kill(folder, encoder, n_processes, rng):
                break
            killed += 1
            n_while_writing += is_being_written(folder)
            damaged += damaged_files(folder)
        weights = final_weights(start(folder, encoder, n_processes), folder)
        expected = undisturbed[n_processes]
        identical = all(torch.equal(weights[name], expected[name]) for name in expected)
        n_kills, n_identical = n_kills + killed, n_identical + identical
        outcome = "identical" if identical else "DIFFERENT"
        print(f"run {i}: {n_processes} processes, killed {killed} times, {outcome}", flush=True)
    print(f"\n{arguments.runs} runs, {n_kills} kills, {n_while_writing} while a file was written")
    print(f"damaged files: {len(damaged)}; identical weights: {n_identical}")
    if damaged or n_identical < arguments.runs:
        sys.exit(f"the files and logs are in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
