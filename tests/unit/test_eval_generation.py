"""Generation, log-probabilities, KL and perplexity on a two-layer model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from eval.batching import length_sorted_batches, pad_rows, token_logprobs
from eval.generation import Generation, InverseTransformSampler, encode_prompt, generate, uniforms_for
from eval.kl import response_logprobs, sequence_kl
from eval.perplexity import encode_conversation, encode_text, perplexity
from posttrain.errors import DataError


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer: Any) -> list[list[int]]:
    questions = [
        "Hi",
        "Where is my order K123? I am Omar.",
        "No.",
        "Can I return the lamp from order K7?",
    ] * 3
    return [encode_prompt(tiny_tokenizer, [{"role": "user", "content": text}]) for text in questions]


def test_padding_sides() -> None:
    ids, mask = pad_rows([[1, 2, 3], [4]], pad_id=0, side="left")
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad_rows([[1, 2, 3], [4]], pad_id=0)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_batches_hold_every_row_once_longest_first() -> None:
    batches = list(length_sorted_batches([3, 9, 1, 9, 5], 2))
    assert batches == [[1, 3], [4, 0], [2]]


def test_inverse_transform_takes_the_token_at_the_quantile() -> None:
    scores = torch.log(torch.tensor([[0.2, 0.5, 0.3]] * 4))
    uniforms = np.array([[0.0], [0.19], [0.21], [0.9999]])
    chosen = InverseTransformSampler(uniforms, 5, 1.0)(torch.zeros(4, 5), scores).argmax(-1)
    assert chosen.tolist() == [0, 0, 1, 2]


def test_inverse_transform_never_takes_an_impossible_token() -> None:
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf")]] * 2)
    chosen = InverseTransformSampler(np.array([[0.0], [1 - 1e-16]]), 0, 1.0)(
        torch.zeros(2, 0), scores
    ).argmax(-1)
    assert chosen.tolist() == [1, 1]


def test_samples_follow_the_tempered_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n, temperature = 20_000, 0.7
    sampler = InverseTransformSampler(np.random.default_rng(0).random((n, 1)), 0, temperature)
    chosen = sampler(torch.zeros(n, 0), logits.repeat(n, 1)).argmax(-1)
    expected = torch.softmax(logits / temperature, -1).numpy() * n
    observed = np.bincount(chosen.numpy(), minlength=4)
    assert stats.chisquare(observed, expected).pvalue > 0.001


def test_uniforms_depend_on_the_row_and_the_seed_only() -> None:
    assert (uniforms_for(3, [7, 1], 5)[0] == uniforms_for(3, [7], 9)[0, :5]).all()
    assert not (uniforms_for(3, [7], 5) == uniforms_for(4, [7], 5)).any()


def test_sampling_does_not_depend_on_the_batch(
    model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    whole = generate(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=64, seed=1)
    single = generate(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=1, seed=1)
    assert [answer.ids for answer in whole] == [answer.ids for answer in single]
    other = generate(model, tiny_tokenizer, prompts, max_new_tokens=12, batch_size=64, seed=2)
    assert [answer.ids for answer in whole] != [answer.ids for answer in other]


def test_equal_prompts_get_different_answers(
    model: Any, tiny_tokenizer: Any, prompts: list[list[int]]
) -> None:
    answers = generate(model, tiny_tokenizer, [prompts[0]] * 6, max_new_tokens=12)
    assert len({tuple(answer.ids) for answer in answers}) == 6


def test_greedy_equals_the_plain_loop(model: Any, tiny_tokenizer: Any, prompts: list[list[int]]) -> None:
    answers = generate(model, tiny_tokenizer, prompts, max_new_tokens=10, temperature=0.0, batch_size=5)
    for prompt, answer in zip(prompts[:4], answers, strict=False):
        ids = list(prompt)
        for _ in range(10):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tiny_tokenizer.eos_token_id:
                break
        assert answer.ids == ids[len(prompt) :]
        assert answer.prompt_ids == prompt


def test_an_answer_ends_at_its_end_token(model: Any, tiny_tokenizer: Any, prompts: list[list[int]]) -> None:
    eos = tiny_tokenizer.eos_token_id
    answers = generate(model, tiny_tokenizer, prompts * 20, max_new_tokens=40, temperature=2.0)
    assert {answer.finished for answer in answers} == {True, False}
    for answer in answers:
        assert answer.finished == (answer.ids[-1] == eos)
        assert eos not in answer.ids[:-1]
        assert answer.finished or len(answer.ids) == 40
        assert "<|im_end|>" not in answer.text


def test_token_logprobs_are_those_of_one_row_alone(model: Any) -> None:
    rows = [[5, 9, 30, 31], [7, 8]]
    ids, mask = pad_rows(rows, pad_id=0)
    with torch.no_grad():
        together = token_logprobs(model, ids, mask, temperature=0.8)
        for b, row in enumerate(rows):
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1] / 0.8
            alone = torch.log_softmax(logits, -1).gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
            assert torch.allclose(together[b, : len(row) - 1], alone, atol=1e-5)
    assert together[1, 1:].tolist() == [0.0, 0.0]


def test_response_logprobs_cover_the_response_only(model: Any) -> None:
    generation = Generation([5, 9, 30], [31, 7], "", False)
    other = Generation([8], [9, 10, 11, 12], "", True)
    found = response_logprobs(model, [generation, other], pad_id=0, batch_size=2)
    assert [len(values) for values in found] == [2, 4]
    with torch.no_grad():
        logits = torch.log_softmax(model(input_ids=torch.tensor([[5, 9, 30, 31, 7]])).logits[0], -1)
    assert found[0].tolist() == pytest.approx([float(logits[2, 31]), float(logits[3, 7])], abs=1e-5)


def test_sequence_kl_by_hand() -> None:
    policy = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])]
    reference = [torch.tensor([-1.5, -1.0]), torch.tensor([-0.5])]
    kl = sequence_kl(policy, reference)
    assert kl["k1"] == pytest.approx([0.5 - 1.0, 0.0])
    assert kl["k3"] == pytest.approx([math.exp(-0.5) - 1 + 0.5 + math.exp(1.0) - 1 - 1.0, 0.0])


def test_both_estimators_agree_with_the_exact_kl() -> None:
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.2, 0.3])
    exact = float((p * (p / q).log()).sum())
    draws = np.random.default_rng(0).choice(3, size=40_000, p=p.numpy() / p.numpy().sum())
    kl = sequence_kl([p.log()[draws]], [q.log()[draws]])
    assert kl["k1"][0] / len(draws) == pytest.approx(exact, abs=0.01)
    assert kl["k3"][0] / len(draws) == pytest.approx(exact, abs=0.005)


def test_a_model_has_no_kl_to_itself(model: Any, tiny_tokenizer: Any, prompts: list[list[int]]) -> None:
    answers = generate(model, tiny_tokenizer, prompts, max_new_tokens=8)
    logprobs = response_logprobs(model, answers, pad_id=tiny_tokenizer.pad_token_id)
    assert sequence_kl(logprobs, logprobs) == {"k1": [0.0] * 12, "k3": [0.0] * 12}


def test_perplexity_is_token_weighted_and_batch_free(model: Any, tiny_tokenizer: Any) -> None:
    rows = [
        encode_text(tiny_tokenizer, text, 64)
        for text in ("Hello Omar, your lamp ships on Monday.", "No. Go.")
    ]
    total, tokens = 0.0, 0
    for row in rows:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.ids])).loss
        total += float(loss) * (len(row.ids) - 1)
        tokens += len(row.ids) - 1
    found = perplexity(model, rows, pad_id=tiny_tokenizer.pad_token_id).as_dict()
    assert found["tokens"] == tokens
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    one_by_one = perplexity(model, rows, pad_id=tiny_tokenizer.pad_token_id, batch_size=1).as_dict()
    assert one_by_one["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity(model: Any, tiny_tokenizer: Any) -> None:
    import copy

    flat = copy.deepcopy(model)
    torch.nn.init.zeros_(flat.lm_head.weight)
    text = "Hello Omar, your lamp ships."
    row = encode_text(tiny_tokenizer, text, 64)
    found = perplexity(flat, [row], pad_id=tiny_tokenizer.pad_token_id).as_dict()
    vocabulary = len(tiny_tokenizer)
    assert found["perplexity"] == pytest.approx(vocabulary, rel=1e-5)
    first = len(tiny_tokenizer.decode(row.ids[:1]))
    bits = (len(row.ids) - 1) * math.log2(vocabulary) / (len(text) - first)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_only_the_assistant_is_scored(tiny_tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You are the support desk."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Goodbye."},
    ]
    row = encode_conversation(tiny_tokenizer, messages, 256)
    scored = [i for i, s in zip(row.ids, row.scored, strict=True) if s]
    assert tiny_tokenizer.decode(scored) == "Hello.<|im_end|>Goodbye.<|im_end|>"
    assert row.text_bytes == len("Hello.<|im_end|>Goodbye.<|im_end|>")
    assert not row.cut


def test_scored_tokens_equal_the_templates_own_marks(tiny_tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "Where is K1?"},
        {"role": "assistant", "content": "It ships, Omar."},
    ] * 2
    marked = tiny_tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    row = encode_conversation(tiny_tokenizer, messages, 256)
    assert row.ids == marked["input_ids"]
    assert [int(s) for s in row.scored] == marked["assistant_masks"]


def test_cut_rows_are_counted(model: Any, tiny_tokenizer: Any) -> None:
    row = encode_text(tiny_tokenizer, "Hello Omar, your lamp in order K123 ships on Monday.", 6)
    assert len(row.ids) == 6
    assert perplexity(model, [row], pad_id=tiny_tokenizer.pad_token_id).as_dict()["rows_cut"] == 1


def test_nothing_to_score_is_an_error(model: Any, tiny_tokenizer: Any) -> None:
    row = encode_conversation(tiny_tokenizer, [{"role": "user", "content": "Hi"}], 64)
    with pytest.raises(DataError, match="none of the 1 rows has a token to score"):
        perplexity(model, [row], pad_id=tiny_tokenizer.pad_token_id)


def test_a_template_that_rewrites_history_is_refused(tiny_tokenizer: Any) -> None:
    import copy

    rewriting = copy.deepcopy(tiny_tokenizer)
    rewriting.chat_template = "{{ messages | length }}" + tiny_tokenizer.chat_template
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    with pytest.raises(DataError, match="before turn 1"):
        encode_conversation(rewriting, messages, 64)
