"""What `posttrain conformance` measures: names, bounds, and what it means when one does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from train.ppo import conformance_checks as checks
from train.ppo import conformance_updates as updates
from train.ppo.conformance import EPOCHS, LEARNING_RATE, Subject


@dataclass(frozen=True)
class Bound:
    """How far an invariant may be from holding, by precision, and why it may be at all."""

    float32: float
    bfloat16: float
    reason: str
    cuda: tuple[float, str] | None = None

    def of(self, dtype: str, device: str) -> tuple[float, str]:
        """The bound and its reason on this device ("cpu", "cuda")."""
        if device == "cuda" and self.cuda is not None:
            return self.cuda
        return (self.float32 if dtype == "float32" else self.bfloat16), self.reason


EXACT = Bound(0, 0, "the same numbers go through the same operations")
COUNT = Bound(0, 0, "a count of what is wrong")
PURE = Bound(1e-5, 1e-5, "sums of a few dozen float32 numbers of size 1")
LOGPROB = Bound(
    1e-4,
    5e-2,
    "matrix products of other shapes add in another order: about 1e-6 per layer in float32; in bfloat16 a "
    "logit of 10 is known to 0.03",
)
SCORE = Bound(1e-4, 5e-2, "as for log-probabilities, relative to scores above 1")
GRADIENT = Bound(1e-4, 1e-1, "rounding of sums over rows, relative to the norm of the gradient")
RESUME = Bound(
    0,
    0,
    "a CPU adds in a fixed order",
    cuda=(LEARNING_RATE, "GPU kernels may add in any order: less than one step of the learning rate"),
)


@dataclass(frozen=True)
class Invariant:
    """name: what must hold. measure: how far it is from that (None: not applicable). meaning: of failure."""

    name: str
    measure: Callable[[Subject], float | None]
    bound: Bound
    meaning: str


INVARIANTS = [
    Invariant(
        "pad token and end token are two",
        checks.distinct_pad,
        COUNT,
        "With one token for both, the end of a response is masked as padding: the policy never learns to "
        "stop, and a reward model reads the score one token early. Add a pad token to the tokenizer.",
    ),
    Invariant(
        "the template ends an answer with the end token",
        checks.template_end,
        COUNT,
        "What the model was taught to end with is not what generation stops at: every response runs to "
        "max_new_tokens. Set the tokenizer's eos_token to the template's end of turn.",
    ),
    Invariant(
        "advantages equal those by brute force",
        checks.brute_force_gae,
        PURE,
        "Generalised advantage estimation is computed wrongly: the installation is damaged.",
    ),
    Invariant(
        "whitened numbers have mean 0 and variance 1",
        checks.whitening,
        PURE,
        "Advantages are scaled wrongly: the installation is damaged.",
    ),
    Invariant(
        "the same input gives the same output",
        checks.repeatable,
        EXACT,
        "Something random is left on in the forward pass (dropout, noise): the ratio of the first step is "
        "not 1, and the update learns from noise.",
    ),
    Invariant(
        "later tokens do not change earlier ones",
        checks.causal,
        LOGPROB,
        "The attention has no causal mask: log-probabilities of the trainer know the answer, and are not "
        "those that the tokens were sampled with.",
    ),
    Invariant(
        "batch mates do not change log-probabilities",
        checks.mates_logprobs,
        LOGPROB,
        "A row's log-probabilities depend on what stands beside it or on its padding: gradients then depend "
        "on how responses were batched.",
    ),
    Invariant(
        "batch mates do not change values",
        checks.mates_values,
        SCORE,
        "The value network mixes the rows of a batch: advantages depend on how responses were batched.",
    ),
    Invariant(
        "batch mates do not change scores",
        checks.mates_scores,
        SCORE,
        "The reward model mixes the rows of a batch or reads padding: rewards depend on the batch.",
    ),
    Invariant(
        "log-probabilities equal the model's own logits",
        checks.own_logits,
        LOGPROB,
        "What the trainer computes from hidden states is not what the model says: it would optimise another "
        "model.",
    ),
    Invariant(
        "padding on the left changes nothing",
        checks.left_padding,
        LOGPROB,
        "The model ignores its attention mask or position ids: rollouts, which pad on the left, come from "
        "another distribution than the one that is trained.",
    ),
    Invariant(
        "rollout log-probabilities equal the trainer's",
        checks.rollout_gap,
        LOGPROB,
        "Generation with the key-value cache and the trainer's forward pass disagree at the same weights: "
        "training is off-policy from the first step.",
    ),
    Invariant(
        "responses stop at the end token and nowhere else",
        checks.stops_at_end,
        COUNT,
        "Responses go on after their end or break off before it: scores and lengths are wrong.",
    ),
    Invariant(
        "adapters and gradients stay where they belong",
        updates.adapters,
        COUNT,
        "Switching between policy, value, reference and reward changes what is trained, or a gradient "
        "reaches weights that are not to move.",
    ),
    Invariant(
        "micro-batches do not change loss and gradients",
        updates.micro_batches,
        GRADIENT,
        "The gradient depends on how a mini-batch is cut up: micro_batch_tokens would change the result.",
    ),
    Invariant(
        "the first ratio is exactly 1",
        updates.first_ratio,
        EXACT,
        "The update sees other log-probabilities than the scoring pass at the same weights: clipping starts "
        "from noise.",
    ),
    Invariant(
        "KL is exactly 0 at the start",
        updates.kl_at_start,
        EXACT,
        "Policy and reference differ before anything is trained: the adapter does not start at zero, or the "
        "reference is another model.",
    ),
    Invariant(
        "a resumed run equals an uninterrupted one",
        updates.resume,
        RESUME,
        f"Two updates of {EPOCHS} passes differ from one, a checkpoint and another: part of the state is not "
        "saved, or the model keeps state of its own.",
    ),
    Invariant(
        "the merged model equals model and adapter",
        updates.merged,
        LOGPROB,
        "What would be served after merging is not what was trained.",
    ),
]
"""In the order in which they are measured: what moves weights comes last."""
