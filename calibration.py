"""Probabilities that say how often a prediction is right: one temperature for all rows.

    temperature = fit_temperature(probs, gold)          # on validation rows
    probs = temper(probs, temperature)                  # on any rows
    error = expected_calibration_error(confidence, right)

Arrays of N rows and C classes: `probs` (N, C), `predicted` and `gold` (N,) class numbers, 0 for the
negative label. `confidence` (N,) are the probabilities of the predicted classes, and `right` (N,)
says which are the gold ones. Errors, shares and scores are percentages.
"""

import math

import numpy as np

BINS = 15  # of equal width, as in most papers
THRESHOLDS = (0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def temper(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Divide the logarithms of `probs` by `temperature`, and normalise each row to sum 1.

    Above 1 every row becomes less certain. The order of a row's classes stays the same.
    """
    powers = (probs / probs.max(1, keepdims=True)) ** (1 / temperature)
    return powers / powers.sum(1, keepdims=True)


def fit_temperature(probs: np.ndarray, gold: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood of `gold`, from 0.2 to 5.

    1 without rows. Guo et al. 2017, On calibration of modern neural networks.
    """
    from scipy.optimize import minimize_scalar  # takes a second to import

    def loss(log_temperature: float) -> float:
        of_gold = temper(probs, math.exp(log_temperature))[np.arange(len(gold)), gold]
        return -np.log(np.maximum(of_gold, 1e-300)).mean()

    if not len(gold):
        return 1.0
    bounds = math.log(0.2), math.log(5)
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def cross_fitted(probs: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """`probs` (N, C) with the temperature of one half of the rows applied to the other half.

    So no row has a part in its own temperature.
    """
    first = np.random.default_rng(0).permutation(len(gold)) % 2 == 0
    out = np.empty_like(probs)
    for half in (first, ~first):
        out[half] = temper(probs[half], fit_temperature(probs[~half], gold[~half]))
    return out


def reliability_table(confidence: np.ndarray, right: np.ndarray) -> list[dict]:
    """Rows, mean confidence and accuracy of each bin of confidence that has rows."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    table = []
    for b in np.unique(bins):
        of_bin = bins == b
        line = {"probability": f"{b / BINS:.2f} to {(b + 1) / BINS:.2f}", "rows": of_bin.sum()}
        line |= {"mean": 100 * confidence[of_bin].mean(), "accuracy": 100 * right[of_bin].mean()}
        table.append(line)
    return table


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The mean difference of confidence and accuracy of the bins, weighted by their rows."""
    table = reliability_table(confidence, right)
    return sum(x["rows"] * abs(x["mean"] - x["accuracy"]) for x in table) / len(right)


def threshold_table(confidence, predicted, gold) -> list[dict]:
    """Precision and recall of the relations that are predicted with at least a probability, and
    how many they are. Precision is NaN if there are none, recall if no row has a relation."""
    relations, table = (gold != 0).sum(), []
    for threshold in THRESHOLDS:
        kept = (predicted != 0) & (confidence >= threshold)
        hits, line = (kept & (predicted == gold)).sum(), {"threshold": threshold}
        line["precision"] = 100 * hits / kept.sum() if kept.any() else math.nan
        line["recall"] = 100 * hits / relations if relations else math.nan
        table.append(line | {"rows kept": kept.sum(), "% of the rows": 100 * kept.mean()})
    return table
