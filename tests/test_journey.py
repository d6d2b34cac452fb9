"""The Complete Journey: a sample of two households, and items that are chosen again."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from corec import CorecError, controls, data, sasrec
from corec.data import journey
from corec.params import ControlsParams, DataParams, SasrecParams


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Purchases of two households: each buys six products, two at a time, the first two of them twice."""
    products = pd.DataFrame(
        {
            "product_id": np.arange(101, 109),
            "manufacturer_id": [69, 69, 2, 2, 5, 5, 7, 7],
            "department": ["GROCERY"] * 6 + ["DRUG GM", "MEAT-PCKGD"],
            "brand": ["Private", "Private", *["National"] * 6],
            "product_category": ["BAG SNACKS", "SOUP", "SOUP", "SOUP", "FRZN ICE", None, "VITAMINS", "BACON"],
            "product_type": ["POTATO CHIPS", "RAMEN NOODLES/RAMEN CUPS", "COND SOUP", "RTS SOUP", "ICE - CRUSHED/CUBED", None,
                             "VITAMIN", "BACON"],
            "package_size": ["11 OZ", "3 OZ", None, "19 OZ", "22 LB", None, "300 CT", "1 LB"],
        }
    )  # fmt: skip
    rows = []
    for household in (1, 2):
        basket = [101, 102, 101, 102, 103, 104, 105, 107 if household == 1 else 108]
        for place, product in enumerate(basket):
            day = pd.Timestamp("2017-01-01") + pd.Timedelta(days=place // 2 + household)
            rows.append((household, product, day, 2, 2.0 * (product - 100)))
    rows.append((1, 106, pd.Timestamp("2017-02-01"), 0, 1.0))  # no quantity
    columns = ["household_id", "product_id", "transaction_timestamp", "quantity", "sales_value"]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "transactions.parquet")
    products.to_parquet(tmp_path / "products.parquet")
    return tmp_path


def params(folder: Path, **changes: object) -> DataParams:
    given = {"source": "complete-journey", "path": str(folder), "core": 1, "window": 2} | changes
    return DataParams.model_validate(given)


def test_purchases_become_the_tables_of_stage_01(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journey, "MANUFACTURER", 2)
    tables = data.prepare(params(folder))
    assert len(tables.interactions) == 12 and (tables.interactions["rating"] == 1).all(), "first purchases only"
    dirt = tables.dirt.set_index("reason")["rows"]
    assert dirt["without a positive quantity and price"] == 1 and dirt["item chosen again by the same user"] == 4
    items = tables.items.set_index("item_id")
    assert items.loc["101", "title"] == "Potato chips, 11 oz, private brand"
    assert items.loc["103", "title"] == "Condensed soup, national brand"
    assert items.loc["105", "title"] == "Ice - crushed / cubed, 22 lb, national brand"
    assert items.loc["103", "price"] == 3.0 and items.loc["105", "category"] == "frozen ice"
    assert list(items.loc["101", "brand"]) == ["private", "manufacturer 69"]
    assert sorted(items.loc[items["category"] == "soup", "category_rank"].dropna()) == [1, 2, 3]
    vocabulary = controls.build_vocabulary(tables.items, ControlsParams(scheme="complete-journey"))
    assert [attribute.name for attribute in vocabulary.attributes] == ["price", "brand", "category", "department", "rank"]


def test_the_order_within_a_basket_is_random_but_fixed(folder: Path) -> None:
    first, second = (data.prepare(params(folder)).interactions for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert first.groupby("user")["timestamp"].is_monotonic_increasing.all()


def test_repeated_purchases_are_kept_and_can_be_retrieved_again(folder: Path) -> None:
    tables = data.prepare(params(folder, repeats=True))
    assert len(tables.interactions) == 16 and sasrec.chosen_again(tables.interactions)
    own = SasrecParams(hidden=8, max_length=5, top_k=7)
    torch.manual_seed(0)
    model = sasrec.SASRec(len(tables.items), own)
    found = sasrec.candidates(model, tables.interactions, tables.windows, own)
    assert all(len(set(items)) == 7 for items in found["candidates"]), "all items but none twice, seen ones too"
    asked = sasrec.queries(tables.interactions, tables.windows, 5)
    assert all(len(seen) == 0 for seen in asked.seen) and all(len(items) for items in asked.inputs)
    ranks = sasrec.rank_targets(model, asked)
    assert ((ranks >= 1) & (ranks <= len(tables.items))).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "products.parquet").unlink(), "products.parquet is missing: put the file there"),
        (lambda folder: (folder / "products.parquet").write_text("a,b"), "is no parquet file with the columns product_id"),
        (
            lambda folder: pd.DataFrame({"household_id": [1]}).to_parquet(folder / "transactions.parquet"),
            "transactions.parquet is no parquet file with the columns household_id",
        ),
    ],
)
def test_unusable_files_are_named(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(CorecError, match=message):
        data.prepare(params(folder))
