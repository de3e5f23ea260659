"""The commands `posttrain annotate ...`: human preferences, from answers to a data set."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT = "annotate.db"
Reporting = Callable[[], AbstractContextManager[Any]]
PrintJson = Callable[[Any], None]
DatabaseOption = Annotated[
    str,
    typer.Option(
        "--database",
        metavar="URL",
        help="SQLite file, or postgresql://user:password@host:5432/name (extra `postgres`).",
    ),
]
StudyOption = Annotated[
    str | None, typer.Option("--study", metavar="NAME", help="Which study, where the database has several.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")]


class Tool(StrEnum):
    """Other programs whose files are written and read."""

    ARGILLA = "argilla"
    LABEL_STUDIO = "label-studio"


def register(app: typer.Typer, reporting: Reporting, print_json: PrintJson) -> None:
    """Add the commands to `app`; `reporting` turns their errors into messages and exit codes."""
    commands = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Human preferences: blinded comparisons of answers on a web page, and what becomes of them.",
        epilog="Example: posttrain annotate create study.yaml; posttrain annotate annotators add alice; "
        "posttrain annotate serve; posttrain annotate export --output runs/human. "
        "docs/annotation.md has more.",
    )
    app.add_typer(commands, name="annotate")
    people = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Who may log in, and how.")
    commands.add_typer(people, name="annotators")
    _add_create(commands, reporting, print_json)
    _add_serve(commands, reporting)
    _add_people(people, reporting, print_json)
    _add_export(commands, reporting, print_json)
    _add_import(commands, reporting)
    _add_report(commands, reporting, print_json)


def _open(url: str, study: str | None) -> tuple[Any, Any]:
    from posttrain.registry import load

    database = load("eval.annotate.database:Database")(url)
    return database, load("eval.annotate.store:open_study")(database, study)


def _add_create(commands: typer.Typer, reporting: Reporting, print_json: PrintJson) -> None:
    @commands.command(
        epilog="Example: posttrain annotate create study.yaml --database study.db\n\n"
        "Example: posttrain annotate create name=ppo items=runs/tiny/eval 'pairs=[[sft,ppo]]' overlap=2\n\n"
        "docs/annotation.md has every setting."
    )
    def create(
        arguments: Annotated[
            list[str], typer.Argument(metavar="[STUDY.yaml] [a.b=c ...]", help="The YAML file and settings.")
        ],
        database: DatabaseOption = DEFAULT,
        as_json: AsJson = False,
    ) -> None:
        """Make a study of answers of two or more models: an eval run's, or those of a .jsonl file."""
        with reporting():
            from posttrain.registry import load

            path = None if "=" in arguments[0] else Path(arguments[0])
            config = load("eval.annotate.study:load_study")(path, arguments[1:] if path else arguments)
            loaded = load("eval.annotate.study:load_items")(config)
            opened = load("eval.annotate.database:Database")(database)
            load("eval.annotate.store:create_study")(opened, config, loaded)
            gold = sum(item.gold is not None for item in loaded.items)
            if named := load("eval.annotate.study:named_models")(config, loaded.items):
                print(
                    f"warning: annotators see name, criteria and instructions, and these name "
                    f"{', '.join(named)}: the study is not blinded\n    make one under another name",
                    file=sys.stderr,
                )
            left_out = dict(sorted(loaded.left_out.items()))
            if as_json:
                made = {"name": config.name, "items": len(loaded.items) - gold, "gold_items": gold}
                print_json(made | {"left_out": left_out})
                return
            print(
                f"{config.name}: {len(loaded.items) - gold} items, {gold} gold checks ({_reasons(left_out)})",
                file=sys.stderr,
            )


def _add_serve(commands: typer.Typer, reporting: Reporting) -> None:
    @commands.command(
        epilog="Example: posttrain annotate serve --database study.db\n\n"
        "Example: posttrain annotate serve --database postgresql://annotate@db/studies "
        "--public-url https://annotate.example.org --proxy 127.0.0.1\n\n"
        "Only requests for that address are answered. Ctrl-C or SIGTERM ends it (exit code 0)."
    )
    def serve(
        database: DatabaseOption = DEFAULT,
        host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8090,
        study: StudyOption = None,
        public_url: Annotated[
            str | None, typer.Option(metavar="URL", help="What browsers ask; https makes cookies Secure.")
        ] = None,
        proxy: Annotated[
            str | None,
            typer.Option(metavar="ADDRESS", help="Reverse proxy whose X-Forwarded-For is believed."),
        ] = None,
    ) -> None:
        """Serve the web page where annotators vote, and the admin's."""
        with reporting():
            from posttrain.errors import UserError
            from posttrain.registry import load

            try:
                run = load("eval.annotate.server:serve")
            except ModuleNotFoundError as error:
                raise UserError(
                    f"annotate serve needs {error.name}\n    pip install 'posttrain[annotate]'"
                ) from error
            run(database, host=host, port=port, study=study, public_url=public_url, proxy=proxy)


def _add_people(people: typer.Typer, reporting: Reporting, print_json: PrintJson) -> None:
    @people.command(epilog="Example: posttrain annotate annotators add alice --database study.db")
    def add(
        name: Annotated[str, typer.Argument(help="Who it is, in reports and exports.")],
        database: DatabaseOption = DEFAULT,
        study: StudyOption = None,
        admin: Annotated[
            bool, typer.Option("--admin", help="Sees results and exports; does not vote.")
        ] = False,
    ) -> None:
        """Add somebody: the login token goes to stdout, once; only its hash is kept."""
        with reporting():
            from posttrain.registry import load

            opened, found = _open(database, study)
            role = "admin" if admin else "annotator"
            print(load("eval.annotate.store:add_annotator")(opened, found, name, role))

    @people.command("list", epilog="Example: posttrain annotate annotators list --database study.db")
    def list_them(
        database: DatabaseOption = DEFAULT, study: StudyOption = None, as_json: AsJson = False
    ) -> None:
        """Say who may log in, and how many votes each has given."""
        with reporting():
            from posttrain.registry import load

            opened, found = _open(database, study)
            rows = load("eval.annotate.store:list_annotators")(opened, found)
            if as_json:
                print_json(rows)
                return
            for row in rows:
                since = datetime.fromtimestamp(row["created"], UTC).date()
                state = ", revoked" if row["revoked"] is not None else ""
                print(f"{row['name']:<24} {row['role']:<10} {row['votes']:>6} votes, since {since}{state}")

    @people.command(epilog="Example: posttrain annotate annotators revoke alice --database study.db")
    def revoke(
        name: Annotated[str, typer.Argument(help="Whose token and sessions end; votes stay.")],
        database: DatabaseOption = DEFAULT,
        study: StudyOption = None,
    ) -> None:
        """Let somebody log in no more."""
        with reporting():
            from posttrain.registry import load

            opened, found = _open(database, study)
            load("eval.annotate.store:revoke_annotator")(opened, found, name)
            print(f"{name}: revoked", file=sys.stderr)


def _add_export(commands: typer.Typer, reporting: Reporting, print_json: PrintJson) -> None:
    @commands.command(
        epilog="Example: posttrain annotate export --database study.db --output runs/human\n\n"
        "Then: posttrain reward model=runs/tiny/sft-merged data=runs/human\n\n"
        "Example: posttrain annotate export --output prefs.jsonl --min-votes 2 --min-gold-accuracy 0.8\n\n"
        "Example: posttrain annotate export --votes votes.jsonl   (for `judge`, kind: votes)\n\n"
        "Example: posttrain annotate export --to label-studio --output tasks.json"
    )
    def export(
        output: Annotated[
            Path | None, typer.Option(help="A data set directory; or a .jsonl (with --to: .json) file alone.")
        ] = None,
        database: DatabaseOption = DEFAULT,
        study: StudyOption = None,
        min_votes: Annotated[int, typer.Option(min=1, help="Leave out items with fewer deciding votes.")] = 1,
        min_gold_accuracy: Annotated[
            float, typer.Option(min=0, max=1, help="Leave out annotators below, on gold checks.")
        ] = 0.0,
        eval_fraction: Annotated[
            float, typer.Option(min=0.001, max=0.999, help="Of a directory: share of prompts held out.")
        ] = 0.1,
        to: Annotated[Tool | None, typer.Option(help="For another tool, votes included.")] = None,
        votes: Annotated[
            Path | None, typer.Option(metavar="FILE", help="A .jsonl of single votes, for `judge`.")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Make preference pairs of the votes, with their lineage: what `reward` and `dpo` train on."""
        with reporting():
            from posttrain.errors import UserError
            from posttrain.registry import load

            if output is None and (votes is None or to is not None or min_votes > 1):
                raise UserError("--output: is missing\n    say where the pairs go, or with --votes the votes")
            opened, found = _open(database, study)
            if votes is not None:
                rows, left = load("eval.annotate.export:export_votes")(
                    opened, found, votes, min_gold_accuracy
                )
                print(f"{votes}: {rows} votes ({_reasons(left)})", file=sys.stderr)
            if output is None:
                return
            if to is not None:
                count = load("eval.annotate.exchange:write")(opened, found, output, to.value)
                print(f"{output}: {count} items for {to.value}", file=sys.stderr)
                return
            lineage = load("eval.annotate.export:export")(
                opened,
                found,
                output,
                min_votes=min_votes,
                min_gold_accuracy=min_gold_accuracy,
                eval_fraction=eval_fraction,
            )
            if as_json:
                print_json(lineage)
                return
            read, made = lineage["source"]["votes"], lineage["output"]["rows"]
            print(f"{output}: {made} rows of {read} votes ({_reasons(lineage['left_out'])})", file=sys.stderr)


def _add_import(commands: typer.Typer, reporting: Reporting) -> None:
    @commands.command(
        "import",
        epilog="Example: posttrain annotate import labelled.json --from label-studio --database study.db",
    )
    def import_votes(
        file: Annotated[Path, typer.Argument(help="The JSON that the other tool exports.")],
        tool: Annotated[Tool, typer.Option("--from", help="The other tool.")],
        database: DatabaseOption = DEFAULT,
        study: StudyOption = None,
    ) -> None:
        """Take votes that were given in another tool on items of the study, exported with `export --to`."""
        with reporting():
            from posttrain.registry import load

            opened, found = _open(database, study)
            votes, left_out = load("eval.annotate.returned:read")(file, tool.value)
            counts = load("eval.annotate.returned:add")(opened, found, votes)
            added = counts.pop("added", 0)
            print(f"{file}: {added} votes added ({_reasons(dict(counts + left_out))})", file=sys.stderr)


def _add_report(commands: typer.Typer, reporting: Reporting, print_json: PrintJson) -> None:
    @commands.command(epilog="Example: posttrain annotate report --database study.db --json")
    def report(
        database: DatabaseOption = DEFAULT, study: StudyOption = None, as_json: AsJson = False
    ) -> None:
        """Progress, agreement (Cohen, Fleiss, Krippendorff), annotators, win rates, disagreements."""
        with reporting():
            from posttrain.registry import load

            opened, found = _open(database, study)
            made = load("eval.annotate.quality:report")(opened, found)
            if as_json:
                print_json(made)
            else:
                print(load("eval.annotate.text:as_text")(made))


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "nothing left out"
