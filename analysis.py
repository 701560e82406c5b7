"""Tables about rows and about predictions, bootstrap intervals, and tests of two models.

    table = count_table({"train": rows}, "label", lambda row: row.label)
    table, differences = compare([(probs_a, predicted_a)], [(probs_b, predicted_b)], gold)

A table is a list of lines, each a dict from column heading to value. Arrays of N rows and C
classes: `probs` (N, C), `predicted` (N,) and `gold` (N,) class numbers, 0 for the negative label.
Scores and shares are percentages.
"""

import math
from collections import Counter
from operator import attrgetter

import numpy as np

from metrics import score
from rows import Row

DRAWS = 1000  # of a bootstrap
SCORES = {"micro_f1": "micro F1", "auprc": "AUPRC", "accuracy": "accuracy"}

# --- tables about rows ------------------------------------------------------------------------

# What rows may have in common. Entities are equal if their words, offsets and types are.
SAME = {
    "sentence": attrgetter("sentence"),
    "sentence + object": attrgetter("sentence", "object"),
    "sentence + subject": attrgetter("sentence", "subject"),
    "sentence + both": attrgetter("sentence", "subject", "object"),
    "sentence + both + label": attrgetter("sentence", "subject", "object", "label"),
}


def type_pair(row: Row) -> str:
    """The entity types of subject and object, such as PER-ORG."""
    return f"{row.subject.type or '(none)'}-{row.object.type or '(none)'}"


def count_table(files: dict[str, list[Row]], heading: str, value) -> list[dict]:
    """The number and share of rows per `value(row)` in each file, most frequent value first."""
    counts = {name: Counter(value(row) or "(none)" for row in rows) for name, rows in files.items()}
    values = set().union(*counts.values())
    table = []
    for v in sorted(values, key=lambda v: ([-count[v] for count in counts.values()], v)):
        line = {heading: v}
        for name, count in counts.items():
            line |= {name: count[v], f"{name} %": 100 * count[v] / len(files[name])}
        table.append(line)
    return table


def cross_table(rows: list[Row]) -> list[dict]:
    """The number of rows per label and pair of entity types, most frequent first."""
    pairs = [(row.label or "(none)", type_pair(row)) for row in rows]
    counts = Counter(pairs)
    labels, columns = (dict(Counter(values).most_common()) for values in zip(*pairs))
    return [{"label": label} | {c: counts[label, c] for c in columns} for label in labels]


def repeat_table(files: dict[str, list[Row]]) -> list[dict]:
    """The number of rows that repeat an earlier row's sentence, sentence and object, and so on."""
    table = []
    for what, key in SAME.items():
        repeats = {name: len(rows) - len(set(map(key, rows))) for name, rows in files.items()}
        table.append({"same": what} | repeats)
    return table


def shared_table(files: dict[str, list[Row]]) -> list[dict]:
    """The number of different sentences, sentences with object, and so on that two files share,
    and of the rows that have them."""
    table = []
    for what, key in SAME.items():
        if "label" not in what:
            in_both = set.intersection(*(set(map(key, rows)) for rows in files.values()))
            line = {"in both files": what, "different": len(in_both)}
            for name, rows in files.items():
                line[f"rows of {name}"] = sum(key(row) in in_both for row in rows)
            table.append(line)
    return table


def length_table(lengths: dict[str, np.ndarray], limit: int) -> list[dict]:
    """Mean, quantiles and maximum of each file's lengths, and the number over `limit`."""
    columns = {"tokens": ["mean", "50 %", "90 %", "95 %", "99 %", "max", f"over {limit}"]}
    for name, n in lengths.items():
        columns[name] = [n.mean(), *np.percentile(n, (50, 90, 95, 99)), n.max(), (n > limit).sum()]
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


# --- bootstrap --------------------------------------------------------------------------------


def bootstrap_weights(n_rows: int, draws: int = DRAWS):
    """Yield weights (n_rows, up to 100 of the draws): how often each row is in a sample of n_rows
    rows, drawn with replacement. They are the same on each call, so that models can be paired."""
    random = np.random.default_rng(0)
    for start in range(0, draws, 100):  # in parts, to limit memory
        counts = random.multinomial(n_rows, np.full(n_rows, 1 / n_rows), min(100, draws - start))
        yield counts.T.astype(float, order="C")


def weighted_scores(probs, predicted, gold, weights: np.ndarray) -> dict[str, np.ndarray]:
    """`metrics.score` for D weightings of the rows: weights (N, D), scores (D,).

    A row of weight 2 counts as two rows. A class without rows is left out of the AUPRC.
    """
    areas = [_weighted_areas(probs[:, c], gold == c, weights) for c in np.unique(gold)]
    f1 = weighted_f1(predicted, gold, weights)
    accuracy = (predicted == gold) @ weights / weights.sum(0)
    return {"micro_f1": f1, "auprc": 100 * np.nanmean(areas, 0), "accuracy": 100 * accuracy}


def weighted_f1(predicted, gold, weights: np.ndarray) -> np.ndarray:
    """Micro F1 (D,) for weights (N, D); 0 if no row has a relation, gold or predicted."""
    hits = ((predicted == gold) & (gold != 0)) @ weights
    both = (predicted != 0) @ weights + (gold != 0) @ weights
    return 200 * hits / np.maximum(both, 1)


def _weighted_areas(probs: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Areas under the precision-recall curve (D,) of one class: probs (N,), positive (N,)."""
    order = np.argsort(-probs, kind="stable")
    order = order[probs[order] >= probs[positive].min()]  # recall is 1 from the last positive on
    last_of_ties = np.flatnonzero(np.diff(probs[order], append=-1))
    drawn = weights[order]
    taken, hits = (
        np.pad(counts.cumsum(0)[last_of_ties], ((1, 0), (0, 0)))  # the curve starts at recall 0
        for counts in (drawn, drawn * positive[order, None])
    )
    precision = np.where(taken > 0, hits / np.maximum(taken, 1), 1)
    area = np.trapezoid(precision, hits, axis=0)
    return np.where(hits[-1] > 0, area / np.maximum(hits[-1], 1), np.nan)


def bootstrap(probs, predicted, gold, draws: int = DRAWS) -> dict[str, np.ndarray]:
    """The scores (draws,) of samples of the rows, which are taken as independent."""
    drawn = bootstrap_weights(len(gold), draws)
    parts = [weighted_scores(probs, predicted, gold, weights) for weights in drawn]
    return {name: np.concatenate([part[name] for part in parts]) for name in SCORES}


def centred(name: str, drawn: np.ndarray, value: float) -> np.ndarray:
    """Draws of score `name`; those of the AUPRC are shifted to the mean `value`, the observed one.

    Samples overestimate the AUPRC: copies of a row have the same rank, and rare labels, which are
    hard to predict, may not be drawn.
    """
    return drawn - drawn.mean() + value if name == "auprc" else drawn


def interval(drawn: np.ndarray) -> dict[str, float]:
    """The middle 95 % of the draws."""
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"from": low, "to": high}


# --- tables about predictions -----------------------------------------------------------------


def score_table(probs, predicted, gold) -> list[dict]:
    """The three scores with 95 % intervals."""
    scores, drawn = score(probs, gold, predicted), bootstrap(probs, predicted, gold)
    return [
        {"score": title, "value": scores[name]} | interval(centred(name, drawn[name], scores[name]))
        for name, title in SCORES.items()
    ]


def label_table(predicted, gold, labels: list[str]) -> list[dict]:
    """Precision, recall, F1 (NaN if undefined) and the number of gold and predicted rows of each
    label, in the order of `labels`."""
    from sklearn.metrics import precision_recall_fscore_support  # takes a second to import

    classes = range(len(labels))
    columns = precision_recall_fscore_support(gold, predicted, labels=classes, zero_division=np.nan)
    n_predicted, table = np.bincount(predicted, minlength=len(labels)), []
    for label, p, r, f1, n, m in zip(labels, *columns, n_predicted):
        line = {"label": label, "precision": 100 * p, "recall": 100 * r, "F1": 100 * f1}
        table.append(line | {"rows": n, "predicted": m})
    return table


def error_table(predicted, gold) -> list[dict]:
    """The rows that micro F1 counts. A wrong relation is a false positive and a false negative."""
    relation, found, right = gold != 0, predicted != 0, predicted == gold
    kinds = {
        "correct relation (TP)": relation & right,
        "relation predicted, none in gold": found & ~relation,
        "relation in gold, none predicted": relation & ~found,
        "wrong relation predicted": relation & found & ~right,
        "false positives (FP)": found & ~right,
        "false negatives (FN)": relation & ~right,
    }
    return [{"kind": k, "rows": n.sum(), "%": 100 * n.mean()} for k, n in kinds.items()]


def confusion_table(predicted, gold, labels: list[str], n: int = 15) -> list[dict]:
    """The n most frequent pairs of different gold and predicted labels."""
    pairs = Counter((g, p) for g, p in zip(gold.tolist(), predicted.tolist()) if g != p)
    most = pairs.most_common(n)
    return [{"gold": labels[g], "predicted": labels[p], "count": m} for (g, p), m in most]


def group_table(heading: str, names: list[str], group: np.ndarray, predicted, gold) -> list[dict]:
    """Micro F1 with 95 % interval, and accuracy, of each group of rows; `group` (N,) indexes
    `names`. F1 is NaN if no row of the group has a relation, gold or predicted."""
    table = []
    for i in np.unique(group):
        p, g = predicted[group == i], gold[group == i]
        line = {heading: names[i], "rows": len(g), "relations": (g != 0).sum()}
        line |= dict.fromkeys(("micro F1", "from", "to"), math.nan)
        counted = (p != 0) | (g != 0)  # without any of these rows F1 is undefined
        if counted.any():
            weights = bootstrap_weights(len(g))
            drawn = [weighted_f1(p, g, w)[counted @ w > 0] for w in weights]
            line["micro F1"] = weighted_f1(p, g, np.ones(len(g)))
            line |= interval(np.concatenate(drawn))
        table.append(line | {"accuracy": 100 * (p == g).mean()})
    return table


def worst_mistakes(probs, predicted, gold, n: int = 20) -> list[int]:
    """The n wrong rows with the lowest probability of the gold label, lowest first."""
    of_gold = probs[np.arange(len(gold)), gold]
    wrong = np.flatnonzero(predicted != gold)
    return wrong[np.argsort(of_gold[wrong], kind="stable")][:n].tolist()


# --- two models -------------------------------------------------------------------------------


def compare(a: list[tuple], b: list[tuple], gold, draws: int = DRAWS):
    """(table, {score: differences B - A (draws,)}); a side is its runs' [(probs, predicted)].

    A paired bootstrap: each draw samples rows, the same for all runs, and as many runs of each
    side as it has, both with replacement. It takes the difference of the sides' mean scores.
    p is twice the share of draws with a difference of the other sign or 0.

    docs/reports.md says what the result does not show.
    """
    drawn = [[bootstrap(probs, predicted, gold, draws) for probs, predicted in s] for s in (a, b)]
    observed = [[score(probs, gold, predicted) for probs, predicted in side] for side in (a, b)]
    random, table, differences = np.random.default_rng(1), [], {}
    chosen = [random.integers(0, len(side), (len(side), draws)) for side in (a, b)]
    for name, title in SCORES.items():
        line, means = {"score": title}, []
        for side, scores, draws_of, which in zip("AB", observed, drawn, chosen):
            values = [of_run[name] for of_run in scores]
            line[side] = np.mean(values)
            if len(values) > 1:
                line[f"{side} ± SD"] = np.std(values, ddof=1)
            of_runs = np.array([of_run[name] for of_run in draws_of])  # (runs, draws)
            means.append(np.take_along_axis(of_runs, which, 0).mean(0))
        line["B - A"] = line["B"] - line["A"]
        difference = differences[name] = centred(name, means[1] - means[0], line["B - A"])
        beyond = min((difference <= 0).sum(), (difference >= 0).sum())
        line |= interval(difference) | {"p": min(1.0, 2 * (beyond + 1) / (draws + 1))}
        table.append(line)
    return table, differences


def mcnemar(only_a: int, only_b: int) -> float:
    """p of McNemar's exact test, for the number of rows that only A or only B gets right."""
    from scipy.stats import binomtest  # takes a second to import

    return binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0


def verdict(line: dict) -> str:
    """A line of the table of `compare` as a sentence."""
    if line["B - A"] == 0:
        return f"{line['score']}: no difference"
    better, by = "B" if line["B - A"] > 0 else "A", abs(line["B - A"])
    significant = "significant" if line["p"] < 0.05 else "not significant"
    bounds = f"95 % interval of B - A: {line['from']:.2f} to {line['to']:.2f}, p = {line['p']:.3f}"
    return f"{line['score']}: {better} is better by {by:.2f} points, {significant} ({bounds})"


def list_cases(which, ids, rows, gold, labels, runs) -> list[tuple[str, Row | None]]:
    """(text, row) of the rows numbered `which`: id, gold label, and what each of the `runs`
    [(probs, predicted)] predicts. `rows` (N,) may be None."""
    cases = []
    for i in which:
        text = f"{ids[i]}: gold {labels[gold[i]]}"
        for probs, predicted in runs:
            p, label = probs[i], labels[predicted[i]]
            text += f", predicted {label} {p[predicted[i]]:.2f} (gold: {p[gold[i]]:.2f})"
        cases.append((text, rows[i] if rows else None))
    return cases
