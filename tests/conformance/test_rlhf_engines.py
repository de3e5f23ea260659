"""Every rollout engine that runs here samples from the policy it is given, and leaves it as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, TaskType, get_peft_model
from ppo_tiny import EOS, LORA, PAD, VOCABULARY, causal_lm, prompts
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from posttrain.errors import PosttrainError, UserError
from train.adapters import lora_config
from train.peft_config import PeftSettings
from train.ppo.engines.base import Samples, SamplingParams
from train.ppo.engines.build import build_engine
from train.ppo.engines.config import ContinuousSettings, RolloutConfig
from train.ppo.engines.continuous import ContinuousEngine
from train.ppo.engines.hf import HfSampler
from train.ppo.rollout import episode_uniforms

LENGTH = 12


def paged(temperature: float = 1.0, max_rows: int = 64, **settings: Any) -> ContinuousEngine:
    return ContinuousEngine(
        SamplingParams(LENGTH, temperature), EOS, PAD, ContinuousSettings(**settings), max_rows
    )


def engine(name: str, temperature: float = 1.0) -> Any:
    return HfSampler(EOS, PAD, temperature) if name == "hf" else paged(temperature)


def lora_policy() -> PeftModel:
    config = lora_config(PeftSettings(**LORA), TaskType.CAUSAL_LM)
    assert config is not None
    return get_peft_model(causal_lm(), config).eval()


def move_adapter(policy: PeftModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def logprobs_by_definition(model: Any, prompt: list[int], response: list[int], temperature: float) -> Any:
    """One sequence, no cache, no padding."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    return (
        torch.log_softmax(logits / temperature, -1).gather(-1, torch.tensor(response).unsqueeze(1)).squeeze(1)
    )


def check_samples(
    model: Any, texts: list[list[int]], samples: Samples, length: int, temperature: float, atol: float = 1e-5
) -> None:
    """Log-probabilities are the model's own; a response ends with its first end token, or is full length."""
    assert len(samples.responses) == len(texts)
    for prompt, response, recorded in zip(texts, samples.responses, samples.logprobs, strict=True):
        assert EOS not in response[:-1]
        assert response[-1] == EOS or len(response) == length
        expected = logprobs_by_definition(model, prompt, response, temperature)
        torch.testing.assert_close(torch.tensor(recorded), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["hf", "continuous"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_policy_at_the_temperature(name: str, temperature: float) -> None:
    model, texts = causal_lm().eval(), prompts()
    samples = engine(name, temperature)(model, texts, episode_uniforms(0, 0, len(texts), LENGTH))
    check_samples(model, texts, samples, LENGTH, temperature)
    lengths = [len(response) for response in samples.responses]
    assert len(set(lengths)) > 3, "the test needs end tokens in the middle"
    assert LENGTH in lengths


@pytest.mark.parametrize("name", ["hf", "continuous"])
@pytest.mark.parametrize(("count", "length"), [(1, LENGTH), (5, 1), (1, 1)])
def test_one_prompt_and_one_token(name: str, count: int, length: int) -> None:
    model, texts = causal_lm().eval(), prompts(count)
    samples = engine(name)(model, texts, episode_uniforms(0, 0, count, length))
    check_samples(model, texts, samples, length, 1.0)


@pytest.mark.parametrize("name", ["hf", "continuous"])
def test_same_weights_prompts_and_numbers_give_the_same_responses(name: str) -> None:
    model, texts = causal_lm().eval(), prompts()
    uniforms = episode_uniforms(0, 0, len(texts), LENGTH)
    first = engine(name)(model, texts, uniforms)
    assert engine(name)(model, texts, uniforms) == first
    assert engine(name)(model, texts, episode_uniforms(0, 64, len(texts), LENGTH)) != first


@pytest.mark.parametrize("name", ["hf", "continuous"])
def test_the_adapter_that_is_trained_is_the_one_that_writes(name: str) -> None:
    policy, texts = lora_policy(), prompts()
    uniforms = episode_uniforms(0, 0, len(texts), LENGTH)
    before = engine(name)(policy, texts, uniforms)
    move_adapter(policy)
    after = engine(name)(policy, texts, uniforms)
    assert before.responses != after.responses
    check_samples(policy, texts, after, LENGTH, 1.0)
    with policy.disable_adapter():
        assert engine(name)(policy, texts, uniforms).responses == before.responses


@pytest.mark.parametrize("name", ["hf", "continuous"])
def test_generation_config_cannot_leak_in(name: str) -> None:
    model, texts = causal_lm().eval(), prompts(8)
    uniforms = episode_uniforms(0, 0, 8, LENGTH)
    expected = engine(name)(model, texts, uniforms)
    model.generation_config.update(
        do_sample=False, temperature=0.1, top_k=1, repetition_penalty=5.0, max_new_tokens=2, eos_token_id=9
    )
    assert engine(name)(model, texts, uniforms) == expected


@pytest.mark.parametrize("name", ["hf", "continuous"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_training_goes_on_as_if_nothing_had_been_generated(name: str, attention: str) -> None:
    """Attention code, mode, random numbers, weights, and the gradients of a training step."""
    model = causal_lm()
    model.set_attn_implementation(attention)
    model.train()
    ids = torch.tensor([prompts(1)[0]])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)  # attention dropout is on
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    before = gradients()
    torch.manual_seed(11)
    expected_number = torch.rand(1)
    torch.manual_seed(11)
    if name == "hf":
        model.eval()
    engine(name)(model, prompts(4), episode_uniforms(0, 0, 4, LENGTH))
    if name == "hf":
        model.train()
    assert torch.equal(torch.rand(1), expected_number)
    assert model.training
    assert model.config._attn_implementation == attention
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


@pytest.mark.parametrize("max_rows", [1, 5, 24, 64])
def test_hf_responses_do_not_depend_on_the_chunk(max_rows: int) -> None:
    model, texts = causal_lm().eval(), prompts()
    uniforms = episode_uniforms(0, 0, len(texts), LENGTH)
    whole = HfSampler(EOS, PAD)(model, texts, uniforms)
    chunked = HfSampler(EOS, PAD, max_rows=max_rows)(model, texts, uniforms)
    assert chunked.responses == whole.responses
    for ours, theirs in zip(chunked.logprobs, whole.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_hf_processes_no_more_than_max_rows() -> None:
    model, texts, seen = causal_lm().eval(), prompts(), []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    HfSampler(EOS, PAD, max_rows=7)(model, texts, episode_uniforms(0, 0, len(texts), LENGTH))
    assert max(rows for rows, _ in seen) == 7
    prefills = [width for _, width in seen if width > 1]
    assert prefills == sorted(prefills, reverse=True)
    assert len(prefills) == 4
    assert {rows for rows, _ in seen} - {7, 3}, "finished rows leave the batch"


def test_paged_first_tokens_have_the_distribution_of_the_policy() -> None:
    """4000 draws for one prompt against softmax(logits / T): total variation within sampling error."""
    model, prompt, count, temperature = causal_lm().eval(), prompts(1)[0], 4000, 0.7
    samples = paged(temperature, max_rows=256)(model, [prompt] * count, episode_uniforms(0, 0, count, 1))
    drawn = torch.tensor([response[0] for response in samples.responses])
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature, -1)
    observed = drawn.bincount(minlength=VOCABULARY) / count
    spread = (2 / torch.pi * expected * (1 - expected) / count).sqrt().sum() / 2  # mean of the distance
    assert (observed - expected).abs().sum() / 2 < 1.5 * spread


@pytest.mark.parametrize(
    "bounds",
    [
        {"page_size": 4, "max_blocks": 8},  # 32 tokens for 24 sequences of up to 23: put aside and recomputed
        {"page_size": 4, "max_batch_tokens": 4},  # prompts are read in parts
        {"max_rows": 2},
    ],
)
def test_paged_bounds_cost_time_and_nothing_else(bounds: dict[str, Any]) -> None:
    model, texts = causal_lm().eval(), prompts()
    samples = paged(**bounds)(model, texts, episode_uniforms(0, 0, len(texts), LENGTH))
    check_samples(model, texts, samples, LENGTH, 1.0)


def test_paged_memory_bound_is_an_error_that_names_the_field() -> None:
    model = causal_lm().eval()
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"rollout\.continuous\.max_memory"):
        paged(max_memory=1e-9)(model, prompts(2), episode_uniforms(0, 0, 2, LENGTH))
    assert model.config._attn_implementation == "eager"


def test_paged_failure_at_the_start_leaves_the_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library switches eager to its paged form first and does not switch back when what follows fails."""
    model = causal_lm().eval()
    model.set_attn_implementation("eager")

    def refuse(*_: Any) -> Any:
        assert model.config._attn_implementation == "paged|eager"
        raise ValueError("no such processor")

    monkeypatch.setattr(model, "_get_logits_processor", refuse)
    with pytest.raises(UserError, match=r"rollout\.engine is continuous.*no such processor"):
        paged()(model, prompts(2), episode_uniforms(0, 0, 2, LENGTH))
    assert model.config._attn_implementation == "eager"


def test_paged_failure_in_the_forward_pass_is_reported() -> None:
    model = causal_lm().eval()
    model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(PosttrainError, match=r"0 of 2 responses.*division by zero"):
        paged()(model, prompts(2), episode_uniforms(0, 0, 2, LENGTH))
    assert model.config._attn_implementation == "sdpa"


def test_paged_generates_in_sixteen_bits_where_the_stage_does() -> None:
    """Under autocast a bfloat16 copy generates: close to the trainer's forward, trained weights untouched."""
    policy, texts = lora_policy(), prompts(8)
    move_adapter(policy)
    before = {name: (p, p.detach().clone()) for name, p in policy.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        samples = paged()(policy, texts, episode_uniforms(0, 0, 8, LENGTH))
        check_samples(policy, texts, samples, LENGTH, 1.0, atol=0.3)
    exact = paged()(policy, texts, episode_uniforms(0, 0, 8, LENGTH))
    assert samples.logprobs != exact.logprobs
    for name, parameter in policy.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_paged_refuses_what_cannot_generate() -> None:
    scorer = LlamaForSequenceClassification(causal_lm().config)
    with pytest.raises(UserError, match=r"rollout\.engine is continuous.*LlamaForSequenceClassification"):
        paged()(scorer, prompts(2), episode_uniforms(0, 0, 2, LENGTH))


def test_paged_refuses_attention_that_the_library_computes_differently() -> None:
    """Gemma 2 caps its attention logits; transformers' paged|eager attention does not (5.23)."""
    config = causal_lm().config.to_dict() | {"query_pre_attn_scalar": 8, "model_type": "gemma2"}
    model = Gemma2ForCausalLM(Gemma2Config(**config)).eval()
    with pytest.raises(UserError, match=r"caps its attention logits \(at 50\.0\).*rollout\.engine: hf"):
        paged()(model, prompts(2), episode_uniforms(0, 0, 2, LENGTH))
    samples = HfSampler(EOS, PAD)(model, prompts(4), episode_uniforms(0, 0, 4, LENGTH))
    check_samples(model, prompts(4), samples, LENGTH, 1.0)


def test_factory_builds_the_engine_that_is_named(tmp_path: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": PAD, "<eos>": EOS}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    sampling = SamplingParams(LENGTH, 0.7)
    model: Any = causal_lm().eval()

    def build(name: Any) -> Any:
        config = RolloutConfig(engine=name, max_rows=3)
        return build_engine(config, sampling, model, tokenizer, Accelerator(cpu=True), max_prompt_tokens=20)

    assert build("hf") == HfSampler(EOS, PAD, 0.7, 3)
    assert build("continuous") == ContinuousEngine(sampling, EOS, PAD, ContinuousSettings(), 3)
    for name in ("hf", "continuous"):
        built = build(name)
        built.sync(model)
        texts = prompts(4)
        check_samples(model, texts, built(model, texts, episode_uniforms(0, 0, 4, LENGTH)), LENGTH, 0.7)
        built.close()
    with pytest.raises(UserError, match=r"rollout\.engine is vllm"):
        build("vllm")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match=r"rollout\.engine is hf.*linear_attention.*vllm"):
        build("hf")
