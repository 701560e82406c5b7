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
from common import InputError, exit_on_error

# isort: split

import gc
import math
import os
import re
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

from checkpoint import Progress, load_progress, remove_progress, save_progress, write_summary
from distributed import StopSignal, Worker, process_group, restart_count
from model import FlatEncoder
from settings import Settings, TrainingSettings, parse_settings
from task import RelationTask, Task
from tokens import epoch_batches, within_tokens

LOG_EVERY = 10  # steps between two readings of loss and speed
MAX_SKIPPED = 20  # skipped steps in a row that end a run; fp16 skips a few at its start

# --- the optimiser ----------------------------------------------------------------------------


def make_optimizer(model: FlatEncoder, settings: TrainingSettings) -> torch.optim.AdamW:
    """Fused AdamW. A group's learning rate is `scale` times that of the step.

    Weight decay applies to matrices only: vectors are biases and the scales of norms.
    """
    groups, n_layers = {}, model.encoder.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        scale = settings.layer_decay ** layers_above(name, n_layers)
        weight_decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        group = {"params": [], "scale": scale, "weight_decay": weight_decay}
        groups.setdefault((scale, weight_decay), group)["params"].append(parameter)
    betas = (0.9, settings.beta2)
    return torch.optim.AdamW(list(groups.values()), lr=settings.lr, betas=betas, fused=True)


def layers_above(name: str, n_layers: int) -> int:
    """How many layers are above a parameter, by its name; the head counts as one layer.

    New parameters, such as entity embeddings, are treated like the head.
    """
    if not name.startswith("encoder."):
        return 0
    if re.match(r"encoder\.(norm|final_norm|ln_f)\.", name):  # after the last layer
        return 1
    found = re.search(r"\.(\d+)\.", name)
    return n_layers - int(found[1]) if found else n_layers + 1


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """Linear warmup from 0 to --lr, then linear decay to 0."""
    warmup = math.ceil(settings.warmup_ratio * steps)
    return settings.lr * min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1))


# --- one step ---------------------------------------------------------------------------------


def micro_batches(indices, lengths, worker: Worker, max_tokens: int, n_targets: int):
    """(this process's micro-batches of a batch, the weight of their summed losses).

    The loss of a batch is the mean over its `n_targets` loss terms, whatever the number of
    processes and micro-batches. DistributedDataParallel averages over processes, hence world_size.
    """
    mine = indices[worker.rank :: worker.world_size]
    if len(mine):
        return within_tokens(mine, lengths, max_tokens), worker.world_size / n_targets
    return [indices[:1]], 0.0  # fewer sentences than processes: take part in the gradient sync


class TrainStep:
    """One optimiser step: gradients of a batch in micro-batches, gradient sync, clipping, AdamW.

    When memory runs out, the step is repeated with smaller micro-batches. `settings` are resolved.
    """

    def __init__(self, task: Task, settings: TrainingSettings):
        self.task, self.settings, self.worker = task, settings, task.worker
        self.optimizer = make_optimizer(task.model, settings)
        is_fp16 = self.worker.amp == torch.float16
        self.scaler = torch.amp.GradScaler(self.worker.device.type, enabled=is_fp16)
        self.max_tokens = settings.max_tokens
        self.wrapped = None

    def __call__(self, indices: np.ndarray, step: int, lr: float):
        """(this process's share of the mean loss, 1 if skipped else 0), both on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        max_tokens = self.max_tokens
        while (loss := self.gradients(indices, step)) is None:
            self.shrink_micro_batches(indices)
        if self.max_tokens < max_tokens:
            found = f"out of memory at step {step + 1}"
            self.task.log(f"{found}: {self.max_tokens} tokens per micro-batch from now on")
        return loss, self.update()

    def gradients(self, indices: np.ndarray, step: int) -> torch.Tensor | None:
        """Accumulate the gradients; returns this process's share of the mean loss, on the device.

        None if any process ran out of memory.
        """
        if self.wrapped is None:
            self.wrapped = self.worker.wrap(self.task.model)
        self.wrapped.train()
        worker, scaler, n_targets = self.worker, self.scaler, self.task.n_targets[indices].sum()
        seed = np.random.SeedSequence([self.settings.seed, step, worker.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))  # dropout is a pure function of seed, step and rank
        lengths, max_tokens = self.task.lengths, self.max_tokens
        parts, weight = micro_batches(indices, lengths, worker, max_tokens, n_targets)
        total, out_of_memory = torch.zeros((), device=worker.device), False
        try:
            for part in parts:
                sync = worker.world_size > 1 and part is parts[-1]
                self.wrapped.require_backward_grad_sync = sync  # what no_sync() of DDP sets
                loss = self.task.loss(self.wrapped, part, step)
                total += (loss.detach() * weight / worker.world_size).nan_to_num(0, 0, 0)
                loss = scaler.scale(loss * weight)
                if not sync:
                    loss.backward()
        except torch.OutOfMemoryError:
            out_of_memory = True
        if worker.any(out_of_memory):
            return None
        if worker.world_size > 1:  # all processes got here: the gradient sync cannot hang
            loss.backward()
        return total

    def shrink_micro_batches(self, indices: np.ndarray):
        lengths = self.task.lengths[indices]
        if self.max_tokens < lengths.min():
            hint = "use a smaller --max-length or --model"
            raise InputError(f"out of memory with one sentence per micro-batch; {hint}")
        share = math.ceil(lengths.sum() / self.worker.world_size)
        self.max_tokens = min(self.max_tokens, share) // 2
        self.task.model.zero_grad()
        torch.cuda.empty_cache()
        self.wrapped = None  # a DistributedDataParallel interrupted in its forward is unusable

    def update(self) -> torch.Tensor:
        """Clip the gradients and update the weights; a non-finite gradient skips the update."""
        self.scaler.unscale_(self.optimizer)
        max_norm = self.settings.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), max_norm)
        skipped = 1 - norm.isfinite().float()
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = skipped  # a fused optimiser skips without a device sync
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return skipped


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
    train_step = TrainStep(task, settings)
    optimizer, scaler = train_step.optimizer, train_step.scaler
    parts = {"weights": task.model, "optimizer": optimizer, "scaler": scaler}
    per_epoch = math.ceil(len(task.lengths) / settings.batch_size)
    steps = settings.epochs * per_epoch
    progress = load_progress(folder, settings, task.hash, parts, steps, worker, log)
    gc.freeze()  # what is loaded stays
    gc.enable()
    if is_first:  # purge_step hides events after the step that the run resumes from
        writer = SummaryWriter(folder, purge_step=progress.step + 1)
        writer.add_text("data", f"{settings.data} {task.about['version']}")
    window, batches = Window(worker), None
    eval_every, save_every = settings.eval_every or per_epoch, settings.save_every
    interval = 0.5 if sys.stderr.isatty() else 60  # seconds; a log file needs few lines
    how = {"unit": "step", "mininterval": interval, "disable": not is_first}
    with tqdm(total=steps, initial=progress.step, **how) as bar:
        while progress.step < steps and not progress.out_of_patience(settings.patience):
            epoch, i = divmod(progress.step, per_epoch)
            if i == 0 or batches is None:
                batches = epoch_batches(task.lengths, settings.batch_size, settings.seed, epoch)
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
            scalars = {f"train/{name}": value for name, value in shown.items()}
            if evaluating:
                scores = evaluate(task, progress, folder, train_step.max_tokens)
                scalars |= {f"valid/{name}": scores[name] for name in scores if name != "absent"}
            if is_first:
                for name, value in scalars.items():
                    writer.add_scalar(name, value, progress.step)
                if evaluating and scores:
                    task.log_evaluation(writer, progress.step)
                if evaluating:
                    write_summary(folder, settings, progress, task.about, finished=False)
                if saving:
                    save_progress(folder, settings, task.hash, progress, parts)
            if stopping or (evaluating and worker.any(stop.number > 0)):  # it may come meanwhile
                log(f"stopped after step {progress.step} of {steps}; the same command resumes")
                worker.barrier()  # torchrun ends all processes once one has ended
                sys.exit(128 + (stop.number or signal.SIGTERM))
            window.restart()
    if is_first:
        finish(folder, task, settings, progress, writer)
    return progress.best


def evaluate(task: Task, progress: Progress, folder: Path, max_tokens: int) -> dict:
    """Score the model; save it if it is the best so far, or if nothing is scored."""
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
            task.save(folder, here)
    return scores


def finish(folder: Path, task: Task, settings, progress: Progress, writer: SummaryWriter):
    """Write summary.json and TensorBoard's HPARAMS; print the result and the next commands."""
    best = {name: value for name, value in progress.best.items() if name not in ("absent", "step")}
    hparams = {f.name: getattr(settings, f.name) for f in fields(settings) if f.metadata["named"]}
    hparams = {name: "auto" if value is None else value for name, value in hparams.items()}
    writer.add_hparams(hparams, {f"valid_best/{name}": best[name] for name in best}, run_name=".")
    writer.close()
    write_summary(folder, settings, progress, task.about, finished=True)
    if best:
        print(f"\n{task.describe(progress.best)}")
        print(f"best model at step {progress.best['step']} of {progress.step}, on validation rows")
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
    with process_group(settings.amp) as worker:
        is_first, stop = worker.rank == 0, StopSignal()
        log = tqdm.write if is_first else lambda text: None
        fresh = settings.fresh and not worker.any(restart_count() > 0)  # torchrun's restart resumes
        each, results = runs_by_seed(settings), []
        for number, one in enumerate(each):
            task = None  # free the model of the seed before
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
