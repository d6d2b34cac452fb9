"""Requests in conflict, excluded values, and the signal that a request cannot be met."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_missing import vocabulary
from test_prior import params as with_prior
from test_prior import trained, world_with_priors

from corec import controls, pages, reranker
from corec.controls import Pools, Vocabulary
from corec.params import EvaluationParams
from corec.scores import Scores
from corec.studies import conflicting


@pytest.fixture
def shop() -> Vocabulary:
    """Items 1 to 4: two colours (one each), three sizes (item 4 has two)."""
    return vocabulary([[0, 2], [1, 3], [0, 3], [1, 2, 4]], [["red", "green"], ["s", "m", "l"]])


def pools_of(candidates: list[list[int]], truth: list[int]) -> Pools:
    items = np.array(candidates)
    ranks = np.broadcast_to(np.arange(items.shape[1]), items.shape)
    return Pools(np.arange(len(items)), items, ranks, -ranks.astype(float), np.array(truth))


def test_pairs_are_met_together_apart_or_never(shop: Vocabulary) -> None:
    pools = pools_of([[1, 2], [1, 3]] * 20, [0, 0] * 20)
    drawn = conflicting.draw_pairs(pools, shop, np.random.default_rng(0))
    pairs = {kind: {tuple(sorted(pair)) for pair in request.tolist()} for kind, request in drawn.items()}
    # Candidates 1 and 2 are red s and green m; candidates 1 and 3 are red s and red m.
    assert pairs["compatible"] == {(0, 2), (1, 3), (0, 3)}
    assert pairs["no candidate"] == {(0, 3), (1, 2), (-1, -1)}
    assert pairs["contradictory"] == {(0, 1), (-1, -1)}, "an item has two sizes, so two sizes may be met together"
    met = controls.matches(pools.candidates, drawn["no candidate"], shop.values_of)
    asked = (drawn["no candidate"] >= 0).all(axis=1)
    assert met.any(axis=1)[asked].all() and not met.all(axis=2).any()
    assert len({tuple(pair) for pair in drawn["compatible"].tolist()}) == 6, "both orders occur"


def test_familiar_and_opposed_values_follow_history_and_embeddings(shop: Vocabulary) -> None:
    embeddings = np.array([[0, 0], [1, 0], [-1, 0], [1, 0.1], [-1, 0.2]], float)
    pools = pools_of([[1, 2, 3, 4]] * 50, [0] * 50)
    drawn = conflicting.draw_single(pools, [[1]] * 50, embeddings, shop, np.random.default_rng(0))
    assert set(drawn["familiar"].ravel()) == {0}, "red: more similar than s, which item 4 also has"
    assert set(drawn["opposed"].ravel()) <= {1, 4}, "green or l, never consumed"
    assert set(drawn["excluded"].ravel()) == {0, 1, 2, 3, 4}
    alone = conflicting.draw_single(pools_of([[1, 3]], [0]), [[1, 2, 4]], embeddings, shop, np.random.default_rng(0))
    assert alone["opposed"].tolist() == [[-1]] and alone["excluded"][0, 0] in (2, 3), "nothing is new; every candidate is red"


def test_the_signal_is_frechets_bound() -> None:
    control = np.array([[15.2, 8.0], [8.0, 8.0], [16.0, 0.0], [3.2, 3.0]])  # logits 8: sums 1.9, 1, 2 and 0.4
    np.testing.assert_allclose(conflicting.unmet_probability(control, 2, 8), [0.1, 1, 0, 1])
    np.testing.assert_allclose(conflicting.unmet_probability(control[:, 1:], 1, 8), [0, 0, 1, 0.625])


def test_the_study_of_conflicts(atomic: Path, tmp_path: Path) -> None:
    world = world_with_priors(atomic)
    own = with_prior(world).model_copy(update={"evaluation": EvaluationParams(bootstrap=20, strengths=[0, 1]), "run": "tried"})
    pools, prepared = world.prepared.pools["test"], world.prepared
    rng = np.random.default_rng(0)
    histories = [world.examples.history[window] for window in pools.window]
    embeddings = rng.normal(size=(len(world.tables.items) + 1, 4))
    kinds = conflicting.draw_pairs(pools, prepared.vocabulary, rng)
    kinds |= conflicting.draw_single(pools, histories, embeddings, prepared.vocabulary, rng)
    requests = conflicting.collect(kinds, prepared, own)
    assert len(requests.scored) == 1 + 2 * 3 + 3 + 2 and set(requests.catalogue) == {1, 2}
    model = trained(world)
    scores = [reranker.score_parts(model, world.examples, pools, requests.scored)] * 2
    users = world.tables.windows.set_index("window").loc[pools.window, "user"].to_numpy()
    prior = np.stack([world.examples.prior[window] for window in pools.window])
    table = conflicting.measure(requests, scores, prepared, prior, users, own)
    cell = table.set_index(["kind", "model", "strength", "metric"])["value"].sort_index()
    for kind in kinds:
        none = cell[kind, "boost", 0.0]
        pd.testing.assert_series_equal(none, cell[kind, "combiner", np.nan].rename(none.name), check_names=False)
    assert cell["excluded", "rule+combiner", np.nan, "avoided"] >= cell["excluded", "combiner", np.nan, "avoided"]
    assert cell["no candidate", "rule+combiner", np.nan, "both"] == 0
    assert (table["low"] <= table["value"] + 1e-9).all() and (table["value"] <= table["high"] + 1e-9).all()
    quality, diagram = conflicting.unmet(requests, scores, prepared, users, own)
    folder = tmp_path / "figures"
    written = conflicting.keep(table, quality, diagram, folder)
    assert sorted(path.name for path in written) == ["conflicts.csv", "conflicts.png", "reliability.csv", "unmet.csv"]
    assert (folder / "results.md").read_text() == pages.study_page(folder)


def test_a_signal_that_knows_the_truth_has_an_area_of_one(atomic: Path) -> None:
    world = world_with_priors(atomic)
    own = with_prior(world)
    pools, prepared = world.prepared.pools["test"], world.prepared
    requests = conflicting.collect({}, prepared, own)
    found = np.zeros((len(pools.window), len(requests.scored), pools.candidates.shape[1]), np.float32)
    for place in requests.catalogue.values():
        met = controls.matches(pools.candidates, requests.scored[place], prepared.vocabulary.values_of)
        found[:, place] = own.reranker.control_logits * met.sum(axis=2)
    users = np.arange(len(pools.window))
    quality, diagram = conflicting.unmet(requests, [Scores(found, found, found)], prepared, users, own)
    known = quality[quality["signal"] == "corec"]
    assert len(known) and (known["auc"] == 1).all() and (known["brier"] == 0).all()
    rows = diagram[diagram["signal"] == "corec"]
    np.testing.assert_array_equal(rows["predicted"], rows["observed"])
