"""Whole runs of train.py on the sample: processes, resuming, the best model, seeds, bad data."""

import csv
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ensemble
import infer
import step
import train
from calibration import fit_temperature
from common import exit_on_error
from metrics import read_predictions
from settings import Settings, parse_settings
from task import RelationTask
from tests.helpers import SAMPLE


def small(encoder_folder, out, *more):
    """Arguments of a short fp32 run without dropout; 30 does not divide the number of rows."""
    arguments = f"--data {SAMPLE} --model {encoder_folder} --out {out} --amp off --limit 320"
    arguments += " --split stratified --batch-size 30 --epochs 2 --lr 1e-3 --head bilstm"
    return [*arguments.split(), *map(str, more)]  # 22 steps


class TaskWithoutFigures(RelationTask):
    """Drawing an evaluation's figures takes seconds."""

    def log_evaluation(self, writer, step):
        pass


def program(task_class=TaskWithoutFigures, **options):
    """train.py without figures, or with another task or on_step, for the fixture `call`."""

    @exit_on_error
    def main():
        train.run(parse_settings(Settings, "train.py", ""), task_class, **options)

    return SimpleNamespace(__file__=train.__file__, main=main)


TRAIN = program()


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def load(path):
    return torch.load(path, weights_only=True)


# --- processes, resuming ------------------------------------------------------------------------


@pytest.mark.slow
def test_three_processes_and_small_micro_batches_train_the_same_model(
    call, run, encoder_folder, tmp_path
):
    """The last batch of an epoch does not divide evenly among the processes."""
    call(TRAIN, *small(encoder_folder, "one"))
    run("train.py", *small(encoder_folder, "three", "--max-tokens", 300), processes=3)
    paths = (tmp_path / "one/valid.csv", tmp_path / "three/valid.csv")
    one, three = (read_predictions(str(path)) for path in paths)
    np.testing.assert_allclose(three.probs, one.probs, atol=2e-4)
    expected, best = (read_summary(path.parent)["best"] for path in paths)
    assert best["step"] == expected["step"]
    assert best["micro_f1"] == pytest.approx(expected["micro_f1"], abs=1e-6)
    assert best["auprc"] == pytest.approx(expected["auprc"], abs=0.05)


@pytest.mark.slow
def test_a_resumed_run_is_identical_to_an_uninterrupted_one(call, encoder_folder, tmp_path):
    """With dropout: its masks are the same too. Resumes from the save before the last one."""
    config = json.loads((encoder_folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1}
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    (tmp_path / "encoder/config.json").write_text(json.dumps(config))
    every = ["--save-every", 4, "--eval-every", 6]
    call(TRAIN, *small("encoder", "a", *every))
    whole = load(tmp_path / "a/last.pt")

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    steps = whole["progress"]["step"]
    assert steps == 22
    (tmp_path / "b/last.pt").unlink()
    before = load(tmp_path / "b/previous.pt")["progress"]["step"]
    assert 0 < before < steps
    done = call(TRAIN, *small("encoder", "b", *every))
    assert f"resuming after step {before}" in done.out
    resumed = load(tmp_path / "b/last.pt")
    assert resumed["progress"]["step"] == steps
    assert all(torch.equal(resumed["weights"][k], whole["weights"][k]) for k in whole["weights"])
    assert (tmp_path / "a/valid.csv").read_bytes() == (tmp_path / "b/valid.csv").read_bytes()

    refused = call(TRAIN, *small("encoder", "a", *every), "--lr", 5, code=2)
    assert "last.pt: saved with lr = 0.001, now 5.0; use --fresh, or another --out" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    finished = call(TRAIN, *small("encoder", "a", *every))
    assert "already finished; --fresh starts over" in finished.out
    assert "resuming" not in finished.out


# --- the best model ---------------------------------------------------------------------------

PLAN = {"micro_f1": [50, 70, 60, 65, 10], "auprc": [10, 20, 40, 30, 5]}


def planned_task(scores):
    """A task whose evaluations have these scores, one after the other."""
    remaining = iter(scores)

    class PlannedTask(TaskWithoutFigures):
        def evaluate(self, max_tokens):
            super().evaluate(max_tokens)
            return next(remaining)

    return PlannedTask


@pytest.mark.parametrize(("metric", "best", "n"), [("micro_f1", 1, 4), ("auprc", 2, 5)])
def test_the_best_evaluations_model_is_kept_and_patience_ends_the_run(
    call, encoder_folder, tmp_path, metric, best, n
):
    scores = [
        {"micro_f1": f1, "auprc": auprc, "accuracy": 0, "absent": []}
        for f1, auprc in zip(*PLAN.values())
    ]
    more = "--head cls --eval-every 4 --patience 2 --layer-decay 0.5 --best-metric".split()
    arguments = small(encoder_folder, "a", *more, metric)
    call(program(planned_task(scores)), *arguments)
    summary = read_summary(tmp_path / "a")
    assert [each["step"] for each in summary["evaluations"]] == [4, 8, 12, 16, 20][:n]
    assert (summary["step"], summary["best"]["step"]) == (4 * n, 4 * (best + 1))
    assert summary["best"][metric] == max(PLAN[metric])
    kept, last = load(tmp_path / "a/ckpt.pt"), load(tmp_path / "a/last.pt")
    assert kept["scores"] == summary["best"]
    name = "classifier.weight"
    assert not torch.equal(kept["weights"][name], last["weights"][name])
    done = call(program(planned_task([])), *arguments)  # an evaluation would fail
    assert "already finished" in done.out  # patience has ended
    assert read_summary(tmp_path / "a") == summary

    # the learning rates by layer are those of the last step
    rate = step.learning_rate(Settings(lr=1e-3), 4 * n - 1, 22)
    groups = last["optimizer"]["param_groups"]
    assert {round(group["lr"] / rate, 6) for group in groups} == {1, 0.5, 0.25, 0.125}
    assert all(group["lr"] == pytest.approx(rate * group["scale"]) for group in groups)


def test_without_validation_all_rows_are_trained_on_and_the_last_model_is_kept(
    call, encoder_folder, tmp_path
):
    (tmp_path / "all").mkdir()
    (tmp_path / "all/valid.csv").write_text("of an earlier run")
    arguments = f"--data {SAMPLE} --model {encoder_folder} --limit 90 --amp off --batch-size 30"
    arguments += " --lr 1e-3 --epochs 2 --valid none --no-clean --out all"
    done = call(TRAIN, *arguments.split())
    assert "90 training rows, 0 for validation" in done.out
    assert "F1" not in done.out
    summary = read_summary(tmp_path / "all")
    assert (summary["step"], summary["sentences"], summary["best"]) == (6, 180, {"step": 6})
    last, kept = load(tmp_path / "all/last.pt"), load(tmp_path / "all/ckpt.pt")
    assert all(torch.equal(kept["weights"][k], last["weights"][k]) for k in kept["weights"])
    assert not (tmp_path / "all/valid.csv").exists()
    assert "micro F1" in call(infer, "all/ckpt.pt").out


# --- data, limits, seeds ------------------------------------------------------------------------


def test_another_data_set_with_its_own_labels(call, encoder_folder, tmp_path, rows):
    def record(r):
        names = {"no_relation": "none", "per:title": "직함"}
        subject, obj = (
            {"word": e.word, "start_idx": e.start, "end_idx": e.end} for e in (r.subject, r.object)
        )
        entities = {"subject_entity": subject, "object_entity": obj}
        return {"guid": r.id, "sentence": r.sentence, **entities, "label": names[r.label]}

    chosen = [record(r) for r in rows if r.label in ("no_relation", "per:title")]
    (tmp_path / "own").mkdir()
    for name in ("train", "test_data"):
        lines = "\n".join(json.dumps(r) for r in chosen)
        (tmp_path / f"own/{name}.jsonl").write_text(lines, encoding="utf-8")
    arguments = f"--data own --model {encoder_folder} --out a --epochs 1 --negative-label none"
    arguments = [*arguments.split(), "--split", "stratified"]
    refused = call(TRAIN, *arguments, code=2)
    assert "_entity: no type, which --marker typed_entity_marker_punct needs" in refused.err
    (tmp_path / "alpha.json").write_text('{"none": 0.5}')
    focal = ["--focal-gamma", "2", "--focal-alpha", "alpha.json"]
    call(TRAIN, *arguments, "--marker", "entity_marker", *focal)
    assert "micro F1" in call(infer, "a/ckpt.pt").out
    call(ensemble, "out/a.csv", "--soft")
    with open(tmp_path / "submission.csv", encoding="utf-8", newline="") as file:
        assert {r["pred_label"] for r in csv.DictReader(file)} <= {"none", "직함"}


def test_the_limit_leaves_the_validation_rows_as_they_are_and_the_learning_rate_suits_the_encoder(
    call, encoder_folder, tmp_path
):
    arguments = f"--data {SAMPLE} --model {encoder_folder} --amp off --epochs 1 --batch-size 30"
    arguments = [*arguments.split(), "--no-relation-share", 0.4]
    ids = []
    for limit in (60, 90):
        done = call(TRAIN, *arguments, "--limit", limit, "--out", f"run-{limit}")
        assert f"{limit} training rows" in done.out
        rate = "peak learning rate 0.0026 for the head, times 0.377 per layer below it"
        assert rate in done.out
        ids.append(read_predictions(str(tmp_path / f"run-{limit}/valid.csv")).ids)
    assert ids[0] == ids[1]
    summary, content = read_summary(tmp_path / "run-90"), load(tmp_path / "run-90/ckpt.pt")
    assert summary["settings"]["lr"] == 0.0026  # 4e-5 x (1024 / 128)²

    # the share of no_relation in the predictions of the test rows is as given
    call(infer, "run-90/ckpt.pt", "--amp", "off")
    predicted = read_predictions(str(tmp_path / "out/run-90.csv")).predicted
    assert content["negative_factor"] > 0
    valid = read_predictions(str(tmp_path / "run-90/valid.csv"))
    gold = np.array([content["labels"].index(label) for label in valid.gold])
    assert content["temperature"] == pytest.approx(fit_temperature(valid.probs, gold), rel=1e-4)
    assert abs(np.mean([label == "no_relation" for label in predicted]) - 0.4) < 0.02


def test_a_value_that_the_program_would_choose_may_be_given_when_a_run_resumes(
    call, encoder_folder, tmp_path
):
    arguments = f"--data {SAMPLE} --model {encoder_folder} --amp off --epochs 1 --limit 60 --out a"
    arguments = arguments.split()
    call(TRAIN, *arguments)
    assert read_summary(tmp_path / "a")["settings"]["no_relation_share"] == 0.6
    same = [*arguments, "--no-relation-share", 0.6, "--lr", 0.0026, "--layer-decay", 0.377]
    assert "already finished" in call(TRAIN, *same).out
    refused = call(TRAIN, *arguments, "--no-relation-share", 0.5, code=2).err
    assert "saved with no_relation_share = 0.6, now 0.5; use --fresh, or another" in refused


@pytest.mark.slow
def test_several_seeds_are_a_run_each_and_their_checkpoints_predict_together(
    call, encoder_folder, tmp_path
):
    arguments = f"--data {SAMPLE} --model {encoder_folder} --limit 300 --split stratified"
    arguments += " --amp off --lr 1e-3 --epochs 2 --seeds 2 --seed 7 --out s"
    arguments = arguments.split()
    done = call(TRAIN, *arguments)
    best = [read_summary(tmp_path / f"s-seed={seed}")["best"] for seed in (7, 8)]
    f1 = [scores["micro_f1"] for scores in best]
    assert f"micro_f1 {np.mean(f1):.2f} ± {np.std(f1, ddof=1):.2f}" in done.out
    assert "python infer.py s-seed=7/ckpt.pt s-seed=8/ckpt.pt" in done.out
    assert call(TRAIN, *arguments).out.count("already finished") == 2
    shutil.rmtree(tmp_path / "s-seed=8")  # as if the command had been stopped before
    assert call(TRAIN, *arguments).out.count("already finished") == 1

    one, other = "s-seed=7/ckpt.pt", "s-seed=8/ckpt.pt"
    for paths in ([one], [other], [one, other]):
        call(infer, *paths)
    names = ("s-seed=7", "s-seed=8", "s-seed=7+s-seed=8")
    a, b, both = (read_predictions(str(tmp_path / f"out/{name}.csv")) for name in names)
    np.testing.assert_allclose(both.probs, (a.probs + b.probs) / 2, atol=1e-12)
    assert np.abs(a.probs - b.probs).max() > 1e-3
    content = load(tmp_path / other)
    torch.save(content | {"labels": content["labels"][::-1]}, tmp_path / "reversed.pt")
    assert "reversed.pt: its labels, or their order" in call(infer, one, "reversed.pt", code=2).err
    torch.save(content | {"run": "../elsewhere"}, tmp_path / "other.pt")
    call(infer, "other.pt")
    assert (tmp_path / "out/elsewhere.csv").exists()

    # --fresh deletes the progress of all seeds at once, wherever this command ends
    def stop(step):
        raise SystemExit(9)

    call(program(on_step=stop), *arguments, "--fresh", code=9)
    assert not list(tmp_path.glob("s-seed=*/last.pt"))


def test_bad_data_is_one_line(call, tmp_path):
    expected = "train.py: data: no "
    assert call(TRAIN, code=2).err.strip().startswith(expected)
    (tmp_path / "data").mkdir()
    header = "id,sentence,subject_entity,object_entity,label"
    (tmp_path / "data/train.csv").write_text(f"{header}\n0,a,b,c,d\n")
    found = "train.py: data/train.csv:2: subject_entity: found 'b'"
    expected = f"{found}, expected a dict literal or a JSON object"
    assert call(TRAIN, code=2).err.strip() == expected


def test_a_signal_in_the_last_evaluation_lets_the_run_end(call, encoder_folder, tmp_path):
    class Stopped(TaskWithoutFigures):
        def evaluate(self, max_tokens):
            signal.raise_signal(signal.SIGTERM)
            return super().evaluate(max_tokens)

    arguments = small(encoder_folder, "a", "--epochs", 1, "--limit", 60)
    program = SimpleNamespace(
        __file__="train.py",
        main=lambda: train.run(parse_settings(Settings, "train.py", ""), Stopped),
    )
    assert "next:" in call(program, *arguments).out
    assert json.loads((tmp_path / "a/summary.json").read_text())["finished"]
