"""Sessions: the edits of the requests, stability by hand, and the study."""

from pathlib import Path

import numpy as np
import pytest
from test_conflicts import pools_of
from test_missing import vocabulary
from test_prior import params as with_prior
from test_prior import trained, world_with_priors

from corec import CorecError, pages, reranker
from corec.params import EfficiencyParams, EvaluationParams
from corec.reranker import engine
from corec.studies import sessions


def test_turns_add_change_and_drop_one_constraint() -> None:
    shop = vocabulary([[0, 2, 5], [1, 3, 6], [0, 4, 5]], [["red", "green"], ["s", "m", "l"], ["new", "old"]])
    pools = pools_of([[1, 2, 3]] * 30, [0] * 30)
    one, two, three, four, five = sessions.draw(pools, shop, np.random.default_rng(0))
    assert [part.shape[1] for part in (one, two, three, four, five)] == list(sessions.LENGTHS)
    assert (two[:, :1] == one).all() and (three[:, 0] == one[:, 0]).all() and (four[:, :2] == three).all()
    assert (five == four[:, 1:]).all(), "the first constraint is dropped"
    assert (three[:, 1] != two[:, 1]).all() and (shop.kind(three[:, 1]) == shop.kind(two[:, 1])).all(), "another value"
    assert all(len(set(kinds)) == 3 for kinds in shop.kind(four).tolist()), "of three attributes"
    assert {int(kind) for kind in shop.kind(two[:, 1])} == {0, 1, 2}, "any attribute may be the one that is changed"
    alone = sessions.draw(pools_of([[1, 1]], [0]), shop, np.random.default_rng(0))
    assert all((part == -1).all() for part in alone), "no other value among the candidates"


def test_kept_pairs_by_hand() -> None:
    before, after = np.array([[0, 1, 2, 3]]), np.array([[3, 1, 0, 2]])
    change = np.array([[0, 0, 0, 1]])  # candidate 3 moves up; of the pairs of 0, 1 and 2, that of 0 and 1 has changed its order
    assert sessions.kept_pairs(before, after, change).tolist() == [pytest.approx(2 / 3)]
    assert sessions.kept_pairs(before, before, change).tolist() == [1]
    assert sessions.kept_pairs(before, after, np.array([[0, 1, 2, 3]])).tolist() == [1], "no pair counts"


def test_the_study_of_sessions(atomic: Path, tmp_path: Path) -> None:
    world = world_with_priors(atomic)
    own = with_prior(world).model_copy(update={"evaluation": EvaluationParams(bootstrap=20), "run": "tried"})
    own = own.model_copy(update={"efficiency": EfficiencyParams(repeats=2, users=3)})
    pools, prepared = world.prepared.pools["test"], world.prepared
    requests = sessions.draw(pools, prepared.vocabulary, np.random.default_rng(0))
    model = trained(world)
    scores = [reranker.score_parts(model, world.examples, pools, requests)] * 2
    users = world.tables.windows.set_index("window").loc[pools.window, "user"].to_numpy()
    prior = np.stack([world.examples.prior[window] for window in pools.window])
    table = sessions.measure(requests, scores, prepared, prior, users, own)
    kept = table[table["metric"] == "kept"].set_index(["model", "turn"])["value"]
    assert (kept[["combiner", "rule+combiner", "boost"]] == 1).all(), "they depend on prior and constraints met only"
    assert sorted(set(kept.index.get_level_values("turn"))) == [2, 3, 4, 5]
    control = table[table["metric"] == "cp"].pivot(index="turn", columns="model", values="value")
    assert (control["rule+combiner"] >= control.max(axis=1) - 1e-9).all()
    times = sessions.latency(engine.merge(model), world.examples, pools, requests, own)
    assert list(times["way"]) == ["whole prompt"] * 5 + ["cached prefix"] * 5 + ["prefix"]
    assert (times["p50_ms"] > 0).all() and (times["largest_difference"] < 1e-4).all()
    written = sessions.keep(table, times, tmp_path / "figures")
    assert sorted(path.name for path in written) == ["session_latency.csv", "sessions.csv", "sessions.png"]
    assert (tmp_path / "figures" / "results.md").read_text() == pages.study_page(tmp_path / "figures")
    before = world.build(world.params(request_position="before", readout="candidate"))
    with pytest.raises(CorecError, match="No prefix can be cached"):
        sessions.latency(before, world.examples, pools, requests, own)
