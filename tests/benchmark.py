"""Measures training and prediction beside Hugging Face's Trainer, and how near they come to what the chip can do.

    pip install accelerate                                             # which the Trainer needs
    KLUE_RE=data python tests/benchmark.py --model path/to/encoder     # without KLUE_RE: on the sample
    python tests/benchmark.py --model roberta-large-shape              # 24 layers of 1024, random weights
    python tests/benchmark.py --model path/to/encoder --compile        # with turns of ours under --compile too
    python tests/benchmark.py --model path/to/encoder --profile        # one of our steps, by kind of work
    python tests/benchmark.py --model path/to/encoder --start          # seconds from the start to the first step

The contenders take turns, each turn in a process of its own, on the same rows: batches of the same number of
sentences, cut at 180 tokens, an epoch after three steps to warm up. Share: 6 x the encoder's parameters without
embeddings x real tokens, and 12 x layers x width x length² for attention, over the rate of a bf16 matrix product.
"""

import argparse
import functools
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

from data import KLUE_LABELS, read_rows  # noqa: E402
from infer import Machine, predict, running  # noqa: E402
from tests.sample.tiny_encoder import make_tokenizer  # noqa: E402
from train import Relations, Settings, batch_gradients, make_optimizer, training_batches, update_weights  # noqa: E402

DATA = os.environ.get("KLUE_RE", str(ROOT / "tests" / "sample"))
WARM_UP = 3  # steps
SHAPES = {
    "roberta-large-shape": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
                            "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1},
}  # fmt: skip


def make_encoder(shape: str, folder: str):
    """Writes a RoBERTa of that shape with random weights, and a tokenizer of 32,000 pieces learned from the rows."""
    make_tokenizer(folder, [row.sentence for row in read_rows(Path(DATA) / "train.csv")], vocab_size=32000)
    config = transformers.RobertaConfig(vocab_size=32000, pad_token_id=0, **SHAPES[shape])
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)


def relations(arguments, machine: Machine, compile=False) -> Relations:
    """The rows as train.py takes them, with our model."""
    settings = Settings(
        data=DATA, split="stratified", limit=arguments.rows, valid="none", max_length=180, model=arguments.model,
        head=arguments.head, prompt="s_and_o", type_names="en", batch_size=arguments.batch_size, lr=1e-4,
        compile=compile,
    )  # fmt: skip
    return Relations(settings, machine, lambda text: print(text, file=sys.stderr))


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


def ours(arguments, compile=False) -> dict:
    """train.py's step and infer.py's prediction."""
    with running("auto") as machine:
        task = relations(arguments, machine, compile)
        settings = task.settings
        optimizer = make_optimizer(task.model, settings)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.amp == torch.float16)
        task.model.train()

        def steps(batches):
            for step, indices in enumerate(batches):
                loss = batch_gradients(task, task.model, indices, step, scaler, settings.max_tokens)
                update_weights(task.model, optimizer, scaler, settings.clip_norm)
            return loss.item()

        batches = training_batches(task.lengths, settings.batch_size, seed=0, epoch=0)
        longest = sorted(batches, key=lambda batch: -task.lengths[batch].sum())[:WARM_UP]  # as Trainer's first ones are
        start = time.perf_counter()
        steps(longest)
        warm_up = time.perf_counter() - start
        if arguments.profile:
            return profile(lambda: steps(longest))
        start = time.perf_counter()
        steps(batches)
        train = time.perf_counter() - start
        predict(task.model, task.examples[: 10 * settings.batch_size], machine)
        start = time.perf_counter()
        predict(task.model, task.examples, machine)
        predicted = time.perf_counter() - start
        counts = {"flops": flops(task), "tokens": int(task.lengths.sum())}
        return {"train": train, "predict": predicted, "warm_up": warm_up, **counts}


def flops(task: Relations) -> float:
    """Floating point operations of an epoch."""
    config = task.model.encoder.config
    parameters = sum(p.numel() for name, p in task.model.encoder.named_parameters() if "embeddings" not in name)
    attention = 12 * config.num_hidden_layers * config.hidden_size * (task.lengths**2).sum()
    return float(6 * parameters * task.lengths.sum() + attention)


def trainer(arguments, padded: bool) -> dict:
    """Hugging Face's Trainer: all padded to the longest, in fp32; or at its best."""
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

    task = relations(arguments, Machine(torch.device("cpu"), None))
    rows = [{"input_ids": e.ids.tolist(), "labels": e.label} for e in task.examples]
    if padded:  # each step costs the same: a few tell the speed, padded to the longest of all
        rows = rows[: max(len(rows) // 8 // arguments.batch_size, 4) * arguments.batch_size]
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(KLUE_LABELS), dtype=torch.float32
    )
    longest = {"padding": "max_length", "max_length": int(task.lengths.max())} if padded else {}
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
        collate = DataCollatorWithPadding(task.tokenizer, **longest)
        return Trainer(model, settings, train_dataset=rows, data_collator=collate, callbacks=[Clock()])

    # by length among 50 batches at a time, as with all of KLUE-RE's rows; of few rows Trainer sorts a quarter at a time
    grouped = transformers.trainer_pt_utils.get_length_grouped_indices
    transformers.trainer_pt_utils.get_length_grouped_indices = functools.partial(grouped, mega_batch_mult=50)
    made(max_steps=WARM_UP).train()
    contender = made()
    contender.train()
    result = {"train": seconds[-1], "rows": len(rows)}
    if not padded:
        contender.predict(rows[: 10 * arguments.batch_size])
        start = time.perf_counter()
        contender.predict(rows)
        result["predict"] = time.perf_counter() - start
    return result


CONTENDERS = {
    "products": products,
    "ours": ours,
    "compiled": lambda arguments: ours(arguments, compile=True),
    "best": lambda arguments: trainer(arguments, padded=False),
    "padded": lambda arguments: trainer(arguments, padded=True),
}


def profile(steps) -> dict:
    """Prints where the time of a few steps goes, by kind of work."""
    kinds = {
        "matrix products": ("mm", "linear", "lstm", "gru"), "attention": ("bmm", "softmax", "attn", "flash"),
        "dropout": ("random", "dropout", "ge_"), "norm": ("layer_norm",), "gelu": ("gelu",),
        "optimiser": ("adamw", "foreach", "norm"), "casts and copies": ("copy", "cat", "to"),
    }  # fmt: skip
    activities, cuda = [torch.profiler.ProfilerActivity.CPU], torch.cuda.is_available()
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        steps()
        synchronize()
    spent = Counter()
    for event in profiled.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels, whose time the operations that start them have too
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        names = [kind for kind, words in kinds.items() if any(word in event.key.lower() for word in words)]
        spent[names[0] if names else "other"] += us
    for kind, us in spent.most_common():
        print(f"{kind:20}{100 * us / spent.total():5.1f} %{us / 1e6 / WARM_UP:8.3f} s a step")
    column = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60))
    return {}


# --- the table -----------------------------------------------------------------------------------------------------


def turn(name: str, arguments, rows: int) -> dict:
    """A contender's turn, in a process of its own."""
    command = [sys.executable, __file__, "--turn", name, "--rows", str(rows), "--model", arguments.model]
    command += ["--head", arguments.head, "--batch-size", str(arguments.batch_size), "--device", arguments.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(arguments):
    """All contenders by turns; prints a table in Markdown."""
    size = arguments.batch_size
    pilot = 10 * size / turn("ours", arguments, 10 * size)["train"]
    n = min(
        max(int(pilot * arguments.seconds) // size, 8) * size, len(read_rows(Path(DATA) / "train.csv")) // size * size
    )
    results = {name: [] for name in CONTENDERS if arguments.compile or name != "compiled"}
    for number in range(arguments.rounds):
        for name in list(results)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(turn(name, arguments, n))
            print(f"round {number + 1}: {name}: {json.dumps(results[name][-1])}", file=sys.stderr, flush=True)

    mean = results["ours"][0]["tokens"] / n
    rate = max(r["flops"] for r in results["products"])  # what the chip can do undisturbed

    def spread(values, form=".1f", unit=""):
        return f"{np.median(values):{form}}{unit} ({np.min(values):{form}} to {np.max(values):{form}})"

    rates = {
        (name, what): np.array([r.get("rows", n) / r[what] for r in results[name]])
        for name in results for what in ("train", "predict") if what in results[name][0]
    }  # fmt: skip
    print(f"\n{n} rows, mean {mean:.0f} tokens, batch {size}, --head {arguments.head}, ", end="")
    print(f"bf16 product {rate / 1e9:.0f} GFLOP/s at its best, {arguments.rounds} rounds: median (least to most)\n")
    print("| | sentences/s | tokens/s | share of the product rate | peak memory | ours is faster by |")
    print("|---|---|---|---|---|---|")
    titles = {
        ("ours", "train"): "training, this project",
        ("compiled", "train"): "training, this project with `--compile`",
        ("best", "train"): "training, `Trainer` at its best",
        ("padded", "train"): "training, `Trainer`, padded to the longest, fp32",
        ("ours", "predict"): "prediction, this project",
        ("compiled", "predict"): "prediction, this project with `--compile`",
        ("best", "predict"): "prediction, `Trainer` at its best",
    }
    done = np.array([r["flops"] for r in results["ours"]])
    for (name, what), title in titles.items():
        if name not in results:
            continue
        speed = rates[name, what]
        operations = done / n * (1 if what == "train" else 1 / 3)
        share = spread(100 * speed * operations / rate, ".0f", " %")
        memory = spread([r["peak"] for r in results[name]], ".1f", " GiB") if what == "train" else ""
        ratio = "" if name == "ours" else spread(rates["ours", what] / speed, ".2f")
        print(f"| {title} | {spread(speed)} | {np.median(speed) * mean:.0f} | {share} | {memory} | {ratio} |")
    if arguments.compile:
        plain, compiled = (spread([r["warm_up"] for r in results[name]], ".0f", " s") for name in ("ours", "compiled"))
        print(f"\nthe {WARM_UP} steps to warm up took {plain}, with `--compile` {compiled}")


# train.py, until its first step is about to begin
START = """
import os, sys, time
began = float(sys.argv.pop(1))
sys.path.insert(0, sys.argv.pop(1))
import train
load, seconds = train.load_encoder, []
def load_encoder(*arguments):
    seconds.append(time.time())
    encoder = load(*arguments)
    seconds.append(time.time())
    return encoder
def learning_rate(*arguments):
    print("SECONDS", time.time() - began, seconds[1] - seconds[0], flush=True)
    os._exit(0)
train.load_encoder, train.learning_rate = load_encoder, learning_rate
train.main()
"""


def start(arguments):
    """Prints how long train.py takes from its start to its first step, on all rows."""
    with tempfile.TemporaryDirectory() as out:
        for _ in range(arguments.rounds):
            command = [sys.executable, "-c", START, str(time.time()), str(ROOT), "--data", DATA]
            command += ["--model", arguments.model, "--out", f"{out}/run", "--fresh"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            whole, loading = map(float, done.stdout.split("SECONDS")[1].split()[:2])
            print(f"to the first step {whole:.1f} s, of which the model's loading {loading:.1f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=f"folder of an encoder, or {', '.join(SHAPES)}")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument("--seconds", type=float, default=30, help="about how long our training takes in a turn (30)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (3)")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences a step (32)")
    parser.add_argument("--head", default="cls", help="of our model; the Trainer's reads the first token (cls)")
    parser.add_argument("--compile", action="store_true", help="turns of ours under train.py's --compile too")
    parser.add_argument("--profile", action="store_true", help="one of our steps by kind of work instead")
    parser.add_argument("--start", action="store_true", help="seconds from the start to the first step instead")
    parser.add_argument("--turn", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=640, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several GPUs the Trainer would take all
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        sys.exit("what is compared is bf16, which GPUs compute in from the A100 on; --device cpu")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: there is no GPU")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model in SHAPES:
            make_encoder(arguments.model, folder)
            arguments.model = folder
        if arguments.profile:
            ours(arguments)
        elif arguments.start:
            start(arguments)
        elif arguments.turn:
            result = CONTENDERS[arguments.turn](arguments)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated()
            print(json.dumps(result | {"peak": peak / 2**30}))
        elif not transformers.utils.is_accelerate_available():
            sys.exit("the Trainer needs: pip install accelerate")
        else:
            compare(arguments)


if __name__ == "__main__":
    main()
