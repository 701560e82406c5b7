"""Which models to vote, with which weights: greedy selection (Caruana et al. 2004).

    choice = select(probs, predicted, gold, "micro_f1", soft=True)
    choice.weights                       # (F,) how often each file was taken

Arrays of F files, N rows and C classes: `probs` (F, N, C), `predicted` (F, N) and `gold` (N,)
class numbers, 0 for the negative label. Scores are percentages.
"""

from typing import NamedTuple

import numpy as np

from analysis import bootstrap_weights, centred, interval, weighted_f1, weighted_scores

ROUNDS, WITHOUT_GAIN = 20, 4  # of a selection; it ends early after so many without a better score
DRAWS = 50  # selections that are repeated on samples of the rows


def winners(mean: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The class with most votes (N,), for probabilities and shares of the votes (N, C).

    In a tie the class with the higher mean probability wins.
    """
    tied = shares >= shares.max(1, keepdims=True) - 1e-9
    return np.where(tied, mean, -1).argmax(1)


class Vote:
    """Votes over files with whole-number weights, and their score on weighted rows."""

    def __init__(self, probs, predicted, gold, metric: str, soft: bool):
        self.probs, self.predicted, self.gold, self.metric = probs, predicted, gold, metric
        self.votes = probs if soft else np.eye(probs.shape[2])[predicted]  # (F, N, C)

    def score(self, weights, rows: np.ndarray) -> np.ndarray:
        """The scores (D,) of the vote with weights (F,) for D weightings of the rows (N, D)."""
        mean, shares = (np.average(x, 0, weights) for x in (self.probs, self.votes))
        return self._score(shares, winners(mean, shares), rows)

    def score_file(self, i: int, rows: np.ndarray) -> np.ndarray:
        """The scores (D,) of a file with its probabilities, also if the vote is on the labels."""
        return self._score(self.probs[i], self.predicted[i], rows)

    def _score(self, shares: np.ndarray, predicted: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if self.metric == "micro_f1":
            return weighted_f1(predicted, self.gold, rows)
        return weighted_scores(shares, predicted, self.gold, rows)[self.metric]

    def select(self, rows: np.ndarray) -> np.ndarray:
        """The weights (F,) that greedy selection with replacement finds for row weights (N,).

        Each round adds the file that makes the vote best; the best vote of all rounds is kept.
        """
        rows, weights = rows[:, None], np.zeros(len(self.probs), dtype=int)
        probs = votes = 0  # their sums over the files taken
        best, kept, without_gain = -1.0, None, 0
        while weights.sum() < ROUNDS and without_gain < WITHOUT_GAIN:
            sums = [(probs + p, votes + v) for p, v in zip(self.probs, self.votes)]
            scores = [self._score(v, winners(p, v), rows)[0] for p, v in sums]
            taken = int(np.argmax(scores))
            weights[taken] += 1
            probs, votes = sums[taken]
            without_gain += 1
            if scores[taken] > best + 1e-9:
                best, kept, without_gain = scores[taken], weights.copy(), 0
        return kept

    def best_file(self, rows: np.ndarray) -> int:
        """The best single file for row weights (N,)."""
        each = range(len(self.probs))
        return int(np.argmax([self.score_file(i, rows[:, None])[0] for i in each]))


class Choice(NamedTuple):
    """What was selected, and what it is worth."""

    weights: np.ndarray  # (F,) how often each file was taken
    score: float  # of the vote
    single: float  # of the best file as it is
    members: list[dict]  # table, a line per selected file
    seen: float  # mean gain over the best single file on the rows that a repetition selected on
    unseen: float  # the same on rows that it did not select on
    spread: dict[str, float]  # the middle 95 % of the gains on unseen rows: "from", "to"


def select(probs, predicted, gold, metric: str, soft: bool, names: list[str]) -> Choice:
    """Select files by a metric ("micro_f1" or "auprc"), and repeat that on samples of the rows.

    A member's gain is the score of the vote less that of the vote without it; its interval and p
    (the share of samples without a gain) are of a bootstrap over the rows, with fixed weights. The
    selection profits from chance: it is repeated on samples of the rows, and compared with the best
    single file on the rows that were not drawn.
    """
    vote, all_rows = Vote(probs, predicted, gold, metric, soft), np.ones((len(gold), 1))
    weights, single = vote.select(all_rows[:, 0]), vote.best_file(all_rows[:, 0])
    drawn = list(bootstrap_weights(len(gold)))  # (N, 100) each

    def bootstrap(weights) -> np.ndarray:
        return np.concatenate([vote.score(weights, part) for part in drawn])

    repeated, gains = [], []
    for rows in drawn[0][:, :DRAWS].T:
        chosen, one, unseen = vote.select(rows), vote.best_file(rows), (rows == 0).astype(float)
        repeated.append(chosen > 0)
        sides = np.stack([rows, unseen], 1)
        gains.append(vote.score(chosen, sides) - vote.score_file(one, sides))
    repeated, gains = np.mean(repeated, 0), np.array(gains)  # (F,), (DRAWS, 2)
    members, of_vote = [], bootstrap(weights)
    for i in np.flatnonzero(weights):
        line = {"file": names[i], "weight": int(weights[i])}
        line["alone"] = vote.score_file(i, all_rows)[0]
        without = np.where(np.arange(len(weights)) == i, 0, weights)
        if without.any():
            here = (vote.score(weights, all_rows) - vote.score(without, all_rows))[0]
            gain = centred(metric, of_vote - bootstrap(without), here)
            line |= {"gain": here} | interval(gain)
            line["p"] = f"{((gain <= 0).sum() + 1) / (len(gain) + 1):.3f}"
        else:
            line |= {"gain": np.nan, "from": np.nan, "to": np.nan, "p": "–"}
        members.append(line | {"selected again, %": 100 * float(repeated[i])})
    whole, alone = vote.score(weights, all_rows)[0], vote.score_file(single, all_rows)[0]
    seen, unseen = gains.mean(0).tolist()
    return Choice(weights, whole, alone, members, seen, unseen, interval(gains[:, 1]))
