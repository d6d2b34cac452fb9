from pathlib import Path

import pytest

from corec import CorecError, params


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
        params.validate(values, "somewhere")
    text = str(error.value)
    assert sentence in text and text.startswith("somewhere") and text.endswith((".", "?")) and "\n" not in text


def test_files_that_are_not_parameters(tmp_path: Path) -> None:
    with pytest.raises(CorecError, match="no parameter file"):
        params.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("run: [")
    with pytest.raises(CorecError, match="not YAML"):
        params.load(tmp_path / "bad.yaml")
    with pytest.raises(CorecError, match="no readable text file"):
        params.load(tmp_path)
    (tmp_path / "text.yaml").write_text("hello")
    with pytest.raises(CorecError, match="holds no parameters"):
        params.load(tmp_path / "text.yaml")


def test_every_parameter_file_is_valid_and_named_like_its_run() -> None:
    files = sorted((Path(__file__).parents[1] / "params").glob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        assert params.load(file).run == file.stem


def test_notebook_names_are_checked_and_modules_are_not() -> None:
    namespace = {"run": "x", "np": pytest, "_private": 1, "In": [], "Out": {}, "__name__": "__main__"}
    assert params.from_notebook(namespace).run == "x"
    with pytest.raises(CorecError, match="did you mean 'seed'"):
        params.from_notebook(namespace | {"sed": 3})
