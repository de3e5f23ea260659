"""No vote lost, none doubled: simulated annotators over HTTP while the server is killed with -9.

    python scripts/bench_annotate.py    # 8 annotators, 2,000 votes, 3 kills, both databases
    python scripts/bench_annotate.py --items 20 --annotators 3 --kills 1 --databases sqlite

Every annotator votes on every item, presses some buttons twice, tries to vote differently from a second
window, and takes some votes back. In the end the votes of the database are exactly those that were
acknowledged, and the exports of SQLite and PostgreSQL are the same bytes. Exit code 1 where they are not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_annotate_client import Annotator, Browser  # noqa: E402

from eval.annotate.database import Database  # noqa: E402
from eval.annotate.export import export  # noqa: E402
from eval.annotate.store import Study, add_annotator, create_study, open_study  # noqa: E402
from eval.annotate.study import StudyConfig, load_items  # noqa: E402

START_SECONDS = 60.0


@contextmanager
def private_postgres(*settings: str) -> Iterator[str]:
    """The URL of a PostgreSQL of its own, on a socket of its own, ended afterwards. settings: "fsync=off".

    Raises RuntimeError, with the reason, where there is none.
    """
    initdb, pg_ctl = shutil.which("initdb"), shutil.which("pg_ctl")
    if initdb is None or pg_ctl is None:
        raise RuntimeError("no initdb and pg_ctl; apt-get install postgresql")
    # PostgreSQL refuses to run as root.
    as_user: list[str] = []
    if os.geteuid() == 0:
        import pwd

        try:
            entry = pwd.getpwnam("postgres")
        except KeyError:
            raise RuntimeError("PostgreSQL does not run as root, and there is no user postgres") from None
        as_user = ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
    # A socket's path has at most 107 characters; a temporary folder of pytest may have more.
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as short:
        place = Path(short)
        if as_user:
            os.chown(place, entry.pw_uid, entry.pw_gid)
        data = place / "data"
        options = f"-c listen_addresses= -c unix_socket_directories={place} -c max_connections=40"
        options += "".join(f" -c {setting}" for setting in settings)
        steps = [
            [initdb, "-D", str(data), "-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-sync"],
            [pg_ctl, "-D", str(data), "-w", "-l", str(place / "log"), "-o", options, "start"],
        ]
        for step in steps:
            done = subprocess.run([*as_user, *step], cwd=place, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{step[0]} failed: {done.stderr.strip()[-300:]}")
        try:
            yield f"postgresql://postgres@localhost/postgres?host={place}"
        finally:
            stop = [*as_user, pg_ctl, "-D", str(data), "-m", "immediate", "stop"]
            subprocess.run(stop, cwd=place, capture_output=True, check=False)


class Server:
    """`posttrain annotate serve` as a process, on a port that stays the same over restarts."""

    def __init__(self, url: str, *options: str) -> None:
        self.url = url
        self.options = options
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, and wait until it says where."""
        command = [sys.executable, "-m", "posttrain", "annotate", "serve", "--database", self.url]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), *self.options],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        if "http://" not in line:
            raise RuntimeError(f"the server did not start: {line}{self.process.stderr.read()}")
        self.port = int(line.partition("http://")[2].partition(" ")[0].rpartition(":")[2])
        Browser(self.port).insist("GET", "/login")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(START_SECONDS)


def make_items(file: Path, count: int) -> None:
    """Answers of two models to `count` prompts, of many lengths."""
    rows = []
    for number in range(count):
        digest = hashlib.sha256(str(number).encode()).digest()
        answers = {
            "model-short": f"Short answer {number}.",
            "model-long": f"Long answer {number}: " + "because " * (1 + digest[0] % 9),
        }
        rows.append({"id": f"q{number:05}", "prompt": f"Question {number}?", "answers": answers})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_study(url: str, folder: Path, items: int, annotators: int) -> tuple[Study, dict[str, str]]:
    """A study that all annotators finish, and their tokens."""
    file = folder / "items.jsonl"
    make_items(file, items)
    config = StudyConfig(name="bench", items=str(file), overlap=annotators)
    database = Database(url)
    study = create_study(database, config, load_items(config))
    tokens = {f"annotator-{n}": add_annotator(database, study, f"annotator-{n}") for n in range(annotators)}
    database.close()
    return study, tokens


def measure(url: str, folder: Path, items: int, annotators: int, kills: int) -> dict[str, Any]:
    """All votes of all annotators, with kills in between; what came of them."""
    study, tokens = make_study(url, folder, items, annotators)
    server = Server(url)
    voted = threading.Semaphore(0)
    people = [Annotator(name, token, server.port, voted) for name, token in tokens.items()]
    began = time.monotonic()
    for person in people:
        person.start()
    step = items * annotators // (kills + 1)
    for _ in range(kills):
        for _ in range(step):
            while not voted.acquire(timeout=1.0):
                if failed := next((person.error for person in people if person.error), None):
                    server.stop()
                    raise RuntimeError("an annotator gave up") from failed
        server.kill()
        server.start()
    for person in people:
        person.join()
    seconds = time.monotonic() - began
    code = server.stop()
    errors = [repr(person.error) for person in people if person.error is not None]
    return {
        "seconds": round(seconds, 1),
        "kills": kills,
        "exit_code": code,
        "errors": errors,
        "repeated": sum(person.repeated for person in people),
        "refused": sum(person.refused for person in people),
        **compare(url, people, items * annotators),
        "export_sha256": exported(url, folder),
    }


def compare(url: str, people: list[Annotator], wanted: int) -> dict[str, Any]:
    """What the database holds beside what was acknowledged."""
    acknowledged = {nonce: choice for person in people for nonce, choice in person.acknowledged.items()}
    undone = {nonce for person in people for nonce in person.undone}
    database = Database(url)
    with database.reading() as session:
        rows = session.run("SELECT nonce, choice, withdrawn, assignment FROM votes")
        (over,) = session.run(
            "SELECT COUNT(*) AS n FROM items i WHERE i.taken <> (SELECT COUNT(*) FROM assignments s "
            "WHERE s.item = i.id AND s.state IN ('open', 'voted'))"
        )
    database.close()
    kept = {row["nonce"]: row["choice"] for row in rows}
    standing = [row for row in rows if row["withdrawn"] is None]
    return {
        "votes": len(standing),
        "wanted": wanted,
        "acknowledged": len(acknowledged),
        "withdrawn": len(rows) - len(standing),
        "lost": sum(kept.get(nonce) != choice for nonce, choice in acknowledged.items()),
        "not_acknowledged": len(set(kept) - set(acknowledged)),
        "doubled": len(standing) - len({row["assignment"] for row in standing}),
        "wrongly_withdrawn": len({row["nonce"] for row in rows if row["withdrawn"] is not None} ^ undone),
        "miscounted_items": over["n"],
    }


def exported(url: str, folder: Path) -> str:
    """sha256 of the preferences."""
    database = Database(url)
    lineage = export(database, open_study(database), folder / "prefs.jsonl")
    database.close()
    return str(lineage["output"]["sha256"])


def is_right(result: dict[str, Any]) -> bool:
    """Whether nothing was lost, doubled or made up."""
    names = ("lost", "not_acknowledged", "doubled", "wrongly_withdrawn", "miscounted_items", "exit_code")
    return result["votes"] == result["wanted"] and not result["errors"] and not any(result[n] for n in names)


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=250)
    parser.add_argument("--annotators", type=int, default=8)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--databases", nargs="+", choices=["sqlite", "postgresql"])
    options = parser.parse_args()
    results = {}
    size = (options.items, options.annotators, options.kills)
    for kind in options.databases or ["sqlite", "postgresql"]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if kind == "sqlite":
                results[kind] = measure(str(folder / "study.db"), folder, *size)
            else:
                with private_postgres() as url:
                    results[kind] = measure(url, folder, *size)
    print(json.dumps(results, indent=2))
    same = len({result["export_sha256"] for result in results.values()}) == 1
    raise SystemExit(0 if same and all(map(is_right, results.values())) else 1)


if __name__ == "__main__":
    main()
