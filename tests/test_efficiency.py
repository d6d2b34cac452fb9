from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_prior import params as with_prior
from test_prior import world_with_priors
from test_reranker import World

from corec import CorecError, machine, sasrec
from corec.params import EfficiencyParams, Params, SasrecParams
from corec.studies import efficiency


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic, k=6)


def settings(world: World, **changes: object) -> Params:
    sizes = {
        "sasrec": SasrecParams(hidden=16, max_length=10),
        "efficiency": EfficiencyParams(candidates=[3, 6], repeats=4, users=5),
    }
    return world.params(**changes).model_copy(update=sizes)


def retriever(world: World) -> sasrec.SASRec:
    torch.manual_seed(0)
    return sasrec.SASRec(len(world.tables.items), SasrecParams(hidden=16, max_length=10)).eval()


def test_every_system_at_every_k_and_number_of_tokens(world: World, tmp_path: Path) -> None:
    own = settings(world)
    table = efficiency.measure(world.tables, world.prepared, retriever(world), world.build(own), own)
    assert len(table) == 2 * (1 + 3 + 3), "two K; retrieval once, two ways to re-rank with 0, 1 and 2 tokens"
    assert set(table["system"]) == set(efficiency.SYSTEMS)
    alone = table["system"] == efficiency.SYSTEMS[0]
    assert table.loc[alone, "n_tokens"].isna().all() and table.loc[~alone, "n_tokens"].isin([0, 1, 2]).all()
    assert (table["p95_ms"] >= table["p50_ms"]).all() and (table["p50_ms"] > 0).all()
    np.testing.assert_allclose(table["items_per_s"], table["K"] * table["lists_per_s"])
    np.testing.assert_allclose(table["usd_per_1000"] * table["lists_per_s"], 0.10 * 1000 / 3600)
    long = table[table["system"] == efficiency.SYSTEMS[1]].set_index(["K", "n_tokens"])["prompt_tokens"]
    assert long[6, 1] > long[3, 1] and long[3, 2] > long[3, 0]
    costs = pd.DataFrame(
        [dict.fromkeys("ranker n_tokens cp ndcg ms usd_per_1000 cp_gain_per_s ndcg_gain_per_s usd_per_1000_items".split(), 1)]
    )
    written = {path.name for path in efficiency.keep(table, costs, tmp_path / "f")}
    assert written == {"efficiency.csv", "efficiency.png", "cost.csv"}
    assert "## Latency" in (tmp_path / "f" / "results.md").read_text()


def test_the_cost_of_a_gain_by_hand(tmp_path: Path) -> None:
    params = Params().model_copy(update={"efficiency": EfficiencyParams(usd_per_hour=3.6)})
    k = params.controls.k
    times = [(efficiency.SYSTEMS[0], np.nan, 1.0, 1000.0), (efficiency.EVIDENCE, np.nan, 4.0, 250.0)]
    times += [
        (system, 1, ms, rate) for system, ms, rate in ((efficiency.SYSTEMS[1], 100.0, 10.0), (efficiency.SYSTEMS[2], 20.0, 50.0))
    ]
    table = pd.DataFrame(times, columns=["system", "n_tokens", "p50_ms", "lists_per_s"]).assign(K=k)
    values = {"sasrec": (0.5, 0.06), "rule": (0.9, 0.05), "rule+combiner": (0.9, 0.07), "corec": (0.9, 0.08), "text": (0.5, 0.01)}
    rows = [(model, *("cp", 1, cp), *("ndcg", 0, ndcg)) for model, (cp, ndcg) in values.items()]
    parts = [(model, metric, tau, value) for model, *two in rows for metric, tau, value in (two[:3], two[3:])]
    results = pd.DataFrame(parts, columns=["model", "metric", "tau", "value"])
    results = results.assign(n_tokens=1, k=5, protocol=params.controls.protocol)
    found = efficiency.cost(table, results, params).set_index("ranker")
    assert list(found.index) == ["sasrec", "rule", "rule+combiner", "corec", "corec, further request"]
    assert found["ms"].tolist() == [1, 1, 5, 105, 25]
    np.testing.assert_allclose(found["usd_per_1000"], [0.001, 0.001, 0.005, 0.105, 0.025])
    np.testing.assert_allclose(
        found.loc["corec", ["cp_gain_per_s", "ndcg_gain_per_s"]].astype(float), [0.4 / 0.104, 0.02 / 0.104]
    )
    assert np.isnan(found.loc["rule", "cp_gain_per_s"]), "the rule adds no time"
    np.testing.assert_allclose(found["usd_per_1000_items"].iloc[1:], np.array([0, 0.004, 0.104, 0.024]) / (5 * 0.4))
    assert np.isnan(found.loc["sasrec", "usd_per_1000_items"])
    farther = pd.concat([table.assign(K=k + 2), table.assign(K=k - 10, p50_ms=7.0)])
    pd.testing.assert_frame_equal(efficiency.cost(farther, results, params).set_index("ranker"), found)
    written = efficiency.keep(
        table.assign(K=k, p95_ms=1.0, usd_per_1000=0.1, dataset="d", device="m", backbone="b", dtype="t", items_per_s=1.0),
        found.reset_index(),
        tmp_path,
    )
    assert [path.name for path in written] == ["efficiency.csv", "efficiency.png", "cost.csv"]
    assert "## Cost of control" in (tmp_path / "results.md").read_text()


def test_the_evidence_of_a_combiner_is_timed(atomic: Path) -> None:
    world = world_with_priors(atomic)
    own = with_prior(world).model_copy(
        update={
            "sasrec": SasrecParams(hidden=16, max_length=10),
            "efficiency": EfficiencyParams(candidates=[6], repeats=4, users=5),
        }
    )
    table = efficiency.measure(world.tables, world.prepared, retriever(world), world.build(own), own)
    row = table[table["system"] == efficiency.EVIDENCE].iloc[0]
    assert row["p50_ms"] > 0 and np.isclose(row["lists_per_s"], 1000 / row["p50_ms"]) and np.isnan(float(row["prompt_tokens"]))


def test_without_a_shared_prefix_nothing_is_kept(world: World) -> None:
    own = settings(world, readout="index", request_position="before")
    table = efficiency.measure(world.tables, world.prepared, retriever(world), world.build(own), own)
    assert set(table["system"]) == set(efficiency.SYSTEMS[:2])


def test_candidates_are_the_retrievers(world: World) -> None:
    model, own = retriever(world), settings(world)
    few = world.tables.windows.query("split == 'test'")
    found = efficiency.retrieval(world.tables, few, model, own, 6)[1]
    want = sasrec.candidates(model, world.tables.interactions, few, own.sasrec.model_copy(update={"top_k": 6}))
    assert found["window"].tolist() == want["window"].tolist()
    assert (np.stack(list(found["candidates"])) == np.stack(list(want["candidates"]))).all()


def test_more_candidates_than_the_reranker_takes() -> None:
    with pytest.raises(CorecError, match="efficiency.candidates' lists 60: the re-ranker takes at most 50"):
        Params.checked({"efficiency": {"candidates": [10, 60]}}, "here")


def test_a_small_catalogue_names_the_parameter_of_the_timings(world: World) -> None:
    params = settings(world)
    params = params.model_copy(update={"efficiency": EfficiencyParams(candidates=[3, 50], repeats=2, users=3)})
    with pytest.raises(CorecError, match="efficiency.candidates lists 50, but some user has only"):
        efficiency.measure(world.tables, world.prepared, retriever(world), world.build(params), params)


def test_kinds_of_work_are_warmed_up_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []

    def work(kind: int, number: int) -> None:
        calls.append(kind)
        cold = calls.count(kind) <= 3  # the first calls of a kind are slower
        clock[0] += 1 + 5 * cold + 0.01 * len(calls)  # and the machine slows down all the time

    monkeypatch.setattr(machine, "now", lambda: clock[0])
    found = machine.interleaved([partial(work, kind) for kind in range(4)], 40, warm_up=20)
    middles = [middle for middle, _ in found]
    assert max(middles) < 1.05 * min(middles), "neither the first calls nor the order favours a kind"
    rounds = [tuple(calls[start : start + 4]) for start in range(len(calls) - 160, len(calls), 4)]
    assert len(calls) >= 4 * 43 and all(sorted(each) == [0, 1, 2, 3] for each in rounds) and len(set(rounds)) > 5


@pytest.mark.parametrize(
    ("flags", "wanted"), [("fpu avx512_bf16 amx_bf16", "bfloat16"), ("fpu avx512_bf16", "bfloat16"), ("fpu avx2", "float32")]
)
def test_the_processor_decides_the_number_format_however_busy_it_is(
    monkeypatch: pytest.MonkeyPatch, flags: str, wanted: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "cpu_facts", lambda: {"model name": "A processor", "flags": flags})
    monkeypatch.setattr(machine.timeit, "repeat", lambda *_, **__: pytest.fail("nothing is timed"))
    machine.resolve_dtype.cache_clear()
    assert machine.resolve_dtype("auto") == getattr(torch, wanted)
    machine.resolve_dtype.cache_clear()
    assert machine.processor().startswith("A processor, ") and ("amx_bf16" in machine.processor()) == ("amx" in flags)


def test_a_record_names_the_gpu_that_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor", lambda: "A processor")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    for used in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
        assert machine.hardware().endswith("A processor, A GPU" if used else "A processor")
