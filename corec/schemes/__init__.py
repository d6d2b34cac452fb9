"""Attribute schemes: which attributes a data set has, and how their values become buckets. The YAML files lie beside this one."""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import model_validator

from corec import CorecError
from corec.params import Model


class Attribute(Model):
    """One attribute of a scheme: the column it comes from and how its values become buckets."""

    name: str
    column: str
    bucket: Literal["edges", "as_is", "each"] = "edges"
    below: list[float] | None = None  # value < edge
    up_to: list[float] | None = None  # value <= edge
    labels: list[str] = []
    in_history: bool = False

    @model_validator(mode="after")
    def _edges_have_labels(self) -> "Attribute":
        edges = self.below if self.below is not None else self.up_to
        if self.bucket == "edges" and (edges is None or len(self.labels) != len(edges) + 1):
            raise ValueError("give `below` or `up_to`, and one label more than edges")
        if edges is not None and sorted(set(edges)) != edges:
            raise ValueError("edges must rise")
        if len(set(self.labels)) != len(self.labels) or (self.labels and self.bucket != "edges"):
            raise ValueError("labels must differ, and go with edges only")
        return self

    def values(self, column: pd.Series) -> pd.Series:
        """The list of labels of every item (empty where the attribute is missing)."""
        if self.bucket == "each":
            return column.map(lambda value: list(value) if isinstance(value, list | np.ndarray) else [])
        if self.bucket == "as_is":
            return column.map(lambda value: [str(value)] if pd.notna(value) and str(value).strip() else [])
        edges = self.below if self.below is not None else self.up_to
        assert edges is not None
        side: Literal["left", "right"] = "right" if self.below is not None else "left"
        try:
            numbers = column.to_numpy(dtype=float)
        except (TypeError, ValueError):
            raise CorecError(
                f"Attribute {self.name!r} has edges, but the column {self.column!r} is not numeric: set `bucket: as_is`."
            ) from None
        found = np.searchsorted(np.array(edges), np.nan_to_num(numbers), side=side)
        return pd.Series(
            [[] if np.isnan(number) else [self.labels[i]] for number, i in zip(numbers, found, strict=True)],
            index=column.index,
        )


def load_scheme(name: str) -> tuple[Attribute, ...]:
    """The attributes of a scheme that comes with COREC, or of a YAML file.

    Raises
    ------
    CorecError
        When there is no such scheme, or it is not well formed.
    """
    folder = Path(__file__).parent
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise CorecError(f"Parameter controls.scheme: there is no scheme {name!r}: name one of {known}, or a .yaml file.")
    try:
        attributes = tuple(Attribute.model_validate(entry) for entry in yaml.safe_load(path.read_text())["attributes"])
        if len({attribute.name for attribute in attributes}) != len(attributes):
            raise ValueError("two attributes have one name")
        return attributes
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CorecError(f"{path} is not a scheme ({str(error).splitlines()[-2:]}): compare it with movielens.yaml.") from None
