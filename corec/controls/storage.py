"""Result of stage 03 on disk: the vocabulary, and a ``DatasetDict`` of windows, pools, requests and control scores."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd

from corec import files, paths, stages
from corec.controls.pools import Pools, Prepared, Vocabulary, control_scores, matches
from corec.schemes import Attribute

CARD = """# Windows, pools, requests and control scores of a run of COREC

Made by notebook 3 from {windows:,} windows; K = {k} candidates, requests of {lengths} constraints, protocol `{protocol}`.

| column | |
|---|---|
| `window`, `user`, `target`, `history` | numbers; the true next item, and the items before it, oldest first |
| `candidates` | K items that the retriever found, in shuffled order |
| `retriever_rank`, `retriever_score` | of each candidate; rank 0 is the retriever's best |
| `truth` | the place of the true next item among the candidates, -1 where it is not there |
| `requests` | for each length the numbers of the requested values (`vocabulary.json` names them; -1 is met by no item) |
| `control` | for each length the control score of each candidate: constraints met, plus one for the true next item |

Items count from 1; their titles are in `../data/items.parquet`.
"""


def to_dataset(prepared: Prepared, windows: pd.DataFrame) -> datasets.DatasetDict:
    """Convert windows, pools, requests and control scores of all splits to a typed data set (columns: see :data:`CARD`).

    `prepared` is the result of :func:`prepare`, `windows` the table of stage 01.
    """
    whole, items = datasets.Value("int64"), datasets.List(datasets.Value("int64"))
    features = datasets.Features(
        {
            **dict.fromkeys(("window", "user", "target"), whole),
            **dict.fromkeys(("history", "candidates", "retriever_rank"), items),
            "retriever_score": datasets.List(datasets.Value("float32")),
            "truth": whole,
            **dict.fromkeys(("requests", "control"), datasets.List(items)),
        }
    )
    table, splits = windows.set_index("window"), {}
    for split, pools in prepared.pools.items():
        rows = table.loc[pools.window]
        requests = [request for (part, _), request in prepared.requests.items() if part == split]
        met = [matches(pools.candidates, request, prepared.vocabulary.values_of) for request in requests]
        control = [control_scores(each, pools.is_truth()) for each in met]
        columns = {name: list(rows[name]) for name in ("user", "target", "history")}
        columns |= {name: list(values) for name, values in pools._asdict().items()}
        columns |= {name: list(zip(*arrays, strict=True)) for name, arrays in (("requests", requests), ("control", control))}
        splits[split] = datasets.Dataset.from_dict({name: columns[name] for name in features}, features=features)
    return datasets.DatasetDict(splits)


def save(prepared: Prepared, windows: pd.DataFrame, folder: Path, protocol: str = "") -> list[Path]:
    """Write the vocabulary, and the rest as a ``DatasetDict`` (see :func:`to_dataset`), to `folder`; returns the files."""
    vocabulary = prepared.vocabulary
    lengths = list(dict.fromkeys(n for _, n in prepared.requests))
    described = {
        "attributes": [attribute.model_dump() for attribute in vocabulary.attributes],
        "labels": vocabulary.labels,
        "attribute_of": vocabulary.attribute_of.tolist(),
        "names": [vocabulary.name(value) for value in range(len(vocabulary.labels))],
        "n_tokens": lengths,
    }
    files.write_text(folder / "vocabulary.json", json.dumps(described))
    with files.aside(folder / "values_of.npy") as part, part.open("wb") as file:
        np.save(file, vocabulary.values_of)
    others: dict[str, Any] = {f"{name} {n}": request for (name, n), request in prepared.others.items()}
    files.write_arrays(folder / "other_requests.npz", **others)
    dataset, target = to_dataset(prepared, windows), folder / "dataset"
    count, k = sum(map(len, dataset.values())), prepared.pools["train"].candidates.shape[1]
    card = CARD.format(windows=count, k=k, lengths=", ".join(map(str, lengths)), protocol=protocol)
    datasets.disable_progress_bars()
    try:
        with files.aside(target) as part:
            dataset.save_to_disk(part)
            files.write_text(part / "README.md", card)
    finally:
        datasets.enable_progress_bars()
    return [
        folder / "vocabulary.json",
        folder / "values_of.npy",
        folder / "other_requests.npz",
        *sorted(target.glob("*/*.arrow")),
    ]


def load(run: str) -> Prepared:
    """Load the result of stage 03 of a run (raises CorecError if it has not finished)."""
    stages.require(run, "controls")
    folder = paths.stage_dir(run, "controls")
    described = json.loads((folder / "vocabulary.json").read_text())
    attributes = tuple(Attribute.model_validate(entry) for entry in described["attributes"])
    attribute_of = np.array(described["attribute_of"])
    vocabulary = Vocabulary(attributes, tuple(described["labels"]), attribute_of, np.load(folder / "values_of.npy"))
    pools, requests = {}, {}
    for name, part in datasets.load_from_disk(folder / "dataset").items():
        split = str(name)
        pools[split] = Pools(*(np.array(part[column][:]) for column in Pools._fields))
        pools[split] = pools[split]._replace(retriever_score=pools[split].retriever_score.astype(np.float32))
        request_rows = part["requests"][:]
        for place, n in enumerate(described["n_tokens"]):
            requests[split, n] = np.array([row[place] for row in request_rows], dtype=int).reshape(len(request_rows), n)
    with np.load(folder / "other_requests.npz") as kept:
        others = {(key.rpartition(" ")[0], int(key.rpartition(" ")[2])): kept[key] for key in kept}
    return Prepared(vocabulary, pools, requests, others)
