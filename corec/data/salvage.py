"""Broken gzip files: what is whole in them, member by member."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from isal import isal_zlib
from isal.igzip_lib import IsalError

BLOCK = 1 << 16  # bytes read from a file at a time
GZIP = b"\x1f\x8b\x08"  # how every gzip member begins


def plain_blocks(file: BinaryIO, faults: Counter[str]) -> Iterator[bytes]:
    """The file's bytes, decompressed where it is gzip; after a fault, from the next member on.

    What a block of `BLOCK` packed bytes held is lost with a fault in it; a fault counts once, however many bytes
    after it look like the beginning of a member.
    """
    rest = file.read(BLOCK)
    if not rest.startswith(GZIP):
        while rest:
            yield rest
            rest = file.read(BLOCK)
    whole = True  # since the last fault, something could be read
    while rest:  # one member a turn
        engine = isal_zlib.decompressobj(wbits=31)
        try:
            while True:
                text = engine.decompress(rest)
                whole = whole or bool(text)
                yield text
                if engine.eof:
                    break
                rest = file.read(BLOCK)
                if not rest:
                    faults["gzip file cut short"] += 1
                    return
            rest = engine.unused_data.lstrip(b"\0")
            while not rest and (more := file.read(BLOCK)):  # a member may be followed by padding
                rest = more.lstrip(b"\0")
        except IsalError:  # type: ignore[misc]  # (its stub makes an instance of it)
            faults["gzip member broken"] += whole
            whole = False
            yield b"\n"  # ends the line that was cut
            rest = next_member(rest[1:], file)


def next_member(block: bytes, file: BinaryIO) -> bytes:
    """Bytes from what looks like the next gzip member on; empty at the end of the file."""
    while not (found := re.search(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", block, re.DOTALL)):
        more = file.read(BLOCK)
        if not more:
            return b""
        block = block[-9:] + more
    return block[found.start() :]


def is_whole(path: Path) -> bool:
    """Whether a gzip file decompresses to its end and its checksums are right (DuckDB does not look at them)."""
    faults = Counter[str]()
    with path.open("rb") as file:
        for _ in plain_blocks(file, faults):
            if faults:
                return False
    return not faults


def salvage(source: Path, scratch: Path, faults: Counter[str]) -> Path:
    """A plain copy in `scratch` of what can be read of a broken file."""
    target = scratch / f"{source.name}.salvaged"
    with source.open("rb") as file, target.open("wb") as sink:
        for block in plain_blocks(file, faults):
            sink.write(block)
    return target
