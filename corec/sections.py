"""Sections of the result pages: tables (Markdown) of studies and benchmarks, from the CSV files of a folder in ``figures/``."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from corec.figures import markdown
from corec.sections_beyond import KINDS as BEYOND

Section = tuple[str, list[str]]  # heading and lines


def interval(row: pd.Series, name: str) -> str:
    """Format a value with its interval, from the columns ``name``, ``name low`` and ``name high``."""
    return f"{row[name]:.3f} ({row[f'{name} low']:.3f} to {row[f'{name} high']:.3f})"


def span(values: pd.Series, form: str) -> str:
    """Format the range of the values, or one value if all are equal after rounding."""
    low, high = form.format(values.min()), form.format(values.max())
    return low if low == high else f"{low} to {high}"


def number(value: float) -> str:
    """Format a number with three significant digits, or without decimals from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def orders_section(folder: Path) -> Iterator[Section]:
    """CP and NDCG of the orders of the prompt (:mod:`corec.studies.orders`)."""
    table, curves = pd.read_csv(folder / "orders.csv"), pd.read_csv(folder / "order_curves.csv")
    trained = curves.groupby(["variant", "seed"])["requests"].max().groupby("variant").mean()
    lengths = sorted(table["n_tokens"].unique())
    columns = [("cp", n) for n in lengths if n] + [("ndcg", 0)]
    header = ["read-out, place of the request", "supervised requests"]
    header += [f"CP@5, {n} token{'s' if n > 1 else ''}" for n in lengths if n] + ["NDCG@5, no token"]
    rows = []
    for variant, part in table.groupby("variant", sort=False):
        cells = part.set_index(["metric", "n_tokens"])
        texts = [
            f"{cells.loc[key, 'value']:.3f} ({cells.loc[key, 'low']:.3f} to {cells.loc[key, 'high']:.3f})"
            if key in cells.index
            else ""
            for key in columns
        ]
        rows.append([f"`{variant}`", f"{trained[variant]:,.0f}" if variant in trained else "", *texts])
    first = table.iloc[0]
    about = (
        f"{first['dataset']}, K = {first['K']}, protocol `{first['protocol']}`, {first['n_users']} test users, "
        f"{table['seeds'].max()} seed{'s' if table['seeds'].max() > 1 else ''}, {first['minutes']:g} minutes of training each."
    )
    yield "CP and NDCG by variant", [about, "", *markdown(header, rows)]


def ablations_sections(folder: Path) -> Iterator[Section]:
    """Values of the variants and their differences from the whole (:mod:`corec.studies.ablations`)."""
    table = pd.read_csv(folder / "ablations.csv")
    first, lengths = table.iloc[0], sorted(int(n) for n in table["n_tokens"].dropna().unique())
    about = (
        f"{first['dataset']}, K = {first['K']}, protocol `{first['protocol']}`, {first['n_users']} test users, one training for "
        "each variant; strength 1."
    )
    k = first["k"]
    columns = [("ndcg", 0), *(("cp", n) for n in lengths if n), *(("ndcg", n) for n in lengths if n)]
    header = ["", *(f"{metric.upper()}@{k}, {n} token{'s' if n != 1 else ''}" for metric, n in columns)]
    values, differences = [], []
    for variant, part in table[table["metric"] != "gap"].groupby("variant", sort=False):
        cells = part.set_index(["metric", "n_tokens"]).loc[columns]
        steps = part["steps"].iloc[0]
        values.append(
            [f"`{variant!s}`", "" if math.isnan(steps) else str(int(steps)), *(f"{value:.3f}" for value in cells["value"])]
        )
        ahead = zip(cells["ahead"], cells["ahead_low"], cells["ahead_high"], strict=True)
        if variant != "corec":
            differences.append([f"`{variant!s}`", *(f"{gain:+.3f} ({low:+.3f} to {high:+.3f})" for gain, low, high in ahead)])
    yield "Ablations", [about, "", *markdown([header[0], "steps", *header[1:]], values)]
    yield "Ablations, differences from `corec`", ["Paired, with intervals over users.", "", *markdown(header, differences)]
    if len(gaps := table[table["metric"] == "gap"]):
        rows = [[f"`{r.variant}`", f"{r.value:+.4f} ({r.low:+.4f} to {r.high:+.4f})"] for r in gaps.itertuples()]
        about = f"NDCG@{k} minus that of the boost at the same CP@{k}, mean over all strengths and numbers of tokens."
        yield "Ablations, against the boost's frontier", [about, "", *markdown(["", "difference"], rows)]


def surface_section(folder: Path) -> Iterator[Section]:
    """CP and NDCG by number of candidates and tokens (:mod:`corec.studies.surface`)."""
    table = pd.read_csv(folder / "surface.csv")
    first = table.iloc[0]
    about = (
        f"{first['dataset']}, protocol `{first['protocol']}`, {first['n_users']} test users; CP@{first['k']} (NDCG@{first['k']})."
    )
    lengths, rows = sorted(table["n_tokens"].unique()), []
    for (k, model), part in table.groupby(["K", "model"], sort=False):
        cells = part.set_index(["metric", "n_tokens"])["value"]
        texts = [f"{cells['cp', n]:.3f} ({cells['ndcg', n]:.3f})" if n else f"({cells['ndcg', n]:.3f})" for n in lengths]
        rows.append([str(k), f"`{model}`", *texts])
    header = ["K", "", *(f"{n} token{'s' if n != 1 else ''}" for n in lengths)]
    yield "Candidates and tokens", [about, "", *markdown(header, rows)]


def texts_section(folder: Path) -> Iterator[Section]:
    """NDCG without tokens by model of the titles (:mod:`corec.studies.texts`)."""
    table = pd.read_csv(folder / "texts.csv")
    first = table.iloc[0]
    about = (
        f"{first['dataset']}, K = {first['K']}, {first['n_users']} test users; {first['recall']:.1%} of the true next items are "
        "among the candidates. Differences are paired, with intervals over users; the combiner of the run is the first one."
    )
    header = ["", f"NDCG@{first['k']}", "minus the order of the candidates", "minus the combiner of the run"]
    rows = [
        [
            f"`{row.ranker}`",
            f"{row.value:.4f}",
            f"{row.ahead:+.4f} ({row.ahead_low:+.4f} to {row.ahead_high:+.4f})",
            f"{row.over:+.4f} ({row.over_low:+.4f} to {row.over_high:+.4f})",
        ]
        for row in table.itertuples()
    ]
    yield "Titles in the combiner", [about, "", *markdown(header, rows)]


def comparison_section(folder: Path) -> Iterator[Section]:
    """Two runs side by side (:mod:`corec.compare`)."""
    table = pd.read_csv(folder / "comparison.csv")
    first = table.iloc[0]
    kind = "the differences are paired by user" if first["paired"] else "the users differ, so the resamples are independent"
    about = f"Runs `{first['run_a']}` ({first['users_a']} users) and `{first['run_b']}` ({first['users_b']} users); {kind}."
    for metric, rows in table.groupby("metric", sort=True):
        found = [
            [
                f"`{row.model}`",
                str(row.n_tokens),
                f"{row.a:.3f}",
                f"{row.b:.3f}",
                f"{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})",
            ]
            for row in rows.itertuples()
        ]
        header = ["", "tokens", f"`{first['run_a']}`", f"`{first['run_b']}`", "difference"]
        yield f"{str(metric).upper()}@{first['k']}", [about, "", *markdown(header, found)]


def grid_section(folder: Path) -> Iterator[Section]:
    """Means over the seeds of a grid (:mod:`corec.grid`)."""
    table = pd.read_csv(folder / "grid.csv", keep_default_na=False, na_values={"sd": [""]})
    for metric, rows in table.groupby("metric", sort=True):
        spread = rows["sd"].map("± {:.3f}".format).where(rows["seeds"] > 1, "")
        texts = rows["value"].map("{:.3f} ".format) + spread
        keys = ["base", "variant", "protocol", "model"]
        wide = rows.assign(text=texts.str.strip()).pivot_table("text", keys, "n_tokens", aggfunc="first", sort=False)
        header = ["run", "variant", "protocol", "", *(f"{n} token{'s' if int(str(n)) != 1 else ''}" for n in wide.columns)]
        body = [[*key[:3], f"`{key[3]}`", *row] for key, row in zip(wide.index.tolist(), wide.fillna("").to_numpy(), strict=True)]
        seeds = sorted(set(rows["seeds"]))
        about = f"Mean and standard deviation over the seeds ({', '.join(map(str, seeds))} for each setting)."
        yield f"{str(metric).upper()}@{rows['k'].iloc[0]}", [about, "", *markdown(header, body)]


def missing_sections(folder: Path) -> Iterator[Section]:
    """CP when metadata is missing or wrong (:mod:`corec.studies.missing`)."""
    table = pd.read_csv(folder / "missing.csv")
    first, cut = table.iloc[0], table["k"].iloc[0]
    seeds = f"{first['seeds']} seed{'s' if first['seeds'] > 1 else ''}"
    about = f"{first['dataset']}, K = {first['K']}, protocol `{first['protocol']}`, {table['n_users'].max()} test users, {seeds}."
    rows = table[(table["metric"] == "cp") & (table["attribute"] == "all")]
    for column, other in (("missing", "wrong"), ("wrong", "missing")):
        some = rows[rows[other] == 0]
        if column == "missing" or bool((some[column] > 0).any()):
            yield f"CP@{cut} by share of {column} values", [about, "", *share_table(some, column)]
    single = table[(table["metric"] == "cp") & (table["attribute"] != "all") & (table["wrong"] == 0)]
    yield f"CP@{cut} with one token, by attribute and share of missing values", [about, "", *by_attribute(single)]
    ours = rows[rows["model"].str.startswith("corec") | rows["imputer"].str.startswith("corec")]
    about = "Paired, with intervals over users; the best imputer is the best one on these test users."
    title = f"CP@{cut} minus that of the rule with the best imputer"
    yield title, [about, "", *ahead_table(ours)]
    if first["seeds"] > 1:
        about = "Mean, lowest and highest of the seeds, each with its own training and choice of the values."
        yield f"{title}, by seed", [about, "", *ahead_table(ours, ("ahead_lowest", "ahead_highest"))]


def guesses_section(folder: Path) -> Iterator[Section]:
    """Area under the ROC curve of the guesses of unknown values (:mod:`corec.studies.missing`)."""
    table = pd.read_csv(folder / "guesses.csv")
    means = table.groupby(["imputer", "attribute", "missing"], sort=False)["auc"].mean()
    shares, names = sorted(table["missing"].unique()), list(table["attribute"].unique())
    header = ["", *(f"{name}, {share:.0%}" for name in names for share in shares)]
    keys = [(name, share) for name in names for share in shares]
    rows = [
        [f"`{imputer}`", *(f"{means[imputer, *key]:.3f}" if (imputer, *key) in means.index else "" for key in keys)]
        for imputer in table["imputer"].unique()
    ]
    about = (
        "Does a candidate meet a constraint on an unknown value? Area under the ROC curve, 0.5 is chance; mean over the seeds."
    )
    yield "Guesses of unknown values, by attribute and share of missing values", [about, "", *markdown(header, rows)]


def ranker(model: str, imputer: str) -> str:
    """Name of a model with an imputer."""
    return f"`{model}`" if imputer == "none" and model != "rule" else f"`{model}`, `{imputer}`"


def share_table(rows: pd.DataFrame, column: str) -> list[str]:
    """CP of every ranker by number of tokens and share in `column`."""
    shares, lengths = sorted(rows[column].unique()), sorted(rows["n_tokens"].unique())
    header = ["", *(f"{share:.0%}, {n} token{'s' if n > 1 else ''}" for n in lengths for share in shares)]
    lines = []
    for (model, imputer), part in rows.groupby(["model", "imputer"], sort=False):
        cells = part.set_index(["n_tokens", column])["value"]
        texts = [f"{cells[n, share]:.3f}" if (n, share) in cells.index else "" for n in lengths for share in shares]
        lines.append([ranker(str(model), str(imputer)), *texts])
    return markdown(header, lines)


def by_attribute(rows: pd.DataFrame) -> list[str]:
    """CP of every ranker by attribute and share of missing values."""
    shares, names = sorted(rows["missing"].unique()), list(rows["attribute"].unique())
    header = ["", *(f"{name}, {share:.0%}" for name in names for share in shares)]
    lines = []
    for (model, imputer), part in rows.groupby(["model", "imputer"], sort=False):
        cells = part.set_index(["attribute", "missing"])["value"]
        lines.append([ranker(str(model), str(imputer)), *(f"{cells[name, share]:.3f}" for name in names for share in shares)])
    return markdown(header, lines)


def ahead_table(rows: pd.DataFrame, ends: tuple[str, str] = ("ahead_low", "ahead_high")) -> list[str]:
    """Differences from the best imputer, and the columns `ends`, by share, number of tokens and ranker."""
    keys = list(dict.fromkeys(zip(rows["model"], rows["imputer"], strict=True)))
    header = ["missing", "wrong", "tokens", "best imputer", *(ranker(*key) for key in keys)]
    lines = []
    for (missing, wrong, n), part in rows.groupby(["missing", "wrong", "n_tokens"], sort=True):
        cells = part.set_index(["model", "imputer"])
        texts = [f"{row['ahead']:+.3f} ({row[ends[0]]:+.3f} to {row[ends[1]]:+.3f})" for row in (cells.loc[key] for key in keys)]
        lines.append([f"{missing:.0%}", f"{wrong:.0%}", str(n), f"`{part['best'].iloc[0]}`", *texts])
    return markdown(header, lines)


def transfer_sections(folder: Path) -> Iterator[Section]:
    """CP and NDCG of a transferred re-ranker, and differences from training anew (:mod:`corec.studies.transfer`)."""
    table = pd.read_csv(folder / "transfer.csv")
    first, cut = table.iloc[0], table["k"].iloc[0]
    about = (
        f"Trained on the run `{first['source']}`, used on {first['dataset']}: K = {first['K']}, protocol `{first['protocol']}`, "
        f"{first['n_users']} test users."
    )
    whole = table[table["tokens"] == "all"]
    columns = [(metric, n) for metric in ("cp", "ndcg") for n in sorted(whole["n_tokens"].unique()) if n or metric == "ndcg"]
    header = ["", *(f"{metric.upper()}@{cut}, {n} token{'s' if n != 1 else ''}" for metric, n in columns)]
    values, differences = [], []
    for model, part in whole.groupby("model", sort=False):
        found = part.set_index(["metric", "n_tokens"]).loc[columns]
        values.append([f"`{model}`", *(f"{value:.3f}" for value in found["value"])])
        ahead = zip(found["ahead"], found["ahead_low"], found["ahead_high"], strict=True)
        if model != "corec":
            differences.append([f"`{model}`", *(f"{gain:+.3f} ({low:+.3f} to {high:+.3f})" for gain, low, high in ahead)])
    yield "Transfer", [about, "", *markdown(header, values)]
    yield "Transfer, differences from training anew", ["Paired, with intervals over users.", "", *markdown(header, differences)]
    rows = table[(table["tokens"] != "all") & (table["metric"] == "cp")]
    kinds = list(rows["tokens"].unique())
    cells = rows.set_index(["model", "tokens"])["value"]
    header = ["", *(f"{kind} tokens ({rows[rows['tokens'] == kind]['n_users'].iloc[0]} users)" for kind in kinds)]
    lines = [[f"`{model}`", *(f"{cells[model, kind]:.3f}" for kind in kinds)] for model in rows["model"].unique()]
    yield f"Transfer: CP@{cut} with one token, by token", markdown(header, lines)


def readouts_section(folder: Path) -> Iterator[Section]:
    """Loss of the read-outs (:mod:`corec.studies.readouts`)."""
    table = pd.read_csv(folder / "readouts.csv")
    rows = [
        [f"`{name}`", f"{part['loss'].tail(10).mean():.2f}", f"{part['tokens'].mean():,.0f}", f"{part['seconds'].max():.0f}"]
        for name, part in table.groupby("readout", sort=False)
    ]
    header = ["read-out", "mean loss of the last ten steps", "tokens per step", "seconds"]
    yield "Loss by read-out", [f"{table['step'].max() + 1} steps each; 0.69 is chance.", "", *markdown(header, rows)]


def retriever_sections(folder: Path) -> Iterator[Section]:
    """Seeds, losses and simple rankers (:mod:`corec.studies.retriever`)."""
    table = pd.read_csv(folder / "seeds.csv")
    about = f"{table['dataset'].iloc[0]}, test, {table['n_users'].iloc[0]:,} users; {table['protocol'].iloc[0]}."
    rows = [
        [
            str(int(row["seed"])), interval(row, "NDCG@10"), interval(row, "HR@10"), f"{row['valid NDCG@10']:.3f}",
            str(int(row["best_epoch"])), f"{row['seconds']:,.0f}", f"{row['seconds_to_95']:,.0f}",
        ]
        for _, row in table.iterrows()
    ]  # fmt: skip
    means = [f"{table[name].mean():.3f} ± {table[name].std():.3f}" for name in ("NDCG@10", "HR@10")]
    rows += [["mean ± standard deviation", *means, "", "", "", ""]] if len(table) > 1 else []
    header = ["seed", "NDCG@10", "HR@10", "validation NDCG@10", "best epoch", "seconds", "seconds to 95 % of it"]
    yield "Seeds", [about, "", *markdown(header, rows)]
    if (folder / "losses.csv").exists():
        table = pd.read_csv(folder / "losses.csv").query("chosen")
        rows = [
            [f"`{row['loss']}`", f"{row['lr']:g}", str(int(row["epochs"])), interval(row, "NDCG@10"), interval(row, "HR@10")]
            for _, row in table.iterrows()
        ]
        yield "Losses", [about, "", *markdown(["loss", "rate", "epochs", "NDCG@10", "HR@10"], rows)]
    table = pd.read_csv(folder / "baselines.csv")
    rows = [
        [str(row["ranker"]), *(interval(row, name) for name in ("NDCG@10", "HR@10", "behind"))] for _, row in table.iterrows()
    ]
    header = ["ranker", "NDCG@10", "HR@10", "NDCG@10 behind the last one, paired"]
    yield "Simple rankers", [about, "", *markdown(header, rows)]


def efficiency_sections(folder: Path) -> Iterator[Section]:
    """Latency, throughput and price (:mod:`corec.studies.efficiency`)."""
    table = pd.read_csv(folder / "efficiency.csv")
    first, counts = table.iloc[0], sorted(table["K"].unique())
    about = f"{first['backbone']}, {first['dtype']}, {first['device']}; ranges over the numbers of control tokens."
    header, rows, more = ["", *(f"K = {k}" for k in counts)], [], []
    for system, part in table.groupby("system", sort=False):
        by_k = {k: part[part["K"] == k] for k in counts}
        rows.append([f"{system}, median (ms)", *(span(of["p50_ms"], "{:.3g}") for of in by_k.values())])
        rows.append([f"{system}, 95th percentile (ms)", *(span(of["p95_ms"], "{:.3g}") for of in by_k.values())])
        more.append([f"{system}, lists per second", *(number(of["lists_per_s"].mean()) for of in by_k.values())])
        more.append(
            [f"{system}, US cents per thousand lists", *(f"{100 * of['usd_per_1000'].mean():.2g}" for of in by_k.values())]
        )
    yield "Latency", [about, "", *markdown(header, rows)]
    yield "Throughput and price", [f"{about} Means over the numbers of control tokens.", "", *markdown(header, more)]


def bench_table(path: Path) -> list[str]:
    """Rows of the CSV file of a benchmark as a Markdown table."""
    rows = []
    for _, row in pd.read_csv(path, keep_default_na=False).iterrows():
        ratio = f"{float(row['ratio']):.3g}" if row["ratio"] != "" else ""
        name = row["name"] if " " in row["name"] else f"`{row['name']}`"
        rows.append([name, f"{float(row['value']):,.4g} {row['unit']}".strip(), row["baseline"], ratio])
    return markdown(["figure", "value", "compared with", "ratio"], rows)


def ladder_table(path: Path) -> list[str]:
    """Table of the optimisation steps of the training of SASRec, for both kinds of sequences."""
    table = pd.read_csv(path)
    steps = table[table["name"].str.startswith("ladder_")].copy()
    steps[["kind", "step"]] = steps["name"].str.extract(r"ladder_(ml1m|short)_\d+: (.*)")
    wide = steps.pivot(index="step", columns="kind", values=["value", "ratio"]).loc[list(dict.fromkeys(steps["step"]))]
    rows = []
    for step, row in wide.iterrows():
        gains = [f" (× {row['ratio', kind]:.2f})" if row["ratio", kind] > 0 else "" for kind in ("ml1m", "short")]
        rows.append(
            [str(step), *(f"{row['value', kind]:,.0f}{gain}" for kind, gain in zip(("ml1m", "short"), gains, strict=True))]
        )
    whole = [steps[steps["kind"] == kind]["value"] for kind in ("ml1m", "short")]
    rows.append(["**total**", *(f"**× {values.iloc[-1] / values.iloc[0]:.3g}**" for values in whole)])
    return markdown(["interactions per second (gain over the previous step)", "MovieLens-1M", "short sequences"], rows)


def bench_sections(folder: Path) -> Iterator[Section]:
    """Tables of the benchmarks (``python -m corec.bench``) whose CSV files exist."""
    if (folder / "data.csv").exists():
        yield "Data", ["`python -m corec.bench data`", "", *bench_table(folder / "data.csv")]
    if (folder / "sasrec.csv").exists():
        yield "Training of SASRec step by step", ["`python -m corec.bench sasrec`", "", *ladder_table(folder / "sasrec.csv")]
        lines = [line for line in bench_table(folder / "sasrec.csv") if "ladder_" not in line]
        yield "SASRec", ["`python -m corec.bench sasrec`", "", *lines]
    for name, heading in (
        ("engine", "Engine"),
        ("engine-amx", "Engine on a Xeon with AMX"),
        ("neighbour", "A busy neighbour"),
        ("large", "Large"),
        ("large-h200", "The shape of Llama-3-8B on an NVIDIA H200"),
        ("engine-h200", "Engine on an NVIDIA H200"),
    ):
        if (folder / f"{name}.csv").exists():
            yield heading, [f"`python -m corec.bench {name.split('-')[0]}`", "", *bench_table(folder / f"{name}.csv")]


KINDS: dict[str, Callable[[Path], Iterator[Section]]] = {
    "seeds.csv": retriever_sections,
    "readouts.csv": readouts_section,
    "orders.csv": orders_section,
    "ablations.csv": ablations_sections,
    "surface.csv": surface_section,
    "efficiency.csv": efficiency_sections,
    "texts.csv": texts_section,
    "comparison.csv": comparison_section,
    "grid.csv": grid_section,
    "missing.csv": missing_sections,
    "guesses.csv": guesses_section,
    "transfer.csv": transfer_sections,
    **BEYOND,
    "data.csv": bench_sections,
}
