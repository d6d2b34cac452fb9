"""The retriever with different losses at equal training time, and with different seeds.

Ranking is full (all items that the user has not seen). The epoch is selected by validation NDCG@10; nothing is selected on
the test windows.
"""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from corec import files, pages, sasrec, style
from corec.data import Tables
from corec.params import Params
from corec.sasrec.baselines import judge, windows_of

LOSSES = ("ce", "sampled", "gbce", "bce")

RATES = (1.0, 0.3, 0.1)  # factors of the run's learning rate, tried with each loss

TABLES = ("losses", "loss_curves", "seeds", "seed_curves", "baselines")


def summary_row(trained: sasrec.Trained, tables: Tables, settings: Params) -> dict[str, float]:
    """Summarise one training: epochs, time, validation and test metrics.

    Parameters
    ----------
    trained
        Result of :func:`corec.sasrec.train`.
    tables, settings
        Tables of stage 01 and settings of the run.

    Returns
    -------
    Values by column name. ``seconds_to_95`` is the time at which 95 % of the best validation NDCG@10 was first reached.
    """
    windows = windows_of(tables, "test")
    queries = sasrec.queries(tables.interactions, windows, settings.sasrec.max_length)
    ranks = sasrec.rank_targets(trained.model, queries)
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
    """Compare the four losses at equal time: train each for `study.loss_seconds` at each of :data:`RATES`.

    A learning rate that suits one loss can prevent another from learning, so the constant rate is selected for each loss, by
    its best validation NDCG@10 within that time. All other settings are those of the run.

    Parameters
    ----------
    tables, settings
        Tables of stage 01 and settings of the run.
    folder
        Folder of the checkpoints; None for none.

    Returns
    -------
    One row per loss and rate (see :func:`summary_row`; `chosen` marks the selected rate of each loss), and the learning curves
    of the selected rates.
    """
    rows, curves, budget = [], [], settings.study.loss_seconds
    for name in LOSSES:
        tried = {}
        for rate in [float(f"{settings.sasrec.lr * share:.3g}") for share in RATES]:
            print(f"loss {name}, learning rate {rate:g}: {budget:.0f} s", flush=True)
            unlimited = 1_000_000  # epochs; only the time limit ends the training
            changes = {"loss": name, "lr": rate, "decay": False, "epochs": unlimited, "patience": unlimited}
            tried[rate] = sasrec.train(
                tables.interactions,
                tables.windows,
                len(tables.items),
                settings.sasrec.model_copy(update=changes),
                settings.seed,
                folder=folder and folder / f"{budget:g}s-{rate:g}",
                max_seconds=budget,
            )
        best = max(tried, key=lambda rate: tried[rate].curve["NDCG@10"].max())
        rows += [
            {"loss": name, "lr": rate, "chosen": rate == best, **summary_row(trained, tables, settings)}
            for rate, trained in tried.items()
        ]
        curves.append(tried[best].curve.rename(columns={"loss": "train_loss"}).assign(loss=name))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def by_seed(tables: Tables, settings: Params, folder: Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train with `study.seeds` consecutive seeds, from the run's seed on, and otherwise equal settings.

    Returns
    -------
    One row per seed (see :func:`summary_row`), and the learning curves.
    """
    rows, curves = [], []
    for seed in range(settings.seed, settings.seed + settings.study.seeds):
        print(f"seed {seed}", flush=True)
        trained = sasrec.train(tables.interactions, tables.windows, len(tables.items), settings.sasrec, seed, folder=folder)
        rows.append({"seed": seed, **summary_row(trained, tables, settings)})
        curves.append(trained.curve.rename(columns={"loss": "train_loss"}).assign(seed=seed))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


def compare(tables: Tables, settings: Params, baselines: pd.DataFrame, stage: Path) -> dict[str, pd.DataFrame]:
    """Run the trainings that the section ``study`` of the settings specifies.

    Parameters
    ----------
    tables, settings
        Tables of stage 01 and settings of the run.
    baselines
        Result of :func:`corec.sasrec.baselines.judge`, included in the tables.
    stage
        Folder of the checkpoints.

    Returns
    -------
    Tables by name (of :data:`TABLES`), each with columns ``dataset protocol n_users``.
    """
    results = {"baselines": baselines.rename_axis("ranker").reset_index()}
    results["seeds"], results["seed_curves"] = by_seed(tables, settings, stage)
    if settings.study.loss_seconds:
        results["losses"], results["loss_curves"] = by_loss(tables, settings, stage / "losses")
    users = windows_of(tables, "test")["user"].nunique()
    protocol = f"{settings.data.split}, all unseen items, epoch by validation NDCG@10"
    dataset = settings.data.dataset
    return {name: table.assign(dataset=dataset, protocol=protocol, n_users=users) for name, table in results.items()}


def keep(made: Mapping[str, pd.DataFrame], folder: Path) -> list[Path]:
    """Write the tables of :func:`compare`, plots of the learning curves and the results page to `folder`; return the paths.

    Tables and plots of an earlier comparison in the same folder are removed.
    """
    pages.clear(folder, TABLES)
    written = []
    for name, table in made.items():
        written.append(folder / f"{name}.csv")
        files.write_csv(written[-1], table, "%.5g")
        if name.endswith("curves"):
            written.append(folder / f"{name}.png")
            files.write_picture(written[-1], draw(table, name.removesuffix("_curves")))
            plt.close()
    pages.write_study(folder)
    return written


def draw(curves: pd.DataFrame, by: str) -> Figure:
    """Plot validation NDCG@10 against time, one line per value of the column `by` (loss or seed)."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    sns.lineplot(
        curves, x="seconds", y="NDCG@10", hue=by, palette=style.CYCLE[: curves[by].nunique()], marker="o", markersize=4, ax=axis
    )
    axis.set(ylabel="validation NDCG@10", title=f"{curves['dataset'].iloc[0]}, {curves['n_users'].iloc[0]} users")
    return figure
