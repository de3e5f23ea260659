"""Best-of-n arithmetic, selection among scored answers, random numbers of an answer, and refused settings."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from train.ppo.engines.hf import draw
from train.synthesis.best_of_n import expected_best, kl_bound, mean_interval, steps
from train.synthesis.config import ConversationSelection, PreferenceSelection, SynthesizeConfig
from train.synthesis.judge import Judge, filled, read_choice, read_score, win_rates
from train.synthesis.sampling import Nucleus, answer_uniforms
from train.synthesis.selection import Answer, Dropped, Usable, choose_demonstrations, choose_pairs, usable
from train.synthesis.summary import best_of_n_rows

REWARD = {"model": "m", "data": "d", "reward": "r"}
JUDGE = {"base_url": "http://localhost:1/v1", "model": "j", "prompt": "p.txt"}


def answer(sample: int, score: float | None, text: str = "", **fields: object) -> Answer:
    return Answer(sample, text or f"text {sample}", 3, **({"finished": True} | fields), score=score)


def answers(*scores: float | None) -> list[Answer]:
    return [answer(index, score) for index, score in enumerate(scores)]


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (2, math.log(2) - 0.5), (16, math.log(16) - 15 / 16)])
def test_the_kl_bound_is_that_of_the_papers(n, kl):
    assert kl_bound(n) == pytest.approx(kl)


@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.5, 0.9, 0.1], [1.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0]])
def test_the_expected_best_is_the_mean_over_all_draws(scores):
    for k in range(1, len(scores) + 1):
        draws = [max(one) for one in combinations(scores, k)]
        assert expected_best(scores, k) == pytest.approx(np.mean(draws))


def test_a_watched_score_follows_the_answers_that_the_other_one_selects():
    """Of equal scores each is as likely: averaged over both ways to break the tie."""
    scores, watched = [1.0, 2.0, 2.0, 0.0], [0.5, -1.0, 3.0, 9.0]
    for k in range(1, 5):
        expected = []
        for lift in ((0, 1e-9), (1e-9, 0)):
            broken = [1.0, 2.0 + lift[0], 2.0 + lift[1], 0.0]
            expected += [watched[max(one, key=broken.__getitem__)] for one in combinations(range(4), k)]
        assert expected_best(scores, k, watched) == pytest.approx(np.mean(expected))


def test_best_of_n_is_unbiased():
    """Best of 2 from 6 samples, over many prompts, is best of 2 from 2 samples: 1 / sqrt(pi) for normals."""
    rng = np.random.default_rng(0)
    mean, half = mean_interval([expected_best(row.tolist(), 2) for row in rng.normal(size=(4000, 6))])
    assert half is not None
    assert abs(mean - 1 / math.sqrt(math.pi)) < half < 0.03


def test_the_table_counts_a_prompt_for_every_n_it_has_answers_for():
    groups = [
        [answer(0, 1.0, parts={"gold": 0.5}), answer(1, 3.0, parts={"gold": 0.1})],
        [answer(0, 2.0, parts={"gold": 1.0})],
        [],
    ]
    assert steps(6) == [1, 2, 4, 6]
    assert steps(1) == [1]
    one, two = best_of_n_rows(groups, ["gold"])
    assert (one["n"], one["score"], one["prompts"], one["kl_bound"]) == (1, 2.0, 2, 0.0)
    assert (two["n"], two["score"], two["prompts"], two["half_width_95"]) == (2, 3.0, 1, None)
    assert one["parts"]["gold"] == pytest.approx((0.3 + 1.0) / 2)
    assert two["parts"]["gold"] == pytest.approx(0.1)


def test_usable_answers_are_finished_scored_and_distinct_best_first():
    given = [
        answer(0, 1.0, "same  words"),
        answer(1, 9.0, finished=False),
        answer(2, 1.0, "same words\n"),
        answer(3, None, unscored="no_opinion"),
        answer(4, 4.0, " \n"),
        answer(5, 2.0),
        answer(6, 2.0),
    ]
    found = usable(given, truncated="drop")
    assert [one.sample for one in found.answers] == [5, 6, 0]
    assert found.left_out == {"truncated": 1, "duplicate": 1, "no_opinion": 1, "blank": 1}
    marked = usable(given, truncated="mark")
    assert [one.sample for one in marked.answers] == [1, 5, 6, 0]
    assert "truncated" not in marked.left_out


def pairs(found: Usable, **settings: object) -> list[tuple[int, int]] | str:
    chosen = choose_pairs(found, PreferenceSelection(**settings), 0, "train/a")
    return (
        chosen.reason
        if isinstance(chosen, Dropped)
        else [(one.sample, other.sample) for one, other in chosen]
    )


def test_pairs_of_best_and_worst_and_of_all():
    found = usable(answers(0.0, 3.0, 1.0, 3.0), truncated="drop")
    assert pairs(found) == [(1, 0)]
    everything = [(1, 2), (1, 0), (3, 2), (3, 0), (2, 0)]
    assert pairs(found, pairs="all_ranked") == everything
    assert pairs(found, pairs="all_ranked", min_margin=2.0) == [(1, 2), (1, 0), (3, 2), (3, 0)]


def test_the_random_partner_scores_less_and_is_a_function_of_the_prompt():
    found = usable(answers(0.0, 3.0, 1.0, 3.0, 2.5), truncated="drop")
    setting = PreferenceSelection(pairs="best_random", min_margin=1.0)
    drawn = {choose_pairs(found, setting, 0, f"train/{name}")[0][1].sample for name in range(40)}
    assert drawn == {0, 2}
    assert pairs(found, pairs="best_random") == pairs(found, pairs="best_random")


@pytest.mark.parametrize(
    ("given", "settings", "reason"),
    [
        (answers(2.0, 2.0, 2.0), {}, "all_tied"),
        (answers(2.0, 2.4), {"min_margin": 0.5}, "below_min_margin"),
        ([answer(0, 1.0, "a"), answer(1, 1.0, "a")], {}, "answers_identical"),
        ([answer(0, 1.0), answer(1, 2.0, finished=False)], {}, "too_few_answers"),
        ([], {}, "too_few_answers"),
    ],
)
@pytest.mark.parametrize("how", ["best_worst", "best_random", "all_ranked"])
def test_a_prompt_that_gives_no_pair_has_a_reason(given, settings, reason, how):
    assert pairs(usable(given, truncated="drop"), pairs=how, **settings) == reason


def test_demonstrations_are_the_best_that_are_good_enough():
    found = usable(answers(0.5, 3.0, 1.0), truncated="drop")

    def chosen(**settings: object) -> list[int] | str:
        kept = choose_demonstrations(found, ConversationSelection(**settings))
        return kept.reason if isinstance(kept, Dropped) else [one.sample for one in kept]

    assert chosen() == [1]
    assert chosen(top_k=5) == [1, 2, 0]
    assert chosen(top_k=5, min_score=1.0) == [1, 2]
    assert chosen(min_score=3.5) == "below_min_score"
    assert (
        choose_demonstrations(Usable([], found.left_out), ConversationSelection()).reason == "too_few_answers"
    )


def test_the_random_numbers_of_an_answer_are_its_own():
    ten, twenty = (answer_uniforms(7, "train/a", 3, count) for count in (10, 20))
    assert (twenty[:10] == ten).all()
    others = [(7, "train/a", 2), (7, "eval/a", 3), (8, "train/a", 3)]
    assert not any((answer_uniforms(*other, 10) == ten).any() for other in others)


def test_top_p_samples_from_the_nucleus_with_its_own_proportions():
    """Probabilities 0.5, 0.3, 0.15, 0.05 at temperature 2: the nucleus of 0.7 is the first two."""
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05])

    class Fixed(nn.Module):
        def forward(self, input_ids):
            return SimpleNamespace(logits=(2 * wanted.log()).expand(len(input_ids), 1, 4))

    policy = Nucleus(Fixed(), temperature=2.0, top_p=0.7)
    logits = policy(input_ids=torch.zeros(4000, 1, dtype=torch.long)).logits[:, -1]
    uniforms = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn, _ = draw(logits, uniforms, 2.0)
    share = torch.bincount(drawn, minlength=4) / 4000
    assert share[2:].tolist() == [0.0, 0.0]
    assert share[0].item() == pytest.approx(0.5 / 0.8, abs=0.03)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "m", "data": "d"}, "nothing is rewarded"),
        ({"reward": "r"}, "model and data missing"),
        ({**REWARD, "judge": JUDGE}, "scores in place of `reward`"),
        ({**REWARD, "rewards": {"normalise": "scale"}}, "a running scale"),
        ({**REWARD, "n": 1}, "a pair needs two answers"),
        ({**REWARD, "conversation": {"top_k": 2}}, "belongs to kind conversation"),
        ({"answers": "runs/a", "n": 4, "model": "m"}, "so model, n would change nothing"),
        ({**REWARD, "top_p": 0.9, "rollout": {"engine": "continuous"}}, "use engine hf"),
        ({**REWARD, "judge": {**JUDGE, "base_url": "http://key:secret@host/v1"}}, "base_url"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        SynthesizeConfig(kind="preference", **fields)


def test_verdicts_are_read_from_double_brackets():
    assert read_score("At first [[3]], but overall: [[ 7.5 ]]") == 7.5
    assert [read_score(text) for text in ("7", "[[11]]", "[[0]]", "[[good]]", "")] == [None] * 5
    assert [read_choice(f"so [[{name}]]") for name in "ABC"] == [1.0, 0.0, 0.5]
    assert read_choice("[A] is better") is None


def test_braces_in_an_answer_are_not_filled_in():
    assert (
        filled("{prompt} / {answer}", prompt="say {answer}", answer="{prompt}") == "say {answer} / {prompt}"
    )


def test_win_rates_cancel_a_preference_for_the_first_place():
    always_first = [(a, b, 1.0) for a, b in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1))]
    assert [score for score, _, _ in win_rates(3, always_first)] == [0.5] * 3
    honest = [(0, 1, 1.0), (1, 0, 0.0), (0, 2, 0.5), (2, 0, 0.5), (1, 2, None), (2, 1, 1.0)]
    assert [score for score, _, _ in win_rates(3, honest)] == [0.75, 0.0, 0.5]
    assert win_rates(2, [(0, 1, None), (1, 0, 1.0)]) == [(None, "judge_without_verdict", {})] * 2


def test_a_judge_without_its_key_is_an_error_that_names_the_variable(tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("Rate {answer} to {prompt}", encoding="utf-8")
    settings = {**JUDGE, "prompt": str(file), "api_key_env": "NO_SUCH_KEY"}
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = SynthesizeConfig(kind="preference", model="m", data="d", judge=settings).judge
    with pytest.raises(ValueError, match="the environment variable NO_SUCH_KEY is not set"):
        Judge(config, file, 2, unfinished=False)
