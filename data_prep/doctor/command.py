"""What `posttrain data doctor` does: examine files, say what they are, write the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.doctor.advice import as_yaml, configuration
from data_prep.doctor.examine import Examined, examine
from data_prep.doctor.findings import as_json, findings
from data_prep.files import expand
from data_prep.rendering import visible
from posttrain.errors import DataError, UserError

SHOWN_WHOLE = 5
SHOWN_COLUMNS = 30
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


@dataclass(frozen=True)
class Diagnosis:
    """What was found. config: the text of the configuration that ingests it, None where nothing can be."""

    files: list[Examined]
    config: str | None
    settings: dict[str, Any] | None

    @property
    def readable(self) -> bool:
        """Whether there is a file with rows."""
        return any(found.rows for found in self.files)

    def as_json(self) -> dict[str, Any]:
        """The report of `--json`."""
        return {"files": [as_json(found) for found in self.files], "config": self.settings}

    def print(self, console: Console) -> None:
        """Write the report: every file whole where there are few, else a table of them."""
        if len(self.files) > SHOWN_WHOLE:
            _print_table(self.files, console)
        else:
            for found in self.files:
                _print_file(found, console)


def diagnose(paths: Sequence[str], output: Path | None = None) -> Diagnosis:
    """Examine everything that the paths, folders and globs name. output: file for the configuration.

    A file that cannot be read is a finding. Raises DataError when there is no file to look at, UserError when
    `output` exists as a folder or cannot be written.
    """
    files: list[Examined] = []
    for path in paths:
        try:
            files += [examine(file) for file in dict.fromkeys(expand(path))]
        except DataError as error:
            files.append(Examined(Path(path), error=str(error)))
    settings = configuration(files)
    text = as_yaml(settings, files, paths) if settings else None
    if output is not None and text is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{output}: cannot be written ({error.strerror})\n    name another file with --output"
            ) from error
    return Diagnosis(files, text, settings)


def _print_table(files: list[Examined], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("file", "format", "rows", "usable", "repeated", "encoding", "findings"):
        table.add_column(name, justify="right" if name in ("rows", "usable", "repeated") else "left")
    for found in files:
        counts = Counter(severity for severity, _ in findings(found))
        said = ", ".join(f"{count} {severity}{'s' * (count > 1)}" for severity, count in counts.items())
        style = "bold red" if counts["error"] else "yellow" if counts["warning"] else ""
        packed = "" if found.facts.compression in ("none", "parquet") else f", {found.facts.compression}"
        table.add_row(
            Text(str(found.path)),
            found.suggestion.settings["format"] if found.suggestion else "-",
            f"{found.rows:,}",
            f"{found.good:,}",
            f"{found.contents.repeated:,}",
            f"{found.facts.encoding}{packed}",
            Text(said, style),
        )
    console.print(table)
    for found in files:
        for severity, text in findings(found):
            if severity != "note":
                console.print(Text(visible(f"{found.path}: {text}"), _STYLES[severity]))


def _print_file(found: Examined, console: Console) -> None:
    console.print(Text(str(found.path), "bold underline"))
    if found.error is None and found.rows:
        _print_facts(found, console)
    for severity, text in findings(found):
        console.print(Text.assemble((f"  {severity}: ", _STYLES[severity]), visible(text)))
    console.print()


def _print_facts(found: Examined, console: Console) -> None:
    report = as_json(found)
    facts = found.facts
    how = [facts.layout, facts.encoding, *([facts.compression] if facts.compression != "none" else [])]
    console.print(Text(f"  {found.rows:,} rows, {found.bytes:,} bytes, {', '.join(how)}"))
    if found.suggestion:
        console.print(Text.assemble("  ", ("format: ", "bold"), report["why"]))
        console.print(Text(f"  {found.good:,} rows of kind {report['kind']} can be used"))
    _print_columns(found, console)
    for title, counts in (("roles", report["roles"]), ("labels", report["labels"])):
        if counts:
            console.print(
                Text(f"  {title}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
            )
    for name, at in report["characters"].items():
        bounds = f"{at['min']:,} to {at['max']:,} characters"
        console.print(Text(f"  {name}: {bounds}, median {at['p50']:,}, 95 % {at['p95']:,}"))
    if report["languages"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in report["languages"].items())
        console.print(Text(f"  languages (of {len(found.texts.kept)} texts): {shares}"))
    if report["licence"]:
        console.print(Text(f"  licence: {report['licence']['name']}, says {report['licence']['file']}"))


def _print_columns(found: Examined, console: Console) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 2))
    for name in ("column", "types", "filled", "characters", "example"):
        table.add_column(
            name, overflow="fold" if name != "example" else "ellipsis", no_wrap=name == "example"
        )
    for name, column in list(found.columns.items())[:SHOWN_COLUMNS]:
        at = column.as_json(found.rows)
        types = ", ".join(f"{kind} {share:.0%}" if share < 1 else kind for kind, share in at["types"].items())
        length = f"{at['mean_characters']:,}" if at["mean_characters"] is not None else ""
        table.add_row(Text(visible(name)), types, f"{at['filled']:.1%}", length, Text(visible(at["example"])))
    console.print(table)
    if len(found.columns) > SHOWN_COLUMNS:
        console.print(Text(f"  and {len(found.columns) - SHOWN_COLUMNS} more columns (--json has all)"))
