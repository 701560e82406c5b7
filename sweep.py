"""Searches for good settings: Optuna proposes them, train.py tries them out.

    python sweep.py --trials 20                                        # the wrap-up report's space
    python sweep.py --trials 8 --space space.json -- --model DIR --limit 2000 --epochs 1
    python sweep.py --trials 20 --storage postgresql://USER:PASSWORD@HOST/DATABASE     # on each of many machines

A trial is `python train.py` with the arguments behind `--`, the settings proposed and a folder runs/sweep/trial-N: a
crash costs that trial alone. Its validation scores are read from summary.json as they come, and where they stay below
the median of the trials before, it is stopped. The study is in runs/sweep/study.db: the same command goes on with it.
"""

import argparse
import ctypes
import fcntl
import math
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from data import InputError, Parser, exit_on_bad_input, first_line, read_json, read_text
from metrics import read_summary
from train import PROGRESS_FILES, Settings, flag, parse_settings, remove_progress

HERE = Path(__file__).parent
SPACE = {  # what the wrap-up report searched
    "marker": ["none", "entity_marker", "entity_marker_punct", "typed_entity_marker", "typed_entity_marker_punct"],
    "prompt": ["none", "s_sep_o", "s_and_o", "quiz", "problem"],
    "type_names": ["en", "ko"],
    "lr": [1e-5, 2e-5, 3e-5, 5e-5],
    "epochs": [3, 5],
    "beta2": [0.98, 0.999],
    "warmup_ratio": [0.06, 0.1],
    "head": ["cls", "bilstm", "bigru"],
}
POLL = 1.0  # seconds between two looks at a trial


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="trials in all, those of other machines too (20)")
    parser.add_argument("--space", help='JSON file {"lr": [1e-5, 2e-5], ...}: the choices for each setting')
    parser.add_argument("--storage", help="Optuna storage URL; default: SQLite in the sweep's folder")
    parser.add_argument("--out", default="runs/sweep", help="the sweep's folder, named as the study (runs/sweep)")
    parser.add_argument("--top", type=int, default=0, help="predict with this many of the best runs, into out/")
    parser.add_argument("arguments", nargs="*", help="behind --: what each train.py gets too")
    arguments = parser.parse_args()
    if arguments.trials < 1 or arguments.top < 0:
        raise InputError("--trials: expected at least 1, --top: at least 0")
    return arguments


def read_space(path: str | None, arguments: list[str]) -> dict[str, list]:
    """The choices for each setting, once it is sure that train.py takes them beside the other arguments."""
    expected = 'a JSON object {"lr": [1e-5, 2e-5], ...}'
    space = read_json(path, expected) if path else SPACE
    known = [f.name for f in fields(Settings)]
    if not isinstance(space, dict) or not space:
        raise InputError(f"{path}: expected {expected}")
    for name, choices in space.items():
        if name not in known or not isinstance(choices, list) or not choices:
            raise InputError(f"{path}: {name}: found {choices!r}, expected a setting of train.py and a list of choices")
        for choice in choices:
            settings = parse_settings([*arguments, *as_arguments({name: choice})])
            if settings.objective == "mlm" or settings.seeds > 1 or settings.valid == "none" or settings.resume:
                raise InputError(
                    "no --objective mlm, --seeds, --valid none or --resume in a sweep: a trial is a run with scores"
                )
    return space


def as_arguments(params: dict) -> list[str]:
    """Settings as train.py's command line takes them."""
    arguments = []
    for name, value in params.items():
        switch = isinstance(value, bool)
        arguments += [flag(name if value else f"no_{name}")] if switch else [flag(name), str(value)]
    return arguments


# --- trials ------------------------------------------------------------------------------------------------------


def take_lock(folder: Path):
    """The open lock file of a trial's folder, or None where somebody has it: a sweep, or a training it left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def next_trial(study: optuna.Study, folder: Path, n_trials: int):
    """(trial, its lock): one that a killed sweep left half done in this folder, else a new one; None after the last.
    One in whose folder somebody is at work is left alone."""
    while True:
        for unfinished in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            path = folder / f"trial-{unfinished.number}"
            if path.exists() and (lock := take_lock(path)):
                if not unfinished.params:  # nothing has begun: what is there is of a study that was here before
                    remove_progress(path)
                    (path / "summary.json").unlink(missing_ok=True)
                return Trial(study, unfinished._trial_id), lock
        if len(study.get_trials(deepcopy=False)) >= n_trials:
            return None
        (folder / f"trial-{study.ask().number}").mkdir(parents=True, exist_ok=True)


def run_trial(study: optuna.Study, trial: Trial, lock, folder: Path, command: list[str]) -> int:
    """Runs train.py to its end, or till it lags behind, and tells the study what came of it; returns its exit code."""
    with open(folder / "log", "a") as log:
        training = subprocess.Popen(
            command, stdout=log, stderr=log, pass_fds=[lock.fileno()], preexec_fn=end_with_parent
        )
    pruned = False
    try:
        while training.poll() is None and not pruned:
            time.sleep(POLL)
            report_scores(trial, read_summary(folder))
            pruned = trial.should_prune()
    finally:
        if training.poll() is None:
            training.terminate()  # it finishes its step and saves
            training.wait()
    summary = read_summary(folder)
    if training.returncode == 0 and summary.get("finished"):
        report_scores(trial, summary)
        study.tell(trial, summary["best"][summary["settings"]["best_metric"]])
    else:
        study.tell(trial, state=TrialState.PRUNED if pruned else TrialState.FAIL)
    for name in PROGRESS_FILES:  # three times the model's size, and nothing goes on from them
        (folder / name).unlink(missing_ok=True)
    return training.returncode


def end_with_parent():
    """Run in the training's process before it starts: a sweep that is killed stops it too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def report_scores(trial: Trial, summary: dict):
    """Tells the study the evaluations that it does not know yet, numbered from 1."""
    known = len(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
    for number, scores in enumerate(summary.get("evaluations", []), 1):
        if number > known:
            trial.report(scores[summary["settings"]["best_metric"]], number)


# --- the end -----------------------------------------------------------------------------------------------------


def best_first(study: optuna.Study) -> list[FrozenTrial]:
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    return sorted(done, key=lambda trial: (-trial.value, trial.number))


def table(study: optuna.Study, space: dict) -> list[dict]:
    """All trials, the best first and those without a result last."""
    trials = best_first(study)
    trials += [trial for trial in study.get_trials(deepcopy=False) if trial not in trials]
    lines = []
    for trial in trials:
        values = trial.intermediate_values.values()
        score = trial.value if trial.state == TrialState.COMPLETE else max(values, default=math.nan)
        settings = {name: str(trial.params.get(name, "")) for name in space}
        lines.append({"trial": trial.number, "score": score, "state": trial.state.name.lower(), **settings})
    return lines


def show(study: optuna.Study, space: dict, folder: Path, arguments: list[str]):
    """Prints the table, the importance of each setting and the command that trains the best again."""
    from report import text_table  # what draws takes a second to import, which the start need not wait for

    print(f"\n{text_table(table(study, space))}")
    best = best_first(study)
    if len(best) >= 2:
        print("\nimportance of each setting")
        for name, share in optuna.importance.get_param_importances(study).items():
            print(f"  {name:20} {share:.2f}")
    command = ["python", "train.py", *arguments, *as_arguments(best[0].params), "--out", str(folder / "best")]
    print(f"\nthe best, {folder / f'trial-{best[0].number}'}, again:\n  {shlex.join(command)}")


@exit_on_bad_input
def main():
    arguments = parse_arguments()
    space = read_space(arguments.space, arguments.arguments)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            study_name=folder.name,
            storage=arguments.storage or f"sqlite:///{folder / 'study.db'}",
            sampler=optuna.samplers.TPESampler(constant_liar=True),  # machines at work together try different things
            pruner=optuna.pruners.MedianPruner(),
            direction="maximize",
            load_if_exists=True,
        )
    except Exception as error:  # of many kinds: the database's, its driver's
        raise InputError(f"--storage: the study {folder.name} cannot be opened: {first_line(error)}") from error
    made_with = {"space": space, "arguments": arguments.arguments}
    if study.user_attrs.get("made_with", made_with) != made_with:
        raise InputError(f"{folder}: holds a sweep with another space or other arguments; name another --out")
    study.set_user_attr("made_with", made_with)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    while found := next_trial(study, folder, arguments.trials):
        trial, lock = found
        params = {name: trial.suggest_categorical(name, choices) for name, choices in space.items()}
        path = folder / f"trial-{trial.number}"
        print(f"{path}: {shlex.join(as_arguments(params))}", flush=True)
        command = [sys.executable, str(HERE / "train.py"), *arguments.arguments, *as_arguments(params)]
        with lock:
            code = run_trial(study, trial, lock, path, [*command, "--out", str(path)])
        ended = study.get_trials(deepcopy=False)[trial.number]
        result = f"{ended.value:.2f}" if ended.state == TrialState.COMPLETE else ended.state.name.lower()
        if ended.state == TrialState.FAIL:
            why = (read_text(path / "log").splitlines() or [""])[-1]
            if code == 2 and trial.number == 0:  # bad input that all trials would have
                raise InputError(f"{path}: {why}; mend it and go on by the same command, or name another --out")
            result += f": {why}"
        print(f"{path}: {result}", flush=True)

    best = best_first(study)
    if not best:
        raise InputError(f"{folder}: no trial has come to its end, see {folder}/trial-*/log; raise --trials")
    show(study, space, folder, arguments.arguments)
    written, params = [], [trial.params for trial in best]
    different = [trial for i, trial in enumerate(best) if trial.params not in params[:i]]  # small spaces repeat some
    for trial in different[: arguments.top]:
        written.append(f"out/{folder.name}-trial-{trial.number}.csv")
        checkpoint = folder / f"trial-{trial.number}" / "ckpt.pt"
        if subprocess.run([sys.executable, str(HERE / "infer.py"), str(checkpoint), "--out", written[-1]]).returncode:
            raise InputError(f"{checkpoint}: infer.py failed")
    if written:
        print(f"to vote:\n  python ensemble.py {shlex.join(written)}")


if __name__ == "__main__":
    main()
