"""Shingles against plain Python sets, MinHash against exact Jaccard; nothing unlike is called alike."""

from __future__ import annotations

import random
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dedup import normalise
from data_prep.minhash import MinHashSettings, sign
from data_prep.near_duplicates import UnionFind, find_near_duplicates
from data_prep.shingles import jaccard, shingle

WORDS = (
    "order kettle refund where is my the a ships café straße naïve k12 x слово 漢字 𠀀 สวัสดี かな한글".split()
)
texts = st.lists(
    st.lists(st.sampled_from([*WORDS, "...", "-", "!?", "“", "—", "。", "😀"]), max_size=12).map(" ".join)
    | st.text("aB1 .漢字か𠀀ส한é–、😀ﬁ\x85\u1680\u2003\u2028\t\x1f", max_size=20),
    min_size=1,
    max_size=8,
)
ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
ALONE += "\U00020000-\U0003ffff"
MARKS = "\u1680\u2000-\u206f\u3000-\u303f"


def plain(text: str, n: int) -> set[tuple[str, ...]]:
    """Word shingles by the definition: words are runs of ASCII letters, digits and all else above 127 that is
    no punctuation; characters of scripts without spaces are words.
    """
    words = re.findall(rf"[{ALONE}]|(?:(?![{ALONE}{MARKS}])[a-z0-9\x80-\U0010ffff])+", normalise(text))
    if not words:
        return set()
    return {tuple(words[at : at + n]) for at in range(max(len(words) - n, 0) + 1)}


@given(texts, st.integers(1, 4))
def test_hashes_are_the_sets_of_the_definition(batch: list[str], n: int) -> None:
    shingles = shingle(batch, n)
    sets = [plain(text, n) for text in batch]
    assert [len(shingles.of(index)) for index in range(len(batch))] == [len(each) for each in sets]
    for left, right in combinations(range(len(batch)), 2):
        union = sets[left] | sets[right]
        expected = len(sets[left] & sets[right]) / len(union) if union else 1.0
        assert jaccard(shingles.of(left), shingles.of(right)) == expected


@given(texts)
def test_a_text_has_the_same_hashes_in_any_batch(batch: list[str]) -> None:
    together = shingle(batch)
    for index, text in enumerate(batch):
        assert together.of(index).tolist() == shingle([text]).of(0).tolist()


def sentences(count: int, rng: random.Random, length: int = 40) -> list[str]:
    vocabulary = [f"w{number}" for number in range(400)]
    return [" ".join(rng.choices(vocabulary, k=length)) for _ in range(count)]


def edited(text: str, rng: random.Random, changes: int) -> str:
    words = text.split()
    for _ in range(changes):
        words[rng.randrange(len(words))] = "changed"
    return " ".join(words)


def test_signatures_agree_as_often_as_the_sets_overlap() -> None:
    rng = random.Random(0)
    settings = MinHashSettings(bands=64, rows=8)
    for changes in (1, 3, 6):
        first = sentences(30, rng)
        second = [edited(text, rng, changes) for text in first]
        left, right = sign(first, settings), sign(second, settings)
        agreement = (left == right).mean()
        exact = np.mean(
            [jaccard(shingle([a]).of(0), shingle([b]).of(0)) for a, b in zip(first, second, strict=True)]
        )
        # 30 x 512 values: three standard errors of a share are at most 0.0121.
        assert agreement == pytest.approx(exact, abs=0.02)


def test_clusters_are_found_and_only_they() -> None:
    rng = random.Random(1)
    originals = sentences(300, rng)
    copies = [edited(text, rng, 1) for text in originals[:100]]
    everything = originals + copies + [originals[0].upper() + "!"]
    found = find_near_duplicates(everything)
    assert found.cluster[:300].tolist() == list(range(300))
    close = [
        index
        for index in range(100)
        if jaccard(shingle([originals[index]]).of(0), shingle([copies[index]]).of(0)) >= 0.7
    ]
    assert len(close) == 100
    hits = sum(found.cluster[300 + index] == index for index in close)
    assert hits >= 98
    assert found.cluster[400] == 0
    for left, right, similarity in found.pairs:
        exact = jaccard(shingle([everything[left]]).of(0), shingle([everything[right]]).of(0))
        assert similarity == exact >= 0.7


def test_texts_without_spaces_are_compared_by_characters() -> None:
    """One edited Chinese sentence is a near-duplicate, another one is not; as one word neither would be."""
    text = "我想知道我的订单什么时候可以送到上海，因为我下个星期要出门旅行，家里没有人可以签收。"
    other = "请问这个电水壶的保修期是多长时间，如果坏了我应该去哪里修理，需要带上发票和包装盒吗？"
    found = find_near_duplicates([text, other, text.replace("上海", "北京"), text.replace("，", " ")])
    assert found.cluster.tolist() == [0, 1, 0, 0]


def test_order_decides_which_text_leads() -> None:
    text = "one two three four five six seven eight"
    found = find_near_duplicates(["another text that stands alone here", text, text, text + " nine"])
    assert found.cluster.tolist() == [0, 1, 1, 1]


def test_texts_without_words_are_nobodys_duplicates() -> None:
    assert find_near_duplicates(["", "...", "", "!"]).cluster.tolist() == [0, 1, 2, 3]
    assert find_near_duplicates([]).cluster.tolist() == []


def test_a_crowded_bucket_of_unlike_texts_stays_linear() -> None:
    """Texts that share one long beginning fill a bucket; each is compared with a bounded number of others."""
    rng = random.Random(2)
    head = sentences(1, rng, 60)[0]
    crowd = [f"{head} {tail}" for tail in sentences(400, rng, 60)]
    found = find_near_duplicates(crowd, MinHashSettings(bands=8, rows=1))
    assert found.candidates <= 8 * 32 * len(crowd)
    assert found.cluster.tolist() == list(range(400))


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"threshold": 1.1}, {"bands": 0}, {"words": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="threshold must be in"):
        find_near_duplicates(["a b c"], MinHashSettings(**wrong))  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_the_smallest_member_is_the_root(joined: list[tuple[int, int]]) -> None:
    union = UnionFind(20)
    sets = [{item} for item in range(20)]
    for left, right in joined:
        union.join(left, right)
        merged = sets[left] | sets[right]
        for item in merged:
            sets[item] = merged
    assert union.roots().tolist() == [min(each) for each in sets]
