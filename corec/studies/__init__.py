"""Comparison studies of notebooks 07 to 16. A study writes into the folders of its own run."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from corec import files, pages
from corec.params import Params, RerankerParams

PAPER = {"loss": "ranknet", "control": "request", "prior": False}  # the loss of the paper, which all read-outs have


def with_reranker(params: Params, **changes: Any) -> Params:
    """Copy of `params` with the loss of the paper and `changes` in its section `reranker`."""
    return params.model_copy(update={"reranker": params.reranker.model_copy(update=PAPER | changes)})


def shortened(params: RerankerParams, share: float) -> dict[str, int]:
    """`curriculum_steps` and `steps` of a training with a share of the steps; at least one step of the second kind."""
    return {"curriculum_steps": round(share * params.curriculum_steps), "steps": max(1, round(share * params.steps))}


def keep_study(table: pd.DataFrame, figure: Figure, path: Path, form: str) -> list[Path]:
    """Write the table and the plot of a study, and the results page of its folder.

    Parameters
    ----------
    table, figure
        Result of the study, and its plot, which is closed.
    path
        The files without their suffix.
    form
        Format of the numbers, such as ``%.4g``.

    Returns
    -------
    The CSV file and the PNG file.
    """
    written = [path.with_suffix(".csv"), path.with_suffix(".png")]
    files.write_csv(written[0], table, form)
    files.write_picture(written[1], figure)
    plt.close(figure)
    pages.write_study(path.parent)
    return written
