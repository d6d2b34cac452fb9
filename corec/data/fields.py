"""Parsers of the fields of Amazon Review Data 2018: each returns a value, or the reason why there is none."""

import html
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa


class Parsed(NamedTuple):
    """Result of a parser: the value, or None and the reason."""

    value: str | float | None
    fault: str = ""


def parse_price(text: str | None) -> Parsed:
    """Price in dollars from ``$12.99`` or ``$1,234.56``; None for a range, as in the paper, and for any other text."""
    text = (text or "").strip()
    if not text or text == "[]":
        return Parsed(None, "missing")
    if match := re.fullmatch(r"\$?\s*(\d[\d,]{0,14}(?:\.\d{1,4})?|\.\d{1,4})", text, re.ASCII):
        return Parsed(float(match[1].replace(",", "")))
    return Parsed(None, "range" if re.match(r"\$[\d,.]+\s*-\s*\$[\d,.]+", text) else "not a price")


def strings(text: str | None) -> list[str]:
    """Strings of a field that is a JSON list, one plain string, or empty."""
    text = (text or "").strip()
    if text.startswith("["):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        return [entry for entry in entries if isinstance(entry, str) and entry.strip()]
    return [text] if text else []


def parse_rank(text: str | None) -> Parsed:
    """Smallest rank among entries like ``>#1,234 in Electronics (See Top 100 …)``, one string or a list of them."""
    entries = strings(text)
    if not entries:
        return Parsed(None, "missing")
    texts = [match[1] for entry in entries if (match := re.match(r"\W*(\d[\d,]{0,14})(?: Paid| Free)? in\b", entry, re.ASCII))]
    ranks = [number for digits in texts if (number := int(digits.replace(",", ""))) > 0]
    return Parsed(float(min(ranks))) if ranks else Parsed(None, "not a rank")


def parse_title(text: str | None) -> Parsed:
    """Title without tags and entities; None if the field holds a script or a style sheet."""
    text = (text or "").strip()
    if not text:
        return Parsed(None, "missing")
    if re.search(r"<script|function\s*\(|\{[^}]*:[^}]*;", text, re.IGNORECASE):
        return Parsed(None, "script or style")
    text = plain(text)
    return Parsed(text) if text else Parsed(None, "only markup")


def plain(text: str) -> str:
    """Text without entities, tags (also a tag cut off at the end) and repeated spaces."""
    if "<" in text or "&" in text:
        text = re.sub(r"<[a-zA-Z/!][^<>]{0,2000}(?:>|$)", " ", html.unescape(text))
    return " ".join(text.split())


def parse_brand(text: str | None, normalise: bool = False) -> Parsed:
    """Brand name; None if missing, or if the field holds something else.

    `normalise` removes case, a leading ``by`` or ``visit the`` and repeated spaces, and treats ``unknown``, ``generic`` and the
    like as missing.
    """
    text = plain(text or "")
    if normalise:
        text = re.sub(r"^(?:visit the|by)(?:\s+|$)", "", text.casefold()).strip(" .,;:-")
    if not text or (normalise and text in ("unknown", "n/a", "na", "none", "generic", "no brand", "unbranded")):
        return Parsed(None, "missing")
    return Parsed(text) if len(text) <= 100 and "{" not in text else Parsed(None, "not a brand")


def parse_category(text: str | None) -> Parsed:
    """Last category of the category list, without entities.

    In many lists, lines of the description follow the categories. The list is cut at the first entry that reads like a
    description: a sentence, more than six words or 60 characters, or one of ``% < {``.
    """
    leaf = None
    for entry in strings(text):
        name = plain(entry)
        if re.search(r"[.!?]$|[.!?] |[%<{]", name) or len(name) > 60 or len(name.split()) > 6:
            break
        leaf = name or leaf
    return Parsed(leaf) if leaf else Parsed(None, "missing")


FIELDS = ("asin", "title", "brand", "rank", "price", "category")

PARSERS = {"title": parse_title, "rank": parse_rank, "price": parse_price, "category": parse_category}


class Column(NamedTuple):
    """A parsed column: its values (None or NaN if missing), and the number of rows by fault."""

    values: pd.Series
    faults: Counter[str]


def parse_column(column: pa.Array, parse: Callable[[str | None], Parsed]) -> Column:
    """Parse a column; each distinct text is parsed once."""
    encoded = column.dictionary_encode("encode")
    texts = encoded.dictionary.to_pylist()
    values, reasons = zip(*map(parse, texts), strict=True) if texts else ((), ())
    rows = np.bincount(encoded.indices, minlength=len(texts))
    faults = Counter[str]()
    for reason, count in zip(reasons, rows.tolist(), strict=True):
        if reason:
            faults[reason] += count
    return Column(pa.array(values).take(encoded.indices).to_pandas(), faults)
