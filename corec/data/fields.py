"""Fields of Amazon Review Data 2018, one parser each: a value, or the reason why there is none."""

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
    """What a field holds: its value, or None and the reason why there is none."""

    value: str | float | None
    fault: str = ""


def parse_price(text: str | None) -> Parsed:
    """Dollars of ``$12.99`` or ``$1,234.56``; none for a range, as in the paper, or for anything else."""
    text = (text or "").strip()
    if not text or text == "[]":
        return Parsed(None, "missing")
    if found := re.fullmatch(r"\$?\s*(\d[\d,]{0,14}(?:\.\d{1,4})?|\.\d{1,4})", text, re.ASCII):
        return Parsed(float(found[1].replace(",", "")))
    return Parsed(None, "range" if re.match(r"\$[\d,.]+\s*-\s*\$[\d,.]+", text) else "not a price")


def strings(text: str | None) -> list[str]:
    """The strings of a field that is a JSON list, or one plain string, or empty."""
    text = (text or "").strip()
    if text.startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        return [entry for entry in found if isinstance(entry, str) and entry.strip()]
    return [text] if text else []


def parse_rank(text: str | None) -> Parsed:
    """The best rank among ``>#1,234 in Electronics (See Top 100 …)``, one string or a list of them."""
    entries = strings(text)
    if not entries:
        return Parsed(None, "missing")
    found = [match[1] for entry in entries if (match := re.match(r"\W*(\d[\d,]{0,14})(?: Paid| Free)? in\b", entry, re.ASCII))]
    ranks = [number for digits in found if (number := int(digits.replace(",", ""))) > 0]
    return Parsed(float(min(ranks))) if ranks else Parsed(None, "not a rank")


def parse_title(text: str | None) -> Parsed:
    """The title without tags and entities; none when a script or a style sheet stands in its place."""
    text = (text or "").strip()
    if not text:
        return Parsed(None, "missing")
    if re.search(r"<script|function\s*\(|\{[^}]*:[^}]*;", text, re.IGNORECASE):
        return Parsed(None, "script or style")
    text = plain(text)
    return Parsed(text) if text else Parsed(None, "only markup")


def plain(text: str) -> str:
    """Text without entities, tags (also one that was cut off) and double spaces."""
    if "<" in text or "&" in text:
        text = re.sub(r"<[a-zA-Z/!][^<>]{0,2000}(?:>|$)", " ", html.unescape(text))
    return " ".join(text.split())


def parse_brand(text: str | None, normalise: bool = False) -> Parsed:
    """The brand; `normalise` drops ``by``, case and double spaces, and takes ``Unknown`` for none."""
    text = plain(text or "")
    if normalise:
        text = re.sub(r"^(?:visit the|by)(?:\s+|$)", "", text.casefold()).strip(" .,;:-")
    if not text or (normalise and text in ("unknown", "n/a", "na", "none", "generic", "no brand", "unbranded")):
        return Parsed(None, "missing")
    return Parsed(text) if len(text) <= 100 and "{" not in text else Parsed(None, "not a brand")


def parse_category(text: str | None) -> Parsed:
    """The leaf of the category list, without entities.

    In many lists lines of the description follow the categories; the first entry that reads like one (a sentence,
    more than six words, a percentage) ends the list.
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
    """A parsed column: its values, None or NaN where there is none, and how many rows have which fault."""

    values: pd.Series
    faults: Counter[str]


def parse_column(column: pa.Array, parse: Callable[[str | None], Parsed]) -> Column:
    """Parse every distinct text of a column once."""
    encoded = column.dictionary_encode("encode")
    texts = encoded.dictionary.to_pylist()
    values, reasons = zip(*map(parse, texts), strict=True) if texts else ((), ())
    rows = np.bincount(encoded.indices, minlength=len(texts))
    faults = Counter[str]()
    for reason, count in zip(reasons, rows.tolist(), strict=True):
        if reason:
            faults[reason] += count
    return Column(pa.array(values).take(encoded.indices).to_pandas(), faults)
