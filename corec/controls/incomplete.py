"""Incomplete and wrong metadata: a vocabulary in which values of items are unknown, or those of other items."""

import dataclasses

import numpy as np

from corec.controls.pools import Vocabulary


def padded(values: np.ndarray) -> np.ndarray:
    """Sort each row of `values` [items + 1, slots] in ascending order, with -1 last, and drop empty columns."""
    last = np.iinfo(values.dtype).max
    ordered = np.sort(np.where(values < 0, last, values), axis=1)
    ordered[ordered == last] = -1
    return ordered[:, : max(1, int((ordered >= 0).any(axis=0).sum()))]


def hide(vocabulary: Vocabulary, share: float, seed: int) -> Vocabulary:
    """Make a random part of the pairs of an item and an attribute unknown.

    The pairs that are unknown with one share are unknown with all larger shares and the same seed.

    Parameters
    ----------
    vocabulary
        All values.
    share
        Share of the pairs, between 0 and 1. All values of a pair become unknown.
    seed
        Seed of the choice.
    """
    shape = (len(vocabulary.values_of), len(vocabulary.attributes))
    unknown = np.random.default_rng([seed, 7]).random(shape) < share
    hidden = np.take_along_axis(unknown, vocabulary.kind(vocabulary.values_of).clip(min=0), axis=1)
    return dataclasses.replace(vocabulary, values_of=padded(np.where(hidden, -1, vocabulary.values_of)))


def without(vocabulary: Vocabulary, values: np.ndarray) -> Vocabulary:
    """The vocabulary in which no item has the `values` [values], a mask; their labels stay."""
    kept = (vocabulary.values_of >= 0) & ~values[vocabulary.values_of]
    return dataclasses.replace(vocabulary, values_of=padded(np.where(kept, vocabulary.values_of, -1)))


def corrupt(vocabulary: Vocabulary, share: float, seed: int) -> Vocabulary:
    """Replace the values of a random part of the pairs of an item and an attribute by other ones.

    The wrong values are those that a random other item has of the attribute, so frequent values stay frequent. They have none in
    common with the true ones if an item with such values is found. The pairs that are wrong with one share are wrong with all
    larger shares and the same seed.

    Parameters
    ----------
    vocabulary
        All values.
    share
        Share of the known pairs, between 0 and 1.
    seed
        Seed of the choice.
    """
    known, kinds, parts = vocabulary.known(), vocabulary.kind(vocabulary.values_of), []
    for number in range(len(vocabulary.attributes)):
        rng = np.random.default_rng([seed, 8, number])
        values = padded(np.where(kinds == number, vocabulary.values_of, -1))
        donors, changed = np.flatnonzero(known[:, number]), values.copy()
        left = np.flatnonzero(known[:, number] & (rng.random(len(values)) < share))
        for _ in range(100 if len(donors) else 0):
            changed[left] = values[rng.choice(donors, len(left))]
            same = changed[left][:, :, None] == values[left][:, None]
            left = left[(same & (changed[left] >= 0)[:, :, None]).any(axis=(1, 2))]
        parts.append(changed)
    return dataclasses.replace(vocabulary, values_of=padded(np.concatenate(parts, axis=1)))
