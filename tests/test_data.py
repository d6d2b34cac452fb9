from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from corec import CorecError, data, stages
from corec.params import DataParams, Params


def params(atomic: Path, **changes: object) -> DataParams:
    values: dict[str, object] = {"path": str(atomic), "core": 1, "min_interactions": 5} | changes
    return DataParams.model_validate(values)


def test_leave_one_out_holds_out_the_last_two(atomic: Path) -> None:
    tables = data.prepare(params(atomic))
    for _, user in tables.interactions.groupby("user"):
        assert list(user["split"]) == ["train"] * (len(user) - 2) + ["valid", "test"]
        assert user["timestamp"].is_monotonic_increasing
        assert list(user["position"]) == list(range(len(user)))
    assert tables.interactions["item"].min() == 1 and list(tables.items["item"]) == list(range(1, len(tables.items) + 1))


def test_paper_split_of_fifty_is_40_5_5() -> None:
    rows = [(f"u{user}", f"i{i}", 3.0, float(i)) for user in range(3) for i in range(60 if user else 20)]
    raw = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    table = data.split_by_time(raw, DataParams(split="paper"))
    assert table["user"].nunique() == 2, "a user with 20 interactions is dropped"
    assert (
        table.groupby("user")["split"].value_counts().unstack().loc[:, ["train", "valid", "test"]].eq([40, 5, 5]).all(axis=None)
    )
    assert table["timestamp"].min() == 10, "the latest 50 are kept"
    assert sorted(table["item"].unique()) == list(range(1, 51)), "items that are no longer there leave no gap"
    windows = data.make_windows(table, DataParams(split="paper"))
    assert windows.groupby("split")["history"].apply(lambda h: set(h.map(len))).to_dict() == {
        "train": {5}, "valid": {6}, "test": {6},
    }  # fmt: skip


def test_file_order_breaks_ties_in_time(atomic: Path) -> None:
    raw = data.SOURCES["ml-100k"].read(data.source_files(params(atomic)), params(atomic)).interactions
    tables = data.prepare(params(atomic))
    ids = tables.items.set_index("item")["item_id"]
    first = tables.interactions[tables.interactions["user"] == 0]
    assert list(ids[first["item"]]) == list(raw[raw["user_id"] == "u0"]["item_id"])


def test_k_core_leaves_no_sparse_user_or_item(atomic: Path) -> None:
    raw = data.SOURCES["ml-100k"].read(data.source_files(params(atomic)), params(atomic)).interactions
    kept = data.k_core(raw, 6)
    assert 0 < len(kept) < len(raw)
    assert kept["user_id"].value_counts().min() >= 6 and kept["item_id"].value_counts().min() >= 6


def test_behaviour_is_counted_on_training_interactions_only(atomic: Path) -> None:
    tables = data.prepare(params(atomic))
    changed = tables.interactions.copy()
    held_out = changed["split"] != "train"
    changed.loc[held_out, "rating"] = 99.0
    ids = tables.items.set_index("item")["item_id"]
    again = data.describe_items(tables.items[["item_id", "title"]], changed.assign(item_id=changed["item"].map(ids)))
    columns = ["train_count", "mean_rating", "rating_std", "popularity_rank"]
    pd.testing.assert_frame_equal(again[columns], tables.items[columns])
    train = tables.interactions[~held_out]
    assert tables.items["train_count"].sum() == len(train)
    assert tables.items.sort_values("popularity_rank")["train_count"].is_monotonic_decreasing


def test_windows_are_what_came_before(atomic: Path) -> None:
    tables = data.prepare(params(atomic))
    items = tables.interactions.set_index(["user", "position"])["item"]
    for row in tables.windows.itertuples():
        assert items[row.user, row.position] == row.target
        assert row.history == [items[row.user, p] for p in range(row.position - len(row.history), row.position)]
    assert (tables.windows["split"] == "test").sum() == tables.interactions["user"].nunique()


def test_tables_survive_the_disk(atomic: Path) -> None:
    given = params(atomic)
    tables, stage = data.prepare(given), stages.start(Params(run="r", data=given), "data")
    stage.finish(data.save(tables, stage.folder))
    again = data.load("r")
    pd.testing.assert_frame_equal(again.interactions, tables.interactions)
    assert [list(h) for h in again.windows["history"]] == list(tables.windows["history"])
    assert data.card(tables)["coverage"]["genres"] == data.card(again)["coverage"]["genres"] == 1.0


def test_unknown_data_set() -> None:
    with pytest.raises(CorecError, match="no data set 'ml100k'.*did you mean 'ml-100k'"):
        data.prepare(DataParams(source="ml100k"))


def test_missing_column_and_file(atomic: Path) -> None:
    path = atomic / "ml-100k.inter"
    path.write_text(path.read_text().replace("timestamp:float", "time:float", 1))
    with pytest.raises(CorecError, match=r"ml-100k.inter has no column 'timestamp' \(it has user_id, item_id, rating, time\)"):
        data.prepare(params(atomic))
    path.unlink()
    with pytest.raises(CorecError, match="ml-100k.inter is missing"):
        data.prepare(params(atomic))


def test_a_number_that_is_none(atomic: Path) -> None:
    path = atomic / "ml-100k.inter"
    lines = path.read_text().splitlines()
    lines[7] = lines[7].rsplit("\t", 1)[0] + "\tyesterday"
    path.write_text("\n".join(lines))
    with pytest.raises(CorecError, match="line 8: timestamp 'yesterday' is not a number"):
        data.prepare(params(atomic))


def test_nobody_left(atomic: Path) -> None:
    with pytest.raises(CorecError, match="lower data.min_interactions or data.core"):
        data.prepare(params(atomic, core=1000))


def test_coverage_counts_missing_values() -> None:
    items = pd.DataFrame({
        "item": [1, 2], "item_id": ["a", "b"], "title": ["A", "B"], "year": [1990.0, np.nan], "genres": [["x"], []],
        "train_count": [1, 1],
    })  # fmt: skip
    interactions = pd.DataFrame({"user": [0, 0], "item": [1, 2], "split": ["train", "test"]})
    windows = pd.DataFrame({"split": ["test"]})
    catalogue = items[["item_id", "title", "year", "genres"]].assign(complete=[True, False])
    dirt = pd.DataFrame({"file": ["reviews", "price"], "reason": ["odd", "range"], "rows": [3, 2]})
    tables = data.Tables(interactions, items, windows, catalogue, dirt)
    card = data.card(tables)
    assert card["coverage"] == {"year": 0.5, "genres": 0.5} and card["left out"] == {"reviews: odd": 3}
    assert card["fields without a value"] == {"price: range": 2}
    assert data.coverage(tables)["complete"].to_dict() == {"year": 1.0, "genres": 1.0}
    found = data.buckets(tables, "movielens").query("attribute == 'era'")
    assert list(zip(found["stage"], found["value"], found["items"], found["share"], strict=True)) == [
        (stage, "1990 to 1994", 1, 1.0) for stage in ("read", "complete", "used")
    ]


def test_items_that_lack_something_required_are_left_out(atomic: Path) -> None:
    path = atomic / "ml-100k.item"
    lines = path.read_text().splitlines()
    lines[1:4] = [line.rsplit("\t", 1)[0] + "\tunknown" for line in lines[1:4]]
    path.write_text("\n".join(lines) + "\n")
    tables = data.prepare(params(atomic, required=["genres"]))
    assert set(tables.catalogue["item_id"]) - set(tables.items["item_id"]) == {"i0", "i1", "i2"}
    left_out = 40 * 12 - len(tables.interactions)
    assert left_out > 0 and data.card(tables)["left out"] == {"interactions: of an incomplete item": left_out}


def test_brand_effect() -> None:
    brands = pd.Series(["Sony", "SONY", "by Sony", "Unknown", None])
    effect = data.brand_effect(pd.DataFrame({"brand_raw": brands}))
    assert effect["brands"].to_dict() == {"as_is": 4, "normalised": 1}
    assert effect["items without one"].to_dict() == {"as_is": 1, "normalised": 2}
