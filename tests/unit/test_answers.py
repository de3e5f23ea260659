"""Final answers of GSM8K solutions, and the reward made of them."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path

import pytest

from data_prep.answers import gsm8k_answer, gsm8k_correct, gsm8k_reward
from data_prep.config import SourceConfig
from data_prep.ingest import Reject, read_file
from posttrain.errors import DataError

SHARED = Path(os.environ.get("POSTTRAIN_SHARED_DATA", Path(__file__).parents[2] / "../shared/data"))
GSM8K = SHARED / "gsm8k" / "grade_school_math" / "data"
needs_gsm8k = pytest.mark.skipif(
    not GSM8K.is_dir(),
    reason="no gsm8k here: set POSTTRAIN_SHARED_DATA to the folder of shared test data",
)
SOLUTIONS = {
    "6b_finetuning": 286,
    "6b_verification": 515,
    "175b_finetuning": 458,
    "175b_verification": 742,
}
"""The four published models and how many of 1,319 test problems each solves by the official verdict."""


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
        ("So 3.\nA: 3", "3"),
        ("#### 2,125", "2125"),
        ("#### $1,450,000.", "1450000"),
        ("#### -7", "-7"),
        ("#### 0.5", "0.5"),
        ("#### 18.00", "18"),
        ("#### 1\n#### 2", "1"),
        ("#### 5 apples", "5"),
    ],
)
def test_the_marked_number_is_the_answer(text, number):
    assert gsm8k_answer(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "18", "The answer is 18.", "#### none", "a A: 3", "####"])
def test_a_text_without_a_marked_number_has_no_answer(text):
    assert gsm8k_answer(text) is None
    assert not gsm8k_correct(text, "#### 18")


def test_the_reward_reads_a_column_or_meta():
    completions, references = ["so\n#### 3", "#### 4", "three"], ["#### 3", "#### 3", "#### 3"]
    meta = [json.dumps({"answer": text}) for text in references]
    assert gsm8k_reward(completions, answer=references) == [1.0, 0.0, 0.0]
    assert gsm8k_reward(completions, meta=meta) == [1.0, 0.0, 0.0]


def test_prompts_without_a_reference_are_refused_with_the_remedy():
    with pytest.raises(DataError, match="meta_columns"):
        gsm8k_reward(["#### 3"], meta=["{}"])
    with pytest.raises(DataError, match="meta_columns"):
        gsm8k_reward(["#### 3"])
    with pytest.raises(DataError, match="no number"):
        gsm8k_reward(["#### 3"], answer=["three"])


def test_the_reference_travels_from_the_file_to_the_reward(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "1 + 2?", "answer": "#### 3"}\n{"question": "2 + 2?"}\n')
    source = SourceConfig(path=str(path), columns={"prompt": "question"}, meta_columns=["answer"])
    _, pairs = read_file(source, "prompt", path, "train.jsonl", None)
    (_, record), (_, reject) = pairs
    assert record.turns() == [("user", "1 + 2?")] and json.loads(record.meta) == {"answer": "#### 3"}
    assert gsm8k_reward(["#### 3"], meta=[record.meta]) == [1.0]
    assert isinstance(reject, Reject) and reject.reason == "missing_field" and "'answer'" in reject.detail


@needs_gsm8k
@pytest.mark.parametrize("model", SOLUTIONS)
def test_it_agrees_with_every_official_verdict(model):
    lines = (GSM8K / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    ours = [gsm8k_correct(row[model]["solution"], row["ground_truth"]) for row in rows]
    official = [row[model]["is_correct"] for row in rows]
    assert len(rows) == 1319 and sum(official) == SOLUTIONS[model]
    assert sum(a == b for a, b in zip(ours, official, strict=True)) == 1319


@needs_gsm8k
def test_every_reference_of_the_data_has_a_number():
    for split, count in (("train", 7473), ("test", 1319)):
        lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        references = [json.loads(line)["answer"] for line in lines]
        assert len(references) == count
        assert gsm8k_reward(references, answer=references) == [1.0] * count
