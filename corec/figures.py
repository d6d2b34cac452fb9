"""Stage 06: Figures 6, 7 and 8 from the results table, and from nothing else."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corec import CorecError, evaluation, paths
from corec.params import Params

PALETTE = dict(zip(evaluation.MODELS, sns.color_palette("colorblind", len(evaluation.MODELS)), strict=True))
NAMES = {"ndcg": "NDCG", "cp": "CP"}


def draw(axis: Axes, table: pd.DataFrame, x: str) -> None:
    """One line a model over `x`, with its interval."""
    for number, (model, rows) in enumerate(table.groupby("model", sort=False)):
        rows = rows.sort_values(x)
        errors = evaluation.error_bars(rows)
        shift = 0.04 * (number - 2)
        axis.errorbar(
            rows[x].astype(float) + shift, rows["value"], errors, label=str(model), color=PALETTE[str(model)],
            marker="o", markersize=4, capsize=2, linewidth=1.2,
        )  # fmt: skip
    axis.set_xticks(sorted(table[x].unique()))


def legend(figure: Figure) -> None:
    """One legend for all axes, beside them."""
    figure.legend(*figure.axes[-1].get_legend_handles_labels(), loc="outside right center", frameon=False)


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows sorted by the models' customary order."""
    place = table["model"].map(evaluation.MODELS.index)
    return table.assign(place=place).sort_values(["metric", "n_tokens", "place"], kind="stable").drop(columns="place")


def figure6_table(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """Rows of Figure 6: CP@k at the strictest threshold, and NDCG@k, by number of control tokens."""
    asked = table[table["n_tokens"] > 0]
    strict = evaluation.pick(asked[asked["tau"] == asked["n_tokens"]], metric="cp", k=k)
    return in_order(pd.concat([strict, evaluation.pick(asked, metric="ndcg", k=k)]))


def figure7_table(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """Rows of Figure 7: CP@k by threshold, at the largest number of control tokens."""
    return in_order(evaluation.pick(table, metric="cp", k=k, n_tokens=table["n_tokens"].max()))


def figure8_table(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """Rows of Figure 8: CP@k at the strictest threshold and NDCG@k of SASRec, hard filter and COREC."""
    return evaluation.pick(figure6_table(table, k), model=["sasrec", "hard-filter", "corec"])


def figure6(table: pd.DataFrame, k: int) -> Figure:
    """Control precision and NDCG by number of control tokens, from :func:`figure6_table`."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, metric in zip(axes, ("cp", "ndcg"), strict=True):
        draw(axis, evaluation.pick(table, metric=metric), "n_tokens")
        axis.set(xlabel="control tokens", ylabel=f"{NAMES[metric]}@{k}" + (", τ = n" if metric == "cp" else ""))
    legend(figure)
    return figure


def figure7(table: pd.DataFrame, k: int) -> Figure:
    """Control precision by threshold, from :func:`figure7_table`."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    draw(axis, table, "tau")
    axis.set(xlabel=f"threshold τ (of {table['n_tokens'].max()} control tokens)", ylabel=f"CP@{k}")
    legend(figure)
    return figure


def figure8(table: pd.DataFrame, k: int) -> Figure:
    """Bars of control precision and NDCG for SASRec, hard filter and COREC, from :func:`figure8_table`."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, metric in zip(axes, ("cp", "ndcg"), strict=True):
        rows = evaluation.pick(table, metric=metric)
        sns.barplot(rows, x="n_tokens", y="value", hue="model", palette=PALETTE, errorbar=None, ax=axis)
        for bars, (_, model) in zip(list(axis.containers), rows.groupby("model", sort=False), strict=True):
            model = model.sort_values("n_tokens")
            centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]  # type: ignore[attr-defined]
            axis.errorbar(centres, model["value"], evaluation.error_bars(model), fmt="none", color="0.2", capsize=2, linewidth=1)
        axis.set(xlabel="control tokens", ylabel=f"{NAMES[metric]}@{k}" + (", τ = n" if metric == "cp" else ""))
        axis.get_legend().remove()
    legend(figure)
    return figure


def make(table: pd.DataFrame, k: int, folder: Path) -> list[Path]:
    """Draw Figures 6 to 8, each with the CSV behind it; returns the files.

    Raises
    ------
    CorecError
        When the table has no requests with control tokens, or no metrics at `k`.
    """
    if figure6_table(table, k).empty:
        known = sorted(int(value) for value in table["k"].dropna().unique())
        raise CorecError(
            f"Parameter figures.k is {k}, but the results hold control tokens only at k in {known}: "
            "choose one of these, or evaluate more in evaluation.ks and controls.n_tokens."
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with sns.axes_style("whitegrid"):
        for name, rows_of, draw_it in (
            ("fig6", figure6_table, figure6),
            ("fig7", figure7_table, figure7),
            ("fig8", figure8_table, figure8),
        ):
            rows = rows_of(table, k)
            files += [folder / f"{name}.png", folder / f"{name}.csv"]
            rows.to_csv(files[-1], index=False, float_format="%.6g")
            figure = draw_it(rows, k)
            figure.savefig(files[-2], dpi=130)
            plt.close(figure)
    return files


def results_page(table: pd.DataFrame, params: Params, facts: dict[str, Any]) -> str:
    """The results in words and tables (Markdown): what was run, the protocol, CP, NDCG, and signs of failure."""
    k = params.figures.k
    n = sorted(table["n_tokens"].unique())
    cell = table.assign(
        text=[f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in table.itertuples()],
        model=pd.Categorical(table["model"], [model for model in evaluation.MODELS if model in set(table["model"])]),
    )
    lines = [
        f"# Results of run `{params.run}`",
        "",
        f"Data set {params.data.name}, split `{params.data.protocol}`, control values `{params.controls.protocol}`, "
        f"K = {params.controls.k} candidates of SASRec, {int(table['n_users'].max())} test users, seed {params.seed}. "
        f"Backbone {params.reranker.backbone}, read-out `{params.reranker.readout}` ({params.reranker.pooling}), request "
        f"{params.reranker.request_position} the candidates, values as {params.reranker.values}. "
        f"Brackets: {params.evaluation.confidence:.0%} bootstrap intervals over users.",
        "",
    ]
    for title, metric, strict in ((f"CP@{k} at τ = n, no truth bonus", "cp", True), (f"NDCG@{k}, binary", "ndcg", False)):
        rows = cell[(cell["metric"] == metric) & (cell["k"] == k)]
        rows = rows[rows["tau"] == rows["n_tokens"]] if strict else rows
        wide = rows.pivot(index="model", columns="n_tokens", values="text")
        header = [str(column) for column in wide.columns]
        lines += [f"## {title}, by number of control tokens", "", "| model | " + " | ".join(header) + " |"]
        lines += ["|---" * (len(header) + 1) + "|"]
        lines += [f"| {model} | " + " | ".join(row) + " |" for model, row in zip(wide.index, wide.to_numpy(), strict=True)]
        lines += [""]
    strictest = table[(table["metric"] == "cp") & (table["k"] == k) & (table["tau"] == table["n_tokens"])]
    value = strictest.set_index(["model", "n_tokens"])["value"]
    lines += ["## Against the best that the pools allow (`rule`)", ""]
    for model in ("corec", "no-token", "zero-shot"):
        shares = [f"{value[model, m] / value['rule', m]:.1%} with {m}" for m in n if m and (model, m) in value.index]
        lines += [f"- `{model}` reaches of its CP@{k}: {', '.join(shares)} control tokens."] if shares else []
    lines += ["", "## What else was measured", ""]
    for name, fact in facts.items():
        text = ", ".join(f"{key}: {value}" for key, value in fact.items()) if isinstance(fact, dict) else fact
        lines.append(f"- {name}: {text}")
    return "\n".join(lines) + "\n"


def publish(table: pd.DataFrame, params: Params, facts: dict[str, Any]) -> list[Path]:
    """Write everything that stage 06 makes into ``figures/<run>/``; returns the files, the manifest last."""
    folder = paths.figures_dir(params.run)
    record = paths.manifest(params)
    (folder / "manifest.json").unlink(missing_ok=True)
    files = make(table, params.figures.k, folder)
    files += [folder / "metrics.csv", folder / "results.md", folder / "manifest.json"]
    table.to_csv(files[-3], index=False, float_format="%.6g")
    paths.write_text(files[-2], results_page(table, params, facts))
    record["outputs"] = {path.name: paths.sha256(path) for path in files[:-1]}
    paths.write_text(files[-1], json.dumps(record, indent=1) + "\n")
    return files
