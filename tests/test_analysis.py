"""Tables against a count, the bootstrap against `score`, and the comparison of two models."""

import math
from collections import Counter

import numpy as np
import pytest

from analysis import (
    bootstrap,
    bootstrap_weights,
    compare,
    confusion_table,
    count_table,
    cross_table,
    error_table,
    group_table,
    label_table,
    length_table,
    list_cases,
    mcnemar,
    repeat_table,
    score_table,
    shared_table,
    type_pair,
    verdict,
    weighted_scores,
    worst_mistakes,
)
from metrics import score
from tests.helpers import SAMPLE, repeats_counted_from_the_file, row

# --- tables about rows ------------------------------------------------------------------------


def test_repeats_are_counted_beyond_the_first(rows):
    counted = [line["sample"] for line in repeat_table({"sample": rows})]
    assert counted == repeats_counted_from_the_file(SAMPLE / "train.csv")
    first = row("김은 이를 만났다", "김", "이")
    other_type = row("김은 이를 만났다", "김", "이", types=("ORG", "PER"))
    other_object = row("김은 이를 만났다", "김", "만")
    alike = {"f": [first, first, first._replace(label="per:spouse"), other_type, other_object]}
    assert [line["f"] for line in repeat_table(alike)] == [4, 2, 3, 2, 1]


def test_tables_of_labels_types_and_shared_rows():
    a = [row("김은 이를 만났다", "김", "이"), row("박은 최를 안다", "박", "최", "per:spouse")]
    b = [row("김은 이를 만났다", "김", "만", "per:spouse"), row("모두 다르다", "모", "다")]
    table = count_table({"a": [*a, a[0]], "b": b}, "label", lambda r: r.label)
    first = {"label": "no_relation", "a": 2, "a %": pytest.approx(200 / 3), "b": 1, "b %": 50}
    assert table[0] == first
    assert [line["label"] for line in table] == ["no_relation", "per:spouse"]
    assert cross_table(a) == [
        {"label": "no_relation", "PER-ORG": 1},
        {"label": "per:spouse", "PER-ORG": 1},
    ]
    untyped = a[0]._replace(subject=a[0].subject._replace(type=None), label=None)
    assert type_pair(untyped) == "(none)-ORG"
    assert cross_table([untyped])[0]["label"] == "(none)"
    shared = shared_table({"a": [*a, a[0]], "b": b})
    counts = [tuple(line.values())[1:] for line in shared]
    assert counts == [(1, 2, 1), (0, 0, 0), (1, 2, 1), (0, 0, 0)]


def test_a_cross_table_starts_with_the_most_frequent_label_and_types():
    rows = [row("김은 이를 만났다", "김", "이", "per:spouse")]
    rows += [row("김은 이를 만났다", "김", "이", types=("ORG", "LOC"))] * 2
    assert [list(line.items()) for line in cross_table(rows)] == [
        [("label", "no_relation"), ("ORG-LOC", 2), ("PER-ORG", 0)],
        [("label", "per:spouse"), ("ORG-LOC", 0), ("PER-ORG", 1)],
    ]


def test_length_table():
    table = length_table({"f": np.arange(1, 102)}, 100)
    assert [(line["tokens"], line["f"]) for line in table] == [
        ("mean", 51), ("50 %", 51), ("90 %", 91), ("95 %", 96), ("99 %", 100), ("max", 101),
        ("over 100", 1),
    ]  # fmt: skip


# --- bootstrap and tables about predictions ---------------------------------------------------

LABELS = ["no_relation", "a", "b", "c", "d"]


def predictions(seed, n=200, classes=5, sharpness=2.0, decimals=3):
    """(probs, gold) of a model that is right more often for a larger `sharpness`."""
    random = np.random.default_rng(seed)
    gold = random.integers(0, classes, n)
    logits = random.normal(size=(n, classes))
    logits[np.arange(n), gold] += sharpness
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probs.round(decimals), gold


@pytest.mark.parametrize("decimals", [1, 8])  # 1: many ties
def test_weighted_scores_are_those_of_repeated_rows(decimals):
    probs, gold = predictions(0, decimals=decimals)
    gold[gold == 4] = 3
    gold[:3] = 4  # a rare label
    n = len(gold)
    weights = np.random.default_rng(1).multinomial(n, np.full(n, 1 / n), 20).T.astype(float)
    predicted = np.where(probs[:, 2] == probs.max(1), 2, probs.argmax(1))  # resolves ties to 2
    found = weighted_scores(probs, predicted, gold, weights)
    for i in range(20):
        rows = np.repeat(np.arange(n), weights[:, i].astype(int))
        expected = score(probs[rows], gold[rows], predicted[rows])
        for name in ("micro_f1", "auprc", "accuracy"):
            assert found[name][i] == pytest.approx(expected[name], abs=1e-9), name


def test_bootstrap_draws_all_rows_equally_often_and_the_same_ones_each_time():
    weights = np.concatenate(list(bootstrap_weights(50, 250)), axis=1)
    assert weights.shape == (50, 250)
    assert set(weights.sum(0)) == {50}
    assert abs(weights.mean(1) - 1).max() < 0.35
    assert 0.8 < weights.var(1).mean() < 1.2
    probs, gold = predictions(0)
    drawn = [bootstrap(probs, probs.argmax(1), gold, 10)["auprc"] for _ in range(2)]
    np.testing.assert_array_equal(*drawn)


def test_bootstrap_intervals():
    """That of the accuracy matches the normal approximation; all contain their score."""
    probs, gold = predictions(3, n=1000)
    table = {line["score"]: line for line in score_table(probs, probs.argmax(1), gold)}
    assert all(line["from"] < line["value"] < line["to"] for line in table.values())
    accuracy = table["accuracy"]["value"] / 100
    half = 196 * math.sqrt(accuracy * (1 - accuracy) / 1000)
    width = table["accuracy"]["to"] - table["accuracy"]["from"]
    assert width == pytest.approx(2 * half, rel=0.15)


def test_tables_match_a_count():
    probs, gold = predictions(4)
    predicted = probs.argmax(1)
    pairs = Counter(zip(gold.tolist(), predicted.tolist()))
    for c, line in enumerate(label_table(predicted, gold, LABELS)):
        n_gold = sum(n for (g, _), n in pairs.items() if g == c)
        n_predicted = sum(n for (_, p), n in pairs.items() if p == c)
        assert (line["label"], line["rows"], line["predicted"]) == (LABELS[c], n_gold, n_predicted)
        assert line["recall"] == pytest.approx(100 * pairs[c, c] / n_gold)
        assert line["precision"] == pytest.approx(100 * pairs[c, c] / n_predicted)
    top = confusion_table(predicted, gold, LABELS, 3)
    counts = sorted((n for (g, p), n in pairs.items() if g != p), reverse=True)
    assert [line["count"] for line in top] == counts[:3]
    for line in top:
        pair = LABELS.index(line["gold"]), LABELS.index(line["predicted"])
        assert pairs[pair] == line["count"]
    errors = {line["kind"]: line["rows"] for line in error_table(predicted, gold)}
    kinds = ("correct relation (TP)", "false positives (FP)", "false negatives (FN)")
    tp, fp, fn = (errors[kind] for kind in kinds)
    assert 200 * tp / (2 * tp + fp + fn) == pytest.approx(score(probs, gold)["micro_f1"])
    missed = sum(n for (g, p), n in pairs.items() if g and not p)
    assert errors["relation in gold, none predicted"] == missed


def test_groups_and_worst_mistakes():
    probs, gold = predictions(5)
    predicted, group = probs.argmax(1), np.arange(200) % 3
    table = group_table("third", ["x", "y", "z", "empty"], group, predicted, gold)
    assert [line["third"] for line in table] == ["x", "y", "z"]
    assert [line["rows"] for line in table] == [67, 67, 66]
    for i, line in enumerate(table):
        expected = score(probs[group == i], gold[group == i])
        assert line["micro F1"] == pytest.approx(expected["micro_f1"])
        assert line["accuracy"] == pytest.approx(expected["accuracy"])
        assert line["from"] < line["micro F1"] < line["to"]
    none = np.zeros(2, int)
    without_relations = group_table("all", ["x"], none, none, none)[0]
    assert math.isnan(without_relations["micro F1"])
    assert without_relations["accuracy"] == 100
    one = (np.arange(60) == 0).astype(int)  # a third of the samples have no relation
    line = group_table("all", ["x"], none.repeat(30), one, one)[0]
    assert (line["from"], line["micro F1"], line["to"]) == (100, 100, 100)
    worst = worst_mistakes(probs, predicted, gold, 5)
    of_gold = probs[np.arange(200), gold]
    assert all(predicted[i] != gold[i] for i in worst)
    assert sorted(of_gold[predicted != gold])[:5] == of_gold[worst].tolist()


def test_a_case_has_the_probability_of_the_predicted_label():
    """A later step may have predicted another one than the most probable."""
    probs, predicted = np.array([[0.7, 0.2, 0.1]]), np.array([2])
    ((text, _),) = list_cases([0], ["x"], None, [1], ["none", "a", "b"], [(probs, predicted)])
    assert text == "x: gold a, predicted b 0.10 (gold: 0.20)"


# --- two models -------------------------------------------------------------------------------


def with_classes(probs):
    return probs, probs.argmax(1)


def test_a_better_model_is_told_from_chance():
    probs, gold = predictions(6, n=400, sharpness=3.0)
    good = with_classes(probs)
    bad = with_classes(predictions(6, n=400, sharpness=1.0)[0])  # the same rows and noise
    table, differences = compare([bad], [good], gold, draws=200)
    assert list(differences) == ["micro_f1", "auprc", "accuracy"]
    for line in table:
        assert line["B - A"] == pytest.approx(line["B"] - line["A"])
        assert 0 < line["from"] < line["B - A"] < line["to"]
        assert line["p"] == pytest.approx(2 / 201)
        assert "B is better by" in verdict(line)
        assert "points, significant" in verdict(line)
    reversed_line = compare([good], [bad], gold, draws=200)[0][0]
    assert "A is better by" in verdict(reversed_line)
    same, _ = compare([good], [good], gold, draws=200)
    assert [(line["B - A"], line["p"], line["from"]) for line in same] == [(0, 1, 0)] * 3
    assert verdict(same[0]) == "micro F1: no difference"
    other = probs.copy()
    other[:2] = other[2:4]  # two rows differ
    line = compare([good], [with_classes(other)], gold, draws=200)[0][2]
    assert line["p"] > 0.05
    assert "points, not significant" in verdict(line)


def test_different_seeds_widen_the_interval():
    runs = [with_classes(predictions(7, n=400, sharpness=s)[0]) for s in (1.0, 2.0, 3.0)]
    gold = predictions(7, n=400)[1]
    line = compare(runs, runs[1:2], gold, draws=300)[0][2]
    accuracies = [score(probs, gold)["accuracy"] for probs, _ in runs]
    assert line["A"] == pytest.approx(np.mean(accuracies))
    assert line["A ± SD"] == pytest.approx(np.std(accuracies, ddof=1))
    assert "B ± SD" not in line
    alone = compare(runs[:1], runs[1:2], gold, draws=300)[0][2]
    assert line["to"] - line["from"] > alone["to"] - alone["from"]


def test_mcnemar_is_a_binomial_test():
    expected = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert mcnemar(2, 8) == pytest.approx(expected)
    assert mcnemar(0, 0) == 1
