"""Compare the speed of training and prediction with Hugging Face's Trainer.

    pip install accelerate                                           # Trainer needs it
    KLUE_RE=data python tools/benchmark.py --model path/to/encoder   # without KLUE_RE: the sample
    python tools/benchmark.py --model roberta-large-shape            # 24 layers, random weights
    python tools/benchmark.py --model path/to/encoder --profile      # time per kind of operation
    python tools/benchmark.py --model path/to/encoder --start        # seconds to the first step

The contenders take turns. Each turn is a process of its own: three warm-up steps, then one epoch
on the same rows, truncated to 180 tokens, with the same batch size.

The table's share relates a contender's operations to the highest rate measured for matrix products
in the precision that train.py chooses: bf16, or fp32 on a CPU without bf16 instructions. The
operations of an epoch are 6 x parameters (without embeddings) x tokens, plus
12 x layers x width x length² for attention; padding does not count.
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

from common import InputError, Parser, exit_on_error  # noqa: E402
from data import KLUE_LABELS  # noqa: E402
from distributed import Worker, process_group  # noqa: E402
from graph_step import make_step  # noqa: E402
from model import predict  # noqa: E402
from rows import read_rows  # noqa: E402
from sample.tiny_encoder import make_tokenizer  # noqa: E402
from settings import Settings  # noqa: E402
from task import RelationTask  # noqa: E402
from tokens import epoch_batches  # noqa: E402

DATA = os.environ.get("KLUE_RE", str(ROOT / "sample"))
WARM_UP = 3  # steps
SHAPES = {
    "roberta-large-shape": {
        "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
        "intermediate_size": 4096, "max_position_embeddings": 514, "type_vocab_size": 1,
    },
    "small-shape": {  # of multilingual-e5-small
        "num_hidden_layers": 12, "hidden_size": 384, "num_attention_heads": 12,
        "intermediate_size": 1536, "max_position_embeddings": 514, "type_vocab_size": 1,
    },
}  # fmt: skip


def make_encoder(shape: str, folder: str, tokenizer=None, **changes):
    """Write a RoBERTa with random weights, and a tokenizer of 32,000 pieces; returns the latter.

    The tokenizer is learned from the sentences unless given.
    """
    if tokenizer:
        tokenizer.save_pretrained(folder)
    else:
        sentences = [row.sentence for row in read_rows(Path(DATA) / "train.csv")]
        tokenizer = make_tokenizer(folder, sentences, vocab_size=32000)
    config = transformers.RobertaConfig(vocab_size=32000, pad_token_id=0, **SHAPES[shape] | changes)
    transformers.RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return tokenizer


def make_task(arguments, worker: Worker) -> RelationTask:
    """The rows and the model as in train.py."""
    settings = Settings(
        data=DATA, split="stratified", limit=arguments.rows, valid="none", max_length=180,
        model=arguments.model, head=arguments.head, batch_size=arguments.batch_size, lr=1e-4,
    )  # fmt: skip
    return RelationTask(settings, worker, lambda text: print(text, file=sys.stderr))


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- one turn of each contender: a dict of measurements -----------------------------------------


def products(arguments) -> dict:
    """The rate of matrix products in FLOP/s, in train.py's precision, the best of several sizes."""
    cuda, best = torch.cuda.is_available(), 0.0
    with process_group("auto") as worker:
        dtype = worker.amp or torch.float32
    for size in (8192, 4096) if cuda else (3072, 2048, 1536):
        a, b = torch.randn(2, size, size, dtype=dtype, device="cuda" if cuda else "cpu")
        a @ b
        synchronize()
        start, n = time.perf_counter(), 0
        while time.perf_counter() - start < 1.5:
            for _ in range(20 if cuda else 1):
                a @ b
                n += 1
            synchronize()
        best = max(best, n * 2 * size**3 / (time.perf_counter() - start))
    return {"flops": best, "dtype": str(dtype).removeprefix("torch.")}


def ours(arguments) -> dict:
    """The training steps of train.py and the prediction of infer.py."""
    with process_group("auto") as worker:
        task = make_task(arguments, worker)
        config = task.model.encoder.config
        settings = task.settings.resolve(config.hidden_size, config.num_hidden_layers)
        train_step = make_step(task, settings)

        def train(batches) -> float:
            """Train on these batches; returns the seconds."""
            start = time.perf_counter()
            for step, indices in enumerate(batches):
                loss, _ = train_step(indices, step, settings.lr)
            loss.item()  # waits for the device
            return time.perf_counter() - start

        batches = epoch_batches(task.lengths, settings.batch_size, seed=0, epoch=0)
        train_step.prepare(batches)
        longest = sorted(batches, key=lambda batch: -task.lengths[batch].sum())
        train(longest[:WARM_UP])  # Trainer begins with long batches too
        if arguments.profile:
            print_profile(lambda: train(longest[:WARM_UP]))
            return {}
        result = {"train": train(batches)}
        predict(task.model, task.examples[: 10 * settings.batch_size], worker)
        start = time.perf_counter()
        predict(task.model, task.examples, worker)
        result["predict"] = time.perf_counter() - start
        return result | {"flops": epoch_flops(task), "tokens": int(task.lengths.sum())}


def epoch_flops(task: RelationTask) -> float:
    """Floating-point operations of an epoch, without those for padding."""
    config, named = task.model.encoder.config, task.model.encoder.named_parameters()
    n_parameters = sum(p.numel() for name, p in named if "embeddings" not in name)
    attention = 12 * config.num_hidden_layers * config.hidden_size * (task.lengths**2).sum()
    return float(6 * n_parameters * task.lengths.sum() + attention)


def trainer(arguments, padded: bool) -> dict:
    """Hugging Face's Trainer: padded to the longest example in fp32, or at its best."""
    task = make_task(arguments, Worker(torch.device("cpu")))
    rows = [{"input_ids": e.ids.tolist(), "labels": e.label} for e in task.examples]
    if padded:  # all steps take the same time: a few are enough
        rows = rows[: max(len(rows) // 8 // arguments.batch_size, 4) * arguments.batch_size]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=len(KLUE_LABELS), dtype=torch.float32
    )
    longest = {"padding": "max_length", "max_length": int(task.lengths.max())} if padded else {}
    collate = transformers.DataCollatorWithPadding(task.tokenizer, **longest)
    cuda, seconds = torch.cuda.is_available(), []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            synchronize()
            seconds.append(-time.perf_counter())

        def on_train_end(self, *args, **kwargs):
            synchronize()
            seconds[-1] += time.perf_counter()

    def make_trainer(**more):
        options = transformers.TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=arguments.batch_size,
            learning_rate=1e-4, adam_beta2=0.98, num_train_epochs=1, save_strategy="no",
            report_to="none", logging_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
            per_device_eval_batch_size=64, use_cpu=not cuda, bf16=not padded,
            train_sampling_strategy="random" if padded else "group_by_length",
            torch_compile=cuda and not padded, **more,
        )  # fmt: skip
        return transformers.Trainer(
            model, options, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
        )

    # Group by length among 50 batches, as Trainer does with all rows of KLUE-RE. With few rows it
    # would use smaller groups.
    utils = transformers.trainer_pt_utils
    grouped = utils.get_length_grouped_indices
    utils.get_length_grouped_indices = functools.partial(grouped, mega_batch_mult=50)
    make_trainer(max_steps=WARM_UP).train()
    contender = make_trainer()
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
    "best": functools.partial(trainer, padded=False),
    "padded": functools.partial(trainer, padded=True),
}

# --- the table --------------------------------------------------------------------------------

TITLES = {
    ("ours", "train"): "training, this project",
    ("best", "train"): "training, `Trainer` at its best",
    ("padded", "train"): "training, `Trainer`, padded to the longest, fp32",
    ("ours", "predict"): "prediction, this project",
    ("best", "predict"): "prediction, `Trainer` at its best",
}
COLUMNS = ("", "sentences/s", "tokens/s", "share of the product rate", "peak memory",
           "this project is faster by")  # fmt: skip


def take_turn(name: str, arguments, n_rows: int) -> dict:
    """The measurements of a contender, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--model", arguments.model]
    command += ["--turn", name, "--rows", str(n_rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_turn(arguments):
    result = CONTENDERS[arguments.turn](arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps(result | {"peak": peak / 2**30}))


def compare(arguments):
    """Print the table of all contenders in Markdown."""
    size = arguments.batch_size
    n_available = len(read_rows(Path(DATA) / "train.csv")) // size * size
    per_second = 10 * size / take_turn("ours", arguments, 10 * size)["train"]
    n_rows = min(max(int(per_second * arguments.seconds) // size, 8) * size, n_available)
    results = {name: [] for name in CONTENDERS}
    for number in range(1, arguments.rounds + 1):
        for name in list(results)[:: 1 if number % 2 else -1]:
            result = take_turn(name, arguments, n_rows)
            results[name].append(result)
            print(f"round {number}: {name}: {json.dumps(result)}", file=sys.stderr, flush=True)

    mean_tokens = results["ours"][0]["tokens"] / n_rows
    product_rate = max(r["flops"] for r in results["products"])
    print(f"\n{n_rows} rows, mean {mean_tokens:.0f} tokens, batch {size}, --head {arguments.head}")
    dtype = results["products"][0]["dtype"]
    print(f"{dtype} product {product_rate / 1e9:.0f} GFLOP/s at its best")
    print(f"{arguments.rounds} rounds: median (lowest to highest)\n")
    print("|", " | ".join(COLUMNS), "|")
    print("|---" * len(COLUMNS) + "|")
    flops_of_row = np.array([r["flops"] for r in results["ours"]]) / n_rows
    for (name, what), title in TITLES.items():
        speed = sentences_per_second(results[name], what, n_rows)
        flops = flops_of_row if what == "train" else flops_of_row / 3
        memory, ratio = "", ""
        if what == "train":
            memory = spread([r["peak"] for r in results[name]], ".1f", " GiB")
        if name != "ours":
            ratio = spread(sentences_per_second(results["ours"], what, n_rows) / speed, ".2f")
        share = spread(100 * speed * flops / product_rate, ".0f", " %")
        tokens = f"{np.median(speed) * mean_tokens:.0f}"
        print("|", " | ".join((title, spread(speed), tokens, share, memory, ratio)), "|")


def sentences_per_second(results: list[dict], what: str, n_rows: int) -> np.ndarray:
    return np.array([result.get("rows", n_rows) / result[what] for result in results])


def spread(values, form=".1f", unit="") -> str:
    """Median (lowest to highest) of the rounds."""
    return f"{np.median(values):{form}}{unit} ({np.min(values):{form}} to {np.max(values):{form}})"


# --- profile and start ------------------------------------------------------------------------

KINDS = {
    "matrix products": ("mm", "linear", "lstm", "gru"),
    "attention": ("bmm", "softmax", "attn", "flash"),
    "dropout": ("random", "dropout", "ge_"),
    "norm": ("layer_norm",),
    "gelu": ("gelu",),
    "optimiser": ("adamw", "foreach", "norm"),
    "casts and copies": ("copy", "cat", "to"),
}


def print_profile(train):
    """Print the share of each kind of operation in the time of WARM_UP steps."""
    activities, cuda = [torch.profiler.ProfilerActivity.CPU], torch.cuda.is_available()
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiled:
        train()
        synchronize()
    spent = Counter()
    for event in profiled.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel; its time is in the operation that started it
        us, key = event.self_device_time_total if cuda else event.self_cpu_time_total, event.key
        kinds = [kind for kind in KINDS if any(word in key.lower() for word in KINDS[kind])]
        spent[kinds[0] if kinds else "other"] += us
    for kind, us in spent.most_common():
        print(f"{kind:20}{100 * us / spent.total():5.1f} %{us / 1e6 / WARM_UP:8.3f} s per step")
    column = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=column, row_limit=25, max_name_column_width=60))


START = """
import os, sys, time

started = float(sys.argv.pop(1))
sys.path.insert(0, sys.argv.pop(1))
from train import RelationTask, Settings, parse_settings, run

def on_step(step):
    print("SECONDS", time.time() - started, flush=True)
    os._exit(0)

run(parse_settings(Settings, "train.py", ""), RelationTask, on_step)
"""


def print_start(arguments):
    """Print the seconds from the start of train.py to its first step, on all rows."""
    with tempfile.TemporaryDirectory() as out:
        for _ in range(arguments.rounds):
            command = [sys.executable, "-c", START, str(time.time()), str(ROOT), "--data", DATA]
            command += ["--model", arguments.model, "--out", f"{out}/run"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(f"{float(done.stdout.split('SECONDS')[1]):.1f} s to the first step", flush=True)


# --- command line -----------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help=f"folder of an encoder, or {', '.join(SHAPES)}")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if any")
    add("--seconds", type=float, default=30, help="approximate seconds of a training (default: 30)")
    add("--rounds", type=int, default=3, help="turns of each contender (default: 3)")
    add("--batch-size", type=int, default=32, help="sentences per step (default: 32)")
    add("--head", default="cls", help="head of our model; Trainer's reads the first token")
    add("--profile", action="store_true", help="print the time per kind of operation instead")
    add("--start", action="store_true", help="print the seconds to the first step instead")
    add("--turn", choices=CONTENDERS, help=argparse.SUPPRESS)
    add("--rows", type=int, default=640, help=argparse.SUPPRESS)
    return parser.parse_args()


@exit_on_error
def main():
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several GPUs Trainer would use all
    cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not cuda:
        raise InputError("--device cuda: found no GPU")
    if cuda and torch.cuda.get_device_capability() < (8, 0):
        raise InputError("the comparison needs a GPU with bf16 (A100 or later); use --device cpu")
    compares = not (arguments.profile or arguments.start or arguments.turn)
    if compares and not transformers.utils.is_accelerate_available():
        raise InputError("Trainer needs the package accelerate: pip install accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model in SHAPES:
            make_encoder(arguments.model, folder)
            arguments.model = folder
        if arguments.profile:
            ours(arguments)
        elif arguments.start:
            print_start(arguments)
        elif arguments.turn:
            print_turn(arguments)
        else:
            compare(arguments)


if __name__ == "__main__":
    main()
