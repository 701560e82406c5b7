"""sweep.py: with a stand-in for train.py that takes no time, and once with train.py itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import optuna
import pytest

import sweep
from settings import Settings, as_argument, parse_settings
from tests.helpers import ROOT, SAMPLE

TRAIN = """
import argparse, json, os, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--seed", type=float, default=0)
parser.add_argument("--out", type=Path)
given = parser.parse_known_args()[0]
lr, progress = given.lr, given.out / "last.pt"
if lr == 13:
    sys.exit("a crash")
if lr == 14:
    print("no train.csv", file=sys.stderr)
    sys.exit(2)
print("resumed" if progress.exists() else "started", flush=True)
for number in range(1, 4):
    scores = [{"micro_f1": lr * n, "step": n} for n in range(1, number + 1)]
    summary = {"evaluations": scores, "best": scores[-1], "settings": {"best_metric": "micro_f1"}}
    (given.out / "summary.tmp").write_text(json.dumps(summary))
    os.replace(given.out / "summary.tmp", given.out / "summary.json")
    time.sleep(given.seed / 10)
    if lr == 15 and not progress.exists():
        (given.out / "pid").write_text(str(os.getpid()))
        progress.touch()
        time.sleep(60)
"""
INFER = """
import pathlib, sys
pathlib.Path("out").mkdir(exist_ok=True)
pathlib.Path(sys.argv[3]).write_text(sys.argv[1])
"""


@pytest.fixture
def quick(tmp_path):
    """The stand-ins for train.py and infer.py, as options of sweep.main."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "train.py").write_text(TRAIN)
    (programs / "infer.py").write_text(INFER)
    return {"programs": programs, "poll": 0.02, "heartbeat": 1}


@pytest.fixture
def space(tmp_path):
    """space(lr=[1, 2]) -> the arguments that search this space."""

    def space(**choices):
        (tmp_path / "space.json").write_text(json.dumps(choices))
        return ["--space", "space.json"]

    return space


@pytest.fixture
def propose(tmp_path):
    """propose(1, 2): the learning rates of the first trials."""

    def propose(*values):
        (tmp_path / "runs" / "sweep").mkdir(parents=True)
        url = f"sqlite:///{tmp_path}/runs/sweep/study.db"
        study = optuna.create_study(study_name="sweep", storage=url, direction="maximize")
        for value in values:
            study.enqueue_trial({"lr": value})

    return propose


@pytest.fixture
def start(tmp_path):
    """start(*arguments, **options of sweep.main): a sweep in a process that a test may kill."""
    started = []

    def start(*arguments, **options):
        program = f"from pathlib import PosixPath; import sweep; sweep.main(**{options})"
        command = [sys.executable, "-c", program, *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def study_of(tmp_path):
    return optuna.load_study(
        study_name="sweep", storage=f"sqlite:///{tmp_path}/runs/sweep/study.db"
    )


def states(tmp_path):
    return [trial.state.name for trial in study_of(tmp_path).trials]


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_default_space_has_only_settings():
    assert sweep.read_space(None, []) == sweep.SPACE


def test_arguments_are_those_of_train():
    expected = {"lr": 1e-5, "clean": False, "gelu": True, "entity_embedding": "plain"}
    given = [as_argument(name, value) for name, value in expected.items()]
    assert given[:3] == ["--lr=1e-05", "--no-clean", "--gelu"]
    settings = parse_settings(Settings, "train.py", "", given)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_finds_the_best_and_survives_a_crash(call, quick, space, propose, tmp_path):
    propose(1, 13, 2, 1, 2)
    fixed = ["--", "--head", "cls"]
    arguments = ["--trials", "5", "--top", "3", *space(lr=[1, 2, 13], epochs=[3]), *fixed]
    done = call(sweep, *arguments, **quick)
    assert states(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert [t.value for t in study_of(tmp_path).trials] == [3, None, 6, 3, 6]
    assert "a crash" in (tmp_path / "runs/sweep/trial-1/log").read_text()
    assert "runs/sweep/trial-1: a crash" in done.out
    table = done.out.split("\n\n")[1].splitlines()
    assert [line.split()[:3] for line in table] == [
        ["trial", "score", "state"],
        ["2", "6.00", "complete"],
        ["4", "6.00", "complete"],
        ["0", "3.00", "complete"],
        ["3", "3.00", "complete"],
        ["1", "–", "fail"],
    ]
    assert (
        "python train.py --head cls --lr=2 --epochs=3 --out runs/sweep/best-trial-2\n" in done.out
    )
    importance = done.out.split("importance of each setting\n")[1].split("\n\n")[0]
    assert importance.split() == ["lr", "1.00"]
    assert "\nno importance for epochs: the same in all completed trials\n" in done.out
    # trial 4 has the settings of trial 2, and 3 those of 0
    assert "python ensemble.py out/sweep-trial-2.csv out/sweep-trial-0.csv\n" in done.out
    assert (tmp_path / "out/sweep-trial-0.csv").read_text() == "runs/sweep/trial-0/ckpt.pt"
    assert not done.err

    again = call(sweep, *arguments, **quick)  # nothing is left to train
    assert len(study_of(tmp_path).trials) == 5
    assert again.out == done.out[done.out.index("\ntrial ") :]
    refused = call(sweep, *arguments[:-1], "bilstm", code=2, **quick).err
    assert "another space or other arguments" in refused


def test_bad_input_of_the_first_trial_ends_the_sweep(call, quick, space, propose, tmp_path):
    propose(14, 14, 1, 14)
    arguments = ["--trials", "4", *space(lr=[1, 14])]
    hint = "no train.csv; fix it and rerun the same command, or use another --out"
    for number in range(2):
        refused = call(sweep, *arguments, code=2, **quick).err
        assert refused.strip() == f"sweep.py: runs/sweep/trial-{number}: {hint}"
    assert states(tmp_path) == ["FAIL", "FAIL", "WAITING", "WAITING"]
    call(sweep, *arguments, **quick)  # once a trial has completed, bad input costs one trial
    assert states(tmp_path) == ["FAIL", "FAIL", "COMPLETE", "FAIL"]


def test_prunes_a_trial_below_the_median(call, quick, space, propose, tmp_path):
    propose(9, 8, 9, 8, 9, 1)
    call(sweep, "--trials", "6", *space(lr=[1, 8, 9]), "--", "--seed", "2", **quick)
    assert states(tmp_path) == ["COMPLETE"] * 5 + ["PRUNED"]
    trials = study_of(tmp_path).trials
    assert trials[0].intermediate_values == {1: 9, 2: 18, 3: 27}
    assert len(trials[5].intermediate_values) < 3


@pytest.mark.parametrize(
    ("choices", "arguments", "message"),
    [
        ({}, [], "space: found {}"),
        ({"learning": [1]}, [], "learning: found"),
        ({"lr": 1}, [], "lr: found 1"),
        ({"lr": []}, [], r"lr: found \[\]"),
        ({"lr": ["much"]}, [], "--lr"),
        ({"lr": [1]}, ["--headd", "cls"], "--headd"),
        ({"out": ["a", "b"]}, [], "out: found"),
        ({"lr": [1]}, ["--out=elsewhere"], "--out: expected before --"),
        ({"lr": [1]}, ["--seeds", "3"], "no --seeds"),
        ({"lr": [1]}, ["--valid", "none"], "--valid none"),
        ({"valid": ["none"]}, [], "--valid none"),
        ({"lr": [13]}, [], "no trial completed"),
    ],
)
def test_refuses_in_one_line(call, quick, space, choices, arguments, message):
    done = call(sweep, "--trials", "1", *space(**choices), "--", *arguments, code=2, **quick)
    assert len(done.err.strip().splitlines()) == 1
    assert re.search(message, done.err), done.err


@pytest.mark.parametrize("numbers", [("--trials", 0), ("--top", -1)])
def test_refuses_bad_numbers_in_one_line(call, quick, space, numbers):
    refused = call(sweep, *space(lr=[1]), *numbers, code=2, **quick).err
    assert refused.startswith("sweep.py: --trials, --top: found ")


def test_refuses_a_bad_storage_in_one_line(call, quick, space):
    for url in ("nothing", "sqlite:////nowhere/study.db"):
        done = call(sweep, "--storage", url, *space(lr=[1]), code=2, **quick)
        assert done.err.startswith("sweep.py: --storage: cannot open study sweep: ")
        assert len(done.err.strip().splitlines()) == 1


def test_names_the_missing_package(call, quick, space, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = call(sweep, *space(lr=[1]), code=2, **quick)
    assert done.err.startswith("sweep.py: sweep.py needs the package optuna: pip install")


def test_files_of_a_deleted_study_are_not_resumed(call, quick, space, tmp_path):
    arguments = ["--trials", "1", *space(lr=[1])]
    call(sweep, *arguments, **quick)
    folder = tmp_path / "runs/sweep"
    (folder / "study.db").unlink()
    (folder / "trial-0/last.pt").touch()
    summary = json.loads((folder / "trial-0/summary.json").read_text())
    summary["evaluations"] *= 2
    (folder / "trial-0/summary.json").write_text(json.dumps(summary))
    call(sweep, *arguments, **quick)
    assert study_of(tmp_path).trials[0].intermediate_values == {1: 1, 2: 2, 3: 3}
    assert (folder / "trial-0/log").read_text() == "started\n" * 2
    assert not (folder / "trial-0/last.pt").exists()  # removed when the trial ended


def test_does_not_wait_for_a_trial_that_never_started(call, quick, space, propose, tmp_path):
    propose()
    study_of(tmp_path).ask()  # as left by a sweep killed before the first heartbeat
    done = call(sweep, "--trials", "2", *space(lr=[1]), **quick)
    assert states(tmp_path) == ["RUNNING", "COMPLETE"]
    assert "waiting" not in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_stopped_sweep_resumes_its_trial(
    call, start, quick, space, propose, tmp_path, number, code
):
    propose(1, 15)
    arguments = ["--trials", "2", *space(lr=[1, 15])]
    folder = tmp_path / "runs/sweep/trial-1"
    stopped = start(*arguments, **quick)
    wait_for((folder / "last.pt").exists)
    training = int((folder / "pid").read_text())
    stopped.send_signal(number)
    assert stopped.wait(60) == code
    wait_for(lambda: not os.path.exists(f"/proc/{training}"), 60)
    assert states(tmp_path) == ["COMPLETE", "RUNNING"]
    assert (folder / "last.pt").exists()

    done = call(sweep, *arguments, **quick)
    assert states(tmp_path) == ["COMPLETE", "FAIL", "COMPLETE"]  # the third retries the second
    assert study_of(tmp_path).trials[2].params == {"lr": 15}
    assert (folder / "log").read_text() == "started\nresumed\n"
    assert sorted(path.name for path in folder.parent.glob("trial-*")) == ["trial-0", "trial-1"]
    table = done.out.split("\n\n")[1].splitlines()
    assert [line.split()[:3] for line in table[1:]] == [
        ["1", "45.00", "complete"],
        ["0", "3.00", "complete"],
    ]
    assert "to repeat trial 1, the best" in done.out

    call(sweep, *arguments, **quick)
    assert len(study_of(tmp_path).trials) == 3
    call(sweep, "--trials", "3", *arguments[2:], "--", **quick)  # a retry is no third trial
    assert len(study_of(tmp_path).trials) == 4


@pytest.mark.slow
def test_waits_for_the_trial_of_another_sweep(call, start, quick, space, tmp_path):
    arguments = ["--trials", "1", *space(lr=[2]), "--", "--seed", "20"]
    quick["heartbeat"] = 5  # a trial is stale after 15 seconds: longer than this one takes
    other = start(*arguments, **quick)
    wait_for((tmp_path / "runs/sweep/trial-0/summary.json").exists)
    done = call(sweep, *arguments, **quick)
    assert other.wait(60) == 0
    assert states(tmp_path) == ["COMPLETE"]
    assert done.out.startswith("waiting for trials")
    assert "to repeat trial 0, the best" in done.out
    assert (tmp_path / "runs/sweep/trial-0/log").read_text() == "started\n"


@pytest.mark.slow
def test_a_killed_sweep_resumes_a_real_training(call, start, space, encoder_folder, tmp_path):
    fixed = f"--data {SAMPLE} --model {encoder_folder} --limit 150 --split stratified --epochs 2"
    fixed += " --save-every 1 --amp off"
    choices = space(lr=[1e-3, 2e-3], head=["cls", "entity"])
    arguments = ["--trials", "3", *choices, "--", *fixed.split()]
    killed = start(*arguments, heartbeat=1)
    wait_for((tmp_path / "runs/sweep/trial-1/last.pt").exists)
    killed.kill()
    killed.wait()
    assert states(tmp_path) == ["COMPLETE", "RUNNING"]

    done = call(sweep, *arguments, heartbeat=1)
    assert sorted(states(tmp_path)) == ["COMPLETE"] * 3 + ["FAIL"]
    assert "resuming after step" in (tmp_path / "runs/sweep/trial-1/log").read_text()
    trials = sweep.last_attempts(study_of(tmp_path))
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    for trial in trials:
        folder = tmp_path / f"runs/sweep/trial-{sweep.number_of(trial)}"
        summary = json.loads((folder / "summary.json").read_text())
        assert trial.value == summary["best"]["micro_f1"]
        steps = [scores["step"] for scores in summary["evaluations"]]
        assert steps == [summary["step"] // 2, summary["step"]]
        assert list(trial.intermediate_values) == [1, 2]
        assert {name: summary["settings"][name] for name in trial.params} == trial.params
        assert not (folder / "last.pt").exists()
    assert "python train.py --data" in done.out
