"""Requests in free text: labelled sentences, the quality of parsed requests, and comparisons with an item.

A parsed request is a mapping from the name of an attribute to the set of its labels, such as ``{"genre": {"Comedy"}}``.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from corec.controls import Vocabulary

Request = dict[str, set[str]]
FOLDER = Path(__file__).parent
TYPOS = 0.3  # share of the words
SETS = ("templates, known", "templates, new", "typos", "hand-written")


class Sentence(NamedTuple):
    """A labelled request in free text."""

    text: str
    request: Request


@functools.cache
def phrases() -> dict[str, Any]:
    """Content of ``phrases.yaml``: by attribute, by label, the ``known`` and ``new`` phrases; and the ``frames``."""
    read: dict[str, Any] = yaml.safe_load((FOLDER / "phrases.yaml").read_text())
    return read


def values(vocabulary: Vocabulary) -> list[tuple[Any, str]]:
    """Attribute and label of every value, in the order of the vocabulary."""
    return [(vocabulary.attributes[vocabulary.attribute_of[place]], label) for place, label in enumerate(vocabulary.labels)]


def hand_written() -> list[Sentence]:
    """The sentences of ``sentences.yaml``."""
    rows = yaml.safe_load((FOLDER / "sentences.yaml").read_text())
    found = []
    for row in rows:
        labels = {name: value if isinstance(value, list) else [value] for name, value in row.items() if name != "text"}
        found.append(Sentence(row["text"], {name: set(map(str, value)) for name, value in labels.items()}))
    return found


def write(labels: Mapping[str, str], part: str, rng: np.random.Generator) -> str:
    """A sentence with the constraints `labels` (label by attribute), from a random frame and phrases; without any, ``open``."""
    read = phrases()
    if not labels:
        return str(rng.choice(read["frames"]["open"]))
    words = [str(rng.choice(read[attribute][label][part])) for attribute, label in labels.items()]
    return str(rng.choice(read["frames"][part])).format(", ".join(words))


def made(count: int, part: str, seed: int) -> list[Sentence]:
    """Sentences made from frames and phrases: one to three constraints of different attributes each.

    Parameters
    ----------
    count
        Number of sentences.
    part
        ``known`` or ``new``: which frames and phrases.
    seed
        Seed of the choice.
    """
    rng, read, found = np.random.default_rng([seed, 14, len(part)]), phrases(), []
    attributes = [name for name in read if name != "frames"]
    for _ in range(count):
        chosen = rng.permutation(attributes)[: rng.integers(1, 4)].tolist()
        labels = {attribute: str(rng.choice(list(map(str, read[attribute])))) for attribute in chosen}
        found.append(Sentence(write(labels, part, rng), {attribute: {label} for attribute, label in labels.items()}))
    return found


def with_typos(text: str, share: float, rng: np.random.Generator) -> str:
    """The text with one typo in a share of its words of four letters or more: letters exchanged, left out, or doubled."""

    def change(match: re.Match[str]) -> str:
        word = match[0]
        if len(word) < 4 or not word.isalpha() or rng.random() >= share:
            return word
        place, how = int(rng.integers(1, len(word) - 1)), rng.integers(3)
        if how == 0:
            return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        return word[:place] + (word[place] * 2 if how == 1 else "") + word[place + 1 :]

    return re.sub(r"\w+", change, text)


def sets(count: int, seed: int) -> dict[str, list[Sentence]]:
    """Labelled sentences by :data:`SETS`: `count` of known phrases, of new ones, of these with typos, and those by hand."""
    new, rng = made(count, "new", seed), np.random.default_rng([seed, 16])
    typed = [sentence._replace(text=with_typos(sentence.text, TYPOS, rng)) for sentence in new]
    return dict(zip(SETS, [made(count, "known", seed), new, typed, hand_written()], strict=True))


def pairs(request: Request) -> set[tuple[str, str]]:
    """Attribute and label of every constraint of a request."""
    return {(name, label) for name, labels in request.items() for label in labels}


def accuracy(sentences: Sequence[Sentence], parsed: Sequence[Request]) -> dict[str, float]:
    """Exact match, and precision, recall and F1 of the single constraints, over all sentences."""
    gold, found = [pairs(part.request) for part in sentences], [pairs(request) for request in parsed]
    right, told, asked = (sum(map(len, part)) for part in ([a & b for a, b in zip(gold, found, strict=True)], found, gold))
    precision, recall = right / max(told, 1), right / max(asked, 1)
    exact = float(np.mean([one == other for one, other in zip(gold, found, strict=True)]))
    f1 = 2 * precision * recall / max(precision + recall, 1e-9)
    return {"exact": exact, "precision": precision, "recall": recall, "f1": f1}


def by_attribute(sentences: Sequence[Sentence], parsed: Sequence[Request]) -> dict[str, float]:
    """Share of the sentences whose labels of an attribute, or their absence, are all right, by attribute."""
    names = [name for name in phrases() if name != "frames"]
    pairs = list(zip(sentences, parsed, strict=True))
    return {name: float(np.mean([part.request.get(name) == request.get(name) for part, request in pairs])) for name in names}


def to_values(requests: Iterable[Request], vocabulary: Vocabulary) -> np.ndarray:
    """Value numbers [requests, n] of parsed requests, padded with -1; labels that no item has are left out."""
    number = {(attribute.name, label): place for place, (attribute, label) in enumerate(values(vocabulary))}
    pairs = [[(name, label) for name, labels in request.items() for label in sorted(labels)] for request in requests]
    rows = [[number[pair] for pair in row if pair in number] for row in pairs]
    table = np.full((len(rows), max(1, *map(len, rows))), -1)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


# A reference item and a comparison: the attribute, and whether the value wanted has a larger number than that of the item.
COMPARISONS: Mapping[str, tuple[str, bool]] = {
    "older": ("era", False), "newer": ("era", True), "more popular": ("popularity", False), "less known": ("popularity", True),
    "better rated": ("rating", True), "cheaper": ("price", False), "more expensive": ("price", True),
}  # fmt: skip
LIKE = re.compile(r"(?:similar to|like) (?P<title>.+?),? but (?P<how>" + "|".join(COMPARISONS) + r")\b", re.IGNORECASE)


class Reference(NamedTuple):
    """A request by comparison with an item: `item`, and the values that meet it, from the nearest to the farthest."""

    item: int
    values: list[int]


def compare_to_item(text: str, titles: Sequence[str], vocabulary: Vocabulary) -> Reference | None:
    """Parse "similar to X but older": the item with the most similar title, and the values on that side of its own.

    Parameters
    ----------
    text
        The sentence.
    titles
        Titles of the items 1 … n.
    vocabulary
        Attributes and values; the buckets of a numeric attribute are in ascending order.

    Returns
    -------
    None if the sentence has no such form, no title is similar, the scheme lacks the attribute, or the item its value.
    """
    match = LIKE.search(text)
    if match is None:
        return None
    folded = [title.lower() for title in titles]
    near = difflib.get_close_matches(match["title"].lower().strip("'\" "), folded, 1, 0.6)
    name, larger = COMPARISONS[match["how"].lower()]
    numbers = [place for place, (attribute, _) in enumerate(values(vocabulary)) if attribute.name == name]
    if not near or not numbers:
        return None
    item = folded.index(near[0]) + 1
    own = [value for value in vocabulary.values_of[item].tolist() if value in numbers]
    if not own:
        return None
    side = [value for value in numbers if value > own[0]] if larger else [value for value in reversed(numbers) if value < own[0]]
    return Reference(item, side)
