import ir_measures
import numpy as np
import pandas as pd
import pytest

from corec import controls, evaluation, intervals
from corec.evaluation import Judged
from corec.params import ControlsParams, EvaluationParams, Params

RNG = np.random.default_rng(0)
WINDOWS, K, N = 40, 12, 3
KS = [1, 3, 5, 10]


@pytest.fixture
def judged() -> Judged:
    truth = np.zeros((WINDOWS, K), dtype=bool)
    truth[np.arange(0, WINDOWS, 2), RNG.integers(0, K, WINDOWS // 2)] = True
    return Judged(truth, RNG.random((WINDOWS, K, N)) < 0.4)


@pytest.fixture
def order() -> np.ndarray:
    return RNG.random((WINDOWS, K)).argsort(axis=1)


def with_ir_measures(measure: object, gains: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The measure of every window, by ir-measures: gains [windows, K] as qrels, the order as a run."""
    qrels = [ir_measures.Qrel(f"{w:03}", str(i), int(g)) for w in range(WINDOWS) for i, g in enumerate(gains[w])]
    run = [ir_measures.ScoredDoc(f"{w:03}", str(i), float(K - p)) for w in range(WINDOWS) for p, i in enumerate(order[w])]
    found = {entry.query_id: entry.value for entry in ir_measures.iter_calc([measure], qrels, run)}
    return np.array([found.get(f"{w:03}", 0.0) for w in range(WINDOWS)])


def test_relevance_and_precision_agree_with_ir_measures(judged: Judged, order: np.ndarray) -> None:
    from ir_measures import P, Success, nDCG

    ours = evaluation.by_window(order, judged, KS)
    count = judged.met.sum(axis=2)
    for k in KS:
        np.testing.assert_allclose(ours["ndcg", k, 0], with_ir_measures(nDCG @ k, judged.truth, order), atol=1e-9)
        np.testing.assert_allclose(ours["hr", k, 0], with_ir_measures(Success @ k, judged.truth, order))
        graded = with_ir_measures(nDCG @ k, count + judged.truth, order)
        np.testing.assert_allclose(ours["ndcg_graded", k, 0], graded, atol=1e-9)
        for tau in range(1, N + 1):
            np.testing.assert_allclose(ours["cp", k, tau], with_ir_measures(P @ k, count >= tau, order))
            bonus = with_ir_measures(P @ k, count + judged.truth >= tau, order)
            np.testing.assert_allclose(ours["cp_bonus", k, tau], bonus)
        np.testing.assert_allclose(ours["chp", k, 0], ours["cp", k, N])


def test_depth_is_one_over_reciprocal_rank(judged: Judged, order: np.ndarray) -> None:
    ours = evaluation.by_window(order, judged, KS)
    for tau in range(1, N + 1):
        reciprocal = with_ir_measures(ir_measures.RR, judged.met.sum(axis=2) >= tau, order)
        wanted = np.where(reciprocal > 0, 1 / np.maximum(reciprocal, 1e-9), K + 1)
        np.testing.assert_allclose(ours["cd", 0, tau], wanted)


def test_csr_by_hand(judged: Judged, order: np.ndarray) -> None:
    ours = evaluation.by_window(order, judged, KS)
    for window in range(WINDOWS):
        top = judged.met[window, order[window, :5]]
        assert ours["csr", 5, 0][window] == pytest.approx(top.mean(axis=0).mean())


def test_cut_offs_stay_below_k_and_no_request_has_no_control_metrics(judged: Judged, order: np.ndarray) -> None:
    keys = evaluation.by_window(order, judged, [5, 12, 20])
    assert {k for _, k, _ in keys} == {0, 5}
    empty = evaluation.by_window(order, Judged(judged.truth, judged.met[:, :, :0]), KS)
    assert {metric for metric, _, _ in empty} == {"ndcg", "hr", "ndcg_graded"}
    np.testing.assert_allclose(empty["ndcg", 5, 0], empty["ndcg_graded", 5, 0])


def make_pools(judged: Judged) -> controls.Pools:
    ranks = RNG.random((WINDOWS, K)).argsort(axis=1)
    truth = np.where(judged.truth.any(1), judged.truth.argmax(1), -1)
    items = np.tile(np.arange(1, K + 1), (WINDOWS, 1))
    return controls.Pools(np.arange(WINDOWS), items, ranks, -ranks.astype(np.float32), truth)


def test_rule_is_the_best_that_a_pool_allows(judged: Judged, order: np.ndarray) -> None:
    pools = make_pools(judged)
    rule = evaluation.by_window(evaluation.rule_order(pools, judged.met), judged, KS)
    hard = evaluation.by_window(evaluation.hard_filter_order(pools, judged.met), judged, KS)
    other = evaluation.by_window(order, judged, KS)
    for key, values in other.items():
        if key[0] == "cp":
            assert (rule[key] >= values).all()
            if key[2] == N:
                np.testing.assert_array_equal(hard[key], rule[key])
    best = np.minimum(judged.met.all(axis=2).sum(axis=1), 5) / 5
    np.testing.assert_allclose(rule["cp", 5, N], best)


def test_filters_fall_back_on_the_retriever(judged: Judged) -> None:
    pools = make_pools(judged)
    nothing = np.zeros_like(judged.met)
    for orders in (evaluation.rule_order, evaluation.hard_filter_order):
        np.testing.assert_array_equal(orders(pools, nothing), evaluation.retriever_order(pools))
    np.testing.assert_array_equal(
        evaluation.order_by(evaluation.blend(RNG.random((WINDOWS, K)), pools, np.inf)), evaluation.retriever_order(pools)
    )


def test_a_constant_scorer_gets_no_more_than_chance(judged: Judged) -> None:
    order = evaluation.order_by(np.zeros((WINDOWS, K)))
    np.testing.assert_array_equal(order, np.tile(np.arange(K), (WINDOWS, 1)))


def test_alpha_prefers_the_retriever_unless_the_model_is_better(judged: Judged) -> None:
    pools = make_pools(judged)
    scores = judged.met.sum(axis=2).astype(float)
    good = evaluation.choose_alpha(scores, pools, judged)
    assert good.loc[good["chosen"], "alpha"].item() < 1
    useless = evaluation.choose_alpha(RNG.random((WINDOWS, K)), pools, Judged(pools.retriever_rank == 0, judged.met[:, :, :0]))
    assert np.isinf(useless.loc[useless["chosen"], "alpha"].item())


def test_users_weigh_alike_and_intervals_are_those_of_a_bootstrap() -> None:
    values = intervals.by_user(np.array([[0.0], [1.0], [5.0]]), np.array([7, 7, 3]))
    np.testing.assert_allclose(values, [[5.0], [0.5]])
    sample = RNG.normal(size=(400, 1))
    low, high = intervals.intervals(sample, EvaluationParams(bootstrap=4000), seed=0)
    error = sample.std() / 20
    np.testing.assert_allclose([low[0], high[0]], sample.mean() + np.array([-1.96, 1.96]) * error, atol=0.15 * error)


def test_tidy_table(judged: Judged, order: np.ndarray) -> None:
    params = Params(evaluation=EvaluationParams(bootstrap=50), controls=ControlsParams(k=12))
    empty = Judged(judged.truth, judged.met[:, :, :0])
    table = evaluation.tidy(
        evaluation.measure({0: {"corec": order}, N: {"corec": order, "rule": order}}, {0: empty, N: judged}, params),
        np.arange(WINDOWS) // 2,
        params,
    )
    assert list(table.columns) == evaluation.COLUMNS
    assert set(table["metric"]) == set(evaluation.METRICS) and set(table["n_users"]) == {WINDOWS // 2}
    row = evaluation.pick(table, metric="cp", k=5, tau=2, model="rule").iloc[0]
    assert row["value"] == pytest.approx(evaluation.by_window(order, judged, KS)["cp", 5, 2].mean())
    assert row["low"] <= row["value"] <= row["high"]
    assert evaluation.pick(table, metric="cd")["k"].isna().all() and pd.isna(table.set_index("metric").loc["ndcg", "tau"]).all()


def test_every_point_of_a_figure_can_be_followed_to_users(judged: Judged, order: np.ndarray) -> None:
    params = Params(evaluation=EvaluationParams(bootstrap=50), controls=ControlsParams(k=12))
    users = np.arange(WINDOWS) // 2
    interactions = pd.DataFrame({"user": range(WINDOWS // 2), "user_id": [f"u{i}" for i in range(WINDOWS // 2)]})
    windows = pd.DataFrame({"window": np.arange(WINDOWS), "user": users})
    measured = evaluation.measure({N: {"corec": order}}, {N: judged}, params)
    table = evaluation.per_window(measured, make_pools(judged), interactions, windows, seed=0)
    assert (table["user_id"] == "u" + table["user"].astype(str)).all()
    results = evaluation.tidy(measured, users, params)
    means = table.groupby(["n_tokens", "model", "metric", "k", "tau", "user"], dropna=False, observed=True)["value"].mean()
    means = means.groupby(level=[0, 1, 2, 3, 4], dropna=False).mean()
    for row in results.itertuples():
        k, tau = (np.nan if pd.isna(value) else value for value in (row.k, row.tau))
        found = means[[key for key in means.index if key[2] == row.metric and same(key[3], k) and same(key[4], tau)]]
        assert found.iloc[0] == pytest.approx(row.value)


def same(one: object, other: object) -> bool:
    return bool(one == other) if not (pd.isna(one) or pd.isna(other)) else bool(pd.isna(one) and pd.isna(other))


def test_the_evaluation_needs_no_language_model() -> None:
    import subprocess
    import sys

    code = "import sys; from corec import evaluation, figures; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
