"""Lines of UTF-8 files, plain or compressed. Every error names the file and the line."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from gradselect.app.runtime import machine_bytes
from gradselect.usage import UsageError, first_line

LONGEST_LINE = 2**26
"""Bytes of a line. A book has a sixtieth of it; a file without line ends should not be read to its end."""

_KNOWN_BEGINNINGS = {
    b"\x1f\x8b": "gzip; add .gz to its name",
    b"\x28\xb5\x2f\xfd": "zstd; add .zst to its name",
    b"BZh": "bzip2; add .bz2 to its name",
    b"\xfd7zXZ": "xz; add .xz to its name",
    b"PAR1": "Parquet; let its name end in .parquet",
    b"ARROW1": "Arrow; let its name end in .arrow",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as .csv",
}
"""First bytes of files whose name does not say what they are, and the advice."""


def lines(path: Path, *, is_one_text: bool = False) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends. Bytes are split first, so that a bad byte has a line number.

    With `is_one_text` the length of a line is limited by the memory of the machine only.
    """
    limit, is_packed, num_bytes = most_bytes(), _is_packed(path), 0
    longest = limit + 1 if is_one_text else LONGEST_LINE + 1
    with _explained(path), opened(path) as file:
        for number, line in enumerate(iter(partial(file.readline, longest), b""), start=1):
            if is_packed or is_one_text:
                num_bytes += len(line)
                if num_bytes > limit:
                    raise _too_large(path, limit)
            if len(line) == longest:
                raise UsageError(
                    f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes; is this text, with one example a line?"
                )
            try:
                # A byte order mark, as spreadsheets write it, is no part of the first column's name.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_text(path, number, line, error) from None
            if "\0" in text:
                raise UsageError(
                    f"{path}, line {number}: a zero byte at column {text.index(chr(0)) + 1}: the file is damaged or no "
                    f"UTF-8; convert it, e.g. {_iconv(path, 'UTF-16')}"
                )
            yield text


def read_bytes(path: Path) -> bytes:
    """Return all bytes of a file, unpacked.

    Raises:
        UsageError: damaged compressed data, or more than the machine holds.
    """
    limit = most_bytes()
    with _explained(path), opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _too_large(path, limit)
    return content


def most_bytes() -> int:
    """Return the size of the largest text that this machine can hold twice: as bytes and as text or rows."""
    return machine_bytes() // 2


def opened(path: Path) -> IO[bytes]:
    """Open a file, which its last ending may call compressed, for reading of its unpacked bytes."""
    open_packed = _OPENERS.get(path.suffix.lower())
    return path.open("rb") if open_packed is None else open_packed(path)


def _open_zstd(path: Path) -> IO[bytes]:
    # Python has zstd from 3.14 on; pyarrow comes with datasets.
    from pyarrow import CompressedInputStream, OSFile

    return io.BufferedReader(CompressedInputStream(OSFile(str(path)), "zstd"), 2**18)  # type: ignore[arg-type]


def _open_gzip(path: Path) -> IO[bytes]:
    return io.BufferedReader(gzip.GzipFile(path), 2**18)


_OPENERS: dict[str, Callable[[Path], IO[bytes]]] = {
    ".gz": _open_gzip,
    ".zst": _open_zstd,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}

COMPRESSIONS = tuple(_OPENERS)
"""Second endings of compressed text files."""


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSIONS


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of reading and unpacking into the user's."""
    try:
        yield
    # pyarrow raises OSError for what it cannot unpack.
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        packed = f"damaged or cut off, or no {path.suffix} file; copy it again"
        what = packed if _is_packed(path) else "it cannot be read"
        raise UsageError(f"{path}: {what} ({first_line(error)})") from None


def _too_large(path: Path, limit: int) -> UsageError:
    return UsageError(
        f"{path}: its text is more than {limit / 2**30:,.1f} GiB, more than this machine can hold; give a smaller file"
    )


def _not_text(path: Path, number: int, line: bytes, error: UnicodeDecodeError) -> UsageError:
    where = f"{path}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
    known = [advice for beginning, advice in _KNOWN_BEGINNINGS.items() if number == 1 and line.startswith(beginning)]
    if known:
        return UsageError(f"{where}: this is {known[0]}")
    is_utf16 = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return UsageError(f"{where}; convert the file, e.g. {_iconv(path, 'UTF-16' if is_utf16 else 'LATIN1')}")


def _iconv(path: Path, encoding: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {path.name} > utf8{path.suffix}"
