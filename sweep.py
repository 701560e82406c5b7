"""Search for good settings: Optuna proposes them, and train.py is run with each proposal.

    python sweep.py --trials 20                             # the wrap-up report's search space
    python sweep.py --trials 8 --space space.json -- --model DIR --limit 2000 --epochs 1
    python sweep.py --trials 20 --storage postgresql://USER:PASSWORD@HOST/DATABASE

A trial is a subprocess, train.py with the arguments after `--` and the proposed settings, in the
folder runs/sweep/trial-N: a crash costs that trial alone. A trial whose validation scores are below
the median of the earlier trials is stopped. The same command resumes a stopped or killed sweep from
runs/sweep/study.db. With --storage, several machines that share the folder can run it together.
"""

# First: it handles Ctrl-C while the others are imported.
from common import InputError, Parser, exit_on_error, expect, first_line, optional_import, read_json

# isort: split

import ctypes
import math
import shlex
import signal
import subprocess
import sys
import time
import warnings
from itertools import starmap
from pathlib import Path

from checkpoint import PROGRESS_FILES, remove_progress
from data import MARKERS, PROMPTS, TYPE_NAMES
from distributed import StopSignal
from metrics import read_summary
from page import text_table
from settings import Settings, as_argument, parse_settings

try:
    import optuna
except ImportError:
    optuna = None  # main() reports it

SPACE = {  # what the wrap-up report searched
    "marker": [name for name in MARKERS if name != "entity_mask"],
    "prompt": list(PROMPTS),
    "type_names": list(TYPE_NAMES),
    "lr": [1e-5, 2e-5, 3e-5, 5e-5],
    "epochs": [3, 5],
    "beta2": [0.98, 0.999],
    "warmup_ratio": [0.06, 0.1],
    "head": ["cls", "bilstm", "bigru"],
}


def parse_arguments():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--trials", type=int, default=20, help="trials of all machines together (default: 20)")
    add("--space", help='JSON file {"lr": [1e-5, 2e-5], ...}: the choices for each setting')
    add("--storage", help="Optuna storage URL (default: study.db in the folder)")
    add("--out", default="runs/sweep", help="folder, named as the study (default: runs/sweep)")
    add("--top", type=int, default=0, help="predict with this many of the best runs, into out/")
    add("arguments", nargs="*", help="after --: arguments of every train.py")
    found = parser.parse_args()
    if found.trials < 1 or found.top < 0:
        expected = "expected at least 1 and at least 0"
        raise InputError(f"--trials, --top: found {found.trials} and {found.top}, {expected}")
    if any(argument.split("=")[0] == "--out" for argument in found.arguments):
        raise InputError("--out: expected before --; each trial has a folder of its own")
    return found


def read_space(path: str | None, arguments: list[str]) -> dict[str, list]:
    """The choices for each setting; InputError unless train.py accepts each with `arguments`."""
    expected = 'an object {"lr": [1e-5, 2e-5], ...}: settings of train.py and lists of choices'
    space = read_json(path, expected) if path else SPACE
    expect(isinstance(space, dict) and space, path, "space", space, expected)
    for name, choices in space.items():
        known = name in Settings.__dataclass_fields__ and name != "out"
        valid = known and isinstance(choices, list) and choices
        expect(valid, path, name, choices, expected)
        for choice in choices:
            given = [*arguments, as_argument(name, choice)]
            settings = parse_settings(Settings, "train.py", "", given)
            if settings.seeds > 1 or settings.valid == "none":
                raise InputError("a sweep takes no --seeds or --valid none")
    return space


# --- trials -----------------------------------------------------------------------------------


def open_study(url: str, name: str, heartbeat: int) -> "optuna.Study":
    """Create or load the study.

    A running trial writes a heartbeat to the storage every `heartbeat` seconds. After three
    intervals without one, Optuna marks the trial as failed and adds another one that retries it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "The reported value is ignored")  # the study has it already
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
    beat = {"heartbeat_interval": heartbeat, "grace_period": 3 * heartbeat}
    sampler = optuna.samplers.TPESampler(constant_liar=True)  # for trials that run in parallel
    method = {"sampler": sampler, "pruner": optuna.pruners.MedianPruner(), "direction": "maximize"}
    try:
        storage = optuna.storages.RDBStorage(url, heartbeat_stale_trial_callback=retry, **beat)
        return optuna.create_study(study_name=name, storage=storage, load_if_exists=True, **method)
    except Exception as error:  # of SQLAlchemy, the database or its driver
        raise InputError(f"--storage: cannot open study {name}: {first_line(error)}") from error


def number_of(trial) -> int:
    """The number in the folder's name: of the trial that this one retries, or its own."""
    retried = optuna.storages.RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if retried is None else retried


def last_attempts(study) -> list:
    """All trials, or of a retried trial its last retry; the completed ones first, by score."""
    trials = {number_of(trial): trial for trial in study.get_trials(deepcopy=False)}.values()
    return sorted(trials, key=lambda t: (t.state.name != "COMPLETE", -(t.value or 0)))


def search(study, space: dict, folder: Path, train: list[str], n_trials: int, poll: float):
    """Run trials until the study has `n_trials`, all finished; a retry does not count as another.

    `train` is the command of a training. `poll` is the time in seconds between two looks at it.
    """
    stop, waiting = StopSignal(), False

    def objective(trial) -> float:
        params = {name: trial.suggest_categorical(name, choices) for name, choices in space.items()}
        settings = list(starmap(as_argument, params.items()))
        number = number_of(study.get_trials(deepcopy=False)[trial.number])
        path = folder / f"trial-{number}"
        print(f"{path}: {shlex.join(settings)}", flush=True)
        if number == trial.number:  # not a retry: these files are of a deleted study
            remove_progress(path)
            (path / "summary.json").unlink(missing_ok=True)
        return run_trial(trial, path, [*train, *settings, "--out", str(path)], stop, poll)

    def after_trial(study, trial):
        path = folder / f"trial-{number_of(trial)}"
        score = "" if trial.value is None else f" {trial.value:.2f}"
        print(f"{path}: {trial.state.name.lower()}{score}", flush=True)
        for name in PROGRESS_FILES:  # three times the size of the model, and no longer needed
            (path / name).unlink(missing_ok=True)

    while not stop.number:
        optuna.storages.fail_stale_trials(study)  # and adds their retries, in state WAITING
        trials = last_attempts(study)
        if len(trials) < n_trials or any(t.state.name == "WAITING" for t in trials):
            failed = (subprocess.CalledProcessError,)
            study.optimize(objective, n_trials=1, catch=failed, callbacks=[after_trial])
        elif any(t.state.name == "RUNNING" and t.params for t in trials):
            # a trial without settings has no heartbeat either: it would never become stale
            if not waiting:
                print("waiting for trials that run elsewhere or have just been stopped", flush=True)
            waiting = True
            time.sleep(poll)
        else:
            return
    sys.exit(128 + stop.number)


def run_trial(trial, path: Path, command: list[str], stop: StopSignal, poll: float) -> float:
    """Run a training, report its evaluations as they appear, and return its best score."""
    path.mkdir(exist_ok=True)
    with open(path / "log", "a") as log:
        training = subprocess.Popen(  # in a session of its own: only this process signals it
            command, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent
        )
    ended = False
    try:
        while not (ended or stop.number):
            time.sleep(poll)
            ended = training.poll() is not None  # before reading: no evaluation follows
            summary = read_summary(path)
            for number, scores in enumerate(summary.get("evaluations", []), 1):
                trial.report(scores[summary["settings"]["best_metric"]], number)
            if not ended and trial.should_prune():
                raise optuna.TrialPruned
    finally:
        training.terminate()  # unless it has ended; it finishes its step and saves
        training.wait()
    if stop.number:  # Optuna does not catch SystemExit: the trial will be retried
        print(f"{path}: stopped; the same command resumes")
        sys.exit(128 + stop.number)
    if training.returncode == 0:
        return summary["best"][summary["settings"]["best_metric"]]
    log = (path / "log").read_text(encoding="utf-8", errors="replace")
    error = f"{path}: {(log.splitlines() or ['no output'])[-1]}"
    if training.returncode == 2 and all(t.value is None for t in last_attempts(trial.study)):
        raise InputError(f"{error}; fix it and rerun the same command, or use another --out")
    print(error, flush=True)
    raise subprocess.CalledProcessError(training.returncode, command)


def end_with_parent():
    """Let Linux send SIGTERM to this new process when the sweep ends, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# --- results ----------------------------------------------------------------------------------


def show(study, trials: list, done: list, folder: Path, arguments: list[str]):
    """Print the table, the importance of each setting and the command that repeats the best run."""
    best, table = done[0], []
    for trial in trials:
        score = max(trial.intermediate_values.values(), default=math.nan)
        line = {"trial": number_of(trial), "score": score, "state": trial.state.name.lower()}
        table.append(line | {name: str(trial.params.get(name, "")) for name in best.params})
    print(f"\n{text_table(table)}")
    varied = [n for n, value in best.params.items() if any(t.params[n] != value for t in done)]
    if fixed := [name for name in best.params if name not in varied]:
        print(f"\nno importance for {', '.join(fixed)}: the same in all completed trials")
    if varied and len({t.value for t in done}) > 1:
        fanova = optuna.importance.FanovaImportanceEvaluator(seed=0)  # works with few trials
        shares = optuna.importance.get_param_importances(study, evaluator=fanova, params=varied)
        print("\nimportance of each setting")
        for name, share in shares.items():
            print(f"  {name:20} {share:.2f}")
    elif varied:
        print(f"\nno importance for {', '.join(varied)}: all completed trials have one score")
    settings, number = starmap(as_argument, best.params.items()), number_of(best)
    out = str(folder / f"best-trial-{number}")  # another trial may be the best one later
    command = ["python", "train.py", *arguments, *settings, "--out", out]
    print(f"\nto repeat trial {number}, the best:\n  {shlex.join(command)}")


@exit_on_error
def main(programs: Path = Path(__file__).parent, poll: float = 1.0, heartbeat: int = 10):
    """For tests: the folder of train.py and infer.py, and two intervals in seconds."""
    arguments = parse_arguments()
    optional_import("optuna", "sweep.py")
    space, folder = read_space(arguments.space, arguments.arguments), Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    url = arguments.storage or f"sqlite:///{folder / 'study.db'}"
    study = open_study(url, folder.name, heartbeat)
    made_with = {"space": space, "arguments": arguments.arguments}
    if study.user_attrs.get("made_with", made_with) != made_with:
        found = "found a sweep with another space or other arguments"
        raise InputError(f"{folder}: {found}; use another --out")
    study.set_user_attr("made_with", made_with)
    train = [sys.executable, str(programs / "train.py"), *arguments.arguments]
    search(study, space, folder, train, arguments.trials, poll)
    trials = last_attempts(study)
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if not done:
        raise InputError(f"{folder}: no trial completed, see {folder}/trial-*/log; raise --trials")
    show(study, trials, done, folder, arguments.arguments)
    given = parse_settings(Settings, "train.py", "", arguments.arguments)
    options = given.arguments("amp", "skip_bad_rows", "label_order")
    different, written = {}, []  # small search spaces repeat a combination of settings
    for trial in done:
        different.setdefault(str(trial.params), f"trial-{number_of(trial)}")
    for trial in list(different.values())[: arguments.top]:
        checkpoint = str(folder / trial / "ckpt.pt")
        written.append(f"out/{folder.name}-{trial}.csv")
        infer = [sys.executable, str(programs / "infer.py"), checkpoint, "--out", written[-1]]
        if subprocess.run([*infer, *options]).returncode:
            raise InputError(f"{checkpoint}: infer.py failed")
    if len(written) > 1:
        print(f"to vote:\n  python ensemble.py {shlex.join(written)}")


if __name__ == "__main__":
    main()
