"""Variants of the re-ranker, and one re-ranker under other numbers of candidates."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_prior import params as with_prior
from test_reranker import World, unlike_start

from corec import CorecError, controls, pages, reranker, sasrec
from corec.params import EvaluationParams, FiguresParams, Params, RerankerParams, SasrecParams, StudyParams
from corec.reranker import engine
from corec.reranker.training import loss_of
from corec.studies import ablations, surface, texts


@pytest.fixture
def world(atomic: Path) -> World:
    world = World(atomic)
    rng, hidden = np.random.default_rng(0), 8
    pools_of = world.prepared.pools
    priors = {split: rng.normal(size=pools.candidates.shape).astype(np.float32) for split, pools in pools_of.items()}
    states = {
        split: rng.normal(size=(*pools.candidates.shape, 2 * hidden)).astype(np.float32) for split, pools in pools_of.items()
    }
    world.examples = reranker.load_examples(world.tables.windows, world.prepared, priors, states)
    return world


def settings(world: World, **study: object) -> Params:
    made = with_prior(world, steps=4, curriculum_steps=2)
    return made.model_copy(
        update={
            "study": made.study.model_copy(update=study),
            "sasrec": SasrecParams(hidden=8),
            "controls": made.controls.model_copy(update={"train_truth": "inserted"}),
            "evaluation": EvaluationParams(bootstrap=20, strengths=[0, 0.5, 1]),
        }
    )


def users(world: World) -> np.ndarray:
    return world.tables.windows.set_index("window").loc[world.prepared.pools["test"].window, "user"].to_numpy()


def test_every_variant_is_trained_once_judged_and_shown(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = settings(world, ablations=[name for name in ablations.VARIANTS if name != "corec"])
    found = ablations.compare(world.tables.items, world.examples, own, tmp_path / "stage")
    assert list(found) == list(ablations.VARIANTS)
    shape = (len(world.prepared.pools["test"].window), 3, 6)
    scores = {name: part.scores for name, part in found.items()}
    assert all(part.total().shape == shape and np.isfinite(part.total()).all() for part in scores.values())
    assert not scores["without prior"].prior.any() and scores["corec"].prior.any()
    assert (scores["corec"].relevance == scores["shuffled-tokens"].relevance).all(), "one model under other requests"
    assert np.ptp(scores["llamarec"].total(), axis=1).max() < 1e-5, "it has no requests"
    assert {name: part.steps for name, part in found.items() if part.steps != 3} == {"twice the steps": 6}
    assert [path.parent.name for path in (tmp_path / "stage").glob("*/checkpoint.pt")] == ["corec"]
    monkeypatch.setattr(ablations, "train", None)
    again = ablations.compare(world.tables.items, world.examples, own, tmp_path / "stage")
    assert all((again[name].scores.total() == part.total()).all() for name, part in scores.items())

    text = np.random.default_rng(0).random((shape[0], 6))
    table = ablations.judge(found, world.examples, users(world), own, text)
    whole = table[table["variant"] == "corec"]
    assert (whole[whole["metric"] != "gap"]["ahead"] == 0).all()
    assert set(table["variant"]) == {*ablations.VARIANTS, *ablations.SIMPLE}
    assert "without prior" not in set(table[table["metric"] == "gap"]["variant"]), "it has no frontier with the boost's scale"
    (tmp_path / "figures").mkdir()
    ablations.keep(table, tmp_path / "figures")
    page = (tmp_path / "figures" / "results.md").read_text()
    assert "| `frozen-rows` |" in page and page == pages.study_page(tmp_path / "figures")


def test_an_interrupted_variant_starts_again_and_an_unknown_one_is_named(world: World, tmp_path: Path) -> None:
    own = settings(world, ablations=["no match loss"])
    model = world.build(ablations.variant(own, "no match loss"))
    reranker.train(model, world.examples, ablations.variant(own, "no match loss"), tmp_path / "no-match-loss", stop_after=2)
    found = ablations.compare(world.tables.items, world.examples, own, tmp_path)
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    again = ablations.compare(world.tables.items, world.examples, own, tmp_path)
    np.testing.assert_array_equal(again["no match loss"].scores.total(), found["no match loss"].scores.total())


def test_variants_that_do_not_fit_are_named_before_the_first_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "train", None)
    plain = world.params(loss="ranknet", control="request")
    for params, message in (
        (settings(world, ablations=["no match loss"]), "equals 'corec' in this run"),
        (
            plain.model_copy(update={"study": StudyParams(ablations=["llamarec"])}),
            r"'llamarec', which does not fit this run \(par",
        ),
    ):
        if "equals" in message:
            params = params.model_copy(update={"reranker": params.reranker.model_copy(update={"match_loss": 0})})
        with pytest.raises(CorecError, match=message):
            ablations.compare(world.tables.items, world.examples, params, tmp_path)


def test_other_windows_are_scored_anew(world: World, tmp_path: Path) -> None:
    own = settings(world, ablations=[])
    ablations.compare(world.tables.items, world.examples, own, tmp_path)
    other = {window: prior + 1 for window, prior in world.examples.prior.items()}
    ablations.compare(world.tables.items, world.examples._replace(prior=other), own, tmp_path)
    assert len(list(tmp_path.glob("corec-*.npz"))) == 2


def test_exchanged_requests_never_keep_a_value() -> None:
    requests = [np.array([[0, -1], [3, 2]]), np.empty((2, 0), dtype=int)]
    for seed in range(20):
        first, second = ablations.exchanged(requests, 4, seed)
        assert (first == -1).tolist() == [[False, True], [False, False]] and second.shape == (2, 0)
        assert not (first == requests[0])[requests[0] >= 0].any() and first.max() < 4


def test_frozen_rows_keep_their_values_and_soft_tokens_learn(world: World) -> None:
    own = settings(world)
    for name, moves in (("frozen-rows", False), ("corec", True)):
        model = world.build(ablations.variant(own, name))
        rows = next(value for key, value in model.model.named_parameters() if "trainable_tokens" in key)
        before = rows.clone()
        reranker.train(model, world.examples, ablations.variant(own, name), None)
        assert torch.equal(before, rows) != moves
    soft = ablations.variant(own, "soft tokens")
    model = world.build(soft)
    reranker.train(model, world.examples, soft, None)
    assert model.head.soft.weight.abs().sum() > 0


def test_soft_tokens_change_the_scores_and_are_kept_in_a_prefix(world: World) -> None:
    own = ablations.variant(settings(world), "soft tokens")
    model = world.build(own)
    unlike_start(model)
    rows = reranker.make_rows(model, world.examples, world.pools, world.requests)
    scores = reranker.score(model, world.examples, world.pools, world.requests)
    blank = world.examples._replace(soft={window: 0 * states for window, states in world.examples.soft.items()})
    assert np.abs(scores - reranker.score(model, blank, world.pools, world.requests)).max() > 1e-3
    merged = engine.merge(model)
    prefix = engine.prefill(merged, rows[2])
    np.testing.assert_allclose(engine.answer(merged, prefix, rows[2]).numpy(), scores[2], atol=1e-4)


def test_soft_states_are_those_of_the_candidates_and_the_user(world: World) -> None:
    own = SasrecParams(hidden=8, max_length=5)
    model = sasrec.SASRec(len(world.tables.items), own)
    windows = world.tables.windows.set_index("window", drop=False).loc[world.pools.window]
    states = sasrec.soft_states(model, world.tables.interactions, windows, world.pools.candidates, own)
    assert states.shape == (*world.pools.candidates.shape, 16) and states.dtype == np.float32
    assert (states[:, 0, 8:] == states[:, 5, 8:]).all(), "one user state for all candidates"
    items = model.items.weight.detach().numpy()
    np.testing.assert_allclose(states[3, 2, :8], items[world.pools.candidates[3, 2]] / items.std(), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum_k": [1]}, "curriculum_k' lists 1: list numbers from 2 to controls.k"),
        ({"curriculum_k": [7]}, "curriculum_k' lists 7"),
        ({"soft_width": 6}, "soft_width' is 6: set it to 0, or to twice sasrec.hidden"),
        ({"loss": "truth", "curriculum_steps": 2}, "'truth' needs the true next item"),
        ({"auxiliary": 1.0}, "'reranker.auxiliary' supports the read-out 'index'"),
        ({"soft_width": 128, "readout": "index"}, "readout to 'late' or 'candidate'"),
    ],
)
def test_parameters_that_do_not_go_together(world: World, changes: dict[str, object], message: str) -> None:
    own = world.params()
    with pytest.raises(CorecError, match=message):
        own.model_copy(update={"reranker": own.reranker.model_copy(update=changes)})


def test_the_curriculum_grows_the_pools(world: World) -> None:
    own = world.params(curriculum_k=[2, 4], curriculum_steps=4, steps=2)
    sizes = [reranker.training_batch(world.examples, own, step).pools.candidates.shape[1] for step in range(6)]
    assert sizes == [2, 2, 4, 4, 6, 6]
    curve = reranker.train(world.build(own), world.examples, own, None)
    assert len(curve) == 6 and np.isfinite(curve["loss"]).all()


def test_narrow_pools_keep_order_and_truth(world: World) -> None:
    pools = world.prepared.pools["train"]
    few = pools.narrow(3, np.random.default_rng(0))
    assert few.candidates.shape == (len(pools.window), 3)
    for i in range(len(pools.window)):
        places = [pools.candidates[i].tolist().index(item) for item in few.candidates[i]]
        assert places == sorted(places) and (few.retriever_rank[i] == pools.retriever_rank[i, places]).all()
        truth = pools.candidates[i, pools.truth[i]] if pools.truth[i] >= 0 else None
        assert (few.candidates[i, few.truth[i]] == truth) if few.truth[i] >= 0 else truth not in few.candidates[i]


def test_the_auxiliary_read_out_learns_with_the_index_and_leaves_its_scores(world: World, tmp_path: Path) -> None:
    changes = {"readout": "index", "request_position": "before", "requests_per_window": 1}
    own = world.params(**changes, auxiliary=1.0)
    model = world.build(own)
    unlike_start(model)
    alone = world.build(world.params(**changes))
    unlike_start(alone)
    with torch.no_grad():
        for name, value in alone.trainable().items():
            value.copy_(model.trainable()[name])
    scores = [reranker.score(each, world.examples, world.pools, world.requests) for each in (model, alone)]
    np.testing.assert_allclose(*scores, atol=1e-6)
    batch = reranker.training_batch(world.examples, own, 4)  # one constraint
    rows = reranker.make_rows(model, world.examples, batch.pools, batch.requests)
    model.model.train()
    parts, _ = model.parts(rows)
    assert parts.auxiliary is not None and parts.auxiliary.shape == parts.control.shape
    whole = loss_of(parts, None, batch.targets, own.reranker)
    bare = loss_of(parts._replace(auxiliary=None), None, batch.targets, own.reranker)
    assert whole.item() > bare.item()
    curve = reranker.train(model, world.examples, own, None)
    assert len(curve) == 8 and model.head.relevance.weight.abs().sum() > 0
    reranker.save(model, curve, tmp_path)
    loaded = reranker.load(tmp_path, world.tables.items, world.prepared.vocabulary, own.reranker)
    again = [reranker.score(each, world.examples, world.pools, world.requests) for each in (model, loaded)]
    assert not reranker.zero_shot(world.tables.items, world.prepared.vocabulary, own.reranker).params.auxiliary
    np.testing.assert_allclose(*again, atol=1e-5)


def test_what_a_request_asks_for() -> None:
    met = np.array([[[True, True], [True, False], [False, False]]])
    found = {target: controls.wanted(met, target)[0].tolist() for target in ("graded", "all", "mixture", "none")}
    assert found == {"graded": [2, 1, 0], "all": [2, 0, 0], "mixture": [2, 0.5, 0], "none": [0, 0, 0]}


def test_the_loss_of_the_true_item_is_its_cross_entropy(world: World) -> None:
    own = RerankerParams(loss="truth", curriculum_steps=0)
    targets = reranker.Targets.of_control(np.zeros((2, 1, 3), np.float32))
    targets.truth[:, 1] = 1
    scores = torch.tensor([[[0.0, 2.0, 1.0]], [[1.0, 0.0, 0.0]]])
    parts = reranker.Parts(torch.zeros(2, 1, 3), scores)
    wanted = torch.nn.functional.cross_entropy(scores[:, 0], torch.tensor([1, 1]))
    assert loss_of(parts, None, targets, own).item() == pytest.approx(wanted.item())


def test_one_model_under_other_numbers_of_candidates(world: World, tmp_path: Path) -> None:
    own = world.params(steps=2)
    own = own.model_copy(
        update={
            "study": own.study.model_copy(update={"surface": [4, 8]}),
            "evaluation": EvaluationParams(bootstrap=20),
            "figures": FiguresParams(k=3),
        }
    )
    rng, n = np.random.default_rng(0), len(world.tables.items)
    found = [rng.permutation(np.arange(1, n + 1))[:8] for _ in range(len(world.tables.windows))]
    frame = pd.DataFrame(
        {"window": world.tables.windows["window"], "candidates": found, "scores": [np.arange(8, 0, -1.0)] * len(found)}
    )
    table = surface.measure(world.build(own), world.tables, frame, own)
    assert set(table["K"]) == {4, 8} and set(table["model"]) == {"sasrec", "hard-filter", "rule", "corec"}
    assert (table[table["model"] == "corec"]["ahead"] == 0).all() and (table["k"] == 3).all()
    best = table[table["metric"] == "cp"].pivot(index=["K", "n_tokens"], columns="model", values="value")
    assert (best["rule"] >= best["corec"]).all()
    surface.keep(table, tmp_path)
    assert "| 4 | `corec` |" in (tmp_path / "results.md").read_text() and (tmp_path / "surface.png").exists()


def test_a_model_is_rebuilt_from_its_checkpoint(world: World, tmp_path: Path) -> None:
    own = settings(world, ablations=[])
    first, second = (ablations.trained(world.tables.items, world.examples, own, "corec", tmp_path) for _ in range(2))
    assert first[1] == second[1] == 3
    scores = [reranker.score(each, world.examples, world.pools, world.requests) for each, _ in (first, second)]
    np.testing.assert_array_equal(*scores)


def test_the_combiner_is_compared_by_the_model_of_the_titles(world: World, tmp_path: Path) -> None:
    own = settings(world, texts=["none", "tf-idf"])
    own = own.model_copy(update={"data": own.data.model_copy(update={"held_back": 4})})
    own = own.model_copy(update={"evidence": own.evidence.model_copy(update={"combiner": "linear", "folds": 2, "text": "tiny"})})
    pool = own.controls.model_copy(update={"pool": ["sasrec", "text"]})  # which needs evidence.text, also for `none`
    own = own.model_copy(update={"controls": pool})
    prepared = world.prepared
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):  # the combiner needs windows whose true next item is there
        part = prepared.pools[split]
        prepared.pools[split] = part._replace(truth=rng.integers(0, 6, len(part.window)))
    scores = rng.random(prepared.pools["test"].candidates.shape)
    table = texts.measure(world.tables, prepared, users(world), own, {"corec": scores})
    names = ["sasrec", "combiner, tiny", "text alone, tiny", "combiner, none", "combiner, tf-idf", "text alone, tf-idf", "corec"]
    assert list(table["ranker"]) == names
    assert table["ahead"][0] == 0 and table["over"][1] == 0
    np.testing.assert_allclose(table["value"] - table["ahead"], table["value"][0])
    np.testing.assert_allclose(table["value"] - table["over"], table["value"][1])
    assert table["recall"][0] == (prepared.pools["test"].truth >= 0).mean()
    folder = tmp_path / "figures" / "amazon-office-products"
    folder.mkdir(parents=True)
    texts.keep(table, folder)
    assert "| `combiner, tf-idf` |" in (folder / "results.md").read_text()
    joined = pd.read_csv(texts.join(tmp_path / "figures")[0]).set_index("run")
    assert joined.index.to_list() == [folder.name] and joined["over"].iloc[0] == pytest.approx(table["over"].iloc[-1], rel=1e-4)
    with pytest.raises(CorecError, match="'study.texts' compares combiners"):
        Params.checked({"study": {"texts": ["none"]}}, "here")
