from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_reranker import World

from corec import evaluation
from corec.params import FiguresParams, Params, RerankerParams
from corec.reranker import Examples, Reranker, train
from corec.studies import orders, readouts


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic, k=8)


def users(world: World) -> np.ndarray:
    return world.tables.windows.set_index("window").loc[world.prepared.pools["test"].window, "user"].to_numpy()


def settings(world: World) -> Params:
    return with_study(world.params(), order_minutes=0.01, seeds=2)


def with_study(params: Params, **changes: object) -> Params:
    return params.model_copy(update={"study": params.study.model_copy(update=changes)})


def test_orders_are_trained_once_and_kept(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, curves = orders.compare_orders(world.tables.items, world.examples, settings(world), tmp_path)
    assert list(scores) == [(name, seed) for seed in (0, 1) for name in orders.ORDERS]
    shape = (len(world.prepared.pools["test"].window), 3, 8)
    assert all(found.shape == shape and np.isfinite(found).all() for found in scores.values())
    first = curves[curves["step"] == 0].set_index(["variant", "seed"])["requests"]
    assert (first.xs(0, level="seed") == [8, 8, 8, 8]).all(), "8 windows of one request, 2 of 4"
    monkeypatch.setattr(orders, "train", None)
    again, same = orders.compare_orders(world.tables.items, world.examples, settings(world), tmp_path)
    pd.testing.assert_frame_equal(curves, same)
    assert all((scores[key] == again[key]).all() for key in scores)
    longer = settings(world).model_copy(update={"seed": 1})
    with pytest.raises(TypeError):  # another seed's training is not there
        orders.compare_orders(world.tables.items, world.examples, longer, tmp_path)


def test_some_orders_alone(world: World, tmp_path: Path) -> None:
    params = settings(world)
    params = with_study(params, orders=["candidate, before"], seeds=1)
    scores, curves = orders.compare_orders(world.tables.items, world.examples, params, tmp_path / "stage")
    assert list(scores) == [("candidate, before", 0)] and set(curves["variant"]) == {"candidate, before"}
    table = orders.judge_orders(scores, world.examples, users(world), params)
    assert (table[table["variant"] == "candidate, before"]["ahead"] == 0).all()
    orders.keep_orders(table, curves, tmp_path / "figures")


def test_the_first_seed_tries_the_rates_and_validation_chooses(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def taken(reranker: Reranker, examples: Examples, params: Params, folder: None) -> pd.DataFrame:
        trained.append((params.seed, params.reranker.lr))
        return train(reranker, examples, params, folder)

    monkeypatch.setattr(orders, "train", taken)
    monkeypatch.setattr(orders, "valid_cp", lambda *_: 0.9 if trained[-1][1] == 0.5 * given.reranker.lr else 0.1)
    given = with_study(settings(world), orders=["late, after"], rates=[1.0, 0.5, 0.25])
    scores, curves = orders.compare_orders(world.tables.items, world.examples, given, tmp_path / "stage")
    lr = given.reranker.lr
    assert trained == [(0, lr), (0, 0.5 * lr), (0, 0.25 * lr), (1, 0.5 * lr)] and list(scores) == [
        ("late, after", 0),
        ("late, after", 1),
    ]
    assert curves.groupby(["seed", "rate"])["valid_cp"].first().to_dict() == {
        (0, 0.25): 0.1,
        (0, 0.5): 0.9,
        (0, 1.0): 0.1,
        (1, 0.5): 0.9,
    }
    orders.keep_orders(orders.judge_orders(scores, world.examples, users(world), given), curves, tmp_path / "figures")


def test_rates_are_chosen_by_the_cp_of_validation_requests(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pools, values = world.prepared.pools["valid"], world.prepared.vocabulary.values_of
    rule, scores = [], []
    for n in (1, 2):
        judged = evaluation.judge(pools, world.prepared.requests["valid", n], values)
        rule.append(evaluation.by_window(evaluation.rule_order(pools, judged.met), judged, [5])["cp", 5, n].mean())
        scores.append(judged.met.sum(2) - 0.01 * pools.retriever_rank)
    monkeypatch.setattr(orders, "score", lambda *_: np.stack(scores, axis=1))
    params = settings(world)
    assert world.controls.n_tokens == [0, 1, 2]
    assert orders.valid_cp(world.build(params), world.examples, params) == pytest.approx(np.mean(rule))


def test_trial_steps_leave_nothing_behind(world: World) -> None:
    params = settings(world)
    model = world.build(params)
    before = {name: value.clone() for name, value in model.trainable().items()}
    assert orders.step_seconds(model, world.examples, params, plain=True) > 0
    assert all(value.grad is None and (value == before[name]).all() for name, value in model.trainable().items())


def test_orders_are_judged_over_seeds_and_against_the_papers(world: World) -> None:
    params = settings(world)
    pools, n_tokens = world.prepared.pools["test"], world.controls.n_tokens
    rng, perfect = np.random.default_rng(0), []
    for n in n_tokens:
        judged = evaluation.judge(pools, world.prepared.requests["test", n], world.prepared.vocabulary.values_of)
        perfect.append(judged.met.sum(2) - 0.01 * pools.retriever_rank)
    best = np.stack(perfect, axis=1)
    scores = {("index, before", seed): rng.random(best.shape) for seed in (0, 1)}
    scores |= {("late, after", 0): best, ("late, after", 1): best}
    table = orders.judge_orders(scores, world.examples, users(world), params).set_index(["variant", "n_tokens", "metric"])
    for n in (1, 2):
        np.testing.assert_allclose(table.loc[("late, after", n, "cp"), "value"], table.loc[("rule", n, "cp"), "value"])
    assert (table.loc["index, before"][["ahead", "ahead_low", "ahead_high"]] == 0).all(axis=None)
    row = table.loc[("index, before", 1, "cp")]
    assert row["lowest"] <= row["value"] <= row["highest"] and row["seeds"] == 2 and row["low"] <= row["value"] <= row["high"]
    gap = table.loc[("late, after", 1, "cp")]
    assert gap["ahead"] == pytest.approx(gap["value"] - row["value"]) and gap["ahead_low"] <= gap["ahead"] <= gap["ahead_high"]
    assert ("late, after", 0, "cp") not in table.index and ("late, after", 0, "ndcg") in table.index


def test_what_was_compared_is_drawn_and_kept(world: World, tmp_path: Path) -> None:
    scores, curves = orders.compare_orders(world.tables.items, world.examples, settings(world), tmp_path / "stage")
    table = orders.judge_orders(scores, world.examples, users(world), settings(world))
    orders.keep_orders(table, curves, tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "orders.csv",
        "order_curves.csv",
        "orders.png",
        "results.md",
    }
    again = pd.read_csv(tmp_path / "figures" / "orders.csv")
    assert again["variant"].tolist() == table["variant"].tolist()


def test_readouts_side_by_side(world: World) -> None:
    curves = readouts.compare_readouts(world.tables.items, world.examples, with_study(world.params(), readout_steps=1))
    assert curves["readout"].tolist() == list(readouts.READOUTS) and np.isfinite(curves["loss"]).all()


def test_few_candidates_have_a_smaller_cut_off(atomic: Path) -> None:
    small = World(atomic, k=4)
    params = Params(controls=small.controls, figures=FiguresParams(k=3), reranker=RerankerParams(backbone="tiny"))
    count = len(small.prepared.pools["test"].window)
    table = orders.judge_orders(
        {("late, after", 0): np.random.default_rng(0).random((count, 3, 4))}, small.examples, users(small), params
    )
    assert table["value"].notna().all() and orders.valid_cp(small.build(params), small.examples, params) >= 0
