"""Results of judging in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def percent(interval: dict[str, Any] | None) -> str:
    """`61.2 (57.0-65.3)`, in percent; a dash for None."""
    if interval is None:
        return "-"
    value, low, high = (100 * interval[end] for end in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def print_results(results: dict[str, Any], console: Console) -> None:
    """One table of pairs by judge, and a line per judge about the judge. Names are never markup."""
    wide = console if console.is_terminal else Console(file=console.file, width=150, quiet=console.quiet)
    table = Table(title=f"Win rates, % ({100 * results['confidence']:.0f} % intervals)", title_justify="left")
    for heading in ("judge", "model", "against"):
        table.add_column(heading)
    for heading in (
        "wins / ties / losses",
        "win rate",
        "at equal length",
        "without outcome",
        "enough?",
        "prompts needed",
    ):
        table.add_column(heading, justify="right")
    for name, judge in results["judges"].items():
        for pair in judge["pairs"]:
            rate = pair["win_rate"]
            counts = "-" if rate is None else f"{rate['wins']} / {rate['ties']} / {rate['losses']}"
            controlled = pair.get("length_controlled")
            flag = " *" if controlled and controlled["extrapolated"] else ""
            needed = pair.get("prompts_needed")
            cells = [
                name,
                pair["first"],
                pair["second"],
                counts,
                percent(rate),
                percent(controlled) + flag,
                str(sum(pair["without_outcome"].values())),
                "-" if rate is None else pair["enough"]["verdict"],
                "-" if needed is None else f"{needed:,}",
            ]
            table.add_row(*map(Text, cells))
    wide.print(table)
    for name, judge in results["judges"].items():
        wide.print(Text(f"{name}: {'; '.join(about(judge))}"), soft_wrap=True)
    for row in results["agreement"]:
        kappa = "undefined" if row["kappa"] is None else f"{row['kappa']['value']:.2f}"
        share = f"{100 * row['agreement']:.1f} % of {row['n']}"
        text = f"{' and '.join(row['judges'])} agree on {share}, kappa {kappa}"
        wide.print(Text(text), soft_wrap=True)


def about(judge: dict[str, Any]) -> list[str]:
    """What there is to know about a judge, in phrases."""
    phrases = []
    position = judge["position"]
    if position is not None:
        phrases.append(f"both orders agree on {percent(position['consistency'])} %")
        phrases.append(f"the first place wins {percent(position['first_wins'])} %")
    bias = judge.get("length_bias")
    if bias is not None and bias["longer_wins"] is not None:
        phrases.append(f"the longer answer wins {percent(bias['longer_wins'])} %")
    talked = judge.get("suspicious")
    if talked is not None and talked["comparisons"]:
        phrases.append(
            f"answers that speak to the judge win {100 * talked['win_rate']:.0f} % of {talked['comparisons']}"
        )
    account = judge.get("account")
    if account is not None:
        tokens = account["prompt_tokens"] + account["completion_tokens"]
        cost = "no prices set" if account["cost"] is None else f"cost {account['cost']:.4f}"
        phrases.append(
            f"{account['requests']} requests, {account['cached']} cached, {tokens:,} tokens, {cost}"
        )
        phrases += [f"{count} retries after {cause}" for cause, count in account["retries"].items()]
    if judge["without_outcome"]:
        phrases.append(", ".join(f"{count} {status}" for status, count in judge["without_outcome"].items()))
    return phrases or ["nothing to remark"]
