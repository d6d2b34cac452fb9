"""A user's own atomic files (`source: files`): any name, any columns, and dirt that is counted."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from corec import CorecError, controls, data
from corec.data import atomic
from corec.params import ControlsParams, DataParams

INTER = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
ITEM = ["item_id:token\ttitle:token_seq\tprice:float\tbrand:token\ttags:token_seq\tyear:float"]


def write(folder: Path, inter: list[str] | None = None, item: list[str] | None = None, name: str = "shop") -> DataParams:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = [f"u{u}\ti{i}\t{rng.integers(1, 6)}\t{100 + n}" for u in range(20) for n, i in enumerate(rng.permutation(30)[:8])]
    lines = [f"i{i}\tThing &amp; number <b>{i}</b>\t{i}.5\tBrand {i % 3}\tred t{i % 2}\t{1980 + i}" for i in range(30)]
    (folder / f"{name}.inter").write_text("\n".join([*INTER, *rows, *(inter or [])]) + "\n")
    (folder / f"{name}.item").write_text("\n".join([*ITEM, *lines, *(item or [])]) + "\n")
    return DataParams(source="files", path=str(folder), core=1)


def test_files_of_any_name_with_any_columns(tmp_path: Path) -> None:
    params = write(tmp_path / "my shop", name="whatever")
    tables = data.prepare(params)
    assert params.dataset == "my shop", "results are not published under another data set's name"
    assert tables.items["title"].str.fullmatch(r"Thing & number \d+").all(), "HTML in titles is cleaned"
    assert tables.items["price"].dtype == float and set(tables.items["brand"]) == {"Brand 0", "Brand 1", "Brand 2"}
    assert tables.items["tags"].map(len).eq(2).all()
    scheme = tmp_path / "shop.yaml"
    scheme.write_text(
        "attributes:\n  - {name: price, column: price, below: [10, 20], labels: [cheap, middle, dear]}\n"
        "  - {name: brand, column: brand, bucket: as_is}\n  - {name: tag, column: tags, bucket: each}\n"
    )
    table = controls.build_vocabulary(tables.items, ControlsParams(scheme=str(scheme)))
    assert [table.name(value) for value in range(3)] == ["price: cheap", "price: middle", "price: dear"]
    assert set(tables.interactions["user_id"]) == {f"u{u}" for u in range(20)}


def test_every_unusable_row_is_counted(tmp_path: Path) -> None:
    inter = ["u1\ti99\t3\t100", "u2\ti1", "u3\ti1\t3\tyesterday", "u4\ti1\tgood\t100", "\ti1\t3\t100", "u0\ti0\t3\t1\t5"]
    again = (tmp_path / "x").exists()
    params = write(tmp_path / "x", inter)
    first = (tmp_path / "x" / "shop.inter").read_text().splitlines()[1]
    with (tmp_path / "x" / "shop.inter").open("a") as file:
        file.write(first + "\n")
    item = [
        "i3\tAgain\t1\tB\tt\t1990",
        "i200",
        "\tnone\t1\tB\tt\t1990",
        "i201\t\t1\tB\tt\tMCMXC",
        "i202\t<script>x</script>\tcheap\t\tt\t",
    ]
    with (tmp_path / "x" / "shop.item").open("a") as file:
        file.write("\n".join(item) + "\n")
    tables = data.prepare(params)
    card = data.card(tables)
    assert not again and card["left out"] == {
        "interactions: cut line": 2,
        "items: cut line": 1,
        "items: line without an item": 1,
        "items: item listed again": 1,
        "interactions: line without user, item, rating or time": 3,
        "interactions: item without a line in the item file": 1,
        "interactions: item chosen again by the same user": 1,
    }
    assert card["fields without a value"] == {
        "title: missing": 1, "title: script or style": 1, "price: not a number": 1, "year: not a number": 1, "year: missing": 1,
    }  # fmt: skip
    assert len(tables.interactions) == 160 and set(tables.catalogue["item_id"]) >= {"i201", "i202"}


def test_movielens_counts_its_dirt_too(atomic: Path) -> None:
    with (atomic / "ml-100k.item").open("a") as file:
        file.write("i0\tAgain\t1990\tDrama\ni98\tOld\tMCMXC\tDrama\n")
    with (atomic / "ml-100k.inter").open("a") as file:
        file.write("u1\ti777\t3\t5000\nu1\ti98\t3\t5000\nu1\ti98\t4\t5001\n")
    card = data.card(data.prepare(DataParams(path=str(atomic), core=1)))
    assert card["left out"] == {
        "items: item listed again": 1,
        "interactions: item without a line in the item file": 1,
        "interactions: item chosen again by the same user": 1,
    }
    assert card["fields without a value"] == {"year: not a number": 1}


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds no .inter file"),
        ({"a.inter": "", "b.inter": ""}, r"holds several .inter files \(a.inter, b.inter\)"),
        ({"a.inter": "user_id:token\n"}, "holds no .item file"),
        ({"a.inter": "user_id:token\n1\n", "a.item": "item_id:token\ttitle:token\n"}, "a.inter has no column 'item_id'"),
        ({"a.inter": "\n".join(INTER), "a.item": "item_id:token\tname:token\n"}, "a.item has no column 'title'"),
        ({"a.inter": "\n".join(INTER), "a.item": "item_id:token\ttitle:token\tmean_rating:float\n"}, "'mean_rating' is used by the package"),
        ({"a.inter": "\n".join(INTER) + "\nu\ti\t3\tx\n", "a.item": "item_id:token\ttitle:token\ni\tA\n"}, "no line with a user, an item"),
        ({"a.inter": "", "a.item": "item_id:token\ttitle:token\ni\tA\n"}, "a.inter is not a tab-separated text file"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_end_in_one_sentence(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(CorecError, match=sentence):
        data.prepare(DataParams(source="files", path="x", core=1))


def test_a_relative_folder_counts_from_the_projects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shop")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(data.prepare(DataParams(source="files", path="shop", core=1)).interactions) == 160


def test_a_missing_title_is_replaced_by_what_is_known() -> None:
    items = pd.DataFrame({
        "item_id": list("abcdef"),
        "title": ["A", None, None, None, None, None],
        "description_start": [None, "It boils &amp; boils. " * 20, "", None, " - ", None],
        "brand": ["X", "X", "Acme", "Acme", None, None],
        "category": ["K", "K", "Kettles", None, "Kettles", None],
    })  # fmt: skip
    interactions = pd.DataFrame({"item": range(1, 7), "item_id": list("abcdef"), "rating": 1.0, "split": "train"})
    found = data.describe_items(items, interactions)
    assert (
        found["title"].tolist()[:1] == ["A"]
        and found["title"][1].startswith("It boils & boils.")
        and len(found["title"][1]) <= 150
    )
    assert found["title"].tolist()[2:] == ["Acme Kettles", "Acme", "Kettles", "untitled"]
    assert found["title_from"].tolist()[1:5] == ["description", "brand and category", "brand", "category"]
    assert "description_start" not in found and pd.isna(found["title_from"][0])


def test_when_nothing_is_left_the_sentence_says_what_emptied_the_table(tmp_path: Path) -> None:
    params = write(tmp_path / "x")
    path = tmp_path / "x" / "shop.item"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *(line.rsplit("\t", 3)[0] + "\t\tt\t1990" for line in lines[1:])]) + "\n")
    with pytest.raises(CorecError) as error:
        data.prepare(params.model_copy(update={"required": ["title", "brand"]}))
    text = str(error.value)
    assert "30 items were read, 0 of them complete (30 have title, 0 have brand)" in text
    assert "160 of an incomplete item" in text and text.endswith("take 'brand' out of data.required.")
    with pytest.raises(
        CorecError, match=r"160 distinct interactions, 0 of users and items that keep 500 or more\): lower data.min"
    ):
        data.prepare(params.model_copy(update={"core": 500}))


def test_a_column_twice_in_the_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.inter").write_text("user_id:token\tuser_id:token\titem_id:token\ttimestamp:float\nu\tv\ti\t1\n")
    with pytest.raises(CorecError, match=r"a.inter has the column 'user_id' twice in its header: give one of them another name"):
        atomic.read_lines(tmp_path / "a.inter")
