"""Files of whole zstd frames, one for each step of a rank: written as one piece, and read one by one.

A frame says at its beginning how long its content is, but not how many bytes it takes itself. The reader finds its end
by reading its blocks' headers (RFC 8878, section 3.1.1), without decompressing anything.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from online_dpo.runs.opening import open_regular

MAGIC = 0xFD2FB528
BLOCK_HEADER = 3
RAW_BLOCK, REPEATED_BYTE, RESERVED = 0, 1, 3
CHECKSUM = 4
LEVEL = 3
LARGEST_FRAME = 1 << 30
"""Bytes of the content of a frame: more than any step has, so that a damaged or hostile file cannot fill the memory."""

LONGEST_LINE = 16 << 20
"""Bytes of a group that are read where groups are read one by one."""

LARGEST_WINDOW = 8 << 20
"""Bytes that decompressing may look back: `encode` needs less."""


@dataclass(frozen=True)
class Frame:
    """Where a frame lies in its file, in bytes.

    >>> Frame(start=0, end=1830)
    """

    start: int
    end: int


def encode(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One frame with a line of JSON for each row.

    Raises:
        ValueError: a number is not finite.
    """
    lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n" for row in rows)
    content = lines.encode("utf-8", "replace")  # a column may hold half of a surrogate pair, which is no text
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True).compress(content)


def decode(frame: bytes) -> list[dict[str, Any]]:
    """The rows of a frame.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = zstandard.ZstdDecompressor().decompress(frame, max_output_size=0 if _size(frame) else LARGEST_FRAME)
        return [json.loads(line) for line in content.decode("utf-8").split("\n") if line]
    except zstandard.ZstdError as error:
        raise ValueError(f"a damaged frame: {error}") from error


def _size(frame: bytes) -> int:
    size = zstandard.get_frame_parameters(frame).content_size
    if size > LARGEST_FRAME:
        raise ValueError(f"a frame of {size} bytes; at most {LARGEST_FRAME} are read")
    return size


def frames(path: Path, start: int = 0) -> Iterator[Frame]:
    """The whole frames of a file from a byte on. What is torn at its end, or no frame at all, ends them."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        while (end := _end(file, start, size)) is not None:
            yield Frame(start, end)
            start = end


def read(path: Path, frame: Frame) -> list[dict[str, Any]]:
    """The rows of one frame of a file.

    Raises:
        ValueError: it is damaged.
    """
    with open_regular(path) as file:
        file.seek(frame.start)
        return decode(file.read(frame.end - frame.start))


def each(path: Path, frame: Frame) -> Iterator[dict[str, Any] | None]:
    """The rows of one frame of a file, one by one, so that a large step needs no more memory than a small one. ``None``
    stands for a row that is no JSON object, or is longer than `LONGEST_LINE`.

    Raises:
        ValueError: the frame is damaged.
        OSError: the file is not there any more.
    """
    for line, lines in _lines(path, frame, LONGEST_LINE):
        yield _object(line) if line.endswith(b"\n") else _rest(lines)


def _lines(path: Path, frame: Frame, longest: int) -> Iterator[tuple[bytes, BinaryIO]]:
    """The lines of a frame, or so many bytes of one, and what further bytes are read from."""
    with open_regular(path) as file:
        file.seek(frame.start)
        compressed = cast(BinaryIO, _Part(file, frame.end - frame.start))
        decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        with decompressor.stream_reader(compressed, closefd=False) as content:
            lines = cast(BinaryIO, io.BufferedReader(content))
            try:
                while line := lines.readline(longest):
                    yield line, lines
            except zstandard.ZstdError as error:
                raise ValueError(f"a damaged frame: {error}") from error


class _Part:
    """The next bytes of a file, as a file that ends with them: decompressing would go on with the next frame."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        piece = self._file.read(min(size, self._left))
        self._left -= len(piece)
        return piece


def check(path: Path, frame: Frame) -> None:
    """Reads a frame to its end and keeps nothing of it: its checksum stands there.

    Raises:
        ValueError: the frame is damaged.
        OSError: the file is not there any more.
    """
    for _ in _lines(path, frame, longest=1 << 20):
        pass


def _rest(lines: BinaryIO) -> None:
    while (piece := lines.readline(1 << 20)) and not piece.endswith(b"\n"):
        pass


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _end(file: Any, start: int, size: int) -> int | None:
    """Where a frame ends; ``None`` if it is not whole."""
    file.seek(start)
    head = file.read(18)
    if len(head) < 6 or int.from_bytes(head[:4], "little") != MAGIC:
        return None
    descriptor = head[4]
    is_single, has_checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    of_dictionary = (0, 1, 2, 4)[descriptor & 3]
    of_size = (is_single, 2, 4, 8)[descriptor >> 6]
    place = start + 5 + (not is_single) + of_dictionary + of_size
    while True:
        file.seek(place)
        header = file.read(BLOCK_HEADER)
        if len(header) < BLOCK_HEADER:
            return None
        block = int.from_bytes(header, "little")
        is_last, kind, length = block & 1, block >> 1 & 3, block >> 3
        if kind == RESERVED:
            return None
        place += BLOCK_HEADER + (1 if kind == REPEATED_BYTE else length)
        if is_last:
            place += CHECKSUM * has_checksum
            return place if place <= size else None
