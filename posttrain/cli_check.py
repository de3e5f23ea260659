"""What `posttrain check` does: reads a file, looks at its stages, and says what it found."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from posttrain.errors import ConfigError, PreflightError, Problem
from posttrain.offline import review_offline
from posttrain.pipeline import read_blocks
from posttrain.preflight import Review, review
from posttrain.preflight_report import print_findings


@dataclass(frozen=True)
class Checked:
    """A file that was checked; without problems, which are those of the file or of the reviews, it is valid.

    error: set when the configuration cannot be read as one, so that there are no reviews.
    """

    path: Path
    reviews: list[Review]
    problems: list[Problem]
    error: ConfigError | None = None

    def as_json(self) -> dict[str, Any]:
        """The report of `--json`."""
        reviews = self.reviews
        return {
            "config": str(self.path),
            "valid": not self.problems,
            "problems": [vars(problem) for problem in self.problems],
            "warnings": [vars(warning) for review in reviews for warning in review.findings.warnings],
            "notes": {review.name: review.findings.notes for review in reviews if review.findings.notes},
            "not_looked_at": {review.name: review.unseen for review in reviews if review.unseen},
            "examples": {
                review.name: review.findings.example for review in reviews if review.findings.example
            },
        }

    def print(self) -> None:
        """Write what was found and what was not looked at to stderr. Raises ConfigError with the problems."""
        if self.error is not None:
            raise self.error
        console = Console(stderr=True)
        for found in self.reviews:
            findings = found.findings
            print_findings(found.name, findings.warnings, findings.notes, findings.example, console)
            for name, reason in found.unseen.items():
                print(f"{found.name}: not looked at yet: {name}: {reason}", file=sys.stderr)
        if self.problems:
            raise PreflightError(self.problems)
        print(f"{self.path}: valid")


def check_file(path: Path, overrides: Sequence[str] = (), *, offline: bool = False) -> Checked:
    """Look at a pipeline or a single stage. offline: for another machine, see posttrain.offline.

    Raises UserError for a file that cannot be read.
    """
    try:
        blocks = read_blocks(path, overrides)
    except ConfigError as error:
        return Checked(path, [], error.problems, error)
    reviews = review_offline(blocks) if offline else review(blocks)
    return Checked(path, reviews, [problem for found in reviews for problem in found.findings.problems])
