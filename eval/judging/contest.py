"""Who is compared on what: the answers of several models to the same questions, read from files.

Rows are told apart by their keys: lines of an eval run's samples.jsonl (`answers`), MT-bench answers
(`choices`), or one answer per line with its prompt or its question's id. docs/judging.md has examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.judging.rows import (
    PROMPT_KEYS,
    Message,
    choices_of,
    first_of,
    is_finished,
    prompt,
    prompt_key,
    read_jsonl,
    text_of,
    texts_of,
)
from eval.judging.templates import transcript
from posttrain.errors import DataError

ID_KEYS = ("id", "question_id")
ANSWER_KEYS = ("answer", "response", "output", "completion", "text")
MODEL_KEYS = ("model", "model_id", "generator")


@dataclass(frozen=True)
class Answer:
    """turns: what follows the question's messages, an assistant's message first and last."""

    turns: tuple[tuple[str, str], ...]
    finished: bool = True

    @property
    def text(self) -> str:
        """The last thing the assistant says."""
        return self.turns[-1][1]

    @property
    def shown(self) -> str:
        """What a judge reads: the text, or the whole exchange of several turns."""
        return transcript([{"role": role, "content": content} for role, content in self.turns])

    @property
    def length(self) -> int:
        """Characters of what the assistant says."""
        return sum(len(content) for role, content in self.turns if role == "assistant")


@dataclass
class Question:
    """A prompt with the answers of some models. cluster: equal for turns of a dialogue and equal prompts."""

    id: str
    messages: list[Message]
    cluster: str = ""
    reference: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    category: str = ""
    answers: dict[str, Answer] = field(default_factory=dict)

    @property
    def conversation(self) -> str:
        return transcript(self.messages)


@dataclass(frozen=True)
class Match:
    """One comparison: the answers of `first` and `second` to a question."""

    question: Question
    first: str
    second: str

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.question.id, self.first, self.second)

    @property
    def answers(self) -> tuple[Answer, Answer]:
        return self.question.answers[self.first], self.question.answers[self.second]


class Contest:
    """Questions by id, filled from files. Raises DataError, with file and line, for what cannot be used."""

    def __init__(self) -> None:
        self.questions: dict[str, Question] = {}
        self.turns: dict[str, list[str]] = {}

    @property
    def models(self) -> list[str]:
        """Every model with an answer, in the order they were met."""
        return list(dict.fromkeys(name for question in self.questions.values() for name in question.answers))

    def add_questions(self, path: Path) -> None:
        """Questions of a file: `turns` (MT-bench) or a prompt, perhaps `reference` and `category`."""
        for line, row in read_jsonl(path):
            where = f"{path}:{line}"
            identity = first_of(row, ID_KEYS)
            if identity is None:
                raise DataError(f"{where}: a question needs an `id` or a `question_id`")
            category = text_of(row, "category")
            if "turns" not in row:
                question = self._question(str(identity), prompt(row, where), where)
                question.category = category
                reference = row.get("reference")
                question.reference = reference or None if isinstance(reference, str) else None
                continue
            turns = texts_of(row["turns"], f"{where}: turns")
            self.turns[str(identity)] = turns
            references = row.get("reference")
            for k in range(len(turns)):
                question = self._question(
                    f"{identity}:{k + 1}", [{"role": "user", "content": turns[0]}], where, str(identity)
                )
                question.category = category
                if isinstance(references, list) and k < len(references):
                    question.reference = str(references[k] or "") or None

    def add_references(self, path: Path) -> None:
        """Reference answers by question id, in the MT-bench answer format or as {id, reference}."""
        for line, row in read_jsonl(path):
            where = f"{path}:{line}"
            identity = str(first_of(row, ID_KEYS))
            texts = choices_of(row, where) if "choices" in row else [text_of(row, "reference")]
            names = (
                [f"{identity}:{k + 1}" for k in range(len(texts))] if identity in self.turns else [identity]
            )
            for name, text in zip(names, texts, strict=False):
                if name in self.questions:
                    self.questions[name].reference = text or None

    def add_answers(self, path: Path, default: str | None, names: Mapping[str, str]) -> None:
        """The answers in a file. default: the model of rows that name none. names: new names of models."""
        for line, row in read_jsonl(path):
            where = f"{path}:{line}"
            if isinstance(row.get("answers"), dict):
                self._sample(row, names, where)
                continue
            model = first_of(row, MODEL_KEYS) or default
            if not isinstance(model, str):
                raise DataError(
                    f"{where}: does not say whose answer it is; set `model` of this entry of answers"
                )
            model = names.get(model, model)
            if "choices" in row:
                self._dialogue(str(first_of(row, ID_KEYS)), model, choices_of(row, where), where)
                continue
            text = first_of(row, ANSWER_KEYS)
            if not isinstance(text, str):
                raise DataError(f"{where}: has no answer (looked for {', '.join(ANSWER_KEYS)})")
            self._put(self._of(row, where), model, Answer((("assistant", text),), is_finished(row)), where)

    def _sample(self, row: dict[str, Any], names: Mapping[str, str], where: str) -> None:
        question = self._of(row, where)
        meta = row.get("meta")
        facts = meta.get("facts") if isinstance(meta, dict) else None
        question.facts = question.facts or (facts if isinstance(facts, dict) else {})
        question.category = question.category or text_of(row, "source")
        for name, answer in row["answers"].items():
            if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
                raise DataError(f"{where}: answers.{name} has no `text`")
            text = (("assistant", answer["text"]),)
            self._put(question, names.get(name, name), Answer(text, is_finished(answer)), where)

    def _dialogue(self, identity: str, model: str, texts: list[str], where: str) -> None:
        turns = self.turns.get(identity)
        if turns is None:
            raise DataError(f"{where}: question {identity} is in no question file; set `questions`")
        if len(texts) != len(turns):
            raise DataError(f"{where}: question {identity} has {len(turns)} turns, the answer {len(texts)}")
        for k in range(len(turns)):
            said = [("assistant", texts[0])]
            for following, text in zip(turns[1 : k + 1], texts[1 : k + 1], strict=True):
                said += [("user", following), ("assistant", text)]
            self._put(self.questions[f"{identity}:{k + 1}"], model, Answer(tuple(said)), where)

    def _of(self, row: dict[str, Any], where: str) -> Question:
        """The question a row answers: by its prompt, its id, or both."""
        identity = first_of(row, ID_KEYS)
        if first_of(row, PROMPT_KEYS) is None:
            found = self.questions.get(str(identity))
            if found is None:
                raise DataError(
                    f"{where}: has neither a prompt nor the id of a known question (id: {identity})"
                )
            return found
        messages = prompt(row, where)
        return self._question(
            str(identity) if identity is not None else prompt_key(messages), messages, where
        )

    def _question(self, identity: str, messages: list[Message], where: str, cluster: str = "") -> Question:
        found = self.questions.setdefault(
            identity, Question(identity, messages, cluster or prompt_key(messages))
        )
        if found.messages != messages:
            raise DataError(
                f"{where}: question {identity} has another prompt here than before, so its answers are "
                "to different prompts\n"
                "    answers must be to the same prompts; give other prompts other ids"
            )
        return found

    def _put(self, question: Question, model: str, answer: Answer, where: str) -> None:
        if model in question.answers:
            raise DataError(
                f"{where}: {model} has answered question {question.id} already\n"
                "    keep one answer, or tell the models apart with `names` or `model`"
            )
        question.answers[model] = answer


def matches(
    contest: Contest, pairs: Sequence[tuple[str, str]], num_prompts: int | None, seed: int
) -> tuple[list[Match], dict[str, int]]:
    """The comparisons that can be made, and how many questions each pair lacks an answer to, by "a / b".

    Raises DataError where a pair has no question in common.
    """
    questions = list(contest.questions.values())
    if num_prompts is not None and num_prompts < len(questions):
        drawn = np.random.default_rng(seed).permutation(len(questions))[:num_prompts]
        questions = [questions[i] for i in sorted(drawn.tolist())]
    found, missing = [], {}
    for first, second in pairs:
        both = [q for q in questions if first in q.answers and second in q.answers]
        if not both:
            counts = [sum(name in q.answers for q in questions) for name in (first, second)]
            raise DataError(
                f"{first} and {second} have no prompt in common: {counts[0]} and {counts[1]} of the "
                f"{len(questions)} prompts are answered by them\n    compare answers to the same prompts"
            )
        found += [Match(question, first, second) for question in both]
        either = sum(first in q.answers or second in q.answers for q in questions)
        missing[f"{first} / {second}"] = either - len(both)
    return found, missing
