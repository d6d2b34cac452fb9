import numpy as np
import pandas as pd
import pytest
from scipy import stats

from corec import controls, evaluation, frontier, intervals, rankers
from corec.params import ControlsParams, DataParams, EvaluationParams, EvidenceParams, FiguresParams, Params, RerankerParams
from corec.scores import Scores

WINDOWS, K = 240, 8
LENGTHS = [0, 1, 2]
PARAMS = Params(
    controls=ControlsParams(k=K, n_tokens=LENGTHS),
    data=DataParams(held_back=4),
    evidence=EvidenceParams(combiner="linear"),
    reranker=RerankerParams(prior=True, control="constraints"),
    evaluation=EvaluationParams(ks=[3], bootstrap=200, strengths=[0, 0.1, 0.3, 1]),
    figures=FiguresParams(k=3),
)


class World:
    """Random pools, requests and priors, and a re-ranker that counts constraints exactly."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.values_of = np.r_[[[-1, -1]], np.stack([rng.integers(0, 3, 50), rng.integers(3, 6, 50)], axis=1)]
        candidates = np.stack([rng.choice(np.arange(1, 51), K, replace=False) for _ in range(WINDOWS)])
        ranks = np.argsort(rng.random((WINDOWS, K)), axis=1)
        truth = np.where(rng.random(WINDOWS) < 0.8, (ranks < 4).argmax(axis=1), -1)
        self.pools = controls.Pools(np.arange(WINDOWS), candidates, ranks, -ranks.astype(np.float32), truth)
        requests = {n: np.stack([rng.integers(3 * i, 3 * i + 3, WINDOWS) for i in range(n)], axis=1) if n else np.empty((WINDOWS, 0), int)
                    for n in LENGTHS}  # fmt: skip
        vocabulary = controls.Vocabulary((), ("a",) * 6, np.array([0, 0, 0, 1, 1, 1]), self.values_of)
        self.prepared = controls.Prepared(vocabulary, {"test": self.pools}, {("test", n): r for n, r in requests.items()})
        self.prior = (3 * self.pools.is_truth() + rng.normal(size=(WINDOWS, K))).astype(np.float32)
        met = [controls.matches(candidates, requests[n], self.values_of).sum(axis=2) for n in LENGTHS]
        self.control = 8 * np.stack(met, axis=1).astype(np.float32)
        self.exact = Scores(np.repeat(self.prior[:, None], 3, axis=1), np.zeros_like(self.control), self.control)
        self.given = rankers.Inputs(self.values_of[candidates, 0].astype(float), self.prior, self.prior)
        self.users = np.arange(WINDOWS) // 2

    def rank(self, *own: Scores, params: Params = PARAMS) -> rankers.Ranked:
        return rankers.rank(self.prepared, self.given, {"corec": own, "zero-shot": own[:1]}, params, {0: np.inf, 1: 1.0, 2: 0.5})


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def same(left: np.ndarray, right: np.ndarray) -> None:
    np.testing.assert_array_equal(left, np.broadcast_to(right, left.shape))


def test_rankers_against_their_definitions(world: World) -> None:
    ranked = world.rank(world.exact)
    for n in LENGTHS:
        orders, met = ranked.orders[n], ranked.judged[n].met
        assert set(orders) == {*evaluation.MODELS, "no-prior"}
        same(orders["boost"], evaluation.order_by(world.prior + met.sum(axis=2)))
        same(orders["rule+combiner"], evaluation.order_by(world.prior + 1000 * met.sum(axis=2)))
        same(orders["hard-filter+combiner"], evaluation.order_by(world.prior + 1000 * met.all(axis=2)))
        same(orders["rule"], evaluation.order_by(1000.0 * met.sum(axis=2) - world.pools.retriever_rank))
        same(orders["no-token"][0], evaluation.order_by(world.prior))
        same(orders["corec"][0], evaluation.order_by(world.prior + 8 * met.sum(axis=2)))
        same(orders["no-prior"][0], evaluation.order_by(8.0 * met.sum(axis=2)))
        same(orders["popularity"], evaluation.order_by(world.given.popularity))


def test_a_strict_filter_returns_nothing_else(world: World) -> None:
    ranked = world.rank(world.exact)
    measured = evaluation.measure(ranked.orders, ranked.judged, PARAMS)
    values = dict(zip(measured.keys, measured.values.T, strict=True))
    for n in (1, 2):
        met = ranked.judged[n].met.all(axis=2)
        outside = (world.pools.truth >= 0) & ~met[np.arange(WINDOWS), world.pools.truth]
        assert (values[n, "hard-filter-strict", "ndcg", 3, 0][outside] == 0).all()
        np.testing.assert_allclose(values[n, "hard-filter-strict", "cp", 3, n], values[n, "hard-filter", "cp", 3, n])
        np.testing.assert_allclose(values[n, "hard-filter-strict", "cp", 3, 1], values[n, "hard-filter-strict", "cp", 3, n])
        assert (values[n, "hard-filter-strict", "ndcg", 3, 0] <= values[n, "hard-filter", "ndcg", 3, 0]).all()


def test_a_model_without_a_prior_is_blended(world: World) -> None:
    params = PARAMS.model_copy(update={"reranker": RerankerParams()})
    orders = world.rank(world.exact, params=params).orders
    assert {"no-token-alone", "corec-alone"} <= set(orders[1]) and "no-prior" not in orders[1]
    same(orders[1]["no-token"][0], evaluation.retriever_order(world.pools))
    same(orders[2]["corec"][0], evaluation.order_by(evaluation.blend(world.exact.total()[:, 2], world.pools, 0.5)))


def test_metrics_of_several_trainings_are_averaged(world: World) -> None:
    other = world.exact._replace(prior=np.random.default_rng(1).normal(size=world.exact.prior.shape).astype(np.float32))
    each = [evaluation.measure(r.orders, r.judged, PARAMS, ["corec"]) for r in (world.rank(world.exact), world.rank(other))]
    ranked = world.rank(world.exact, other)
    both = evaluation.measure(ranked.orders, ranked.judged, PARAMS, ["corec"])
    np.testing.assert_allclose(both.values, (each[0].values + each[1].values) / 2)


def test_an_exact_model_lies_on_the_frontier_of_the_boost(world: World) -> None:
    points = frontier.sweep(world.rank(world.exact), [world.exact], world.prior, world.users, PARAMS)
    table = frontier.table(points, PARAMS)
    assert list(table) == frontier.COLUMNS and (table["n_users"] == 120).all()
    curves = {model: rows.reset_index(drop=True) for model, rows in table.groupby("model")}
    pd.testing.assert_frame_equal(curves["corec"].drop(columns="model"), curves["boost"].drop(columns="model"))
    gaps = frontier.gaps(points, PARAMS)
    assert len(gaps) == 8 and gaps["gap"].abs().max() < 1e-12
    assert ((gaps["low"] <= 1e-12) & (gaps["high"] >= -1e-12)).all()
    one = table.query("model == 'corec' and n_tokens == 2")
    assert one["cp"].is_monotonic_increasing and one["strength"].tolist() == [0, 0.1, 0.3, 1]
    combiner = table.query("model == 'combiner' and n_tokens == 2").iloc[0]
    assert np.isnan(combiner["strength"]) and combiner["ndcg"] == one["ndcg"].iloc[0]


def test_the_gap_interpolates_the_boost() -> None:
    boost = np.array([[0.2, 0.5], [0.6, 0.1]])
    ours = np.array([[0.4, 0.35], [0.1, 0.5], [0.7, 0.2]])
    np.testing.assert_allclose(frontier.difference(ours, boost), [0.05, 0.0, 0.1])
    # A point of equal CP counts by its best NDCG, and one that a better point exceeds in both counts as that point.
    boost = np.array([[0.2, 0.5], [0.4, 0.3], [0.4, 0.2], [0.6, 0.35]])
    np.testing.assert_allclose(frontier.difference(np.array([[0.4, 0.35], [0.3, 0.4]]), boost), [0.0, -0.025])


def test_several_seeds_have_rows_of_their_own_and_a_mean(world: World) -> None:
    worse = world.exact._replace(control=np.zeros_like(world.control))
    points = frontier.sweep(world.rank(world.exact, worse), [world.exact, worse], world.prior, world.users, PARAMS)
    table = frontier.table(points, PARAMS).query("model == 'corec' and n_tokens == 1 and strength == 1")
    assert table["seed"].tolist()[:2] == [0, 1] and pd.isna(table["seed"].iloc[2])
    assert table["cp"].iloc[2] == pytest.approx(table["cp"].iloc[:2].mean())
    assert (frontier.gaps(points, PARAMS).query("strength == 1")["high"] < 0).all(), "half of the trainings obey nothing"


def test_claims_of_a_model_that_keeps_them_and_of_one_that_does_not(world: World) -> None:
    def claims(own: Scores) -> pd.DataFrame:
        ranked = world.rank(own)
        points = frontier.sweep(ranked, [own], world.prior, world.users, PARAMS)
        return frontier.claims(points, frontier.without_tokens(ranked, world.users, 3), PARAMS)

    good = claims(world.exact)
    assert good["holds"].tolist()[:2] == [True, True] and len(good) == 8
    assert good[good["claim"].str.startswith("CP at full")]["holds"].all()
    assert np.isnan(good["strength"].iloc[0]) and (good["low"] <= good["value"]).all() and (good["value"] <= good["high"]).all()
    assert good.loc[good["claim"].str.contains("85 %"), "strength"].isin(PARAMS.evaluation.strengths).all()
    deaf = claims(world.exact._replace(control=np.zeros_like(world.control)))
    assert not deaf[deaf["claim"].str.startswith("CP at full")]["holds"].any()
    missed = deaf[deaf["claim"].str.contains("85 %")]
    assert len(missed) == 2 and missed["value"].isna().all() and not missed["holds"].any(), "a claim that fails is not left out"


def test_holm_against_a_worked_example() -> None:
    np.testing.assert_allclose(intervals.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert intervals.holm(np.array([0.9, 0.8])).tolist() == [1, 1]


def test_comparisons_find_a_difference_and_miss_none_where_there_is_none(world: World) -> None:
    rng, users, rows = np.random.default_rng(0), np.arange(400), []
    base = rng.random(400)
    values = {"corec": base, "better": base + 0.02 + 0.05 * rng.normal(size=400), "same": base + 0.05 * rng.normal(size=400)}
    for model, value in values.items():
        for metric, tau in (("ndcg", pd.NA), ("cp", 1)):
            rows.append(
                pd.DataFrame({"user": users, "model": model, "n_tokens": 1, "metric": metric, "k": 3, "tau": tau, "value": value})
            )
    table = pd.concat(rows).astype({"tau": "Int64"})
    twin = table[table["model"] == "same"].assign(model="twin")
    found = intervals.compare(pd.concat([table, twin]), PARAMS).set_index(["other", "metric"])
    better, alike = found.loc["better", "ndcg"], found.loc["same", "ndcg"]
    assert (
        better["p_holm"] < 0.01 and better["high"] < 0 and better["difference"] == pytest.approx((base - values["better"]).mean())
    )
    assert alike["p"] > 0.01 and alike["low"] < 0 < alike["high"]
    assert better["p"] == pytest.approx(stats.ttest_rel(base, values["better"]).pvalue, abs=1e-3)
    spread = np.std(base - values["better"], ddof=1)
    assert better["users_for_001"] == np.ceil((2.8016 * spread / 0.01) ** 2)
    assert found["n_users"].unique().tolist() == [400] and len(found) == 4


def test_a_report_names_its_protocol(world: World) -> None:
    report = frontier.report(world.rank(world.exact), [world.exact], world.prior, world.users, PARAMS)
    assert all((table["protocol"] == "random-candidate").all() for table in report)
    assert [len(table) for table in report] == [2 * (4 + 4 + 13 - 1), 8, 8]


def test_the_frontier_is_drawn(world: World) -> None:
    points = frontier.sweep(world.rank(world.exact), [world.exact], world.prior, world.users, PARAMS)
    figure = frontier.draw(frontier.table(points, PARAMS), 3, "films")
    assert [axis.get_title() for axis in figure.axes] == ["1 control token", "2 control tokens"]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"COREC", "boost", "SASRec", "combiner", "rule (best CP)"} <= labels
