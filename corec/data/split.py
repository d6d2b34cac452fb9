"""From raw interactions to the split, the items table and the windows."""

import numpy as np
import pandas as pd

from corec import CorecError
from corec.data.fields import plain
from corec.params import DataParams


def k_core(interactions: pd.DataFrame, core: int) -> pd.DataFrame:
    """Drop users and items with fewer than `core` interactions, repeatedly, until all have enough."""
    while True:
        counts = [interactions.groupby(name)[name].transform("size") for name in ("user_id", "item_id")]
        keep = (counts[0] >= core) & (counts[1] >= core)
        if keep.all():
            return interactions
        interactions = interactions[keep]


def split_by_time(interactions: pd.DataFrame, params: DataParams) -> pd.DataFrame:
    """Select users, sort their interactions by time, and assign each interaction to train, valid or test.

    Only the first interaction in the file of a user with an item is kept, unless `repeats`.

    ``paper``: users with at least `min_interactions`, of these the `max_users` with the most, their `latest` interactions; the
    first 80 % for training, then 10 % for validation and 10 % for testing (as in the authors' code: 50 records give 40/5/5).
    ``leave-one-out``: the `core`-core; the last interaction of each user for testing, the one before it for validation.

    The last `held_back` training interactions of each user, at most half of them, have the split ``held-back``.

    Parameters
    ----------
    interactions
        Columns ``user_id item_id rating timestamp``, in the file's order, which breaks ties in time.
    params
        Parameters of stage 01.

    Returns
    -------
    The columns above and ``user item position split``, sorted by user and time (see :mod:`corec.data.tables`).

    Raises
    ------
    CorecError
        If no user is left.
    """
    table = interactions if params.repeats else interactions.drop_duplicates(["user_id", "item_id"])
    steps = [(len(table), "interactions" if params.repeats else "distinct interactions")]
    if params.split == "paper":
        length = table.groupby("user_id")["user_id"].transform("size")
        table = table[length >= params.min_interactions]
        steps.append((table["user_id"].nunique(), f"users with {params.min_interactions} or more"))
        most = table["user_id"].value_counts(sort=False).sort_values(ascending=False, kind="stable")
        table = table[table["user_id"].isin(most.index[: params.max_users])]
        table = table.sort_values("timestamp", kind="stable").groupby("user_id").tail(params.latest).sort_index()
    else:
        table = k_core(table, params.core)
        steps.append((len(table), f"of users and items that keep {params.core} or more"))
    if table.empty:
        counts = ", ".join(f"{count:,} {what}" for count, what in steps)
        raise CorecError(
            f"No user of {params.dataset!r} is left under the split {params.split!r} ({counts}): "
            "lower data.min_interactions or data.core."
        )
    users, items = (pd.factorize(table[name])[0] for name in ("user_id", "item_id"))
    table = table.assign(user=users, item=items + 1).sort_values(["user", "timestamp"], kind="stable")
    by_user = table.groupby("user")["user"]
    position, length = by_user.cumcount(), by_user.transform("size")
    held_out = (0.1 * length).round().clip(lower=1) if params.split == "paper" else 1
    left = length - 2 * held_out  # training interactions
    held_back = np.minimum(params.held_back, left // 2)
    bounds = [position >= length - held_out, position >= left, position >= left - held_back]
    split = np.select(bounds, ["test", "valid", "held-back"], "train")
    return table.assign(position=position, split=split).reset_index(drop=True)


def describe_items(items: pd.DataFrame, interactions: pd.DataFrame) -> pd.DataFrame:
    """Table of the items that occur, with statistics of the training interactions only.

    Adds ``train_count``, ``popularity_rank`` (1 = most training interactions), ``category_rank`` (the same within the category,
    if there is one), ``mean_rating`` and ``rating_std`` (of at least 3 ratings); ratings are empty for items without training
    interactions, and ranks where training interactions or the category are missing. A missing title is replaced (see
    :func:`title_substitutes`); ``title_from`` names the replacement.

    Parameters
    ----------
    items
        All items of the source, with ``item_id`` and ``title``.
    interactions
        Result of :func:`split_by_time`.
    """
    ids = interactions.drop_duplicates("item")[["item", "item_id"]].sort_values("item")
    table = ids.merge(items, on="item_id", how="left", validate="one_to_one")
    train = interactions[interactions["split"] == "train"].groupby("item")["rating"]
    table = table.set_index("item").assign(train_count=train.size(), mean_rating=train.mean())
    table["rating_std"] = train.std().where(train.size() >= 3)
    table["popularity_rank"] = table["train_count"].rank(method="first", ascending=False)
    if "category" in table:
        table["category_rank"] = table.groupby("category")["train_count"].rank(method="first", ascending=False)
    table["train_count"] = table["train_count"].fillna(0).astype(int)
    texts = title_substitutes(table)
    missing = table["title"].isna()
    table["title"] = table["title"].where(~missing, texts["text"])
    table["title_from"] = texts["source"].where(missing)
    return table.drop(columns="description_start", errors="ignore").reset_index()


def title_substitutes(items: pd.DataFrame, length: int = 150) -> pd.DataFrame:
    """Replacements for missing titles: the start of the description, or else brand and category, as far as they are known.

    Returns
    -------
    Columns ``text`` (``untitled`` if nothing is known; a start of a description has at most `length` characters) and ``source``.
    """
    columns = {name: items[name] for name in ("description_start", "description", "brand", "category") if name in items}
    texts = {name: column.map(lambda text: plain(text) if isinstance(text, str) else "") for name, column in columns.items()}
    empty = pd.Series("", index=items.index)
    described = texts.get("description_start", texts.get("description", empty)).str[:length].str.strip()
    brand, category = texts.get("brand", empty), texts.get("category", empty)
    both = (brand + " " + category).str.strip()
    named = np.select(
        [(brand != "") & (category != ""), brand != "", category != ""], ["brand and category", "brand", "category"], ""
    )
    useful = described.str.contains(r"\w", regex=True)
    text = described.where(useful, both)
    source = pd.Series(np.where(useful, "description", named), index=items.index)
    unknown = text == ""
    return pd.DataFrame(
        {"text": text.mask(unknown, "untitled"), "source": source.mask(unknown, "untitled (nothing is known of it)")}
    )


def make_windows(interactions: pd.DataFrame, params: DataParams) -> pd.DataFrame:
    """Make the examples of the re-ranker: a target and the items just before it.

    Training: every position with a full history before it (`window` items, or one fewer with the split ``paper``). Validation and
    test: every held-out position, with up to `window` history items. With `held_back`, the training windows are those of the
    held-back interactions; as many windows before them have the split ``in-sample``, for comparison.

    Parameters
    ----------
    interactions
        Result of :func:`split_by_time`.
    params
        Parameters of stage 01.

    Returns
    -------
    Columns ``window user split position target history``; histories are lists of items, oldest first.
    """
    items, position = interactions["item"].to_numpy(), interactions["position"].to_numpy()
    split = interactions["split"].to_numpy(dtype=object)
    training = np.isin(split, ["train", "held-back"])
    size = np.where(training, params.window - (params.split == "paper"), params.window)
    wanted = (position >= 1) & (~training | (position >= size))
    if params.held_back:
        user = interactions["user"]
        seen, held_back = (pd.Series(split == name).groupby(user).transform("sum").to_numpy() for name in ("train", "held-back"))
        wanted &= (split != "train") | (position >= seen - held_back)
        split = np.select([split == "train", split == "held-back"], ["in-sample", "train"], split)
    rows = np.flatnonzero(wanted)
    starts = rows - np.minimum(size, position)[rows]  # the rows of a user are consecutive, in order of time
    table = interactions.iloc[rows][["user", "position"]].reset_index(drop=True)
    table.insert(1, "split", split[rows])
    table["target"] = items[rows]
    table["history"] = [items[start:row].tolist() for start, row in zip(starts, rows, strict=True)]
    return table.rename_axis("window").reset_index()
