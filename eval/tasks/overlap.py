"""Overlap of answers with references (ROUGE, BLEU, chrF) and how varied the answers are (distinct-n).

ROUGE by rouge-score (F1, Porter stemmer, best reference), BLEU and chrF by sacrebleu with its defaults.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import stats

from eval.statistics import Interval, bootstrap_limits
from eval.tasks.base import GenerationTask, How, Result, Scored
from eval.tasks.config import OverlapTask
from eval.tasks.items import Item

_SEGMENT = ("bleu_counts", "bleu_totals", "lengths")


class Overlap(GenerationTask):
    """rouge1, rouge2, rougeL in [0, 1]; bleu (of the corpus) and chrf (mean of sentences) in [0, 100];
    distinct_1 and distinct_2 (of the corpus) in [0, 1].
    """

    dataset_kind = "conversation"

    def __init__(self, config: OverlapTask) -> None:
        super().__init__(config)
        self.config = config
        self._rouge = [name for name in config.metrics if name.startswith("rouge")]

    def check(self, item: Item) -> None:
        item.texts(self._column)

    @property
    def _column(self) -> str:
        return self.config.reference_column if self.config.data is not None else "reference"

    def score_all(self, items: Sequence[Item], texts: Sequence[str]) -> list[Scored]:
        """Values of single answers; detail: what the corpus scores are added up from."""
        found: list[Scored] = [Scored({}) for _ in items]
        references = [item.texts(self._column) for item in items]
        if self._rouge:
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer(self._rouge, use_stemmer=True)
            for one, text, given in zip(found, texts, references, strict=True):
                best = scorer.score_multi(given, text)
                one.values.update({name: best[name].fmeasure for name in self._rouge})
        if "chrf" in self.config.metrics:
            from sacrebleu.metrics import CHRF

            chrf = CHRF()
            for one, text, given in zip(found, texts, references, strict=True):
                one.values["chrf"] = chrf.sentence_score(text, given).score
        if "bleu" in self.config.metrics:
            from sacrebleu.metrics import BLEU

            bleu = BLEU()
            for one, text, given in zip(found, texts, references, strict=True):
                part = bleu.corpus_score([text], [[reference] for reference in given])
                lengths = [part.sys_len, part.ref_len]
                one.detail.update(zip(_SEGMENT, (part.counts, part.totals, lengths), strict=True))
        return found

    def scores(self, results: Sequence[Result], how: How) -> dict[str, Interval]:
        scores = super().scores(results, how)
        if "bleu" in self.config.metrics:
            scores["bleu"] = _bleu(results, how)
        for n in (1, 2):
            if f"distinct_{n}" in self.config.metrics:
                found = distinct([result.output.text for result in results], n, how.confidence)
                if found is not None:
                    scores[f"distinct_{n}"] = found
        return {name: scores[name] for name in self.config.metrics if name in scores}


def _bleu(results: Sequence[Result], how: How) -> Interval:
    """Corpus BLEU from the counts of its segments; the bootstrap draws whole prompts."""
    from sacrebleu.metrics import BLEU

    clusters = np.unique([result.item.prompt for result in results], return_inverse=True)[1]
    details = [result.scored.detail for result in results if result.scored is not None]
    rows = np.array([[number for name in _SEGMENT for number in detail[name]] for detail in details])
    sums = np.zeros((clusters.max() + 1, rows.shape[1]))
    np.add.at(sums, clusters, rows)

    def score(weights: np.ndarray) -> np.ndarray:
        totals = weights @ sums
        return np.array(
            [
                BLEU.compute_bleu(
                    list(row[:4]), list(row[4:8]), int(row[8]), int(row[9]), smooth_method="exp"
                ).score
                for row in totals
            ]
        )

    value = float(score(np.ones((1, len(sums))))[0])
    low, high, error = bootstrap_limits(
        score, len(sums), how.confidence, how.bootstrap_samples, how.seed, "percentile"
    )
    return Interval(value, float(low), float(high), len(rows), "bootstrap-percentile", float(error))


def distinct(texts: Sequence[str], n: int, confidence: float = 0.95) -> Interval | None:
    """Distinct n-grams of words over all n-grams of all texts (Li et al. 2016, arXiv:1510.03055).

    The interval is the jackknife's over texts (Student's t): a bootstrap repeats texts and would lower the
    figure itself. None where no text has n words. The figure falls with the amount of text, so compare only
    sets of the same size.
    """
    grams = []
    for text in texts:
        words = text.lower().split()
        grams.append(Counter(zip(*(words[i:] for i in range(n)), strict=False)))
    where = Counter(gram for one in grams for gram in one)
    total = sum(sum(one.values()) for one in grams)
    if total == 0:
        return None
    value = len(where) / total
    alone = [sum(where[gram] == 1 for gram in one) for one in grams]
    sizes = [sum(one.values()) for one in grams]
    left = [
        (len(where) - own) / (total - size) for own, size in zip(alone, sizes, strict=True) if size < total
    ]
    if len(left) < 2:
        return Interval(value, value, value, len(texts), "jackknife")
    error = float(np.sqrt((len(left) - 1) * np.var(left)))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(left) - 1)) * error
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0), len(texts), "jackknife", error)
