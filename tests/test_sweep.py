"""sweep.py: with a stand-in for train.py that takes no time, and once with train.py itself, killed and resumed."""

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
from tests.conftest import ROOT, SAMPLE

TRAIN = """
import json, os, sys, time
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
lr, folder = float(given["--lr"]), given["--out"]
if lr == 13:
    sys.exit("a crash")
if lr == 14:
    print("no train.csv", file=sys.stderr)
    sys.exit(2)
for number in range(1, 4):
    scores = [{"micro_f1": lr * n, "step": n} for n in range(1, number + 1)]
    summary = {"evaluations": scores, "best": scores[-1], "settings": {"best_metric": "micro_f1"}}
    with open(folder + "/summary.tmp", "w") as file:
        json.dump(summary | {"finished": number == 3}, file)
    os.replace(folder + "/summary.tmp", folder + "/summary.json")
    time.sleep(float(given.get("--seed", 0)) / 10)
"""
INFER = """
import pathlib, sys
pathlib.Path("out").mkdir(exist_ok=True)
pathlib.Path(sys.argv[3]).write_text(sys.argv[1])
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The stand-in in the place of train.py, and an infer.py that writes what it was called with."""
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "train.py").write_text(TRAIN)
    (tmp_path / "programs" / "infer.py").write_text(INFER)
    monkeypatch.setattr(sweep, "HERE", tmp_path / "programs")
    monkeypatch.setattr(sweep, "POLL", 0.02)

    def space(**choices):
        (tmp_path / "space.json").write_text(json.dumps(choices))
        return ["--space", "space.json"]

    return space


def study_of(tmp_path, name="sweep"):
    return optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/runs/{name}/study.db")


def test_the_space_of_the_report_is_made_of_settings():
    assert sweep.read_space(None, []) == sweep.SPACE
    assert sweep.as_arguments({"lr": 1e-5, "clean": False, "gelu": True}) == ["--lr", "1e-05", "--no-clean", "--gelu"]


@pytest.fixture
def propose(monkeypatch):
    """Makes the sampler propose these values, one after the other."""

    def propose(*values):
        left = iter(values)
        monkeypatch.setattr(optuna.samplers.TPESampler, "sample_independent", lambda *_: next(left))

    return propose


def test_the_best_is_found_a_crash_costs_one_trial_and_the_top_predicts(call, quick, propose, tmp_path):
    propose(1, 13, 2, 1, 2)
    arguments = ["--trials", "5", "--top", "2", *quick(lr=[1, 2, 13]), "--", "--head", "cls"]
    done = call(sweep, *arguments)
    trials = study_of(tmp_path).trials
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert [t.value for t in trials] == [3, None, 6, 3, 6]
    assert "a crash" in (tmp_path / "runs/sweep/trial-1/log").read_text()
    assert "python train.py --head cls --lr 2 --out runs/sweep/best\n" in done.out
    assert "importance of each setting" in done.out
    assert "python ensemble.py out/sweep-trial-2.csv out/sweep-trial-0.csv" in done.out  # 4 is as 2
    assert (tmp_path / "out/sweep-trial-0.csv").read_text() == "runs/sweep/trial-0/ckpt.pt"

    call(sweep, *arguments)  # nothing is left to do but to show the end
    assert len(study_of(tmp_path).trials) == 5
    refused = call(sweep, *arguments[:-1], "bilstm", code=2).err
    assert "another space or other arguments" in refused


def test_bad_input_of_the_first_trial_ends_the_sweep_which_goes_on_when_it_is_mended(call, quick, propose, tmp_path):
    propose(14, 1, 14)
    arguments = ["--trials", "3", *quick(lr=[1, 14])]
    refused = call(sweep, *arguments, code=2).err
    assert refused.strip().endswith(
        "trial-0: no train.csv; mend it and go on by the same command, or name another --out"
    )
    assert len(study_of(tmp_path).trials) == 1
    call(sweep, *arguments)  # one that others do not have costs a trial
    assert [t.state.name for t in study_of(tmp_path).trials] == ["FAIL", "COMPLETE", "FAIL"]


def test_what_lags_behind_is_stopped(call, quick, propose, tmp_path):
    propose(9, 8, 9, 8, 9, 1)
    call(sweep, "--trials", "6", *quick(lr=[1, 8, 9]), "--", "--seed", "2")
    trials = study_of(tmp_path).trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 5 + ["PRUNED"]
    assert len(trials[5].intermediate_values) < 3


@pytest.mark.parametrize(
    ("space", "arguments", "message"),
    [
        ({"learning": [1]}, [], "learning: found"),
        ({"lr": 1}, [], "lr: found 1"),
        ({"lr": []}, [], r"lr: found \[\]"),
        ({"lr": ["much"]}, [], "--lr"),
        ({"lr": [1]}, ["--headd", "cls"], "--headd"),
        ({"lr": [1]}, ["--seeds", "3"], "no --objective mlm, --seeds"),
        ({"lr": [13]}, [], "no trial has come to its end"),
    ],
)
def test_what_cannot_be_searched_is_one_line(call, quick, space, arguments, message):
    done = call(sweep, "--trials", "1", *quick(**space), "--", *arguments, code=2)
    assert len(done.err.strip().splitlines()) == 1
    assert re.search(message, done.err), done.err


def test_a_training_that_still_runs_keeps_its_progress(call, quick, tmp_path):
    """As of a sweep whose study was deleted since."""
    folder, space = tmp_path / "runs" / "sweep", quick(lr=[1])
    with sweep.take_lock(folder / "trial-0"):
        (folder / "trial-0" / "last.pt").write_text("progress")
        call(sweep, "--trials", "2", *space)
    assert [t.state.name for t in study_of(tmp_path).trials] == ["RUNNING", "COMPLETE"]
    assert (folder / "trial-0" / "last.pt").exists()

    trial, lock = sweep.next_trial(study_of(tmp_path), folder, 2)
    lock.close()
    assert trial.number == 0
    assert not (folder / "trial-0" / "last.pt").exists()  # which is none of this study's
    call(sweep, "--trials", "2", *space)
    assert [t.state.name for t in study_of(tmp_path).trials] == ["COMPLETE", "COMPLETE"]


def test_a_killed_sweep_goes_on_with_the_trial_it_was_at(call, encoder_folder, tmp_path):
    (tmp_path / "space.json").write_text(json.dumps({"lr": [1e-3, 2e-3], "head": ["cls", "entity"]}))
    fixed = f"--data {SAMPLE} --model {encoder_folder} --limit 150 --split stratified --epochs 2 --save-every 1"
    arguments = ["--trials", "3", "--space", "space.json", "--", *fixed.split(), "--amp", "off"]
    killed = subprocess.Popen([sys.executable, ROOT / "sweep.py", *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (tmp_path / "runs/sweep/trial-1/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert [t.state.name for t in study_of(tmp_path).trials] == ["COMPLETE", "RUNNING"]
    lock = None
    while lock is None:  # till the training that was left behind has saved and ended
        time.sleep(0.1)
        lock = sweep.take_lock(tmp_path / "runs/sweep/trial-1")
    lock.close()

    done = call(sweep, *arguments)
    trials = study_of(tmp_path).trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3
    assert "going on after step" in (tmp_path / "runs/sweep/trial-1/log").read_text()
    for trial in trials:
        summary = json.loads((tmp_path / f"runs/sweep/trial-{trial.number}/summary.json").read_text())
        assert trial.value == summary["best"]["micro_f1"]
        assert [e["step"] for e in summary["evaluations"]] == [summary["step"] // 2, summary["step"]]
        assert {name: summary["settings"][name] for name in trial.params} == trial.params
    assert "python train.py --data" in done.out
