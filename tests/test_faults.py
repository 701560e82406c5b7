"""Faults: memory, numbers, signals, killed processes, damaged files, disks, pipes."""

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

import train
from data import KLUE_LABELS
from metrics import write_predictions
from tests import fault_task
from tests.helpers import ROOT, SAMPLE

FAULT_TASK = fault_task.__file__
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def small(encoder_folder, out, *more):
    """Arguments of a short run that saves every 3 of its 18 steps."""
    arguments = f"--data {SAMPLE} --model {encoder_folder} --out {out} --amp off --limit 260"
    arguments += " --split stratified --batch-size 30 --epochs 2 --lr 1e-3 --save-every 3"
    return [*arguments.split(), *map(str, more)]


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
    """The folder of a run without faults."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "train.py", *small(encoder_folder, folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return folder


@pytest.fixture(scope="session")
def undisturbed_on_two(tmp_path_factory, encoder_folder):
    """The folder of a run without faults on two processes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [*TORCHRUN, "train.py", *small(encoder_folder, folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    return folder


# --- memory and numbers -------------------------------------------------------------------------


def check_smaller_micro_batches(stdout):
    expected = r"out of memory(?: at step 1)?: 2\d\d tokens per micro-batch from now on"
    assert re.search(expected, stdout)
    assert stdout.count("out of memory") == 1


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_split_into_smaller_micro_batches(
    call, encoder_folder, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAULT", "memory:300")
    check_smaller_micro_batches(call(fault_task, *small(encoder_folder, "a")).out)
    assert_same(tmp_path / "a", undisturbed, exactly=False)


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True])
def test_all_processes_split_a_batch_that_does_not_fit_on_one(
    run, encoder_folder, undisturbed, tmp_path, monkeypatch, graphs
):
    monkeypatch.setenv("FAULT", "memory:300")
    if graphs:
        monkeypatch.setenv("GRAPHS", "1")
    done = run(FAULT_TASK, *small(encoder_folder, "a"), processes=2)
    check_smaller_micro_batches(done.stdout)
    assert_same(tmp_path / "a", undisturbed, exactly=False)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_of_graphs_train_the_same_model_and_resume_with_the_same_bits(
    run, encoder_folder, undisturbed, tmp_path, monkeypatch, processes
):
    """With two processes the gradients are summed without DistributedDataParallel."""
    monkeypatch.setenv("GRAPHS", "1")
    run(FAULT_TASK, *small(encoder_folder, "whole"), processes=processes)
    assert_same(tmp_path / "whole", undisturbed, exactly=False)
    every = ("--save-every", 4)
    run(FAULT_TASK, *small(encoder_folder, "parts", *every), processes=processes)
    (tmp_path / "parts/last.pt").unlink()  # previous.pt is of step 20
    run(FAULT_TASK, *small(encoder_folder, "parts", *every), processes=processes)
    assert_same(tmp_path / "parts", tmp_path / "whole", exactly=True)


def test_a_sentence_that_does_not_fit_is_an_error(call, encoder_folder, monkeypatch):
    monkeypatch.setenv("FAULT", "memory:3")
    done = call(fault_task, *small(encoder_folder, "a"), code=2)
    assert "out of memory with one sentence per micro-batch" in done.err


def test_steps_that_are_not_finite_are_skipped_and_counted(
    call, encoder_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAULT", "nan:2,3,10")
    done = call(fault_task, *small(encoder_folder, "a"))
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert (summary["skipped"], summary["step"]) == (3, 18)
    assert "3 steps skipped" in done.err
    assert all(value.isfinite().all() for value in weights(tmp_path / "a").values())


def test_many_skipped_steps_in_a_row_end_the_run_and_leave_an_intact_model(
    call, encoder_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAULT", f"nan:{','.join(map(str, range(7, 98)))}")
    done = call(fault_task, *small(encoder_folder, "a", "--epochs", 9), code=2)
    assert "steps in a row skipped" in done.err
    assert len([x for x in done.err.splitlines() if x.startswith("fault_task.py:")]) == 1
    assert all(value.isfinite().all() for value in weights(tmp_path / "a").values())


# --- stopping and resuming ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_finish_and_saves(
    call, encoder_folder, undisturbed, tmp_path, monkeypatch, number, code
):
    monkeypatch.setenv("FAULT", f"signal:{int(number)}")
    stopped = call(fault_task, *small(encoder_folder, "a"), code=code)
    assert "stopped after step 8 of 18; the same command resumes" in stopped.out
    assert "Traceback" not in stopped.err
    assert "resuming after step 8" in call(train, *small(encoder_folder, "a")).out
    assert_same(tmp_path / "a", undisturbed)


@pytest.mark.slow
def test_a_second_signal_ends_the_program_at_once(run, encoder_folder, monkeypatch):
    monkeypatch.setenv("FAULT", f"signals:{int(signal.SIGTERM)}")
    done = run(FAULT_TASK, *small(encoder_folder, "a"), code=-signal.SIGTERM)
    assert "stopped after" not in done.stdout


@pytest.mark.slow
def test_a_signal_to_torchrun_saves(encoder_folder, run, undisturbed_on_two, tmp_path):
    command = [*TORCHRUN, ROOT / "train.py", *small(encoder_folder, "a")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    torchrun = subprocess.Popen(command, cwd=tmp_path, text=True, **pipes)
    for _ in range(600):
        if (tmp_path / "a/last.pt").exists():
            break
        time.sleep(0.1)
    torchrun.send_signal(signal.SIGTERM)
    output = torchrun.communicate(timeout=60)[0]
    assert torchrun.returncode != 0
    assert "stopped after step" in output
    run("train.py", *small(encoder_folder, "a"), processes=2)
    assert_same(tmp_path / "a", undisturbed_on_two)


@pytest.mark.slow
def test_torchrun_restarts_after_a_rank_was_killed(
    encoder_folder, undisturbed, undisturbed_on_two, tmp_path, monkeypatch
):
    monkeypatch.setenv("FAULT", f"signal:{int(signal.SIGKILL)}")
    command = [*TORCHRUN, "--max-restarts=3", FAULT_TASK, *small(encoder_folder, "a", "--fresh")]
    options = {"capture_output": True, "text": True, "timeout": 200, "check": False}
    done = subprocess.run(command, cwd=tmp_path, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after step 6" in done.stdout
    assert_same(tmp_path / "a", undisturbed_on_two)
    assert_same(tmp_path / "a", undisturbed, exactly=False)


# --- damaged files, other data ------------------------------------------------------------------


@pytest.mark.slow
def test_a_damaged_last_pt_is_named_and_the_save_before_it_is_used(
    call, encoder_folder, undisturbed, tmp_path
):
    shutil.copytree(undisturbed, tmp_path / "a")
    last, previous = tmp_path / "a/last.pt", tmp_path / "a/previous.pt"
    good = previous.read_bytes()
    last.write_bytes(last.read_bytes()[:5000])
    done = call(train, *small(encoder_folder, "a"))
    assert "last.pt: truncated" in done.out
    assert "previous.pt: resuming after step 15" in done.out
    assert_same(tmp_path / "a", undisturbed)
    assert previous.read_bytes() == good

    last.write_bytes(b"")
    previous.write_bytes(b"s")
    done = call(train, *small(encoder_folder, "a"), code=2)
    assert "previous.pt: truncated" in done.err
    done = call(train, *small(encoder_folder, "a", "--fresh"))
    assert "resuming" not in done.out
    assert_same(tmp_path / "a", undisturbed)


def test_a_run_does_not_resume_with_other_rows_or_another_encoder(call, encoder_folder, tmp_path):
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    arguments = small("encoder", "a", "--epochs", 1, "--limit", 60)
    call(fault_task, *arguments)
    refused = call(train, *arguments, "--valid", SAMPLE / "test_data.csv", code=2)
    assert "last.pt: saved with valid = '', now" in refused.err
    assert "which has other rows; use --fresh, or another --out" in refused.err
    expected = "last.pt: saved with other rows, targets, focal alphas or encoder; use --fresh"

    stored = load_file(tmp_path / "encoder/model.safetensors")
    name = next(name for name in stored if "layer.0" in name)
    stored[name].view(-1)[0] += 1e-6
    save_file(stored, tmp_path / "encoder/model.safetensors", {"format": "pt"})
    assert expected in call(train, *arguments, code=2).err


# --- disks and pipes ----------------------------------------------------------------------------


def limit_file_size(n_bytes):
    """A preexec_fn: in the new process, larger files fail as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def vote(tmp_path):
    """The command of a vote, with the file that it reads."""
    probs = np.eye(30)[:5]
    ids = [str(i) for i in range(5)]
    write_predictions(tmp_path / "in/a.csv", ids, KLUE_LABELS[:5], probs)
    return ["ensemble.py", "in/a.csv"]


def test_a_full_disk_leaves_the_old_file(run, tmp_path):
    command = vote(tmp_path)
    (tmp_path / "submission.csv").write_text("old")
    done = run(*command, code=2, preexec_fn=limit_file_size(100))
    assert done.stderr.strip() == "ensemble.py: submission.csv: cannot be written: File too large"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "submission.csv"]
    assert (tmp_path / "submission.csv").read_text() == "old"


@pytest.mark.slow
def test_a_full_disk_while_training_is_one_line_and_leaves_the_old_checkpoint(
    run, encoder_folder, undisturbed, tmp_path
):
    shutil.copytree(undisturbed, tmp_path / "a")
    before = (tmp_path / "a/ckpt.pt").read_bytes()
    arguments = small(encoder_folder, "a", "--epochs", 3, "--fresh")
    done = run("train.py", *arguments, code=2, preexec_fn=limit_file_size(1_000_000))
    expected = "train.py: a/last.pt: cannot be written: File too large"
    assert done.stderr.strip().splitlines()[-1] == expected
    assert "Traceback" not in done.stderr
    assert (tmp_path / "a/ckpt.pt").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_one_line(run, call, tmp_path, encoder_folder):
    command = vote(tmp_path)
    (tmp_path / "file").write_text("")
    done = run(*command, "--out", "file/a.csv", code=2)
    assert done.stderr.strip() == "ensemble.py: file/a.csv: cannot be written: File exists"
    done = call(train, *small(encoder_folder, "file/a"), code=2)
    assert done.err.strip().splitlines()[-1].startswith("train.py: ")
    assert "Traceback" not in done.err


def test_a_closed_pipe_is_one_line(tmp_path):
    program, *arguments = vote(tmp_path)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / program, *arguments]
    pipes = {"stdout": writer, "stderr": subprocess.PIPE}
    done = subprocess.run(command, cwd=tmp_path, text=True, check=False, **pipes)
    os.close(writer)
    assert done.returncode == 2
    assert done.stderr.strip() == "ensemble.py: [Errno 32] Broken pipe"
    assert (tmp_path / "submission.csv").exists()


@pytest.mark.slow
def test_runs_killed_at_random_end_with_the_weights_of_undisturbed_ones(run):
    """tools/faults.py with two runs, on one process and on two; seed 8 kills both in a save."""
    done = run("tools/faults.py", "--runs", 2, "--seed", 8)
    assert "damaged files: 0; identical weights: 2" in done.stdout
