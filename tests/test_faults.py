"""What must hold when something fails: memory, numbers, signals, processes, disks, pipes."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data import KLUE_LABELS
from metrics import write_predictions
from tests.conftest import ROOT, SAMPLE


def small(encoder_folder, out, *more):
    settings = f"--data {SAMPLE} --model {encoder_folder} --out {out} --amp off --limit 260 --split stratified"
    return [*settings.split(), *"--batch-size 30 --epochs 2 --lr 1e-3 --save-every 3".split(), *more]  # 18 steps


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["weights"]


def assert_same(folder, other, exactly=True):
    for name, value in weights(folder).items():
        if exactly:
            assert torch.equal(value, weights(other)[name]), name
        else:
            torch.testing.assert_close(value, weights(other)[name], rtol=0, atol=2e-4)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, encoder_folder):
    """Folders of the same run, nothing having happened to it, on one process and on two."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp("whole") / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = command if processes > 1 else command[:1]
        command += ["train.py", *small(encoder_folder, folders[processes])]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return folders


@pytest.fixture
def patched(tmp_path, run):
    """Runs train.py with a few lines put in before it starts."""

    def patched(lines, *arguments, **kwargs):
        script = tmp_path / "patched.py"
        start = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, model, train\n"
        script.write_text(start + lines + "\ntrain.main()\n")
        return run(script, *arguments, **kwargs)

    return patched


FULL_MEMORY = """
forward = model.RelationModel.forward
def limited(self, batch):
    if self.training and len(batch.ids) > 300 and os.environ.get("RANK", "1") == "1":
        raise torch.OutOfMemoryError("planted")
    return forward(self, batch)
model.RelationModel.forward = limited
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_that_does_not_fit_is_done_in_smaller_parts(patched, encoder_folder, undisturbed, tmp_path, processes):
    done = patched(FULL_MEMORY, *small(encoder_folder, "a"), processes=processes)
    assert re.search(r"out of memory at step 1: from now on 2\d\d tokens at a time", done.stdout)
    assert done.stdout.count("out of memory") == 1
    assert_same(tmp_path / "a", undisturbed[1], exactly=False)


def test_a_sentence_that_does_not_fit_is_said(patched, encoder_folder):
    done = patched(FULL_MEMORY.replace("> 300", "> 3"), *small(encoder_folder, "a"), code=2)
    assert "out of memory with one sentence at a time" in done.stderr


BAD_NUMBERS = """
loss, calls = train.relation_loss, []
def poisoned(*arguments):
    calls.append(1)
    return loss(*arguments) * (float("nan") if len(calls) in BAD else 1.0)
train.relation_loss = poisoned
"""


def test_steps_that_are_not_finite_are_skipped_and_counted(patched, encoder_folder, tmp_path):
    done = patched(BAD_NUMBERS.replace("BAD", "(3, 4, 11)"), *small(encoder_folder, "a"))
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert (summary["skipped"], summary["step"]) == (3, 18)
    assert "3 steps skipped" in done.stderr
    assert all(value.isfinite().all() for value in weights(tmp_path / "a").values())


def test_too_many_in_a_row_stop_the_run_and_leave_a_good_model(patched, encoder_folder, tmp_path):
    done = patched(BAD_NUMBERS.replace("BAD", "range(8, 99)"), *small(encoder_folder, "a", "--epochs", "9"), code=2)
    assert "steps in a row" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("patched.py:")]) == 1
    assert all(value.isfinite().all() for value in weights(tmp_path / "a").values())


# --- stopped and gone on -----------------------------------------------------------------------------------------

AT_STEP = """
step = train.learning_rate
def at_step(settings, n, steps):
    if n == 7 and os.environ.get("RANK", "1") == "1" and not os.path.exists("done"):
        open("done", "w").close()
        ACT
    return step(settings, n, steps)
train.learning_rate = at_step
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(patched, run, encoder_folder, undisturbed, tmp_path, number, code):
    lines = AT_STEP.replace("ACT", f"signal.raise_signal({int(number)})")
    done = patched(lines, *small(encoder_folder, "a"), code=code)
    assert "stopped after step 8 of 18 and saved; the same command goes on" in done.stdout
    assert "Traceback" not in done.stderr
    done = run("train.py", *small(encoder_folder, "a"))
    assert "going on after step 8" in done.stdout
    assert_same(tmp_path / "a", undisturbed[1])


def test_a_second_signal_stops_at_once(patched, encoder_folder):
    act = "signal.raise_signal(15); import time; time.sleep(1.1); signal.raise_signal(15)"
    done = patched(AT_STEP.replace("ACT", act), *small(encoder_folder, "a"), code=-signal.SIGTERM)
    assert "stopped after" not in done.stdout


def test_a_signal_to_torchrun_saves(encoder_folder, run, undisturbed, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    command += small(encoder_folder, "a")
    torchrun = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        if (tmp_path / "a" / "last.pt").exists():
            break
        time.sleep(0.1)
    torchrun.send_signal(signal.SIGTERM)
    output = torchrun.communicate(timeout=60)[0]
    assert torchrun.returncode != 0
    assert "stopped after step" in output
    run("train.py", *small(encoder_folder, "a"), processes=2)
    assert_same(tmp_path / "a", undisturbed[2])


def test_torchrun_restarts_after_a_rank_was_killed(encoder_folder, undisturbed, tmp_path):
    lines = AT_STEP.replace("ACT", "os.kill(os.getpid(), signal.SIGKILL)")
    start = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch, model, train\n"
    (tmp_path / "patched.py").write_text(start + lines + "\ntrain.main()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    command += ["patched.py", *small(encoder_folder, "a", "--fresh")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "done").exists()
    assert "going on after step 6" in done.stdout
    assert_same(tmp_path / "a", undisturbed[2])
    assert_same(tmp_path / "a", undisturbed[1], exactly=False)


def test_a_torn_last_pt_is_named_and_the_one_before_is_used(run, encoder_folder, undisturbed, tmp_path):
    run("train.py", *small(encoder_folder, "a"))
    last, previous = tmp_path / "a" / "last.pt", tmp_path / "a" / "previous.pt"
    good = previous.read_bytes()
    last.write_bytes(last.read_bytes()[:5000])
    done = run("train.py", *small(encoder_folder, "a"))
    assert "last.pt: truncated" in done.stdout
    assert "previous.pt: going on after step 15" in done.stdout
    assert_same(tmp_path / "a", undisturbed[1])
    assert previous.read_bytes() == good

    last.write_bytes(b"")
    previous.write_bytes(b"s")
    done = run("train.py", *small(encoder_folder, "a"), code=2)
    assert "previous.pt: truncated" in done.stderr
    done = run("train.py", *small(encoder_folder, "a", "--fresh"))
    assert "going on" not in done.stdout
    assert_same(tmp_path / "a", undisturbed[1])
    other_rows = run("train.py", *small(encoder_folder, "a", "--valid", SAMPLE / "test_data.csv"), code=2)
    assert "made with other rows" in other_rows.stderr

    # another encoder at the same place
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    run("train.py", *small("encoder", "b"))
    stored = load_file(tmp_path / "encoder" / "model.safetensors")
    name = next(name for name in stored if "layer.0" in name)
    stored[name].view(-1)[0] += 1e-6
    save_file(stored, tmp_path / "encoder" / "model.safetensors", {"format": "pt"})
    other = run("train.py", *small("encoder", "b"), code=2)
    assert "last.pt: made with other rows, alphas or encoder than now" in other.stderr


# --- disks and pipes ---------------------------------------------------------------------------------------------


def vote(tmp_path):
    probs = np.eye(30)[:5]
    write_predictions(tmp_path / "in" / "a.csv", [str(i) for i in range(5)], KLUE_LABELS[:5], probs)
    return [sys.executable, str(ROOT / "ensemble.py"), "in/a.csv"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    command = vote(tmp_path)
    (tmp_path / "submission.csv").write_text("old")

    def limit_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit_size, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "ensemble.py: submission.csv: cannot be written: File too large"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "submission.csv"]
    assert (tmp_path / "submission.csv").read_text() == "old"


def test_a_full_disk_while_training_is_one_line_and_leaves_the_old_checkpoint(run, encoder_folder, tmp_path):
    run("train.py", *small(encoder_folder, "a"))
    before = {name: (tmp_path / "a" / name).read_bytes() for name in ("last.pt", "previous.pt", "ckpt.pt")}

    def limit_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    torn = [*small(encoder_folder, "a"), "--epochs", "3", "--fresh"]
    for name in ("last.pt", "previous.pt"):
        shutil.copy(tmp_path / "a" / name, tmp_path / name)
    done = run("train.py", *torn, code=2, preexec_fn=limit_size)
    assert done.stderr.strip().splitlines()[-1] == "train.py: a/last.pt: cannot be written: File too large"
    assert "Traceback" not in done.stderr
    assert (tmp_path / "a" / "ckpt.pt").read_bytes() == before["ckpt.pt"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, run, encoder_folder):
    vote(tmp_path)
    (tmp_path / "file").write_text("")
    done = run("ensemble.py", "in/a.csv", "--out", "file/a.csv", code=2)
    assert done.stderr.strip() == "ensemble.py: file/a.csv: cannot be written: File exists"
    done = run("train.py", *small(encoder_folder, "file/a"), code=2)
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: ")
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_one_line(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(vote(tmp_path), cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr.strip() == "ensemble.py: [Errno 32] Broken pipe"
    assert (tmp_path / "submission.csv").exists()


def test_two_processes_killed_at_random_end_as_if_undisturbed():
    """The short version of tests/faults.py: one run on one process, one on two."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "faults.py"), "--runs", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torn files 0; identical weights 2" in done.stdout
