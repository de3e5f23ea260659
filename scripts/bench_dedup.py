"""Near-duplicates of 100,000 texts: data_prep against datasketch (bulk signatures + LSH) and rensa.

    python scripts/bench_dedup.py ../shared/data --output docs/benchmarks/dedup.json [--peers DIR]

The corpus is every text of more than 40 characters in the folder, shuffled, with 5,000 edited copies (one
word in fifteen at most replaced, deleted or inserted). Each system runs in a process of its own, from texts
to clusters or pairs, its shingling included, on one thread; seconds are of the clock, memory is the peak of
the process (peak_rss_mb) beside that of loading the texts (texts_rss_mb). A pair counts as found when the
system puts both texts into one cluster, or gives them as a candidate. Recall is over the true pairs: all of
Jaccard similarity .7 or more, found by an exact join (data_prep/exact_join.py), which no system's signatures
had a part in. --peers: a directory to import datasketch and rensa from; what cannot be imported is left out,
with the reason.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

THRESHOLD = 0.7
SYSTEMS = ("posttrain", "datasketch", "rensa")
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_REST = (
    "a-z0-9\x80-\u0dff\u0f00-\u0fff\u10a0-\u167f\u1681-\u177f\u1800-\u1fff\u2070-\u2fff\u3040\u3100-\u31ef"
)
_REST += "\u3200-\u33ff\u4dc0-\u4dff\ua000-\uf8ff\ufb00-\U0001ffff\U00040000-\U0010ffff"
_WORD = re.compile(rf"[{_ALONE}\U00020000-\U0003ffff]|[{_REST}]+")
"""The words of data_prep/shingles.py as an expression, so that all systems compare the same sets."""


def strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def texts_of(path: Path) -> Iterator[str]:
    """Every text of one file; nothing of other kinds of files."""
    opened = gzip.open if path.suffix == ".gz" else open
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        with opened(path, "rt", encoding="utf-8") as stream:
            for line in stream:
                yield from strings(json.loads(line))
    elif path.suffix == ".json":
        yield from strings(json.loads(path.read_text(encoding="utf-8")))
    elif path.suffix == ".txt":
        yield from path.read_text(encoding="utf-8").splitlines()
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                yield from strings(list(row.values()))


def corpus(folder: Path, count: int, edits: int, seed: int = 0) -> list[str]:
    """`count` texts, `edits` of which are edited copies of others."""
    found = {text for path in sorted(folder.rglob("*")) if path.is_file() for text in texts_of(path)}
    texts = sorted(text for text in found if len(text) > 40)
    rng = random.Random(seed)
    rng.shuffle(texts)
    texts = texts[: count - edits]
    long = [text for text in texts if len(text.split()) >= 20]
    texts += [edited(rng.choice(long), rng, long) for _ in range(edits)]
    rng.shuffle(texts)
    return texts


def edited(text: str, rng: random.Random, others: Sequence[str]) -> str:
    """The text with up to one word in fifteen replaced, deleted or inserted."""
    words = text.split()
    for _ in range(rng.randint(1, max(1, len(words) // 15))):
        at, kind = rng.randrange(len(words)), rng.random()
        if kind < 0.4:
            words[at] = rng.choice(others).split()[0]
        elif kind < 0.7:
            del words[at]
        else:
            words.insert(at, rng.choice(["very", "the", "well", "also"]))
    return " ".join(words)


def word_shingles(texts: Sequence[str]) -> list[list[bytes]]:
    """What the peers are given: the words of the normalised text in threes."""
    from data_prep.dedup import normalise

    out = []
    for text in texts:
        words = _WORD.findall(normalise(text))
        out.append([" ".join(words[at : at + 3]).encode() for at in range(max(len(words) - 2, 1))])
    return out


def run_posttrain(texts: Sequence[str], truth: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Clusters of data_prep.near_duplicates, every pair of them confirmed."""
    from data_prep.minhash import MinHashSettings
    from data_prep.near_duplicates import find_near_duplicates
    from data_prep.shingles import jaccard, shingle

    started = time.perf_counter()
    found = find_near_duplicates(texts, MinHashSettings(THRESHOLD))
    seconds = time.perf_counter() - started
    hits = sum(bool(found.cluster[left] == found.cluster[right]) for left, right in truth)
    wrong = sum(
        jaccard(shingle([texts[left]]).of(0), shingle([texts[right]]).of(0)) < THRESHOLD
        for left, right, _ in found.pairs
    )
    return {"seconds": seconds, "found": hits, "pairs": len(found.pairs), "wrong_pairs": wrong}


def run_datasketch(texts: Sequence[str], truth: Sequence[Sequence[int]]) -> dict[str, Any]:
    """MinHash.bulk with 128 permutations, MinHashLSH at its own bands; candidates are not confirmed."""
    from datasketch import MinHash, MinHashLSH

    started = time.perf_counter()
    signatures = MinHash.bulk(word_shingles(texts), num_perm=128, seed=1)
    index = MinHashLSH(threshold=THRESHOLD, num_perm=128)
    return _candidates(started, index, signatures, truth) | {"bands_x_rows": f"{index.b} x {index.r}"}


def run_rensa(texts: Sequence[str], truth: Sequence[Sequence[int]]) -> dict[str, Any]:
    """RMinHash, 16 bands x 8 rows; candidates are not confirmed."""
    from rensa import RMinHash, RMinHashLSH

    started = time.perf_counter()
    signatures = RMinHash.from_token_sets(word_shingles(texts), num_perm=128, seed=1)
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=128, num_bands=16)
    return _candidates(started, index, signatures, truth) | {"bands_x_rows": "16 x 8"}


def _candidates(
    started: float, index: Any, signatures: Iterable[Any], truth: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Every text asked for among those before it, then added: seconds since `started`, true pairs, pairs."""
    earlier: list[set[int]] = []
    for number, signature in enumerate(signatures):
        earlier.append(set(index.query(signature)))
        index.insert(number, signature)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "found": sum(left in earlier[right] for left, right in truth),
        "pairs": sum(map(len, earlier)),
    }


RUNNERS = {"posttrain": run_posttrain, "datasketch": run_datasketch, "rensa": run_rensa}


def resident_mb() -> float:
    """Peak memory of this process so far, in MB (10^6 bytes).

    VmHWM of Linux, not ru_maxrss: that one begins with what the parent process held.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def measure(system: str, folder: Path) -> dict[str, Any]:
    """Run one system on the corpus in `folder`, in this process."""
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    truth = json.loads((folder / "truth.json").read_text())
    importlib.import_module(system if system != "posttrain" else "data_prep.near_duplicates")
    before = resident_mb()
    result = RUNNERS[system](texts, truth)
    return {
        "system": system,
        **result,
        "recall": result["found"] / len(truth),
        "peak_rss_mb": resident_mb(),
        "texts_rss_mb": before,
    }


def in_own_process(system: str, folder: Path, peers: str | None) -> dict[str, Any]:
    """`measure` in a new Python on one thread; {"skipped": reason} when the system is not installed."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *([peers] if peers else [])])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    command = [sys.executable, __file__, str(folder), "--measure", system]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **threads}, capture_output=True, text=True
    )
    if done.returncode == 3:
        return {"system": system, "skipped": done.stdout.strip()}
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison: corpus, truth, each system `repeats` times (the fastest counts)."""
    from data_prep.exact_join import exact_pairs

    texts = corpus(args.folder, args.count, args.edits)
    started = time.perf_counter()
    truth = [pair[:2] for pair in exact_pairs(texts, THRESHOLD).pairs]
    report: dict[str, Any] = {
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "true_pairs": len(truth),
        "exact_join_seconds": time.perf_counter() - started,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"numpy {np.__version__}",
        "command": "python scripts/bench_dedup.py " + " ".join(["../shared/data", "--peers DIR"]),
        "systems": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        (folder / "truth.json").write_text(json.dumps(truth))
        del texts, truth
        for system in SYSTEMS:
            runs = [in_own_process(system, folder, args.peers) for _ in range(args.repeats)]
            best = min(runs, key=lambda run: run.get("seconds", 0))
            report["systems"].append({**best, "all_seconds": [run.get("seconds") for run in runs]})
            print(json.dumps(report["systems"][-1]), file=sys.stderr)
    return report


def main() -> None:
    """Command line; `--measure` is what the processes of their own are started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of files to take texts from")
    parser.add_argument("--peers", help="directory to import datasketch and rensa from")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--edits", type=int, default=5_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the report to this JSON file")
    parser.add_argument("--measure", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        try:
            print(json.dumps(measure(args.measure, args.folder)))
        except ModuleNotFoundError as error:
            print(f"{error.name} is not installed and not in --peers")
            raise SystemExit(3) from None
        return
    text = json.dumps(benchmark(args), indent=2)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
