"""The prompts of a language model that judges: Jinja files with the blocks `system` and `user`.

Answers are untrusted text. They stand between markers that carry a number made from the texts themselves, so
an answer cannot contain the marker that would end it, and the bundled templates say that what stands between
them is material to judge and never an instruction. A model can be fooled nevertheless; both orders and the
count of suspicious answers in the report are there to show it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jinja2 import PackageLoader, StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import SandboxedEnvironment

from posttrain.errors import Problem, UserError

Message = dict[str, str]
Method = Literal["pairwise", "rating"]
BLOCKS = ("system", "user")
REQUIRED: dict[str, frozenset[str]] = {
    "pairwise": frozenset({"conversation", "answer_a", "answer_b"}),
    "rating": frozenset({"conversation", "answer"}),
}
OPTIONAL = frozenset({"reference", "marker"})
BUNDLED = {
    "pairwise": "judge_pairwise.jinja",
    "rating": "judge_rating.jinja",
    "reference": "judge_reference.jinja",
}

REFORMAT = {
    "pairwise": "That could not be read. Reply with one JSON object and nothing else: "
    '{"winner": "A" or "B" or "tie", "reason": "one sentence"}',
    "rating": "That could not be read. Reply with one JSON object and nothing else: "
    '{"rating": a number from 1 to 10, "reason": "one sentence"}',
}
"""What a judge is told, once, after a reply without a verdict."""


def _environment() -> SandboxedEnvironment:
    return SandboxedEnvironment(
        loader=PackageLoader("eval"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )


def bundled(name: str) -> Template:
    """The template of that name: pairwise, rating or reference."""
    return _environment().get_template(BUNDLED[name])


def load_template(path: Path) -> Template:
    """A template file of the user's. Raises UserError when it cannot be read or parsed."""
    try:
        return _environment().from_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise UserError(f"{path}: cannot be used as a template ({error})") from None


def template_problems(ref: str, method: Method, where: str) -> list[Problem]:
    """What is wrong with a template file: unreadable, a block missing, a name it does not get or use."""
    path = Path(ref).expanduser()
    if not path.is_file():
        return []  # inputs that are not there are reported by whoever resolves them
    environment = _environment()
    try:
        text = path.read_text(encoding="utf-8")
        named = meta.find_undeclared_variables(environment.parse(text))
        blocks = environment.from_string(text).blocks
    except (UnicodeDecodeError, TemplateError) as error:
        return [Problem(where, f"{path} cannot be parsed: {error}")]
    problems = [
        Problem(where, f"{path} has no block `{block}`", f"write {{% block {block} %}}...{{% endblock %}}")
        for block in BLOCKS
        if block not in blocks
    ]
    known = REQUIRED[method] | OPTIONAL
    for name in sorted(named - known):
        problems.append(
            Problem(
                where,
                f"{path} uses `{name}`, which it is not given",
                f"it is given {', '.join(sorted(known))}",
            )
        )
    for name in sorted(REQUIRED[method] - named):
        problems.append(Problem(where, f"{path} never shows `{name}`", f"write {{{{ {name} }}}} in a block"))
    return problems


def marker_for(texts: Sequence[str]) -> str:
    """Twelve hex digits that none of the texts can know, since they are made from all of them."""
    digest = hashlib.sha256("\x00".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
    return digest[:12]


_HEADING = re.compile(r"^(?=\[\w+\]\s*$)", re.MULTILINE)


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as the judge reads it. A lone user message is shown bare.

    A line of the text that looks like the heading of a message gets a backslash, so that no answer can put
    words into somebody else's mouth.
    """
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(
        f"[{message['role']}]\n{_HEADING.sub(chr(92) * 2, message['content'])}" for message in messages
    )


def render(
    template: Template, conversation: str, answers: Sequence[str], reference: str | None
) -> list[Message]:
    """The messages of one request. answers: (A, B) for a comparison, one for a rating.

    Raises UserError when the template fails on these values.
    """
    names = ("answer_a", "answer_b") if len(answers) == 2 else ("answer",)
    values = {
        "conversation": conversation,
        "reference": reference,
        "marker": marker_for([conversation, *answers, reference or ""]),
        **dict(zip(names, answers, strict=True)),
    }
    messages = []
    try:
        for block, role in zip(BLOCKS, BLOCKS, strict=True):
            text = "".join(template.blocks[block](template.new_context(values))).strip()
            if text:
                messages.append({"role": role, "content": text})
    except (TemplateError, ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"the judge's template cannot be filled: {error}") from None
    return messages
