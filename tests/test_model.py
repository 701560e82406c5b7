"""The encoder over flat batches, the heads, the losses, and prediction."""

import copy
import itertools

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import log_loss

from attention import Dropout
from common import InputError
from encoder import load_encoder, load_tokenizer
from model import RelationModel, predict, relation_loss
from tests.helpers import CPU, DECODERS, FAMILIES, SMALL, encoder_of, examples_of
from tokens import collate

# --- the encoder --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_flat_states_equal_padded_states(family, training):
    encoder = encoder_of(family)
    padded = copy.deepcopy(encoder).train(training)
    model = RelationModel(encoder, 30).train(training)
    assert model.is_flat == (family != "deberta-v2")
    assert model.is_causal == (family in DECODERS)
    assert model.has_segments == (family in ("bert", "electra", "deberta-v2"))
    examples = examples_of((7, 30, 7, 13, 25, 25))
    batch = collate(examples, np.arange(6))
    states = model.encode(batch)

    ids = torch.full((6, 30), model.encoder.config.pad_token_id or 0)
    segments, mask = torch.zeros(2, 6, 30, dtype=torch.long)
    for i, index in enumerate(batch.indices):
        example = examples[index]
        n = len(example.ids)
        ids[i, :n] = torch.from_numpy(example.ids)
        segments[i, :n] = torch.from_numpy(example.segments)
        mask[i, :n] = 1
    segments = {"token_type_ids": segments} if model.has_segments else {}
    output = padded(input_ids=ids, attention_mask=mask, **segments)
    expected = output.last_hidden_state[mask.bool()]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)

    # the embeddings get the same gradients
    direction = torch.randn_like(states)
    (states * direction).sum().backward()
    (expected * direction).sum().backward()
    found, wanted = (e.get_input_embeddings().weight.grad for e in (model.encoder, padded))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_encode_only_equals_encode_at_those_tokens(family):
    model = RelationModel(encoder_of(family), 30)
    batch = collate(examples_of((7, 30, 7, 13)), np.arange(4))
    tokens = torch.tensor([40, 0, 0, 56, 3])
    direction = torch.randn(5, 32)
    found = []
    for states in (model.encode_only(batch, tokens), model.encode(batch)[tokens]):
        model.zero_grad()
        (states * direction).sum().backward()
        found.append([states, *(p.grad for p in model.encoder.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-r", "electra"])
def test_last_layer_processes_only_the_tokens_that_the_head_reads(family):
    model, n_tokens = RelationModel(encoder_of(family), 30, "entity"), []
    for layer in model.encoder.encoder.layer:
        layer.intermediate.register_forward_pre_hook(
            lambda _, states: n_tokens.append(states[0].shape[1])
        )
    batch = collate(examples_of((7, 30)), np.arange(2))
    model(batch)
    model.encode(batch)
    assert n_tokens == [37, 37, 6, 37, 37, 37]


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_entity_embeddings_start_at_zero_and_are_learned(family, typed):
    encoder = encoder_of(family)
    plain = RelationModel(copy.deepcopy(encoder), 30)
    model = RelationModel(encoder, 30, entity_embedding="typed" if typed else "plain")
    batch = collate(examples_of((7, 30, 7, 13)), np.arange(4))
    states = model.encode(batch)
    assert torch.equal(states, plain.encode(batch))
    (states * torch.randn_like(states)).sum().backward()
    assert len(model.entity_embeddings) == 1 + typed
    assert all((table.weight.grad.abs().sum(1) > 0).all() for table in model.entity_embeddings)
    model.entity_embeddings[0].weight.data[1].normal_()
    changed = (model.encode(batch) - states).abs().sum(1) > 1e-4
    assert changed[batch.entities[0] == 1].all()


def test_dropout_of_the_encoder_is_replaced_by_the_fast_one():
    encoder = transformers.AutoModel.from_config(transformers.BertConfig(**SMALL))
    model = RelationModel(encoder, 30)
    assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {Dropout}


def test_encoders_load_as_fp32_and_new_tokens_start_as_the_mean(encoder_folder, tmp_path):
    half = transformers.AutoModel.from_pretrained(encoder_folder, dtype=torch.float16)
    half.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    old = encoder.get_input_embeddings().weight
    n = len(old)
    new = load_encoder(str(tmp_path), range(n, n + 3)).get_input_embeddings().weight
    torch.testing.assert_close(new[:n], old)
    torch.testing.assert_close(new[n:], old.mean(0).expand(3, -1))
    # some encoders have more embeddings than their tokenizer has tokens
    padded = load_encoder(str(tmp_path), range(n - 5, n - 3)).get_input_embeddings().weight
    torch.testing.assert_close(padded[:-5], old[:-5])
    torch.testing.assert_close(padded[-5:-3], old[:-5].mean(0).expand(2, -1))
    torch.testing.assert_close(padded[-3:], old[-3:])


def test_missing_encoder_gives_a_one_line_error(tmp_path):
    for load in (load_encoder, load_tokenizer):
        with pytest.raises(InputError, match=r"--model .*absent: .*: no such folder") as raised:
            load(str(tmp_path / "absent"))
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"no tokenizer.json in it$"):
        load_tokenizer(str(tmp_path))


# --- heads and losses ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("head", ["cls", "entity", "bilstm", "bigru"])
def test_each_head_pools_the_documented_tokens(head, family):
    model = RelationModel(encoder_of(family), 30, head, norm="none").eval()
    examples = examples_of((9, 4, 17, 9))
    batch = collate(examples, np.arange(4))
    logits = model(batch)
    assert logits.shape == (4, 30)
    for i, index in enumerate(batch.indices):  # each sentence by itself, with torch's own RNN
        example = examples[index]
        states = model.encode(collate([example], np.array([0])))
        token, markers = (0, example.marker_starts)
        if family != "bert":
            token, markers = (-1, example.marker_ends)
        if head == "cls":
            features = [states[token]]
        elif head == "entity":
            features = [states[token], states[markers[0]], states[markers[1]]]
        else:
            out, _ = model.rnn(states[:, None])
            features = [out[-1, 0, :32], out[0, 0, 32:]]
        expected = model.classifier(torch.cat(features))
        torch.testing.assert_close(logits[i], expected, rtol=1e-4, atol=1e-5)


def test_layers_before_the_classifier():
    model = RelationModel(encoder_of("bert"), 30, norm="layer", gelu=True, dropout=0.5)
    assert isinstance(model.norm, torch.nn.LayerNorm)
    assert isinstance(model.activation, torch.nn.GELU)
    assert model.dropout.p == 0.5
    model = RelationModel(encoder_of("bert"), 30, norm="batch")
    assert isinstance(model.norm, torch.nn.BatchNorm1d)


def test_batch_norm_accepts_a_single_sentence():
    model = RelationModel(encoder_of("bert"), 30, norm="batch").train()
    assert model(collate(examples_of((9,)), np.array([0]))).isfinite().all()


def test_losses_match_their_formulas():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 30), torch.randint(30, (6,))
    p = logits.double().softmax(1).numpy()
    expected = log_loss(labels.numpy(), p, labels=range(30))
    assert relation_loss(logits, labels).mean().item() == pytest.approx(expected, rel=1e-5)
    p_t = p[np.arange(6), labels]
    alpha = torch.rand(30)
    focal = relation_loss(logits, labels, focal_gamma=2.0, focal_alpha=alpha)
    expected = -alpha[labels].numpy() * (1 - p_t) ** 2 * np.log(p_t)
    np.testing.assert_allclose(focal.numpy(), expected, rtol=1e-4)
    smooth = relation_loss(logits, labels, label_smoothing=0.1)
    expected = -0.9 * np.log(p_t) - 0.1 * np.log(p).mean(1)
    np.testing.assert_allclose(smooth.numpy(), expected, rtol=1e-4)
    targets = torch.rand(6, 30)
    soft = relation_loss(logits, labels, targets=targets)
    np.testing.assert_allclose(soft.numpy(), -(targets.numpy() * np.log(p)).sum(1), rtol=1e-4)
    hard = relation_loss(logits, labels, targets=torch.eye(30)[labels])
    np.testing.assert_allclose(hard.numpy(), -np.log(p_t), rtol=1e-4)


# --- prediction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["entity", "bilstm", "bigru"])
@pytest.mark.parametrize("family", ["roberta", "deberta-v2"])
def test_predictions_do_not_depend_on_the_batch(family, head):
    model = RelationModel(encoder_of(family), 30, head)
    examples = examples_of((9, 4, 17, 9, 30, 22, 4))
    together = predict(model, examples, CPU)
    alone = predict(model, examples, CPU, max_tokens=1)
    reordered = predict(model, examples[::-1], CPU, max_tokens=40)[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, reordered, atol=1e-5)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-12)


def test_non_finite_probabilities_are_an_error():
    model = RelationModel(encoder_of("bert"), 30)
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(InputError, match="3 rows have probabilities that are not finite"):
        predict(model, examples_of((9, 4, 17)), CPU)


@pytest.mark.parametrize(("seconds", "lines"), [(0.01, 0), (30, 4)])
def test_a_log_file_gets_a_line_a_minute(monkeypatch, capsys, seconds, lines):
    """Each look at the clock is so many seconds after the last: two batches take a minute."""
    clock = itertools.count(0, seconds)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    predict(RelationModel(encoder_of("bert"), 30), examples_of([9] * 8), CPU, max_tokens=1)
    printed = capsys.readouterr().err
    assert printed.count("batch/s") + printed.count("s/batch") == lines
