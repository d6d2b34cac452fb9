"""Stage 01 as a whole: from the files of a source to the tables."""

import pandas as pd

from corec import CorecError
from corec.data.sources import find_source
from corec.data.split import describe_items, make_windows, split_by_time
from corec.data.tables import Raw, Tables, filled
from corec.params import DataParams


def prepare(params: DataParams) -> Tables:
    """Make all tables of stage 01: download, read, split, and build the windows.

    Raises
    ------
    CorecError
        If a file cannot be downloaded or read, a parameter does not fit the source, or no interaction is left.
    """
    source = find_source(params)
    raw = source.read(source.files(params), params)
    if raw.interactions.empty:
        raise CorecError(nothing_left(raw, params))
    interactions = split_by_time(raw.interactions, params)
    items = describe_items(raw.catalogue.drop(columns="complete"), interactions)
    replaced = items.pop("title_from").value_counts()
    items = fill_categories(items, params)
    columns = ["user", "user_id", "item", "rating", "timestamp", "position", "split"]
    counts = dict(raw.dirt) | {("title", f"replaced by the item's {name}"): int(count) for name, count in replaced.items()}
    dirt = pd.DataFrame([(*reason, count) for reason, count in counts.items()], columns=["file", "reason", "rows"])
    return Tables(interactions[columns], items, make_windows(interactions, params), raw.catalogue, dirt)


def nothing_left(raw: Raw, params: DataParams) -> str:
    """Return a message that explains why no interaction is left, with the counts at each step."""
    items = raw.catalogue
    known = {name: int(filled(items[name]).sum()) for name in params.required}
    whole = int(items["complete"].sum())
    left_out = [
        f"{count:,} {reason}" for (file, reason), count in raw.dirt.items() if count and file in ("interactions", "reviews")
    ]
    text = f"No interaction of {params.dataset!r} is left: {len(items):,} items were read, {whole:,} of them complete"
    if known:
        text += f" ({', '.join(f'{count:,} have {name}' for name, count in known.items())})"
    if left_out:
        text += f"; interactions left out: {', '.join(left_out)}"
    if known and not whole:
        return f"{text}: take {min(known, key=known.__getitem__)!r} out of data.required."
    return f"{text}: shorten data.required, or lower data.min_interactions or data.core."


def category_tags(items: pd.DataFrame, params: DataParams) -> list[str]:
    """Return the tags that the tagger chooses from: `data.tags`, or the 20 most frequent categories of the metadata."""
    return params.tags or items.loc[items["category_from"] == "metadata", "category"].value_counts().index[:20].tolist()


def fill_categories(items: pd.DataFrame, params: DataParams) -> pd.DataFrame:
    """Add the categories that the metadata lacks, as predicted by the tagger, if `data.tagger` is set.

    Parameters
    ----------
    items
        The items table.
    params
        Parameters of stage 01.

    Returns
    -------
    The items with the additional column ``category_from``: ``metadata`` or ``tagger``. Unchanged without a tagger.

    Raises
    ------
    CorecError
        If the items have no category column, or there are fewer than two tags to choose from.
    """
    if params.tagger is None:
        return items
    if "category" not in items:
        raise CorecError("Parameter data.tagger: the items of this source have no category: leave it empty.")
    missing = items["category"].isna()
    items = items.assign(category_from=pd.Series("metadata", items.index, dtype=object).mask(missing))
    tags = category_tags(items, params)
    if len(tags) < 2:
        raise CorecError("Parameter data.tags is empty and the metadata names no categories: list those to choose from.")
    from corec.data import tagger  # imports torch, which the rest of stage 01 does not need

    print(f"tagging {missing.sum()} of {len(items)} items with {params.tagger}", flush=True)
    items.loc[missing, "category"] = tagger.tag(items.loc[missing, "title"].tolist(), tags, params.tagger)
    items.loc[missing, "category_from"] = "tagger"
    return items


def tagger_quality(tables: Tables, params: DataParams) -> dict[str, float] | None:
    """Accuracy of the tagger on items with a known category (see :func:`corec.data.tagger.quality`); None without a tagger."""
    if params.tagger is None:
        return None
    from corec.data import tagger

    return tagger.quality(tables.items, category_tags(tables.items, params), params.tagger)._asdict()
