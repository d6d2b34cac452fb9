from pathlib import Path

import pytest
import yaml

from corec import CorecError, paths, profiles
from corec.params import ControlsParams, Params, RerankerParams, SasrecParams


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sasrec": {"epocs": 3}}, "no parameter 'sasrec.epocs': did you mean 'epochs'"),
        ({"reranke": {}}, "no parameter 'reranke': did you mean 'reranker'"),
        ({"reranker": {"lr": "fast"}}, "'reranker.lr' is 'fast'"),
        ({"controls": {"k": 1}}, "'controls.k' is 1"),
        ({"controls": {"k": 50}, "sasrec": {"top_k": 20}}, "raise sasrec.top_k or lower controls.k"),
        ({"reranker": {"readout": "candidate"}}, "set reranker.request_position to 'before'"),
        ({"reranker": {"request_position": "before"}}, "set reranker.request_position to 'after'"),
        ({"run": "a/b"}, "'run' is 'a/b'"),
        ({"run": ".."}, "'run' is '..'"),
        ({"controls": {"max_windows": {"tran": 3}}}, "no parameter 'controls.max_windows.tran': did you mean 'train'"),
        ({"controls": {"n_tokens": [1, 2]}}, "list 0 (no request) and at least one other"),
        ({"controls": {"n_tokens": [0, 1, 1]}}, "each once"),
        ({"figures": {"k": 4}}, "choose one of evaluation.ks"),
        ({"figures": {"k": 10}, "controls": {"k": 10}}, "below controls.k"),
    ],
)
def test_wrong_parameters_end_in_one_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(CorecError) as error:
        Params.checked(values, "somewhere")
    text = str(error.value)
    assert sentence in text and text.startswith("somewhere") and text.endswith((".", "?")) and "\n" not in text


def test_files_that_are_not_parameters(tmp_path: Path) -> None:
    with pytest.raises(CorecError, match="no parameter file"):
        profiles.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("run: [")
    with pytest.raises(CorecError, match="not YAML"):
        profiles.load(tmp_path / "bad.yaml")
    with pytest.raises(CorecError, match="not a readable text file"):
        profiles.load(tmp_path)
    (tmp_path / "text.yaml").write_text("hello")
    with pytest.raises(CorecError, match="contains no parameters"):
        profiles.load(tmp_path / "text.yaml")


def test_every_parameter_file_is_valid_and_named_like_its_run() -> None:
    files = sorted((Path(__file__).parents[1] / "params").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        assert profiles.load(file).run == file.stem


TINY = Path(__file__).parents[1] / "params" / "tiny.yaml"


def notebook(*cells: str, **names: object) -> dict[str, object]:
    """The ``globals()`` of a notebook whose cells have been executed."""
    return {"In": ["", *cells], "Out": {}, "profile": str(TINY), "changes": {}, "np": pytest, "_private": 1, **names}


def test_a_notebook_reads_the_names_of_its_cell_and_no_others() -> None:
    plain = profiles.load(TINY)
    assert profiles.from_notebook(notebook()) == plain
    leftovers = notebook(number=3, name="x", data={"a": 1}, seed=9, columns=["a"])
    assert profiles.from_notebook(leftovers) == plain, "variables of an earlier pass through the notebook are no parameters"
    changed = profiles.from_notebook(notebook(changes={"seed": 1, "reranker": {"steps": 3}}))
    assert (
        changed.seed == 1 and changed.reranker.steps == 3 and changed.reranker.curriculum_steps == plain.reranker.curriculum_steps
    )
    with pytest.raises(CorecError, match=r"there is no parameter 'sed': did you mean 'seed'\?"):
        profiles.from_notebook(notebook(changes={"sed": 3}))
    with pytest.raises(CorecError, match="`changes` a mapping: correct the parameters cell"):
        profiles.from_notebook(notebook(changes=3))


def test_values_that_papermill_injects_win_and_keep_the_rest_of_their_section() -> None:
    cell = '# Parameters\ncontrols = {"k": 10}\nseed = 3\n'
    given = profiles.from_notebook(
        notebook("profile = 1", cell, "settings = profiles.from_notebook(globals())", changes={"seed": 7})
    )
    plain = profiles.load(TINY)
    assert given.seed == 3 and given.controls == plain.controls.model_copy(update={"k": 10}), "max_windows stays the profile's"
    again = notebook(
        "profile = 1", cell, "from corec import controls", "settings = profiles.from_notebook(globals())", controls=pytest
    )
    assert profiles.from_notebook(again) == profiles.load(TINY, {"seed": 3, "controls": {"k": 10}}), "a module may take the name"
    for name, near in (("sed", "seed"), ("profil", "profile"), ("reranke", "reranker")):
        with pytest.raises(CorecError, match=f"this notebook: there is no parameter '{name}': did you mean '{near}'"):
            profiles.from_notebook(notebook(f"# Parameters\n{name} = 3\n"))


def test_a_file_may_name_its_base(tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text("base: sub/parent.yaml\nrun: child\ncontrols: {k: 9}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "parent.yaml").write_text("base: ../root.yaml\ncontrols: {protocol: oracle}\nseed: 4\n")
    (tmp_path / "root.yaml").write_text("run: root\ncontrols: {k: 7, protocol: catalogue, max_windows: {valid: 3}}\n")
    params = profiles.load(tmp_path / "child.yaml")
    assert (params.run, params.seed, params.controls.k, params.controls.protocol) == ("child", 4, 9, "oracle")
    assert params.controls.max_windows.valid == 3
    (tmp_path / "root.yaml").write_text("base: child.yaml\n")
    with pytest.raises(CorecError, match=r"root.yaml: base 'child.yaml' refers back"):
        profiles.load(tmp_path / "child.yaml")
    (tmp_path / "child.yaml").write_text("base: none.yaml\n")
    with pytest.raises(CorecError, match=r"child.yaml: its base .*none.yaml is missing"):
        profiles.load(tmp_path / "child.yaml")


def test_a_file_with_a_base_goes_through_papermills_f(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "tiny.yaml").write_text(TINY.read_text())
    cell = '# Parameters\nbase = "tiny.yaml"\nrun = "mine"\nseed = 2\n'
    params = profiles.from_notebook(notebook(cell))
    assert params.run == "mine" and params.seed == 2 and params.reranker.backbone == "tiny"


def test_copies_are_checked_like_files() -> None:
    with pytest.raises(CorecError, match="set reranker.request_position to 'before'"):
        RerankerParams().model_copy(update={"readout": "candidate"})
    with pytest.raises(CorecError, match="'lr' is -1"):
        SasrecParams().model_copy(update={"lr": -1})
    with pytest.raises(CorecError, match="raise sasrec.top_k or lower controls.k"):
        Params().model_copy(update={"sasrec": SasrecParams(top_k=5)})
    with pytest.raises(CorecError, match="there is no parameter 'step': did you mean 'steps'"):
        RerankerParams().model_copy(update={"step": 1})
    assert Params().model_copy(update={"controls": ControlsParams(k=10)}).controls.k == 10


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"controls": {"attributes": ["gnere"]}}, "scheme 'movielens' has no attribute 'gnere': choose among genre, era"),
        ({"controls": {"n_tokens": [0, 6]}}, "asks for 6 constraints, but only 5 attributes are under control"),
        ({"controls": {"scheme": "mine.yaml"}}, "there is no scheme 'mine.yaml'"),
        ({"reranker": {"backbone": "smolm"}}, "'reranker.backbone': there is no causal language model 'smolm'"),
        ({"reranker": {"backbone": "/no/model"}}, "'reranker.backbone': there is no causal language model '/no/model'"),
        ({"data": {"tagger": "smol"}}, "'data.tagger': there is no causal language model 'smol'"),
        ({"data": {"source": "files"}}, "'data.path' is empty: name the folder"),
        ({"sasrec": {"heads": 3}}, "'sasrec.hidden' \\(32\\) is not a multiple of sasrec.heads"),
    ],
)
def test_what_can_be_known_is_checked_before_the_first_stage(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(CorecError, match=sentence):
        profiles.load(TINY, changes)


def test_relative_paths_count_from_the_projects_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = tmp_path / "mine.yaml"
    scheme.write_text("attributes:\n" + "".join(f"  - {{name: a{n}, column: year, bucket: as_is}}\n" for n in range(3)))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert profiles.load(TINY, {"controls": {"scheme": "mine.yaml"}}).controls.scheme == "mine.yaml"
    assert paths.from_root("mine.yaml") == scheme
    own = elsewhere / "own.yaml"
    own.write_text("run: own\n")
    assert profiles.find("own.yaml") == own, "a profile may also be beside the caller"


def test_a_whole_file_through_papermills_f_is_that_run_and_not_a_change_of_tiny() -> None:
    file = Path(__file__).parents[1] / "params" / "ml-100k.yaml"
    values = yaml.safe_load(file.read_text())
    cell = "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items())
    assert profiles.from_notebook(notebook(cell)) == profiles.load(file)
    with pytest.raises(CorecError, match="parameter 'seed' is float\\('inf'\\): give finite numbers"):
        profiles.from_notebook(notebook("# Parameters\nseed = float('inf')\n"))
