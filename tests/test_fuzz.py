"""Made-up input of any kind: one sentence, or a count in the data card; never a traceback, never silence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corec import CorecError, controls, data, profiles, reranker
from corec.data import amazon, atomic
from corec.params import ControlsParams, DataParams, MaxWindows, Params, RerankerParams
from tests.conftest import write_atomic

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
FEW = settings(MANY, max_examples=15)

scalars = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=True) | st.text(max_size=12)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
sections = list(Params.model_fields)
models = [field.annotation for field in Params.model_fields.values() if hasattr(field.annotation, "model_fields")]
names = [name for model in models for name in model.model_fields]  # type: ignore[union-attr]


def one_sentence(error: CorecError) -> None:
    """The message is one line of text with a remedy, and no representation of an exception."""
    text = str(error)
    assert "\n" not in text and "Traceback" not in text and len(text) < 3000 and text.rstrip().endswith((".", "?"))


@MANY
@given(st.dictionaries(st.sampled_from(sections) | st.text(max_size=8), st.dictionaries(st.sampled_from(names), values, max_size=3)
                       | values, max_size=3))  # fmt: skip
def test_any_parameters_are_valid_or_one_sentence(given_values: dict[str, Any]) -> None:
    try:
        params = Params.checked(given_values, "mine.yaml")
        profiles.check(params, "mine.yaml")
    except CorecError as error:
        one_sentence(error)


@MANY
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_file_is_a_profile_or_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    try:
        profiles.load(path)
    except CorecError as error:
        one_sentence(error)


@MANY
@given(
    header=st.lists(st.sampled_from(["user_id:token", "item_id:token", "timestamp:float", "rating:float", "a:token_seq", "b:float", ""]), max_size=5),
    lines=st.lists(st.lists(st.text(max_size=6) | st.integers(-9, 9).map(str), max_size=5), max_size=8),
    tail=st.binary(max_size=20),
)  # fmt: skip
def test_any_atomic_file_is_read_or_one_sentence(tmp_path: Path, header: list[str], lines: list[list[str]], tail: bytes) -> None:
    folder = write_atomic(tmp_path / "raw", users=4, items=8, length=4)
    for name in ("ml-100k.inter", "ml-100k.item"):
        kept = (folder / name).read_bytes()
        text = "\n".join("\t".join(parts) for parts in [header, *lines]).encode(errors="replace") + tail
        (folder / name).write_bytes(text if header else kept + text)
        try:
            raw = atomic.read([folder / "ml-100k.inter", folder / "ml-100k.item"], DataParams(path=str(folder)))
            usable = raw.interactions
            assert usable["user_id"].str.strip().ne("").all() and np.isfinite(usable["timestamp"].astype(float)).all()
        except CorecError as error:
            one_sentence(error)
        (folder / name).write_bytes(kept)


@FEW
@given(st.lists(st.dictionaries(st.sampled_from(["asin", "title", "price", "brand", "rank", "category", "description"]), values, max_size=6), max_size=6),
       st.lists(st.dictionaries(st.sampled_from(["asin", "reviewerID", "overall", "unixReviewTime"]), values, max_size=4), max_size=6),
       st.binary(max_size=30))  # fmt: skip
def test_any_amazon_lines_are_counted_or_one_sentence(
    tmp_path: Path, items: list[dict[str, Any]], reviews: list[dict[str, Any]], tail: bytes
) -> None:
    good = {"asin": "B1", "title": "Card", "price": "$5", "brand": "b", "rank": "5 in x", "category": ["x"], "description": ["d"]}
    review = {"asin": "B1", "reviewerID": "u", "overall": 5.0, "unixReviewTime": 1}
    files = [tmp_path / "Gift_Cards.json", tmp_path / "meta_Gift_Cards.json"]
    for path, lines in zip(files, ([review, *reviews], [good, *items]), strict=True):
        path.write_bytes("\n".join(json.dumps(line) for line in lines).encode() + b"\n" + tail)
    try:
        raw = amazon.read(files, DataParams(source="amazon-2018", category="Gift_Cards"))
    except CorecError as error:
        one_sentence(error)
        return
    assert "B1" in set(raw.catalogue["item_id"])
    lost = len(reviews) + 1 - len(raw.interactions)
    counted = sum(count for (kind, _), count in raw.dirt.items() if kind in ("reviews", "interactions"))
    assert lost <= counted + 1, "what is not used is counted; bytes at the end may be a line of their own"


@pytest.mark.parametrize(
    "title", ["x" * 10_000_000, "é" * 50_000, "中文 film 🎬", "\u202eright to left", "a\x00b", "$x_{$ \\frac", "  "]
)
def test_any_title_goes_through_the_first_and_third_stage_and_into_a_prompt(tmp_path: Path, title: str) -> None:
    """Titles of ten megabytes, other scripts, control characters, and formulas."""
    folder = write_atomic(tmp_path / "raw")
    text = (folder / "ml-100k.item").read_text()
    (folder / "ml-100k.item").write_text(text.replace("Film number 7\t", f"{title}\t"))
    try:
        tables = data.prepare(DataParams(path=str(folder), core=1))
    except CorecError as error:
        one_sentence(error)
        return
    item = tables.items[tables.items["item_id"] == "i7"]
    dropped = int(tables.dirt.loc[tables.dirt["reason"].ne(""), "rows"].sum())
    assert len(item) == 1 or dropped > 0
    rng = np.random.default_rng(0)
    found = [rng.permutation(np.arange(1, len(tables.items) + 1))[:6] for _ in range(len(tables.windows))]
    frame = pd.DataFrame(
        {"window": tables.windows["window"], "candidates": found, "scores": [np.arange(6.0, 0, -1)] * len(found)}
    )
    params = ControlsParams(k=6, n_tokens=[0, 1], train_truth="any", max_windows=MaxWindows(train=8, valid=4, test=4))
    prepared = controls.prepare(tables.windows, frame, tables.items, params, seed=0)
    own = RerankerParams(backbone="tiny", dtype="float32", title_tokens=8)
    model = reranker.build(tables.items, prepared.vocabulary, own, seed=0)
    examples = reranker.load_examples(tables.windows, prepared)
    scores = reranker.score(model, examples, prepared.pools["test"], [prepared.requests["test", n] for n in (0, 1)])
    assert np.isfinite(scores).all()


def test_a_window_without_a_history_and_a_value_never_trained_are_scored(atomic: Path) -> None:
    tables = data.prepare(DataParams(path=str(atomic), core=1))
    empty = tables.windows.assign(history=[np.array([], dtype=np.int64)] * len(tables.windows))
    frame = pd.DataFrame(
        {"window": empty["window"], "candidates": [np.arange(1, 7)] * len(empty), "scores": [np.arange(6.0, 0, -1)] * len(empty)}
    )
    params = ControlsParams(k=6, n_tokens=[0, 1], train_truth="any", max_windows=MaxWindows(train=8, valid=4, test=4))
    prepared = controls.prepare(empty, frame, tables.items, params, seed=0)
    model = reranker.build(tables.items, prepared.vocabulary, RerankerParams(backbone="tiny", dtype="float32"), seed=0)
    examples = reranker.load_examples(empty, prepared)
    for value in range(len(prepared.vocabulary.labels)):  # each value, also those that no training request holds
        request = np.full((4, 1), value)
        assert np.isfinite(reranker.score(model, examples, prepared.pools["test"], [request])).all()


@FEW
@given(st.text(max_size=40))
def test_any_scheme_is_read_or_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scheme.yaml"
    path.write_text(yaml.safe_dump({"attributes": [{"name": text, "column": text, "kind": text}]}))
    try:
        profiles.check(Params(controls=ControlsParams(scheme=str(path))), "mine.yaml")
    except CorecError as error:
        one_sentence(error)
