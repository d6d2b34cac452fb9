"""Learning speed of the read-outs: trainings with equal numbers of steps and about equal cost."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from corec.params import Params
from corec.reranker import Examples, build, train
from corec.studies import keep_study, with_reranker

# Read-outs to compare. `candidate` needs one row per request, so it gets fewer requests; all have about equally many tokens
# per step.
READOUTS: dict[str, dict[str, Any]] = {
    "index": {"readout": "index"},
    "candidate: line's end, last layer": {
        "readout": "candidate",
        "request_position": "before",
        "pooling": "end",
        "layers": "last",
        "requests_per_window": 1,
        "batch_size": 8,
    },
    "late: line's end, last layer": {"readout": "late", "pooling": "end", "layers": "last"},
    "late: line's mean, last layer": {"readout": "late", "pooling": "mean", "layers": "last"},
    "late: line's end, all layers": {"readout": "late", "pooling": "end", "layers": "mix"},
    "late: line's mean, all layers": {"readout": "late", "pooling": "mean", "layers": "mix"},
    "late: line's mean, all layers, values as words": {"readout": "late", "pooling": "mean", "layers": "mix", "values": "words"},
}


def compare_readouts(items: pd.DataFrame, examples: Examples, params: Params) -> pd.DataFrame:
    """Train each entry of :data:`READOUTS` on the plain prompt (attributes only) for `study.readout_steps` steps.

    Returns
    -------
    Learning curves (rows of :func:`corec.reranker.train`) with an additional column ``readout``.
    """
    curves = []
    for name, changes in READOUTS.items():
        print(f"read-out {name}", flush=True)
        steps = params.study.readout_steps
        changes = {"request_position": "after", "curriculum_steps": 2 * steps, "steps": 1} | changes
        variant = with_reranker(params, **changes)
        reranker = build(items, examples.prepared.vocabulary, variant.reranker, params.seed)
        curves.append(train(reranker, examples, variant, None, stop_after=steps).assign(readout=name))
    return pd.concat(curves, ignore_index=True)


def keep(curves: pd.DataFrame, params: Params, folder: Path) -> list[Path]:
    """Write the curves of :func:`compare_readouts`, their plot and the results page to `folder`; return the paths."""
    return keep_study(curves.assign(dataset=params.data.dataset), draw(curves), folder / "readouts", "%.4f")


def draw(curves: pd.DataFrame) -> Figure:
    """Plot the smoothed training loss against time, one line per read-out."""
    smoothed = curves.groupby("readout")["loss"].transform(lambda loss: loss.ewm(span=6).mean())
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    sns.lineplot(curves.assign(smoothed=smoothed), x="seconds", y="smoothed", hue="readout", ax=axis)
    axis.set(ylabel="RankNet loss (0.69 = chance)", title="Read-outs on the plain prompt: attributes only, one constraint")
    axis.legend(bbox_to_anchor=(1, 0.5), loc="center left", frameon=False)
    return figure
