"""Amazon Review Data 2018: field parsers, dirty files, and the stream against a plain reading by pandas."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from corec import CorecError, data, evaluation
from corec.__main__ import main as corec_main
from corec.data import amazon, fields, salvage, synthetic
from corec.params import DataParams

GIFT_CARDS = Path(__file__).parents[2] / "shared" / "data" / "amazon2018-gift-cards"
COMPLETE = ["title", "description", "brand", "rank", "price"]
anything = st.one_of(
    st.none(),
    st.text(),
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
    .map(json.dumps),
    st.from_regex(r"\A[\s>#$]*[0-9,. \-$]* ?(in|-)? ?[A-Za-z&;(<>{]*\Z"),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(anything)
def test_no_input_makes_a_parser_raise(text: str | None) -> None:
    for parse in (*fields.PARSERS.values(), fields.parse_brand, lambda text: fields.parse_brand(text, normalise=True)):
        value, fault = parse(text)
        assert (value is None) == bool(fault)
        assert not isinstance(value, float) or (np.isfinite(value) and value >= 0)
        assert not isinstance(value, str) or value.strip() == value != ""


@given(st.integers(0, 10**9), st.integers(0, 99))
def test_prices_are_read_as_written(dollars: int, cents: int) -> None:
    assert fields.parse_price(f"${dollars:,}.{cents:02}").value == pytest.approx(dollars + cents / 100)


@given(
    st.lists(st.integers(1, 10**9), min_size=1), st.sampled_from(["Electronics (See Top 100 in Electronics)", "Books", "a > b"])
)
def test_the_best_rank_of_a_list_counts(ranks: list[int], where: str) -> None:
    entries = [f">#{rank:,} in {where}" for rank in ranks]
    assert fields.parse_rank(json.dumps(entries)).value == min(ranks)
    assert fields.parse_rank(f"{ranks[0]:,} in {where} (").value == ranks[0]


@pytest.mark.parametrize(
    ("parse", "text", "wanted"),
    [
        (fields.parse_price, "", (None, "missing")),
        (fields.parse_price, "$12.99", (12.99, "")),
        (fields.parse_price, "$1,234.56", (1234.56, "")),
        (fields.parse_price, "$12.99 - $24.99", (None, "range")),
        (fields.parse_price, ".a-box-inner{background-color:#fff}", (None, "not a price")),
        (fields.parse_rank, "[]", (None, "missing")),
        (fields.parse_rank, None, (None, "missing")),
        (fields.parse_rank, "225 in Gift Cards (", (225, "")),
        (
            fields.parse_rank,
            '[">#1,234 in Cell Phones &amp; Accessories (See Top 100 in Cell Phones)", ">#56 in Cases"]',
            (56, ""),
        ),
        (fields.parse_rank, "see Top 100 in Books", (None, "not a rank")),
        (fields.parse_title, "<span class='x'>Tea &amp;\n Kettle</span>", ("Tea & Kettle", "")),
        (fields.parse_title, "var aPageStart = (new Date()).getTime(); function(){}", (None, "script or style")),
        (fields.parse_title, "<br>", (None, "only markup")),
        (fields.parse_category, '["Electronics", "Camera &amp; Photo", "Lenses"]', ("Lenses", "")),
        (fields.parse_category, '["Beauty", "' + "This sentence is no category but a description. " * 3 + '"]', ("Beauty", "")),
        (fields.parse_category, '["Gift Cards", "Gift Cards", "Variety of designs for any occasion.", "x"]', ("Gift Cards", "")),
        (fields.parse_category, '["Clothing", "Women", "95% Cotton"]', ("Women", "")),
        (fields.parse_category, "[]", (None, "missing")),
        (fields.parse_price, "$.99", (0.99, "")),
        (fields.parse_rank, "1,857,911 Paid in Kindle Store (", (1857911, "")),
        (fields.parse_title, "&lt;b&gt;Tea&lt;/b&gt; Kettle <span class=", ("Tea Kettle", "")),
        (fields.parse_title, "Cable < 3 m", ("Cable < 3 m", "")),
        (fields.parse_brand, '<a href="x">Sony</a>', ("Sony", "")),
        (fields.parse_brand, ".a-box{color:red}", (None, "not a brand")),
    ],
)
def test_fields_as_they_occur(parse: Callable[[str | None], fields.Parsed], text: str | None, wanted: tuple[object, str]) -> None:
    assert parse(text) == wanted


def test_brands_may_be_normalised() -> None:
    for text in ("Sony", " SONY ", "by Sony", "Visit the  sony"):
        assert fields.parse_brand(text, normalise=True).value == "sony"
    assert fields.parse_brand("Unknown", normalise=True).value is None
    assert fields.parse_brand("Byredo", normalise=True).value == "byredo"
    assert fields.parse_brand("by", normalise=True).value is None
    assert fields.parse_brand("by Sony").value == "by Sony"


def review(user: str = "A1", item: str = "B1", **changes: object) -> str:
    return json.dumps({"overall": 5.0, "reviewerID": user, "asin": item, "unixReviewTime": 1_500_000_000} | changes)


def item(asin: str = "B1", **changes: object) -> str:
    fields = {"title": "A kettle", "brand": "Acme", "rank": "7 in Kettles (", "price": "$12.00", "category": ["Kettles"]}
    return json.dumps({"asin": asin, "description": ["It boils."]} | fields | changes)


def write(folder: Path, reviews: list[str], items: list[str], ending: str = "\n") -> DataParams:
    folder.mkdir(exist_ok=True)
    for name, rows in (("Kettles", reviews), ("meta_Kettles", items)):
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(("\n".join(rows) + ending).encode()))
    return DataParams(source="amazon-2018", category="Kettles", path=str(folder), required=COMPLETE)


def read(params: DataParams) -> data.Raw:
    return amazon.read(amazon.find_files(params), params.model_copy(update={"core": 1}))


def test_dirty_rows_are_counted_and_left_out(tmp_path: Path) -> None:
    reviews = [
        review(), review(overall=1.0), review(item="B2"), review(item="B9"), review("A2", unknown={"a": [1]}),
        "not json", "", "[1, 2]", '{"asin": "B1"}', review("A3", unixReviewTime="1500000001"), review("A4", unixReviewTime="soon"),
        '{"overall": 5.0, "reviewerID": "A7", "as',
    ]  # fmt: skip
    items = [
        item(),
        item(title="Again"),
        item("B2", price="$1 - $2"),
        item("B3", rank=[">#5 in X"], brand=7),
        "{",
        '{"title": "none"}',
    ]
    raw = read(write(tmp_path / "raw", reviews, items, ending=""))
    assert list(raw.interactions["user_id"]) == ["A1", "A2", "A3"]
    assert list(raw.interactions["rating"]) == [5, 5, 5], "the first review of a user and an item counts"
    wanted = {
        ("reviews", "line without user, item, rating or time"): 5, ("reviews", "review without metadata"): 1,
        ("reviews", "review of an incomplete item"): 1, ("reviews", "item reviewed again by the same user"): 1,
        ("metadata", "line without an item"): 2, ("metadata", "item listed again"): 1, ("price", "range"): 1,
    }  # fmt: skip
    assert {reason: raw.dirt[reason] for reason in wanted} == wanted
    catalogue = raw.catalogue.set_index("item_id")
    assert list(catalogue["complete"]) == [True, False, True] and catalogue["title"]["B1"] == "A kettle"
    assert catalogue["brand"]["B3"] == "7"


def test_items_without_a_title_are_named_by_their_description(tmp_path: Path) -> None:
    items = [
        item(),
        item("B2", title="", description=["", "x"]),
        item("B3", title="", description=["It &quot;whistles&quot;."]),
        item("B4", title="", description=[]),
        item("B5", title="Multi-Function {a:b;}", description=["", "Cuts."]),
    ]
    reviews = [review(f"A{user}", f"B{number}") for user in range(3) for number in range(1, 6)]
    params = write(tmp_path / "raw", reviews, items).model_copy(update={"required": [], "core": 1})
    tables = data.prepare(params)
    assert tables.items.set_index("item_id")["title"].to_dict() == {
        "B5": "Cuts.", "B1": "A kettle", "B2": "x", "B3": 'It "whistles".', "B4": "Acme Kettles",
    }  # fmt: skip
    counted = data.card(tables)["fields without a value"]
    assert (
        counted["title: missing"] == 3
        and counted["title: script or style"] == 1
        and counted["title: replaced by the item's description"] == 3
    )
    assert counted["title: replaced by the item's brand and category"] == 1
    with pytest.raises(
        CorecError, match=r"No interaction of 'amazon-2018/Kettles' is left: 4 items were read, 0 of them complete"
    ):
        data.prepare(params.model_copy(update={"required": ["title", "also_buy"][:1], "path": str(untitled(tmp_path))}))


def untitled(tmp_path: Path) -> Path:
    write(tmp_path / "untitled", [review()], [item(f"B{n}", title="") for n in range(4)])
    return tmp_path / "untitled"


@pytest.mark.parametrize("spoil", ["cut", "flip", "garbage between", "padding", "long padding"])
def test_a_broken_gzip_member_loses_only_itself(spoil: str) -> None:
    rng = np.random.default_rng(0)
    texts = [(f"member {number} " + rng.bytes(3000).hex() + "\n").encode() for number in range(3)]
    members = [gzip.compress(text) for text in texts]
    if spoil == "flip":
        members[1] = members[1][:1500] + b"\xff" * 40 + members[1][1540:]
    elif spoil == "cut":
        members[2] = members[2][:2000]
    else:
        members.insert(1, {"padding": bytes(100), "long padding": bytes(3 * salvage.BLOCK)}.get(spoil, b"what is this?"))
    faults = Counter[str]()
    found = b"".join(salvage.plain_blocks(BytesIO(b"".join(members)), faults))
    assert found.startswith(texts[0]) and (spoil == "cut" or found.endswith(texts[2]))
    wanted = {"cut": {"gzip file cut short": 1}, "padding": {}, "long padding": {}}.get(spoil, {"gzip member broken": 1})
    assert dict(faults) == wanted
    assert spoil in ("cut", "flip") or found.replace(b"\n", b"") == b"".join(texts).replace(b"\n", b"")


def test_one_broken_member_counts_once_whatever_its_bytes_look_like() -> None:
    chance = salvage.GZIP + bytes([0, 1, 2, 3, 4, 0, 3])  # looks like the beginning of a member
    broken = gzip.compress(b"the start") + b"".join(chance + b"\xff" * 50 for _ in range(5))
    faults = Counter[str]()
    found = b"".join(salvage.plain_blocks(BytesIO(broken + gzip.compress(b"the end")), faults))
    assert found.startswith(b"the start") and found.endswith(b"the end") and dict(faults) == {"gzip member broken": 1}


@pytest.mark.parametrize("spoil", ["wrong checksum", "one byte"])
def test_damage_that_still_decompresses_is_noticed(tmp_path: Path, spoil: str) -> None:
    members = [gzip.compress((review(f"A{user}") + "\n").encode(), 0) for user in range(3)]
    place = -8 if spoil == "wrong checksum" else members[1].index(b'"A1"') + 2
    damaged = bytearray(members[1])
    damaged[place] ^= 1
    params = write(tmp_path / "raw", [review()], [item()])
    (tmp_path / "raw" / "Kettles.json.gz").write_bytes(members[0] + bytes(damaged) + members[2])
    raw = read(params)
    assert raw.dirt["reviews", "gzip member broken"] == 1
    assert list(raw.interactions["user_id"]) == ["A0", "A2"]


def test_lines_without_end_and_files_that_may_not_be_read(tmp_path: Path) -> None:
    params = write(tmp_path / "raw", ["x" * 40_000_000], [item()])
    with pytest.raises(CorecError, match=r"Kettles.json.gz could not be read .*check that it is a file of JSON lines"):
        read(params)


def test_fewer_latest_than_needed_reviews(tmp_path: Path) -> None:
    reviews = [review("A1", f"B{n}", unixReviewTime=n) for n in range(12)]
    params = write(tmp_path / "raw", reviews, [item(f"B{n}") for n in range(12)])
    changes = {"split": "paper", "min_interactions": 10, "latest": 5, "window": 2}
    assert list(data.prepare(params.model_copy(update=changes)).interactions["timestamp"]) == [7, 8, 9, 10, 11]


def test_a_file_cut_short_is_used_and_counted(tmp_path: Path) -> None:
    params = write(tmp_path / "raw", [review(f"A{user}", reviewText=str(user) * 50) for user in range(5000)], [item()])
    path = tmp_path / "raw" / "Kettles.json.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    raw = read(params)
    assert 1000 < len(raw.interactions) < 5000
    assert raw.dirt["reviews", "gzip file cut short"] == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"<html><body>404</body></html>", gzip.compress(b"a,b\n1,2\n"), b"PK\x03\x04" + bytes(500)],
    ids=["empty", "page", "table", "archive"],
)
def test_a_file_of_another_format_is_fatal(tmp_path: Path, content: bytes) -> None:
    params = write(tmp_path / "raw", [review()], [item()])
    for name, wanted in (("Kettles", "reviewerID"), ("meta_Kettles", "asin")):
        (tmp_path / "raw" / f"{name}.json.gz").write_bytes(content)
        with pytest.raises(CorecError, match=f"{name}.json.gz is not of the format of Amazon Review Data 2018: .*{wanted}"):
            read(params)
        write(tmp_path / "raw", [review()], [item()])


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz", ""])
def test_files_may_be_plain_or_named_otherwise(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "it's [raw] {or not} 100% *"
    params = write(folder, [review()], [item()])
    for path in list(folder.iterdir()):
        packed = path.read_bytes()
        path.unlink()
        path.with_name(path.name.removesuffix(".json.gz") + suffix).write_bytes(
            packed if suffix.endswith("gz") else gzip.decompress(packed)
        )
    assert len(read(params).interactions) == 1


def test_a_missing_file_and_an_unknown_category(tmp_path: Path) -> None:
    params = write(tmp_path / "raw", [review()], [item()])
    with pytest.raises(CorecError, match=r"Kettles_5.json.gz is missing .*set data.reviews"):
        read(params.model_copy(update={"reviews": "5-core"}))
    with pytest.raises(CorecError, match="no category 'Electronic': did you mean 'Electronics'"):
        data.prepare(DataParams(source="amazon-2018", category="Electronic"))
    with pytest.raises(CorecError, match="data.category is empty"):
        data.prepare(DataParams(source="amazon-2018"))
    with pytest.raises(CorecError, match="data.required: the items of this source have no 'colour': choose among title, brand"):
        read(params.model_copy(update={"required": ["colour"]}))


@pytest.mark.parametrize("split", ["paper", "leave-one-out"])
def test_the_stream_agrees_with_pandas(tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amazon, "PART", 2000)  # users are counted in several parts
    reviews, metadata = synthetic.write(tmp_path / "raw", users=400, items=150, reviews=9000, seed=3)
    given = {"split": split, "min_interactions": 20, "max_users": 60, "latest": 25, "core": 4}
    params = DataParams(source="amazon-2018", category="Synthetic", path=str(tmp_path / "raw"), required=COMPLETE).model_copy(
        update=given
    )
    table = pd.read_json(reviews, lines=True, dtype=False)
    items = pd.read_json(metadata, lines=True)
    table = table[["reviewerID", "asin", "overall", "unixReviewTime"]]
    table.columns = ["user_id", "item_id", "rating", "timestamp"]
    oracle = data.split_by_time(table[table["item_id"].isin(items["asin"])], params)
    mine = data.prepare(params)
    again = int(table.duplicated(["user_id", "item_id"]).sum())
    assert data.card(mine)["left out"] == {"reviews: item reviewed again by the same user": again}
    columns = ["user", "user_id", "item", "rating", "timestamp", "position", "split"]
    pd.testing.assert_frame_equal(mine.interactions, oracle[columns], check_dtype=False)
    assert oracle["user"].nunique() == 60 if split == "paper" else len(oracle) > 1000
    prices = items.set_index("asin")["price"].str.replace(r"[$,]", "", regex=True).astype(float)
    assert list(mine.items["price"]) == list(prices[mine.items["item_id"]])


@pytest.mark.skipif(not GIFT_CARDS.exists(), reason="the real Gift Cards files are not beside the project")
def test_real_gift_cards() -> None:
    required = ["title", "brand", "rank", "price"]
    params = DataParams(source="amazon-2018", category="Gift_Cards", reviews="5-core", path=str(GIFT_CARDS), required=required)
    raw = read(params)
    assert (raw.interactions["user_id"].nunique(), raw.interactions["item_id"].nunique(), len(raw.interactions)) == (
        445,
        105,
        2472,
    )
    everything = read(params.model_copy(update={"required": []})).interactions
    assert raw.catalogue["category"].value_counts().index[0] == "Gift Cards"
    assert not raw.catalogue["category"].str.contains("occasion|Handmade", na=False).any()
    assert (everything["user_id"].nunique(), everything["item_id"].nunique(), len(everything)) == (458, 148, 2965)


@pytest.mark.skipif(not GIFT_CARDS.exists(), reason="the real Gift Cards files are not beside the project")
def test_real_gift_cards_go_through_all_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[1]
    (tmp_path / "notebooks").symlink_to(root / "notebooks")
    monkeypatch.setenv("PYTHONPATH", str(root))
    values = yaml.safe_load((root / "params" / "amazon-gift-cards.yaml").read_text())
    values["data"]["path"] = str(GIFT_CARDS)
    values["sasrec"]["epochs"] = 5
    values["controls"]["max_windows"] = {"train": 300, "valid": 30, "test": 60}
    values["reranker"] |= {"backbone": "tiny", "curriculum_steps": 10, "steps": 10}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    assert corec_main(["run", str(tmp_path / "mine.yaml")]) == 0
    table = evaluation.read(tmp_path / "figures" / "amazon-gift-cards" / "metrics.csv")
    assert set(table["model"]) == {*evaluation.MODELS, "no-token-alone", "corec-alone"} - {
        "text",
        "combiner",
        "hard-filter+combiner",
        "rule+combiner",
    } and set(table["dataset"]) == {"amazon-2018/Gift_Cards"}
