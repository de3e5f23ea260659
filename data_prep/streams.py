"""Bytes of a file as UTF-8 lines: decompressed, decoded and cut at line ends in bounded memory.

Compression is told by the first bytes, encoding by the byte order mark. A file that breaks off or unpacks to
far more than it holds raises `Damage` where that is found, so that what came before is kept.
"""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import ReadConfig
from posttrain.errors import DataError, UserError

CHUNK = 1 << 20
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
RATIO_FROM = 64 << 20
"""Bytes of output from which the ratio to the input is held to `read.max_decompression_ratio`."""
_ZSTD_INPUT = 1 << 10
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class BadRow:
    """A row that is not a JSON object. raw: the text as found."""

    reason: str
    detail: str
    raw: str


class Damage(Exception):
    """Nothing after this point of the file can be read. reason: a countable slug; raw: the row cut in two."""

    def __init__(self, reason: str, detail: str, raw: str = "") -> None:
        super().__init__(detail)
        self.reason, self.raw = reason, raw

    def row(self) -> BadRow:
        """The damage as the row that it took."""
        return BadRow(self.reason, str(self), self.raw)


@dataclass
class FileFacts:
    """What reading a file found out about it. layout: lines, list, object, csv, parquet or text."""

    compression: str = "none"
    encoding: str = "utf-8"
    layout: str = ""
    delimiter: str = ""
    header: bool | None = None
    note: str = ""


def utf8_chunks(path: Path, read: ReadConfig, facts: FileFacts) -> Iterator[bytes]:
    """The file's text as UTF-8 without byte order mark, in chunks of about 1 MiB.

    What cannot be decoded becomes bytes that are not UTF-8 either, so that only its row is lost.
    Raises Damage; DataError when a file named .gz or .zst is none, or zstandard is not installed.
    """
    chunks = _decompressed(path, read, facts)
    first = next(chunks, b"")
    encoding = read.encoding
    if encoding == "auto":
        encoding = next((name for mark, name in _MARKS if first.startswith(mark)), _by_nulls(first))
    facts.encoding = encoding
    if codecs.lookup(encoding).name == "utf-8":
        yield first.removeprefix(codecs.BOM_UTF8)
        yield from chunks
        return
    errors = "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    yield _encoded(decoder.decode(first).removeprefix("\ufeff"))
    for chunk in chunks:
        yield _encoded(decoder.decode(chunk))
    try:
        yield _encoded(decoder.decode(b"", final=True))
    except UnicodeDecodeError:
        yield b"\xff"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _by_nulls(first: bytes) -> str:
    """UTF-16 without a byte order mark, by where the nulls are (RFC 4627, section 3); else UTF-8."""
    nulls = "".join("0" if byte == 0 else "x" for byte in first[:4])
    return {"x0x0": "utf-16-le", "0x0x": "utf-16-be"}.get(nulls, "utf-8")


def _decompressed(path: Path, read: ReadConfig, facts: FileFacts) -> Iterator[bytes]:
    with path.open("rb") as stream:
        start = stream.read(4)
        stream.seek(0)
        raw = iter(lambda: stream.read(CHUNK), b"")
        if start.startswith(GZIP):
            facts.compression = "gzip"
            yield from _guarded(path, _gunzip(raw), read.max_decompression_ratio)
        elif start.startswith(ZSTD):
            facts.compression = "zstd"
            yield from _guarded(path, _unzstd(path, raw), read.max_decompression_ratio)
        elif start and path.name.lower().endswith((".gz", ".zst")):
            kind = "gzip" if path.name.lower().endswith(".gz") else "zstd"
            raise DataError(
                f"{path}: damaged or truncated {kind} file (it does not begin as one)\n"
                "    fetch or compress it again"
            )
        else:
            yield from raw


def _guarded(path: Path, pieces: Iterator[tuple[int, bytes]], most: int) -> Iterator[bytes]:
    """The decompressed pieces of (bytes read so far, piece). Raises Damage beyond the ratio `most`."""
    written = 0
    for taken, piece in pieces:
        written += len(piece)
        if written > RATIO_FROM and written > most * taken:
            raise Damage(
                "decompression_ratio",
                f"{taken:,} compressed bytes unpack to more than {written:,}, beyond "
                f"read.max_decompression_ratio {most}; what follows was not read",
            )
        yield piece


def _gunzip(raw: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    unpacker, taken = zlib.decompressobj(31), 0
    for chunk in raw:
        taken += len(chunk)
        while chunk:
            if unpacker.eof:
                chunk = chunk.lstrip(b"\0")
                if not chunk:
                    break
                unpacker = zlib.decompressobj(31)
            before = unpacker.copy()
            try:
                piece = unpacker.decompress(chunk, CHUNK)
            except zlib.error as error:
                yield from ((taken, saved) for saved in _saved(before, chunk))
                raise Damage("damaged_file", f"the gzip data are damaged from here on ({error})") from error
            if piece:
                yield taken, piece
            chunk = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
    if not unpacker.eof:
        raise Damage("truncated_file", "the gzip file breaks off here; the rows after it are missing")


def _saved(unpacker: Any, chunk: bytes) -> Iterator[bytes]:
    """What can be unpacked of a chunk that ends in an error, in steps halved at each of them."""
    step = CHUNK // 2
    while step:
        trial = unpacker.copy()
        try:
            piece = trial.decompress(chunk, step)
        except zlib.error:
            step //= 2
            continue
        if not piece:
            return
        yield piece
        unpacker, chunk = trial, trial.unconsumed_tail


def _unzstd(path: Path, raw: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Input goes in by small pieces: one of 1 KiB unpacks to 32 MiB at most."""
    zstandard = _zstandard(path)
    unpacker, taken = zstandard.ZstdDecompressor().decompressobj(), 0
    for block in raw:
        for start in range(0, len(block), _ZSTD_INPUT):
            chunk = block[start : start + _ZSTD_INPUT]
            taken += len(chunk)
            while chunk:
                if unpacker.eof:
                    unpacker = zstandard.ZstdDecompressor().decompressobj()
                try:
                    piece = unpacker.decompress(chunk)
                except zstandard.ZstdError as error:
                    detail = f"the zstd data are damaged from here on ({error})"
                    raise Damage("damaged_file", detail) from error
                if piece:
                    yield taken, piece
                chunk = unpacker.unused_data if unpacker.eof else b""
    if not unpacker.eof:
        raise Damage("truncated_file", "the zstd file breaks off here; the rows after it are missing")


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            f"{path}: reading zstd needs the package zstandard\n    pip install 'posttrain[data]'"
        ) from error
    return zstandard


def lines(chunks: Iterable[bytes], most: int) -> Iterator[tuple[int, bytes | BadRow]]:
    r"""(number, line without its end) pairs; a line of more than `most` bytes is a BadRow of its beginning.

    Lines end with \n, or with \r in a file whose first chunk has no \n. Raises Damage with the cut line.
    """
    number, rest, too_long = 1, b"", 0
    end = b"\n"
    try:
        for index, chunk in enumerate(chunks):
            if index == 0 and b"\n" not in chunk and b"\r" in chunk[:-1]:
                end = b"\r"
            first, *others = chunk.split(end)
            if too_long:
                too_long += len(first)
            else:
                rest += first
            for other in others:
                yield number, _too_long(rest, too_long, most) if too_long or len(rest) > most else rest
                number, rest, too_long = number + 1, other, 0
            if not too_long and len(rest) > most:
                rest, too_long = rest[:200], len(rest)
    except Damage as damage:
        damage.raw = rest[:1000].decode("utf-8", "backslashreplace")
        yield number, damage.row()
        return
    if rest:
        yield number, _too_long(rest, too_long, most) if too_long or len(rest) > most else rest


def _too_long(start: bytes, size: int, most: int) -> BadRow:
    return BadRow(
        "oversized_row",
        f"{max(size, len(start)):,} bytes, read.max_row_bytes is {most:,}",
        start[:200].decode("utf-8", "backslashreplace"),
    )
