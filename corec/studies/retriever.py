"""The retriever by loss at equal time, and by seed.

Ranking is full (all items that the user has not seen), the epoch is chosen by validation NDCG@10, and nothing is chosen by
the test windows.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from corec import files, pages, sasrec
from corec.data import Tables
from corec.params import Params
from corec.sasrec.baselines import judge, windows_of

LOSSES = ("ce", "sampled", "gbce", "bce")

RATES = (1.0, 0.3, 0.1)  # tried with every loss, times the run's learning rate

TABLES = ("losses", "loss_curves", "seeds", "seed_curves", "baselines")


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
    """The four losses at equal time: `study.loss_seconds` of training at each of :data:`RATES`, the best one kept.

    What suits one loss can keep another from learning at all, so each has the constant learning rate with which it
    reached the best validation NDCG@10 in that time. All else is the run's.

    Returns
    -------
    One row a loss and rate (see :func:`test_row`; `chosen` marks the best rate of each loss), and the learning curves
    of the chosen.
    """
    rows, curves, budget = [], [], settings.study.loss_seconds
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
    """`study.seeds` trainings that differ in nothing but the seed: the run's and the next ones.

    Returns
    -------
    One row a seed (see :func:`test_row`), and their learning curves.
    """
    rows, curves = [], []
    for seed in range(settings.seed, settings.seed + settings.study.seeds):
        print(f"seed {seed}", flush=True)
        trained = sasrec.train(tables.interactions, tables.windows, len(tables.items), settings.sasrec, seed, folder=folder)
        rows.append({"seed": seed, **test_row(trained, tables, settings)})
        curves.append(trained.curve.rename(columns={"loss": "train_loss"}).assign(seed=seed))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def compare(tables: Tables, settings: Params, baselines: pd.DataFrame, stage: Path) -> dict[str, pd.DataFrame]:
    """Train what ``study`` asks for, and keep it in ``figures/<run>/``.

    Parameters
    ----------
    tables, settings
        Of the run.
    baselines
        Of :func:`corec.sasrec.baselines.judge`, kept beside the rest.
    stage
        Folder for checkpoints.

    Returns
    -------
    The tables by name (of :data:`TABLES`), each with its protocol.
    """
    made = {"baselines": baselines.rename_axis("ranker").reset_index()}
    made["seeds"], made["seed_curves"] = by_seed(tables, settings, stage)
    if settings.study.loss_seconds:
        made["losses"], made["loss_curves"] = by_loss(tables, settings, stage / "losses")
    users = windows_of(tables, "test")["user"].nunique()
    protocol = f"{settings.data.protocol}, all unseen items, epoch by validation NDCG@10"
    name_of = settings.data.dataset
    return {name: table.assign(dataset=name_of, protocol=protocol, n_users=users) for name, table in made.items()}


def keep(made: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write what :func:`compare` has made, and the pictures of the learning curves; returns the files.

    Tables of an earlier comparison in the same folder are removed.
    """
    for name in TABLES:
        for kind in ("csv", "png"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    written = []
    for name, table in made.items():
        written.append(folder / f"{name}.csv")
        files.write_text(written[-1], table.to_csv(index=False, float_format="%.5g"))
        if name.endswith("curves"):
            written.append(folder / f"{name}.png")
            draw(table, name.removesuffix("_curves")).savefig(written[-1], dpi=130)
            plt.close()
    return written + pages.write(folder)


def draw(curves: pd.DataFrame, by: str) -> Figure:
    """Learning curves over time, one line a loss or a seed."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    sns.lineplot(curves, x="seconds", y="NDCG@10", hue=by, palette="deep", marker="o", markersize=4, ax=axis)
    axis.set(ylabel="validation NDCG@10", title=f"{curves['dataset'].iloc[0]}, {curves['n_users'].iloc[0]} users")
    return figure
