"""Vectors of texts: latent semantic analysis fitted on the reference, or a sentence-transformers model.

The default needs no download: hashed word counts, TF-IDF, and the largest singular directions (Deerwester et
al. 1990, Indexing by Latent Semantic Analysis), by scikit-learn. A text that has nothing in common with the
reference gets a short vector, which is itself what tells it apart, so vectors are not scaled to one length.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from posttrain.errors import UserError

BINS = 4096
DIMENSIONS = 64
Floats = NDArray[np.float32]


def count_matrix(texts: Sequence[str], tokens: Callable[[str], list[str]]) -> csr_matrix:
    """(texts, BINS) float32 counts of hashed tokens: no vocabulary is kept, so no word of the data either."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        analyzer=tokens, n_features=BINS, alternate_sign=False, norm=None, dtype=np.float32
    )
    return csr_matrix(vectorizer.transform(texts))


class LatentSemantics:
    """TF-IDF and truncated SVD over hashed counts. idf: (BINS,). components: (dimensions, BINS)."""

    def __init__(self, idf: Floats, components: Floats):
        self.idf, self.components = idf, components

    @classmethod
    def fit(cls, counts: csr_matrix) -> LatentSemantics:
        """Fit on (texts, BINS) counts. Stored in half precision, so that a saved one gives the same."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfTransformer

        transformer = TfidfTransformer(sublinear_tf=True).fit(counts)
        size = min(DIMENSIONS, counts.shape[0] - 1)
        svd = TruncatedSVD(size, random_state=0).fit(transformer.transform(counts))
        return cls(_rounded(transformer.idf_), _rounded(svd.components_))

    def transform(self, counts: csr_matrix) -> Floats:
        """(texts, dimensions) of (texts, BINS) counts."""
        from sklearn.preprocessing import normalize

        weighted = counts.copy()
        weighted.data = (np.log(weighted.data) + 1).astype(np.float32)
        weighted = normalize(weighted.multiply(self.idf[None, :]).tocsr())
        return _rounded(weighted @ self.components.T)

    def as_json(self) -> dict[str, Any]:
        return {"idf": encode(self.idf), "components": encode(self.components)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> LatentSemantics:
        return cls(decode(value["idf"]), decode(value["components"]))


def sentence_encoder(path: Path) -> Callable[[Sequence[str]], Floats]:
    """A function from texts to (texts, dimensions) unit vectors by the sentence-transformers model in `path`.

    Raises UserError: the package is missing, or `path` holds no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise UserError(
            f"--embedding {path}: needs sentence-transformers\n    pip install sentence-transformers"
        ) from error
    if not (path / "config.json").is_file():
        raise UserError(
            f"--embedding {path}: no config.json there\n    name the directory of a local model, no Hub id"
        )
    model = SentenceTransformer(str(path), device="cpu", local_files_only=True)

    def encode_texts(texts: Sequence[str]) -> Floats:
        found = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return _rounded(found)

    return encode_texts


def distance_to(centroid: Floats, vectors: Floats) -> Floats:
    """(n,) cosine distances of (n, d) vectors to a centroid (d,); 1 for a vector of zeros."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(centroid)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.where(lengths > 0, vectors @ centroid / lengths, 0.0)
    return (1 - cosine).astype(np.float32)


def encode(array: NDArray[Any]) -> dict[str, Any]:
    """An array as JSON: half precision for floats, as is for integers, base64."""
    stored = array.astype(np.float16) if array.dtype.kind == "f" else array
    text = base64.b64encode(np.ascontiguousarray(stored).tobytes()).decode("ascii")
    return {"dtype": stored.dtype.str, "shape": list(stored.shape), "base64": text}


def decode(value: dict[str, Any]) -> NDArray[Any]:
    """The array that `encode` wrote; floats as float32."""
    raw = np.frombuffer(base64.b64decode(value["base64"]), dtype=np.dtype(value["dtype"]))
    array = raw.reshape(value["shape"])
    return array.astype(np.float32) if array.dtype.kind == "f" else array.copy()


def _rounded(array: NDArray[Any]) -> Floats:
    return np.asarray(array).astype(np.float16).astype(np.float32)
