"""Check and measure everything that needs a GPU, in one command.

    pip install accelerate                                   # Hugging Face's Trainer needs it
    KLUE_RE=data python tools/gpu_check.py --out runs/gpu    # without KLUE_RE: the sample
    python tools/gpu_check.py --model path/to/encoder        # its training is a real one
    python tools/gpu_check.py --dry-run                      # every branch in small, on the CPU

Parts, each a process with a time limit: training and prediction of roberta-large's shape (this
project with CUDA graphs, without them, and Trainer, by turns), one whole training from the command
to the submission, the same turns for a small encoder, the GPU tests, and Trainer with
torch.compile. Prints a table and writes gpu_check.json; a part that fails or takes too long leaves
a line in it.

A share relates a contender's operations to the measured rate of matrix products, as in
tools/benchmark.py. Padding does not count.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
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
from graph_step import GraphStep, make_step  # noqa: E402
from graphs import EagerRecorder, is_capturable  # noqa: E402
from model import predict  # noqa: E402
from settings import Settings, parse_settings  # noqa: E402
from step import TrainStep  # noqa: E402
from task import RelationTask  # noqa: E402
from tokens import epoch_batches  # noqa: E402
from tools.benchmark import DATA, epoch_flops, make_encoder, products, synchronize  # noqa: E402
from train import run  # noqa: E402

PARTS = {  # seconds of an 8-minute check
    "large": 115, "whole": 160, "small": 60, "tests": 125, "compiled": 20,
}  # fmt: skip
COMPILE = 150  # seconds below which Trainer with torch.compile is not tried
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
        "intermediate_size": 64}  # fmt: skip
KINDS = {  # by words in the names of kernels; the first that fits counts
    "attention": ("flash",),  # its kernels also name cutlass
    "matrix products": ("nvjet", "gemm", "cutlass", "xmma"),
    "optimiser": ("fusedoptimizer",),
    "layer norm": ("layer_norm", "gammabeta"),
    "dropout": ("dropout", "masked_scale"),
    "gelu": ("gelu",),
    "bias gradients and norm": ("reduce_kernel",),
    "casts and copies": ("copy", "memcpy", "memset", "fill", "multi_tensor"),
}


def report(**found):
    """A line of the part's results, for the process that started it."""
    print(json.dumps(found), flush=True)


# --- one part ---------------------------------------------------------------------------------


def make_task(arguments, worker: Worker, batch_size: int, head="entity") -> RelationTask:
    n_steps = 4 if arguments.dry_run else 60
    settings = Settings(
        data=DATA, split="stratified", limit=n_steps * batch_size, valid="none", max_length=180,
        model=arguments.folder, head=head, batch_size=batch_size, lr=1e-5, max_tokens=40960,
    )  # fmt: skip
    task = RelationTask(settings, worker, lambda text: None)
    config = task.model.encoder.config
    task.settings = settings.resolve(config.hidden_size, config.num_hidden_layers)
    return task


def graph_step(task: RelationTask) -> GraphStep:
    if task.worker.device.type == "cpu":
        return GraphStep(task, task.settings, EagerRecorder())
    if not is_capturable(task.model, task.worker):
        raise InputError("this GPU cannot record the training step: it needs bf16")
    return make_step(task, task.settings)


def measure_training(name: str, task: RelationTask, make, rate: float, profile=False):
    """Time all full batches once; reports milliseconds a step, share and memory."""
    batches = epoch_batches(task.lengths, task.settings.batch_size, seed=0, epoch=0)
    batches = [batch for batch in batches if len(batch) == task.settings.batch_size]
    for parameter in task.model.parameters():
        parameter.grad = None
    clear_memory()
    start = time.perf_counter()
    step = make(task)
    step.prepare(batches)

    def train(batches):
        for number, indices in enumerate(batches):
            loss, _ = step(indices, number, 1e-5)
        loss.item()

    train(sorted(batches, key=lambda batch: -task.lengths[batch].sum())[:3])
    prepared = time.perf_counter() - start
    start = time.perf_counter()
    train(batches)
    seconds = time.perf_counter() - start
    in_full = sum(task.lengths[batch].sum() for batch in batches) / task.lengths.sum()
    report(
        name=name, ms=1000 * seconds / len(batches), share=100 * epoch_flops(task) * in_full
        / seconds / rate, rows_per_second=sum(map(len, batches)) / seconds, prepare=prepared,
        **memory(),
    )  # fmt: skip
    if profile:
        report_profile(name, lambda: train(batches[:10]), min(len(batches), 10))


def clear_memory():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory() -> dict:
    if not torch.cuda.is_available():
        return {"gib": 0.0, "reserved_gib": 0.0}
    used = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"gib": used[0] / 2**30, "reserved_gib": used[1] / 2**30}


def report_profile(name: str, train, n_steps: int):
    """Time on the GPU by kind of kernel, beside the time that passed."""
    activity = torch.profiler.ProfilerActivity
    cuda = torch.cuda.is_available()
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiled:
        start = time.perf_counter()
        train()
        synchronize()
        wall = time.perf_counter() - start
    spent, n_kernels = dict.fromkeys((*KINDS, "other"), 0.0), 0
    for event in profiled.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if not us:  # a launch
            continue
        kinds = [k for k, words in KINDS.items() if any(w in event.key.lower() for w in words)]
        spent[kinds[0] if kinds else "other"] += us / 1000 / n_steps
        n_kernels += event.count / n_steps
    report(
        name=f"profile of {name}", wall=1000 * wall / n_steps, busy=sum(spent.values()),
        kernels=n_kernels, ms_by_kind=spent,
    )  # fmt: skip


def measure_trainer(arguments, name: str, batch_size: int, rate: float, compiled=False):
    """Trainer in bf16, grouped by length, with the fused AdamW; the median step counts."""
    task = make_task(arguments, Worker(torch.device("cpu")), batch_size, "cls")
    rows = [{"input_ids": e.ids.tolist(), "labels": e.label} for e in task.examples]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        arguments.folder, num_labels=len(KLUE_LABELS), dtype=torch.float32
    )
    cuda, times = torch.cuda.is_available(), []
    clear_memory()

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            synchronize()
            times.append(time.perf_counter())

    steps = 6 if arguments.dry_run else 40
    options = transformers.TrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=batch_size, max_steps=steps,
        learning_rate=1e-5, bf16=cuda, optim="adamw_torch_fused", save_strategy="no",
        report_to="none", logging_strategy="no", disable_tqdm=True, use_cpu=not cuda,
        train_sampling_strategy="group_by_length", torch_compile=compiled,
        torch_compile_backend=("inductor" if cuda else "eager") if compiled else None,
    )  # fmt: skip
    collate = transformers.DataCollatorWithPadding(task.tokenizer)
    transformers.Trainer(
        model, options, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
    ).train()
    seconds = float(np.median(np.diff(times)[len(times) // 4 :]))
    flops = epoch_flops(task) / len(rows) * batch_size
    report(
        name=name, ms=1000 * seconds, share=100 * flops / seconds / rate,
        rows_per_second=batch_size / seconds, **memory(),
    )  # fmt: skip


def speed(arguments, worker: Worker, batch_size: int, is_large: bool):
    """Training by turns, prediction and, for the large shape, other heads and batches."""
    rate = products(arguments)["flops"]
    report(name="matrix products", tflops=rate / 1e12)
    task = make_task(arguments, worker, batch_size)
    for turn in range(2):
        measure_training("CUDA graphs", task, graph_step, rate, profile=not turn)
        measure_training("eager", task, lambda task: TrainStep(task, task.settings), rate, not turn)
        measure_trainer(arguments, "Trainer", batch_size, rate)
    measure_prediction(arguments, worker, rate)
    if is_large:
        task = make_task(arguments, worker, batch_size, "bilstm")
        measure_training("CUDA graphs, head bilstm", task, graph_step, rate)
        task = make_task(arguments, worker, 4 * batch_size)
        measure_training(f"CUDA graphs, batch {4 * batch_size}", task, graph_step, rate)


def measure_prediction(arguments, worker: Worker, rate: float):
    task = make_task(arguments, worker, 20 if arguments.dry_run else 200)  # 12,000 rows
    clear_memory()
    for _ in range(2):
        start = time.perf_counter()
        predict(task.model, task.examples, worker, 256 if arguments.dry_run else 16384)
        seconds = time.perf_counter() - start
        share = 100 * epoch_flops(task) / 3 / seconds / rate
        report(
            name="prediction", share=share, rows_per_second=len(task.examples) / seconds,
            **memory(),
        )  # fmt: skip


def whole_training(arguments):
    """The wrap-up report's training, from the command to the submission."""
    started = time.time()
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from tools.gpu_check import *; "
    program += f"train_and_report({started}, sys.argv[1:])"
    out = Path(arguments.out) / "training"
    options = ["--data", DATA, "--model", arguments.folder, "--head", "bilstm", "--out", str(out)]
    options += ["--limit", "200", "--epochs", "1"] if arguments.dry_run else ["--epochs", "5"]
    subprocess.run([sys.executable, "-c", program, *options, "--fresh"], check=True)
    report(name="the whole training", seconds=time.time() - started)
    start = time.time()
    command = [sys.executable, ROOT / "infer.py", out / "ckpt.pt", "--out", out / "submission.csv"]
    subprocess.run(command, check=True)
    report(name="its submission", seconds=time.time() - start)


def train_and_report(started: float, options: list[str]):
    def on_step(step: int):
        if step == 0:
            report(name="the command to the first step", seconds=time.time() - started)

    run(parse_settings(Settings, "train.py", "", options), RelationTask, on_step)


def run_part(arguments):
    if arguments.part == "whole":
        whole_training(arguments)
        return
    if arguments.part == "tests":
        environment = os.environ | ({} if arguments.dry_run else {"RE_GPU": "1"})
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "tests/test_gpu.py"]
        signal.signal(signal.SIGINT, lambda *_: None)  # pytest ends, and prints why tests failed
        done = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=-1)
        outcomes = dict.fromkeys(("PASSED", "FAILED", "SKIPPED", "ERROR"), 0)
        for line in done.stdout:
            sys.stderr.write(line)
            found = [outcome for outcome in outcomes if f" {outcome} " in line]
            for outcome in found:
                outcomes[outcome] += 1
                report(name="GPU tests", **{k.lower(): n for k, n in outcomes.items()})
        sys.exit(done.wait())
    batch_size = 8 if arguments.dry_run else 64
    with process_group("auto") as worker:
        if worker.device.type == "cpu":
            from tests import varlen_on_cpu

            varlen_on_cpu.install()
        if arguments.part == "compiled":
            rate = products(arguments)["flops"]
            measure_trainer(arguments, "Trainer, torch.compile", batch_size, rate, compiled=True)
        else:
            speed(arguments, worker, batch_size, arguments.part == "large")


# --- all parts --------------------------------------------------------------------------------


def collect(arguments, part: str, folder: str, limit: float) -> list[dict]:
    """The lines that a part reports until it ends, or until its time is up."""
    command = [sys.executable, __file__, "--part", part, "--folder", folder]
    command += ["--out", arguments.out] + ["--dry-run"] * arguments.dry_run
    print(f"{part}: at most {limit:.0f} s", file=sys.stderr, flush=True)
    start = time.time()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, start_new_session=True)
        problem = "interrupted"
        try:
            problem = f"exit code {code}" if (code := process.wait(limit)) else ""
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit:.0f} s"
        finally:  # after Ctrl-C too
            for number in (signal.SIGINT, signal.SIGKILL) if problem else ():
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(10)
        output.seek(0)
        found = [json.loads(line) for line in output if line.startswith('{"name"')]
    found.append({"name": "part", "seconds": time.time() - start, "problem": problem})
    print(f"{part}: {problem or 'done'}, {found[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    return [line | {"part": part} for line in found]


def print_table(found: list[dict]):
    """All measurements in Markdown: the median of the turns, and the lowest and highest."""
    print(
        "| | ms a step | sentences/s | share | GiB used | GiB reserved |\n|---|---|---|---|---|---|"
    )
    timed = [line for line in found if "share" in line]
    for part, name in dict.fromkeys((line["part"], line["name"]) for line in timed):
        turns = [line for line in timed if (line["part"], line["name"]) == (part, name)]
        cells = [f"{part}: {name}"]
        for key, form in (("ms", ".1f"), ("rows_per_second", ".0f"), ("share", ".1f")):
            values = [turn[key] for turn in turns if key in turn]
            if not values:
                cells.append("")
                continue
            spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):{form}}{spread}")
        cells += [f"{max(turn[key] for turn in turns):.1f}" for key in ("gib", "reserved_gib")]
        print("|", " | ".join(cells), "|")
    print()
    others = {(line.get("part"), line["name"]): line for line in found if "share" not in line}
    for line in others.values():  # of several with one name the last
        numbers = {k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}
        print(json.dumps(numbers))


@exit_on_error
def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", default="", help="folder of an encoder for the whole training (default: random)")
    text = "time for all parts (default: 8; slow CPU cores need more)"
    add("--minutes", type=float, default=8, help=text)
    add("--out", default="runs/gpu_check", help="folder for gpu_check.json (default: %(default)s)")
    add("--dry-run", action="store_true", help="every branch in small, on the CPU")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.part:
        run_part(arguments)
        return
    if not (arguments.dry_run or torch.cuda.is_available()):
        raise InputError("found no GPU; --dry-run takes every branch on the CPU")
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Trainer would use all
    start, out = time.time(), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = [{"name": device, "torch": torch.__version__, "transformers": transformers.__version__}]
    with tempfile.TemporaryDirectory() as large, tempfile.TemporaryDirectory() as small:
        more = TINY if arguments.dry_run else {}
        tokenizer = make_encoder("roberta-large-shape", large, **more)
        make_encoder("small-shape", small, tokenizer, **more)
        folders = dict.fromkeys(PARTS, large) | {"small": small}
        folders["whole"] = arguments.model or large
        for number, (part, seconds) in enumerate(PARTS.items()):
            left = 60 * arguments.minutes - (time.time() - start)
            share = seconds / sum(list(PARTS.values())[number:])  # a fast part leaves its time
            if part == "compiled" and left < COMPILE and not arguments.dry_run:
                problem = f"not started: {COMPILE} s needed, {left:.0f} left; see --minutes"
                found.append({"part": part, "name": "part", "problem": problem})
            else:
                found += collect(arguments, part, folders[part], share * left)
            (out / "gpu_check.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print_table(found)


if __name__ == "__main__":
    main()
