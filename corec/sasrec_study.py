"""What the retriever is worth: against two simple rankers, by loss at equal time, and by seed.

Ranking is full (all items that the user has not seen), the epoch is chosen by validation NDCG@10, and nothing is chosen by
the test windows.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from scipy import sparse
from torch import Tensor

from corec import paths, sasrec
from corec.data import Tables
from corec.intervals import by_user, intervals
from corec.params import Params
from corec.sasrec import Queries

LOSSES = ("ce", "sampled", "gbce", "bce")
RATES = (1.0, 0.3, 0.1)  # tried with every loss, times the run's learning rate
NEIGHBOURS = (500, 200, 100, 50, 20, 10)
TABLES = ("losses", "loss_curves", "seeds", "seed_curves", "yardsticks")


def windows_of(tables: Tables, split: str) -> pd.DataFrame:
    """The windows of a split."""
    return tables.windows[tables.windows["split"] == split]


def ranks_by(scores: Callable[[Queries], Tensor], wanted: Queries, batch: int = 1024) -> np.ndarray:
    """Rank of each target [queries] by `scores`, which makes [queries, n_items + 1] of some queries."""
    starts = range(0, len(wanted.targets), batch)
    return np.concatenate([sasrec.rank_scores(scores(part), part) for part in (wanted.part(start, batch) for start in starts)])


def popularity_ranks(tables: Tables, wanted: Queries) -> np.ndarray:
    """Rank of each target [queries] when everybody gets the most popular items that they have not seen."""
    counts = torch.tensor([0, *tables.items["train_count"]], dtype=torch.float32)
    return ranks_by(lambda part: counts.expand(len(part.targets), -1).clone(), wanted)


def similarities(tables: Tables) -> sparse.csr_array:
    """Cosine similarity of the items' training columns (users by items, 0 or 1) [n_items + 1, n_items + 1], 0 to itself."""
    train = tables.interactions[tables.interactions["split"] == "train"].drop_duplicates(["user", "item"])
    shape = (int(tables.interactions["user"].max()) + 1, len(tables.items) + 1)
    seen = sparse.csr_array((np.ones(len(train), dtype=np.float32), (train["user"], train["item"])), shape=shape)
    seen.data /= np.sqrt(seen.sum(axis=0))[seen.indices]
    similar = (seen.T @ seen).tocsr()
    similar.setdiag(0)
    return similar


def nearest(similar: sparse.csr_array, neighbours: int) -> sparse.csr_array:
    """`similar` with only the `neighbours` largest entries of each row (and those equal to the last of them)."""
    similar = similar.copy()
    for start, end in zip(similar.indptr[:-1], similar.indptr[1:], strict=True):
        row = similar.data[start:end]
        if len(row) > neighbours:
            row[row < (1 - 1e-6) * np.partition(row, -neighbours)[-neighbours]] = 0
    similar.eliminate_zeros()
    return similar


def knn_ranks(similar: sparse.csr_array, wanted: Queries) -> np.ndarray:
    """Rank of each target [queries] by item-kNN: the summed similarity to all that the user has seen.

    Deshpande and Karypis, *Item-based top-N recommendation algorithms*, ACM TOIS 22(1), 2004.
    """

    def scores(part: Queries) -> Tensor:
        users = np.repeat(np.arange(len(part.seen)), [len(items) for items in part.seen])
        cells = (users, np.concatenate(part.seen))
        history = sparse.csr_array((np.ones(len(users), np.float32), cells), shape=(len(part.seen), similar.shape[0]))
        return torch.from_numpy((history @ similar).toarray())

    return ranks_by(scores, wanted)


def best_knn(tables: Tables, max_length: int) -> tuple[int, sparse.csr_array]:
    """The number of neighbours with the best validation NDCG@10, and the similarities to so many."""
    wanted = sasrec.queries(tables.interactions, windows_of(tables, "valid"), max_length)
    similar, best = similarities(tables), (-1.0, 0, sparse.csr_array((1, 1)))
    for neighbours in NEIGHBOURS:  # ever fewer, so each is cut out of the one before
        similar = nearest(similar, neighbours)
        value = sasrec.ranking_metrics(knn_ranks(similar, wanted))["NDCG@10"]
        best = max(best, (value, neighbours, similar), key=lambda entry: entry[0])
    return best[1], best[2]


def judge(ranks: Mapping[str, np.ndarray], users: np.ndarray, settings: Params) -> pd.DataFrame:
    """HR@10 and NDCG@10 of rankers, and how far each is behind the last one in NDCG@10, with intervals.

    Parameters
    ----------
    ranks
        By ranker: rank of each target [windows].
    users
        Whose window it is [windows]. Windows are averaged within a user; intervals are a bootstrap over users,
        the same resamples for all, so that differences are paired.

    Returns
    -------
    One row a ranker; every figure has two more columns, `low` and `high`.
    """
    columns = [[hit, hit / np.log2(rank + 1)] for rank in ranks.values() for hit in [rank <= 10]]
    values = by_user(np.stack([value for pair in columns for value in pair], axis=1).astype(float), users)
    values = np.concatenate([values, values[:, -1:] - values[:, 1::2]], axis=1)  # [users, 3 rankers]
    low, high = intervals(values, settings.evaluation, settings.seed)
    rows = {}
    for place, name in enumerate(ranks):
        cells = {"HR@10": 2 * place, "NDCG@10": 2 * place + 1, "behind": 2 * len(ranks) + place}
        rows[name] = {
            f"{figure}{end}": of[column]
            for figure, column in cells.items()
            for end, of in (("", values.mean(0)), (" low", low), (" high", high))
        }
    return pd.DataFrame(rows).T


def sampled_ranks(ranks: np.ndarray, wanted: Queries, n_items: int, negatives: int, seed: int) -> np.ndarray:
    """What `ranks` [queries] become when the target competes with so many random unseen items, not with all.

    Of the n - 1 other unseen items, rank - 1 beat the target; how many of those are among `negatives` drawn without
    replacement is hypergeometric. (Krichene and Rendle, *On Sampled Metrics for Item Recommendation*, KDD 2020.)
    """
    others = n_items - np.array([len(np.unique(items)) for items in wanted.seen]) - 1
    return 1 + np.random.default_rng(seed).hypergeometric(ranks - 1, others - (ranks - 1), np.minimum(negatives, others))


def test_row(trained: sasrec.Trained, tables: Tables, settings: Params) -> dict[str, float]:
    """How a training went: its time, its validation and its test figures.

    ``seconds_to_95``: when 95 % of the best validation NDCG@10 was first reached.
    """
    windows = windows_of(tables, "test")
    wanted = sasrec.queries(tables.interactions, windows, settings.sasrec.max_length)
    ranks = sasrec.rank_targets(trained.model, wanted)
    curve = trained.curve.set_index("epoch")
    best = curve.loc[trained.best_epoch]
    judged = judge({"sasrec": ranks}, windows["user"].to_numpy(), settings).loc["sasrec"]
    return {
        "epochs": len(curve),
        "best_epoch": trained.best_epoch,
        "seconds": curve["seconds"].iloc[-1],
        "seconds_to_95": curve.loc[curve["NDCG@10"] >= 0.95 * best["NDCG@10"], "seconds"].iloc[0],
        "valid HR@10": best["HR@10"],
        "valid NDCG@10": best["NDCG@10"],
        **judged[[name for name in judged.index if not name.startswith("behind")]],
        "dtype": trained.dtype,
    }


def by_loss(tables: Tables, settings: Params, folder: Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The four losses at equal time: `compare_seconds` of training at each of :data:`RATES`, the best one kept.

    What suits one loss can keep another from learning at all, so each has the constant learning rate with which it
    reached the best validation NDCG@10 in that time. All else is the run's.

    Returns
    -------
    One row a loss and rate (see :func:`test_row`; `chosen` marks the best rate of each loss), and the learning curves
    of the chosen.
    """
    rows, curves, budget = [], [], settings.sasrec.compare_seconds
    for name in LOSSES:
        tried = {}
        for rate in [float(f"{settings.sasrec.lr * share:.3g}") for share in RATES]:
            print(f"loss {name}, learning rate {rate:g}: {budget:.0f} s", flush=True)
            never = 1_000_000  # epochs: the time alone ends the training
            own = {"loss": name, "lr": rate, "decay": False, "epochs": never, "patience": never}
            tried[rate] = sasrec.train(
                tables.interactions,
                tables.windows,
                len(tables.items),
                settings.sasrec.model_copy(update=own),
                settings.seed,
                folder=folder and folder / f"{rate:g}",
                max_seconds=budget,
            )
        best = max(tried, key=lambda rate: tried[rate].curve["NDCG@10"].max())
        rows += [
            {"loss": name, "lr": rate, "chosen": rate == best, **test_row(trained, tables, settings)}
            for rate, trained in tried.items()
        ]
        curves.append(tried[best].curve.rename(columns={"loss": "train_loss"}).assign(loss=name))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def by_seed(tables: Tables, settings: Params, folder: Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`compare_seeds` trainings that differ in nothing but the seed: the run's and the next ones.

    Returns
    -------
    One row a seed (see :func:`test_row`), and their learning curves.
    """
    rows, curves = [], []
    for seed in range(settings.seed, settings.seed + settings.sasrec.compare_seeds):
        print(f"seed {seed}", flush=True)
        trained = sasrec.train(tables.interactions, tables.windows, len(tables.items), settings.sasrec, seed, folder=folder)
        rows.append({"seed": seed, **test_row(trained, tables, settings)})
        curves.append(trained.curve.rename(columns={"loss": "train_loss"}).assign(seed=seed))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def compare(tables: Tables, settings: Params, yardsticks: pd.DataFrame, stage: Path) -> tuple[bool, dict[str, pd.DataFrame]]:
    """What the parameters ask for, kept in ``figures/<run>/``; else what ``params/retriever-ml-1m.yaml`` has left there.

    Parameters
    ----------
    yardsticks
        Of :func:`judge`, kept beside the rest.
    stage
        Folder for checkpoints.

    Returns
    -------
    Whether anything was made, and by name those of :data:`TABLES` that there are, each with its protocol.
    """
    own, made = settings.sasrec, {}
    if own.compare_seeds:
        made["seeds"], made["seed_curves"] = by_seed(tables, settings, stage)
    if own.compare_seconds:
        made["losses"], made["loss_curves"] = by_loss(tables, settings, stage / "losses")
    folder = paths.figures_dir(settings.run if made else "retriever-ml-1m")
    if made:
        made["yardsticks"] = yardsticks.rename_axis("ranker").reset_index()
        for name in TABLES:
            for kind in ("csv", "png"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
        keep(made, tables, settings, folder)
    return bool(made), {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv")) if path.stem in TABLES}


def keep(made: Mapping[str, pd.DataFrame], tables: Tables, settings: Params, folder: Path) -> None:
    """Write what :func:`compare` has made, with its protocol, and draw the learning curves."""
    users = windows_of(tables, "test")["user"].nunique()
    protocol = f"{settings.data.protocol}, all unseen items, epoch by validation NDCG@10"
    for name, table in made.items():
        table = table.assign(dataset=settings.data.name, protocol=protocol, n_users=users)
        paths.write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.5g"))
        if name.endswith("curves"):
            draw(table, name.removesuffix("_curves")).savefig(folder / f"{name}.png", dpi=130)
            plt.close()


def draw(curves: pd.DataFrame, by: str) -> Figure:
    """Learning curves over time, one line a loss or a seed."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    sns.lineplot(curves, x="seconds", y="NDCG@10", hue=by, palette="deep", marker="o", markersize=4, ax=axis)
    axis.set(ylabel="validation NDCG@10", title=f"{curves['dataset'].iloc[0]}, {curves['n_users'].iloc[0]} users")
    return figure
