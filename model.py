"""The model: a pretrained encoder over flat batches, and a head that predicts the relation.

model = RelationModel(load_encoder("klue/roberta-large"), n_labels=30, head="bilstm")
logits = model(batch)                                     # (B, 30), in the order of the batch
loss = relation_loss(logits, batch.labels).sum()
probs = predict(model, examples, Worker(torch.device("cpu")))      # (N, 30)
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from tqdm import tqdm

from attention import Dropout, last_rnn_states_on_cpu
from common import InputError, bar_options
from distributed import Worker
from encoder import FlatEncoder
from graphs import GraphedForward, is_capturable
from tokens import PAD_LENGTH, Batch, Example, collate, to_device, within_tokens

# --- heads ------------------------------------------------------------------------------------


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation that uses the running statistics for a batch of one sentence."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            return super().forward(x)
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)


NORMS = {"layer": nn.LayerNorm, "batch": BatchNorm, "none": nn.Identity}


class RelationModel(FlatEncoder):
    """Encoder, pooling and classifier: maps a Batch to logits (B, n_labels).

    Pooling by head: "cls" takes the first token; "entity" the first token and the first token of
    both opening markers; "bilstm" and "bigru" the final forward and backward state of an RNN over
    the sentence. In a decoder, which sees earlier tokens only, "cls" takes the last token and
    "entity" the last token and the ends of the closing markers.
    """

    def __init__(self, encoder, n_labels: int, head="cls", norm="layer", gelu=False, dropout=0.0,
                 entity_embedding="none"):  # fmt: skip
        super().__init__(encoder, entity_embedding)
        self.head = head
        hidden = encoder.config.hidden_size
        width = hidden * {"cls": 1, "entity": 3, "bilstm": 2, "bigru": 2}[head]
        if head in ("bilstm", "bigru"):
            rnn = nn.GRU if head == "bigru" else nn.LSTM
            self.rnn = rnn(hidden, hidden, bidirectional=True)
            for name, weight in self.rnn.named_parameters():
                nn.init.xavier_normal_(weight) if "weight" in name else nn.init.zeros_(weight)
        self.norm = NORMS[norm](width)
        self.activation = nn.GELU() if gelu else nn.Identity()
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(width, n_labels)
        nn.init.kaiming_normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.classify(self.pool(batch))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.activation(self.norm(features))))

    def pool(self, batch: Batch) -> torch.Tensor:
        """The features that the head reads, (B, width)."""
        n = len(batch.labels)
        token, markers = batch.offsets[:n].long(), batch.marker_starts
        if self.is_causal:
            token, markers = batch.offsets[1 : n + 1].long() - 1, batch.marker_ends
        if self.head == "cls":
            return self.encode_only(batch, token)
        if self.head == "entity":
            tokens = torch.cat([token[:, None], markers], 1)  # (B, 3)
            return self.encode_only(batch, tokens.flatten()).view(len(tokens), -1)
        return self.last_rnn_states(self.encode(batch), batch)

    def last_rnn_states(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Final forward and backward state of the RNN over states (T, hidden), (B, 2 * hidden).

        Missing sentences of a padded batch get zeros.
        """
        n = len(batch.indices)
        if not states.is_cuda:
            last = last_rnn_states_on_cpu(self.rnn, states, batch)
        else:
            lengths = torch.tensor(batch.lengths[:n])
            # PackedSequence: by position, then sentence
            order = batch.positions[: lengths.sum()].argsort(stable=True)
            sizes = (lengths > torch.arange(lengths[0])[:, None]).sum(1)  # must be on the CPU
            with torch.autocast("cuda", enabled=False):  # autocast would use fp16, also with bf16
                _, last = self.rnn(PackedSequence(states[order].float(), sizes))
            last = last if self.head == "bigru" else last[0]  # (2, B, hidden)
            last = torch.cat([last[0], last[1]], 1)
        return F.pad(last, (0, 0, 0, len(batch.labels) - n))


def relation_loss(
    logits, labels, label_smoothing=0.0, focal_gamma=0.0, focal_alpha=None, targets=None
):
    """The loss of each sentence, (B,), for logits (B, n_labels) and labels (B,).

    It is 0 for the label IGNORED of tokens.py.
    Cross entropy; with focal_gamma the focal loss on the softmax,
    FL(p_t) = -alpha_t (1 - p_t)^gamma log p_t (Lin et al. 2017). focal_alpha (n_labels,) weights
    the labels in both.
    With targets (B, n_labels): the cross entropy against them, whatever the labels; 0 for zeros.
    """
    logits = logits.float()
    if targets is not None:
        return F.cross_entropy(logits, targets, reduction="none")
    smoothing = {"label_smoothing": label_smoothing, "reduction": "none"}
    loss = F.cross_entropy(logits, labels, focal_alpha, **smoothing)
    if not focal_gamma:
        return loss
    p_t = logits.softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return loss * (1 - p_t) ** focal_gamma


MANY_BATCHES = 16  # from here on recording a graph takes less time than it saves


@torch.inference_mode()
def predict(model: RelationModel, examples: list[Example], worker: Worker, max_tokens=16384, *,
            progress=True, cuda_graphs=True):  # fmt: skip
    """Probabilities (N, n_labels) in float64, in the order of the examples, on every rank.

    Each rank computes a part. InputError if a probability is not finite.
    """
    model.eval()
    if worker.device.type == "cpu":
        max_tokens = min(max_tokens, 4096)  # fits the caches: a tenth faster than 16,384
    lengths = np.array([len(e.ids) for e in examples])
    batches = within_tokens(np.arange(len(examples)), lengths, max_tokens)
    batches = batches[worker.rank :: worker.world_size]
    shape = len(examples), model.classifier.out_features
    probs = torch.zeros(*shape, dtype=torch.float64, device=worker.device)
    how = bar_options(worker.rank > 0 or not progress, delayed=True)
    forward = None
    many = len(batches) >= MANY_BATCHES and not hasattr(model, "rnn")
    with worker.current_device(), worker.autocast():  # around the loop: each weight is cast once
        if cuda_graphs and many and is_capturable(model, worker):
            longest = max(int(lengths.max()), PAD_LENGTH)
            forward = GraphedForward(model, worker, max(map(len, batches)), longest)
        for indices in tqdm(batches, unit="batch", leave=False, **how):
            batch = collate(examples, indices)
            rows = to_device(torch.from_numpy(batch.indices), worker.device)
            logits = forward(batch) if forward else model(batch.to(worker.device))
            probs[rows] = logits.double().softmax(1)
    probs = worker.sum(probs).cpu().numpy()
    if not np.isfinite(probs).all():
        n_bad = (~np.isfinite(probs)).any(1).sum()
        raise InputError(f"{n_bad} rows have probabilities that are not finite; try --amp off")
    return probs
