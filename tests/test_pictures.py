"""The pictures that explain one example, the claims table, and the look of the figures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib import colors

from corec import claims, evaluation, style
from corec.params import RerankerParams
from corec.pictures import prompts, rankings
from corec.reranker import Prompter, Row


class Tokenizer:
    """A tokenizer of single characters; number 0 is an added token."""

    def get_added_vocab(self) -> dict[str, int]:
        return {"<genre: A&B>": 0, "<A>": 1}

    def decode(self, ids: list[int]) -> str:
        return "".join("<genre: A&B>" if number == 0 else chr(number) for number in ids)


def codes(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize("position", ["after", "before"])
def test_tokens_are_coloured_by_part_and_escaped(position: str) -> None:
    prompter = Prompter.__new__(Prompter)
    prompter.params = RerankerParams.model_construct(request_position=position)  # type: ignore[arg-type]
    prompter.heading_history, prompter.heading_candidates, prompter.heading_request = codes("H:\n"), codes("C:\n"), codes("R:")
    prompter.values = [[0]]
    asked = [*codes("R:"), 0]
    line = [1, *codes("<b>x"), 0, *codes("\n")]  # 1: an index token, which is no control token
    prefix = [*codes("H:\nold\n"), *(asked if position == "before" else []), *codes("C:\n"), *line]
    row = Row(prefix, [(len(prefix) - len(line), len(prefix))], [asked if position == "after" else []])
    text = prompts.tokens(prompter, row, Tokenizer()).data
    assert "<b>" not in text and "&lt;" in text and "A&amp;B" in text
    for part, count in {"instruction": 6, "history": 4, "candidates": 6, "request": 2, "control tokens": 2}.items():
        assert f"{part}: {count}</span>" in text


def test_bump_marks_the_target_and_the_candidates_that_meet_the_request() -> None:
    met, truth = np.array([[True], [False], [True]]), np.array([False, True, False])
    figure = rankings.bump(["A", "B", "C" * 60], np.array([0, 1, 2]), np.array([2, 0, 1]), met, truth, "request")
    axis = figure.axes[0]
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2 and list(line.get_xdata()) == [0, 1]][:3]
    assert [list(line.get_ydata()) for line in lines] == [[1, 2], [2, 3], [3, 1]]
    assert [line.get_color() for line in lines] == [style.BLUE, style.ORANGE, style.BLUE]
    assert any(text.get_text().endswith("…") for text in axis.texts) and any("★" in text.get_text() for text in axis.texts)
    plt.close(figure)


@pytest.mark.parametrize("draw", [
    lambda: rankings.toy(np.array([2, 0, 1]), np.array([[1, 0], [0, 0], [1, 1]], bool), 0, 2),
    lambda: rankings.forest(pd.DataFrame({"value": [0.5], "low": [0.4], "high": [0.6]}, index=["corec"]), "CP", "title"),
    lambda: rankings.leak(pd.DataFrame({"value": [0.5, 0.2], "low": [0.4, 0.1], "high": [0.6, 0.3]}, index=["a", "b"]), "x", "y"),
    lambda: prompts.positions(400, 7, 20),
])  # fmt: skip
def test_pictures_draw_without_a_warning(draw: object, recwarn: pytest.WarningsRecorder) -> None:
    figure = draw()  # type: ignore[operator]
    figure.canvas.draw()
    plt.close(figure)
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def contrast(first: str, second: str) -> float:
    """Ratio of the relative luminances of two colours (WCAG 2)."""

    def luminance(color: str) -> float:
        values = np.array(colors.to_rgb(color))
        linear = np.where(values <= 0.03928, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(first), luminance(second)])
    return (high + 0.05) / (low + 0.05)


def test_corec_differs_from_all_baselines_without_colours_too() -> None:
    corec = style.mark("corec")
    baselines = {model: mark for model, mark in style.MARKS.items() if model not in ("corec", "no-token", "no-prior")}
    assert contrast(corec.color, "white") > 4.5
    for mark in baselines.values():
        red, green, blue = colors.to_rgb(mark.color)
        assert red == green == blue and mark.width < corec.width
    shapes = [(mark.color, mark.marker, mark.line) for mark in style.MARKS.values()]
    assert len(set(shapes)) == len(shapes)


def results(corec: list[float], rule: list[float]) -> pd.DataFrame:
    """A results table with CP@5 by number of tokens, and NDCG@5."""
    rows = []
    for model, values in {
        "corec": corec,
        "rule": rule,
        "hard-filter": rule,
        "sasrec": [0.3, 0.2],
        "combiner": [0.3, 0.2],
    }.items():
        for n, value in enumerate(values, start=1):
            rows += [{"model": model, "n_tokens": n, "metric": "cp", "k": 5, "tau": tau, "value": value + 0.1 * (n - tau)}
                     for tau in range(1, n + 1)]  # fmt: skip
        ndcg = {"corec": 0.1, "sasrec": 0.08}.get(model, 0.09)
        rows.append({"model": model, "n_tokens": 0, "metric": "ndcg", "k": 5, "tau": np.nan, "value": ndcg})
    return pd.DataFrame(rows)


def test_claims_hold_where_the_whole_interval_is_above_0() -> None:
    rows = [
        ("cp", 1, "sasrec", 0.5, 0.4, 0.6), ("cp", 2, "sasrec", 0.3, 0.2, 0.4),
        ("ndcg", 0, "sasrec", 0.02, 0.01, 0.03), ("ndcg", 1, "hard-filter", 0.02, 0.01, 0.03), ("ndcg", 2, "hard-filter", 0.0, -0.01, 0.01),
    ]  # fmt: skip
    comparisons = pd.DataFrame(rows, columns=["metric", "n_tokens", "other", "difference", "low", "high"]).assign(k=5)
    coverage = pd.DataFrame({"n_tokens": [1, 2], "truth_violates": [0.5, 0.8]})
    found = claims.judge(results([0.8, 0.6], [0.9, 0.7]), comparisons, coverage, 5).set_index("the paper says")["holds"]
    assert found.tolist() == ["yes", "yes", "yes", "yes", "with 1 token", "yes"]
    rising = claims.judge(results([0.6, 0.8], [0.9, 0.7]), comparisons, coverage, 5)["holds"].tolist()
    assert rising[1] == "no" and rising[3] == "no", "CP increases, and is above that of the filter"


def test_control_by_attribute_is_the_share_of_the_top_k() -> None:
    met = np.array([[[True, False], [False, True], [False, True]]])  # [1, K, n]
    judged = evaluation.Judged(np.zeros((1, 3), bool), met)
    orders = {"a": np.array([[0, 1, 2]]), "b": np.array([[1, 2, 0]])}
    table = evaluation.control_by_attribute(orders, judged, np.array([[4, 9]]), np.repeat([0, 1], 5), ["x", "y"], 2)
    assert table.loc["x", ["a", "b"]].tolist() == [0.5, 0.0] and table.loc["y", ["a", "b"]].tolist() == [0.5, 1.0]
    empty = evaluation.control_by_attribute(orders, judged, np.array([[-1, 9]]), np.repeat([0, 1], 5), ["x", "y"], 2)
    assert empty.index.tolist() == ["y"] and empty["constraints"].tolist() == [1]
