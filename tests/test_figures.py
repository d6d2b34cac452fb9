import json
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from test_frontier import PARAMS, World

from corec import CorecError, diagnose, evaluation, figures, files, frontier, stages, verify
from corec.params import Params

matplotlib.use("Agg")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def table() -> pd.DataFrame:
    rows = []
    for place, model in enumerate(evaluation.MODELS):
        for n in (0, 1, 2, 3):
            for metric in ("ndcg", "cp"):
                for tau in [pd.NA] if metric == "ndcg" else range(1, n + 1):
                    value = 0.9 - 0.05 * place - 0.01 * n
                    rows.append(
                        ("ml-100k", "random-candidate", 20, n, tau, model, 0, metric, 5, value, value - 0.05, value + 0.05, 300)
                    )
    return pd.DataFrame(rows, columns=evaluation.COLUMNS).astype(
        {"tau": "Int64", "k": "Int64", "value": float, "low": float, "high": float}
    )


def test_figures_show_the_table_and_nothing_else(table: pd.DataFrame, tmp_path: Path) -> None:
    six, seven, eight = (make(table, 5) for make in (figures.figure6_table, figures.figure7_table, figures.figure8_table))
    cp = six[six["metric"] == "cp"]
    assert (cp["tau"] == cp["n_tokens"]).all() and set(cp["n_tokens"]) == {1, 2, 3}
    assert set(seven["n_tokens"]) == {2, 3} and set(seven["tau"]) == {1, 2, 3}
    assert set(eight["model"]) == {"sasrec", "hard-filter", "corec"}
    lines = {line.get_label(): line for line in collect(figures.figure6(six, 5).axes[0])}
    assert set(lines) == set(figures.SHOWN)
    for model, line in lines.items():
        wanted = cp[cp["model"] == model].sort_values("n_tokens")["value"].to_numpy(dtype=float)
        np.testing.assert_allclose(line.lines[0].get_ydata().astype(float), wanted)
    bars = [bar.get_height() for axis in figures.figure8(eight, 5).axes[:1] for group in axis.containers[:3] for bar in group]
    np.testing.assert_allclose(sorted(bars), sorted(eight[eight["metric"] == "cp"]["value"].astype(float)))


def collect(axis: Axes) -> list[object]:
    """The error-bar containers of an axis."""
    return list(axis.containers)


def evaluated(params: Params) -> None:
    """Finish the stages before the figures, with the metrics of three users."""
    for stage in stages.ancestors("figures"):
        begun = stages.start(params, stage)
        if stage == "evaluation":
            rows = [(f"u{user}", "corec", 1, 0, "cp", 5, 1, user / 4) for user in range(3)]
            rows += [("u0", "corec", 1, 1, "cp", 5, 1, 1.0), ("u0", "corec", 1, 0, "cp", 5, 2, 9.0)]
            names = "user_id model n_tokens seed metric k tau value".split()
            pd.DataFrame(rows, columns=names).astype({"tau": "Int64"}).to_parquet(begun.folder / "per_window.parquet")
        begun.finish()


def test_files_of_a_run(table: pd.DataFrame) -> None:
    params = Params(run="r")
    evaluated(params)
    written = figures.publish(table, params, {"a fact": "42"})
    names = "fig6.png fig6.csv fig7.png fig7.csv fig8.png fig8.csv metrics.csv results.md manifest.json per_user.parquet".split()
    assert sorted(path.name for path in written) == sorted(names)
    saved = evaluation.read(written[-3])
    pd.testing.assert_frame_equal(saved[table.columns], table, check_dtype=False)
    assert saved.iloc[0][["run", "backbone", "readout"]].tolist() == ["r", "smollm2-135m", "late"]
    assert set(saved["attributes"]) == {"genre era popularity rating consensus"}
    users = pd.read_parquet(written[-4])
    assert users["value"].tolist() == [0.5, 0.25, 0.5], "means over the seeds, at the strictest threshold"
    record = json.loads(written[-1].read_text())
    assert record["packages"]["torch"] and set(record["stages"]) == {"data", "sasrec", "controls", "reranker", "evaluation"}
    assert record["outputs"]["metrics.csv"] == files.sha256(written[-3])
    page = written[-2].read_text()
    assert "| corec | 0." in page and "| **COREC** | 0." in page and "a fact: 42" in page and "300 test users" in page


def test_a_cut_off_that_was_not_evaluated(table: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(CorecError, match=r"figures.k is 7, but .* k in \[5\]"):
        figures.make(table, 7, tmp_path)


def test_a_results_table_without_a_column(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("dataset,k,tau\na,5,1\n")
    with pytest.raises(CorecError, match="no column 'protocol'"):
        evaluation.read(tmp_path / "metrics.csv")


def test_each_protocol_has_figures_and_a_summary(table: pd.DataFrame) -> None:
    params = Params(run="r")
    evaluated(params)
    both = pd.concat([table, table.assign(protocol="oracle", value=table["value"] / 2)], ignore_index=True)
    written = {path.name: path for path in figures.publish(both, params, {})}
    assert {f"fig{number}-oracle.{kind}" for number in (6, 7, 8) for kind in ("png", "csv")} <= set(written)
    other = pd.read_csv(written["fig8-oracle.csv"])
    assert set(other["protocol"]) == {"oracle"} and set(pd.read_csv(written["fig8.csv"])["protocol"]) == {"random-candidate"}
    page = written["results.md"].read_text()
    assert "## Summary, oracle" in page and page.count("| **COREC** |") == 2
    figures.publish(table, params, {})
    assert not list(written["fig8.csv"].parent.glob("*oracle*")), "figures of a protocol that is no longer evaluated are removed"


def test_sections_of_the_frontier(tmp_path: Path) -> None:
    world = World()
    ranked = world.rank(world.exact)
    report = frontier.report(ranked, [world.exact], world.prior, world.users, PARAMS)
    for name, frame in report._asdict().items():
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    signs = diagnose.diagnose(world.prepared, ranked, [world.exact], world.users, PARAMS, {"order_bias": 0.5})
    signs.to_csv(tmp_path / "signs.csv", index=False)
    page = "\n".join(figures.extra_sections(tmp_path, 3))
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## Claims", "## Frontier", "## Diagnosis"]
    assert page.count("| 2 | ") >= 4 and "order of the candidates matters | 0.5 | 0.1 | yes" in page
    assert figures.extra_sections(tmp_path / "none", 3) == []
    report.claims.drop(columns="protocol").to_csv(tmp_path / "claims.csv", index=False)
    assert "\n".join(figures.extra_sections(tmp_path, 3)) == page, "a table of one protocol may lack the column"


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in (ROOT / "figures").glob("*/manifest.json")), ids=lambda path: path.name
)
def test_committed_results_agree_with_their_manifests_and_pages(folder: Path) -> None:
    if not folder.name.startswith("tiny"):
        assert [*verify.digests(folder), *verify.outdated_pages(folder)] == []


def test_the_pictures_of_the_default_run_are_those_of_its_data() -> None:
    assert list(verify.pictures(ROOT / "figures" / "ml-100k")) == []
