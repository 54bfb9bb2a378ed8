"""Classifiers between two clouds of images."""

import numpy as np
import torch
from sklearn.base import ClassifierMixin
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from benchmarks.lib.fits import quiet


def told_apart(x: Tensor, y: Tensor, judge: ClassifierMixin, seed: int) -> float:
    """Accuracy of a fresh ``judge`` between as many rows of x and y, standardised, by five folds; .5 is not at all."""
    num = min(len(x), len(y))
    data, labels = torch.cat([x[:num], y[:num]]).numpy(), np.repeat([0, 1], num)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    with quiet():
        return float(cross_val_score(make_pipeline(StandardScaler(), judge), data, labels, cv=folds).mean())
