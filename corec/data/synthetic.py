"""Synthetic files in the format of Amazon Review Data 2018, with planted user preferences (tastes).

For tests and timings only. The tastes are known, so tests can check that the pipeline recovers them. An attribute without a
planted taste has the same bucket for every item.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

# Lower edges of the scheme's buckets, and the upper edge of the last bucket.
EDGES = {"price": (1, 10, 15, 25, 50, 100, 1500), "rank": (1, 4, 6, 11, 51, 101, 201, 501, 90_000)}
NOUNS = "Shampoo Lamp Kettle Camera Blanket Backpack Keyboard Perfume Puzzle Drill Notebook Teapot".split()
WORDS = (
    "the a this it is was and but with for very good great works well price quality fast arrived box broke after "
    "month love use easy color size small large would buy again not sure gift friend perfect cheap sturdy light"
).split()
TASTES = ("price", "brand", "rank", "category")


def lines_of_text(rng: np.random.Generator) -> str:
    """About one megabyte of random words from which texts are cut; word frequencies follow Zipf's law."""
    share = 1 / np.arange(1, len(WORDS) + 1)
    return " ".join(rng.choice(WORDS, 220_000, p=share / share.sum()))


def write_gzip(path: Path, lines: Iterable[str]) -> None:
    """Write lines as one gzip member, in blocks of 20,000 lines."""
    engine, block = zlib.compressobj(1, wbits=31), []
    with path.open("wb") as file:
        for number, line in enumerate(lines):
            block.append(line)
            if number % 20_000 == 19_999:
                file.write(engine.compress("".join(block).encode()))
                block = []
        file.write(engine.compress("".join(block).encode()) + engine.flush())


def attributes(items: int, brands: int, tastes: tuple[str, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw the attribute values of all items.

    Parameters
    ----------
    items, brands
        Number of items and of brands.
    tastes
        Attributes with a planted taste.
    rng
        Random generator.

    Returns
    -------
    Value index of each item [items], by attribute; 0 for all items without a planted taste.
    """
    sizes = {"price": len(EDGES["price"]) - 1, "brand": brands, "rank": len(EDGES["rank"]) - 1, "category": len(NOUNS)}
    return {name: rng.integers(0, size if name in tastes else 1, items) for name, size in sizes.items()}


def metadata(values: dict[str, np.ndarray], text: str, rng: np.random.Generator) -> Iterator[str]:
    """Lines of the metadata file, with the fields of the official file and a few kilobytes each."""
    items = len(values["price"])
    starts, lengths = rng.integers(0, len(text) - 4000, items), rng.integers(300, 2500, items)
    bounds = {name: (np.take(edges, values[name]), np.take(edges, values[name] + 1)) for name, edges in EDGES.items()}
    prices, ranks = (rng.uniform(*bounds[name]) for name in ("price", "rank"))
    related = rng.integers(0, items, (items, 30))
    for item in range(items):
        noun, brand = NOUNS[values["category"][item]], f"Brand {values['brand'][item]}"
        others = [asin(other) for other in related[item]]
        yield json.dumps({
            "category": ["Synthetic", f"{noun}s &amp; more"], "tech1": "", "fit": "", "tech2": "", "brand": brand,
            "description": [text[starts[item] : starts[item] + lengths[item]]], "title": f"{brand} {noun} {item}",
            "also_buy": others[:20], "feature": [text[starts[item] : starts[item] + 80]], "also_view": others[20:],
            "rank": [f">#{int(ranks[item]):,} in Synthetic (See Top 100 in Synthetic)", ">#99,999 in All"],
            "main_cat": "Synthetic", "similar_item": "", "date": "", "price": f"${np.floor(100 * prices[item]) / 100:,.2f}",
            "asin": asin(item), "imageURL": [], "imageURLHighRes": [],
        }) + "\n"  # fmt: skip


def asin(item: int) -> str:
    """Item id of ten characters, the format of Amazon."""
    return f"B{item:09d}"


def sequences(
    users: int, reviews: int, values: dict[str, np.ndarray], tastes: tuple[str, ...], strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw user and item of each review.

    Each user has one planted attribute and one preferred value of it. With probability `strength`, the item of a review is
    drawn uniformly from the items with that value; otherwise by popularity (Zipf, exponent 0.8).

    Parameters
    ----------
    users, reviews
        Number of users, and approximate number of reviews.
    values
        Value index of each item, by attribute (see :func:`attributes`).
    tastes
        Attributes with a planted taste.
    strength
        Probability that a review follows the taste.
    rng
        Random generator.

    Returns
    -------
    Users and items [reviews], sorted by user.
    """
    items = len(values["price"])
    activity = rng.lognormal(0, 1.3, users)
    lengths = np.maximum(1, np.round(activity / activity.sum() * reviews)).astype(int)
    who = np.repeat(np.arange(users), lengths)
    popularity = 1 / np.arange(1, items + 1) ** 0.8
    chosen = np.searchsorted(np.cumsum(popularity / popularity.sum()), rng.random(len(who))).clip(max=items - 1)
    cares_for = rng.integers(0, max(1, len(tastes)), users)[who]
    follows = rng.random(len(who)) < strength
    for number, name in enumerate(tastes):
        order = np.argsort(values[name], kind="stable")  # items sorted by value
        bounds = np.searchsorted(values[name][order], np.arange(values[name].max() + 2))
        filled = np.flatnonzero(np.diff(bounds))
        favourite = rng.choice(filled, users)
        rows = np.flatnonzero(follows & (cares_for == number))
        first, last = bounds[favourite[who[rows]]], bounds[favourite[who[rows]] + 1]
        chosen[rows] = order[first + (rng.random(len(rows)) * (last - first)).astype(int)]
    return who, chosen


def review_lines(who: np.ndarray, items: np.ndarray, text: str, rng: np.random.Generator) -> Iterator[str]:
    """Lines of the review file, sorted by item as in the official file.

    Parameters
    ----------
    who, items
        User and item of each review [reviews], sorted by user. Consecutive reviews of a user are three days apart.
    text
        Words from which the texts are cut.
    rng
        Random generator.
    """
    place = np.arange(len(who)) - np.searchsorted(who, who)  # index of the review in its user's sequence
    times = 1_300_000_000 + 86_400 * (who % 700 + 3 * place)
    starts = rng.integers(0, len(text) - 6000, len(who))
    lengths = rng.lognormal(5.3, 0.9, len(who)).clip(20, 5000).astype(int)
    ratings = rng.choice([1, 2, 3, 4, 5], len(who), p=[0.08, 0.05, 0.09, 0.18, 0.6])
    for row in np.argsort(items, kind="stable").tolist():
        day, start = datetime.fromtimestamp(times[row], UTC), starts[row]
        yield (
            f'{{"overall": {ratings[row]}.0, "verified": true, "reviewTime": "{day:%m %d, %Y}", '
            f'"reviewerID": "A{who[row]:013d}", "asin": "{asin(items[row])}", "style": {{"Color:": " Black"}}, '
            f'"reviewerName": "User {who[row]}", "reviewText": "{text[start : start + lengths[row]]}", '
            f'"summary": "{text[start : start + 25]}", "unixReviewTime": {times[row]}}}\n'
        )


def write(
    folder: Path,
    users: int,
    items: int,
    reviews: int,
    brands: int = 40,
    tastes: tuple[str, ...] = TASTES,
    strength: float = 0.7,
    seed: int = 0,
) -> list[Path]:
    """Write ``Synthetic.json.gz`` (reviews) and ``meta_Synthetic.json.gz`` (items) to `folder`.

    Parameters
    ----------
    folder
        Folder of the files; created if missing.
    users, items, reviews, brands
        Numbers of each; the number of reviews is approximate (rounding, and at least one review per user).
    tastes
        Attributes with planted tastes, a subset of :data:`TASTES`.
    strength
        Share of reviews that follow a taste; the others follow popularity.
    seed
        Seed of the random generator.

    Returns
    -------
    Paths of the two files.
    """
    rng = np.random.default_rng([seed, 1])
    folder.mkdir(parents=True, exist_ok=True)
    text = lines_of_text(rng)
    values = attributes(items, brands, tastes, rng)
    files = [folder / "Synthetic.json.gz", folder / "meta_Synthetic.json.gz"]
    write_gzip(files[1], metadata(values, text, rng))
    who, chosen = sequences(users, reviews, values, tastes, strength, rng)
    write_gzip(files[0], review_lines(who, chosen, text, rng))
    return files
