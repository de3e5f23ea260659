"""Which logged metrics are drawn, how they are named, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.report.load import Pipeline, Stage
from posttrain.charts import Line, line_chart

PANEL_WIDTH = 350


@dataclass(frozen=True)
class Figure:
    """One figure: markup, title, how to read it, and the legend as (name, palette index)."""

    title: str
    svg: str
    caption: str = ""
    legend: Sequence[tuple[str, int]] = ()
    wide: bool = False


@dataclass(frozen=True)
class Curve:
    """A panel: metric names with their labels, drawn together. `main` ones are shown without unfolding."""

    title: str
    metrics: dict[str, str]
    y_label: str
    caption: str
    main: bool = True


LOSS = Curve(
    "Loss",
    {"loss": "train", "eval_loss": "held out"},
    "nats per token",
    "Lower is better. Held-out loss turning up while training loss falls is overfitting.",
)
PAIR_LOSS = Curve(
    "Loss",
    {"loss": "train", "eval_loss": "held out"},
    "nats per pair",
    "0.693 is a coin toss.",
)
GRADIENT = Curve(
    "Gradient norm", {"grad_norm": "before clipping"}, "L2 norm", "Spikes are unstable steps.", False
)
RATE = Curve(
    "Learning rate", {"learning_rate": "learning rate"}, "learning rate", "The schedule as it ran.", False
)
SFT_CURVES = (
    LOSS,
    Curve(
        "Token accuracy",
        {"mean_token_accuracy": "train", "eval_mean_token_accuracy": "held out"},
        "share of tokens",
        "How often the model's first choice is the demonstrator's token.",
    ),
    Curve(
        "Entropy",
        {"entropy": "train", "eval_entropy": "held out"},
        "nats per token",
        "How undecided the model is.",
        False,
    ),
    GRADIENT,
    RATE,
)
PAIR_CURVES = (
    PAIR_LOSS,
    Curve(
        "Implicit reward accuracy",
        {"rewards/accuracies": "train", "eval_rewards/accuracies": "held out"},
        "share of pairs",
        "How often the policy raises the chosen answer more than the rejected one.",
    ),
    Curve(
        "Implicit reward margin",
        {"rewards/margins": "train", "eval_rewards/margins": "held out"},
        "beta times nats",
        "Difference of the implicit rewards of chosen and rejected.",
    ),
    Curve(
        "Implicit rewards",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        "beta times nats",
        "Both falling together means the policy is moving away from all the data.",
        False,
    ),
    GRADIENT,
    RATE,
)
LOSS_OF_PAIRS = Curve(
    "Loss",
    {"loss": "train", "eval_loss": "held out"},
    "nats per pair",
    "Supervised loss on the chosen answer and the preference term together.",
)
KTO_CURVES = (
    Curve(
        "Loss",
        {"loss": "train", "eval_loss": "held out"},
        "loss per answer",
        "0.5 is where the policy equals the reference.",
    ),
    Curve(
        "Implicit reward margin",
        {"rewards/margins": "train", "eval_rewards/margins": "held out"},
        "beta times nats",
        "Mean implicit reward of the desirable answers less that of the undesirable ones.",
    ),
    Curve(
        "Implicit rewards",
        {"rewards/chosen": "desirable", "rewards/rejected": "undesirable"},
        "beta times nats",
        "Both falling together means the policy is moving away from all the data.",
        False,
    ),
    Curve("KL estimate", {"kl": "kl"}, "nats per answer", "KTO's point of reference, cut off at 0.", False),
    GRADIENT,
    RATE,
)
GROUP_CURVES = (
    Curve(
        "Reward",
        {"reward": "train", "eval_reward": "held out"},
        "score per answer",
        "What is maximised, without the KL term.",
    ),
    Curve(
        "Gold score",
        {"reward/gold": "train", "eval_reward/gold": "held out"},
        "score per answer",
        "Watched, never trained on. Falling while the reward rises is over-optimisation.",
    ),
    Curve(
        "KL to the reference",
        {"kl": "kl"},
        "nats per token",
        "How far the policy has moved.",
    ),
    Curve(
        "Entropy", {"entropy": "entropy"}, "nats per token", "Falling to 0 means one answer for everything."
    ),
    Curve(
        "Answers cut off",
        {"completions/clipped_ratio": "cut off"},
        "share of answers",
        "Answers that reached the length limit without the end-of-turn token.",
    ),
    Curve(
        "Answer length",
        {"completions/mean_length": "tokens"},
        "tokens",
        "Watch for growth that the score pays for.",
        False,
    ),
    Curve(
        "Groups without a signal",
        {"frac_reward_zero_std": "equal rewards"},
        "share of groups",
        "Prompts whose answers all score the same teach nothing.",
        False,
    ),
    GRADIENT,
    RATE,
)
CURVES: dict[str, tuple[Curve, ...]] = {
    "base": (
        LOSS,
        Curve(
            "Speed", {"tokens_per_second": "tokens/s"}, "tokens per second", "Throughput of training.", False
        ),
        GRADIENT,
        RATE,
    ),
    "pretrain": SFT_CURVES,
    "sft": SFT_CURVES,
    "reward": (
        PAIR_LOSS,
        Curve(
            "Pair accuracy",
            {"accuracy": "train", "eval_accuracy": "held out"},
            "share of pairs",
            "Against the labels as given, so their noise is a ceiling. Batch means; the pooled one is above.",
        ),
        Curve(
            "Margin",
            {"margin": "train", "eval_margin": "held out"},
            "score difference",
            "Chosen minus rejected.",
        ),
        Curve(
            "Scores",
            {"mean_reward": "mean", "min_reward": "lowest", "max_reward": "highest"},
            "score",
            "Spread of the scores in a batch.",
            False,
        ),
        GRADIENT,
        RATE,
    ),
    "dpo": PAIR_CURVES,
    "orpo": (LOSS_OF_PAIRS, *PAIR_CURVES[1:]),
    "cpo": (LOSS_OF_PAIRS, *PAIR_CURVES[1:]),
    "kto": KTO_CURVES,
    "grpo": GROUP_CURVES,
    "rloo": GROUP_CURVES,
    "ppo": (
        Curve(
            "Reward",
            {"score": "reward-model score", "rlhf_reward": "less the KL penalty"},
            "score per answer",
            "What PPO maximises. The gap between the curves is the price paid for leaving the reference.",
        ),
        Curve(
            "Gold score",
            {"reward/gold": "gold"},
            "score per answer",
            "Watched, never trained on. Falling while the reward rises is over-optimisation.",
        ),
        Curve(
            "KL to the reference",
            {"kl": "k1", "kl_k3": "k3"},
            "nats per answer",
            "How far the policy has moved. Two estimates of the same quantity; k1 is noisier and unbiased.",
        ),
        Curve(
            "Entropy",
            {"entropy": "entropy"},
            "nats per token",
            "Falling to 0 means one answer for everything.",
        ),
        Curve(
            "Answers that end",
            {"eos_rate": "ended"},
            "share of answers",
            "Answers that produced the end-of-turn token before the length limit.",
        ),
        Curve(
            "Answer length",
            {"response_length": "tokens"},
            "tokens",
            "Watch for growth that the score pays for.",
            False,
        ),
        Curve("KL coefficient", {"kl_coef": "beta"}, "beta", "Weight of the KL penalty.", False),
        Curve(
            "Seconds by phase",
            {
                "seconds_rollout": "rollout",
                "seconds_scoring": "scoring",
                "seconds_reference": "reference",
                "seconds_update": "update",
                "seconds_sync": "sync",
            },
            "seconds per rollout",
            "Where the time of an update goes.",
            False,
        ),
        Curve(
            "Policy update",
            {"approxkl": "approx KL", "clipfrac": "clipped share"},
            "",
            "Size of each update.",
            False,
        ),
        Curve(
            "Value loss", {"loss_value": "value loss"}, "squared error", "Fit of the value network.", False
        ),
        Curve(
            "Explained variance",
            {"explained_variance": "explained"},
            "share of variance",
            "1 is a perfect value network, 0 one that knows only the mean.",
            False,
        ),
        RATE,
    ),
}


def stage_curves(pipelines: Sequence[Pipeline], stage: Stage) -> list[tuple[Curve, Figure]]:
    """The panels of one stage for which anything was logged.

    The first pipeline is drawn in full; the same stage of the others as thin lines behind it.
    """
    target = stage.manifest.get("metrics", {}).get("kl_target")
    panels = []
    for curve in CURVES.get(stage.kind, ()):
        lines = []
        for number, pipeline in enumerate(pipelines):
            twin = next((one for one in pipeline.stages if one.name == stage.name), None)
            if twin is None:
                continue
            for metric, label in curve.metrics.items():
                x, y = twin.series(metric)
                if x:
                    colour = 1 + list(curve.metrics).index(metric)
                    lines.append(Line(label, x, y, colour, faint=number > 0))
        if not lines or all(line.faint for line in lines):
            continue
        guides = [(float(target), "target")] if curve.title.startswith("KL to") and target else []
        unit = "rollout" if stage.kind == "ppo" else "optimizer step"
        markup = line_chart(lines, unit, curve.y_label, f"{stage.name}: {curve.title}", guides, PANEL_WIDTH)
        legend = [(line.label, line.colour) for line in lines if not line.faint]
        panels.append((curve, Figure(curve.title, markup, curve.caption, legend if len(legend) > 1 else ())))
    return panels
