"""The pages, rendered by jinja2 with everything escaped. No page names a model, apart from the admin's."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from eval.annotate.assignment import Task
from eval.annotate.store import Study
from eval.annotate.votes import MAX_COMMENT_CHARACTERS, SKIP_REASONS

CHOICES = (
    ("a", "A is better", "1"),
    ("b", "B is better", "2"),
    ("tie", "Equally good", "3"),
    ("both_bad", "Both bad", "4"),
)
RATINGS = (("a", "A"), ("same", "same"), ("b", "B"))
REASONS = {
    "unclear": "The request is unclear",
    "cannot_judge": "I cannot judge it (language, knowledge)",
    "broken": "An answer is not displayed as it should be",
    "offensive": "I do not want to read it",
    "other": "Another reason (say it in the comment)",
}
assert set(REASONS) == set(SKIP_REASONS)
ROLES = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}


class Pages:
    """The templates, with what all of them know about the study."""

    def __init__(self, study: Study) -> None:
        self.environment = Environment(
            loader=PackageLoader("eval.annotate"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.filters |= {"number": number, "moment": moment}
        config = study.config
        self.environment.globals |= {"title": config.name, "instructions": config.instructions}
        self.criteria = config.criteria

    def render(
        self, template: str, status: int = 200, headers: dict[str, str] | None = None, **values: Any
    ) -> HTMLResponse:
        """A template as an answer."""
        text = self.environment.get_template(template).render(values)
        return HTMLResponse(text, status, headers)

    def login(self, form: str, error: str = "", status: int = 200) -> HTMLResponse:
        """The page that asks for a token."""
        return self.render("login.html", status, form=form, error=error)

    def message(self, text: str, status: int, headers: dict[str, str] | None = None) -> HTMLResponse:
        """A page that says why something was not done."""
        return self.render("message.html", status, headers, text=text)

    def item(self, name: str, task: Task | None, progress: dict[str, Any], form: str) -> HTMLResponse:
        """An item to vote on, or that there is none left."""
        total = progress["done"] + progress["left"]
        return self.render(
            "item.html" if task else "done.html",
            name=name,
            task=task,
            done=progress["done"],
            total=total,
            last=progress["last"],
            form=form,
            choices=CHOICES,
            criteria=self.criteria,
            ratings=RATINGS,
            reasons=REASONS,
            roles=ROLES,
            max_comment=MAX_COMMENT_CHARACTERS,
        )


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table cell, a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def moment(seconds: float) -> str:
    """A time of day in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
