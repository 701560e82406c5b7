"""The scores of KLUE-RE, computed as KLUE's authors define them (Park et al. 2021, KLUE, section 3.5).

    scores = score(probs, gold)          # {"micro_f1": 71.2, "auprc": 74.0, "accuracy": 70.3}
    print(describe(scores, labels))      # one line for people, that names the classes left out of the AUPRC

All are percentages. Label 0 is the negative one (no_relation).
"""

import numpy as np


def score(probs: np.ndarray, gold: np.ndarray) -> dict:
    """micro_f1, auprc, accuracy and the classes without a positive, for probabilities (rows, classes), gold (rows,).

    micro_f1: precision and recall pooled over all classes but 0; the prediction is the likeliest class.
    auprc: the area under each class's precision-recall curve by the trapezoidal rule, their unweighted mean over all
    classes, 0 among them. A class that `gold` does not contain has no such curve and is left out ("absent").
    """
    from sklearn.metrics import f1_score  # here and below: its import takes a second of a program's start

    predicted, classes = probs.argmax(1), range(probs.shape[1])
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
