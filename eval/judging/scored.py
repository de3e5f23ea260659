"""Judges that score every answer by itself: the gold rubric and a reward model. The higher score wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from eval.judging.config import GoldJudge, RewardJudge
from eval.judging.contest import Match
from eval.judging.pairwise import Judgement
from posttrain.errors import DataError, UserError


def by_rubric(judge: GoldJudge, matches: Sequence[Match]) -> list[Judgement]:
    """Judgements of the rubric. Raises DataError for a prompt without facts."""
    from eval.held_out import gold_scorer

    score = gold_scorer(judge.rubric)
    scores: dict[tuple[str, str], float] = {}
    for question_id, model, match in _answers(matches):
        question = match.question
        if not question.facts:
            raise DataError(
                f"prompt {question_id} has no `facts` in its meta, which the {judge.rubric} rubric needs\n"
                "    remove the gold judge, or judge the samples of an eval run on prompts with facts"
            )
        answer = question.answers[model]
        scores[question_id, model] = score(answer.text, question.facts, answer.finished).total
    return _compare(matches, scores, judge.tie_tolerance)


def by_reward_model(
    judge: RewardJudge, path: Path, matches: Sequence[Match], advance: Callable[[int], None]
) -> tuple[list[Judgement], int]:
    """Judgements of the reward model in `path`, and how many dialogues were cut. Raises UserError."""
    import torch
    from jinja2 import TemplateError

    from eval.batching import length_sorted_batches, pad_rows
    from posttrain.models import load_chat_tokenizer, load_reward_model, score_ids, whole_dialogue

    tokenizer = load_chat_tokenizer(path)
    loaded, calibration = load_reward_model(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = loaded.to(device)  # type: ignore[arg-type]
    limit = min(judge.max_tokens, model.config.to_dict().get("max_position_embeddings") or judge.max_tokens)
    keys, rows, cut = [], [], 0
    for question_id, name, match in _answers(matches):
        turns = [{"role": role, "content": content} for role, content in match.question.answers[name].turns]
        try:
            text = whole_dialogue(tokenizer, [*match.question.messages, *turns])
        except TemplateError as error:
            raise UserError(f"{path}: its chat template refuses prompt {question_id} ({error})") from None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut += len(ids) > limit
        keys.append((question_id, name))
        rows.append(ids[-limit:])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    scores = np.empty(len(rows))
    with torch.no_grad():
        for batch in length_sorted_batches([len(row) for row in rows], judge.batch_size):
            ids_BT, mask_BT = pad_rows([rows[i] for i in batch], pad, "right", device)
            scores[batch] = score_ids(model, calibration, ids_BT, mask_BT).float().cpu().numpy()
            advance(len(batch))
    by_answer = dict(zip(keys, scores.tolist(), strict=True))
    return _compare(matches, by_answer, judge.tie_tolerance), cut


def distinct_answers(matches: Sequence[Match]) -> int:
    """How many answers the matches are about."""
    return len(_answers(matches))


def _answers(matches: Sequence[Match]) -> list[tuple[str, str, Match]]:
    found = {(m.question.id, name): m for m in matches for name in (m.first, m.second)}
    return [(question_id, name, match) for (question_id, name), match in found.items()]


def _compare(
    matches: Sequence[Match], scores: dict[tuple[str, str], float], tolerance: float
) -> list[Judgement]:
    judgements = []
    for match in matches:
        first, second = (scores[match.question.id, name] for name in (match.first, match.second))
        outcome = 0.5 if abs(first - second) <= tolerance else float(first > second)
        judgements.append(Judgement(match, outcome, scores=(first, second)))
    return judgements
