"""Recovery of the readable parts of broken gzip files, member by member."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from isal import isal_zlib
from isal.igzip_lib import IsalError

from corec import CorecError

BLOCK = 1 << 16  # bytes read from a file at a time
# A gzip file that is larger than FREE bytes and RATIO times its compressed size when decompressed is refused: JSON lines have
# a ratio of 3 to 10, made-up files that are to fill a disk one of 1000.
FREE, RATIO = 1 << 28, 200
GZIP = b"\x1f\x8b\x08"  # first bytes of a gzip member


def plain_blocks(file: BinaryIO, faults: Counter[str]) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed if it is gzip; after a fault, continue at the next member.

    The content of the block of `BLOCK` compressed bytes that holds the fault is lost. A fault counts once, even if several byte
    sequences after it look like the start of a member.

    Parameters
    ----------
    file
        The file, at its start.
    faults
        Counts of faults by reason; updated in place.

    Raises
    ------
    CorecError
        If the content is out of proportion to the file (see :data:`RATIO`).
    """
    rest = file.read(BLOCK)
    if not rest.startswith(GZIP):
        while rest:
            yield rest
            rest = file.read(BLOCK)
    whole, size = True, 0  # whether anything was read since the last fault; bytes after decompression
    while rest:  # one member per iteration
        engine = isal_zlib.decompressobj(wbits=31)
        try:
            while True:
                text = engine.decompress(rest)
                whole, size = whole or bool(text), size + len(text)
                if size > FREE and size > RATIO * file.tell():
                    reason = f"is more than {RATIO} times larger when decompressed, which no file of reviews is"
                    raise CorecError(f"{file.name} {reason}: replace it.")
                yield text
                if engine.eof:
                    break
                rest = file.read(BLOCK)
                if not rest:
                    faults["gzip file cut short"] += 1
                    return
            rest = engine.unused_data.lstrip(b"\0")
            while not rest and (more := file.read(BLOCK)):  # skip padding after a member
                rest = more.lstrip(b"\0")
        except IsalError:  # type: ignore[misc]  # its stub declares an instance
            faults["gzip member broken"] += whole
            whole = False
            yield b"\n"  # end the line that was cut off
            rest = next_member(rest[1:], file)


def next_member(block: bytes, file: BinaryIO) -> bytes:
    """Return the bytes from the next probable gzip header on; empty at the end of the file.

    Parameters
    ----------
    block
        Bytes that are already read.
    file
        The file, after `block`.
    """
    while not (match := re.search(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", block, re.DOTALL)):
        more = file.read(BLOCK)
        if not more:
            return b""
        block = block[-9:] + more
    return block[match.start() :]


def is_whole(path: Path) -> bool:
    """Whether a gzip file decompresses to its end with correct checksums, which DuckDB does not check."""
    faults = Counter[str]()
    with path.open("rb") as file:
        for _ in plain_blocks(file, faults):
            if faults:
                return False
    return not faults


def salvage(source: Path, scratch: Path, faults: Counter[str]) -> Path:
    """Write the readable parts of a broken file, decompressed, to a file in `scratch`; returns its path."""
    target = scratch / f"{source.name}.salvaged"
    with source.open("rb") as file, target.open("wb") as sink:
        for block in plain_blocks(file, faults):
            sink.write(block)
    return target
