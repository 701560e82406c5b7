"""The settings, the order of batches, the optimiser, and runs of train.py through the command line."""

import copy
import csv
import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel

import data
import infer
import train
from data import InputError
from infer import Machine
from metrics import read_predictions
from model import RelationModel
from tests.conftest import ROOT, SAMPLE
from tests.test_model import DECODERS, FAMILIES, encoder_of
from train import (
    Relations,
    Settings,
    batch_gradients,
    choose_rows,
    learning_rate,
    make_optimizer,
    parse_settings,
    share_of_rank,
    training_batches,
    update_weights,
)

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")


def test_settings_come_from_the_command_line():
    settings = parse_settings(["--head", "bilstm", "--no-clean", "--lr", "1e-4", "--gelu"])
    assert settings == Settings(head="bilstm", clean=False, lr=1e-4, gelu=True)
    assert settings.folder().as_posix() == "runs/roberta-large-bilstm-no_clean-gelu-lr=0.0001"
    assert parse_settings([]).folder().as_posix() == "runs/roberta-large-entity"
    assert parse_settings(["--model", "runs/tapt/encoder"]).folder().as_posix() == "runs/tapt-entity"
    assert parse_settings(["--model", "encoder"]).folder().as_posix() == "runs/encoder-entity"
    demo = parse_settings(["--demo", "--head", "bigru"])
    assert (demo.out, demo.head, demo.model) == ("runs/demo", "bigru", "runs/demo/tiny_encoder")


def test_a_preset_sets_what_the_report_had_and_options_come_on_top():
    s = parse_settings(["--preset", "report"])
    assert (s.model, s.data, s.batch_size, s.lr, s.epochs, s.beta2) == ("klue/roberta-large", "data", 64, 2e-5, 5, 0.98)
    assert (s.weight_decay, s.warmup_ratio, s.marker, s.prompt) == (0.01, 0.06, "typed_entity_marker_punct", "s_and_o")
    assert (s.seed, s.max_length, s.split, s.norm, s.gelu, s.dropout) == (42, 256, "test-like", "layer", False, 0)
    assert (s.head, s.type_names, s.layer_decay) == ("cls", "en", 1)
    assert parse_settings(["--preset", "report", "--head", "bilstm"]) == replace(s, head="bilstm")
    assert parse_settings([]) == Settings()


@pytest.mark.parametrize(
    "arguments",
    [
        "--epochs 0",
        "--lr -1",
        "--lr nan",
        "--max-length 10",
        "--label-smoothing 0.1 --focal-gamma 2",
        "--resume --fresh",
        "--patience 2 --valid none",
        "--folds 5 --fold 5",
        "--folds 1",
        "--fold 1",
        "--folds 5 --valid none",
    ],
)
def test_impossible_settings_are_an_error(arguments):
    with pytest.raises(InputError, match="--"):
        parse_settings(arguments.split())


def test_without_a_compiler_nothing_is_compiled(monkeypatch):
    monkeypatch.setenv("CXX", "absent")
    with pytest.raises(InputError, match="--compile needs a C"):
        parse_settings(["--compile"])
    monkeypatch.setenv("PATH", "")
    for name in ("", " "):
        monkeypatch.setenv("CXX", name)
        with pytest.raises(InputError, match=r"--compile needs a C.*found no g\+\+"):
            parse_settings(["--compile"])


@pytest.mark.parametrize("arguments", ["--head mlp", "--unknown 1", "--epochs x"])
def test_unknown_settings_are_an_error(arguments):
    with pytest.raises(InputError, match=arguments.split()[0]):
        parse_settings(arguments.split())


def test_a_misspelled_setting_is_told_its_name():
    with pytest.raises(InputError, match=r"^unrecognized arguments: --batch_size 8; did you mean --batch-size\? train"):
        parse_settings(["--batch_size", "8"])


def test_batches_are_a_pure_function_of_seed_and_epoch_and_alike_in_length():
    lengths = np.random.default_rng(0).integers(20, 200, 1003)
    batches = training_batches(lengths, 16, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1003))
    assert sorted(len(b) for b in batches) == [1003 % 16] + [16] * (1003 // 16)
    again, other = training_batches(lengths, 16, 1, 0), training_batches(lengths, 16, 1, 1)
    assert all((a == b).all() for a, b in zip(batches, again))
    assert any((a != b).any() for a, b in zip(batches, other) if len(a) == len(b))
    assert np.mean([np.ptp(lengths[b]) for b in batches]) < np.ptp(lengths) / 5


def test_the_learning_rate_rises_and_falls_in_lines():
    settings = Settings(lr=1.0, warmup_ratio=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:], (90 - np.arange(90)) / 90)


def test_biases_and_norms_do_not_decay():
    model = RelationModel(encoder_of("bert"), 30)
    decayed, free = make_optimizer(model, Settings(weight_decay=0.1, layer_decay=1)).param_groups
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert (decayed["weight_decay"], free["weight_decay"], decayed["betas"]) == (0.1, 0.0, (0.9, 0.98))


@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_lower_layers_learn_more_slowly(family):
    model = RelationModel(encoder_of(family), 30, "bilstm", entity_embedding="plain")
    optimizer = make_optimizer(model, Settings(layer_decay=0.5))
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    assert scale[id(model.encoder.get_input_embeddings().weight)] == 0.5**4
    for name, parameter in model.named_parameters():
        layer = re.search(r"(?:layers?|h)\.(\d)\.", name)  # three of them
        if layer:
            assert scale[id(parameter)] == 0.5 ** (3 - int(layer[1]))
        elif name.startswith(("rnn", "classifier", "norm", "entity_embeddings")):
            assert scale[id(parameter)] == 1
        elif name.startswith(("encoder.final_norm.", "encoder.norm.", "encoder.ln_f.")):  # behind the layers
            assert scale[id(parameter)] == 0.5
        else:
            assert scale[id(parameter)] == 0.5**4, name


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_a_batch_without_loss_and_in_like_amounts(world_size):
    lengths, indices = np.random.default_rng(0).integers(20, 200, 50), np.arange(5)
    machines = [Machine(torch.device("cpu"), None, rank, world_size) for rank in range(world_size)]
    shares = [share_of_rank(indices, lengths, machine, 300, n_targets=5) for machine in machines]
    taken = [index for parts, weight in shares for part in parts for index in part if weight]
    assert sorted(taken) == indices.tolist()
    assert {weight for _, weight in shares} <= {0.0, world_size / 5}
    assert all(len(parts) >= 1 for parts, _ in shares)


@pytest.mark.parametrize(("with_bf16", "expected"), [("0 1", "torch.bfloat16"), ("0", "None")])
def test_processes_of_unlike_devices_compute_in_the_same_precision(run, tmp_path, with_bf16, expected):
    program = tmp_path / "tell.py"
    program.write_text(
        f"import os, sys, torch; sys.path.insert(0, {str(ROOT)!r}); import infer\n"
        f"torch.cpu._is_avx512_bf16_supported = lambda: os.environ['RANK'] in {with_bf16.split()}\n"
        "torch.cpu._is_amx_tile_supported = lambda: False\n"
        "with infer.running('auto') as machine: print(f'computes in {machine.amp}\\n', end='')\n"
    )
    printed = run(program, processes=2).stdout.splitlines()
    assert printed.count(f"computes in {expected}") == 2


@pytest.mark.parametrize(
    ("amp", "compile", "tolerance"),
    [(None, False, 1e-4), (torch.bfloat16, False, 0.03), pytest.param(None, True, 1e-4, marks=needs_compiler)],
)
def test_flat_batches_have_the_loss_curve_of_padded_ones(encoder_folder, amp, compile, tolerance):
    """Flat parts of 300 tokens, against whole batches that are padded and go through transformers' own attention."""
    shape = {"data": str(SAMPLE), "model": str(encoder_folder), "limit": 160, "valid": "none", "batch_size": 16}
    settings = Settings(**shape, head="cls", lr=1e-3, layer_decay=1, compile=compile)
    machine = Machine(torch.device("cpu"), amp)
    task, scaler = Relations(settings, machine, lambda text: None), torch.amp.GradScaler("cpu", enabled=False)
    padded = copy.deepcopy(task.model)
    padded.encoder = AutoModel.from_pretrained(encoder_folder, add_pooling_layer=False)
    ours, theirs = make_optimizer(task.model, settings), make_optimizer(padded, settings)
    losses = []
    for step, indices in enumerate(training_batches(task.lengths, settings.batch_size, seed=0, epoch=0)):
        flat = batch_gradients(task, task.model, indices, step, scaler, 300)
        update_weights(task.model, ours, scaler, settings.clip_norm)
        chosen = [task.examples[i] for i in indices]
        ids, types, mask = (
            torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in tokens], batch_first=True)
            for tokens in ([e.ids for e in chosen], [e.segments for e in chosen], [np.ones_like(e.ids) for e in chosen])
        )
        with machine.autocast():
            states = padded.encoder(ids, token_type_ids=types, attention_mask=mask).last_hidden_state
            logits = padded.classifier(padded.norm(states[:, 0]))
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([e.label for e in chosen]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(padded.parameters(), settings.clip_norm)
        theirs.step()
        theirs.zero_grad()
        losses.append((flat.item(), loss.item()))
    curves = np.array(losses)
    assert curves[-3:].mean() < curves[:3].mean() - 0.3  # there is something to compare
    np.testing.assert_allclose(curves[:, 0], curves[:, 1], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("clip_norm", "norm"), [(1.0, 1.0), (50.0, 10.0), (0.0, 10.0)])
def test_gradients_of_a_larger_norm_are_scaled_down(clip_norm, norm):
    model = torch.nn.Linear(5, 5, bias=False)
    before, model.weight.grad = model.weight.detach().clone(), torch.full((5, 5), 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert update_weights(model, optimizer, scaler, clip_norm) == 0
    assert (model.weight - before).norm().item() == pytest.approx(norm, rel=1e-4)


# --- whole runs --------------------------------------------------------------------------------------------------


def small(encoder_folder, out, *more):
    """A short training on the sample, in fp32 and without dropout; 30 sentences a batch do not divide evenly."""
    settings = f"--data {SAMPLE} --model {encoder_folder} --out {out} --amp off --limit 320 --split stratified"
    return ["train.py", *settings.split(), *"--batch-size 30 --epochs 2 --lr 1e-3 --head bilstm".split(), *more]


def result(folder):
    with open(folder / "valid.csv", encoding="utf-8", newline="") as file:
        probs = np.array([json.loads(row["probs"]) for row in csv.DictReader(file)])
    return json.loads((folder / "summary.json").read_text())["best"], probs


@pytest.fixture
def one_process(run, encoder_folder, tmp_path):
    run(*small(encoder_folder, "one"))
    return result(tmp_path / "one")


@pytest.mark.parametrize("processes", [2, 3])
def test_more_processes_and_smaller_parts_train_the_same_model(run, encoder_folder, tmp_path, one_process, processes):
    run(*small(encoder_folder, "more", "--max-tokens", "300"), processes=processes)
    scores, probs = result(tmp_path / "more")
    np.testing.assert_allclose(probs, one_process[1], atol=2e-4)
    assert scores["step"] == one_process[0]["step"]
    assert scores["micro_f1"] == pytest.approx(one_process[0]["micro_f1"], abs=1e-6)
    assert scores["auprc"] == pytest.approx(one_process[0]["auprc"], abs=0.05)


def test_a_run_goes_on_as_if_it_had_not_stopped(run, encoder_folder, tmp_path):
    """Dropout on: the masks too are the same. The second run begins at the save before the last."""
    config = json.loads((encoder_folder / "config.json").read_text()) | {"hidden_dropout_prob": 0.1}
    shutil.copytree(encoder_folder, tmp_path / "encoder")
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config))
    command = [*small("encoder", "a", "--save-every", "4"), "--eval-every", "6"]
    run(*command)
    whole = torch.load(tmp_path / "a" / "last.pt", weights_only=True)

    shutil.copytree(tmp_path / "a", tmp_path / "b")
    steps = whole["progress"]["step"]
    assert steps == 22
    (tmp_path / "b" / "last.pt").unlink()
    before = torch.load(tmp_path / "b" / "previous.pt", weights_only=True)["progress"]["step"]
    assert 0 < before < steps
    done = run(*[part if part != "a" else "b" for part in command])
    assert f"going on after step {before}" in done.stdout
    resumed = torch.load(tmp_path / "b" / "last.pt", weights_only=True)
    assert resumed["progress"]["step"] == steps
    assert all(torch.equal(resumed["weights"][k], whole["weights"][k]) for k in whole["weights"])
    assert (tmp_path / "a" / "valid.csv").read_bytes() == (tmp_path / "b" / "valid.csv").read_bytes()

    refused = run(*command, "--lr", "5", code=2)
    assert "lr = 0.001, now 5.0" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
    finished = run(*command)
    assert f"going on after step {steps}\nit has been to its end before" in finished.stdout


def test_another_data_set_with_its_own_labels(run, encoder_folder, tmp_path, rows):
    def fields(r):
        names = {"no_relation": "none", "per:title": "직함"}
        s, o = ({"word": e.word, "start_idx": e.start, "end_idx": e.end} for e in (r.subject, r.object))
        return {"guid": r.id, "sentence": r.sentence, "subject_entity": s, "object_entity": o, "label": names[r.label]}

    chosen = [fields(r) for r in rows if r.label in ("no_relation", "per:title")]
    (tmp_path / "own").mkdir()
    for name in ("train", "test_data"):
        (tmp_path / "own" / f"{name}.jsonl").write_text("\n".join(json.dumps(r) for r in chosen), encoding="utf-8")
    base = f"train.py --data own --model {encoder_folder} --out a --epochs 1 --negative-label none --split stratified"
    refused = run(*base.split(), code=2)
    assert "object_entity: has no type" in refused.stderr or "subject_entity: has no type" in refused.stderr
    (tmp_path / "alpha.json").write_text('{"none": 0.5}')
    run(*base.split(), "--marker", "entity_marker", "--focal-gamma", "2", "--focal-alpha", "alpha.json")
    done = run("infer.py", "a/ckpt.pt")
    assert "micro F1" in done.stdout
    run("ensemble.py", "out/a.csv", "--soft")
    with open(tmp_path / "submission.csv", encoding="utf-8", newline="") as file:
        assert {row["pred_label"] for row in csv.DictReader(file)} <= {"none", "직함"}

    # predictions are to have as many negatives as these rows, not as KLUE-RE's test set
    train_rows, valid, scaling_rows, share, *_ = choose_rows(
        Settings(data=str(tmp_path / "own"), negative_label="none"), print
    )
    assert share == pytest.approx(np.mean([row.label == "none" for row in train_rows + valid]))
    assert len(scaling_rows) == len(chosen)
    assert choose_rows(Settings(data=str(SAMPLE), no_relation_share=0.4), print)[3] == 0.4


def test_no_sentence_of_a_validation_file_is_trained_on(tmp_path, capsys):
    lines = (SAMPLE / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "valid.csv").write_text("".join(lines[:40]), encoding="utf-8")
    settings = Settings(data=str(SAMPLE), valid=str(tmp_path / "valid.csv"))
    found, valid, _, share, *_ = choose_rows(settings, print)
    assert (len(valid), share) == (39, 0.6)
    assert {row.sentence for row in found}.isdisjoint(row.sentence for row in valid)
    assert re.search(r"left out (39|[4-9]\d) rows whose sentences are in .*valid.csv too", capsys.readouterr().out)
    with pytest.raises(InputError, match="0 rows to train on"):
        choose_rows(replace(settings, valid=str(SAMPLE / "train.csv")), print)


def test_a_fold_and_bad_rows_are_left_out_as_asked(tmp_path):
    found, valid, scaling_rows, *_ = choose_rows(Settings(data=str(SAMPLE), folds=5, fold=3), print)
    cleaned, _ = data.clean(data.read_rows(SAMPLE / "train.csv"))
    assert (found, valid) == data.fold(cleaned, 5, 3, train.DATA_SEED)
    assert scaling_rows == []

    lines = (SAMPLE / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.csv").write_text("".join([*lines, "bad,a,b,c,no_relation,\n"]), encoding="utf-8")
    for choose in (choose_rows, train.choose_sentences):
        settings, said = Settings(data=str(tmp_path)), []
        with pytest.raises(InputError, match=rf"train.csv:{len(lines) + 1}: "):
            choose(settings, said.append)
        choose(replace(settings, skip_bad_rows=True), said.append)
        assert any(text.startswith("left out 1 bad rows, the first: ") for text in said)


PLAN = {"micro_f1": [50, 70, 60, 65, 10], "auprc": [10, 20, 40, 30, 5]}


@pytest.mark.parametrize(("metric", "best", "n"), [("micro_f1", 1, 4), ("auprc", 2, 5)])
def test_the_best_evaluations_model_is_kept_till_patience_ends(
    call, encoder_folder, tmp_path, monkeypatch, metric, best, n
):
    planned = iter([{"micro_f1": a, "auprc": b, "accuracy": 0, "absent": []} for a, b in zip(*PLAN.values())])
    monkeypatch.setattr(train, "score", lambda probs, gold: next(planned))
    command = [*small(encoder_folder, "a")[1:], *"--head cls --eval-every 4 --patience 2 --layer-decay 0.5".split()]
    call(train, *command, "--best-metric", metric)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert [scores["step"] for scores in summary["evaluations"]] == [4, 8, 12, 16, 20][:n]
    assert (summary["step"], summary["best"]["step"]) == (4 * n, 4 * (best + 1))
    assert summary["best"][metric] == max(PLAN[metric])
    kept, last = (torch.load(tmp_path / "a" / name, weights_only=True) for name in ("ckpt.pt", "last.pt"))
    assert kept["scores"] == summary["best"]
    assert not torch.equal(kept["weights"]["classifier.weight"], last["weights"]["classifier.weight"])
    call(train, *command, "--best-metric", metric)  # its patience is at its end: nothing is evaluated

    # the rates by layer are those that the last step was made with
    rate = learning_rate(Settings(lr=1e-3), 4 * n - 1, 22)
    groups = last["optimizer"]["param_groups"]
    assert {round(group["lr"] / rate, 6) for group in groups} == {1, 0.5, 0.25, 0.125}
    assert all(group["lr"] == pytest.approx(rate * group["scale"]) for group in groups)


def test_without_validation_every_row_is_trained_on_and_the_last_model_kept(call, encoder_folder, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "valid.csv").write_text("of an earlier run")
    settings = f"--data {SAMPLE} --model {encoder_folder} --limit 90 --amp off --batch-size 30 --lr 1e-3 --epochs 2"
    done = call(train, *settings.split(), "--valid", "none", "--no-clean", "--out", "all")
    assert "90 rows to train on, 0 to validate on" in done.out
    assert "F1" not in done.out
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert (summary["step"], summary["sentences"], summary["best"]) == (6, 180, {"step": 6})
    last, kept = (torch.load(tmp_path / "all" / f"{name}.pt", weights_only=True) for name in ("last", "ckpt"))
    assert all(torch.equal(kept["weights"][k], last["weights"][k]) for k in kept["weights"])
    assert not (tmp_path / "all" / "valid.csv").exists()
    assert "micro F1" in call(infer, "all/ckpt.pt").out


def test_a_limit_leaves_the_validation_rows_as_they_are_and_the_learning_rate_suits_the_encoder(
    call, encoder_folder, tmp_path
):
    settings = f"--data {SAMPLE} --model {encoder_folder} --amp off --epochs 1 --batch-size 30 --no-relation-share 0.4"
    ids = []
    for limit in (60, 90):
        done = call(train, *settings.split(), "--limit", limit, "--out", f"run-{limit}")
        assert f"{limit} rows to train on" in done.out
        assert "learning rate 0.0026 at the top, 0.377 times that from each layer" in done.out
        ids.append(read_predictions(str(tmp_path / f"run-{limit}" / "valid.csv")).ids)
    assert ids[0] == ids[1]
    content = torch.load(tmp_path / "run-90" / "ckpt.pt", weights_only=True)
    assert content["settings"]["lr"] == 0.0026  # 4e-5 x (1024 / 128)²

    # the share of no_relation in the rows to predict is what was asked for
    call(infer, "run-90/ckpt.pt", "--amp", "off")
    predicted = read_predictions(str(tmp_path / "out" / "run-90.csv")).predicted
    assert content["negative_factor"] > 0
    assert abs(np.mean([label == "no_relation" for label in predicted]) - 0.4) < 0.02


def test_seeds_train_a_run_each_and_their_checkpoints_predict_together(call, encoder_folder, tmp_path, monkeypatch):
    settings = f"--data {SAMPLE} --model {encoder_folder} --limit 300 --split stratified --amp off --lr 1e-3 --epochs 2"
    done = call(train, *settings.split(), "--seeds", "2", "--seed", "7", "--out", "s")
    best = [json.loads((tmp_path / f"s-seed={seed}" / "summary.json").read_text())["best"] for seed in (7, 8)]
    mean, sd = np.mean([b["micro_f1"] for b in best]), np.std([b["micro_f1"] for b in best], ddof=1)
    assert f"micro_f1 {mean:.2f} ± {sd:.2f}" in done.out
    assert "python infer.py s-seed=7/ckpt.pt s-seed=8/ckpt.pt" in done.out
    again = call(train, *settings.split(), "--seeds", "2", "--seed", "7", "--out", "s")
    assert again.out.count("going on after step") == 2
    shutil.rmtree(tmp_path / "s-seed=8")  # as if it had been stopped before
    again = call(train, *settings.split(), "--seeds", "2", "--seed", "7", "--out", "s", "--resume")
    assert again.out.count("going on after step") == 1

    one, other = "s-seed=7/ckpt.pt", "s-seed=8/ckpt.pt"
    for name in (one, other):
        call(infer, name)
    call(infer, one, other)
    names = ("s-seed=7", "s-seed=8", "s-seed=7+s-seed=8")
    a, b, both = (read_predictions(str(tmp_path / "out" / f"{name}.csv")) for name in names)
    np.testing.assert_allclose(both.probs, (a.probs + b.probs) / 2, atol=1e-12)
    assert np.abs(a.probs - b.probs).max() > 1e-3
    content = torch.load(tmp_path / other, weights_only=True)
    torch.save(content | {"labels": content["labels"][::-1]}, tmp_path / "turned.pt")
    assert "turned.pt: its labels, or their order" in call(infer, one, "turned.pt", code=2).err
    torch.save(content | {"run": "../elsewhere"}, tmp_path / "other.pt")
    call(infer, "other.pt")
    assert (tmp_path / "out" / "elsewhere.csv").exists()

    # --fresh: nothing goes on from an old run of a later seed, wherever this one ends
    monkeypatch.setattr(train, "batch_gradients", lambda *_: sys.exit(9))
    call(train, *settings.split(), "--seeds", "2", "--seed", "7", "--out", "s", "--fresh", code=9)
    assert not list(tmp_path.glob("s-seed=*/last.pt"))


def test_what_is_wrong_with_the_data_is_one_line(run, tmp_path):
    done = run("train.py", code=2)
    assert done.stderr.strip().startswith("train.py: data: no train.csv")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("id,sentence,subject_entity,object_entity,label\n0,a,b,c,d\n")
    done = run("train.py", code=2)
    assert done.stderr.strip() == "train.py: data/train.csv:2: subject_entity: found 'b', expected a dict literal"
