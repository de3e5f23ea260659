"""Published evaluation figures, recomputed from the data they were published with.

    python scripts/published_numbers.py --data ../shared/data --write docs/evaluation.md

Writes a table of published, ours and their difference between the two markers of the document, and exits 1
when a figure is off: AlpacaEval's win rates and standard errors, the verdicts of IFEval and GSM8K, PandaLM's
agreement of annotators. Nothing of the data is copied.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet

from data_prep.answers import gsm8k_correct
from eval.agreement import cohen_kappa
from eval.tasks.ifeval import verdict
from eval.win_rate import counted_win_rate
from posttrain.errors import UserError

BEGIN, END = "<!-- published numbers: begin -->", "<!-- published numbers: end -->"
GSM8K_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
PANDALM_KAPPAS = {("annotator1", "annotator2"): 0.85, ("annotator1", "annotator3"): 0.88} | {
    ("annotator2", "annotator3"): 0.86
}
PANDALM_LABELS = {0: 105, 1: 422, 2: 472}
"""Published with PandaLM (Wang et al. 2023): agreement of annotators, majority labels (0 is a tie)."""


@dataclass(frozen=True)
class Row:
    """One published figure beside ours; `tolerance` is how far apart they may be."""

    source: str
    what: str
    published: float
    ours: float
    tolerance: float
    digits: int = 6

    @property
    def agrees(self) -> bool:
        return abs(self.published - self.ours) <= self.tolerance

    def line(self) -> str:
        published, ours = (f"{value:.{self.digits}f}" for value in (self.published, self.ours))
        difference = abs(self.published - self.ours)
        exact = isinstance(self.published, int) and isinstance(self.ours, int)
        off = f"{difference:g}" if exact else "< 1e-9" if difference < 1e-9 else f"{difference:.3g}"
        return f"| {self.source} | {self.what} | {published} | {ours} | {off} |"


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def alpaca_eval(folder: Path) -> Iterator[Row]:
    """Win rate and standard error of every model of the leaderboard, in per cent.

    A preference of 1 is for the baseline, 2 for the model, and values between are the judge's certainty.
    """
    table = pyarrow.parquet.read_table(folder / "preferences.parquet").to_pylist()
    preferences: dict[str, list[float]] = {}
    for row in table:
        preferences.setdefault(row["generator_2"], []).append(row["preference"] - 1)
    board = pyarrow.csv.read_csv(folder / "leaderboard.csv").to_pylist()
    for published in sorted(board, key=lambda row: -row["win_rate"]):
        model = published[""]
        found = counted_win_rate(preferences[model])
        error = found.rate.standard_error or 0.0
        yield Row("AlpacaEval", f"{model}, win rate %", published["win_rate"], 100 * found.rate.value, 1e-9)
        yield Row("AlpacaEval", f"{model}, standard error", published["standard_error"], 100 * error, 1e-9)
        for field, count in (("n_wins", found.wins), ("n_wins_base", found.losses), ("n_draws", found.ties)):
            if published[field] != count:
                yield Row("AlpacaEval", f"{model}, {field}", published[field], count, 0, 0)


def ifeval(folder: Path) -> Iterator[Row]:
    """Verdicts on the published responses of GPT-4, by prompt (every instruction judged as published) and by
    instruction; a published verdict that was drawn at random (`_is_a_draw`) may differ.
    """
    responses = {
        row["prompt"]: row["response"]
        for row in json_lines(folder / "input_response_data_gpt4_20231107_145030.jsonl")
    }
    prompts = json_lines(folder / "input_data.jsonl")
    official = {
        mode: {row["prompt"]: row for row in json_lines(folder / f"test_output/eval_results_{mode}.jsonl")}
        for mode in ("strict", "loose")
    }
    same: Counter[str] = Counter()
    drawn = instructions = 0
    for prompt in prompts:
        text, response = prompt["prompt"], responses[prompt["prompt"]]
        ours = verdict(response, prompt["instruction_id_list"], prompt["kwargs"])
        theirs = {mode: official[mode][text]["follow_instruction_list"] for mode in official}
        instructions += len(ours.instructions)
        for mode, mine in (("strict", ours.strict), ("loose", ours.loose)):
            same[mode] += list(mine) == theirs[mode]
            same[f"{mode} instructions"] += sum(a == b for a, b in zip(mine, theirs[mode], strict=True))
        if list(ours.loose) != theirs["loose"]:
            drawn += _is_a_draw(response, prompt, ours.loose, theirs)
    for mode, random in (("strict", 0), ("loose", drawn)):
        yield Row("IFEval", f"{mode} verdicts, equal prompts", len(prompts), same[mode], random, 0)
        each = same[f"{mode} instructions"]
        yield Row("IFEval", f"{mode} verdicts, equal instructions", instructions, each, random, 0)


def _is_a_draw(
    response: str, prompt: dict[str, Any], ours: tuple[bool, ...], theirs: dict[str, list[bool]]
) -> bool:
    """Whether every instruction judged otherwise is one the official program decides by a random letter.

    Where `letter` is no ASCII letter it counts a letter drawn anew in each run. Both of its verdicts have to
    be possible for some letter.
    """
    for name, given, mine, strict, loose in zip(
        prompt["instruction_id_list"], prompt["kwargs"], ours, theirs["strict"], theirs["loose"], strict=True
    ):
        if mine == loose:
            continue
        if name != "keywords:letter_frequency" or given["letter"].lower() in string.ascii_lowercase:
            return False
        draws = [verdict(response, [name], [given | {"letter": x}]) for x in string.ascii_lowercase]
        if not any(d.strict == (strict,) for d in draws) or not any(d.loose == (loose,) for d in draws):
            return False
    return True


def gsm8k(folder: Path) -> Iterator[Row]:
    """The four published models' solutions: equal verdicts, and accuracy in per cent."""
    rows = json_lines(folder / "example_model_solutions.jsonl")
    for model in GSM8K_MODELS:
        official = [row[model]["is_correct"] for row in rows]
        ours = [gsm8k_correct(row[model]["solution"], row["ground_truth"]) for row in rows]
        same = sum(a == b for a, b in zip(official, ours, strict=True))
        n = len(rows)
        yield Row("GSM8K", f"{model}, verdicts of {n}, equal", n, same, 0, 0)
        yield Row("GSM8K", f"{model}, accuracy %", 100 * sum(official) / n, 100 * sum(ours) / n, 1e-9, 2)


def pandalm(folder: Path) -> Iterator[Row]:
    """Cohen's kappa of each two of three annotators, published to two digits, and the majority labels."""
    rows = json.loads((folder / "testset-v1.json").read_text(encoding="utf-8"))
    for (a, b), published in PANDALM_KAPPAS.items():
        found = cohen_kappa([row[a] for row in rows], [row[b] for row in rows]).value
        yield Row("PandaLM", f"kappa of {a} and {b}", published, found, 0.005, 4)
    votes = [Counter(row[f"annotator{k}"] for k in (1, 2, 3)).most_common(1)[0] for row in rows]
    labels = Counter(label for label, count in votes if count > 1)
    for label, name in ((0, "tie"), (1, "first better"), (2, "second better")):
        yield Row("PandaLM", f"majority says {name}", PANDALM_LABELS[label], labels[label], 0, 0)


def all_rows(data: Path) -> list[Row]:
    """Every figure; raises UserError where a folder of the data is absent."""
    sources = {
        "alpaca_eval": alpaca_eval,
        "ifeval/data": ifeval,
        "gsm8k/grade_school_math/data": gsm8k,
        "pandalm/data": pandalm,
    }
    missing = [name for name in sources if not (data / name).is_dir()]
    if missing:
        raise UserError(f"{data}: no folder {', '.join(missing)}\n    point --data at the published data")
    return list(itertools.chain.from_iterable(make(data / name) for name, make in sources.items()))


def table(rows: list[Row]) -> str:
    head = "| source | figure | published | ours | difference |\n| --- | --- | ---: | ---: | ---: |"
    return "\n".join([head, *(row.line() for row in rows)])


def written(document: str, made: str) -> str:
    """The document with the table between its markers replaced; raises UserError without both markers."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(
            f"the document has no place for the table\n    put {BEGIN} and {END} where it belongs"
        )
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with alpaca_eval, ifeval, ...")
    parser.add_argument(
        "--write", type=Path, help="document with the markers; without it the table is printed"
    )
    arguments = parser.parse_args()
    try:
        rows = all_rows(arguments.data)
        if arguments.write is None:
            print(table(rows))
        else:
            document = arguments.write.read_text(encoding="utf-8")
            arguments.write.write_text(written(document, table(rows)), encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    off = [row for row in rows if not row.agrees]
    print(f"{len(rows) - len(off)} of {len(rows)} published figures agree", file=sys.stderr)
    for row in off:
        print(f"differs: {row.line()}", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
