"""How scores are shaped and laid out over the tokens; the KL coefficient's controllers."""

from __future__ import annotations

import torch
from torch import Tensor

from train.ppo.config import KlController, MissingEos


def shape_scores(scores_B: Tensor, finished_B: Tensor, missing_eos: MissingEos, clip: float | None) -> Tensor:
    """Clip the scores to [-clip, clip], then treat the responses without an end token (finished_B false)."""
    if clip is not None:
        scores_B = scores_B.clamp(-clip, clip)
    if missing_eos.mode == "replace":
        return torch.where(finished_B, scores_B, torch.full_like(scores_B, missing_eos.value))
    if missing_eos.mode == "penalty":
        return torch.where(finished_B, scores_B, scores_B + missing_eos.value)
    return scores_B


def token_rewards(scores_B: Tensor, kl_BR: Tensor, mask_BR: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * KL at every response token, plus the score at the last one; 0 elsewhere. [B, R].

    The last response token is the end token where there is one and the token at the length limit otherwise.
    (Reference codes of the N+ paper put the score one position later when there is room; with gamma = 1 that
    lengthens the trace of lambda by one token and changes nothing else.)
    """
    rewards_BR = torch.where(mask_BR, -kl_coef * kl_BR, torch.zeros_like(kl_BR))
    last_B = mask_BR.sum(-1) - 1
    rows = torch.arange(len(last_B), device=last_B.device)
    rewards_BR[rows, last_B] += scores_B
    return rewards_BR


class KlCoefficient:
    """beta of the KL penalty: fixed, or the proportional controller of Ziegler et al. 2019, section 2.2.

    e = clip(KL / target - 1, -0.2, 0.2); beta <- beta (1 + e n / horizon), n episodes since the last
    update. KL is in nats per response (summed over its tokens), the mean over the global batch.
    """

    def __init__(self, kl_coef: float, controller: KlController) -> None:
        self.value = kl_coef
        self.controller = controller

    def update(self, kl: float, episodes: int) -> None:
        """Take one observation of KL into account."""
        if self.controller.type == "adaptive":
            assert self.controller.target is not None
            error = kl / (self.controller.target * self.controller.setpoint) - 1
            self.value *= 1 + min(max(error, -0.2), 0.2) * episodes / self.controller.horizon
