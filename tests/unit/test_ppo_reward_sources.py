"""Penalties, functions, ensembles, running moments and their sum, by hand arithmetic."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from data_prep.tiny import rubric
from posttrain.errors import DataError, UserError
from train.ppo.reward_config import LengthPenalty, RepetitionPenalty, RewardFunctionConfig, RewardsConfig
from train.ppo.reward_functions import FunctionReward
from train.ppo.reward_mix import Rewards, RunningMoments, build_rewards, combine_ensemble
from train.ppo.reward_sources import (
    LengthPenaltySource,
    RepetitionPenaltySource,
    RewardBatch,
    excess_tokens,
    repeated_share,
    without,
)

ROWS = Dataset.from_list(
    [
        {
            "id": f"p{i}",
            "meta": json.dumps({"n": i}),
            "prompt": [{"role": "user", "content": f"question {i}"}],
        }
        for i in range(4)
    ]
)
FUNCTIONS = """
import math
CALLS = []

def everything(**keywords):
    CALLS.append(keywords)
    return [1] * len(keywords["completions"])

def words(completions, factor=1.0):
    return [factor * len(text.split()) for text in completions]

def some(completion_ids, finished):
    return [float(len(ids)) if ended else None for ids, ended in zip(completion_ids, finished)]

def needs_answer(completions, answer):
    return [0.0 for _ in completions]

def positional(*completions):
    return [0.0]

def too_few(completions): return [1.0]
def a_number(completions): return 1.0
def texts(completions): return ["good" for _ in completions]
def not_finite(completions): return [math.nan for _ in completions]
def truths(completions): return [text == "no" for text in completions]
"""


class Fixed:
    """A source with scores known beforehand."""

    def __init__(self, name: str, *batches: list[float], weight: float = 1.0) -> None:
        self.name, self.weight, self.batches = name, weight, iter(batches)

    def __call__(self, batch: RewardBatch) -> Tensor:
        return torch.tensor(next(self.batches))


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "reward_functions_here.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "reward_functions_here", raising=False)
    return "reward_functions_here"


@pytest.fixture
def make(functions: str, tiny_tokenizer: Any) -> Callable[..., FunctionReward]:
    def build(function: str, /, **fields: Any) -> FunctionReward:
        config = RewardFunctionConfig(function=f"{functions}:{function}", **fields)
        return FunctionReward(config, 2, tiny_tokenizer, ROWS)

    return build


@pytest.fixture
def batch(tiny_tokenizer: Any) -> RewardBatch:
    texts = ["a kettle", "no", "we refund it"]
    finished = [True, False, True]
    end = [tiny_tokenizer.eos_token_id]
    responses = [
        tiny_tokenizer(text)["input_ids"] + end * ended for text, ended in zip(texts, finished, strict=True)
    ]
    return RewardBatch([[5, 6]] * 3, responses, finished, [3, 0, 3])


def responses_only(*responses: list[int]) -> RewardBatch:
    count = len(responses)
    return RewardBatch([[1]] * count, list(responses), [True] * count, [0] * count)


def test_length_penalty_charges_the_tokens_beyond_the_free_ones() -> None:
    responses = [[7] * 3, [7] * 4, [7] * 9]
    assert excess_tokens(responses, 4).tolist() == [0.0, 0.0, 5.0]
    source = LengthPenaltySource(LengthPenalty(per_token=0.25, free_tokens=4))
    assert source(responses_only(*responses)).tolist() == [0.0, 0.0, -1.25]


@pytest.mark.parametrize(
    ("response", "ngram", "share"),
    [
        ([1, 2, 3, 4], 1, 0.0),
        ([1, 2, 1, 1], 1, 2 / 4),
        ([1, 2, 1, 2, 1], 2, 2 / 4),  # 12 21 12 21
        ([1, 2, 1, 2, 1], 3, 1 / 3),  # 121 212 121
        ([5, 5, 5, 5, 5], 2, 3 / 4),
        ([5, 5], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_repeated_share_counts_ngrams_said_before(response: list[int], ngram: int, share: float) -> None:
    assert repeated_share(response, ngram) == pytest.approx(share)


def test_repetition_penalty_is_minus_the_share_and_carries_its_weight() -> None:
    source = RepetitionPenaltySource(RepetitionPenalty(ngram=1, weight=3.0))
    assert source(responses_only([1, 1, 1, 2], [1, 2])).tolist() == [-0.5, 0.0]
    assert source.weight == 3.0


def test_spelled_out_special_tokens_are_taken_out_however_they_are_nested() -> None:
    assert without("a<|end|>b<|start|>", ["<|end|>", "<|start|>"]) == "ab"
    assert without("a<|e<|end|>nd|>", ["<|end|>"]) == "a"


def test_a_function_that_takes_everything_gets_it_in_the_order_of_the_batch(
    make: Callable[..., FunctionReward], batch: RewardBatch
) -> None:
    source = make("everything", arguments={"scale": 2})
    assert source(batch).tolist() == [1.0, 1.0, 1.0]
    keywords = source.function.__globals__["CALLS"][-1]
    assert keywords == {
        "prompts": [ROWS[i]["prompt"] for i in (3, 0, 3)],
        "prompt": [ROWS[i]["prompt"] for i in (3, 0, 3)],
        "completions": ["a kettle", "no", "we refund it"],
        "completion_ids": batch.responses,
        "finished": [True, False, True],
        "id": ["p3", "p0", "p3"],
        "meta": ['{"n": 3}', '{"n": 0}', '{"n": 3}'],
        "scale": 2,
    }


def test_a_function_gets_only_what_it_names(make: Callable[..., FunctionReward], batch: RewardBatch) -> None:
    source = make("words", arguments={"factor": 0.5}, name="wordy", weight=0.0)
    assert source(batch).tolist() == [1.0, 0.5, 1.5]
    assert (source.name, source.weight) == ("wordy", 0.0)
    assert make("truths")(batch).tolist() == [0.0, 1.0, 0.0]


def test_none_is_no_opinion(make: Callable[..., FunctionReward], batch: RewardBatch) -> None:
    scores = make("some")(batch).tolist()
    assert math.isnan(scores[1])
    assert (scores[0], scores[2]) == (len(batch.responses[0]), len(batch.responses[2]))


@pytest.mark.parametrize(
    ("name", "returned"),
    [
        ("too_few", r"returned 1 scores \(\[1.0\]\); it was given 3 responses"),
        ("a_number", r"returned a float \(1.0\)"),
        ("texts", r"returned 'good' \(str\) for response 0"),
        ("not_finite", r"returned nan \(float\) for response 0"),
    ],
)
def test_what_is_not_a_score_for_each_response_is_refused(
    make: Callable[..., FunctionReward], batch: RewardBatch, name: str, returned: str
) -> None:
    with pytest.raises(UserError, match=rf"reward function {name} \(.*:{name}\) {returned}"):
        make(name)(batch)


def test_signatures_are_checked_before_anything_is_scored(make: Callable[..., FunctionReward]) -> None:
    with pytest.raises(UserError, match=r"rewards.functions.2.function: .*:needs_answer needs answer"):
        make("needs_answer")
    assert make("needs_answer", arguments={"answer": 4}).accepted == {"completions", "answer"}
    with pytest.raises(UserError, match=r"rewards.functions.2.arguments: .*:words takes no facter"):
        make("words", arguments={"facter": 2.0})
    with pytest.raises(UserError, match=r"rewards.functions.2.arguments: meta is given to every"):
        make("everything", arguments={"meta": 1})
    with pytest.raises(UserError, match=r"rewards.functions.2.function"):
        make("nowhere")


def test_gold_as_a_reward_function(tiny_tokenizer: Any) -> None:
    facts = {
        "intent": "refund",
        "name": "Maria Lopez",
        "first": "Maria",
        "code": "K154",
        "product": "kettle",
        "due": "9 May",
        "amount": "$45",
        "city": "Oslo",
        "others": [],
    }
    good = "Hello Maria, your refund of $45 for the kettle, order K154, is on its way. Thank you."
    prompt = [{"role": "user", "content": "Where is it?"}]
    rows = Dataset.from_list([{"id": "a", "meta": json.dumps({"facts": facts}), "prompt": prompt}])
    config = RewardFunctionConfig(function="data_prep.tiny.rubric:reward", weight=0.0)
    source = FunctionReward(config, 0, tiny_tokenizer, rows)
    ids = tiny_tokenizer(good)["input_ids"]
    batch = RewardBatch([[5]] * 2, [[*ids, tiny_tokenizer.eos_token_id], ids], [True, False], [0, 0])
    assert source(batch).tolist() == pytest.approx([1.0, 0.9])
    with pytest.raises(DataError, match="needs `facts` in the meta"):
        rubric.reward([good], ["{}"], [True])


def test_ensembles_by_hand() -> None:
    scores = torch.tensor([[1.0, 4.0], [3.0, 4.0], [5.0, -2.0]])
    assert combine_ensemble(scores, "mean", 1.0).tolist() == [3.0, 2.0]
    assert combine_ensemble(scores, "min", 1.0).tolist() == [1.0, -2.0]
    # Deviations -2, 0, 2 and 2, 2, -4: variances 8/3 and 24/3.
    expected = [3 - 0.5 * math.sqrt(8 / 3), 2 - 0.5 * math.sqrt(8)]
    assert combine_ensemble(scores, "mean_minus_std", 0.5).tolist() == pytest.approx(expected)


def test_running_moments_are_those_of_all_scores_so_far() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]))
    assert (moments.count, moments.mean, moments.std) == (2, 2.0, 1.0)
    moments.update(torch.tensor([5.0, 7.0, 9.0]))
    # 1 3 5 7 9: mean 5, squared deviations 16 + 4 + 0 + 4 + 16.
    assert (moments.count, moments.mean, moments.squares) == pytest.approx((5, 5.0, 40.0))
    assert moments.std == pytest.approx(math.sqrt(8))


def test_running_moments_hold_with_a_large_mean() -> None:
    moments = RunningMoments()
    for start in range(0, 512, 64):
        moments.update(torch.arange(start, start + 64).float() + 1e5)
    assert moments.mean == pytest.approx(1e5 + 255.5)
    assert moments.std == pytest.approx(math.sqrt((512**2 - 1) / 12), rel=1e-6)


def test_running_moments_take_in_the_shares_of_all_processes() -> None:
    """`reduce` stands for the sum over ranks; the other rank holds 5, 7 and 9."""
    others = iter([torch.tensor([21.0, 3.0]), torch.tensor(0.0 + 4.0 + 16.0), torch.tensor(3.0)])
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, 3.0]), lambda total: total + next(others))
    assert (moments.count, moments.mean, moments.squares) == pytest.approx((5, 5.0, 40.0))


def test_scores_that_do_not_differ_are_divided_by_nothing() -> None:
    moments = RunningMoments()
    moments.update(torch.full((7,), 0.1))
    assert moments.normalise(torch.tensor([0.1, 2.0]), "scale").tolist() == pytest.approx([0.1, 2.0])


def test_the_total_is_the_weighted_sum_of_what_has_a_weight() -> None:
    config = RewardsConfig(model_weight=2.0)
    sources = [Fixed("a", [1.0, 2.0], weight=0.5), Fixed("gold", [100.0, math.inf], weight=0.0)]
    rewards = Rewards(config, [Fixed("model.reward", [3.0, -1.0])], sources, "cpu")
    result = rewards(responses_only([1], [2]))
    assert result.total_B.tolist() == [6.5, -1.0]
    assert {name: part.tolist() for name, part in result.parts.items()} == {
        "model": [3.0, -1.0],
        "a": [1.0, 2.0],
        "gold": [100.0, math.inf],
    }


def test_rewards_need_no_model() -> None:
    rewards = Rewards(RewardsConfig(), [], [Fixed("a", [1.0, 2.0])], "cpu")
    result = rewards(responses_only([1], [2]))
    assert (result.total_B.tolist(), list(result.parts)) == ([1.0, 2.0], ["a"])


def test_a_model_score_that_is_not_finite_is_not_hidden() -> None:
    rewards = Rewards(RewardsConfig(), [Fixed("model.reward", [math.nan, 1.0])], [], "cpu")
    assert rewards(responses_only([1], [2])).total_B.isnan().tolist() == [True, False]


def test_no_opinion_counts_nothing_and_is_counted(
    functions: str, tiny_tokenizer: Any, batch: RewardBatch
) -> None:
    config = RewardsConfig(
        functions=[{"function": f"{functions}:some", "weight": 2.0}],
        length_penalty={"per_token": 1.0},
        repetition_penalty={"ngram": 1, "weight": 4.0},
    )
    rewards = build_rewards(config, [], [], tiny_tokenizer, ROWS, max_tokens=64, device="cpu")
    result = rewards(batch)
    lengths = [float(len(response)) for response in batch.responses]
    shares = [repeated_share(response, 1) for response in batch.responses]
    assert max(shares) > 0
    assert list(result.parts) == ["some.no_opinion", "some", "length_penalty", "repetition_penalty"]
    assert result.parts["some.no_opinion"].tolist() == [0.0, 1.0, 0.0]
    assert result.parts["some"].tolist() == [lengths[0], 0.0, lengths[2]]
    expected = [lengths[0] - 4 * shares[0], -lengths[1] - 4 * shares[1], lengths[2] - 4 * shares[2]]
    assert result.total_B.tolist() == pytest.approx(expected)


def test_members_are_normalised_by_their_own_moments_before_they_are_combined() -> None:
    """Two models that agree, one on a scale of a hundred: standardised, they say the same."""
    config = RewardsConfig(ensemble={"models": ["other"], "combine": "min"}, normalise="standardise")
    members = [Fixed("model.reward", [1.0, 3.0], [5.0]), Fixed("model.ensemble.0", [100.0, 300.0], [800.0])]
    rewards = Rewards(config, members, [], "cpu")
    first = rewards(responses_only([1], [2]))
    assert first.total_B.tolist() == [-1.0, 1.0]
    assert first.parts["model"].tolist() == [1.0, 3.0]
    assert first.parts["model.ensemble.0"].tolist() == [100.0, 300.0]
    assert first.parts["model.normalised"].tolist() == [-1.0, 1.0]
    assert first.parts["model.spread"].tolist() == [0.0, 0.0]
    # 1 3 5: (5 - 3) / sqrt(8/3). 100 300 800: (800 - 400) / sqrt((9 + 1 + 16) / 3 * 10^4).
    one, other = 2 / math.sqrt(8 / 3), 4 / math.sqrt(26 / 3)
    second = rewards(responses_only([1]))
    assert second.total_B.tolist() == pytest.approx([min(one, other)])
    assert second.parts["model.spread"].tolist() == pytest.approx([abs(one - other) / 2])


def test_scale_keeps_the_mean_in() -> None:
    rewards = Rewards(RewardsConfig(normalise="scale"), [Fixed("model.reward", [2.0, 6.0])], [], "cpu")
    assert rewards(responses_only([1], [2])).total_B.tolist() == [1.0, 3.0]


def test_resumed_normalisation_goes_on_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, generator=generator).tolist() for _ in range(6)]

    def rewards_over(chosen: list[list[float]]) -> Rewards:
        return Rewards(RewardsConfig(normalise="standardise"), [Fixed("model.reward", *chosen)], [], "cpu")

    whole, first, second = rewards_over(batches), rewards_over(batches[:3]), rewards_over(batches[3:])
    five = responses_only(*([1] for _ in range(5)))
    expected = [whole(five).total_B for _ in batches]
    for _ in range(3):
        first(five)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(torch.equal(second(five).total_B, total) for total in expected[3:])
    assert second.state_dict() == whole.state_dict()
