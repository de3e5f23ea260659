"""What is looked at before a training stage starts: its data and its models, without loading weights.

The `preflight` hook of a stage (posttrain.registry) does the looking. `posttrain run` and the stage commands
call it before a stage starts, `posttrain check` for whatever is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from posttrain.config import StageConfig, find_references
from posttrain.errors import PreflightError, Problem, UserError
from posttrain.inputs import ResolvedInput, download, resolve
from posttrain.planning import Plan, awaited_inputs, plan_stage
from posttrain.preflight_report import Piece, print_findings
from posttrain.registry import load, stage_spec
from posttrain.rundir import RunDir
from posttrain.stage_file import StageBlock

Locate = Callable[[Sequence[Problem]], list[Problem]]
NO_CHECK = "nothing was started; --no-check starts without looking"
ON_THE_HUB = "is on the Hugging Face Hub, looked at once the stage downloads it"


@dataclass
class Findings:
    """What a look at a stage found.

    problems stop the stage, warnings do not; `where` of both is a field of the stage ("trainer.max_length").
    notes: what was looked at only in part. example: one rendered row in pieces (text, supervised).
    """

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    example: list[Piece] = field(default_factory=list)

    def fail(self, where: str, message: str, remedy: str, *, here: bool = False) -> None:
        """Add a problem, unless it is there already (of both splits, say). here: see `Problem`."""
        problem = Problem(where, message, remedy, here)
        if problem not in self.problems:
            self.problems.append(problem)

    def warn(self, where: str, message: str, remedy: str) -> None:
        """Add a warning."""
        self.warnings.append(Problem(where, message, remedy))

    def fail_with(self, where: str, error: Exception, *, here: bool = False) -> None:
        """Add an error's message as a problem; what is indented in it is the remedy."""
        message, _, remedy = str(error).partition("\n")
        self.fail(where, message, remedy.strip(), here=here)

    def add(self, other: Findings) -> None:
        """Add what another look found; the first example is kept."""
        self.problems += other.problems
        self.warnings += other.warnings
        self.notes += other.notes
        self.example = self.example or other.example

    def located(self, locate: Locate | None) -> Findings:
        """The same with the `where` that `locate` gives."""
        if locate is None:
            return self
        return Findings(locate(self.problems), locate(self.warnings), self.notes, self.example)


@dataclass(frozen=True)
class Review:
    """What `posttrain check` found about a stage. unseen: the inputs it could not look at, and why."""

    name: str
    findings: Findings
    unseen: dict[str, str]


def inspect(kind: str, config: StageConfig, run_dir: Path, paths: Mapping[str, Path]) -> Findings:
    """What the stage's preflight hook finds about the inputs that are there; nothing where it has no hook.

    paths: local directories by field. `config` is one that the stage's `check` hook accepts.
    """
    hook = stage_spec(kind).preflight
    if hook is None:
        return Findings()
    findings: Findings = load(hook)(config, paths, run_dir)
    return findings


def look(
    kind: str,
    config: StageConfig,
    run_dir: Path,
    inputs: Mapping[str, ResolvedInput],
    console: Console,
    locate: Locate | None = None,
) -> list[Problem]:
    """Look at a stage that is about to start, print warnings and an example, and return the problems.

    Inputs on the Hub are downloaded for it, as the stage would do next. Raises UserError where that fails.
    """
    if stage_spec(kind).preflight is None:
        return []
    paths = {name: download(found) for name, found in inputs.items()}
    findings = inspect(kind, config, run_dir, paths).located(locate)
    print_findings(run_dir.name, findings.warnings, findings.notes, findings.example, console)
    return findings.problems


def require(
    kind: str,
    config: StageConfig,
    run_dir: Path,
    inputs: Mapping[str, ResolvedInput],
    console: Console,
    locate: Locate | None = None,
) -> None:
    """As `look`; raises PreflightError with the problems."""
    problems = look(kind, config, run_dir, inputs, console, locate)
    if problems:
        raise PreflightError(problems, NO_CHECK)


def review(blocks: Iterable[StageBlock]) -> list[Review]:
    """Look at each stage, in order of execution, as far as what it reads is there. Nothing is written.

    What an earlier stage still has to make (again), what is on the Hub and what does not exist is unseen.
    """
    pending: dict[Path, str] = {}
    return [review_stage(block, pending) for block in blocks]


def review_stage(block: StageBlock, pending: dict[Path, str]) -> Review:
    """Look at one stage; one that is still to be run is added to `pending`."""
    kind, config, run_dir = block.kind, block.config, block.run_dir
    findings = Findings()
    run = RunDir(run_dir)
    for look_at_place in (run.check_ours, run.check_unlocked):
        try:
            look_at_place()
        except UserError as error:
            findings.fail_with("", error, here=True)
    plan, refusal = _plan(block, pending)
    if plan is not None and plan.inputs_hash:
        inputs, unseen = plan.inputs, dict[str, str]()
    else:
        inputs, unseen = available(config, pending)
    if refusal is not None and not unseen and not findings.problems:
        findings.fail_with("", refusal)
    if plan is None or plan.action != "skip":
        pending[run_dir.absolute()] = block.name
    mistakes = block.check()
    if not mistakes:
        paths = {name: found.path for name, found in inputs.items() if found.path is not None}
        findings.add(inspect(kind, config, run_dir, paths))
    unseen |= {name: f"{found.ref} {ON_THE_HUB}" for name, found in inputs.items() if found.path is None}
    located = findings.located(block.locate)
    located.problems = mistakes + located.problems
    return Review(block.name, located, {} if stage_spec(kind).preflight is None else unseen)


def _plan(block: StageBlock, pending: dict[Path, str]) -> tuple[Plan | None, UserError | None]:
    """What `posttrain run` would do about the stage, or why it would refuse."""
    try:
        return plan_stage(block.kind, block.config, block.run_dir, pending=pending), None
    except UserError as error:
        return None, error


def available(
    config: StageConfig, pending: Mapping[Path, str]
) -> tuple[dict[str, ResolvedInput], dict[str, str]]:
    """The inputs that are there, and for each of the others why it cannot be looked at."""
    awaited = awaited_inputs(config, pending)
    inputs: dict[str, ResolvedInput] = {}
    unseen: dict[str, str] = {}
    for reference in find_references(config):
        if reference.field in awaited:
            unseen[reference.field] = f"is still to be made by stage {awaited[reference.field]}"
            continue
        try:
            inputs[reference.field] = resolve(reference.value, reference.kind)
        except UserError as error:
            unseen[reference.field] = str(error).splitlines()[0]
    return inputs, unseen
