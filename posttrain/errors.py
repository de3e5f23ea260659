"""The errors that reach the user, each with the exit code that the command line returns for it.

0 done, 1 the machine or the program failed, 2 something the user can correct, 3 drift found (an answer of
`posttrain drift`, not an error), 75 stopped by SIGTERM, or by a service that is away, with its work saved
(EX_TEMPFAIL of sysexits.h: run the same command again), 130 interrupted.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_DISK_FULL_WORDS = ("no space left on device", "os error 28", "disk quota exceeded")
_NEARLY_NOTHING = 64 * 1024


class PosttrainError(Exception):
    """A failure that is not the user's mistake: the disk is full, a tool died."""

    exit_code = 1


class StageFailedError(PosttrainError):
    """A stage stopped on an exception that it does not expect; the cause is attached."""


class RequeueError(PosttrainError):
    """A stage saved its work and stopped because SIGTERM asked it to, or a service it needs is away.

    place: how far it came, "update 12 of 64". why: what stopped it.
    """

    exit_code = 75

    def __init__(self, place: str, why: str = "after SIGTERM"):
        self.place = place
        super().__init__(
            f"stopped at {place} {why}, with the work up to there saved\n"
            "    the same command resumes from there (exit code 75 asks a scheduler to run it again)"
        )


class UserError(PosttrainError, ValueError):
    """Something the user can correct. The message names the place, the value and the remedy."""

    exit_code = 2


class DataError(UserError):
    """A data set or a record in it cannot be used."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    where: "file.yaml:12: stages.sft.trainer.learning_rat", or any prefix of that. here: this machine lacks
    something, and the configuration may be right on another.
    """

    where: str
    message: str
    remedy: str = ""
    here: bool = False

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}"
        return f"{text}\n    {self.remedy}" if self.remedy else text


class ConfigError(UserError):
    """Every mistake found in a configuration, reported together."""

    one, several = "1 mistake in the configuration", "{} mistakes in the configuration"

    def __init__(self, problems: Sequence[Problem], closing: str = ""):
        self.problems = list(problems)
        count = len(self.problems)
        heading = self.one if count == 1 else self.several.format(count)
        lines = [f"{heading}:", *(f"  {problem}" for problem in self.problems), closing]
        super().__init__("\n".join(lines).rstrip())


class PreflightError(ConfigError):
    """What speaks against starting a training stage: its data, its models, its settings or the machine."""

    one, several = "the preflight found 1 problem", "the preflight found {} problems"


def is_disk_full(error: BaseException, path: Path) -> bool:
    """Whether `error` came from a full disk under `path`.

    torch, safetensors and pyarrow raise classes of their own without an errno, so the text of the
    error and of its causes counts as well, and for a failed write the room that is left.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _DISK_FULL:
            return True
        if any(words in str(cause).lower() for words in _DISK_FULL_WORDS):
            return True
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, (OSError, RuntimeError)) and free_bytes(path) < _NEARLY_NOTHING


def is_read_only(error: OSError, path: Path) -> bool:
    """Whether `error` is a refusal of the file system to let this user write under `path`."""
    if error.errno not in _READ_ONLY:
        return False
    if error.filename is None:
        return error.errno == errno.EROFS
    failed = Path(str(error.filename)).absolute()
    root = path.absolute()
    return failed == root or root in failed.parents or failed in root.parents


def free_bytes(path: Path) -> int:
    """Bytes that are free on the file system that holds `path`, or would hold it once created."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


@contextmanager
def explaining_the_disk(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `path` into an error that says so. Everything else passes."""
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_read_only(error, path):
            raise read_only(path, error) from error
        if is_disk_full(error, path):
            raise disk_full(path) from error
        raise


def disk_full(path: Path) -> PosttrainError:
    """The error for a disk that filled up while a run wrote to `path`."""
    return PosttrainError(
        f"{path}: no space left on the disk ({free_bytes(path):,} bytes free)\n"
        "    free some space, or choose another disk with output_dir=/path (pipeline) or --output /path "
        "(stage), then run the same command to resume"
    )


def read_only(path: Path, error: OSError) -> UserError:
    """The error for a run directory that this user may not write to."""
    return UserError(
        f"{error.filename or path}: cannot write to the run directory {path} ({error.strerror})\n"
        "    make it writable for this user, or choose another place with output_dir=/path (pipeline) "
        "or --output /path (stage)"
    )
