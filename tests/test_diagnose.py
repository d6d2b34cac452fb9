"""Every sign is found in a run that is broken on purpose, and in no sound one."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_frontier import LENGTHS, PARAMS, World

from corec import controls, diagnose, rankers
from corec.scores import Scores

SOUND = {"hit": {"train": 0.34, "valid": 0.33}, "order_bias": 0.02}


def signs(world: World, own: Scores | None = None, facts: dict[str, Any] | None = None) -> pd.Series:
    own = own or world.exact
    table = diagnose.diagnose(world.prepared, world.rank(own), [own], world.users, PARAMS, facts or SOUND)
    assert list(table) == "sign number threshold found meaning remedy".split()
    return table.set_index("sign")["found"]


def asking(world: World, requests: np.ndarray) -> World:
    """The same world with other requests of two constraints."""
    world.prepared = world.prepared._replace(requests=world.prepared.requests | {("test", 2): requests})
    world.control[:, 2] = 8 * controls.matches(world.pools.candidates, requests, world.values_of).sum(axis=2)
    return world


def values_of_items(world: World, items: np.ndarray) -> np.ndarray:
    return world.values_of[items]


@pytest.fixture
def world() -> World:
    """Requests that most pools and half of the targets meet."""
    world = World()
    pools, rng = world.pools, np.random.default_rng(3)
    rows = np.arange(len(pools.window))
    other = (pools.truth + 1 + rng.integers(0, 7, len(rows))) % 8
    chosen = np.where((rng.random(len(rows)) < 0.45) & (pools.truth >= 0), pools.truth, other)
    return asking(world, values_of_items(world, pools.candidates[rows, chosen]))


def test_a_sound_run_shows_no_sign(world: World) -> None:
    found = signs(world)
    assert set(found.index) == set(diagnose.SIGNS)
    # Requests that half of the targets meet do tell something of the target, as those of the oracle do.
    assert not found.drop(["answer in the request", "target violates the request", "low pool coverage"]).any()


def test_requests_of_the_target_leak_it(world: World) -> None:
    rows = np.arange(len(world.pools.window))
    oracle = asking(world, values_of_items(world, world.pools.candidates[rows, world.pools.truth]))
    found = signs(oracle)
    assert found["answer in the request"] and not found["target violates the request"]


def test_requests_of_another_candidate_do_not(world: World) -> None:
    rows = np.arange(len(world.pools.window))
    found = signs(asking(world, values_of_items(world, world.pools.candidates[rows, (world.pools.truth + 1) % 8])))
    assert not found["answer in the request"] and found["target violates the request"]


def test_requests_that_nothing_meets_empty_the_pools(world: World) -> None:
    found = signs(asking(world, np.full((len(world.pools.window), 2), -1)))
    assert found["empty pools"] and found["low pool coverage"]


def test_requests_that_everything_meets_do_not(world: World) -> None:
    world.values_of[1:] = [0, 3]
    found = signs(asking(world, np.tile([0, 3], (len(world.pools.window), 1))))
    assert not found["empty pools"] and not found["low pool coverage"]
    assert "tokens not learnt" not in found.index, "there are no others to compare with"


def test_a_model_that_ignores_the_request_has_not_learnt_its_tokens(world: World) -> None:
    assert signs(world, world.exact._replace(control=np.zeros_like(world.control)))["tokens not learnt"]


@pytest.mark.parametrize(
    ("sign", "facts"),
    [
        ("order of the candidates matters", {"order_bias": 0.4}),
        ("in-sample pools", {"hit": {"train": 0.375, "valid": 0.3}}),
    ],
)
def test_what_earlier_stages_recorded(world: World, sign: str, facts: dict[str, Any]) -> None:
    assert signs(world, facts=SOUND | facts)[sign]
    assert sign not in signs(world, facts={"x": 1}).index, "an unknown number is no sign"


def test_numbers_are_those_of_their_definitions(world: World) -> None:
    ranked = world.rank(world.exact)
    table = diagnose.diagnose(world.prepared, ranked, [world.exact], world.users, PARAMS, SOUND).set_index("sign")
    met = controls.matches(world.pools.candidates, world.prepared.requests["test", 2], world.values_of).all(axis=2)
    assert table.loc["low pool coverage", "number"] == pytest.approx(met.sum(axis=1).mean())
    assert table.loc["empty pools", "number"] == pytest.approx(1 - met.any(axis=1).mean())
    values = controls.standardise(world.exact.total()[:, LENGTHS.index(2)])
    assert table.loc["tokens not learnt", "number"] == pytest.approx(values[met].mean() - values[~met].mean())
    assert isinstance(ranked, rankers.Ranked)
