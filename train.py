"""Train a relation classifier, a pretrained encoder and a head, in a hand-written loop.

    python train.py --demo                                     # tiny encoder, no network, no GPU
    python train.py                                            # klue/roberta-large, data/, one GPU
    torchrun --nproc_per_node=4 train.py --head bilstm         # four GPUs share each batch of 64
    python train.py --model DIR --batch-size 32 --limit 8000   # another encoder, some of the rows

Writes runs/<name>/: ckpt.pt (the best model, all that infer.py needs), valid.csv (its predictions
on the validation rows), summary.json, TensorBoard events, and last.pt. The same command resumes
from last.pt.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, bar_options, exit_on_error

# isort: split

import gc
import math
import os
import signal
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import (
    Progress,
    Saver,
    load_progress,
    progress_content,
    remove_progress,
    save_progress,
    write_summary,
)
from distributed import StopSignal, Worker, process_group, restart_count
from graph_step import make_step
from settings import Settings, TrainingSettings, parse_settings
from step import learning_rate
from task import RelationTask, Task
from tokens import epoch_batches

LOG_EVERY = 10  # steps between two readings of loss and speed
MAX_SKIPPED = 20  # skipped steps in a row that end a run; fp16 skips a few at its start


class Window:
    """Loss, skipped steps and speed since the last reading. Tensors stay on the device."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self.skipped_in_a_row = torch.zeros((), device=worker.device)
        self.restart()

    def restart(self):
        self.loss, self.skipped = torch.zeros(2, device=self.worker.device).unbind()
        self.start, self.steps, self.sentences = time.perf_counter(), 0, 0

    def add(self, loss: torch.Tensor, skipped: torch.Tensor, n_sentences: int):
        self.loss = self.loss + loss * (1 - skipped)
        self.skipped = self.skipped + skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + skipped) * skipped
        self.steps += 1
        self.sentences += n_sentences

    def read(self, progress: Progress) -> dict:
        """The averages, after waiting for the device; adds the window to `progress`."""
        loss, skipped = self.worker.sum(self.loss).item(), int(self.skipped)
        seconds = time.perf_counter() - self.start
        progress.seconds += seconds
        progress.sentences += self.sentences
        progress.skipped += skipped
        if (n := int(self.skipped_in_a_row)) >= MAX_SKIPPED:
            found = f"{n} steps in a row skipped, up to step {progress.step}"
            hint = "the saved model is intact; try a smaller --lr, or --amp off"
            raise InputError(f"{found}: their gradients are not finite; {hint}")
        return {
            "loss": loss / max(self.steps - skipped, 1),
            "sentences_per_second": self.sentences / seconds,
            "skipped_steps": progress.skipped,
        }


# --- the loop ---------------------------------------------------------------------------------


def fit(task: Task, settings: TrainingSettings, stop: StopSignal, on_step) -> dict:
    """Train until the last step, or until patience or a signal ends it; returns the best scores.

    `settings` are resolved. on_step(step) is called before each step, for tests and tools.
    """
    worker, log, folder = task.worker, task.log, settings.folder()
    is_first = worker.rank == 0
    train_step = make_step(task, settings)
    optimizer, scaler = train_step.optimizer, train_step.scaler
    parts = {"weights": task.model, "optimizer": optimizer, "scaler": scaler}
    per_epoch = math.ceil(len(task.lengths) / settings.batch_size)
    steps = settings.epochs * per_epoch
    progress = load_progress(folder, settings, task.hash, parts, steps, worker, log)
    eval_every, save_every = settings.eval_every or per_epoch, settings.save_every
    tokens = f"{task.lengths.sum():,} tokens per epoch"
    log(f"{steps} steps of {settings.batch_size}, {tokens}, evaluations every {eval_every} steps")
    gc.freeze()  # what is loaded stays
    gc.enable()
    if is_first:  # purge_step hides events after the step that the run resumes from
        writer = SummaryWriter(folder, purge_step=progress.step + 1)
        writer.add_text("data", f"{settings.data} {task.about['version']}")
    window, batches, first, said = Window(worker), None, progress.step, False
    saver = Saver(worker.device)
    with tqdm(total=steps, initial=progress.step, unit="step", **bar_options(not is_first)) as bar:
        while progress.step < steps and not progress.out_of_patience(settings.patience):
            epoch, i = divmod(progress.step, per_epoch)
            if i == 0 or batches is None:
                batches = epoch_batches(task.lengths, settings.batch_size, settings.seed, epoch)
                train_step.prepare(batches)
            on_step(progress.step)
            lr = learning_rate(settings, progress.step, steps)
            loss, skipped = train_step(batches[i], progress.step, lr)
            window.add(loss, skipped, len(batches[i]))
            progress.step += 1
            bar.update()

            stopping = worker.any(stop.number > 0)
            evaluating = progress.step == steps or progress.step % eval_every == 0
            saving = stopping or evaluating or (save_every and progress.step % save_every == 0)
            if window.steps < LOG_EVERY and not saving:
                continue
            shown = {"learning_rate": lr, **window.read(progress)}  # waits for the device
            text = "loss {loss:.3f}, lr {learning_rate:.1e}, {sentences_per_second:.1f} sentences/s"
            text += ", {skipped_steps} steps skipped" if progress.skipped else ""
            bar.set_postfix_str(text.format(**shown), refresh=False)
            if progress.step - first >= 2 * LOG_EVERY and not said:  # the first steps are slower
                said = True
                speed = shown["sentences_per_second"]
                log(expected_time(task, speed, steps, progress.step, eval_every))
            scalars = {f"train/{name}": value for name, value in shown.items()}
            if evaluating:
                scores = evaluate(task, progress, folder, train_step.max_tokens, saver)
                scalars |= {f"valid/{name}": scores[name] for name in scores if name != "absent"}
            if is_first:
                for name, value in scalars.items():
                    writer.add_scalar(name, value, progress.step)
                if evaluating and scores:
                    task.log_evaluation(writer, progress.step)
                if evaluating:
                    write_summary(folder, settings, progress, task.about, finished=False)
                if saving:
                    states = {name: part.state_dict() for name, part in parts.items()}
                    content = progress_content(settings, task.hash, progress)
                    saver(states, save_progress, folder, content)
            if progress.step == steps:  # nothing is left to stop
                continue
            if stopping or (evaluating and worker.any(stop.number > 0)):  # it may come meanwhile
                saver.wait()
                log(f"stopped after step {progress.step} of {steps}; the same command resumes")
                worker.barrier()  # torchrun ends all processes once one has ended
                sys.exit(128 + (stop.number or signal.SIGTERM))
            window.restart()
    saver.wait()
    if is_first:
        finish(folder, task, settings, progress, writer)
    return progress.best


def expected_time(task: Task, speed: float, steps: int, step: int, eval_every: int) -> str:
    """How long the rest of a run takes, for a speed in sentences per second.

    A forward pass takes a third of the time of a training step.
    """
    n_evaluations = steps // eval_every - step // eval_every + (steps % eval_every > 0)
    n = (steps - step) * task.settings.batch_size
    n += n_evaluations * task.n_valid_tokens / task.lengths.mean() / 3
    minutes = n / speed / 60
    return (
        f"about {minutes:.0f} minutes to go"
        if minutes > 1.5
        else f"about {60 * minutes:.0f} s to go"
    )


def evaluate(task: Task, progress: Progress, folder: Path, max_tokens: int, saver: Saver) -> dict:
    """Score the model; save it if it is the best so far, or if nothing is scored."""
    saver.wait()  # saving the model reads what the last evaluation found
    scores = task.evaluate(max_tokens)
    here = scores | {"step": progress.step}
    if scores:
        task.log(f"step {progress.step}: {task.describe(scores)}")
        progress.evaluations.append(here)
    progress.without_gain += 1
    best = progress.best
    if not scores or best is None or task.merit(scores) > task.merit(best):
        progress.best, progress.without_gain = here, 0
        if task.worker.rank == 0:
            weights = task.model.state_dict()
            saver(weights, task.save, folder, here)
    return scores


def finish(folder: Path, task: Task, settings, progress: Progress, writer: SummaryWriter):
    """Write summary.json and TensorBoard's HPARAMS; print the result and the next commands."""
    best = {name: value for name, value in progress.best.items() if name not in ("absent", "step")}
    hparams = {f.name: getattr(settings, f.name) for f in fields(settings) if f.metadata["named"]}
    hparams = {name: "auto" if x is None else x for name, x in hparams.items()}
    hparams = {name: " ".join(x) if isinstance(x, tuple) else x for name, x in hparams.items()}
    writer.add_hparams(hparams, {f"valid_best/{name}": best[name] for name in best}, run_name=".")
    writer.close()
    write_summary(folder, settings, progress, task.about, finished=True)
    if best:
        print(f"\n{task.describe(progress.best)}")
        print(f"best model at step {progress.best['step']} of {progress.step}, on validation rows")
    else:
        print("\nno validation data and no scores: the model of the last step was saved")
    n, seconds = progress.sentences, progress.seconds
    print(f"trained on {n} sentences in {seconds:.0f} s, {n / seconds:.1f} per second")
    print(f"next:\n{task.next_commands([folder])}")


# --- runs -------------------------------------------------------------------------------------


def run(settings: TrainingSettings, task_class: type[Task], on_step=lambda step: None):
    """Train one run, or one per seed of --seeds. Under torchrun every process calls this."""
    gc.disable()  # while rows become examples there is no garbage; looking for it takes a second
    transformers.logging.set_verbosity_error()  # it warns of heads in the files that we do not use
    transformers.logging.disable_progress_bar()
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it costs a kernel each
    with process_group(settings.amp, settings.device) as worker:
        is_first, stop = worker.rank == 0, StopSignal()
        log = tqdm.write if is_first else lambda text: None
        fresh = settings.fresh and not worker.any(restart_count() > 0)  # torchrun's restart resumes
        each, results = runs_by_seed(settings), []
        for number, one in enumerate(each):
            task = None  # free the model of the seed before: its step refers to itself
            gc.unfreeze()
            gc.collect()
            gc.disable()
            if worker.device.type == "cuda":
                torch.cuda.empty_cache()
            task = task_class(one, worker, log)
            config = task.model.encoder.config
            one = task.settings.resolve(config.hidden_size, config.num_hidden_layers)
            decay = f"times {one.layer_decay} per layer below it"
            log(f"peak learning rate {one.lr} for the head, {decay}")
            if fresh and number == 0 and is_first:  # not earlier: bad input must not delete a run
                for other in each:
                    remove_progress(other.folder())
            worker.barrier()
            results.append(fit(task, one, stop, on_step))
        if len(each) > 1 and is_first:
            print(f"\nnext, with all seeds:\n{task.next_commands([one.folder() for one in each])}")
            print_mean(results, [one.seed for one in each])


def runs_by_seed(settings: TrainingSettings) -> list[TrainingSettings]:
    """The settings of each run; with several seeds each gets a folder of its own."""
    if settings.seeds == 1:  # fix the folder: resolving lr would change the name
        return [replace(settings, out=str(settings.folder()))]
    folder = replace(settings, seed=TrainingSettings.seed).folder()
    seeds = range(settings.seed, settings.seed + settings.seeds)
    return [replace(settings, seed=s, seeds=1, out=f"{folder}-seed={s}") for s in seeds]


def print_mean(results: list[dict], seeds: list[int]):
    names = [name for name in results[0] if name not in ("absent", "step")]
    if names:
        print(f"\nseeds {seeds[0]} to {seeds[-1]}, mean ± standard deviation:")
    for name in names:
        values = [scores[name] for scores in results]
        print(f"  {name} {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}")


@exit_on_error
def main():
    run(parse_settings(Settings, "train.py", __doc__), RelationTask)


if __name__ == "__main__":
    main()
