"""Where scores come from: reward models (on the policy's token ids, or on text rendered anew) and penalties.

A source takes a whole batch of responses and gives one score each. `train/ppo/reward_functions.py` has the
one that calls a Python function; `train/ppo/reward_mix.py` adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import UserError
from posttrain.hashing import fingerprint_tokenizer
from posttrain.models import (
    is_calibrated,
    load_chat_tokenizer,
    load_reward_model,
    score_ids,
    whole_dialogue,
)
from train.ppo.batches import length_buckets, micro_batches
from train.ppo.networks import Networks
from train.ppo.reward_config import LengthPenalty, RepetitionPenalty

Messages = list[dict[str, str]]
_END = "\ue000end of the response\ue000"
"""Stands after a response while it is rendered, to find where the template goes on without it."""


@dataclass(frozen=True)
class RewardBatch:
    """One process's responses, in token ids; a finished one ends with its end token.

    indices: of each response, the row of its prompt among the prompts that were kept.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    finished: list[bool]
    indices: list[int]


class RewardSource(Protocol):
    """Scores responses. weight: factor in the reward; 0 is logged only and never trained on."""

    name: str
    weight: float

    def __call__(self, batch: RewardBatch) -> Tensor:
        """One score per response: float32, [B], on any device."""
        ...


@dataclass(frozen=True)
class LoadedRewardModel:
    """A reward model in memory. field: where the YAML names it. tokenizer: None when it is the policy's.

    to_end_token: whether it was trained, as by the reward stage, without the white space that its template
    may write after the end token.
    """

    field: str
    model: PreTrainedModel
    calibration: dict[str, float]
    tokenizer: PreTrainedTokenizerBase | None
    to_end_token: bool = False


def load_reward_models(
    fields: Sequence[str], path: Callable[[str], Path], policy_dir: Path
) -> list[LoadedRewardModel]:
    """The reward models that these fields of the stage name (`reward`, `rewards.ensemble.models.0`), on the
    CPU.

    path: the directory of an input by its field (`StageContext.path`). Raises UserError when one of them is
    not a reward model or has no tokenizer or chat template.
    """
    policy = fingerprint_tokenizer(policy_dir)
    loaded = []
    for field in fields:
        directory = path(field).resolve()
        model, calibration = load_reward_model(directory)
        same = fingerprint_tokenizer(directory) == policy
        tokenizer = None if same else load_chat_tokenizer(directory)
        frozen, to_end_token = model.requires_grad_(False), is_calibrated(directory)
        loaded.append(LoadedRewardModel(field, frozen, calibration, tokenizer, to_end_token))
    return loaded


class NetworkReward:
    """The reward model among the networks of the run, on the very ids the policy produced."""

    name, weight = "model.reward", 1.0

    def __init__(self, networks: Networks, max_tokens: int, pad_id: int) -> None:
        self.networks, self.max_tokens, self.pad_id = networks, max_tokens, pad_id

    def __call__(self, batch: RewardBatch) -> Tensor:
        device = self.networks.value_head.bias.device
        scores_B = torch.empty(len(batch.responses), device=device)
        for micro in micro_batches(
            batch.prompts,
            batch.responses,
            range(len(batch.responses)),
            self.pad_id,
            device,
            self.max_tokens,
            packed=self.networks.packed,
        ):
            scores_B[micro.rows] = self.networks.reward(micro.tokens).float()
        return scores_B


class ModelReward:
    """A reward model with the policy's tokenizer and template, on the very ids the policy produced."""

    def __init__(self, name: str, weight: float, loaded: LoadedRewardModel, max_tokens: int) -> None:
        self.name, self.weight, self.loaded, self.max_tokens = name, weight, loaded, max_tokens

    def __call__(self, batch: RewardBatch) -> Tensor:
        sequences = [p + r for p, r in zip(batch.prompts, batch.responses, strict=True)]
        return score_sequences(self.loaded, sequences, self.max_tokens)


class RetemplatedModelReward:
    """A reward model that reads another tokenizer or template than the policy's.

    The prompt's messages and the decoded response are rendered with the model's own template; what follows
    the response in it, the end of the turn above all, is left out of a response that did not finish. The
    score is read at the last token. `cut_B` tells, of the last batch, which dialogues were longer than the
    model's context and lost their beginning.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        loaded: LoadedRewardModel,
        max_tokens: int,
        policy_tokenizer: PreTrainedTokenizerBase,
        conversations: Sequence[Messages],
    ) -> None:
        """conversations: the messages of every prompt that was kept. Raises UserError when the model's
        template does not render the first of them with an answer.
        """
        assert loaded.tokenizer is not None
        self.name, self.weight, self.loaded, self.max_tokens = name, weight, loaded, max_tokens
        self.tokenizer, self.policy_tokenizer = loaded.tokenizer, policy_tokenizer
        self.conversations = conversations
        self.limit: int | None = (
            loaded.model.config.get_text_config().to_dict().get("max_position_embeddings")
        )
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        self.special = sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)
        self.cut_B = torch.zeros(0, dtype=torch.bool)
        self.render(conversations[0], "Hello.", False)

    def __call__(self, batch: RewardBatch) -> Tensor:
        sequences = [
            self.encode(response, finished, index)
            for response, finished, index in zip(batch.responses, batch.finished, batch.indices, strict=True)
        ]
        limit = max(map(len, sequences)) if self.limit is None else self.limit
        self.cut_B = torch.tensor([len(sequence) > limit for sequence in sequences])
        return score_sequences(self.loaded, [sequence[-limit:] for sequence in sequences], self.max_tokens)

    def encode(self, response: list[int], finished: bool, index: int) -> list[int]:
        """Ids, in the reward model's tokens, of prompt `index` answered with a response in the policy's."""
        text = self.policy_tokenizer.decode(
            response, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        rendered = self.render(self.conversations[index], without(text, self.special), finished)
        ids: list[int] = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids

    def render(self, prompt: Messages, response: str, finished: bool) -> str:
        """The dialogue in the reward model's template, up to the end of the response if it did not finish."""
        loaded = self.loaded
        return render_answer(
            loaded.field, self.tokenizer, prompt, response, finished, to_end_token=loaded.to_end_token
        )


def render_answer(
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Messages,
    response: str,
    finished: bool,
    *,
    to_end_token: bool = False,
) -> str:
    """The dialogue in the tokenizer's template, up to the end of the response if it did not finish.

    field: where the YAML names the model. to_end_token: see LoadedRewardModel. Raises UserError when the
    template refuses the prompt, or does not write an answer.
    """
    where = f"{field}: the chat template of {tokenizer.name_or_path}"
    answer = {"role": "assistant", "content": response if finished else response + _END}
    try:
        if to_end_token:
            text = whole_dialogue(tokenizer, [*prompt, answer])
        else:
            text = str(tokenizer.apply_chat_template([*prompt, answer], tokenize=False))
    except TemplateError as error:
        raise UserError(
            f"{where} refuses a prompt of the data set ({error})\n"
            "    use a reward model that reads such dialogues, or curate prompts without these turns"
        ) from error
    if finished:
        return text
    if _END not in text:
        raise UserError(
            f"{where} does not write the assistant's answer, so there is nothing to score\n"
            "    use a reward model whose template renders an answer after the prompt"
        )
    return text[: text.rindex(_END)]


def without(text: str, special: Sequence[str]) -> str:
    """`text` with every occurrence of the special tokens taken out, those that a removal makes included.

    A policy that spells out the reward model's end of turn must not thereby have written it.
    """
    found = True
    while found:
        before = text
        for token in special:
            text = text.replace(token, "")
        found = text != before
    return text


@torch.no_grad()
def score_sequences(loaded: LoadedRewardModel, sequences: Sequence[list[int]], max_tokens: int) -> Tensor:
    """Calibrated score at the last token of each sequence, in the order given: float32, [B], on the model's
    device. Rows are padded on the right, and at most `max_tokens` padded tokens go through in one forward.
    """
    device = loaded.model.device
    scores_B = torch.empty(len(sequences), device=device)
    every = [len(sequence) for sequence in sequences]
    for rows in length_buckets(every, range(len(every)), max_tokens):
        lengths = torch.tensor([len(sequences[row]) for row in rows])
        width = int(lengths.max())
        ids_BT = torch.tensor([sequences[row] + [0] * (width - len(sequences[row])) for row in rows])
        mask_BT = (torch.arange(width) < lengths.unsqueeze(1)).long()
        scores = score_ids(loaded.model, loaded.calibration, ids_BT.to(device), mask_BT.to(device))
        scores_B[torch.tensor(rows, device=device)] = scores.float()
    return scores_B


def excess_tokens(responses: Sequence[Sequence[int]], free_tokens: int) -> Tensor:
    """Tokens of each response, its end token included, beyond `free_tokens`: float32, [B]."""
    return torch.tensor([float(max(len(response) - free_tokens, 0)) for response in responses])


def repeated_share(response: Sequence[int], ngram: int) -> float:
    """Share of the n-grams of a response that repeat an earlier one; 0 when it has none."""
    total = len(response) - ngram + 1
    if total <= 0:
        return 0.0
    return 1 - len({tuple(response[start : start + ngram]) for start in range(total)}) / total


class LengthPenaltySource:
    """-per_token for each response token beyond the free ones."""

    name, weight = "length_penalty", 1.0

    def __init__(self, config: LengthPenalty) -> None:
        self.config = config

    def __call__(self, batch: RewardBatch) -> Tensor:
        return -self.config.per_token * excess_tokens(batch.responses, self.config.free_tokens)


class RepetitionPenaltySource:
    """Minus the share of repeated n-grams."""

    name = "repetition_penalty"

    def __init__(self, config: RepetitionPenalty) -> None:
        self.config, self.weight = config, config.weight

    def __call__(self, batch: RewardBatch) -> Tensor:
        return -torch.tensor([repeated_share(response, self.config.ngram) for response in batch.responses])
