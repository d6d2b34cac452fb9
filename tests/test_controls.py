import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from corec import CorecError, controls, schemes, stages
from corec.params import ControlsParams, FiguresParams, MaxWindows, Params

ITEMS = pd.DataFrame({
    "item": range(1, 7),
    "genres": [["Comedy"], ["Comedy", "Drama"], ["Drama"], [], ["Horror"], ["Drama", "Horror"]],
    "year": [1965, 1985, 1990, np.nan, 1995, 1994],
    "popularity_rank": [1, 50, 51, 500, 501, np.nan],
    "mean_rating": [2.9, 3.0, 3.5, 4.0, np.nan, 5.0],
    "rating_std": [0.5, 0.9, 1.0, 1.05, 2.0, np.nan],
})  # fmt: skip


@pytest.fixture
def table() -> controls.Vocabulary:
    return controls.build_vocabulary(ITEMS, ControlsParams())


def pools(windows: int = 200, k: int = 4, seed: int = 0) -> controls.Pools:
    rng = np.random.default_rng(seed)
    found = [rng.permutation(np.arange(1, 7))[:k] for _ in range(windows)]
    frame = pd.DataFrame({"window": range(windows), "candidates": found, "scores": [np.arange(k, 0, -1.0)] * windows})
    target = rng.integers(1, 7, windows)
    return controls.make_pools(pd.DataFrame({"window": range(windows), "target": target}), frame, k, seed)


def owned(table: controls.Vocabulary, item: int, attribute: str) -> list[str]:
    number = [entry.name for entry in table.attributes].index(attribute)
    return [table.labels[v] for v in table.values_of[item] if v >= 0 and table.attribute_of[v] == number]


def test_buckets_of_the_scheme(table: controls.Vocabulary) -> None:
    assert owned(table, 2, "genre") == ["Comedy", "Drama"] and owned(table, 4, "genre") == []
    assert [owned(table, item, "era") for item in range(1, 7)] == [
        ["before 1970"], ["the 1980s"], ["1990 to 1994"], [], ["1995 or later"], ["1990 to 1994"],
    ]  # fmt: skip
    ranks = [owned(table, item, "popularity") for item in range(1, 7)]
    assert ranks == [["top 50"], ["top 50"], ["top 200"], ["top 500"], ["beyond 500"], []]
    assert (table.values_of[0] == -1).all()


def test_the_papers_amazon_buckets() -> None:
    price, _, rank, _ = schemes.load_scheme("amazon")
    prices = pd.Series([9.99, 10, 14.99, 15, 25, 50, 99.99, 100])
    assert [v[0] for v in price.values(prices)] == ["0-10", "10-15", "10-15", "15-25", "25-50", "50-100", "50-100", "100+"]
    ranks = pd.Series([1, 3, 4, 5, 10, 11, 50, 51, 100, 200, 500, 501])
    assert [v[0] for v in rank.values(ranks)] == [
        "top 3", "top 3", "3-5", "3-5", "top 10", "11-50", "11-50", "51-100", "51-100", "101-200", "201-500", "500+",
    ]  # fmt: skip


def test_matches_and_scores_against_loops(table: controls.Vocabulary) -> None:
    given = pools()
    requests = controls.draw_requests(given, 3, "catalogue", table, np.random.default_rng(0))
    requests[::7, 1] = -1
    met = controls.matches(given.candidates, requests, table.values_of)
    scores = controls.control_scores(met, given.is_truth())
    for window in range(0, 200, 11):
        for place, item in enumerate(given.candidates[window]):
            met_constraints = [value >= 0 and value in table.values_of[item] for value in requests[window]]
            assert met[window, place].tolist() == met_constraints
            assert scores[window, place] == sum(met_constraints) + (place == given.truth[window])


@pytest.mark.parametrize("protocol", ["oracle", "random-candidate", "catalogue"])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_requests_ask_for_different_attributes(protocol: str, n: int, table: controls.Vocabulary) -> None:
    requests = controls.draw_requests(pools(), n, protocol, table, np.random.default_rng(1))
    assert requests.shape == (200, n)
    for request in requests:
        attributes = table.attribute_of[request[request >= 0]]
        assert len(set(attributes)) == len(attributes)


def test_oracle_copies_the_answer_and_random_candidate_does_not(table: controls.Vocabulary) -> None:
    given = pools()
    hit = given.truth >= 0
    assert 0.3 < hit.mean() < 1
    oracle = controls.draw_requests(given, 2, "oracle", table, np.random.default_rng(0))
    met = controls.matches(given.candidates, oracle, table.values_of)
    known = oracle >= 0
    assert (met[np.flatnonzero(hit), given.truth[hit]] == known[hit]).all(), "all that is known of the truth is asked for"
    other = controls.draw_requests(given, 2, "random-candidate", table, np.random.default_rng(0))
    met = controls.matches(given.candidates, other, table.values_of)
    assert (met.all(axis=2) & ~given.is_truth()).any(axis=1).all(), "some other candidate meets the whole request"


def test_catalogue_draws_by_frequency(table: controls.Vocabulary) -> None:
    requests = controls.draw_requests(pools(6000), 1, "catalogue", table, np.random.default_rng(0))[:, 0]
    genre = table.attribute_of == 0
    counts = np.bincount(requests, minlength=len(table.labels))[genre]
    wanted = table.frequency()[genre]
    np.testing.assert_allclose(counts / counts.sum(), wanted / wanted.sum(), atol=0.05)


def test_pools_are_shuffled_and_truth_is_found() -> None:
    given = pools(500)
    items = np.take_along_axis(given.candidates, given.retriever_rank.argsort(axis=1), axis=1)
    scores = np.take_along_axis(given.retriever_score, given.retriever_rank.argsort(axis=1), axis=1)
    assert (np.diff(scores) < 0).all()
    assert 0.15 < (given.retriever_rank[:, 0] == 0).mean() < 0.35, "the first place tells nothing"
    assert (np.sort(items, axis=1)[:, 1:] != np.sort(items, axis=1)[:, :-1]).all()


def test_truth_is_put_in_only_where_asked_for() -> None:
    windows = pd.DataFrame({"window": [0, 1], "target": [9, 2]})
    found = pd.DataFrame({"window": [0, 1], "candidates": [[1, 2, 3]] * 2, "scores": [[3.0, 2.0, 1.0]] * 2})
    without = controls.make_pools(windows, found, 3, seed=0)
    assert without.truth[0] == -1 and set(without.candidates[0]) == {1, 2, 3}
    given = controls.make_pools(windows, found, 3, seed=0, insert_truth=True)
    assert set(given.candidates[0]) == {1, 2, 9} and given.candidates[0, given.truth[0]] == 9
    assert set(given.candidates[1]) == {1, 2, 3}


def test_saved_and_loaded_alike(start_stages: Callable[[Params, str], stages.Stage]) -> None:

    windows = pd.DataFrame(
        {"window": range(30), "target": [1 + i % 6 for i in range(30)], "split": ["train", "valid", "test"] * 10}
    )
    found = pd.DataFrame({"window": range(30), "candidates": [[1, 2, 3, 4]] * 30, "scores": [[4.0, 3.0, 2.0, 1.0]] * 30})
    params = ControlsParams(k=4, n_tokens=[0, 2], max_windows=MaxWindows(train=5), train_truth="any")
    prepared = controls.prepare(windows, found, ITEMS, params, seed=0)
    assert len(prepared.pools["train"].window) == 5
    stage = start_stages(Params(run="r", controls=params, figures=FiguresParams(k=3)), "controls")
    stage.finish(controls.save(prepared, windows.assign(user=0, history=[[1, 2]] * 30), stage.folder))
    again = controls.load("r")
    assert again.vocabulary.labels == prepared.vocabulary.labels and again.vocabulary.attributes == prepared.vocabulary.attributes
    np.testing.assert_array_equal(again.vocabulary.values_of, prepared.vocabulary.values_of)
    for key, requests in prepared.requests.items():
        np.testing.assert_array_equal(again.requests[key], requests)
    for split, kept in prepared.pools.items():
        for one, other in zip(kept, again.pools[split], strict=True):
            np.testing.assert_array_equal(one, other)
    assert list(controls.pool_coverage(prepared)["n_tokens"]) == [2]
    retrieved = controls.prepare(windows, found, ITEMS, params.model_copy(update={"train_truth": "retrieved"}), seed=0)
    assert (retrieved.pools["train"].truth >= 0).all() and (retrieved.pools["test"].truth < 0).any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scheme": "movielans"}, "no scheme 'movielans': name one of amazon, complete-journey, movielens"),
        ({"attributes": ["era", "prize"]}, "no attribute 'prize'"),
        ({"scheme": "amazon"}, "needs the column 'price'"),
    ],
)
def test_wrong_schemes(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(CorecError, match=sentence):
        controls.build_vocabulary(ITEMS, ControlsParams.model_validate(changes))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("attributes: [{name: era, column: year, below: [1980], labels: [old]}]", "attribute 1: attribute 'era': give `below`"),
        (
            "attributes: [{name: era, column: year, bukket: each}]",
            "attribute 1: there is no parameter 'bukket': did you mean 'bucket'",
        ),
        ("attributes: [{column: year}]", "attribute 1: parameter 'name' is"),
        ("attributes: [{name: '<era>', column: year, bucket: as_is}]", "attribute 1: attribute name '<era>': use letters"),
        ("attributes: 3", "it has no list `attributes`"),
        ("- 3", "it has no list `attributes`"),
        ("attributes: [", "while parsing"),
    ],
)
def test_a_malformed_scheme_ends_in_one_sentence(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(CorecError) as error:
        schemes.load_scheme("mine.yaml")
    sentence = str(error.value)
    assert fault in sentence and "\n" not in sentence and "http" not in sentence and sentence.endswith("movielens.yaml.")


def test_a_scheme_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("attributes:\n  - {name: era, column: year, below: [1980], labels: [old]}\n")
    with pytest.raises(CorecError, match="mine.yaml is not a scheme"):
        schemes.load_scheme(str(path))


@pytest.mark.parametrize(
    "entry",
    [
        "{name: a, column: year, below: [1990, 1980], labels: [x, y, z]}",
        "{name: a, column: year, below: [1980], labels: [x, x]}",
        "{name: a, column: genres, bucket: each, labels: [x]}",
        "{name: a, column: year, bucket: as_is}\n  - {name: a, column: genres, bucket: each}",
    ],
)
def test_scheme_files_with_faults(entry: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"attributes:\n  - {entry}\n")
    with pytest.raises(CorecError, match="is not a scheme"):
        schemes.load_scheme(str(tmp_path / "mine.yaml"))


def test_edges_on_a_column_of_text() -> None:
    attribute = schemes.Attribute(name="a", column="genres", below=[1], labels=["x", "y"])
    with pytest.raises(CorecError, match="the column 'genres' is not numeric"):
        attribute.values(pd.Series(["Comedy"]))


def test_more_constraints_than_attributes(table: controls.Vocabulary) -> None:
    with pytest.raises(CorecError, match="asks for 6 constraints, but only 5 attributes"):
        controls.draw_requests(pools(), 6, "catalogue", table, np.random.default_rng(0))


def test_thousands_of_values_cost_little() -> None:
    n = 30_000
    items = pd.DataFrame(
        {"item": np.arange(1, n + 1), "brand": [f"brand {i % 9000}" for i in range(n)], "price": 5.0, "rank": 7.0}
    )
    table = controls.build_vocabulary(items, ControlsParams(scheme="amazon", attributes=["price", "brand", "rank"]))
    assert table.values_of.shape == (n + 1, 3) and len(table.labels) == 9000 + 6 + 8
    assert owned(table, 9001, "brand") == ["brand 0"] and table.frequency().sum() == 3 * n


def test_anyone_can_load_the_windows_with_datasets_alone(start_stages: Callable[[Params, str], stages.Stage]) -> None:
    windows = pd.DataFrame(
        {
            "window": range(30),
            "target": [1 + i % 6 for i in range(30)],
            "split": ["train", "valid", "test"] * 10,
            "user": range(30),
        }
    ).assign(history=[[1 + i % 6, 2] for i in range(30)])
    found = pd.DataFrame({"window": range(30), "candidates": [[1, 2, 3, 4]] * 30, "scores": [[4.0, 3.0, 2.0, 1.0]] * 30})
    params = ControlsParams(k=4, n_tokens=[0, 2, 1], train_truth="any")
    prepared = controls.prepare(windows, found, ITEMS, params, seed=0)
    stage = start_stages(Params(run="r", controls=params, figures=FiguresParams(k=3)), "controls")
    controls.save(prepared, windows, stage.folder, "random-candidate")
    whole = datasets.load_from_disk(stage.folder / "dataset")
    assert set(whole) == {"train", "valid", "test"} and "retriever_rank" in (stage.folder / "dataset" / "README.md").read_text()
    names = json.loads((stage.folder / "vocabulary.json").read_text())["names"]
    assert names == [prepared.vocabulary.name(value) for value in range(len(names))]
    for split, pools in prepared.pools.items():
        part = whole[split]
        assert part["history"][:] == windows.set_index("window").loc[pools.window, "history"].tolist()
        for place, n in enumerate([0, 2, 1]):
            request = prepared.requests[split, n]
            met = controls.matches(pools.candidates, request, prepared.vocabulary.values_of)
            assert [row[place] for row in part["requests"]] == request.tolist()
            assert [row[place] for row in part["control"]] == controls.control_scores(met, pools.is_truth()).tolist()


def test_histories_that_are_too_short_end_in_a_sentence() -> None:
    windows = pd.DataFrame({"window": [0, 1], "target": [1, 2], "split": ["valid", "test"]})
    found = pd.DataFrame({"window": [0, 1], "candidates": [[1, 2, 3]] * 2, "scores": [[3.0, 2.0, 1.0]] * 2})
    with pytest.raises(CorecError, match="no window in split 'train': .* lower data.window"):
        controls.prepare(windows, found, ITEMS, ControlsParams(k=3, n_tokens=[0, 1]), seed=0)


def test_test_requests_of_other_protocols_are_kept(start_stages: Callable[[Params, str], stages.Stage]) -> None:
    rng = np.random.default_rng(0)
    rows = 60
    windows = pd.DataFrame({"window": range(rows), "user": range(rows), "target": rng.integers(1, 7, rows),
                            "history": [[1]] * rows, "split": np.repeat(["train", "valid", "test"], rows // 3)})  # fmt: skip
    found = [rng.permutation(np.arange(1, 7))[:4] for _ in range(rows)]
    frame = pd.DataFrame({"window": range(rows), "candidates": found, "scores": [np.arange(4, 0, -1.0)] * rows})
    params = ControlsParams(k=4, n_tokens=[0, 1, 2], train_truth="any", other_protocols=["oracle", "catalogue"])
    made = controls.prepare(windows, frame, ITEMS, params, seed=0)
    assert set(made.others) == {(protocol, n) for protocol in ("oracle", "catalogue") for n in (0, 1, 2)}
    plain = controls.prepare(windows, frame, ITEMS, params.model_copy(update={"other_protocols": []}), seed=0)
    for key, request in plain.requests.items():
        np.testing.assert_array_equal(made.requests[key], request)
    pools = made.pools["test"]
    truth = pools.candidates[np.arange(20), pools.truth]
    for row in np.flatnonzero(pools.truth >= 0):
        values = made.others["oracle", 2][row]
        assert set(values[values >= 0]) <= set(made.vocabulary.values_of[truth[row]]), "the oracle asks for what the target has"
    stage = start_stages(Params(run="r", controls=params, figures=FiguresParams(k=3)), "controls")
    stage.finish(controls.save(made, windows, stage.folder))
    again = controls.load("r")
    assert set(again.others) == set(made.others)
    for key, request in made.others.items():
        np.testing.assert_array_equal(again.others[key], request)
