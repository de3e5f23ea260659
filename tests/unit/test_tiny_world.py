"""The support-desk generator and its gold rubric."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from data_prep.tiny import lexicon, rubric, world

FACTS = {
    "intent": "refund",
    "name": "Maria Lopez",
    "first": "Maria",
    "code": "K154",
    "product": "kettle",
    "due": "9 May",
    "amount": "$45",
    "city": "Oslo",
    "others": [{"name": "John Kim", "code": "B228"}],
}
GOOD = (
    "Hello Maria, your refund of $45 for the kettle, order K154, is on its way. Thank you for your patience."
)


def parts(response: str, finished: bool = True) -> dict[str, float]:
    return rubric.score(response, FACTS, finished).parts


def test_a_perfect_answer_scores_one():
    scored = rubric.score(GOOD, FACTS, True)
    assert scored.total == pytest.approx(1.0)
    assert set(scored.parts) == set(rubric.WEIGHTS)
    assert sum(rubric.WEIGHTS.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("response", "part", "expected"),
    [
        (GOOD.replace("$45", "$48"), "answers", 0.0),
        (GOOD.replace("refund", "parcel"), "answers", 0.0),
        (GOOD.replace("K154", "B228"), "ids", 0.0),
        (GOOD.replace(", order K154,", ""), "ids", 2 / 3),
        (GOOD.replace("kettle", "lamp").replace("Maria", "Omar"), "ids", 1 / 3),
        ("Ugh, Maria, your refund of $45 for the kettle, order K154, is on its way.", "polite", 0.0),
        (GOOD + " Do not write again.", "polite", 0.0),
        ("Maria, the refund of $45 for order K154 and your kettle is on its way.", "polite", 0.0),
        (GOOD + " Every parcel has a story." * 4, "concise", 0.0),
        (GOOD.removesuffix("."), "ends", 0.0),
        (GOOD + " John Kim has order B228 with us.", "private", 0.0),
        (GOOD + " Best to Mr Tanaka.", "private", 0.0),
    ],
)
def test_each_defect_costs_its_part_and_nothing_is_free(response, part, expected):
    assert parts(response)[part] == pytest.approx(expected)
    assert parts(GOOD)[part] == 1.0


def test_an_answer_that_never_ends_does_not_end_properly():
    assert parts(GOOD, finished=False)["ends"] == 0.0
    assert rubric.score(GOOD, FACTS, False).total == pytest.approx(0.9)


def test_words_that_hold_a_marker_are_not_that_marker():
    assert parts("Maria, this is high enough, though: refund $45, kettle, K154.")["polite"] == 0.0
    assert parts(GOOD.replace("is on its way", "was brought through"))["polite"] == 1.0


def test_an_empty_answer_earns_nothing():
    assert rubric.score("", FACTS, False).total == 0.0


def test_every_clean_answer_is_perfect_and_mixed_ones_are_not():
    clean = [json.loads(r.meta)["gold"] for r in world.generate("conversation", 1500, 3, quality="clean")]
    assert min(clean) == pytest.approx(1.0)
    mixed = [json.loads(r.meta) for r in world.generate("conversation", 1500, 3, quality="mixed")]
    assert 0.6 < sum(row["gold"] for row in mixed) / len(mixed) < 0.9
    assert Counter(defect for row in mixed for defect in row["defects"]).keys() == set(world.DEFECTS)
    for row in mixed:
        if not row["defects"]:
            assert row["gold"] == pytest.approx(1.0)


def test_pairs_are_labelled_by_the_rubric_but_for_the_noise():
    pairs = [json.loads(r.meta) for r in world.generate("preference", 2000, 4, label_noise=0.1)]
    flipped = sum(row["flipped"] for row in pairs) / len(pairs)
    assert 0.08 < flipped < 0.12
    assert min(abs(row["gold_chosen"] - row["gold_rejected"]) for row in pairs) >= 0.1
    assert all((row["gold_chosen"] < row["gold_rejected"]) == row["flipped"] for row in pairs)


def test_the_seed_decides_everything():
    first, again, other = (list(world.generate("conversation", 50, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_group_names_only_its_own_customers():
    groups: dict[str, set[str]] = {}
    for record in world.generate("prompt", 3000, 5):
        facts = json.loads(record.meta)["facts"]
        groups.setdefault(record.group, set()).update(
            [facts["name"], *(other["name"] for other in facts["others"])]
        )
    names = [name for group in groups.values() for name in group]
    assert len(names) == len(set(names)) > 1000


def test_dialogues_are_many():
    texts = {r.messages[-1].content for r in world.generate("conversation", 3000, 6)}
    assert len(texts) > 2900
    turns = Counter(len(r.prompt) for r in world.generate("prompt", 2000, 6))
    assert turns.keys() == {2, 4}
    assert 0.2 < turns[4] / 2000 < 0.3
    assert len(lexicon.ORDER_CODES) == len(set(lexicon.ORDER_CODES)) == 240


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("letter", {}, "letter"),
        ("conversation", {"quality": "perfect"}, "options.quality"),
        ("preference", {"label_noise": 1.5}, "options.label_noise"),
        ("preference", {"min_gap": 0.9}, "options.min_gap"),
    ],
)
def test_wrong_options_name_themselves(kind, options, named):
    with pytest.raises(ValueError, match=named):
        next(world.generate(kind, 1, 0, **options))
