"""The scores of KLUE-RE, computed as KLUE's authors define them (Park et al. 2021, KLUE, section 3.5), and what is
behind them: intervals, labels, confusions, groups of rows, and whether one model is better than another.

    scores = score(probs, gold)          # {"micro_f1": 71.2, "auprc": 74.0, "accuracy": 70.3, "absent": []}
    print(describe(scores, labels))      # one line for people, that names the classes left out of the AUPRC

All but "absent" are percentages. Label 0 is the negative one (no_relation). report.py makes tables, figures and a page:

    python metrics.py runs/demo/valid.csv                                    # a run's validation rows
    python metrics.py out/x.csv --gold data/dev.csv                          # a submission, if the labels are known
    python metrics.py runs/a/valid.csv runs/b/valid.csv                      # is the second better than the first?
    python metrics.py --a 'runs/a-*/valid.csv' --b 'runs/b-*/valid.csv'      # several seeds a side
"""

import csv
import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import KLUE_LABELS, InputError, atomic_write, expect, read_csv, read_json

DRAWS = 1000  # of a bootstrap
SCORES = {"micro_f1": "micro F1", "auprc": "AUPRC", "accuracy": "accuracy"}

# --- files of predictions -----------------------------------------------------------------------------------------


class Predictions(NamedTuple):
    """A file of predictions, N rows of C classes. Rows stand in the file's order."""

    path: str
    ids: list[str]
    predicted: list[str]
    probs: np.ndarray  # (N, C), each row sums to 1
    lines: list[int]
    gold: list[str] | None  # as in a run's valid.csv


def write_predictions(path: str | Path, ids: list[str], predicted: list[str], probs: np.ndarray, gold=None):
    """Writes id,pred_label,probs as the competition wants them, and the gold labels after the id where given."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", *(["label"] if gold else []), "pred_label", "probs"])
        for i, (id, label, p) in enumerate(zip(ids, predicted, probs, strict=True)):
            writer.writerow([id, *([gold[i]] if gold else []), label, json.dumps(p.tolist())])


def read_predictions(path: str) -> Predictions:
    """Reads a submission or a run's valid.csv; raises InputError at the first row that is not as it should be."""
    first, predicted, probs, gold = {}, [], [], []
    for line, cells in read_csv(path, ("id", "pred_label", "probs")):
        where, id = f"{path}:{line}", cells["id"]
        try:
            p = [float(x) for x in json.loads(cells["probs"])]
        except (ValueError, TypeError, OverflowError, RecursionError):
            p = []
        holds = p and min(p) >= 0 and math.isclose(sum(p), 1, abs_tol=1e-3)
        expect(holds, where, "probs", cells["probs"], "numbers from 0 to 1 that sum to 1")
        n_classes = len(probs[0] if probs else p)
        expect(len(p) == n_classes, where, "classes", len(p), f"{n_classes} as in the rows above")
        expect(id not in first, where, "id", id, f"another: line {first.get(id)} has it already")
        first[id] = line
        predicted.append(cells["pred_label"])
        probs.append(p)
        gold += [cells["label"]] if "label" in cells else []
    if not probs:
        raise InputError(f"{path}: no rows")
    return Predictions(path, list(first), predicted, np.array(probs), list(first.values()), gold or None)


def read_summary(folder: Path) -> dict:
    """The summary.json in a run's folder; empty where there is none."""
    path = folder / "summary.json"
    return read_json(path, "a run's summary") if path.exists() else {}


def check_alike(files: list[Predictions]):
    """Raises InputError unless all have the same ids in the same order and as many classes."""
    base, hint = files[0], "name files of the same rows"
    for other in files[1:]:
        missing = base.ids, other.ids, f"rows of {base.path} are missing"
        extra = other.ids, base.ids, f"rows are not in {base.path}"
        for ids, others, text in (missing, extra):
            known = set(others)
            if lone := [id for id in ids if id not in known]:
                raise InputError(f"{other.path}: {len(lone)} {text}, such as id {lone[0]!r}; {hint}")
        for line, id, own in zip(other.lines, other.ids, base.ids):
            expect(id == own, f"{other.path}:{line}", "id", id, f"{own!r}, the order of {base.path}")
        if other.probs.shape != base.probs.shape:
            found, expected = other.probs.shape[1], base.probs.shape[1]
            raise InputError(f"{other.path}: found {found} classes, expected {expected} as in {base.path}")


def class_names(files: list[Predictions], labels: list[str] | None = None) -> dict[int, str]:
    """The label of each class: `labels` if given, else KLUE-RE's, or of another data set as far as its predictions
    tell. Raises InputError where a predicted label is not the likeliest class, as in a file whose probs are in another
    order of labels."""
    rows = [
        (f"{s.path}:{line}", label, np.flatnonzero(p >= p.max() - 1e-9).tolist())
        for s in files
        for line, label, p in zip(s.lines, s.predicted, s.probs)
    ]
    if labels and len(labels) == files[0].probs.shape[1]:
        names = dict(enumerate(labels))
    elif files[0].probs.shape[1] == len(KLUE_LABELS) and {label for _, label, _ in rows} <= set(KLUE_LABELS):
        names = dict(enumerate(KLUE_LABELS))
    else:
        names = {classes[0]: label for _, label, classes in reversed(rows) if len(classes) == 1}
    for where, label, classes in rows:
        likeliest = [names.get(c) for c in classes]
        if label not in likeliest:
            raise InputError(f"{where}: pred_label: found {label!r}, but its probs are highest for {likeliest[0]!r}")
    return names


def gold_classes(file: Predictions, names: dict[int, str], labels: list[str] | None) -> np.ndarray:
    """The class of each row (N,): of `labels`, or of the file's own column. Raises InputError where it has none, where
    the two differ, or where a label has no class."""
    gold = labels or file.gold
    if gold is None:
        raise InputError(f"{file.path}: has no column label; --gold names the file with its rows and their labels")
    number = {label: c for c, label in names.items()}
    for line, label, own in zip(file.lines, gold, file.gold or gold):
        expect(label == own, f"{file.path}:{line}", "label", own, f"{label!r} as in the file of its rows")
        expect(label in number, f"{file.path}:{line}", "label", label, f"one of {len(number)} known labels")
    return np.array([number[label] for label in gold])


# --- scores --------------------------------------------------------------------------------------------------------


def score(probs: np.ndarray, gold: np.ndarray, predicted: np.ndarray | None = None) -> dict:
    """micro_f1, auprc, accuracy and the classes without a positive, for probabilities (rows, classes), gold (rows,).

    micro_f1: precision and recall pooled over all classes but 0. `predicted` (rows,) are the likeliest classes unless
    given: where several are equally likely, as after a vote, a file says which one is meant.
    auprc: the area under each class's precision-recall curve by the trapezoidal rule, their unweighted mean over all
    classes, 0 among them. A class that `gold` does not contain has no such curve and is left out ("absent").
    """
    from sklearn.metrics import f1_score  # here and below: to import it takes a second of each program's start

    predicted, classes = probs.argmax(1) if predicted is None else predicted, range(probs.shape[1])
    present = [c for c in classes if (gold == c).any()]
    return {
        "micro_f1": 100 * f1_score(gold, predicted, average="micro", labels=list(classes[1:]), zero_division=0),
        "auprc": 100 * float(np.mean([_area(probs[:, c], gold == c) for c in present])),
        "accuracy": 100 * float((predicted == gold).mean()),
        "absent": [c for c in classes if c not in present],
    }


def describe(scores: dict, labels: list[str]) -> str:
    """The scores in a line; says which classes the AUPRC leaves out."""
    line = "micro F1 {micro_f1:.2f}  AUPRC {auprc:.2f}  accuracy {accuracy:.2f}".format(**scores)
    if scores["absent"]:
        line += f"  (AUPRC without {', '.join(labels[c] for c in scores['absent'])}: no such row)"
    return line


def _area(probs: np.ndarray, positive: np.ndarray) -> float:
    from sklearn.metrics import auc, precision_recall_curve

    precision, recall, _ = precision_recall_curve(positive, probs)
    return auc(recall, precision)


def weighted_scores(probs: np.ndarray, predicted: np.ndarray, gold: np.ndarray, weights: np.ndarray) -> dict:
    """`score` for D weightings of the rows at once: weights (rows, D), the scores (D,).

    A row of weight 2 counts as two rows, of weight 0 as none. A class without a row is left out of its AUPRC.
    """
    areas = [_weighted_areas(probs[:, c], gold == c, weights) for c in np.unique(gold)]
    accuracy = (predicted == gold) @ weights / weights.sum(0)
    return {
        "micro_f1": weighted_f1(predicted, gold, weights),
        "auprc": 100 * np.nanmean(areas, 0),
        "accuracy": 100 * accuracy,
    }


def weighted_f1(predicted: np.ndarray, gold: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Micro F1 (D,) without class 0 for weights (rows, D); 0 where there is no relation, true or predicted."""
    hits = ((predicted == gold) & (gold != 0)) @ weights
    both = (predicted != 0) @ weights + (gold != 0) @ weights
    return 200 * hits / np.maximum(both, 1)


def _weighted_areas(probs: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(-probs, kind="stable")
    order = order[probs[order] >= probs[positive].min()]  # what comes behind the last positive adds no area
    sorted_probs = probs[order]
    last_of_ties = np.flatnonzero(np.append(sorted_probs[1:] != sorted_probs[:-1], True))
    drawn = weights[order]
    taken = drawn.cumsum(0)[last_of_ties]
    hits = (drawn * positive[order, None]).cumsum(0)[last_of_ties]
    total = hits[-1]
    precision = np.divide(hits, taken, out=np.ones_like(hits), where=taken > 0)
    area = hits[0] * (1 + precision[0]) / 2  # from recall 0, precision 1
    area += (np.diff(hits, axis=0) * (precision[1:] + precision[:-1])).sum(0) / 2
    return np.divide(area, total, out=np.full_like(total, np.nan), where=total > 0)


def bootstrap_weights(n_rows: int, draws: int = DRAWS):
    """Yields weights (n_rows, some of the draws): how often each row is in a sample of n_rows drawn with replacement.
    The same ones each time, so that two models are compared on the same draws."""
    random = np.random.default_rng(0)
    for start in range(0, draws, 100):  # a hundred at a time: memory stays small
        share = np.full(n_rows, 1 / n_rows)
        yield random.multinomial(n_rows, share, min(100, draws - start)).T.astype(float, order="C")


def bootstrap(probs: np.ndarray, predicted: np.ndarray, gold: np.ndarray, draws: int = DRAWS) -> dict[str, np.ndarray]:
    """The scores (draws,) of as many samples of the rows, drawn with replacement as if rows were independent."""
    parts = [weighted_scores(probs, predicted, gold, weights) for weights in bootstrap_weights(len(gold), draws)]
    return {name: np.concatenate([part[name] for part in parts]) for name in SCORES}


def centred(name: str, drawn: np.ndarray, value: float) -> np.ndarray:
    """What was drawn of a score; of the AUPRC moved so that the mean is `value`, what was seen. Drawn samples have it
    too high: repeated rows rank together, and labels of which no row was drawn, rare and hard ones, are left out."""
    return drawn - drawn.mean() + value if name == "auprc" else drawn


def interval(drawn: np.ndarray) -> dict[str, float]:
    """The middle 95 % of what was drawn."""
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"from": low, "to": high}


# --- what is behind the scores -----------------------------------------------------------------------------------
# tables as in data.py: a list of lines, each a dict from heading to value


def score_table(probs: np.ndarray, predicted: np.ndarray, gold: np.ndarray) -> list[dict]:
    """The three scores with their 95 % intervals."""
    scores, drawn = score(probs, gold, predicted), bootstrap(probs, predicted, gold)
    return [
        {"score": text, "value": scores[name], **interval(centred(name, drawn[name], scores[name]))}
        for name, text in SCORES.items()
    ]


def label_table(predicted: np.ndarray, gold: np.ndarray, labels: list[str]) -> list[dict]:
    """Precision, recall and F1 in per cent (NaN where there is nothing to divide by), rows and predictions of each
    label, in the labels' order."""
    from sklearn.metrics import precision_recall_fscore_support

    classes = range(len(labels))
    each = precision_recall_fscore_support(gold, predicted, labels=classes, zero_division=np.nan)
    found = np.bincount(predicted, minlength=len(labels))
    return [
        {"label": label, "precision": 100 * p, "recall": 100 * r, "F1": 100 * f1, "rows": int(n), "predicted": int(m)}
        for label, p, r, f1, n, m in zip(labels, *each, found)
    ]


def error_table(predicted: np.ndarray, gold: np.ndarray) -> list[dict]:
    """Where micro F1 is won and lost. A relation taken for another is a false positive and a false negative."""
    hits = (predicted == gold) & (gold != 0)
    spurious, missed = (gold == 0) & (predicted != 0), (gold != 0) & (predicted == 0)
    confused = (gold != 0) & (predicted != 0) & ~hits
    lines = {
        "relations found (TP)": hits,
        "a relation where there is none": spurious,
        "a relation missed": missed,
        "a relation taken for another": confused,
        "false positives (FP)": spurious | confused,
        "false negatives (FN)": missed | confused,
    }
    return [{"what": what, "rows": int(which.sum()), "%": 100 * which.mean()} for what, which in lines.items()]


def confusion_table(predicted: np.ndarray, gold: np.ndarray, labels: list[str], n: int = 15) -> list[dict]:
    """The n most frequent pairs of true and predicted label that differ."""
    pairs = Counter((g, p) for g, p in zip(gold.tolist(), predicted.tolist()) if g != p)
    return [{"true": labels[g], "predicted": labels[p], "count": count} for (g, p), count in pairs.most_common(n)]


def worst_mistakes(probs: np.ndarray, predicted: np.ndarray, gold: np.ndarray, n: int = 20) -> list[int]:
    """The n wrongly predicted rows whose true label got the lowest probability, the worst first."""
    of_truth = probs[np.arange(len(gold)), gold]
    wrong = np.flatnonzero(predicted != gold)
    return wrong[np.argsort(of_truth[wrong], kind="stable")][:n].tolist()


def group_table(heading: str, names: list[str], group: np.ndarray, predicted: np.ndarray, gold: np.ndarray):
    """Micro F1 with its 95 % interval and accuracy of each group of rows; `group` (rows,) numbers the names. F1 is NaN
    where there is no relation, true or predicted."""
    table = []
    for i in np.unique(group):
        p, g = predicted[group == i], gold[group == i]
        line = {heading: names[i], "rows": len(g), "relations": int((g != 0).sum())}
        line |= dict.fromkeys(("micro F1", "from", "to"), math.nan)
        if (p != 0).any() or (g != 0).any():
            drawn = np.concatenate([weighted_f1(p, g, weights) for weights in bootstrap_weights(len(g))])
            line |= {"micro F1": float(weighted_f1(p, g, np.ones((len(g), 1)))[0]), **interval(drawn)}
        table.append(line | {"accuracy": 100 * float((p == g).mean())})
    return table


# --- is one better? ------------------------------------------------------------------------------------------------


def compare(a: list[tuple], b: list[tuple], gold: np.ndarray, draws: int = DRAWS):
    """(table, differences {score: (draws,)}) of B minus A, each side one or more runs' (probabilities (rows, classes),
    predicted (rows,)).

    A paired bootstrap: every draw takes rows with replacement, the same ones for all runs, and of each side's runs as
    many, with replacement too, and takes the difference of the sides' mean scores. p is twice the share of draws in
    which the difference is on the other side of 0, or on it. With one run a side nothing is said about seeds: the
    answer holds for these two models, on rows like these. Few seeds spread less than many would, and so does the
    interval: trust two or three a side less than it says. Rows count as independent, even those of one sentence.
    """
    drawn = [[bootstrap(probs, predicted, gold, draws) for probs, predicted in runs] for runs in (a, b)]
    random, table, differences = np.random.default_rng(1), [], {}
    chosen = [random.integers(0, len(runs), (len(runs), draws)) for runs in (a, b)]
    seen = [[score(probs, gold, predicted) for probs, predicted in runs] for runs in (a, b)]
    for name, text in SCORES.items():
        line, means = {"score": text}, []
        for title, scores, draws_of, which in zip("AB", seen, drawn, chosen):
            scores = [of_run[name] for of_run in scores]
            of_runs = np.array([of_run[name] for of_run in draws_of])  # (runs, draws)
            line[title] = np.mean(scores)
            if len(scores) > 1:
                line[f"{title} ± SD"] = np.std(scores, ddof=1)
            means.append(np.take_along_axis(of_runs, which, 0).mean(0))
        difference = differences[name] = centred(name, means[1] - means[0], line["B"] - line["A"])
        beyond = min((difference <= 0).sum(), (difference >= 0).sum())
        line |= {"B - A": line["B"] - line["A"], **interval(difference)}
        table.append(line | {"p": min(1.0, 2 * (beyond + 1) / (draws + 1))})
    return table, differences


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: how likely the rows that only A or only B gets right would be split as unevenly if each
    were a coin's throw."""
    from scipy.stats import binomtest

    return binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0


def verdict(line: dict) -> str:
    """A line of `compare`'s table in words."""
    better = "B" if line["B - A"] > 0 else "A"
    text = f"{line['score']}: {better} is ahead by {abs(line['B - A']):.2f} points"
    bounds = f"95 % of the draws: B - A from {line['from']:.2f} to {line['to']:.2f}, p = {line['p']:.3f}"
    if line["B - A"] == 0:
        return f"{line['score']}: no difference"
    if line["p"] < 0.05:
        return f"{text}, hardly by luck ({bounds})"
    return f"{text}, which could be luck ({bounds})"


if __name__ == "__main__":
    # in there this module is imported a second time, under its own name, as data.py is
    from report import metrics_report

    metrics_report()
