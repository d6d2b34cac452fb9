"""Stage 06: Figures 6, 7 and 8 and the results page, made from the results table only."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corec import CorecError, evaluation, files, frontier, manifest, paths, schemes, stages, style
from corec.claims import YES
from corec.params import Params

SHOWN = "sasrec combiner hard-filter rule zero-shot no-token corec".split()  # the models of Figures 6 and 7
NAMES = {"ndcg": "NDCG", "cp": "CP"}
FEW = 3  # largest number of control tokens in the summary


def draw(axis: Axes, table: pd.DataFrame, x: str) -> None:
    """Draw one line per model over `x`, with intervals as error bars; the models are shifted so that bars do not overlap."""
    for number, (model, rows) in enumerate(table.groupby("model", sort=False)):
        rows, mark = rows.sort_values(x), style.mark(str(model))
        axis.errorbar(
            rows[x].astype(float) + 0.04 * (number - 2), rows["value"], evaluation.error_bars(rows), elinewidth=1, capsize=2,
            color=mark.color, marker=mark.marker, linestyle=mark.line, linewidth=mark.width, markersize=5, label=str(model),
        )  # fmt: skip
    axis.set_xticks(sorted(table[x].unique()))


def legend(figure: Figure, title: str = "") -> Figure:
    """Add one legend for all axes on the right, and a title."""
    figure.suptitle(title, fontsize=10)
    handles, models = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, [style.label(model) for model in models], loc="outside right center", frameon=False)
    return figure


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by metric, number of tokens, and the order of :data:`corec.evaluation.MODELS`."""
    place = table["model"].map(evaluation.MODELS.index)
    return table.assign(place=place).sort_values(["metric", "n_tokens", "place"], kind="stable").drop(columns="place")


def figure6_table(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """Rows of Figure 6: CP@k at the strictest threshold (tau = n) and NDCG@k, by number of control tokens."""
    asked = table[table["n_tokens"] > 0]
    strict = evaluation.pick(asked[asked["tau"] == asked["n_tokens"]], metric="cp", k=k)
    return in_order(evaluation.pick(pd.concat([strict, evaluation.pick(asked, metric="ndcg", k=k)]), model=SHOWN))


def figure7_table(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """Rows of Figure 7: CP@k by threshold, for every number of control tokens from 2 (or the largest, if that is 1)."""
    lengths = [n for n in table["n_tokens"].unique() if n >= min(2, table["n_tokens"].max())]
    return in_order(evaluation.pick(table, metric="cp", k=k, n_tokens=lengths, model=SHOWN))


def figure8_table(table: pd.DataFrame, k: int) -> pd.DataFrame:
    """Rows of Figure 8: CP@k at the strictest threshold and NDCG@k of SASRec, hard filter and COREC."""
    return evaluation.pick(figure6_table(table, k), model=["sasrec", "hard-filter", "corec"])


def figure6(table: pd.DataFrame, k: int) -> Figure:
    """Plot control precision and NDCG by number of control tokens, from :func:`figure6_table`."""
    figure, axes = plt.subplots(1, 2, figsize=style.WHOLE, layout="constrained")
    for axis, metric in zip(axes, ("cp", "ndcg"), strict=True):
        draw(axis, evaluation.pick(table, metric=metric), "n_tokens")
        axis.set(xlabel="control tokens", ylabel=f"{NAMES[metric]}@{k}" + (", τ = n" if metric == "cp" else ""))
    return legend(figure, style.title(table, "Figure 6"))


def figure7(table: pd.DataFrame, k: int) -> Figure:
    """Plot control precision by threshold, one panel per number of control tokens, from :func:`figure7_table`."""
    lengths = sorted(table["n_tokens"].unique())
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(3.4 + 2.6 * len(lengths), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, n in zip(axes[0], lengths, strict=True):
        draw(axis, evaluation.pick(table, n_tokens=n), "tau")
        axis.set(xlabel=f"threshold τ of {n} control token{'s' if n > 1 else ''}")
    axes[0, 0].set(ylabel=f"CP@{k}")
    return legend(figure, style.title(table, "Figure 7"))


def figure8(table: pd.DataFrame, k: int) -> Figure:
    """Plot control precision and NDCG of SASRec, hard filter and COREC as bars, from :func:`figure8_table`."""
    figure, axes = plt.subplots(1, 2, figsize=style.WHOLE, layout="constrained")
    for axis, metric in zip(axes, ("cp", "ndcg"), strict=True):
        rows = evaluation.pick(table, metric=metric)
        colors = {model: style.mark(model).color for model in rows["model"].unique()}
        sns.barplot(rows, x="n_tokens", y="value", hue="model", palette=colors, errorbar=None, ax=axis)
        for bars, (_, model) in zip(list(axis.containers), rows.groupby("model", sort=False), strict=True):
            model = model.sort_values("n_tokens")
            centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]  # type: ignore[attr-defined]
            axis.errorbar(centres, model["value"], evaluation.error_bars(model), fmt="none", color="0.2", capsize=2, linewidth=1)
        axis.set(xlabel="control tokens", ylabel=f"{NAMES[metric]}@{k}" + (", τ = n" if metric == "cp" else ""))
        axis.get_legend().remove()
    return legend(figure, style.title(table, "Figure 8"))


def make(table: pd.DataFrame, k: int, folder: Path, suffix: str = "") -> list[Path]:
    """Draw Figures 6 to 8, each with a CSV file of its data; returns the files.

    Parameters
    ----------
    table
        Results table of one protocol, with the columns of :data:`corec.evaluation.COLUMNS`.
    k
        Cut-off of the metrics.
    folder
        Folder of the files; created if missing.
    suffix
        End of the names of the files.

    Raises
    ------
    CorecError
        If the table has no requests with control tokens, or no metrics at `k`.
    """
    if figure6_table(table, k).empty:
        known = sorted(int(value) for value in table["k"].dropna().unique())
        raise CorecError(
            f"Parameter figures.k is {k}, but the results hold control tokens only at k in {known}: "
            "choose one of these, or evaluate more in evaluation.ks and controls.n_tokens."
        )
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with style.figure_style():
        for name, rows_of, draw_it in (
            ("fig6", figure6_table, figure6),
            ("fig7", figure7_table, figure7),
            ("fig8", figure8_table, figure8),
        ):
            rows = rows_of(table, k)
            written += [folder / f"{name}{suffix}.png", folder / f"{name}{suffix}.csv"]
            files.write_csv(written[-1], rows, "%.6g")
            figure = draw_it(rows, k)
            files.write_picture(written[-2], figure)
            plt.close(figure)
    return written


MODEL_NAMES = {
    "popularity": "popularity",
    "text": "similarity of the titles",
    "sasrec": "SASRec's order",
    "combiner": "combiner",
    "hard-filter": "hard filter",
    "hard-filter-strict": "hard filter, no back-fill",
    "hard-filter+combiner": "hard filter, combiner's order",
    "rule": "rule (the best CP that the pool allows)",
    "rule+combiner": "rule, combiner's order",
    "boost": "boost: prior + 1 per constraint met",
    "zero-shot": "zero-shot",
    "no-token": "COREC, no tokens",
    "corec": "**COREC**",
    "no-prior": "COREC, without the prior",
    "no-token-alone": "COREC, no tokens, without the retriever's score",
    "corec-alone": "COREC, without the retriever's score",
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


EXTRA = ("claims", "gaps", "frontier", "comparisons", "signs")  # further tables of stage 05


def signed(value: float, row: Any) -> str:
    """Format a difference with its interval, the fields `low` and `high` of `row`."""
    return f"{value:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"


def extra_sections(folder: Path, k: int) -> list[str]:
    """Sections of the results page from the tables :data:`EXTRA` in `folder`, as far as they exist."""
    found = {name: pd.read_csv(folder / f"{name}.csv") for name in EXTRA if (folder / f"{name}.csv").exists()}
    for name in {"claims", "gaps"} & found.keys():  # tables of a run with one protocol may lack the column
        found[name] = found[name].assign(protocol=found[name].get("protocol", found["frontier"]["protocol"].iloc[0]))
    lines: list[str] = []

    def add(heading: str, about: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        lines.extend(["", f"## {heading}", "", about, "", *markdown(header, rows)])

    protocols = list(dict.fromkeys(found["claims"]["protocol"])) if "claims" in found else []
    if "claims" in found:
        about = f"Differences of CP@{k} and NDCG@{k} on the same users; intervals in brackets."
        rows = [
            [
                row.claim,
                f"`{row.protocol}`",
                str(row.n_tokens),
                "" if math.isnan(row.strength) else f"{row.strength:g}",
                signed(row.value, row),
                YES[row.holds],
            ]
            for row in cells(found["claims"])
        ]
        add("Claims", about, ["difference", "protocol", "tokens", "strength", "value", "holds"], rows)
    if "frontier" in found:
        points = found["frontier"][found["frontier"]["protocol"] == protocols[0]]
        ours = points[(points["model"] == "corec") & frontier.whole_points(points)]
        gaps = found["gaps"][found["gaps"]["protocol"] == protocols[0]]
        both = ours.merge(gaps[["n_tokens", "strength", "gap", "low", "high"]], on=["n_tokens", "strength"])
        about = "COREC by strength; the last column is its NDCG minus that of the boost at the same CP, with its interval."
        rows = [
            [str(row.n_tokens), f"{row.strength:g}", f"{row.cp:.3f}", f"{row.ndcg:.3f}", signed(row.gap, row)]
            for row in cells(both.sort_values(["n_tokens", "strength"]))
        ]
        add("Frontier", about, ["tokens", "strength", f"CP@{k}", f"NDCG@{k}", "NDCG above the boost"], rows)
    if "comparisons" in found:
        table = found["comparisons"]
        about = (
            f"NDCG@{k} of COREC at strength 1 minus that of each other ranker, {table['n_users'].iloc[0]:,} users; p-values of "
            f"paired randomisation tests with Holm's correction over {len(table)} comparisons; users needed to find a difference "
            "of 0.01."
        )
        rows = [
            [row.other, str(row.n_tokens), signed(row.difference, row), f"{row.p_holm:.2g}", f"{row.users_for_001:,}"]
            for row in cells(table[table["metric"] == "ndcg"])
        ]
        add("Comparisons", about, ["ranker", "tokens", "difference", "p", "users needed"], rows)
    if "signs" in found:
        rows = [
            [row.sign, f"{row.number:.3g}", f"{row.threshold:g}", YES[row.found], row.meaning, row.remedy]
            for row in cells(found["signs"])
        ]
        about = "Signs that the results do not mean what they seem to mean."
        add("Diagnosis", about, ["sign", "number", "threshold", "found", "meaning", "remedy"], rows)
    return lines


def cells(table: pd.DataFrame) -> Iterable[Any]:
    """Rows of a table as named tuples."""
    return table.itertuples()


def of_protocol(table: pd.DataFrame, number: int) -> pd.DataFrame:
    """Rows of a results table of one protocol, by its place in the table."""
    return table[table["protocol"] == list(dict.fromkeys(table["protocol"]))[number]]


def both_metrics(table: pd.DataFrame, k: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of a results table with CP@k (tau = n), and those with NDCG@k."""
    control = table[(table["metric"] == "cp") & (table["k"] == k) & (table["tau"] == table["n_tokens"])]
    return control, table[(table["metric"] == "ndcg") & (table["k"] == k)]


def summary_table(table: pd.DataFrame, k: int, order: Sequence[str], many: bool = False) -> list[str]:
    """CP@k and NDCG@k of all models by number of constraints, as a Markdown table: up to :data:`FEW`, or more if `many`."""
    table = table[(table["n_tokens"] > FEW) == many]
    header, rows = [""], [[MODEL_NAMES[model]] for model in order]
    for name, part in zip((f"CP@{k}", f"NDCG@{k}"), both_metrics(table, k), strict=True):
        wide = part.pivot(index="model", columns="n_tokens", values="value")
        header += [f"{name}, {n} token{'s' if int(str(n)) != 1 else ''}" for n in wide.columns]
        for row, model in zip(rows, order, strict=True):
            row += [f"{value:.3f}" for value in wide.loc[model]]
    return markdown(header, rows)


def results_page(
    table: pd.DataFrame, k: int, introduction: str = "", facts: Mapping[str, Any] | None = None, folder: Path | None = None
) -> str:
    """Render a results table as a Markdown page: summary, CP, NDCG, shares of the best possible CP, other measurements.

    The page contains no times and no machine (see the manifest), so equal results give the same page. The function is long
    because a page has many sections.

    Parameters
    ----------
    table
        Results table, with the columns of :data:`corec.evaluation.COLUMNS`.
    k
        Cut-off of the metrics.
    introduction
        Paragraph that describes the run.
    facts
        Other measurements, by name.
    folder
        Folder of further tables (see :func:`extra_sections`); None for none.
    """
    others = [of_protocol(table, number) for number in range(1, table["protocol"].nunique())]
    table = of_protocol(table, 0)
    order = [model for model in (*evaluation.MODELS, *evaluation.ALONE) if model in set(table["model"])]
    run = table.iloc[0]
    users = int(table["n_users"].max())
    about = f"{run['dataset']}, K = {run['K']}, protocol `{run['protocol']}`, {users} test users, seed {run['seed']}."
    lines = [f"# Results: {run['dataset']}", "", *([introduction, ""] if introduction else []), "## Summary", "", about, ""]
    control, relevance = both_metrics(table, k)
    lines += [*summary_table(table, k, order), ""]
    if table["n_tokens"].max() > FEW:
        lines += [f"## Summary, more than {FEW} tokens", "", about, "", *summary_table(table, k, order, many=True), ""]
    for other in others:
        protocol = other["protocol"].iloc[0]
        about = f"The same model, candidates and users under requests of the protocol `{protocol}`."
        lines += [f"## Summary, {protocol}", "", about, "", *summary_table(other, k, order), ""]
    for title, what, part in (
        (
            "Control precision",
            f"CP@{k} at τ = n, no truth bonus, by number of control tokens; intervals in brackets.",
            control,
        ),
        ("Relevance", f"NDCG@{k}, binary, by number of control tokens; intervals in brackets.", relevance),
    ):
        texts = part.assign(text=[f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in part.itertuples()])
        cells = texts.pivot(index="model", columns="n_tokens", values="text")
        lines += [f"## {title}", "", what, ""]
        lines += [*markdown(["model", *map(str, cells.columns)], [[model, *cells.loc[model]] for model in order]), ""]
    value = control.set_index(["model", "n_tokens"])["value"]
    lines += ["## Against the best that the pools allow (`rule`)", ""]
    for model in ("corec", "no-prior", "corec-alone", "no-token", "zero-shot"):
        lengths = [n for n in sorted(control["n_tokens"].unique()) if (model, n) in value.index]
        shares = [f"{value[model, n] / value['rule', n]:.1%} with {n}" for n in lengths]
        lines += [f"- `{model}` reaches of its CP@{k}: {', '.join(shares)} control tokens."] if shares else []
    lines += extra_sections(folder, k) if folder else []
    if facts:
        lines += ["", "## Other measurements", ""]
    for name, fact in (facts or {}).items():
        text = ", ".join(f"{key}: {value}" for key, value in fact.items()) if isinstance(fact, dict) else fact
        lines.append(f"- {name}: {text}")
    return "\n".join(lines).replace("<", "&lt;") + "\n"  # text of the data is no HTML


def introduction(params: Params) -> str:
    """Paragraph that describes the run."""
    reranker = params.reranker
    return (
        f"Run `{params.run}`: data set {params.data.dataset}, split `{params.data.split}`, control values "
        f"`{params.controls.protocol}`, K = {params.controls.k} candidates of SASRec, seed {params.seed}. Backbone "
        f"{reranker.backbone}, read-out `{reranker.readout}` ({reranker.pooling}), request {reranker.request_position} the "
        f"candidates, values as {reranker.values}, loss `{reranker.loss}`, {'with' if reranker.prior else 'without'} a prior, "
        f"{reranker.seeds} training{'s' if reranker.seeds > 1 else ''}. "
        f"Intervals: {params.evaluation.confidence:.0%}, bootstrap over users."
    )


def copy_extra(params: Params, folder: Path) -> list[Path]:
    """Copy the tables :data:`EXTRA` of stage 05 to `folder`, remove older ones, and draw the frontier; returns the files."""
    written = []
    for name in EXTRA:
        source, target = paths.stage_dir(params.run, "evaluation") / f"{name}.csv", folder / f"{name}.csv"
        target.unlink(missing_ok=True)
        if source.exists():
            files.write_text(target, source.read_text())
            written.append(target)
    (folder / "frontier.png").unlink(missing_ok=True)
    if (folder / "frontier.csv").exists():
        written.append(folder / "frontier.png")
        with style.figure_style():
            points = pd.read_csv(folder / "frontier.csv")
            figure = frontier.draw(points[points["protocol"] == params.controls.protocol], params.figures.k, params.data.dataset)
            files.write_picture(written[-1], figure)
            plt.close(figure)
    return written


def origin(params: Params) -> dict[str, str]:
    """Columns that tell a run's rows from those of other runs: ``run backbone readout attributes``."""
    chosen = schemes.choose(params.controls.scheme, params.controls.attributes)
    names = " ".join(attribute.name for attribute in chosen)
    return {"run": params.run, "backbone": params.reranker.backbone, "readout": params.reranker.readout, "attributes": names}


def publish(table: pd.DataFrame, params: Params, facts: Mapping[str, Any]) -> list[Path]:
    """Write all outputs of stage 06 to ``figures/<run>/``; returns the files, the manifest last.

    Parameters
    ----------
    table
        Results table, with the columns of :data:`corec.evaluation.COLUMNS`.
    params
        Parameters of the run.
    facts
        Other measurements for the results page, by name.
    """
    folder = paths.figures_dir(params.run)
    record = manifest.collect(params, stages.ancestors("figures"))
    (folder / "manifest.json").unlink(missing_ok=True)
    written = make(of_protocol(table, 0), params.figures.k, folder)
    for old in folder.glob("fig[678]-*"):
        old.unlink()
    for number, protocol in enumerate(list(dict.fromkeys(table["protocol"]))[1:], start=1):
        written += make(of_protocol(table, number), params.figures.k, folder, f"-{protocol}")
    written += copy_extra(params, folder)
    windows = pd.read_parquet(paths.stage_dir(params.run, "evaluation") / "per_window.parquet")
    written += [folder / name for name in ("per_user.parquet", "metrics.csv", "results.md", "manifest.json")]
    files.write_parquet(written[-4], evaluation.per_user(windows, params.figures.k))
    files.write_csv(written[-3], table.assign(**origin(params)), "%.6g")
    files.write_text(written[-2], results_page(table, params.figures.k, introduction(params), facts, folder))
    # The page is made from the CSV files, and made anew when its wording changes.
    record["outputs"] = {path.name: files.sha256(path) for path in written[:-1] if path.suffix != ".md"}
    files.write_json(written[-1], record)
    return written
