"""Imputers: the probability of each value of an item whose metadata lacks it, from its title or from other items.

Each function returns guesses [items + 1, values] between 0 and 1 for all items; :func:`filled` uses them where an attribute is
unknown.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold

from corec.controls import Vocabulary
from corec.data import tagger
from corec.evidence.text import weighted_words

TAGS = 30  # largest number of values of an attribute that the tagger chooses from


def table(vocabulary: Vocabulary) -> np.ndarray:
    """Whether each item has each value [items + 1, values], 0 or 1."""
    found = np.zeros((len(vocabulary.values_of), len(vocabulary.labels)), np.float32)
    items, slots = np.nonzero(vocabulary.values_of >= 0)
    found[items, vocabulary.values_of[items, slots]] = 1
    return found


def filled(vocabulary: Vocabulary, guesses: np.ndarray) -> np.ndarray:
    """Known values as 0 or 1, and `guesses` for attributes without a value [items + 1, values]."""
    return np.where(vocabulary.known()[:, vocabulary.attribute_of], table(vocabulary), guesses)


def most_frequent(vocabulary: Vocabulary) -> np.ndarray:
    """For every item, the value of each attribute that most items have."""
    guesses, frequency = np.zeros((len(vocabulary.values_of), len(vocabulary.labels)), np.float32), vocabulary.frequency()
    for number in range(len(vocabulary.attributes)):
        values = np.flatnonzero(vocabulary.attribute_of == number)
        if frequency[values].any():
            guesses[:, values[frequency[values].argmax()]] = 1
    return guesses


def probabilities(words: Any, shown: np.ndarray, others: Any, inverse_penalty: float) -> np.ndarray:
    """Probabilities of values by one logistic regression each; scaled to the sum 1 if no item has several values.

    Parameters
    ----------
    words, others
        Features of the items to fit, and of those to predict, sparse.
    shown
        Values of the items to fit [items, values], 0 or 1. The probability of a value that none or all of them have is 0 or 1.
    inverse_penalty
        Parameter ``C`` of the regression.
    """
    found = np.tile(shown.mean(axis=0), (others.shape[0], 1))
    for value in np.flatnonzero((found[0] > 0) & (found[0] < 1)):
        model = LogisticRegression(C=inverse_penalty, solver="liblinear").fit(words, shown[:, value])
        found[:, value] = model.predict_proba(others)[:, 1]
    return found / np.maximum(found.sum(axis=1, keepdims=True), 1e-9) if shown.sum(axis=1).max() == 1 else found


def by_words(
    vocabulary: Vocabulary,
    titles: Sequence[str],
    with_values: bool = False,
    folds: int = 0,
    inverse_penalty: float = 10.0,
) -> np.ndarray:
    """Probabilities by logistic regression on the TF-IDF of the words and pairs of words of the titles.

    The regressions of an attribute (see :func:`probabilities`) are fitted to the items that have a value of it. If the titles
    have no words, all probabilities are 0.

    Parameters
    ----------
    vocabulary
        Known values.
    titles
        Titles of the items 1 … n.
    with_values
        The known values of the other attributes are also features, 0 or 1.
    folds
        If not 0, the probabilities of items that have a value come from regressions fitted to other items, in so many parts.
    inverse_penalty
        Parameter ``C`` of the regression.
    """
    known, labels = vocabulary.known()[1:], table(vocabulary)
    guesses = np.zeros_like(labels)
    if not any(re.search(r"\w", title) for title in titles):
        return guesses
    words = weighted_words(titles)
    for number in range(len(vocabulary.attributes)):
        own = vocabulary.attribute_of == number
        values, rows = np.flatnonzero(own), np.flatnonzero(known[:, number])
        if not len(rows):
            continue
        features = sparse.hstack([words, labels[1:, ~own]], format="csr") if with_values else words
        shown = labels[1:][rows][:, values]
        guesses[1:, values] = probabilities(features[rows], shown, features, inverse_penalty)
        if 0 < folds <= len(rows):
            for fit, held in KFold(folds, shuffle=True, random_state=0).split(rows):
                found = probabilities(features[rows[fit]], shown[fit], features[rows[held]], inverse_penalty)
                guesses[np.ix_(1 + rows[held], values)] = found
    return guesses


def nearest(vocabulary: Vocabulary, embeddings: np.ndarray, block: int = 1000) -> np.ndarray:
    """Values of the item with the most similar title among those that have the attribute.

    Parameters
    ----------
    vocabulary
        Known values.
    embeddings
        Embeddings of the titles [items + 1, width], of length 1 (see :func:`corec.evidence.text.title_embeddings`).
    block
        Items at a time.
    """
    known, labels = vocabulary.known(), table(vocabulary)
    guesses = np.zeros_like(labels)
    for number in range(len(vocabulary.attributes)):
        values, donors = np.flatnonzero(vocabulary.attribute_of == number), np.flatnonzero(known[:, number])
        for start in range(1, len(labels) if len(donors) else 0, block):
            rows = np.arange(start, min(start + block, len(labels)))
            best = donors[(embeddings[rows] @ embeddings[donors].T).argmax(axis=1)]
            guesses[np.ix_(rows, values)] = labels[np.ix_(best, values)]
    return guesses


def tagged(vocabulary: Vocabulary, titles: Sequence[str], backbone: str) -> np.ndarray:
    """Value that a language model finds most likely after the title, without training (:func:`corec.data.tagger.tag`).

    Attributes with more than :data:`TAGS` values have no guess, because each value of each title needs a pass of the model.
    """
    guesses = np.zeros((len(vocabulary.values_of), len(vocabulary.labels)), np.float32)
    for number, attribute in enumerate(vocabulary.attributes):
        values = np.flatnonzero(vocabulary.attribute_of == number)
        if len(values) <= TAGS:
            names = [vocabulary.labels[value] for value in values]
            found = tagger.tag(titles, names, backbone, prompt=("Title:", f"\n{attribute.name.capitalize()}:"))
            guesses[np.arange(1, len(guesses)), [values[names.index(name)] for name in found]] = 1
    return guesses


def decided(vocabulary: Vocabulary, guesses: np.ndarray) -> np.ndarray:
    """Turn probabilities into values (0 or 1): those of at least a half, or else the most probable one of the attribute."""
    values = (guesses >= 0.5).astype(np.float32)
    for number in range(len(vocabulary.attributes)):
        own = np.flatnonzero(vocabulary.attribute_of == number)
        if len(own):
            part = guesses[:, own]
            best = (np.arange(len(own)) == part.argmax(axis=1)[:, None]) & (part > 0)
            values[:, own] = np.where((part >= 0.5).any(axis=1, keepdims=True), part >= 0.5, best)
    return values


def accuracy(vocabulary: Vocabulary, known: Vocabulary, values_of: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Share of the guesses that are true, over the hidden pairs of an item and an attribute.

    A guess is the value with the highest probability. Several guessed values of a pair count in equal parts. A pair without a
    guess is an error.

    Parameters
    ----------
    vocabulary, known
        True and known values.
    values_of
        Values or probabilities [items + 1, values] by imputer.

    Returns
    -------
    One row for each attribute with hidden values, one column for each imputer.
    """
    truth, hidden, rows = table(vocabulary), vocabulary.known() & ~known.known(), {}
    for number, attribute in enumerate(vocabulary.attributes):
        pairs = np.ix_(np.flatnonzero(hidden[:, number]), np.flatnonzero(vocabulary.attribute_of == number))
        if len(pairs[0]):
            best = {
                name: (part[pairs] > 0) & (part[pairs] == part[pairs].max(1, keepdims=True)) for name, part in values_of.items()
            }
            rows[attribute.name] = {
                name: float(((truth[pairs] * part).sum(axis=1) / np.maximum(part.sum(axis=1), 1)).mean())
                for name, part in best.items()
            }
    return pd.DataFrame.from_dict(rows, orient="index")
