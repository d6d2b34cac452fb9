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


def settings(**changes: object) -> Params:
    return Params(run="retriever-ml-1m", sasrec=SMALL.model_copy(update=changes))


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
    ours = sasrec_study.nearest(sasrec_study.nearest(sasrec_study.similarities(tables), 9), 5)
    np.testing.assert_allclose(ours.toarray(), similar, rtol=1e-5)
    popular, knn = sasrec_study.popularity_ranks(tables, wanted), sasrec_study.knn_ranks(ours, wanted)
    counts = train["item"].value_counts().reindex(range(n_items + 1), fill_value=0).to_numpy()
    for query, (target, seen) in enumerate(zip(wanted.targets, wanted.seen, strict=True)):
        unseen = [item for item in range(1, n_items + 1) if item not in seen]
        assert popular[query] == sum(counts[item] >= counts[target] for item in unseen)
        scores = similar[seen].sum(0)
        assert sum(scores[item] > scores[target] + 1e-5 for item in unseen) < knn[query]
        assert knn[query] <= sum(scores[item] > scores[target] - 1e-5 for item in unseen)


def test_neighbours_are_chosen_without_the_test_set(tables: data.Tables) -> None:
    number, similar = sasrec_study.best_knn(tables, 10)
    changed = tables._replace(windows=tables.windows.copy(), interactions=tables.interactions.copy())
    changed.windows.loc[changed.windows["split"] == "test", "target"] = 1
    changed.interactions.loc[changed.interactions["split"] == "test", "item"] = 1
    again, same = sasrec_study.best_knn(changed, 10)
    assert number == again and number in sasrec_study.NEIGHBOURS and (similar != same).nnz == 0


def test_rankers_are_judged_by_user_and_in_pairs() -> None:
    rng = np.random.default_rng(0)
    users, good = np.repeat(np.arange(300), 2), rng.integers(1, 40, 600)
    table = sasrec_study.judge({"worse": good + 2, "same": good, "good": good}, users, settings())
    assert table.loc["good", "HR@10"] == pytest.approx((good <= 10).mean())
    assert table.loc["good", "HR@10 low"] < table.loc["good", "HR@10"] < table.loc["good", "HR@10 high"]
    assert (table.loc["same", ["behind", "behind low", "behind high"]] == 0).all()
    assert table.loc["worse", "behind"] == pytest.approx(table.loc["good", "NDCG@10"] - table.loc["worse", "NDCG@10"])
    assert table.loc["worse", "behind low"] > 0, "a paired difference is surer than two intervals side by side"
    one = sasrec_study.judge({"good": np.tile(good[::2], 2)}, np.tile(np.arange(300), 2), settings())
    twice = sasrec_study.judge({"good": good[::2]}, np.arange(300), settings())
    pd.testing.assert_frame_equal(one, twice)


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


def test_losses_at_equal_time_and_seeds_side_by_side(tables: data.Tables, tmp_path: Path) -> None:
    table, curves = sasrec_study.by_loss(tables, settings(compare_seconds=0.5, patience=1), tmp_path / "new")
    assert table["loss"].tolist() == [name for name in sasrec_study.LOSSES for _ in sasrec_study.RATES]
    assert set(table["lr"]) == {1e-3, 3e-4, 1e-4} and table["chosen"].sum() == len(sasrec_study.LOSSES)
    best = table.loc[table.groupby("loss")["valid NDCG@10"].idxmax()].set_index("loss")["valid NDCG@10"]
    np.testing.assert_allclose(table[table["chosen"]].set_index("loss")["valid NDCG@10"][best.index], best)
    np.testing.assert_allclose(curves.groupby("loss")["NDCG@10"].max()[best.index], best)
    assert (table["epochs"] > SMALL.epochs).all() and table["seconds"].between(0.2, 1).all(), "the time ends it, not the epochs"
    assert set(curves["loss"]) == set(sasrec_study.LOSSES)
    table, curves = sasrec_study.by_seed(tables, settings(compare_seeds=2, decay=True))
    assert table["seed"].tolist() == [0, 1] and table["valid NDCG@10"].nunique() == 2
    assert (table["seconds_to_95"] <= table["seconds"]).all() and len(curves) == 6
    best = curves.groupby("seed")["NDCG@10"].max()
    np.testing.assert_allclose(table["valid NDCG@10"], best)


def test_what_was_compared_is_kept_and_shown_by_other_runs(tables: data.Tables, tmp_path: Path) -> None:
    yardsticks = pd.DataFrame({"popularity": {"NDCG@10": 0.1}}).T
    plain = Params(run="other", sasrec=SMALL)
    assert sasrec_study.compare(tables, plain, yardsticks, tmp_path) == (False, {}), "nothing asked for, nothing kept"
    asked = settings(compare_seconds=0.01, compare_seeds=1)
    made, found = sasrec_study.compare(tables, asked, yardsticks, tmp_path / "stage")
    assert made and set(found) == set(sasrec_study.TABLES)
    assert (found["seeds"]["n_users"] == (tables.windows["split"] == "test").sum()).all()
    assert found["losses"]["protocol"].str.contains("leave-one-out, all unseen items").all()
    made, shown = sasrec_study.compare(tables, plain, yardsticks, tmp_path)
    assert not made
    pd.testing.assert_frame_equal(shown["losses"], found["losses"])
    fewer = sasrec_study.compare(tables, settings(compare_seeds=1), yardsticks, tmp_path / "stage")[1]
    assert set(fewer) == {"seeds", "seed_curves", "yardsticks"}, "no table of an earlier comparison is left"
    trained = sasrec.train(tables.interactions, tables.windows, len(tables.items), SMALL, 0, folder=tmp_path / "stage")
    sasrec.save(trained, pd.DataFrame(), tmp_path / "stage")
    assert not list(tmp_path.glob("**/checkpoint*")), "a finished stage keeps no checkpoints"
