from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from corec import data, sasrec, sasrec_study
from corec.params import DataParams, Params, SasrecParams

SMALL = SasrecParams(hidden=16, heads=2, layers=1, max_length=10, epochs=3, top_k=20, negatives=8)


@pytest.fixture
def tables(atomic: Path) -> data.Tables:
    return data.prepare(DataParams(path=str(atomic), core=1))


def test_popularity_and_knn_are_the_plain_loops(tables: data.Tables) -> None:
    n_items = len(tables.items)
    train = tables.interactions.query("split == 'train'")
    users = {user: set(own["item"]) for user, own in train.groupby("user")}
    have = {item: {user for user, own in users.items() if item in own} for item in range(1, n_items + 1)}
    wanted = sasrec.queries(tables.interactions, tables.windows.query("split == 'test'"), 10)
    similar = np.zeros((n_items + 1, n_items + 1))
    for one in range(1, n_items + 1):
        for other in range(1, n_items + 1):
            if one != other and have[one] and have[other]:
                similar[one, other] = len(have[one] & have[other]) / np.sqrt(len(have[one]) * len(have[other]))
        near = similar[one]
        near[near < (1 - 1e-6) * np.sort(near)[-5]] = 0
    np.testing.assert_allclose(sasrec_study.similarities(tables, 5).toarray(), similar, rtol=1e-5)
    popular, knn = sasrec_study.popularity_ranks(tables, wanted), sasrec_study.knn_ranks(tables, wanted, 5, batch=7)
    counts = train["item"].value_counts().reindex(range(n_items + 1), fill_value=0).to_numpy()
    for query, (target, seen) in enumerate(zip(wanted.targets, wanted.seen, strict=True)):
        unseen = [item for item in range(1, n_items + 1) if item not in seen]
        assert popular[query] == sum(counts[item] >= counts[target] for item in unseen)
        scores = similar[seen].sum(0)
        assert knn[query] == sum(scores[item] >= scores[target] - 1e-6 for item in unseen)


def test_intervals_hold_the_mean_and_narrow() -> None:
    rng = np.random.default_rng(0)
    few, many = (sasrec_study.intervals(rng.integers(1, 40, size)) for size in (100, 10_000))
    for result in (few, many):
        assert result["HR@10 low"] < result["HR@10"] < result["HR@10 high"]
    assert many["HR@10"] == pytest.approx(10 / 39, abs=0.02)
    assert many["NDCG@10 high"] - many["NDCG@10 low"] < 0.2 * (few["NDCG@10 high"] - few["NDCG@10 low"])


def test_sampled_ranks_are_those_of_really_drawn_items() -> None:
    rng, n_items, draws = np.random.default_rng(0), 60, 4000
    scores = rng.random(n_items)
    target = int(np.argsort(-scores)[11])  # rank 12 of 60
    wanted = sasrec.Queries([], np.full(draws, target + 1), [np.array([], dtype=int)] * draws)
    fast = sasrec_study.sampled_ranks(np.full(draws, 12), wanted, n_items, 20, seed=0)
    others = np.delete(scores, target)
    slow = np.array([1 + (rng.choice(others, 20, replace=False) >= scores[target]).sum() for _ in range(draws)])
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.1) and fast.std() == pytest.approx(slow.std(), abs=0.1)
    few = sasrec.Queries([], np.array([1]), [np.arange(2, 56)])
    assert sasrec_study.sampled_ranks(np.array([3]), few, n_items, 100, 0) == [3], "fewer others than negatives: all of them"


def test_losses_and_seeds_side_by_side(tables: data.Tables) -> None:
    params = SMALL.model_copy(update={"compare_seconds": 0.01, "compare_seeds": 2, "decay": True})
    table, curves = sasrec_study.by_loss(tables, params, seed=0)
    assert table["loss"].tolist() == list(sasrec_study.LOSSES) and (table["epochs"] == 1).all()
    assert set(curves["loss"]) == set(sasrec_study.LOSSES)
    table, curves = sasrec_study.by_seed(tables, params, seed=3)
    assert table["seed"].tolist() == [3, 4] and table["NDCG@10"].nunique() == 2
    assert (table["seconds_to_95"] <= table["seconds"]).all() and len(curves) == 6
    pd.testing.assert_series_equal(
        table["valid NDCG@10"], curves.groupby("seed")["NDCG@10"].max().rename("valid NDCG@10"), check_index=False
    )


def test_what_was_compared_is_kept_and_shown_by_other_runs(tables: data.Tables, tmp_path: Path) -> None:
    yardsticks = pd.DataFrame({"popularity": {"NDCG@10": 0.1}}).T
    plain = Params(run="other", sasrec=SMALL)
    assert sasrec_study.compare(tables, plain, yardsticks, tmp_path)[1] == {}, "nothing asked for, nothing kept"
    asked = SMALL.model_copy(update={"compare_seconds": 0.01, "compare_seeds": 1})
    folder, found = sasrec_study.compare(tables, Params(run="retriever-ml-1m", sasrec=asked), yardsticks, tmp_path)
    assert set(found) == {"losses", "loss_curves", "seeds", "seed_curves", "yardsticks"}
    assert (found["seeds"]["n_users"] == (tables.windows["split"] == "test").sum()).all()
    assert {path.suffix for path in folder.iterdir()} == {".csv", ".png"}
    shown = sasrec_study.compare(tables, plain, yardsticks, tmp_path)[1]
    pd.testing.assert_frame_equal(shown["losses"], found["losses"])
    sasrec.save(sasrec.train(tables.interactions, tables.windows, len(tables.items), asked, 0), pd.DataFrame(), tmp_path)
    assert not list(tmp_path.glob("**/checkpoint*")), "a finished stage keeps no checkpoints"
