from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from corec import data, sasrec
from corec.params import DataParams, Params, SasrecParams, StudyParams
from corec.sasrec import baselines
from corec.studies import retriever

SMALL = SasrecParams(hidden=16, heads=2, layers=1, max_length=10, epochs=3, top_k=20, negatives=8)


@pytest.fixture
def tables(atomic: Path) -> data.Tables:
    return data.prepare(DataParams(path=str(atomic), core=1))


def settings(seeds: int = 1, loss_seconds: float = 0, **changes: object) -> Params:
    study = StudyParams(seeds=seeds, loss_seconds=loss_seconds)
    return Params(run="own", sasrec=SMALL.model_copy(update=changes), study=study)


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
    ours = baselines.nearest(baselines.nearest(baselines.similarities(tables), 9), 5)
    np.testing.assert_allclose(ours.toarray(), similar, rtol=1e-5)
    popular, knn = baselines.popularity_ranks(tables, wanted), baselines.knn_ranks(ours, wanted)
    counts = train["item"].value_counts().reindex(range(n_items + 1), fill_value=0).to_numpy()
    for query, (target, seen) in enumerate(zip(wanted.targets, wanted.seen, strict=True)):
        unseen = [item for item in range(1, n_items + 1) if item not in seen]
        assert popular[query] == sum(counts[item] >= counts[target] for item in unseen)
        scores = similar[seen].sum(0)
        assert sum(scores[item] > scores[target] + 1e-5 for item in unseen) < knn[query]
        assert knn[query] <= sum(scores[item] > scores[target] - 1e-5 for item in unseen)


def test_neighbours_are_chosen_without_the_test_set(tables: data.Tables) -> None:
    number, similar = baselines.best_knn(tables, 10)
    changed = tables._replace(windows=tables.windows.copy(), interactions=tables.interactions.copy())
    changed.windows.loc[changed.windows["split"] == "test", "target"] = 1
    changed.interactions.loc[changed.interactions["split"] == "test", "item"] = 1
    again, same = baselines.best_knn(changed, 10)
    assert number == again and number in baselines.NEIGHBOURS and (similar != same).nnz == 0


def test_rankers_are_judged_by_user_and_in_pairs() -> None:
    rng = np.random.default_rng(0)
    users, good = np.repeat(np.arange(300), 2), rng.integers(1, 40, 600)
    table = baselines.judge({"worse": good + 2, "same": good, "good": good}, users, settings())
    assert table.loc["good", "HR@10"] == pytest.approx((good <= 10).mean())
    assert table.loc["good", "HR@10 low"] < table.loc["good", "HR@10"] < table.loc["good", "HR@10 high"]
    assert (table.loc["same", ["behind", "behind low", "behind high"]] == 0).all()
    assert table.loc["worse", "behind"] == pytest.approx(table.loc["good", "NDCG@10"] - table.loc["worse", "NDCG@10"])
    assert table.loc["worse", "behind low"] > 0, "a paired difference is surer than two intervals side by side"
    one = baselines.judge({"good": np.tile(good[::2], 2)}, np.tile(np.arange(300), 2), settings())
    twice = baselines.judge({"good": good[::2]}, np.arange(300), settings())
    pd.testing.assert_frame_equal(one, twice)


def test_sampled_ranks_are_those_of_really_drawn_items() -> None:
    rng, n_items, draws = np.random.default_rng(0), 60, 4000
    scores = rng.random(n_items)
    target = int(np.argsort(-scores)[11])  # rank 12 of 60
    wanted = sasrec.Queries([], np.full(draws, target + 1), [np.array([], dtype=int)] * draws)
    fast = baselines.sampled_ranks(np.full(draws, 12), wanted, n_items, 20, seed=0)
    others = np.delete(scores, target)
    slow = np.array([1 + (rng.choice(others, 20, replace=False) >= scores[target]).sum() for _ in range(draws)])
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.1) and fast.std() == pytest.approx(slow.std(), abs=0.1)
    few = sasrec.Queries([], np.array([1]), [np.arange(2, 56)])
    assert baselines.sampled_ranks(np.array([3]), few, n_items, 100, 0) == [3], "fewer others than negatives: all of them"


def test_losses_at_equal_time_and_seeds_side_by_side(tables: data.Tables, tmp_path: Path) -> None:
    table, curves = retriever.by_loss(tables, settings(loss_seconds=0.5, patience=1), tmp_path / "new")
    assert table["loss"].tolist() == [name for name in retriever.LOSSES for _ in retriever.RATES]
    assert set(table["lr"]) == {1e-3, 3e-4, 1e-4} and table["chosen"].sum() == len(retriever.LOSSES)
    best = table.loc[table.groupby("loss")["valid NDCG@10"].idxmax()].set_index("loss")["valid NDCG@10"]
    np.testing.assert_allclose(table[table["chosen"]].set_index("loss")["valid NDCG@10"][best.index], best)
    np.testing.assert_allclose(curves.groupby("loss")["NDCG@10"].max()[best.index], best)
    assert (table["epochs"] > SMALL.epochs).all() and table["seconds"].between(0.2, 1).all(), "the time ends it, not the epochs"
    assert set(curves["loss"]) == set(retriever.LOSSES)
    table, curves = retriever.by_seed(tables, settings(seeds=2, decay=True))
    assert table["seed"].tolist() == [0, 1] and table["valid NDCG@10"].nunique() == 2
    assert (table["seconds_to_95"] <= table["seconds"]).all() and len(curves) == 6
    best = curves.groupby("seed")["NDCG@10"].max()
    np.testing.assert_allclose(table["valid NDCG@10"], best)


def test_a_study_writes_into_its_own_runs_folder(tables: data.Tables, tmp_path: Path) -> None:
    test = baselines.windows_of(tables, "test")
    ranks = baselines.popularity_ranks(tables, sasrec.queries(tables.interactions, test, 10))
    simple = baselines.judge({"popularity": ranks}, test["user"].to_numpy(), settings())
    asked = settings(loss_seconds=0.01)
    made = retriever.compare(tables, asked, simple, tmp_path / "stage")
    assert set(made) == set(retriever.TABLES)
    assert (made["seeds"]["n_users"] == (tables.windows["split"] == "test").sum()).all()
    assert made["losses"]["protocol"].str.contains("leave-one-out, all unseen items").all()
    written = retriever.keep(made, tmp_path / "figures")
    assert {path.name for path in written} == {f"{name}.csv" for name in made} | {"seed_curves.png", "loss_curves.png"}
    shown = pd.read_csv(tmp_path / "figures" / "losses.csv")
    assert shown["loss"].tolist() == made["losses"]["loss"].tolist()
    fewer = retriever.compare(tables, settings(), simple, tmp_path / "stage")
    retriever.keep(fewer, tmp_path / "figures")
    assert set(fewer) == {"seeds", "seed_curves", "baselines"}
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {*fewer, "results"}, (
        "no table of an earlier comparison is left"
    )
    trained = sasrec.train(tables.interactions, tables.windows, len(tables.items), SMALL, 0, folder=tmp_path / "stage")
    sasrec.save(trained, pd.DataFrame(), tmp_path / "stage")
    assert not list(tmp_path.glob("**/checkpoint*")), "a finished stage keeps no checkpoints"
