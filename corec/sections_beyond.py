"""Tables of the results pages of the studies beyond the paper (notebooks 12 to 16), of values kept back (11) and of cost (09)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from corec.figures import markdown

VALUE, AHEAD = "{value:.3f} [{low:.3f}, {high:.3f}]", "{ahead:+.3f} ({ahead_low:+.3f} to {ahead_high:+.3f})"


def cost_section(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Control and relevance with time and price (:func:`corec.studies.efficiency.cost`)."""
    table = pd.read_csv(folder / "cost.csv")
    header = ["tokens", "ranker", "CP", "NDCG", "ms a list", "US cents per 1,000 lists", "CP gained per s", "NDCG gained per s"]
    header.append("US cents per 1,000 more items that meet the request")
    lines = []
    for row in table.to_dict("records"):
        numbers = (row["cp"], row["ndcg"], row["ms"], 100 * row["usd_per_1000"], row["cp_gain_per_s"], row["ndcg_gain_per_s"])
        forms = ("{:.3f}", "{:.3f}", "{:.3g}", "{:.2g}", "{:.3g}", "{:.3g}")
        texts = ["" if pd.isna(number) else form.format(number) for form, number in zip(forms, numbers, strict=True)]
        last = "" if pd.isna(row["usd_per_1000_items"]) else f"{100 * row['usd_per_1000_items']:.2g}"
        lines.append([str(row["n_tokens"]), f"`{row['ranker']}`", *texts, last])
    yield "Cost of control", ["Gains over `sasrec`, per second of added time.", "", *markdown(header, lines)]


def unseen_section(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Control by values that the training did not have (:mod:`corec.studies.unseen`)."""
    table = pd.read_csv(folder / "unseen.csv")
    first, kinds = table.iloc[0], ("trained", "kept back")
    of = {kind: table[table["tokens"] == kind].set_index(["model", "metric"]) for kind in kinds}
    columns = [(metric, kind) for metric in ("cp", "ndcg") for kind in kinds]
    header = ["", *(f"{metric.upper()}@{first['k']}, {kind} ({of[kind]['n_users'].iloc[0]} users)" for metric, kind in columns)]
    names = list(table["model"].unique())
    rows = [[f"`{model}`", *(VALUE.format(**of[kind].loc[(model, metric)]) for metric, kind in columns)] for model in names]
    about = f"{first['dataset']}, K = {first['K']}, protocol `{first['protocol']}`, one constraint; values kept back: "
    about += f"{first['kept_back']}."
    about += " One choice of these values and one training each; intervals over users."
    yield "Values kept back from training", [about, "", *markdown(header, rows)]
    lines = {name: [of[kind].loc[(name, metric)] for metric, kind in columns] for name in names if ", " in name}
    rows = [[f"`{name}`", *(AHEAD.format(**line) for line in lines[name])] for name in lines if ", never" in name]
    yield "Values kept back, differences from the same training with all values", markdown(header, rows)
    if "gain" in table:  # tables of earlier versions lack it
        ends = {"ahead": "gain", "ahead_low": "gain_low", "ahead_high": "gain_high"}
        rows = [[f"`{name}`", *(AHEAD.format(**{e: line[g] for e, g in ends.items()}) for line in lines[name])] for name in lines]
        yield f"Values kept back, differences from the order of `{first['over']}`", markdown(header, rows)


def saturation_sections(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Control by number of tokens, with and without contrast, and cosines (:mod:`corec.studies.saturation`)."""
    table = pd.read_csv(folder / "saturation.csv")
    first, lengths = table.iloc[0], sorted(table["n_tokens"].unique())
    about = (
        f"{first['dataset']}, K = {first['K']}, protocol `{first['protocol']}`, {first['n_users']} users, {first['seeds']} "
        f"trainings each; weight of the contrast {first['weight']:g}, selected on validation."
    )
    names = {
        "cp": f"CP@{first['k']}",
        "cp_gap": "minus the best",
        "cd": "CD",
        "cd_gap": "minus the best CD",
        "ndcg": f"NDCG@{first['k']}",
    }
    values, differences = [], []
    for (metric, model), part in table.groupby(["metric", "model"], sort=False):
        cells = part.set_index("n_tokens")
        found = [cells.loc[n] if n in cells.index else None for n in lengths]
        texts = ["" if row is None else VALUE.format(**row) for row in found]
        values.append([f"{names[str(metric)]}, `{model}`", *texts])
        if model != "corec" and not str(metric).endswith("_gap"):
            texts = ["" if row is None else AHEAD.format(**row) for row in found]
            differences.append([f"{names[str(metric)]}, `{model}`", *texts])
    header = ["", *(f"{n} token{'s' if n != 1 else ''}" for n in lengths)]
    yield "Saturation", [about, "", *markdown(header, values)]
    yield "Differences from corec", ["Paired, with intervals over users.", "", *markdown(header, differences)]
    similar = pd.read_csv(folder / "similarity.csv")
    lines = [
        [f"`{row['model']}`", str(row["of"]), str(row["n_tokens"] or ""), f"{row['same']:.3f}", f"{row['other']:.3f}"]
        for row in similar.to_dict("records")
    ]
    yield "Cosine similarity of the values' tokens", markdown(["", "of", "tokens", "same attribute", "other attributes"], lines)


def conflicts_sections(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Requests in conflict at strength 1, and the signal that a request cannot be met (:mod:`corec.studies.conflicting`)."""
    table = pd.read_csv(folder / "conflicts.csv")
    first, chosen = table.iloc[0], table[table["strength"].isna() | (table["strength"] == 1)]
    about = (
        f"{first['dataset']}, K = {first['K']}, strength 1, {first['seeds']} trainings; shares of the first {first['k']} items."
    )
    metrics = [
        metric
        for metric in ("first", "second", "any", "both", "lead", "met", "avoided", "ndcg")
        if metric in set(table["metric"])
    ]
    lines = []
    for (kind, model), part in chosen.groupby(["kind", "model"], sort=False):
        cells = part.set_index("metric")
        found = [cells.loc[metric] if metric in cells.index else None for metric in metrics]
        texts = ["" if row is None else VALUE.format(**row) for row in found]
        lines.append([str(kind), f"`{model}`", *texts])
    header = ["request", "ranker", *(f"NDCG@{first['k']}" if metric == "ndcg" else metric for metric in metrics)]
    yield "Conflicts", [about, "", *markdown(header, lines)]
    quality = pd.read_csv(folder / "unmet.csv")
    header = ["tokens", "signal", "AUC", "Brier score", "cannot be met", "requests"]
    lines = []
    for row in quality.to_dict("records"):
        scores = [f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" for name in ("auc", "brier")]
        numbers = (*scores, f"{row['share']:.0%}", str(row["n"]))
        lines.append([str(row["n_tokens"] or "all"), f"`{row['signal']}`", *numbers])
    yield "Requests that cannot be met", markdown(header, lines)


def language_sections(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Quality of parsed requests, and the lists for them (:mod:`corec.studies.language_study`)."""
    table = pd.read_csv(folder / "language.csv")
    metrics = list(dict.fromkeys(table["metric"]))
    lines = []
    for (name, parser), part in table.groupby(["set", "parser"], sort=False):
        cells = part.set_index("metric")
        texts = [VALUE.format(**cells.loc[metric]) for metric in metrics[:4]]
        texts += [f"{cells.loc[metric, 'value']:.2f}" for metric in metrics[4:]]
        lines.append([f"{name} ({part['n'].iloc[0]})", f"`{parser}`", *texts])
    yield "Requests in free text", markdown(["sentences", "parser", *metrics], lines)
    lists = pd.read_csv(folder / "language_lists.csv")
    first = lists.iloc[0]
    about = (
        f"{first['dataset']}, K = {first['K']}, {first['n_windows']} windows, {first['seeds']} trainings; intervals over the "
        "sentences. `gold` is the labelled request, `sentence` the sentence itself, for a re-ranker with further training steps."
    )
    lines = []
    for (name, ranker, parser), part in lists.groupby(["set", "ranker", "parser"], sort=False):
        cells = part.set_index("metric")
        texts = [VALUE.format(**cells.loc[metric]) for metric in ("cp", "ndcg")]
        texts += [AHEAD.format(**cells.loc[metric]) for metric in ("cp", "ndcg")]
        lines.append([f"{name} ({part['n_sentences'].iloc[0]})", f"`{ranker}`", f"`{parser}`", *texts])
    names = [f"CP@{first['k']}", f"NDCG@{first['k']}"]
    header = ["sentences", "ranker", "request", *names, *(f"{name} minus gold" for name in names)]
    yield "Lists for parsed requests", [about, "", *markdown(header, lines)]


def sessions_sections(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Control and stability by turn, and the latency (:mod:`corec.studies.sessions`)."""
    table = pd.read_csv(folder / "sessions.csv")
    first = table.iloc[0]
    about = f"{first['dataset']}, K = {first['K']}, {first['n_users']} users, {first['seeds']} trainings."
    turns = table[["turn", "edit", "n_tokens"]].drop_duplicates()
    header = ["", *(f"{turn}: {edit}, {n}" for turn, edit, n in turns.itertuples(index=False))]
    names = {
        "cp": f"CP@{first['k']}",
        "ndcg": f"NDCG@{first['k']}",
        "kept": "pairs kept",
        "overlap": f"overlap of the first {first['k']}",
    }
    lines = []
    for (metric, model), part in table.groupby(["metric", "model"], sort=False):
        cells = part.set_index("turn")
        found = [cells.loc[turn] if turn in cells.index else None for turn in turns["turn"]]
        texts = ["" if row is None else VALUE.format(**row) for row in found]
        lines.append([f"{names[str(metric)]}, `{model}`", *texts])
    yield "Sessions", [f"{about} Turns with their number of constraints.", "", *markdown(header, lines)]
    times = pd.read_csv(folder / "session_latency.csv")
    lines = [
        [str(row["turn"] or "before the first"), row["way"], f"{row['p50_ms']:.3g}", f"{row['p95_ms']:.3g}"]
        for row in times.to_dict("records")
    ]
    header = ["turn", "computed", "median (ms)", "95th percentile (ms)"]
    yield "Latency of a turn", [f"{times['device'].iloc[0]}.", "", *markdown(header, lines)]


def simulated_sections(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Simulated users with the default assumptions, and each assumption varied (:mod:`corec.studies.simulated`)."""
    table = pd.read_csv(folder / "simulated.csv", keep_default_na=False)
    first, models = table.iloc[0], list(table["model"].unique())
    about = (
        f"{first['dataset']}, K = {first['K']}, {first['n_users']} users whose wanted item was retrieved, {first['sessions']} "
        f"sessions each, {first['seeds']} trainings. The intervals are over users."
    )
    default = table[table["assumption"] == "default"].set_index(["model", "metric"])
    metrics = list(dict.fromkeys(table["metric"]))
    lines = [[f"`{model}`", *(VALUE.format(**default.loc[model, metric]) for metric in metrics)] for model in models]
    yield "Simulated users", [about, "", *markdown(["", *metrics], lines)]
    rows = table[table["metric"] == "found"]
    lines = [
        [" = ".join(filter(None, map(str, key))), *(f"{part.set_index('model').loc[model, 'value']:.3f}" for model in models)]
        for key, part in rows.groupby(["assumption", "level"], sort=False)
    ]
    yield (
        "Simulated users: share that finds the wanted item",
        markdown(["assumption", *(f"`{model}`" for model in models)], lines),
    )


KINDS: dict[str, Callable[[Path], Iterator[tuple[str, list[str]]]]] = {
    "unseen.csv": unseen_section,
    "cost.csv": cost_section,
    "saturation.csv": saturation_sections,
    "conflicts.csv": conflicts_sections,
    "language.csv": language_sections,
    "sessions.csv": sessions_sections,
    "simulated.csv": simulated_sections,
}
