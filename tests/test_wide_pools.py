from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from corec import CorecError, controls, data, evidence
from corec.evidence import pools
from corec.params import ControlsParams, DataParams, EvidenceParams, MaxWindows, Params

SOURCES = ["sasrec", "next", "cosine", "text", "popularity"]


def settings(**changes: Any) -> Params:
    own = {
        "k": 6,
        "n_tokens": [0, 1],
        "train_truth": "any",
        "pool": SOURCES,
        "max_windows": MaxWindows(train=500, valid=40, test=40),
    }
    return Params(
        data=DataParams(held_back=3),
        controls=ControlsParams.model_validate(own | changes),
        evidence=EvidenceParams(combiner="linear", history=5, recent=3, folds=2, text="tiny"),
    )


class World:
    """A small data set in which the next item often follows from the latest one, and a retriever that draws at random."""

    def __init__(self, atomic: Path) -> None:
        raw = data.prepare(DataParams(path=str(atomic), core=1, window=2, held_back=3))
        rng, windows = np.random.default_rng(0), raw.windows
        # Half of the targets are the item after the latest one: a transition that training shows too.
        interactions = raw.interactions.copy()
        interactions["item"] = (interactions["user"] + interactions["position"] * 2) % 50 + 1
        windows = windows.assign(
            target=interactions.set_index(["user", "position"])["item"]
            .loc[list(zip(windows["user"], windows["position"], strict=True))]
            .to_numpy()
        )
        self.tables = raw._replace(interactions=interactions, windows=windows)
        found = [rng.choice(np.arange(51, 61), 10, replace=False) for _ in range(len(windows))]
        self.candidates = pd.DataFrame(
            {"window": windows["window"], "candidates": found, "scores": [np.arange(10, 0, -1.0)] * len(windows)}
        )
        self.vocabulary = controls.build_vocabulary(raw.items, ControlsParams())

    def widen(self, params: Params) -> evidence.Wide:
        similar = evidence.similarities_of(self.tables, self.vocabulary, params)
        return evidence.widen(self.tables, self.candidates, similar, params)


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic)


def test_other_sources_find_what_the_retriever_misses(world: World) -> None:
    wide = world.widen(settings())
    shares = wide.recall.set_index("source")
    assert list(shares.index) == [*SOURCES, "union", "merged"] and (shares.loc["sasrec", ["train", "valid", "test"]] == 0).all()
    assert shares.loc["next", "test"] > 0.8 and shares.loc["merged", "test"] > 0.8
    assert (shares.loc["union", "test"] >= shares["test"].drop("union")).all() and shares.loc["merged", "K"] == 6
    assert wide.candidates["window"].is_unique and set(wide.candidates["candidates"].map(len)) == {6}
    assert all((np.diff(scores) <= 0).all() for scores in wide.candidates["scores"])
    prepared = controls.prepare(world.tables.windows, wide.candidates, world.tables.items, settings().controls, seed=0)
    assert (prepared.pools["test"].truth >= 0).mean() == pytest.approx(shares.loc["merged", "test"])


def test_no_candidate_is_seen_or_twice(world: World) -> None:
    wide = world.widen(settings()).candidates.set_index("window")["candidates"]
    table = world.tables.interactions
    for row in world.tables.windows[world.tables.windows["split"] != "in-sample"].itertuples():
        seen = table[(table["user"] == row.user) & (table["position"] < row.position)]["item"]
        found = wide[row.window]
        assert len(set(found)) == 6 and 0 not in found and not set(found) & set(seen)


@pytest.mark.parametrize("sources", [["next"], ["sasrec", "cosine"], ["popularity", "text"]])
def test_any_sources(world: World, sources: list[str]) -> None:
    if sources == ["sasrec", "cosine"]:
        wide = world.widen(settings(pool=sources))
        assert list(wide.recall["source"]) == [*sources, "union", "merged"]
    else:
        assert len(world.widen(settings(pool=sources)).candidates) > 0


def test_scores_of_the_sources_against_loops(world: World) -> None:
    params = settings()
    similar = evidence.similarities_of(world.tables, world.vocabulary, params)
    history = np.array([[3, 9, 0, 0, 0], [20, 3, 9, 4, 7]])
    counts = np.arange(61)
    following = pools.scores_of("next", history, similar, counts, 3)
    cosine = pools.scores_of("cosine", history, similar, counts, 3)
    text = pools.scores_of("text", history, similar, counts, 3)
    assert similar.text is not None and isinstance(similar.next, np.ndarray) and isinstance(similar.cosine, np.ndarray)
    for item in (1, 17, 60):
        assert following[1, item] == pytest.approx(
            sum(similar.next[h, item] / (i + 1) for i, h in enumerate([20, 3, 9])), abs=1e-5
        )
        assert cosine[0, item] == pytest.approx(sum(similar.cosine[h, item] for h in (3, 9)), abs=1e-5)
        assert text[0, item] == pytest.approx(sum(similar.text[h] @ similar.text[item] for h in (3, 9)), abs=1e-5)
    assert (pools.scores_of("popularity", history, similar, counts, 3) == counts).all()


def test_union_and_best_by_hand() -> None:
    assert pools.union([np.array([[3, 1]]), np.array([[1, 7]])]).tolist() == [[0, 1, 3, 7]]
    scores = np.array([[9.0, 1.0, 5.0, 3.0, 4.0]])
    assert pools.best_unseen(scores, [np.array([2])], 2).tolist() == [[4, 3]]


def test_too_few_windows_are_named(world: World) -> None:
    world.tables = world.tables._replace(windows=world.tables.windows.assign(target=99))
    with pytest.raises(CorecError, match="controls.pool: only .* training windows have their next item in the union"):
        world.widen(settings(pool=["sasrec", "popularity"]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"controls": {"pool": ["sasrec", "next"]}}, "lists sources that are merged by evidence"),
        ({"controls": {"pool": []}}, "lists sources that are merged by evidence: list at least one"),
        ({"controls": {"pool": ["next", "next"]}}, "list each source once"),
        (
            {"controls": {"pool": ["text"]}, "evidence": {"combiner": "linear"}, "data": {"held_back": 4}},
            "lists 'text': set evidence.text",
        ),
    ],
)
def test_sources_that_do_not_go_together(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CorecError, match=sentence):
        Params.checked(changes)
