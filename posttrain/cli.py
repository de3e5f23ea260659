"""The `posttrain` command. Everything heavy is imported inside the command that needs it.

Exit codes: 0 done, 1 the program or the machine failed, 2 something to correct, 3 drift found (`drift` only),
75 stopped by SIGTERM with the work saved, 130 interrupted. What a person reads goes to stderr, what a script
reads (--json, schema) to stdout.
"""

from __future__ import annotations

import json
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain import (
    __version__,
    cli_annotate,
    cli_compare,
    cli_data,
    cli_drift,
    cli_feedback,
    cli_gateway,
    cli_parity,
    cli_serve,
)
from posttrain.cli_examples import EXAMPLES
from posttrain.cli_plan import add_plan
from posttrain.errors import PosttrainError, RequeueError, UserError
from posttrain.registry import STAGES

if TYPE_CHECKING:
    from posttrain.planning import Plan
    from posttrain.stage import StageResult

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Adapt a causal language model to a product: data, SFT, reward model, DPO, PPO, evaluation, Triton.",
    epilog="Example: posttrain run configs/tiny/pipeline.yaml. --debug, anywhere, shows tracebacks.",
)

CONFORMANCE = "train.ppo.conformance:check_model"
_debug = False

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings that replace those in the file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done and why, and write nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Run again even what is complete.")]
NoCheck = Annotated[
    bool, typer.Option("--no-check", help="Start training stages without looking at their data and models.")
]


def main() -> None:
    """Entry point of the console script."""
    global _debug
    _debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    app()


@contextmanager
def _reporting() -> Iterator[None]:
    """Turn what a command raises into a message on stderr and the exit code."""
    try:
        yield
        sys.stdout.flush()
    except RequeueError as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(stop.exit_code) from None
    except PosttrainError as error:
        if _debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("\ninterrupted: run the same command to resume", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            raise SystemExit(1) from None
        if _debug:
            traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}\n    add --debug for the traceback", file=sys.stderr)
        raise SystemExit(1) from error


def _reader_left() -> bool:
    """Whether what reads stdout (head, less) has closed it; nothing more is then written there."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"posttrain {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: posttrain run configs/tiny/pipeline.yaml stages.ppo.seed=1 --dry-run")
def run(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="The pipeline to run.")],
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this stage. May be given several times.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Only this stage and those it depends on.")] = None,
    force: Force = False,
    no_check: NoCheck = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline. What is complete is skipped, what was interrupted resumes, what changed runs again."""
    with _reporting():
        from posttrain.pipeline import load_pipeline
        from posttrain.pipeline_run import plan_pipeline, run_pipeline

        loaded = load_pipeline(pipeline, overrides or ())
        kinds = {name: block.kind for name, block in loaded.stages.items()}
        places = {name: block.run_dir for name, block in loaded.stages.items()}
        if dry_run:
            selected = loaded.select(only or (), until)
            plans = plan_pipeline(loaded, selected, force=force)
            rows = [_plan_row(name, kinds[name], places[name], plan) for name, plan in plans.items()]
            _show_plan(rows, as_json)
            return
        results = run_pipeline(loaded, only=only or (), until=until, force=force, preflight=not no_check)
        if as_json:
            report = loaded.directory / "report.html"
            _print_json(
                {
                    "name": loaded.config.name,
                    "directory": str(loaded.directory),
                    "report": str(report) if report.is_file() else None,
                    "stages": [
                        _result_row(name, kinds[name], places[name], done) for name, done in results.items()
                    ],
                }
            )


def _plan_row(name: str, kind: str, run_dir: Path, plan: Plan) -> dict[str, Any]:
    return {
        "name": name,
        "stage": kind,
        "action": plan.action,
        "reason": plan.reason,
        "run_dir": str(run_dir),
    }


def _result_row(name: str, kind: str, run_dir: Path, result: StageResult) -> dict[str, Any]:
    return {
        "name": name,
        "stage": kind,
        "status": result.status,
        "reason": result.plan.reason,
        "run_dir": str(run_dir),
        "metrics": result.manifest["metrics"],
    }


def _show_plan(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['action']:<6}  {row['reason']}  -> {row['run_dir']}")


def _stage_command(kind: str) -> Callable[..., None]:
    def command(
        arguments: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[CONFIG.yaml] [a.b=c ...]", help="The stage's YAML file and settings to replace."
            ),
        ] = None,
        output: Annotated[
            Path | None,
            typer.Option(help="Run directory. Default: run_dir in the file, else runs/FILE-NAME."),
        ] = None,
        force: Force = False,
        no_check: NoCheck = False,
        dry_run: DryRun = False,
        as_json: AsJson = False,
    ) -> None:
        with _reporting():
            _run_stage(kind, arguments or [], output, force, no_check, dry_run, as_json)

    return command


def _run_stage(
    kind: str,
    arguments: list[str],
    output: Path | None,
    force: bool,
    no_check: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from posttrain.errors import ConfigError
    from posttrain.planning import plan_stage
    from posttrain.stage import execute_stage
    from posttrain.stage_file import load_stage_file

    path = Path(arguments[0]) if arguments and "=" not in arguments[0] else None
    if not arguments:
        raise UserError(
            f"nothing to do: name a YAML file, or settings\n    posttrain {kind} --help shows an example"
        )
    block = load_stage_file(kind, path, arguments[1:] if path else arguments, output)
    plan = plan_stage(kind, block.config, block.run_dir, force=force)
    problems = block.check() if plan.action != "skip" else []
    if problems:
        raise ConfigError(problems)
    if dry_run:
        _show_plan([_plan_row(kind, kind, block.run_dir, plan)], as_json)
        return
    result = execute_stage(
        kind, block.config, block.run_dir, force=force, preflight=not no_check, locate=block.locate
    )
    if as_json:
        _print_json(_result_row(kind, kind, block.run_dir, result))
    else:
        print(f"{kind}: {result.status} ({result.plan.reason}) -> {block.run_dir}", file=sys.stderr)


for _spec in STAGES.values():
    if _spec.name == "serve":
        cli_serve.register(app, _reporting, _run_stage)
        continue
    _example = f"Example: posttrain {_spec.name} {EXAMPLES[_spec.name]} --output runs/my-{_spec.name}"
    app.command(_spec.name, help=_spec.help, epilog=_example)(_stage_command(_spec.name))


@app.command(
    epilog="Example: posttrain check configs/tiny/pipeline.yaml\n\n"
    "Example: posttrain check my-sft.yaml trainer.max_length=512 --json\n\n"
    "Example: posttrain check configs/qwen3-4b/pipeline.yaml --offline\n\n"
    "Exit code 0: nothing speaks against running it, though there may be warnings; 2: something does. "
    "docs/preflight.md has every check with its threshold and remedy."
)
def check(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="A pipeline, or one stage with `stage: KIND`.")
    ],
    overrides: Overrides = None,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="For another machine: known Hub models are judged by architecture, this machine is not.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find every mistake in a configuration, its data and its models without running anything.

    Trainer arguments are checked against TRL. For training stages, data and models that are there already are
    looked at too, without loading weights, and one example is shown with its loss mask.
    """
    with _reporting():
        from posttrain.cli_check import check_file

        found = check_file(config, overrides or [], offline=offline)
        if as_json:
            _print_json(found.as_json())
        else:
            found.print()
        if found.problems:
            raise SystemExit(2)


@app.command(epilog="Example: posttrain show runs/tiny/ppo")
def show(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A stage's run directory, or a pipeline's directory.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show a run: manifest, last metrics and where its inputs came from."""
    with _reporting():
        from rich.console import Console

        from posttrain.show import describe, print_run

        description = describe(run)
        if as_json:
            _print_json(description)
        else:
            print_run(description, Console())


@app.command(
    epilog="Examples: posttrain conformance --model runs/tiny/sft-merged --reward runs/tiny/reward --peft 8; "
    "posttrain conformance --model my/model --dtype bfloat16 --device cuda --json > conformance.json"
)
def conformance(
    model: Annotated[str, typer.Option(help="Language model: a run directory, a path or a Hub id.")],
    reward: Annotated[
        str | None, typer.Option(help="Reward model with the same tokenizer; scores and values need it.")
    ] = None,
    peft: Annotated[
        int | None, typer.Option(min=1, help="Train LoRA of this rank. Default: all weights.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16: autocast over float32.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Measure on a model of yours what PPO relies on: padding, cache, adapters, resume and more.

    Exit code 0: every invariant holds; 1: one does not, and the table says what that means. Takes four short
    prompts and as much memory as training on them.
    """
    with _reporting():
        from posttrain.registry import load

        measured = load(CONFORMANCE)(model, reward, peft, device, dtype)
        if as_json:
            _print_json(measured.as_json())
        else:
            from rich.console import Console

            measured.print(Console())
        if not measured.passed:
            raise SystemExit(1)


@app.command(epilog="Example: posttrain schema --output posttrain.schema.json")
def schema(
    output: Annotated[Path | None, typer.Option(help="File to write. Default: stdout.")] = None,
) -> None:
    """Write the JSON schema of the configuration files, for completion in an editor."""
    with _reporting():
        from posttrain.rundir import atomic_write_json
        from posttrain.schema import json_schema

        if output is None:
            _print_json(json_schema())
        else:
            atomic_write_json(output, json_schema())


@app.command(epilog="Example: posttrain report runs/tiny runs/tiny-seed1 --output compare.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Pipeline directories.")],
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML report about one or more pipelines."""
    with _reporting():
        from posttrain.pipeline_run import REPORT
        from posttrain.registry import load

        print(load(REPORT)(runs, output))


add_plan(app, _reporting, _print_json)
cli_data.register(app, _reporting, _print_json)
cli_parity.register(app, _reporting)
cli_compare.register(app, _reporting, _print_json)
cli_gateway.register(app, _reporting)
cli_feedback.register(app, _reporting)
cli_drift.register(app, _reporting)
cli_annotate.register(app, _reporting, _print_json)
