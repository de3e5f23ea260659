"""One PPO update worked out from the definitions, in float64, row by row and token by token.

Independent of train/ppo on purpose: no batch, no padding, no cache, no mask, no adapter switched on or off
(an adapter's update is multiplied out and added to the weights), no vectorised formula over tokens. What the
two have in common is the configuration, the rollout, the order of the mini-batches and transformers' Llama.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from ppo_tiny import EOS, LORA, model_config
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaForCausalLM, LlamaModel

from train.ppo.config import PpoStageConfig

Rows = list[list[float]]
BETA1, BETA2 = 0.9, 0.999


@dataclass(frozen=True)
class Place:
    """Where one network's weights are: the prefix of their names, the adapter on top, the head's name."""

    prefix: str
    adapter: str | None = None
    head: str | None = None


PLACES: dict[str, dict[str, Place]] = {
    "full": {
        "policy": Place("policy_model."),
        "value": Place("models.0.", head="models.0.score.weight"),
        "reference": Place("models.1."),
        "reward": Place("models.2.", head="models.2.score.weight"),
    },
    "lora": {
        "policy": Place("policy_model.base_model.model.", "default"),
        "value": Place("models.0.", head="models.0.score.weight"),
        "reference": Place("policy_model.base_model.model."),
        "reward": Place("models.1.", head="models.1.score.weight"),
    },
    "shared": {
        "policy": Place("policy_model.base_model.model.", "default"),
        "value": Place("policy_model.base_model.model.", "value", "value_head.score.weight"),
        "reference": Place("policy_model.base_model.model."),
        "reward": Place("policy_model.base_model.model.", "reward", "reward_head.score.weight"),
    },
    "head": {
        "policy": Place("policy_model.base_model.model.", "default"),
        "value": Place("policy_model.base_model.model.", "default", "value_head.score.weight"),
        "reference": Place("policy_model.base_model.model."),
        "reward": Place("policy_model.base_model.model.", "reward", "reward_head.score.weight"),
    },
}


@dataclass
class Step:
    """One optimizer step: the losses of its mini-batch and the gradients that the optimizer was given."""

    metrics: dict[str, float]
    gradients: dict[str, Tensor]


@dataclass
class Oracle:
    """weights: every parameter of the networks in float64, by name; trained: the names that are moved, by
    part. bias: the calibration that the reward model's and the value network's outputs are reduced by.
    """

    config: PpoStageConfig
    places: dict[str, Place]
    weights: dict[str, Tensor]
    trained: dict[str, list[str]]
    biases: dict[str, float]
    prompts: list[list[int]]
    responses: list[list[int]]
    sampled: Rows
    kl_coef: float
    taken: dict[str, int] = field(default_factory=dict)
    """How often each branch of the losses was taken, so that a test can see that it tested something."""

    def __post_init__(self) -> None:
        config = model_config()
        self.lm, self.backbone = LlamaForCausalLM(config).double().eval(), LlamaModel(config).double().eval()
        self.moments = {
            name: (torch.zeros_like(self.weights[name]), torch.zeros_like(self.weights[name]))
            for names in self.trained.values()
            for name in names
        }
        for name in self.moments:
            self.weights[name].requires_grad_(True)
        self.steps = 0
        with torch.no_grad():
            self._collect()

    # The networks

    def plain_weights(self, place: Place) -> dict[str, Tensor]:
        """The weights of a model without adapters that computes what the network at `place` does."""
        result = {}
        for name, weight in self.weights.items():
            if not name.startswith(place.prefix) or "lora_" in name:
                continue
            plain = name.removeprefix(place.prefix)
            if plain.endswith(".base_layer.weight"):
                plain = plain.replace(".base_layer", "")
                if place.adapter is not None:
                    down = self.weights[name.replace("base_layer", f"lora_A.{place.adapter}")]
                    up = self.weights[name.replace("base_layer", f"lora_B.{place.adapter}")]
                    weight = weight + (LORA["lora_alpha"] / LORA["r"]) * (up @ down)
            result[plain] = weight
        return result

    def distributions(self, network: str, row: int) -> list[Tensor]:
        """Per response token, the log-probabilities of the whole vocabulary before it, [V]."""
        prompt, response = self.prompts[row], self.responses[row]
        ids = torch.tensor([prompt + response])
        weights = self.plain_weights(self.places[network])
        logits = functional_call(self.lm, weights, kwargs={"input_ids": ids, "use_cache": False}).logits[0]
        result = []
        for t in range(len(response)):
            scaled = logits[len(prompt) - 1 + t] / self.config.temperature
            largest = scaled.max().detach()
            result.append(scaled - largest - torch.log(torch.exp(scaled - largest).sum()))
        return result

    def heads(self, network: str, row: int) -> list[Tensor]:
        """What the head of `network` says at every position of prompt and response, less the bias."""
        place = self.places[network]
        weights = {
            name.removeprefix("model."): weight
            for name, weight in self.plain_weights(place).items()
            if name.startswith("model.")
        }
        ids = torch.tensor([self.prompts[row] + self.responses[row]])
        states = functional_call(self.backbone, weights, kwargs={"input_ids": ids, "use_cache": False})
        assert place.head is not None
        vector = self.weights[place.head][0]
        return [(state * vector).sum() - self.biases[network] for state in states.last_hidden_state[0]]

    def values(self, row: int) -> list[Tensor]:
        """Value before each response token: that of the position just before it."""
        start = len(self.prompts[row]) - 1
        return self.heads("value", row)[start : start + len(self.responses[row])]

    # The rollout's numbers

    def _collect(self) -> None:
        count = range(len(self.responses))
        self.finished = [response[-1] == EOS for response in self.responses]
        self.old, self.old_entropy = self._tokens("policy")
        self.reference, _ = self._tokens("reference")
        self.old_values = [[value.item() for value in self.values(row)] for row in count]
        self.scores = [float32(self.heads("reward", row)[-1].item()) for row in count]
        self.shaped = [self._shaped(row) for row in count]
        rewards = [self._rewards(row) for row in count]
        if self.config.whiten_rewards:
            mean, deviation = moments([reward for row in rewards for reward in row])
            rewards = [[(reward - mean) / deviation + mean for reward in row] for row in rewards]
        raw = [self._advantages(rewards[row], self.old_values[row]) for row in count]
        self.returns = [[a + v for a, v in zip(raw[row], self.old_values[row], strict=True)] for row in count]
        self.counts = [[self._counts(row, t) for t in range(len(self.responses[row]))] for row in count]
        kept = [a for row in count for a, counts in zip(raw[row], self.counts[row], strict=True) if counts]
        mean, deviation = moments(kept)
        self.advantages = [
            [(a - mean) / deviation if counts else 0.0 for a, counts in zip(*pair, strict=True)]
            for pair in zip(raw, self.counts, strict=True)
        ]

    def _tokens(self, network: str) -> tuple[Rows, Rows]:
        logprobs, entropies = [], []
        for row, response in enumerate(self.responses):
            tables = self.distributions(network, row)
            logprobs.append([table[token].item() for table, token in zip(tables, response, strict=True)])
            entropies.append([entropy(table).item() for table in tables])
        return logprobs, entropies

    def _shaped(self, row: int) -> float:
        config, score = self.config, self.scores[row]
        if config.reward_clip is not None:
            score = float32(min(max(score, -config.reward_clip), config.reward_clip))
        if self.finished[row] or config.missing_eos.mode == "none":
            return score
        self._take("missing_eos")
        value = float32(config.missing_eos.value)
        return float32(score + value) if config.missing_eos.mode == "penalty" else value

    def _rewards(self, row: int) -> list[float]:
        beta = self.kl_coef if self.config.kl_in == "reward" else 0.0
        rewards = [
            -beta * kl(self.config.kl_estimator, torch.tensor(p - q, dtype=torch.float64)).item()
            for p, q in zip(self.old[row], self.reference[row], strict=True)
        ]
        rewards[-1] += self.shaped[row]
        return rewards

    def _advantages(self, rewards: list[float], values: list[float]) -> list[float]:
        """A_t = sum over l >= t of (gamma lambda)^(l - t) (r_l + gamma V_(l + 1) - V_l), V = 0 at the end."""
        gamma, lam, length = self.config.gamma, self.config.lam, len(rewards)
        later = [*values[1:], 0.0]
        return [
            sum(
                (gamma * lam) ** (s - t) * (rewards[s] + gamma * later[s] - values[s])
                for s in range(t, length)
            )
            for t in range(length)
        ]

    def _counts(self, row: int, t: int) -> bool:
        """Whether token t of a response is trained on."""
        if self.finished[row] or self.config.truncated == "keep":
            return True
        self._take("truncated")
        return self.config.truncated == "mask_last" and t < len(self.responses[row]) - 1

    # The update

    def update(self, mini_batches: Sequence[Sequence[int]]) -> list[Step]:
        """The optimizer steps on mini-batches of these rows, one after the other."""
        done = []
        for rows in mini_batches:
            loss, metrics = self._loss(rows)
            limit = self.config.target_kl
            if limit is not None and metrics["approxkl"] > limit:
                self._take("target_kl")
                break
            names = [name for part in self.trained.values() for name in part]
            gradients = torch.autograd.grad(loss, [self.weights[name] for name in names], allow_unused=True)
            given = {
                name: torch.zeros_like(self.weights[name]) if gradient is None else gradient
                for name, gradient in zip(names, gradients, strict=True)
            }
            for part, members in self.trained.items():
                self._clip(members, given, part, metrics)
            self._descend(given)
            done.append(Step(metrics, given))
        return done

    def _loss(self, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        """The loss of one mini-batch and the weighted means of its parts."""
        sums: dict[str, Any] = {"loss": 0.0}
        trained = {row: sum(self.counts[row]) for row in rows if any(self.counts[row])}
        for row in rows:
            tables, values = self.distributions("policy", row), self.values(row)
            for t in range(len(self.responses[row])):
                if not self.counts[row][t]:
                    continue
                weight = 1 / sum(trained.values())
                if self.config.loss_aggregation == "sequence":
                    weight = 1 / len(trained) / trained[row]
                for terms in (self._policy_terms(row, t, tables[t]), self._value_terms(row, t, values[t])):
                    for name, term in terms.items():
                        sums[name] = sums.get(name, 0.0) + weight * term
        loss = sums.pop("loss")
        return loss, {
            name: value.item() if isinstance(value, Tensor) else value for name, value in sums.items()
        }

    def _policy_terms(self, row: int, t: int, table: Tensor) -> dict[str, Any]:
        config, advantage = self.config, self.advantages[row][t]
        logprob = table[self.responses[row][t]]
        ratio = torch.exp(logprob - self.old[row][t])
        objective, clipped = ratio * advantage, False
        low, high = 1 - config.cliprange, 1 + config.cliprange
        bounded = low if ratio.item() < low else high if ratio.item() > high else None
        if bounded is not None and bounded * advantage < objective.item():
            objective, clipped = torch.zeros_like(ratio) + bounded * advantage, True
            self._take("clip")
        if config.dual_clip is not None and advantage < 0 and objective.item() < config.dual_clip * advantage:
            objective, clipped = torch.zeros_like(ratio) + config.dual_clip * advantage, True
            self._take("dual_clip")
        if config.truncated_importance_sampling is not None:
            share = math.exp(self.old[row][t] - self.sampled[row][t])
            if share > config.truncated_importance_sampling:
                share = config.truncated_importance_sampling
                self._take("truncated_importance_sampling")
            objective = objective * share
        terms = {
            "loss_policy": -objective,
            "approxkl": (logprob.item() - self.old[row][t]) ** 2 / 2,
            "clipfrac": float(clipped),
            "ratio": ratio.item(),
        }
        loss = -objective
        if config.kl_in == "loss":
            terms["loss_kl"] = kl(config.kl_estimator, logprob - self.reference[row][t])
            loss = loss + self.kl_coef * terms["loss_kl"]
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy(table)
        return terms | {"loss": loss}

    def _value_terms(self, row: int, t: int, value: Tensor) -> dict[str, Any]:
        old, target, width = self.old_values[row][t], self.returns[row][t], self.config.cliprange_value
        error, clipped = (value - target) ** 2, False
        bounded = min(max(value.item(), old - width), old + width)
        far = (bounded - target) * (bounded - target)
        if far > error.item():
            error, clipped = torch.zeros_like(value) + far, True
            self._take("value_clip")
        return {
            "loss_value": error / 2,
            "vf_clipfrac": float(clipped),
            "loss": self.config.vf_coef * error / 2,
        }

    def _clip(
        self, names: list[str], gradients: dict[str, Tensor], part: str, metrics: dict[str, float]
    ) -> None:
        """Scale the gradients of one part to a norm of at most max_grad_norm."""
        norm = math.sqrt(sum((gradients[name] ** 2).sum().item() for name in names))
        metrics[f"grad_norm_{part}"] = norm
        limit = self.config.max_grad_norm
        if limit is not None and norm > limit:
            self._take("max_grad_norm")
            for name in names:
                gradients[name] = gradients[name] * (limit / (norm + 1e-6))

    def _descend(self, gradients: dict[str, Tensor]) -> None:
        """AdamW (Loshchilov & Hutter 2019, algorithm 2) at the peak learning rates."""
        config = self.config
        self.steps += 1
        value_rate = (
            config.learning_rate if config.value_learning_rate is None else config.value_learning_rate
        )
        rates = {"policy": config.learning_rate, "value": value_rate}
        for part, names in self.trained.items():
            for name in names:
                mean, square = self.moments[name]
                mean = BETA1 * mean + (1 - BETA1) * gradients[name]
                square = BETA2 * square + (1 - BETA2) * gradients[name] ** 2
                self.moments[name] = mean, square
                slope = (mean / (1 - BETA1**self.steps)) / (
                    (square / (1 - BETA2**self.steps)).sqrt() + config.adam_epsilon
                )
                weight = self.weights[name].detach()
                weight = weight - rates[part] * (slope + config.weight_decay * weight)
                self.weights[name] = weight.requires_grad_(True)

    def _take(self, branch: str) -> None:
        self.taken[branch] = self.taken.get(branch, 0) + 1


def moments(numbers: list[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the population, 1e-8 added to the variance)."""
    mean = sum(numbers) / len(numbers)
    return mean, math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers) + 1e-8)


def float32(number: float) -> float:
    """Rounded to float32, which scores are by contract until they become rewards."""
    return torch.tensor(number).item()


def entropy(table: Tensor) -> Tensor:
    """-sum of p log p over the vocabulary."""
    return -(torch.exp(table) * table).sum()


def kl(estimator: str, log_ratio: Tensor) -> Tensor:
    """Schulman's three estimators of KL(p || q) from log p/q at a sample of p."""
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return torch.exp(-log_ratio) - 1 + log_ratio
