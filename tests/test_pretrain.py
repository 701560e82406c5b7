"""Pre-training on masked tokens: which are masked, the model that predicts them, whole runs."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers

import pretrain
import train
from common import InputError
from encoder import load_encoder, load_tokenizer
from pretrain import (
    MaskedLanguageModel,
    PretrainingSettings,
    choose_sentences,
    collate_masked,
    encode_sentences,
    load_language_model,
    n_masked,
)
from rows import read_rows
from tests.helpers import FAMILIES, SAMPLE, next_commands, write_rows

# --- sentences and masks ------------------------------------------------------------------------


def test_held_out_sentences_are_not_trained_on(rows):
    settings = PretrainingSettings(data=str(SAMPLE))
    sentences, valid, _ = choose_sentences(settings, print)
    assert set(sentences).isdisjoint(valid)
    assert len(valid) == (len(sentences) + len(valid)) // 10
    all_rows = [*rows, *read_rows(SAMPLE / "test_data.csv")]
    assert {*sentences, *valid} == {row.sentence for row in all_rows}


@pytest.fixture
def sentences(encoder_folder, rows):
    """(examples of the sample's sentences, tokenizer)."""
    tokenizer = load_tokenizer(str(encoder_folder))
    examples, n_truncated = encode_sentences([row.sentence for row in rows], tokenizer, 256)
    assert n_truncated == 0
    return examples, tokenizer


def test_sentences_are_tokenized_alone_and_truncated(encoder_folder, rows):
    tokenizer = load_tokenizer(str(encoder_folder))
    texts = [rows[0].sentence, rows[1].sentence * 30, rows[2].sentence]
    examples, n_truncated = encode_sentences(texts, tokenizer, 64)
    assert (len(examples), n_truncated) == (3, 1)
    for text, example in zip(texts, examples):
        words = example.words
        assert example.ids.tolist() == tokenizer(text, truncation=True, max_length=64)["input_ids"]
        assert words[0] == words[-1] == -1
        pieces = tokenizer.convert_ids_to_tokens(example.ids[1:-1].tolist())
        continues = [piece.startswith("##") for piece in pieces[1:]]
        assert continues == (np.diff(words[1:-1]) == 0).tolist()


def test_fifteen_percent_of_the_tokens_are_masked_by_whole_words(sentences):
    examples, tokenizer = sentences
    indices = np.arange(500)
    batch = collate_masked(examples, indices, [42, 7], tokenizer)
    positions, true = batch.tokens, batch.true_ids
    original = np.concatenate([examples[i].ids for i in batch.indices])
    assert (original[positions] == true.numpy()).all()
    others = np.setdiff1d(np.arange(len(original)), positions)
    assert (batch.ids.numpy()[others] == original[others]).all()
    n_real = sum((examples[i].words >= 0).sum() for i in indices)
    assert len(positions) == sum(n_masked(examples[i]) for i in indices)
    assert len(positions) / n_real == pytest.approx(0.15, abs=0.01)
    shown = batch.ids[positions]
    assert (shown == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.03)
    assert (shown == true).float().mean() == pytest.approx(0.1, abs=0.03)
    assert not set(true.tolist()) & {tokenizer.cls_token_id, tokenizer.sep_token_id}

    # whole words: at most one word of a sentence is masked in part
    chosen = np.zeros(len(original), dtype=bool)
    chosen[positions] = True
    for i, start in zip(batch.indices, batch.offsets.tolist()):
        words = examples[i].words
        masked = chosen[start : start + len(words)]
        shares = [masked[words == word].mean() for word in range(words.max() + 1)]
        assert sum(0 < share < 1 for share in shares) <= 1


def test_masks_depend_only_on_seed_step_and_sentence(sentences):
    examples, tokenizer = sentences
    whole = collate_masked(examples, np.arange(10), [42, 7], tokenizer)
    for indices in (np.arange(5), np.array([9, 3])):
        batch = collate_masked(examples, indices, [42, 7], tokenizer)
        for i, index in enumerate(batch.indices):
            (j,) = np.flatnonzero(whole.indices == index)
            a, b = (x.ids[x.offsets[k] : x.offsets[k + 1]] for x, k in ((batch, i), (whole, j)))
            assert torch.equal(a, b)
    for key in ([42, 8], [43, 7]):
        other = collate_masked(examples, np.arange(10), key, tokenizer)
        assert not torch.equal(other.ids, whole.ids)


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, sentences):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.vocab_size = 4000
    reference = transformers.AutoModelForMaskedLM.from_config(config).eval()
    model = MaskedLanguageModel(copy.deepcopy(reference)).eval()
    examples, tokenizer = sentences
    batch = collate_masked(examples, np.array([5]), [1], tokenizer)
    positions = batch.tokens
    logits = model(batch)
    expected = reference(batch.ids[None]).logits[0, positions]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_missing_head_is_new_and_tied_to_the_embeddings(encoder_folder, tmp_path):
    found, is_new = load_language_model(str(encoder_folder))
    assert is_new
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    found.save_pretrained(tmp_path)
    again, is_new = load_language_model(str(tmp_path))
    assert not is_new
    dense, dense_again = (m.cls.predictions.transform.dense.weight for m in (found, again))
    assert torch.equal(dense, dense_again)

    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1))
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"--model .*gpt2"):
        load_language_model(str(tmp_path / "gpt2"))


# --- runs ---------------------------------------------------------------------------------------


OPTIONS = f"--data {SAMPLE} --limit 200 --amp off --batch-size 20 --lr 1e-3 --epochs 3"
OPTIONS = [*OPTIONS.split(), "--max-length", "64"]


def test_pretraining_resumes_and_its_encoder_is_fine_tuned(call, encoder_folder, tmp_path):
    def command_in(folder):
        return *OPTIONS, "--model", encoder_folder, "--save-every", "5", "--out", folder

    command = command_in("tapt")
    done = call(pretrain, *command)
    assert "no masked-language-model head: a new one is trained" in done.out
    summary = json.loads((tmp_path / "tapt" / "summary.json").read_text())
    losses = [scores["loss"] for scores in summary["evaluations"]]
    assert len(losses) == 3
    assert summary["best"]["loss"] == min(losses) < losses[0] - 0.1
    assert summary["best"]["perplexity"] == pytest.approx(np.exp(summary["best"]["loss"]))
    encoder = tmp_path / "tapt" / "encoder"
    before, after = load_encoder(str(encoder_folder)), load_encoder(str(encoder))
    last = torch.load(tmp_path / "tapt" / "last.pt", weights_only=True)["weights"]
    weights = after.state_dict()
    names = [name for name in weights if not name.startswith("pooler")]
    assert all(torch.equal(weights[name], last[f"encoder.{name}"]) for name in names)
    before, after = (e.get_input_embeddings().weight for e in (before, after))
    assert not torch.equal(before, after)

    # resumes from an earlier save with the same result
    whole = (encoder / "model.safetensors").read_bytes()
    (tmp_path / "tapt" / "last.pt").unlink()
    (encoder / "model.safetensors").unlink()
    assert "resuming after step" in call(pretrain, *command).out
    assert (encoder / "model.safetensors").read_bytes() == whole

    # the same command leaves a finished run as it is
    assert "already finished" in call(pretrain, *command).out
    assert (encoder / "model.safetensors").read_bytes() == whole

    # the printed command works, and neither program resumes from the other's run
    (command,) = next_commands(done.out)
    assert command[:2] == ["python", "train.py"]
    more = "--limit 200 --valid none --epochs 1 --lr 1e-3 --out".split()
    call(train, *command[2:], *more, "fine")
    assert (tmp_path / "fine" / "ckpt.pt").exists()
    refused = call(pretrain, *command_in("fine"), code=2).err
    assert "fine/last.pt: saved by train.py; use another --out" in refused
    refused = call(train, *command[2:], *more, "tapt", code=2).err
    assert "tapt/last.pt: saved by pretrain.py; use another --out" in refused


def test_other_data_in_the_same_folder_is_named(call, encoder_folder, tmp_path, rows):
    for name in ("a b", "c"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "train.csv", rows[:40] if name == "c" else rows[:60])
    command = ["--model", encoder_folder, *"--epochs 1 --max-length 64 --out tapt --data".split()]
    done = call(pretrain, *command, "a b")
    refused = call(pretrain, *command, "c", code=2).err
    found = "saved with data = 'a b', now 'c', which has other rows"
    assert f"tapt/last.pt: {found}; use --fresh, or another --out" in refused
    (command,) = next_commands(done.out)
    assert command[2:] == ["--data=a b", "--max-length=64", "--model=tapt/encoder"]


@pytest.mark.slow
def test_processes_and_micro_batches_do_not_change_what_is_learned(
    call, run, encoder_folder, tmp_path
):
    command = *OPTIONS, "--model", encoder_folder, "--out"
    call(pretrain, *command, "one")
    run("pretrain.py", *command, "two", "--max-tokens", "200", processes=2)
    one, two = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("one", "two")
    )
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, two["weights"][name], rtol=0, atol=5e-4)
    best, best_of_two = (x["progress"]["best"]["loss"] for x in (one, two))
    assert best == pytest.approx(best_of_two, abs=1e-3)
