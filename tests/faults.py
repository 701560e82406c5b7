"""Kills trainings at random moments and looks at what is left.

    python tests/faults.py                         # 20 runs on the sample, on one and two processes by turns
    python tests/faults.py --runs 4 --seed 7

Each run is killed by SIGKILL, up to three times, some of them just while a checkpoint is being written; after each
kill its files are opened, and it is started again by the same command until it ends. At the end its weights are
compared, bit by bit, with those of a run that nothing happened to.
"""

import argparse
import csv
import os
import random
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

from data import Template, read_rows  # noqa: E402
from model import MODEL_FORMAT, PROGRESS_FORMAT, DamagedFile, load_checkpoint  # noqa: E402
from tests.sample.tiny_encoder import make_tiny_encoder  # noqa: E402


def start(folder: Path, encoder: Path, processes: int) -> subprocess.Popen:
    """A short training that saves after every second step."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["train.py", "--data", "tests/sample", "--model", encoder, "--out", folder, "--limit", "400"]
    command += "--split stratified --batch-size 30 --epochs 3 --lr 1e-3 --head bilstm --save-every 2".split()
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def kill_some_time(training: subprocess.Popen, folder: Path, rng: random.Random) -> bool:
    """Waits for the first checkpoint and a random while, or for a file being written, and kills. False if the
    training ended before."""
    while not (folder / "last.pt").exists() and training.poll() is None:
        time.sleep(0.01)
    deadline, while_writing = time.monotonic() + rng.uniform(0, 2.5), rng.random() < 0.5
    while training.poll() is None and time.monotonic() < deadline:
        if while_writing and any(folder.glob(".*.tmp")):
            break
        time.sleep(0.0005)
    if training.poll() is not None:
        return False
    os.kill(training.pid, signal.SIGSTOP)  # torchrun starts no further process then
    family = [training.pid, *children(training.pid)]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    training.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        time.sleep(0.01)
    return True


def children(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [grandchild for child in found for grandchild in children(child)]


def torn_files(folder: Path) -> list[str]:
    """The files of a run folder that cannot be read whole."""
    torn = []
    for path in folder.glob("*.pt"):
        try:
            load_checkpoint(path, MODEL_FORMAT if path.name == "ckpt.pt" else PROGRESS_FORMAT)
        except DamagedFile:
            torn.append(path.name)
    for path in folder.glob("*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))
        if len({len(row) for row in rows}) != 1:
            torn.append(path.name)
    return torn


def finish(training: subprocess.Popen, folder: Path) -> dict[str, torch.Tensor]:
    if training.wait(timeout=300) != 0:
        raise RuntimeError(f"the training failed: see {folder.with_suffix('.log')}")
    return torch.load(folder / "last.pt", weights_only=True)["weights"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="runs to disturb (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    texts = [Template().render(row).text for row in read_rows(ROOT / "tests" / "sample" / "train.csv")]
    make_tiny_encoder(str(work / "encoder"), texts, seed=0)

    whole = {}
    for n in (1, 2):
        folder = work / f"whole-{n}"
        whole[n] = finish(start(folder, work / "encoder", n), folder)
    kills, in_writing, torn, identical = 0, 0, [], 0
    for i in range(arguments.runs):
        processes, folder, killed = 1 + i % 2, work / f"run-{i}", 0
        for _ in range(rng.randint(1, 3)):
            training = start(folder, work / "encoder", processes)
            if not kill_some_time(training, folder, rng):
                break
            killed += 1
            in_writing += any(folder.glob(".*.tmp"))
            torn += torn_files(folder)
        weights = finish(start(folder, work / "encoder", processes), folder)
        same = all(torch.equal(weights[name], value) for name, value in whole[processes].items())
        kills, identical = kills + killed, identical + same
        outcome = "identical" if same else "DIFFERENT"
        print(f"run {i}: {processes} processes, killed {killed} times, {outcome}", flush=True)
    print(f"\n{arguments.runs} runs survived {kills} kills, {in_writing} of them while a file was being written")
    print(f"torn files {len(torn)}; identical weights {identical}")
    sys.exit(0 if not torn and identical == arguments.runs else 1)


if __name__ == "__main__":
    main()
