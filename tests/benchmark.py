"""Measures training and prediction beside Hugging Face's Trainer, and how near they come to what the chip can do.

    pip install accelerate                                             # which the Trainer needs
    KLUE_RE=data python tests/benchmark.py --model path/to/encoder     # without KLUE_RE: on the sample
    python tests/benchmark.py --model roberta-large-shape              # 24 layers of 1024, random weights
    python tests/benchmark.py --model path/to/encoder --profile        # one of our steps, by kind of work
    python tests/benchmark.py --model path/to/encoder --start          # seconds from the start to the first step

The contenders take turns, each turn in a process of its own, on the same rows: batches of the same number of
sentences, cut at 180 tokens, an epoch after three steps to warm up. Share: 6 x the encoder's parameters without
embeddings x real tokens, and 12 x layers x width x length² for attention, over the rate of a bf16 matrix product.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

from data import KLUE_LABELS, Template, read_rows  # noqa: E402
from infer import predict, running  # noqa: E402
from model import RelationModel, encode, load_encoder, load_tokenizer  # noqa: E402
from tests.sample.tiny_encoder import make_tokenizer  # noqa: E402
from train import Relations, Settings, batch_gradients, make_optimizer, training_batches, update_weights  # noqa: E402

WARM_UP = 3  # steps
SHAPES = {
    "roberta-large-shape": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
                            "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1},
}  # fmt: skip


def sample_rows(n: int):
    """n random rows, the same in every process."""
    rows = read_rows(Path(os.environ.get("KLUE_RE", ROOT / "tests" / "sample")) / "train.csv")
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:n]]


def make_encoder(shape: str, folder: str):
    """Writes a RoBERTa of that shape with random weights, and a tokenizer of 32,000 pieces learned from the rows."""
    make_tokenizer(folder, [row.sentence for row in sample_rows(10**9)], vocab_size=32000)
    config = transformers.RobertaConfig(vocab_size=32000, pad_token_id=0, **SHAPES[shape])
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)


def examples_of(model: str, n: int):
    return encode(sample_rows(n), Template(), load_tokenizer(model), KLUE_LABELS, 180)[0]


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- one turn of each contender: a dict of what was measured --------------------------------------------------------


def products(arguments) -> dict:
    """The rate of bf16 products of two square matrices, in FLOP/s: the best of several sizes."""
    cuda = torch.cuda.is_available()
    best = 0.0
    for size in (8192, 4096) if cuda else (3072, 2048, 1536):
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda" if cuda else "cpu") for _ in range(2))
        a @ b
        synchronize()
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < 1.5:
            for _ in range(20 if cuda else 1):
                a @ b
                n += 1
            synchronize()
        best = max(best, n * 2 * size**3 / (time.perf_counter() - start))
    return {"flops": best}


def ours(arguments) -> dict:
    """train.py's step and infer.py's prediction."""
    settings = Settings(model=arguments.model, head=arguments.head, batch_size=arguments.batch_size, lr=1e-4)
    with running("auto") as machine:
        task = Relations.__new__(Relations)  # its loss, on examples of our own
        task.settings, task.machine = settings, machine
        task.examples, task.alpha = examples_of(arguments.model, arguments.rows), None
        task.lengths, task.n_targets = lengths_of(task.examples), np.ones(arguments.rows)
        encoder = load_encoder(arguments.model)
        task.place(RelationModel(encoder, len(KLUE_LABELS), settings.head))
        optimizer = make_optimizer(task.model, settings)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp == torch.float16)
        task.model.train()

        def steps(batches):
            for step, rows in enumerate(batches):
                rest = (rows, step, settings, machine, scaler, settings.max_tokens)
                loss = batch_gradients(task, task.model, *rest)
                update_weights(task.model, optimizer, scaler, settings.clip_norm)
            return loss.item()

        batches = training_batches(task.lengths, settings.batch_size, seed=0, epoch=0)
        longest = sorted(batches, key=lambda rows: -task.lengths[rows].sum())[:WARM_UP]  # as Trainer's first ones are
        steps(longest)
        if arguments.profile:
            return profile(lambda: steps(longest))
        start = time.perf_counter()
        steps(batches)
        train = time.perf_counter() - start
        predict(task.model, task.examples[: 10 * settings.batch_size], machine)
        start = time.perf_counter()
        predict(task.model, task.examples, machine)
        return {"train": train, "predict": time.perf_counter() - start, "flops": flops(encoder, task.lengths)}


def lengths_of(examples) -> np.ndarray:
    return np.array([len(e.ids) for e in examples])


def flops(encoder, lengths: np.ndarray) -> float:
    """Floating point operations of training on sentences of these lengths."""
    parameters = sum(p.numel() for name, p in encoder.named_parameters() if "embeddings" not in name)
    attention = 12 * encoder.config.num_hidden_layers * encoder.config.hidden_size * (lengths**2).sum()
    return float(6 * parameters * lengths.sum() + attention)


def trainer(arguments, padded: bool) -> dict:
    """Hugging Face's Trainer: all padded to the longest, in fp32; or at its best."""
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

    examples = examples_of(arguments.model, arguments.rows)
    tokenizer = load_tokenizer(arguments.model)
    rows = [{"input_ids": e.ids.tolist(), "labels": max(e.label, 0)} for e in examples]
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(KLUE_LABELS), dtype=torch.float32
    )
    longest = {"padding": "max_length", "max_length": int(lengths_of(examples).max())} if padded else {}
    cuda = torch.cuda.is_available()
    seconds = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            synchronize()
            seconds.append(-time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            synchronize()
            seconds[-1] += time.perf_counter()

    def made(**how):
        settings = TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=arguments.batch_size, learning_rate=1e-4, adam_beta2=0.98,
            num_train_epochs=1, save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
            optim="adamw_torch_fused", per_device_eval_batch_size=64, use_cpu=not cuda, bf16=not padded,
            train_sampling_strategy="random" if padded else "group_by_length", torch_compile=cuda and not padded, **how,
        )  # fmt: skip
        collate = DataCollatorWithPadding(tokenizer, **longest)
        return Trainer(model, settings, train_dataset=rows, data_collator=collate, callbacks=[Clock()])

    made(max_steps=WARM_UP).train()
    contender = made()
    contender.train()
    result = {"train": seconds[-1]}
    if not padded:
        contender.predict(rows[: 10 * arguments.batch_size])
        start = time.perf_counter()
        contender.predict(rows)
        result["predict"] = time.perf_counter() - start
    return result


CONTENDERS = {
    "products": products,
    "ours": ours,
    "best": lambda arguments: trainer(arguments, padded=False),
    "padded": lambda arguments: trainer(arguments, padded=True),
}


def profile(steps) -> dict:
    """Prints where the time of a few steps goes, by kind of work."""
    kinds = {
        "matrix products": ("mm", "linear", "lstm", "gru"), "attention": ("bmm", "softmax", "attn", "flash"),
        "dropout": ("random", "dropout", "ge", "native_dropout"), "norm": ("layer_norm",), "gelu": ("gelu",),
        "optimiser": ("adamw", "foreach", "norm"), "casts and copies": ("copy", "cat", "to"),
    }  # fmt: skip
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        steps()
        synchronize()
    spent = Counter()
    for event in profiled.key_averages():
        us = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        names = [kind for kind, words in kinds.items() if any(word in event.key.lower() for word in words)]
        spent[names[0] if names else "other"] += us
    for kind, us in spent.most_common():
        print(f"{kind:20}{100 * us / spent.total():5.1f} %{us / 1e6 / WARM_UP:8.3f} s a step")
    column = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60))
    return {}


# --- the table -----------------------------------------------------------------------------------------------------


def turn(name: str, arguments, rows: int) -> dict:
    """A contender's turn, in a process of its own."""
    command = [sys.executable, __file__, "--turn", name, "--rows", str(rows), "--model", arguments.model]
    command += ["--head", arguments.head, "--batch-size", str(arguments.batch_size)]
    command += ["--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments):
    """All contenders by turns; prints a table in Markdown."""
    size = arguments.batch_size
    pilot = 10 * size / turn("ours", arguments, 10 * size)["train"]
    n = min(max(int(pilot * arguments.seconds) // size, 8) * size, len(sample_rows(10**9)))
    few = max(n // 8 // size, 4) * size  # padded sentences all cost the same
    counts = {"products": 0, "ours": n, "best": n, "padded": few}
    results = {name: [] for name in counts}
    for number in range(arguments.rounds):
        for name in list(counts)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(turn(name, arguments, counts[name]))
            print(f"round {number + 1}: {name}: {json.dumps(results[name][-1])}", file=sys.stderr, flush=True)

    lengths = lengths_of(examples_of(arguments.model, n))
    rate = np.array([r["flops"] for r in results["products"]])

    def spread(values, form=".1f", unit=""):
        return f"{np.median(values):{form}}{unit} ({np.min(values):{form}} to {np.max(values):{form}})"

    rates = {
        (name, what): np.array([counts[name] / r[what] for r in results[name]])
        for name in ("ours", "best", "padded") for what in ("train", "predict") if what in results[name][0]
    }  # fmt: skip
    print(f"\n{n} rows, mean {lengths.mean():.0f} tokens, batch {size}, --head {arguments.head}, ", end="")
    print(f"bf16 product {spread(rate / 1e9, '.0f')} GFLOP/s, {arguments.rounds} rounds: median (least to most)\n")
    print("| | sentences/s | tokens/s | share of the product rate | peak memory | ours is faster by |")
    print("|---|---|---|---|---|---|")
    titles = {
        ("ours", "train"): "training, this project",
        ("best", "train"): "training, `Trainer` at its best",
        ("padded", "train"): "training, `Trainer`, padded to the longest, fp32",
        ("ours", "predict"): "prediction, this project",
        ("best", "predict"): "prediction, `Trainer` at its best",
    }
    done = np.array([r["flops"] for r in results["ours"]])
    for (name, what), title in titles.items():
        speed = rates[name, what]
        operations = done / n * (1 if what == "train" else 1 / 3)
        share = spread(100 * speed * operations / rate, ".0f", " %")
        memory = spread([r["peak"] for r in results[name]], ".1f", " GiB") if what == "train" else ""
        ratio = "" if name == "ours" else spread(rates["ours", what] / speed, ".2f")
        print(f"| {title} | {spread(speed)} | {np.median(speed) * lengths.mean():.0f} | {share} | {memory} | {ratio} |")


START = """
import sys, time
begin = time.perf_counter() - float(sys.argv.pop(1)); sys.path.insert(0, {root!r}); sys.argv[0] = "train.py"
import train
load, rate = train.load_encoder, train.learning_rate
loading = []
def load_encoder(*arguments):
    loading.append(-time.perf_counter()); encoder = load(*arguments); loading[0] += time.perf_counter(); return encoder
def learning_rate(*arguments):
    print("start", time.time() - float({now}), loading[0]); sys.stdout.flush(); import os; os._exit(0)
train.load_encoder, train.learning_rate = load_encoder, learning_rate
train.main()
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"folder of an encoder, or {', '.join(SHAPES)}")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=30, help="about how long our training takes in a turn (30)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (3)")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences a step (32)")
    parser.add_argument("--head", default="cls", help="of our model; the Trainer's reads the first token (cls)")
    parser.add_argument("--profile", action="store_true", help="one of our steps by kind of work instead")
    parser.add_argument("--turn", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=640, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no GPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model in SHAPES:
            make_encoder(arguments.model, folder)
            arguments.model = folder
        if arguments.profile:
            ours(arguments)
        elif arguments.turn:
            result = CONTENDERS[arguments.turn](arguments)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated()
            print(json.dumps(result | {"peak": peak / 2**30}))
        else:
            compare(arguments)


if __name__ == "__main__":
    main()
