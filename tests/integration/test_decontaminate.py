"""Decontamination: rules by hand, and the figures of docs/curation.md on GSM8K and its rephrased copy."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.operations.base import Dropped, Kept, Row
from data_prep.operations.decontaminate import Decontaminate, EvalSet
from data_prep.operations.eval_sets import read_eval_set
from data_prep.records import TextRecord
from posttrain.errors import DataError
from posttrain.stage import execute_stage
from tests.integration.test_curate import config, curate, digests, pairs, save, shared

ITEM = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
NEXT = "red orange yellow green blue indigo violet black white grey brown pink"


def rows(*texts: str) -> list[Row]:
    return [
        Row(TextRecord(text, id=str(line), group="g"), "f", line) for line, text in enumerate(texts, start=1)
    ]


def reasons(operation: Decontaminate, *texts: str) -> list[str]:
    verdicts = operation.apply(rows(*texts))
    return [verdict.reason if isinstance(verdict, Dropped) else "" for verdict in verdicts]


def test_the_rules_by_hand() -> None:
    operation = Decontaminate([EvalSet("exam", [ITEM, NEXT])], review_above=None)
    words = ITEM.split()
    thirteen = " ".join(words[:13])
    twelve = " ".join(words[:12])
    filler = " ".join(f"w{n}" for n in range(12))
    assert reasons(operation, f"well, {thirteen.upper()}! {filler} {filler}") == ["contaminated_ngram"]
    assert reasons(operation, f"{twelve} {filler}") == ["contaminated_coverage"]
    assert reasons(operation, f"{twelve} {filler} w12") == [""]
    assert reasons(operation, " ".join(words[:7]), filler) == ["", ""]
    # 8 of the words of each item, apart, cover 16 of 31.
    apart = f"{' '.join(words[:8])} {filler} x x x {' '.join(NEXT.split()[:8])}"
    assert reasons(operation, apart) == ["contaminated_coverage"]
    assert reasons(operation, f"{apart} x x") == [""]
    (dropped,) = operation.apply(rows(NEXT + " gold"))
    assert dropped == Dropped("contaminated_coverage", "92% of its words are in runs of 8 of exam")


def test_boilerplate_of_a_set_does_not_count() -> None:
    head = "answer the following question and give the final number after four hash marks please"
    sets = [EvalSet("exam", [f"{head} {n} {n + 1} {n + 2}" for n in range(30)])]
    row = f"{head} what is the price of a kettle and two cups in the shop at the corner of my street"
    assert reasons(Decontaminate(sets), row) == [""]
    assert reasons(Decontaminate(sets, common=100), row) == ["contaminated_ngram"]


def test_near_rows_are_listed_not_dropped() -> None:
    operation = Decontaminate(
        [EvalSet("far", ["nothing to see"]), EvalSet("exam", [ITEM, NEXT])], review_above=0.5
    )
    near, other = operation.apply(rows("pink brown grey white black violet indigo", "nothing here is alike"))
    assert isinstance(near, Kept)
    assert near.review is not None
    assert (near.review["set"], near.review["item"]) == ("exam", 2)
    assert near.review["cosine"] == pytest.approx((7 / 12) ** 0.5, abs=1e-3)
    assert isinstance(other, Kept)


def test_sets_are_files_folders_or_data_sets(tmp_path: Path) -> None:
    file = save(
        tmp_path / "exam.jsonl", [{"q": "Why?", "a": ["Because", {"b": "so"}], "n": 3}, {"q": "How?"}]
    )
    assert read_eval_set(Path(file), []).items == ["Why?\nBecause\nso", "How?"]
    assert read_eval_set(Path(file), ["q"]) == EvalSet("exam.jsonl", ["Why?", "How?"])
    with pytest.raises(DataError, match="no row has text in question"):
        read_eval_set(Path(file), ["question"])
    with pytest.raises(DataError, match="no row has text"):
        read_eval_set(Path(save(tmp_path / "marks.jsonl", [{"q": "..."}, {"q": 3}])), [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file to read"):
        read_eval_set(tmp_path / "empty", [])
    curate(config("preference", save(tmp_path / "a.jsonl", pairs(60))), tmp_path / "data")
    held_out = read_eval_set(tmp_path / "data", ["prompt"])
    assert 0 < len(held_out.items) < 30
    assert "Question" in held_out.items[0]


def test_sets_of_one_name_are_told_apart_wherever_they_lie(tmp_path: Path) -> None:
    """Equal data in other folders give equal bytes, the rows' neighbours and the ledger included."""
    found = []
    for place in ("here", "there"):
        folder = tmp_path / place
        for name, item in (("a", ITEM), ("b", NEXT)):
            (folder / name).mkdir(parents=True)
            save(folder / name / "exam.jsonl", [{"q": item}])
        source = save(folder / "a.jsonl", [{"text": f"{NEXT} w{n} w{n + 1}"} for n in range(60)])
        against = [str(folder / name / "exam.jsonl") for name in "ab"]
        decontaminate = {"op": "decontaminate", "against": against, "ngram": 0, "coverage": 0.9}
        settings = config("text", source, operations=[decontaminate])
        execute_stage("curate", settings, folder / "out", console=Console(file=io.StringIO()))
        found.append(digests(folder / "out") | {"review": (folder / "out/review.jsonl").read_text()})
    assert found[0] == found[1]
    info = json.loads((folder / "out/dataset.json").read_text())
    assert info["operations"][0]["settings"]["against"] == {"exam.jsonl (1)": 1, "exam.jsonl (2)": 1}
    assert json.loads(found[0]["review"].splitlines()[0])["set"] == "exam.jsonl (2)"


GSM8K = "gsm8k/grade_school_math/data/{}.jsonl"


@pytest.fixture(scope="module")
def exam() -> EvalSet:
    return read_eval_set(Path(shared(GSM8K.format("test"))), ["question"])


def questions(name: str) -> list[str]:
    lines = Path(shared(GSM8K.format(name))).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["question"] for line in lines]


def rephrased() -> list[str]:
    text = Path(shared("decontaminator/data/rephrase/rephrase_gsm8k.jsonl")).read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in text.splitlines()]


def test_gsm8k_verbatim_rephrased_and_train(exam: EvalSet) -> None:
    """Rows dropped of 1,319 verbatim, 1,319 rephrased and 7,473 real training questions, by either rule."""
    found = {}
    sets = {"verbatim": questions("test"), "rephrased": rephrased(), "train": questions("train")}
    for name, texts in sets.items():
        ngram = Decontaminate([exam], coverage_ngram=0, review_above=None)
        coverage = Decontaminate([exam], ngram=0, review_above=None)
        found[name] = [sum(map(bool, reasons(operation, *texts))) for operation in (ngram, coverage)]
    assert found == {"verbatim": [1319, 1319], "rephrased": [0, 1], "train": [4, 3]}


def test_gsm8k_train_with_its_answers() -> None:
    """Compared with worked solutions too, 11 of the 7,473 share 13 words in a row with a test item."""
    items = read_eval_set(Path(shared(GSM8K.format("test"))), [])
    texts = read_eval_set(Path(shared(GSM8K.format("train"))), []).items
    ngram = Decontaminate([items], coverage_ngram=0, review_above=None)
    assert sum(map(bool, reasons(ngram, *texts))) == 11


def test_gsm8k_tfidf_finds_what_was_rephrased(exam: EvalSet) -> None:
    """The nearest item of a rephrased one is its source in 98.6 %: for a reader, not for a drop."""
    nearest = Decontaminate([exam]).nearest(exam, rephrased())
    right = sum(text == item for text, item, _ in nearest)
    assert right / len(nearest) == pytest.approx(0.985, abs=0.005)
    listed = sum(cosine >= 0.6 for _, _, cosine in nearest) / len(nearest)
    assert 0.5 < listed < 0.7


def test_the_reference_table_is_that_of_as_many_training_questions(exam: EvalSet) -> None:
    """Of the first 1,319 training questions, as many as there are test questions, the rules drop 3 and 2 (.23
    and .15 %), whether runs common to many items count or not. With document frequencies of all these texts
    and words of two characters on, TF-IDF finds the source of 1,298 of 1,319 (98.4 %).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    train = questions("train")[: len(exam.items)]
    for common in (10, len(exam.items)):
        ngram = Decontaminate([exam], coverage_ngram=0, common=common, review_above=None)
        coverage = Decontaminate([exam], ngram=0, common=common, review_above=None)
        found = [sum(map(bool, reasons(operation, *train))) for operation in (ngram, coverage)]
        assert found == [3, 2]
    vectoriser = TfidfVectorizer(sublinear_tf=True).fit([*exam.items, *rephrased(), *train])
    cosines = vectoriser.transform(rephrased()) @ vectoriser.transform(exam.items).T
    nearest = cosines.toarray().argmax(axis=1)
    assert sum(int(item) == index for index, item in enumerate(nearest)) == 1298
