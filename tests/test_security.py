"""Files and texts from elsewhere: nothing of them is executed, no path leaves its folder, no title becomes a control token."""

import ast
import contextlib
import gzip
import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from corec import (
    CorecError,
    checkpoint,
    controls,
    data,
    download,
    figures,
    files,
    manifest,
    pages,
    params,
    paths,
    reranker,
    sasrec,
    scores,
    stages,
)
from corec.data import salvage
from corec.params import DataParams, Params
from tests.test_reranker import World

ROOT = Path(__file__).parents[1]


class Malicious:
    """An object whose unpickling writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def sources() -> dict[str, str]:
    """All code of the package and the notebooks."""
    found = {str(path): path.read_text() for path in (ROOT / "corec").rglob("*.py")}
    for path in (*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("notebooks/solutions/*.ipynb")):
        cells = nbformat.read(path, 4).cells
        found[str(path)] = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return found


def test_nothing_is_unpickled_and_no_code_of_a_model_or_a_text_is_run() -> None:
    for path, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                names = [] if names == ["pickle", "UnpicklingError"] else names
                assert not {"pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"} & set(names), path
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert not {"trust_remote_code", "allow_pickle"} & given.keys(), path
                assert name not in ("read_pickle", "to_pickle", "full_load", "unsafe_load"), path
                assert name != "HTML" or path.endswith("pictures/prompts.py"), path  # its text is escaped: tests/test_pictures.py
                assert isinstance(node.func, ast.Attribute) or name not in ("eval", "exec"), path
                if ast.unparse(node.func) == "torch.load":
                    assert given["weights_only"] == "True", path
                if ast.unparse(node.func) == "yaml.load":
                    pytest.fail(f"{path}: yaml.safe_load")
                if name == "from_pretrained" and ast.unparse(node.func).startswith(("AutoModel", "AutoModelForCausalLM")):
                    assert given.get("use_safetensors") == "True" or "gguf_file" in given, path


def poison(path: Path, marker: Path) -> None:
    """Replace a file by a malicious pickle, in the format that its reader would unpickle; keep size and time if possible."""
    status = path.stat()
    if path.suffix == ".npz":
        content = io.BytesIO()
        array = io.BytesIO()
        np.lib.format.write_array(array, np.array([Malicious(marker)], dtype=object), allow_pickle=True)
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("oracle 1.npy", array.getvalue())
        text = content.getvalue()
    elif path.suffix == ".npy":
        array = io.BytesIO()
        np.lib.format.write_array(array, np.array([Malicious(marker)], dtype=object), allow_pickle=True)
        text = array.getvalue()
    else:
        text = pickle.dumps(Malicious(marker))
    path.write_bytes(text)
    record = path.parent / "stage.json"
    if record.exists() and path.name in (facts := json.loads(record.read_text()))["outputs"]:
        status = path.stat()  # also a record that agrees does not help
        facts.pop("checksum")
        facts["outputs"][path.name] = {"sha256": files.sha256(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        record.write_text(json.dumps(facts))


def test_a_malicious_pickle_in_any_file_of_a_run_is_not_executed(atomic: Path, tmp_path: Path) -> None:
    settings, marker = Params(run="r"), tmp_path / "executed"
    world = World(atomic)
    folder = {}
    for stage in ("data", "sasrec", "controls", "reranker"):
        begun = stages.start(settings, stage)
        folder[stage] = begun.folder
        written: list[Path] = []
        if stage == "data":
            written = data.save(world.tables, begun.folder)
        if stage == "controls":
            written = controls.save(world.prepared, world.tables.windows, begun.folder)
        if stage == "sasrec":
            for name in ("model.safetensors", "candidates.parquet"):
                (begun.folder / name).write_bytes(b"x")
                written.append(begun.folder / name)
        if stage == "reranker":
            model = world.build(world.params())
            curve = pd.DataFrame({"step": [1], "loss": [0.5]})
            written = reranker.save(model, curve, begun.folder)
            (begun.folder / "scores.parquet").write_bytes(b"x")
            written.append(begun.folder / "scores.parquet")
        begun.finish(written)
    own = world.params()
    readers = {
        "data": lambda: data.load("r"),
        "sasrec": lambda: (sasrec.load_candidates("r"), sasrec.load("r", 60, settings.sasrec)),
        "controls": lambda: controls.load("r"),
        "reranker": lambda: (
            scores.load("r", "oracle"),
            reranker.load(folder["reranker"], world.tables.items, world.prepared.vocabulary, own.reranker),
        ),
    }
    tried = 0
    for stage in ("reranker", "controls", "sasrec", "data"):
        for path in [each for each in folder[stage].resolve().rglob("*") if each.is_file() and not each.name.startswith(".")]:
            if path.name in ("README.md", "stage.json", "vocab.json", "special_tokens_map.json", "chat_template.jinja"):
                continue
            kept = path.read_bytes(), (path.parent / "stage.json").read_bytes() if (path.parent / "stage.json").exists() else b""
            poison(path, marker)
            with contextlib.suppress(Exception):  # of which kind is of no matter here
                readers[stage]()
            assert not marker.exists(), path
            tried += 1
            path.write_bytes(kept[0])
            if kept[1]:
                (path.parent / "stage.json").write_bytes(kept[1])
    assert tried >= 12


def test_a_malicious_checkpoint_is_not_executed(tmp_path: Path) -> None:
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "executed"
    said: list[str] = []
    for content in ("zip", "plain"):
        if content == "zip":
            torch.save({"identity": "x", "state": Malicious(marker)}, path)
        else:
            path.write_bytes(pickle.dumps({"identity": "x", "state": Malicious(marker)}))
        assert checkpoint.Checkpoint(path, "x").load("cpu", lambda text, **_: said.append(text)) is None
        assert not marker.exists() and "damaged: training starts from the beginning" in said[-1]
    good = checkpoint.Checkpoint(path, "x")
    good.save({"weights": torch.arange(4000.0)})
    loaded = good.load("cpu")
    assert loaded is not None and torch.equal(loaded["weights"], torch.arange(4000.0))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    assert good.load("cpu", lambda text, **_: said.append(text)) is None and len(said) == 3


@pytest.mark.parametrize(
    "values",
    [
        {"run": "../elsewhere"},
        {"run": "a/b"},
        {"run": ".hidden"},
        {"data": {"category": "../../etc/passwd"}},
        {"study": {"source": "../other"}},
    ],
)
def test_no_parameter_names_a_folder_outside_the_run(values: dict[str, Any]) -> None:
    with pytest.raises(CorecError, match="should match pattern"):
        Params.checked(values)


def test_archives_with_strange_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("../../outside.txt", "x")
        wheel.writestr("large.txt", "0" * 5_000_000)
        wheel.writestr("good.txt", "good")
    archive = download.Archive("package==1", path.name, files.sha256(path))
    (paths.cache_dir() / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(download, "LARGEST", 1_000_000)
    for member in ("large.txt", "missing.txt"):
        with pytest.raises(CorecError, match=f"has no file '{member}' of at most"):
            download.extract(archive, member)
    target = download.extract(archive, "good.txt")
    target.write_text("gooD")
    assert download.extract(archive, "good.txt").read_text() == "good", "a damaged file is extracted again"
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_gzip_file_out_of_proportion_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"0" * 20_000_000))
    monkeypatch.setattr(salvage, "FREE", 1_000_000)
    with pytest.raises(CorecError, match=r"bomb.json.gz is more than 200 times larger when decompressed"):
        salvage.is_whole(path)
    path.write_bytes(gzip.compress(bytes(np.random.default_rng(0).integers(0, 60, 3_000_000, dtype=np.uint8))))
    assert salvage.is_whole(path)


def test_text_of_the_data_is_no_html() -> None:
    script = "<script>alert(1)</script>"
    table = pd.DataFrame({"title": [script]})
    assert script not in table._repr_html_()  # type: ignore[operator]
    rows = [(script, "oracle", 6, 1, 1, "corec", 0, metric, 5, 0.5, 0.4, 0.6, 3) for metric in ("cp", "ndcg")]
    names = "dataset protocol K n_tokens tau model seed metric k value low high n_users".split()
    page = figures.results_page(pd.DataFrame([*rows, *((*row[:5], "rule", *row[6:]) for row in rows)], columns=names), 5, script)
    assert "<" not in page and "&lt;script>" in page
    folder = paths.figures_dir("r")
    made = [("all", 1, "corec", 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, True, 3, 3, script, "b", 5)]
    files.write_csv(folder / "comparison.csv", pd.DataFrame(made, columns=[*"metric n_tokens model a a_low a_high b b_low b_high".split(),
                    *"difference low high paired users_a users_b run_a run_b k".split()]))  # fmt: skip
    assert "<script" not in (pages.study_page(folder) or "")


def test_manifests_hold_no_home_folder_and_no_password() -> None:
    home, root = Path.home(), paths.root()
    settings = Params(
        run="r", data=DataParams(path=f"{home}/private/data", url="https://user:secret@example.org/files"),
        controls=params.ControlsParams(scheme=f"{root}/schemes/mine.yaml"),
    )  # fmt: skip
    stages.start(settings, "data").finish()
    text = json.dumps(manifest.collect(settings, ["data"]))
    assert "secret" not in text and str(home) + "/" not in text and str(root) not in text
    assert '"~/private/data"' in text and '"https://example.org/files"' in text and '"schemes/mine.yaml"' in text
    for path in (ROOT / "figures").glob("*/manifest*.json"):
        assert not re.search(r"/(?:root|home|tmp|Users)/", path.read_text()), path


def test_a_control_token_in_a_title_does_not_become_one_and_the_ranking_does_not_move(atomic: Path) -> None:
    """The title of one candidate holds the token of a requested value that the candidate does not have.

    Its control score is compared with that under a title of as many other characters, and with that of a candidate which has the
    value, after a short training.
    """
    world = World(atomic)
    own = world.params(
        readout="late", control="constraints", loss="listwise", steps=60, curriculum_steps=30, batch_size=4, lr_head=1e-2
    )
    trained = world.build(own)
    reranker.train(trained, world.examples, own, None)
    vocabulary, place = world.prepared.vocabulary, world.controls.n_tokens.index(1)
    pools, request = world.prepared.pools["test"], world.prepared.requests["test", 1]
    met = controls.matches(pools.candidates, request, vocabulary.values_of)[..., 0]
    window = int(np.flatnonzero(met.any(axis=1) & ~met.all(axis=1))[0])
    item = int(pools.candidates[window][~met[window]][0])
    token = reranker.value_token(vocabulary, int(request[window, 0]))

    def control(title: str) -> np.ndarray:
        items = world.tables.items.copy()
        items.loc[items["item"] == item, "title"] = title
        changed = reranker.build(items, vocabulary, own.reranker, seed=0)
        state = {name: value.detach() for name, value in trained.trainable().items()}
        with torch.no_grad():
            for name, value in changed.trainable().items():
                value.copy_(state[name])
        ids = changed.tokenizer.convert_tokens_to_ids(token)
        row = SimpleNamespace(titles=changed.tokenizer(title, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        assert ids not in row.titles
        found = reranker.score_parts(
            changed, world.examples, pools, [world.prepared.requests["test", n] for n in world.controls.n_tokens]
        )
        return found.control[window, place]

    injected, neutral = control(f"Film {token}"), control("Film " + re.sub(r"\w", "x", token))
    column = int(np.flatnonzero(pools.candidates[window] == item)[0])
    effect = abs(neutral[met[window]].mean() - neutral[~met[window]].mean())
    moved = np.abs(injected - neutral)
    assert moved[np.arange(len(moved)) != column].max() < 0.05 * max(effect, 1e-6) or moved.max() < 0.05 * effect
    assert moved[column] < 0.25 * effect, (moved[column], effect)
