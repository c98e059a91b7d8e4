"""Figures of a classifier of bags: ROC, calibration, confusion, and the probabilities of all bags."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medcl.mil.classification import BINS
from medcl.report.figures import BLUE, GREY, ORANGE, SKY, literal, new_figure, plain, to_uri

COLOURS = (BLUE, ORANGE, GREY, SKY)


def roc_points(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate at every threshold, from (0, 0) to (1, 1); equal scores are one step."""
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(positive[order])[ends]
    false = ends + 1 - hits
    return np.append(0, false / max(1, (~positive).sum())), np.append(0, hits / max(1, positive.sum()))


def roc(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """The ROC of every repeat, thin, and of their mean probabilities, strong; of several classes each against the rest.

    Args:
        probabilities: (N, repeats, C).
        labels: (N,).
        classes: their names.
    """
    figure = new_figure(3.5, 3.4)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    which = [1] if len(classes) == 2 else list(range(len(classes)))
    for colour, c in zip(COLOURS * len(which), which, strict=False):
        for r in range(probabilities.shape[1] if probabilities.shape[1] > 1 else 0):
            axes.plot(*roc_points(probabilities[:, r, c], labels == c), color=colour, linewidth=0.7, alpha=0.3)
        mean = probabilities[:, :, c].mean(1)
        axes.plot(*roc_points(mean, labels == c), color=colour, linewidth=1.8, label=literal(classes[c]))
    if len(which) > 1:
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_xlabel("false positive rate", fontsize=8)
    axes.set_ylabel("true positive rate", fontsize=8)
    plain(axes, "ROC" if len(which) > 1 else literal(f"ROC of {classes[1]}"))
    return to_uri(figure)


def reliability(probabilities: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and number of predictions in each bin of confidence that holds any.

    Args:
        probabilities: (n, C).
        labels: (n,).
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    inside = [index == b for b in range(BINS)]
    return [(float(confidence[i].mean()), float(right[i].mean()), int(i.sum())) for i in inside if i.any()]


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> str:
    """Accuracy against confidence in bins; the area of a dot is the number of predictions, over all repeats."""
    repeats, classes = probabilities.shape[1:]
    points = reliability(probabilities.reshape(-1, classes), np.repeat(labels, repeats))
    figure = new_figure(3.5, 3.4)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    x, y, count = (np.array(each) for each in zip(*points, strict=True))
    axes.plot(x, y, color=BLUE, linewidth=1)
    axes.scatter(x, y, s=12 + 300 * count / count.sum(), color=BLUE, alpha=0.7, linewidth=0)
    axes.set(xlim=(1 / classes - 0.03, 1.03), ylim=(-0.03, 1.03))
    axes.set_xlabel("probability of the predicted class", fontsize=8)
    axes.set_ylabel("share that is right", fontsize=8)
    plain(axes, "calibration")
    return to_uri(figure)


def confusion_table(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Bags by true class (rows) and predicted class (columns), mean over repeats: (C, C)."""
    repeats, classes = probabilities.shape[1:]
    table = np.zeros((classes, classes))
    for r in range(repeats):
        np.add.at(table, (labels, probabilities[:, r].argmax(1)), 1 / repeats)
    return table


def confusion(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """The confusion matrix, coloured by the share of a true class."""
    table = confusion_table(probabilities, labels)
    share = table / np.maximum(table.sum(1, keepdims=True), 1e-9)
    figure = new_figure(3.5, 3.4)
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(*table.shape):
        number = f"{table[i, j]:.0f}" if abs(table[i, j] - round(table[i, j])) < 1e-6 else f"{table[i, j]:.1f}"
        text = f"{number}\n{100 * share[i, j]:.0f} %"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.6 else "black")
    names = [literal(name) for name in classes]
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=30 if len(names) > 3 else 0)
    axes.set_yticks(range(len(names)), names, fontsize=8, rotation=90, va="center")
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    axes.set_title("bags, and share of the true class", fontsize=9, loc="left")
    return to_uri(figure)


def probability_strips(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    """The probability of every bag, mean over repeats, a row for each true class.

    For two classes that of the positive one, else that of the bag's own class.
    """
    mean = probabilities.mean(1)
    shown = mean[:, 1] if len(classes) == 2 else mean[np.arange(len(labels)), labels]
    figure = new_figure(7.2, 0.75 + 0.42 * len(classes))
    axes = figure.add_subplot()
    jitter = np.random.default_rng(0)
    for c in range(len(classes)):
        values = shown[labels == c]
        axes.scatter(values, c + jitter.uniform(-0.18, 0.18, len(values)), s=16, color=BLUE, alpha=0.5, linewidth=0)
        if len(values):
            axes.plot([np.median(values)] * 2, [c - 0.32, c + 0.32], color="black", linewidth=1.5)
    axes.set_yticks(range(len(classes)), [literal(name) for name in classes])
    axes.set(xlim=(-0.02, 1.02), ylim=(len(classes) - 0.5, -0.5))
    of = f"probability of {classes[1]}" if len(classes) == 2 else "probability of the true class"
    axes.set_xlabel(literal(of), fontsize=8)
    plain(axes)
    return to_uri(figure)
