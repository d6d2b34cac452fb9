"""Data card: counts, coverage of the attributes, and unusable rows."""

from typing import Any

import pandas as pd

from corec import schemes
from corec.data import fields
from corec.data.tables import FILES, Tables, filled


def card(tables: Tables) -> dict[str, Any]:
    """Data card: counts, quantiles of the sequence length, coverage of the attributes, and unusable rows by reason."""
    interactions, windows = tables.interactions, tables.windows
    lengths = interactions.groupby("user").size()
    users, n_items = interactions["user"].nunique(), len(tables.items)
    return {
        "users": users,
        "items": n_items,
        "interactions": len(interactions),
        "density": round(len(interactions) / (users * n_items), 5),
        "length": {f"{q:.0%}": int(lengths.quantile(q)) for q in (0, 0.25, 0.5, 0.75, 1)},
        "split": interactions["split"].value_counts().to_dict(),
        "windows": windows["split"].value_counts().to_dict(),
        "coverage": coverage(tables)["used"].dropna().to_dict(),
        "left out": faults(tables, fields=False),
        "fields without a value": faults(tables, fields=True),
    }


def faults(tables: Tables, fields: bool) -> dict[str, int]:
    """Number of unusable rows by file and reason; with `fields`, of unusable values by field and reason."""
    rows = tables.dirt[(tables.dirt["rows"] > 0) & (tables.dirt["file"].isin(FILES) != fields)]
    return dict(zip(rows["file"] + ": " + rows["reason"], rows["rows"].astype(int).tolist(), strict=True))


def item_stages(tables: Tables) -> dict[str, pd.DataFrame]:
    """Items after each step: ``read`` (all items of the source), ``complete`` (with all `data.required`), ``used``."""
    catalogue = tables.catalogue
    return {"read": catalogue, "complete": catalogue[catalogue["complete"]], "used": tables.items}


def coverage(tables: Tables) -> pd.DataFrame:
    """Share of items that have each attribute, after each of :func:`item_stages` (NaN if the step has no such column)."""
    drop = ["item", "item_id", "title", "train_count", "brand_raw", "category_from", "complete", "description_start"]
    shares = {
        stage: {name: filled(items[name]).mean() for name in items.columns if name not in drop}
        for stage, items in item_stages(tables).items()
    }
    return pd.DataFrame(shares).round(4)


def buckets(tables: Tables, scheme: str) -> pd.DataFrame:
    """Number of items in each bucket of a scheme, after each of :func:`item_stages`.

    Returns
    -------
    Columns ``attribute value stage items share``; ``share`` is relative to the items that have the attribute.
    """
    rows = []
    for attribute in schemes.load_scheme(scheme):
        for stage, items in item_stages(tables).items():
            if attribute.column in items:
                counts = attribute.values(items[attribute.column]).explode().value_counts()
                known = filled(items[attribute.column]).sum()
                rows += [(attribute.name, str(value), stage, count, count / known) for value, count in counts.items()]
    return pd.DataFrame(rows, columns=["attribute", "value", "stage", "items", "share"])


def brand_effect(catalogue: pd.DataFrame) -> pd.DataFrame:
    """Effect of brand normalisation: number of brands, items without a brand, share of the ten largest brands.

    Parameters
    ----------
    catalogue
        All items of the source, with ``brand_raw``.
    """
    brand_columns = {
        "as_is": catalogue["brand_raw"],
        "normalised": catalogue["brand_raw"].map(
            lambda brand: fields.parse_brand(brand, normalise=True).value, na_action="ignore"
        ),
    }
    rows = {
        name: (brands.nunique(), int(brands.isna().sum()), round(float(brands.value_counts(normalize=True)[:10].sum()), 4))
        for name, brands in brand_columns.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["brands", "items without one", "share of the ten largest"])
