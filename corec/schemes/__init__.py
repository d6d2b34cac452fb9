"""Attribute schemes: the attributes of a data set, and the mapping of their values to buckets.

The YAML files beside this module are the schemes that come with COREC.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import ValidationError, field_validator, model_validator

from corec import CorecError, paths
from corec.checked import Model, first_fault


class Attribute(Model):
    """One attribute of a scheme.

    Attributes
    ----------
    name
        Name of the attribute in requests.
    column
        Column of the items table.
    bucket
        Mapping of values to labels: ``edges`` (intervals of a number), ``as_is`` (the value is the label) or ``each`` (each
        element of a list is a label).
    below, up_to
        Edges of the intervals, ascending: value < edge, or value <= edge. One of the two is given for ``edges``.
    labels
        Labels of the intervals, one more than edges.
    in_history
        Whether the prompt also shows the attribute of history items.
    """

    name: str
    column: str
    bucket: Literal["edges", "as_is", "each"] = "edges"
    below: list[float] | None = None  # value < edge
    up_to: list[float] | None = None  # value <= edge
    labels: list[str] = []
    in_history: bool = False

    @field_validator("name")
    @classmethod
    def _is_a_word(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z][\w -]*", name):
            raise ValueError(f"attribute name {name!r}: use letters, digits, spaces, - and _ only")
        return name

    @model_validator(mode="after")
    def _edges_have_labels(self) -> "Attribute":
        edges = self.below if self.below is not None else self.up_to
        if self.bucket == "edges" and (edges is None or len(self.labels) != len(edges) + 1):
            raise ValueError(f"attribute {self.name!r}: give `below` or `up_to`, and one label more than edges")
        if edges is not None and sorted(set(edges)) != edges:
            raise ValueError(f"attribute {self.name!r}: edges must rise")
        if len(set(self.labels)) != len(self.labels) or (self.labels and self.bucket != "edges"):
            raise ValueError(f"attribute {self.name!r}: labels must differ, and go with edges only")
        return self

    def values(self, column: pd.Series) -> pd.Series:
        """List of labels of each item; empty if the attribute is missing.

        Parameters
        ----------
        column
            Values of `self.column` of the items.

        Raises
        ------
        CorecError
            If the attribute has edges and the column is not numeric.
        """
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
        buckets = np.searchsorted(np.array(edges), np.nan_to_num(numbers), side=side)
        return pd.Series(
            [[] if np.isnan(number) else [self.labels[i]] for number, i in zip(numbers, buckets, strict=True)],
            index=column.index,
        )


def load_scheme(name: str) -> tuple[Attribute, ...]:
    """Load the attributes of a scheme.

    Parameters
    ----------
    name
        Name of a scheme that comes with COREC, or path of a ``.yaml`` file (relative to the project's folder).

    Raises
    ------
    CorecError
        If there is no such scheme, or it is malformed.
    """
    folder = Path(__file__).parent
    path = paths.from_root(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise CorecError(
            f"Parameter controls.scheme: there is no scheme {name!r}: name one of {known}, or a .yaml file (here {path})."
        )
    remedy = "compare it with corec/schemes/movielens.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CorecError(f"{path} is not a scheme ({str(error).splitlines()[0]}): {remedy}.") from None
    entries = values.get("attributes") if isinstance(values, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise CorecError(f"{path} is not a scheme (it has no list `attributes`): {remedy}.")
    attributes = []
    for number, entry in enumerate(entries, 1):
        try:
            attributes.append(Attribute.model_validate(entry))
        except ValidationError as error:
            fault = first_fault(Attribute, error).rstrip(".")
            raise CorecError(f"{path} is not a scheme (attribute {number}: {fault}): {remedy}.") from None
    if len({attribute.name for attribute in attributes}) != len(attributes):
        raise CorecError(f"{path} is not a scheme (two attributes have one name): {remedy}.")
    return tuple(attributes)


def choose(scheme: str, names: Sequence[str] | None) -> tuple[Attribute, ...]:
    """Return the attributes of a scheme that are under control: those in `names`, or all if it is empty.

    Raises
    ------
    CorecError
        If the scheme cannot be loaded (see :func:`load_scheme`), or has no attribute of a given name.
    """
    attributes = load_scheme(scheme)
    known = [attribute.name for attribute in attributes]
    for name in names or []:
        if name not in known:
            raise CorecError(
                f"Parameter controls.attributes: scheme {scheme!r} has no attribute {name!r}: choose among {', '.join(known)}."
            )
    return tuple(attribute for attribute in attributes if not names or attribute.name in names)
