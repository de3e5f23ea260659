"""What a reward model has to beat: two judges that understand nothing.

`shorter_wins` looks at lengths alone. `tfidf_bradley_terry` is a bag of words: a Bradley-Terry model whose
strength is linear in TF-IDF features, that is, a logistic regression without intercept on the difference of
the two answers' features, cross-validated so that pairs of one group are never on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def shorter_wins(preferred: Sequence[str], other: Sequence[str]) -> np.ndarray:
    """Margin per pair, shape (n,): characters by which the preferred answer is shorter."""
    return np.array([float(len(b) - len(a)) for a, b in zip(preferred, other, strict=True)])


def tfidf_bradley_terry(
    preferred: Sequence[str],
    other: Sequence[str],
    groups: Sequence[Any],
    fold: Sequence[int] | None = None,
    folds: int = 5,
    c: float = 1.0,
) -> np.ndarray | None:
    """Out-of-fold margin per pair, shape (n,), in log-odds; None with fewer distinct groups than folds.

    `fold` gives the fold of each pair, so that a judge cross-validated elsewhere is met on its own folds;
    without it the groups are dealt to `folds` folds.

    Features are word uni- and bigrams (sublinear counts), fitted on the training folds alone. Each training
    pair enters both ways round, so the fit does not depend on which answer is written first.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, PredefinedSplit

    labels = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    if fold is not None:
        splits = PredefinedSplit(fold).split()
    elif labels.size == 0 or labels.max() + 1 < folds:
        return None
    else:
        splits = GroupKFold(folds).split(labels, groups=labels)
    first, second = np.array(preferred, dtype=object), np.array(other, dtype=object)
    margins = np.empty(len(first))
    for train, test in splits:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
        vectorizer.fit(np.concatenate([first[train], second[train]]))
        difference = vectorizer.transform(first[train]) - vectorizer.transform(second[train])
        model = LogisticRegression(C=c, fit_intercept=False, max_iter=1000)
        model.fit(vstack([difference, -difference]), np.repeat([1, 0], len(train)))
        held_out = vectorizer.transform(first[test]) - vectorizer.transform(second[test])
        margins[test] = held_out @ model.coef_[0]
    return margins
