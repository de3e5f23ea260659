"""What `overoptimisation.py` shows: its figure, its tables, its page. Everything is made from `Result`s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.over_optimisation import WINDOW, Fit, Summary, Trajectory
from posttrain.svg import HEIGHT, WIDTH, Axes, dot, frame, nice_ticks, number, path, rect, svg, text

Table = tuple[list[str], list[list[str]]]

PALETTE = ("#2b6cb0", "#d4702c", "#2c8a68", "#7656a4", "#b08d24")
STYLE = (
    'svg{font-family:system-ui,"DejaVu Sans",sans-serif}.paper{fill:#fff}'
    ".t{font-size:12px;fill:#5d6876}.grid{stroke:#e3e5e9}.axis{stroke:#5d6876}"
    ".line{fill:none;stroke-width:2;stroke-linejoin:round}.dash{stroke-dasharray:5 4}"
    ".faint{stroke-width:1.2;opacity:.55}.pale{opacity:.35}.ring{stroke:#fff;stroke-width:1.5}"
    + "".join(f".line.c{i}{{stroke:{ink}}}.fill.c{i}{{fill:{ink}}}" for i, ink in enumerate(PALETTE, 1))
)
"""For the figure by itself; in the page it follows the report's style sheet."""


@dataclass(frozen=True)
class Result:
    """One PPO run with its proxy.

    accuracy: of the proxy against the noiseless gold winner on held-out pairs, with its interval. baseline,
    final: what the `eval` stage found about the SFT model and about the run's last policy.
    """

    name: str
    pairs: int
    accuracy: dict[str, Any]
    penalty: bool
    run: Trajectory
    summary: Summary
    fit: Fit
    warnings: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    baseline: dict[str, Any]
    final: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{self.pairs} pairs" + (", KL penalty" if self.penalty else "")

    @property
    def warned(self) -> str:
        """The update at which the run warned of over-optimisation; a dash when it did not."""
        steps = [row["step"] for row in self.warnings if row["kind"] == "over_optimisation"]
        return str(steps[0]) if steps else "-"


def run_table(results: Sequence[Result]) -> Table:
    """Proxy, pairs, RM accuracy, and where gold peaked; means over WINDOW updates."""
    header = ["proxy", "RM accuracy against gold", "KL at gold's peak", "KL at the end", "gold at the start"]
    header += ["at its peak", "at the end", "proxy at the start", "at gold's peak", "at the end", "warned at"]
    rows = []
    for result in results:
        s = result.summary
        cells = [result.label, f"{result.accuracy['value']:.3f}", f"{s.kl_peak:.1f}", f"{s.kl_end:.1f}"]
        cells += [f"{value:.3f}" for value in (s.gold_start, s.gold_peak, s.gold_end)]
        cells += [f"{value:.2f}" for value in (s.proxy_start, s.proxy_peak, s.proxy_end)]
        rows.append([*cells, result.warned])
    return header, rows


def fit_table(results: Sequence[Result]) -> Table:
    """Coefficients of gold = start + d (alpha - beta log d), and how well it fits."""
    header = ["proxy", "start", "alpha", "beta", "peak at KL", "RMS residual", "scatter of one update", "R2"]
    rows = []
    for result in results:
        fit = result.fit
        seen = fit.peak is not None and fit.peak <= max(result.run.distance)
        peak = f"{fit.peak**2:.1f}" if fit.peak is not None and seen else "beyond the run"
        cells = [result.label, f"{fit.start:.3f}", f"{fit.alpha:.4f}", f"{fit.beta:.4f}", peak]
        cells += [f"{fit.rmse:.4f}", f"{fit.scatter:.4f}", f"{fit.r2:.2f}"]
        rows.append([*cells, "good" if fit.is_good else "bad"])
    return [*header, "fit"], rows


def parts_table(results: Sequence[Result]) -> Table:
    """Gold score and its parts on held-out prompts: the SFT model, then the last policy of each run."""
    models = [("SFT", results[0].baseline), *((result.label, result.final) for result in results)]
    names = list(models[0][1]["gold_parts"])
    rows = [
        [
            label,
            f"{model['gold']['value']:.3f}",
            *(f"{model['gold_parts'][name]['value']:.2f}" for name in names),
            f"{model['tokens']['value']:.1f}",
        ]
        for label, model in models
    ]
    return ["held-out prompts", "gold", *names, "tokens"], rows


def figure_svg(results: Sequence[Result], *, standalone: bool = False) -> str:
    """Proxy and gold side by side over sqrt(KL), a colour per run: dots are updates, lines moving means,
    dashes the fitted form, a ring the peak of gold. standalone: with a style of its own."""
    top, height = 24.0, HEIGHT + 24.0
    body = [f"<style>{STYLE}</style>", rect(0, 0, 2 * WIDTH, height, "paper")] if standalone else []
    x = 54.0
    for colour, result in enumerate(results, 1):
        body.append(dot(x, 12, 5, f"fill c{colour}"))
        body.append(text(x + 10, 16, result.label))
        x += 30 + 7 * len(result.label)
    body.append(text(2 * WIDTH - 12, 16, "dots: updates; dashes: fit; ring: peak of gold", "t", "end"))
    limit = max(max(result.run.distance) for result in results)
    panels = (_panel(results, "proxy", limit), _panel(results, "gold", limit))
    for i, panel in enumerate(panels):
        body.append(f'<g transform="translate({i * WIDTH:g} {top:g})">{"".join(panel)}</g>')
    drawn = svg(body, "Proxy and gold reward against the square root of KL", 2 * WIDTH, height)
    if standalone:
        drawn = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return drawn


def _panel(results: Sequence[Result], what: str, limit: float) -> list[str]:
    values = {result.name: getattr(result.run, what) for result in results}
    y_ticks = nice_ticks(min(map(min, values.values())), max(map(max, values.values())))
    x_ticks = [tick for tick in nice_ticks(0.0, limit, 6) if tick <= limit]
    axes = Axes(0.0, limit, y_ticks[0], y_ticks[-1], x_ticks=x_ticks, y_ticks=y_ticks)
    body = frame(axes, "distance from the SFT model, sqrt(KL)", f"{what} reward")
    for colour, result in enumerate(results, 1):
        smooth = result.run.smoothed()
        for x, y in zip(result.run.distance, values[result.name], strict=True):
            body.append(dot(axes.px(x), axes.py(y), 1.6, f"fill pale c{colour}"))
        line = zip(smooth.distance, smooth.proxy if what == "proxy" else smooth.gold, strict=True)
        body.append(path([(axes.px(x), axes.py(y)) for x, y in line], f"line c{colour}"))
        if what == "gold":
            body += _fit_and_peak(axes, result, colour)
    return body


def _fit_and_peak(axes: Axes, result: Result, colour: int) -> list[str]:
    end = max(result.run.distance)
    curve = [(axes.px(end * i / 60), axes.py(result.fit(end * i / 60))) for i in range(61)]
    s = result.summary
    tip = f"{result.label}: gold {number(s.gold_peak)} at KL {number(s.kl_peak)}, update {s.peak_update}"
    peak = dot(axes.px(s.kl_peak**0.5), axes.py(s.gold_peak), 4.5, f"fill ring c{colour}", tip)
    return [path(curve, f"line dash faint c{colour}"), peak]


def findings(results: Sequence[Result]) -> list[str]:
    """A sentence per run."""
    sentences = []
    for result in results:
        s = result.summary
        change = f"gold goes from {s.gold_start:.2f} to {s.gold_peak:.2f} and ends at {s.gold_end:.2f}"
        told = f"the proxy from {s.proxy_start:.2f} to {s.proxy_end:.2f}"
        verdict = "over-optimised" if s.over_optimised else "not over-optimised"
        errors = f"gold is {max(s.fall, 0):.1f} standard errors under its peak"
        sentences.append(f"{result.label}: {change}, {told}. {verdict.capitalize()}: {errors}.")
    return sentences


def render(results: Sequence[Result]) -> str:
    """The page: findings, figure, tables, and answers from early and late in each run."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("eval"), autoescape=True, undefined=StrictUndefined)
    caption = f"Lines are means over {WINDOW} updates. Sampled on training prompts at temperature 1."
    return environment.from_string(PAGE).render(
        findings=findings(results),
        figure=Markup(figure_svg(results)),
        caption=caption,
        tables=[
            ("What each proxy led to", *run_table(results)),
            ("Gao's form fitted to gold: start + d (alpha - beta log d), d = sqrt(KL)", *fit_table(results)),
            ("What the gold score is made of", *parts_table(results)),
        ],
        answers=[(result.label, _answers(result)) for result in results],
    )


def _answers(result: Result) -> list[tuple[str, str, str]]:
    """Update and proxy, question, answer: of the few logged answers of the first and of the last rollout that
    has some, the two that the proxy likes best."""
    steps = [row["step"] for row in result.samples]
    shown = []
    for step in sorted({min(steps), max(steps)}):
        logged = [row for row in result.samples if row["step"] == step]
        for row in sorted(logged, key=lambda row: -row["score"])[:2]:
            said = f"update {step}, proxy {row['score']:.2f}"
            question = row["prompt"].split("<|im_start|>user\n")[-1].split("<|im_end|>")[0]
            shown.append((said, question, row["response"].replace("<|im_end|>", "")))
    return shown


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Reward over-optimisation</title>
<style>{% include "style.css" %}</style>
</head>
<body>
<header>
  <p class="eyebrow">posttrain, scripts/overoptimisation.py</p>
  <h1>Reward over-optimisation</h1>
  <ul class="lead">{% for sentence in findings %}<li>{{ sentence }}</li>{% endfor %}</ul>
</header>
<main>
<figure class="wide"><div class="title">Proxy and gold reward against the distance from the SFT model</div>
{{ figure }}<figcaption class="caption">{{ caption }}</figcaption></figure>
{% for caption, header, rows in tables %}
<div class="scroll"><table><caption>{{ caption }}</caption>
<thead><tr>{% for name in header %}<th scope="col"{% if not loop.first %} class="n"{% endif %}>\
{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>\
{% else %}<td class="n">{{ cell }}</td>{% endif %}{% endfor %}</tr>{% endfor %}</tbody></table></div>
{% endfor %}
<h2>What the policies say</h2>
<p class="note">Of the answers logged early and late in a run, those that its proxy likes best.</p>
{% for label, answers in answers %}<details{% if loop.first %} open{% endif %}><summary>{{ label }}</summary>
<div class="body">{% for said, question, answer in answers %}
<div class="turn user"><b>{{ said }}</b>{{ question }}</div><div class="turn"><b>answer</b>{{ answer }}</div>
{% endfor %}</div></details>{% endfor %}
</main>
</body>
</html>
"""
