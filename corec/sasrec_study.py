"""What the retriever is worth: against rankers that learn nothing, by loss at equal time, and by seed.

Everything here is leave-one-out with full ranking, the epoch chosen by validation NDCG@10, and the test looked at once.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy import sparse, stats

from corec import paths, sasrec
from corec.data import Tables
from corec.params import Params, SasrecParams
from corec.sasrec import Queries

LOSSES = ("ce", "sampled", "gbce", "bce")
NEIGHBOURS = (10, 20, 50, 100, 200, 500)


def popularity_ranks(tables: Tables, wanted: Queries) -> np.ndarray:
    """Rank of each target [queries] when everybody gets the most popular items that they have not seen."""
    counts = torch.tensor([0, *tables.items["train_count"]], dtype=torch.float32)
    return sasrec.rank_scores(counts.expand(len(wanted.targets), -1).clone(), wanted)


def similarities(tables: Tables, neighbours: int) -> sparse.csr_array:
    """Cosine similarity of the items' training columns (users by items, 0 or 1) [n_items + 1, n_items + 1].

    Each row keeps its `neighbours` largest entries (and those equal to the last of them); none is similar to itself.
    """
    train = tables.interactions[tables.interactions["split"] == "train"].drop_duplicates(["user", "item"])
    shape = (int(tables.interactions["user"].max()) + 1, len(tables.items) + 1)
    seen = sparse.csr_array((np.ones(len(train), dtype=np.float32), (train["user"], train["item"])), shape=shape)
    seen.data /= np.sqrt(seen.sum(axis=0))[seen.indices]
    similar = (seen.T @ seen).tocsr()
    similar.setdiag(0)
    for start, end in zip(similar.indptr[:-1], similar.indptr[1:], strict=True):
        row = similar.data[start:end]
        if len(row) > neighbours:
            row[row < (1 - 1e-6) * np.partition(row, -neighbours)[-neighbours]] = 0
    similar.eliminate_zeros()
    return similar


def knn_ranks(tables: Tables, wanted: Queries, neighbours: int, batch: int = 1024) -> np.ndarray:
    """Rank of each target [queries] by item-kNN: the summed similarity to all that the user has seen.

    Deshpande and Karypis, *Item-based top-N recommendation algorithms*, ACM TOIS 22(1), 2004.
    """
    similar, ranks = similarities(tables, neighbours), []
    for start in range(0, len(wanted.targets), batch):
        part = wanted.part(start, batch)
        users = np.repeat(np.arange(len(part.seen)), [len(items) for items in part.seen])
        history = sparse.csr_array((np.ones(len(users), dtype=np.float32), (users, np.concatenate(part.seen))))
        history.resize(len(part.seen), similar.shape[0])
        ranks.append(sasrec.rank_scores(torch.from_numpy((history @ similar).toarray()), part))
    return np.concatenate(ranks)


def best_neighbours(tables: Tables, max_length: int) -> int:
    """The number of neighbours with the best validation NDCG@10."""
    wanted = sasrec.queries(tables.interactions, tables.windows.query("split == 'valid'"), max_length)
    return max(NEIGHBOURS, key=lambda n: sasrec.ranking_metrics(knn_ranks(tables, wanted, n))["NDCG@10"])


def intervals(ranks: np.ndarray, confidence: float = 0.95) -> dict[str, float]:
    """HR@10 and NDCG@10 of `ranks` [queries] with percentile intervals of 1,000 bootstrap resamples of the queries."""
    hits, result = ranks <= 10, dict[str, float]()
    for name, gains in (("HR@10", hits.astype(float)), ("NDCG@10", hits / np.log2(ranks + 1))):
        drawn = stats.bootstrap(
            (gains,), np.mean, n_resamples=1000, confidence_level=confidence, method="percentile", rng=0, batch=100
        )
        low, high = drawn.confidence_interval
        result |= {name: float(gains.mean()), f"{name} low": float(low), f"{name} high": float(high)}
    return result


def sampled_ranks(ranks: np.ndarray, wanted: Queries, n_items: int, negatives: int, seed: int) -> np.ndarray:
    """What `ranks` [queries] become when the target competes with so many random unseen items, not with all.

    Of the n - 1 other unseen items, rank - 1 beat the target; how many of those are among `negatives` drawn without
    replacement is hypergeometric. (Krichene and Rendle, *On Sampled Metrics for Item Recommendation*, KDD 2020.)
    """
    others = n_items - np.array([len(np.unique(items)) for items in wanted.seen]) - 1
    return 1 + np.random.default_rng(seed).hypergeometric(ranks - 1, others - (ranks - 1), np.minimum(negatives, others))


def test_row(trained: sasrec.Trained, tables: Tables, params: SasrecParams) -> dict[str, float]:
    """How a training went: its time, its validation and its test figures.

    ``seconds_to_95`` and ``peak_memory_mb``: when 95 % of the best validation NDCG@10 was first reached, and the peak of the
    process by then.
    """
    wanted = sasrec.queries(tables.interactions, tables.windows.query("split == 'test'"), params.max_length)
    valid = trained.curve.set_index("epoch")
    best = valid.loc[trained.best_epoch]
    near = valid[valid["NDCG@10"] >= 0.95 * best["NDCG@10"]].iloc[0]
    return {
        "epochs": len(valid),
        "best_epoch": trained.best_epoch,
        "seconds": valid["seconds"].iloc[-1],
        "seconds_to_95": near["seconds"],
        "peak_memory_mb": near["peak_memory_mb"],
        "valid HR@10": best["HR@10"],
        "valid NDCG@10": best["NDCG@10"],
        **intervals(sasrec.rank_targets(trained.model, wanted)),
    }


def by_loss(tables: Tables, params: SasrecParams, seed: int, folder: Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The four losses, `compare_seconds` of training each, everything else as in `params` but a constant learning rate.

    Returns
    -------
    One row a loss (see :func:`test_row`), and their learning curves.
    """
    rows, curves = [], []
    for name in LOSSES:
        print(f"loss {name}: {params.compare_seconds:.0f} s", flush=True)
        own = params.model_copy(update={"loss": name, "decay": False})
        trained = sasrec.train(
            tables.interactions, tables.windows, len(tables.items), own, seed, folder=folder, max_seconds=params.compare_seconds
        )
        rows.append({"loss": name, **test_row(trained, tables, own)})
        curves.append(trained.curve.rename(columns={"loss": "value"}).assign(loss=name))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def by_seed(tables: Tables, params: SasrecParams, seed: int, folder: Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`compare_seeds` trainings that differ in nothing but the seed: `seed` and the next ones.

    Returns
    -------
    One row a seed (see :func:`test_row`), and their learning curves.
    """
    rows, curves = [], []
    for own in range(seed, seed + params.compare_seeds):
        print(f"seed {own}", flush=True)
        trained = sasrec.train(tables.interactions, tables.windows, len(tables.items), params, own, folder=folder)
        rows.append({"seed": own, **test_row(trained, tables, params)})
        curves.append(trained.curve.assign(seed=own))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def compare(tables: Tables, settings: Params, yardsticks: pd.DataFrame, stage: Path) -> tuple[Path, dict[str, pd.DataFrame]]:
    """What the parameters ask for, kept in ``figures/<run>/``; else what ``params/retriever-ml-1m.yaml`` has left there.

    Parameters
    ----------
    yardsticks
        :func:`intervals` of other rankers on the same test, one row each, kept beside the rest.
    stage
        Folder for checkpoints.

    Returns
    -------
    The folder, and the tables found in it: ``losses loss_curves seeds seed_curves yardsticks``.
    """
    own, made = settings.sasrec, {}
    if own.compare_seeds:
        made["seeds"], made["seed_curves"] = by_seed(tables, own, settings.seed, stage)
    if own.compare_seconds:
        made["losses"], made["loss_curves"] = by_loss(tables, own, settings.seed, stage / "losses")
    folder = paths.figures_dir(settings.run if made else "retriever-ml-1m")
    if made:
        made["yardsticks"] = yardsticks.rename_axis("ranker").reset_index()
        n_users = int((tables.windows["split"] == "test").sum())
        protocol = "leave-one-out, all unseen items, epoch by validation NDCG@10"
        for name, table in made.items():
            table = table.assign(dataset=settings.data.name, n_users=n_users, protocol=protocol)
            paths.write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.5g"))
            if name.endswith("curves"):
                draw(table, name.removesuffix("_curves")).savefig(folder / f"{name}.png", dpi=130)
                plt.close()
    return folder, {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}


def draw(curves: pd.DataFrame, by: str) -> Figure:
    """Learning curves over time, one line a loss or a seed."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    sns.lineplot(curves, x="seconds", y="NDCG@10", hue=by, palette="deep", marker="o", markersize=4, ax=axis)
    axis.set(ylabel="validation NDCG@10")
    return figure
