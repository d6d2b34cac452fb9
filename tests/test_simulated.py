"""Simulated users: their constraints, their sessions by hand, and the study."""

from pathlib import Path

import numpy as np
import pandas as pd
from test_missing import vocabulary
from test_prior import params as with_prior
from test_prior import trained, world_with_priors

from corec import pages, reranker
from corec.params import EvaluationParams, StudyParams
from corec.studies import simulated
from corec.studies.simulated import Assumptions

SURE = Assumptions(patience=0.5, recognition=1.0, substitution=0.0, rounds=3)


def test_needs_are_those_of_the_wanted_item() -> None:
    shop = vocabulary([[0, 2], [1, 3, 4], [1]] + [[1, 3]] * 5, [["red", "green"], ["s", "m", "l"]])
    items = np.array([1, 2, 3] * 30)
    named = simulated.needs(items, shop, 0.0, "random", np.random.default_rng(0))
    assert {tuple(sorted(row)) for row in named[::3].tolist()} == {(0, 2)} and len(
        {tuple(row) for row in named[::3].tolist()}
    ) == 2
    assert {tuple(sorted(row)) for row in named[1::3].tolist()} == {(1, 3), (1, 4)}, "one of its two sizes"
    assert named[2::3].tolist() == [[1, -1]] * 30, "an unknown attribute is not named"
    rarest = simulated.needs(items, shop, 0.0, "rarest", np.random.default_rng(0))
    assert set(map(tuple, rarest[1::3].tolist())) == {(3, 1), (4, 1)}, "fewer items have this size than this colour"
    wrong = simulated.needs(items, shop, 0.5, "random", np.random.default_rng(0))
    same = (wrong == named).mean()
    assert 0.3 < 1 - same < 0.7 and (shop.kind(wrong) == shop.kind(named)).all(), "another value of the same attribute"


def test_a_session_by_hand() -> None:
    """A user who never stops finds the wanted item at its rank; one who examines one item a round needs as many rounds."""
    order = np.array([[2, 0, 1, 3]])
    better = np.array([[1, 2, 0, 3]])
    truth, appeal = np.array([1]), np.ones((1, 4))
    endless = simulated.simulate([order, better], truth, appeal, SURE._replace(patience=0.9999), 50, 0)
    assert endless.found.all() and (endless.rounds == 1).all() and (endless.examined == 3).all() and not endless.substitute.any()
    short = simulated.simulate([order, better], truth, appeal, SURE._replace(patience=1e-9), 50, 0)
    assert short.found.all() and (short.rounds == 2).all() and (short.examined == 2).all(), "item 2, then item 1 is the first"
    same = simulated.simulate([order], truth, appeal, SURE._replace(patience=1e-9), 50, 0)
    assert (same.rounds == 3).all() and (same.examined == 3).all(), "items that were examined are skipped"
    tired = simulated.simulate([order], truth, appeal, SURE._replace(patience=1e-9, rounds=2), 50, 0)
    assert not tired.found.any() and (tired.rounds == 2).all() and (tired.examined == 2).all()
    takes = simulated.simulate([order], truth, appeal, SURE._replace(substitution=1.0), 50, 0)
    assert takes.substitute.all() and (takes.examined == 1).all(), "the first item is taken instead"
    blind = simulated.simulate([order], truth, 0 * appeal, SURE._replace(recognition=0.0, patience=0.9999), 50, 0)
    assert not blind.found.any() and (blind.examined == 4).all()


def test_the_mean_number_of_items_is_that_of_the_geometric_distribution() -> None:
    order, nothing = np.arange(200)[None], np.zeros((1, 200))
    given = SURE._replace(patience=0.8, rounds=1, recognition=0.0)
    session = simulated.simulate([order], np.array([199]), nothing, given, 20_000, 0)
    assert abs(session.examined.mean() - 5) < 0.15


def test_the_study_of_simulated_users(atomic: Path, tmp_path: Path) -> None:
    world = world_with_priors(atomic)
    study, evaluation = StudyParams(sessions=5), EvaluationParams(bootstrap=20)
    own = with_prior(world).model_copy(update={"study": study, "evaluation": evaluation, "run": "tried"})
    hit = np.flatnonzero(world.prepared.pools["test"].truth >= 0)
    pools = world.prepared.pools["test"].take(hit)
    asked = simulated.ask(pools, world.prepared.vocabulary, 0)
    assert set(asked.needs) == {("random", 0.0), ("random", 0.1), ("random", 0.3), ("rarest", 0.0)}
    assert all(places[0] == 0 for places in asked.places.values()) and asked.scored[0].shape == (len(hit), 0)
    scores = [reranker.score_parts(trained(world), world.examples, pools, asked.scored)] * 2
    prior = np.stack([world.examples.prior[window] for window in pools.window])
    users = world.tables.windows.set_index("window").loc[pools.window, "user"].to_numpy()
    table = simulated.measure(asked, scores, pools, prior, users, world.tables, world.prepared.vocabulary, own)
    assert list(table) == simulated.COLUMNS and set(table["seeds"]) == {2} and set(table["sessions"]) == {5}
    assert (table.loc[table["model"] == simulated.BASE, "ahead"] == 0).all()
    whole = table.pivot(index=["assumption", "level", "model"], columns="metric", values="value")
    assert (whole["found"] + whole["substitute"] <= 1 + 1e-9).all() and (whole["rounds"] <= 6).all()
    assert set(table["assumption"]) == {"default", *simulated.VARIED}
    written = simulated.keep(table, tmp_path / "figures")
    assert [path.name for path in written] == ["simulated.csv", "simulated.png"]
    assert (tmp_path / "figures" / "results.md").read_text() == pages.study_page(tmp_path / "figures")
    again = pd.read_csv(written[0])
    assert len(again) == len(table)
