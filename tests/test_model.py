"""The encoder over flat batches, the heads, the losses, prediction and the checkpoint."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import log_loss
from torch._dynamo.backends.debugging import aot_eager

from data import InputError
from infer import Machine, negative_factor, predict, scale_negative
from model import (
    MODEL_FORMAT,
    Dropout,
    Example,
    RelationModel,
    Softmax,
    collate,
    load_checkpoint,
    load_encoder,
    load_tokenizer,
    relation_loss,
    restore,
    save_checkpoint,
    within_tokens,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "bert": transformers.BertConfig(**SMALL, **NO_DROPOUT),
    "roberta": transformers.RobertaConfig(**SMALL, **NO_DROPOUT, type_vocab_size=1, pad_token_id=1),
    "xlm-r": transformers.XLMRobertaConfig(**SMALL, **NO_DROPOUT, type_vocab_size=1, pad_token_id=1),
    "electra": transformers.ElectraConfig(**SMALL, **NO_DROPOUT, embedding_size=16),
    # windows of 8 tokens, shorter than the sentences
    "modernbert": transformers.ModernBertConfig(**SMALL, local_attention=8, pad_token_id=0, bos_token_id=1,
                                                eos_token_id=2, cls_token_id=1, sep_token_id=2),
    "deberta-v2": transformers.DebertaV2Config(**SMALL, **NO_DROPOUT, relative_attention=True, position_buckets=8,
                                               pos_att_type=["p2c", "c2p"], type_vocab_size=2),
}  # fmt: skip
DECODERS = {
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=99, resid_pdrop=0.0, embd_pdrop=0.0,
                                    attn_pdrop=0.0),
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8),
    "qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8),
}  # fmt: skip
CPU = Machine(torch.device("cpu"), None)


def encoder_of(family):
    torch.manual_seed(0)
    return transformers.AutoModel.from_config(copy.deepcopy((FAMILIES | DECODERS)[family]))


def examples_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [
        Example(
            random.integers(5, 99, n), np.sort(random.integers(0, 2, n)), (1, n - 2), int(random.integers(30)),
            (2, n - 1), np.stack([random.integers(0, 3, n), random.integers(0, 7, n)]),
        )
        for n in lengths
    ]  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_flat_states_equal_padded_states(family, training):
    encoder = encoder_of(family)
    padded = copy.deepcopy(encoder).train(training)
    model = RelationModel(encoder, 30).train(training)
    assert model.is_flat == (family != "deberta-v2")
    assert model.is_causal == (family in DECODERS)
    examples = examples_of((7, 30, 7, 13, 25, 25))
    batch = collate(examples, np.arange(6))
    states = model.encode(batch)

    ids = torch.full((6, 30), model.encoder.config.pad_token_id or 0)
    mask, types = torch.zeros(6, 30, dtype=torch.long), torch.zeros(6, 30, dtype=torch.long)
    for i, row in enumerate(batch.indices):
        n = len(examples[row].ids)
        ids[i, :n], types[i, :n] = torch.from_numpy(examples[row].ids), torch.from_numpy(examples[row].segments)
        mask[i, :n] = 1
    types = {"token_type_ids": types} if model.has_segments else {}
    assert model.has_segments == (family in ("bert", "electra", "deberta-v2"))
    expected = padded(input_ids=ids, attention_mask=mask, **types).last_hidden_state[mask.bool()]
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)

    # and the same gradients reach the embeddings
    direction = torch.randn_like(states)
    (states * direction).sum().backward()
    (expected * direction).sum().backward()
    found, wanted = (e.get_input_embeddings().weight.grad for e in (model.encoder, padded))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"deberta-v2"} | DECODERS.keys()))
def test_a_gpus_kernel_is_asked_for_the_same_attention(family, monkeypatch):
    """The kernel itself takes a GPU (tests/test_gpu.py); here one stands in for it that does in double precision what
    its documentation says, sentence by sentence, and refuses another layout."""
    n_calls = 0

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        nonlocal n_calls
        n_calls += 1
        assert query.shape == key.shape == value.shape
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == max_k == cu_seq_q.diff().max()
        out = []
        for q, k, v in zip(*(x.split(cu_seq_q.diff().tolist()) for x in (query, key, value))):
            ahead = torch.arange(len(q)) - torch.arange(len(q))[:, None]  # of the query, the key is
            left, right = (width if width >= 0 else len(q) for width in window_size)
            seen = (-left <= ahead) & (ahead <= right)
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            out.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1))
        return torch.cat(out)

    model = RelationModel(encoder_of(family), 30).double()  # in fp32 the kernel is not asked
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling = 0.5  # as is no default
    batch = collate(examples_of((7, 30, 7, 13, 25, 25)), np.arange(6))
    expected = model.encode(batch)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    states = model.encode(batch)
    assert n_calls == 3
    torch.testing.assert_close(states, expected)


@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_states_of_some_tokens_equal_those_among_all(family):
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
def test_the_last_layer_leaves_out_what_is_not_read(family):
    model, seen = RelationModel(encoder_of(family), 30, "entity"), []
    for layer in model.encoder.encoder.layer:
        layer.intermediate.register_forward_pre_hook(lambda _, states: seen.append(states[0].shape[1]))
    batch = collate(examples_of((7, 30)), np.arange(2))
    model(batch)
    model.encode(batch)
    assert seen == [37, 37, 6, 37, 37, 37]


@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_compiled_layers_compute_what_they_did(family, monkeypatch):
    """With torch.compile's graphs, but not its code for them, which takes a compiler."""
    graphs, compiled, compile = [], [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def compile_layer(layer, **how):
        compiled.append(layer)
        compile(layer, backend=backend, **how)

    torch.compiler.reset()
    model = RelationModel(encoder_of(family), 30, "entity")
    plain = copy.deepcopy(model)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
    model.compile_layers()
    assert len(compiled) == 2
    n_graphs = []
    for lengths in ((7, 30, 7, 13), (9, 9), (8, 31, 12, 12, 25)):
        batch = collate(examples_of(lengths), np.arange(len(lengths)))
        found, expected = model(batch), plain(batch)
        found.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        n_graphs.append(len(graphs))
    for found, expected in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4)
    assert n_graphs[0] == n_graphs[2] > 0  # other lengths are not compiled anew


@pytest.mark.parametrize("length", [32, 83])
def test_softmax_and_its_gradient_are_torchs(length):
    torch.manual_seed(0)
    x, direction = 9 * torch.randn(5, length, length, dtype=torch.float64), torch.randn(5, length, length)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        given, expected = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
        found = Softmax.apply(given)
        (found * direction.to(dtype)).sum().backward()
        wanted = expected.softmax(-1)
        (wanted * direction.to(dtype).double()).sum().backward()
        assert found.dtype == given.grad.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(given.grad.double(), expected.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("family", FAMILIES | DECODERS)
def test_entity_embeddings_start_as_nothing_and_are_learned(family, typed):
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


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("head", ["cls", "entity", "bilstm", "bigru"])
def test_heads_read_what_they_say(head, family):
    model = RelationModel(encoder_of(family), 30, head, norm="none").eval()
    examples = examples_of((9, 4, 17, 9))
    batch = collate(examples, np.arange(4))
    logits = model(batch)
    assert logits.shape == (4, 30)
    for i, row in enumerate(batch.indices):  # each sentence by itself, by plain torch
        example = examples[row]
        states = model.encode(collate([example], np.array([0])))
        token, marks = (0, example.openings) if family == "bert" else (-1, example.closings)
        expected = {"cls": [states[token]], "entity": [states[token], states[marks[0]], states[marks[1]]]}
        if head not in expected:
            out, _ = model.rnn(states[:, None])
            expected[head] = [out[-1, 0, :32], out[0, 0, 32:]]
        features = expected[head]
        torch.testing.assert_close(logits[i], model.classifier(torch.cat(features)), rtol=1e-4, atol=1e-5)


def test_what_stands_before_the_classifier():
    model = RelationModel(encoder_of("bert"), 30, norm="layer", gelu=True, dropout=0.5)
    assert isinstance(model.norm, torch.nn.LayerNorm)
    assert isinstance(model.activation, torch.nn.GELU)
    assert model.dropout.p == 0.5
    assert isinstance(RelationModel(encoder_of("bert"), 30, norm="batch").norm, torch.nn.BatchNorm1d)


def test_dropout_drops_the_share_it_says_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.ones(1000, 1001)
    y = dropout(x)
    assert abs((y == 0).float().mean() - 0.1) < 0.001
    assert abs(y.mean() - 1) < 0.002
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.9)}
    assert torch.equal(dropout.eval()(x), x)
    model = RelationModel(transformers.AutoModel.from_config(transformers.BertConfig(**SMALL)), 30)
    assert {type(m) for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {Dropout}


def test_losses():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 30), torch.randint(30, (6,))
    p = logits.softmax(1).numpy()
    expected = log_loss(labels.numpy(), p.astype(float), labels=range(30))
    assert relation_loss(logits, labels).mean().item() == pytest.approx(expected, rel=1e-5)
    p_t = p[np.arange(6), labels]
    alpha = torch.rand(30)
    found = relation_loss(logits, labels, focal_gamma=2.0, focal_alpha=alpha)
    np.testing.assert_allclose(found, -alpha[labels] * (1 - p_t) ** 2 * np.log(p_t), rtol=1e-4)
    smooth = relation_loss(logits, labels, label_smoothing=0.1).numpy()
    np.testing.assert_allclose(smooth, -0.9 * np.log(p_t) - 0.1 * np.log(p).mean(1), rtol=1e-4)


def test_runs_within_a_token_budget_hold_every_row_once():
    lengths = np.array([5, 3, 9, 40, 2, 2])
    runs = within_tokens(np.arange(6), lengths, 10)
    assert sorted(np.concatenate(runs)) == list(range(6))
    assert all(lengths[run].sum() <= 10 or len(run) == 1 for run in runs)
    assert runs[0].tolist() == [3]


@pytest.mark.parametrize("head", ["entity", "bilstm", "bigru"])
@pytest.mark.parametrize("family", ["roberta", "deberta-v2"])
def test_predictions_do_not_depend_on_the_batch(family, head):
    model = RelationModel(encoder_of(family), 30, head)
    examples = examples_of((9, 4, 17, 9, 30, 22, 4))
    together = predict(model, examples, CPU)
    alone = predict(model, examples, CPU, max_tokens=1)
    turned = predict(model, examples[::-1], CPU, max_tokens=40)[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, turned, atol=1e-5)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-12)


def test_encoders_load_as_fp32_and_new_tokens_start_as_the_mean(encoder_folder, tmp_path):
    transformers.AutoModel.from_pretrained(encoder_folder, dtype=torch.float16).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    old = encoder.get_input_embeddings().weight
    new = load_encoder(str(tmp_path), range(len(old), len(old) + 3)).get_input_embeddings().weight
    torch.testing.assert_close(new[: len(old)], old)
    torch.testing.assert_close(new[len(old) :], old.mean(0).expand(3, -1))
    # a vocabulary padded with rows that no token has
    padded = load_encoder(str(tmp_path), range(len(old) - 5, len(old) - 3)).get_input_embeddings().weight
    torch.testing.assert_close(padded[-5:-3], old[:-5].mean(0).expand(2, -1))
    torch.testing.assert_close(padded[-3:], old[-3:])


def test_an_absent_encoder_is_one_line(tmp_path):
    for load in (load_encoder, load_tokenizer):
        with pytest.raises(InputError, match=r"--model .*absent: .*: no such folder") as raised:
            load(str(tmp_path / "absent"))
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"no tokenizer.json in it$"):
        load_tokenizer(str(tmp_path))


@pytest.fixture
def checkpoint(tmp_path, encoder_folder):
    tokenizer = load_tokenizer(str(encoder_folder))
    tokenizer.add_tokens(["[E1]"])
    encoder = load_encoder(str(encoder_folder), range(len(tokenizer) - 1, len(tokenizer)))
    model = RelationModel(encoder, 3, "bigru")
    settings = {"head": "bigru", "norm": "layer", "gelu": False, "dropout": 0.0}
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer, ["a", "b", "c"], settings=settings)
    return tmp_path / "ckpt.pt", model, tokenizer


def test_a_checkpoint_brings_back_model_and_tokenizer(checkpoint):
    path, model, tokenizer = checkpoint
    restored, restored_tokenizer = restore(load_checkpoint(path))
    examples = examples_of((9, 4, 17))
    np.testing.assert_array_equal(predict(model, examples, CPU), predict(restored, examples, CPU))
    assert restored_tokenizer("[E1] 비틀즈")["input_ids"] == tokenizer("[E1] 비틀즈")["input_ids"]
    assert restored_tokenizer.sep_token == "[SEP]"


def test_a_truncated_or_foreign_checkpoint_is_named(checkpoint, tmp_path):
    path = checkpoint[0]
    content = path.read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_text("")
    torch.save({"weights": {}}, tmp_path / "foreign.pt")
    torch.save({"format": "training progress 1"}, tmp_path / "progress.pt")
    for name in ("half.pt", "text.pt", "empty.pt", "foreign.pt", "progress.pt", "absent.pt"):
        with pytest.raises(InputError, match=name) as raised:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_the_negative_label_gets_its_share_and_the_others_keep_their_order():
    probs = np.random.default_rng(0).dirichlet(np.ones(5), 1000)
    assert (probs.argmax(1) == 0).mean() < 0.25
    for share in (0.1, 0.6, 0.9):
        scaled = scale_negative(probs, negative_factor(probs, share))
        assert abs((scaled.argmax(1) == 0).mean() - share) < 0.002
        np.testing.assert_allclose(scaled.sum(1), 1)
        np.testing.assert_allclose(scaled[:, 1:] / scaled[:, 1:2], probs[:, 1:] / probs[:, 1:2])
    np.testing.assert_array_equal(scale_negative(probs, 1.0), probs / probs.sum(1, keepdims=True))
    certain = np.eye(5)[np.arange(10) % 5]  # no probability of the negative label in 8 of 10 rows
    assert np.isfinite(scale_negative(certain, negative_factor(certain, 0.9))).all()


class Planted:
    def __reduce__(self):
        return (open, ("planted", "w"))


def test_a_planted_pickle_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": MODEL_FORMAT, "weights": Planted()}, "bad.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Planted()))
    for name in ("bad.pt", "raw.pt"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(name)
    assert not (tmp_path / "planted").exists()


def test_a_checkpoint_writes_no_file_outside(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint[0])
    for name in (str(tmp_path / "planted"), "../planted"):
        content["tokenizer"] = {name: "{}"}
        with pytest.raises(InputError, match="planted"):
            restore(content)
    assert not (tmp_path / "planted").exists()


def test_batch_norm_takes_a_single_sentence():
    model = RelationModel(encoder_of("bert"), 30, norm="batch").train()
    assert model(collate(examples_of((9,)), np.array([0]))).isfinite().all()


def test_probabilities_that_are_not_finite_are_refused():
    model = RelationModel(encoder_of("bert"), 30)
    model.classifier.bias.data[0] = float("nan")
    with pytest.raises(InputError, match="3 rows have probabilities that are not finite"):
        predict(model, examples_of((9, 4, 17)), CPU)
