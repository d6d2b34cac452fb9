"""The prior, the control term by constraint, the strength, and the listwise loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_reranker import World, unlike_start

from corec import CorecError, reranker, scores
from corec.params import Params, RerankerParams
from corec.reranker import Parts, Targets, engine
from corec.reranker.training import loss_of

WITH_PRIOR = {"control": "constraints", "prior": True, "loss": "listwise"}


def world_with_priors(atomic: Path) -> World:
    """The small data set, with random scores of a combiner."""
    world = World(atomic)
    rng = np.random.default_rng(0)
    priors = {split: rng.normal(size=pools.candidates.shape).astype(np.float32) for split, pools in world.prepared.pools.items()}
    world.examples = reranker.load_examples(world.tables.windows, world.prepared, priors)
    return world


@pytest.fixture
def world(atomic: Path) -> World:
    return world_with_priors(atomic)


def params(world: World, **changes: Any) -> Params:
    made = world.params(**{key: value for key, value in (WITH_PRIOR | changes).items() if key != "prior"})
    if not (WITH_PRIOR | changes)["prior"]:
        return made
    evidence = made.evidence.model_copy(update={"combiner": "linear"})
    data = made.data.model_copy(update={"held_back": 4})
    return made.model_copy(
        update={"data": data, "evidence": evidence, "reranker": made.reranker.model_copy(update={"prior": True})}
    )


def trained(world: World, **changes: Any) -> reranker.Reranker:
    model = world.build(params(world, **changes))
    unlike_start(model)
    return model


def test_parts_add_up_to_the_score(world: World) -> None:
    model = trained(world)
    parts = reranker.score_parts(model, world.examples, world.pools, world.requests)
    rows = reranker.make_rows(model, world.examples, world.pools, world.requests)
    with torch.no_grad():
        for strength in (0.0, 0.3, 1.0):
            wanted = torch.cat([model.forward([row], strength) for row in rows]).numpy()
            np.testing.assert_allclose(parts.total(strength), wanted, atol=1e-4)
    assert (parts.control[:, 0] == 0).all(), "no constraint, no control"
    assert (parts.control >= 0).all() and (parts.control[:, 2] <= 16).all()
    np.testing.assert_array_equal(parts.relevance[:, 0], parts.relevance[:, 2])
    first = world.examples.prior[world.pools.window[3]]
    ratio = parts.prior[3] / first
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-4)


def test_the_gate_is_one_at_the_start(world: World) -> None:
    parts = reranker.score_parts(world.build(params(world)), world.examples, world.pools, world.requests)
    np.testing.assert_array_equal(parts.prior[5, 1], world.examples.prior[world.pools.window[5]])
    assert (parts.relevance == 0).all()


@pytest.mark.parametrize("changes", [{}, {"values": "words", "pooling": "end"}, {"control": "request"}], ids=str)
def test_packed_requests_cached_prefixes_and_single_requests_agree(world: World, changes: dict[str, Any]) -> None:
    model = trained(world, **changes)
    packed = reranker.score_parts(model, world.examples, world.pools, world.requests)
    for window in (0, 5):
        some = world.pools.take(np.array([window]))
        row = reranker.make_rows(model, world.examples, some, [request[[window]] for request in world.requests])[0]
        prefix = engine.prefill(model, row)
        for strength in (1.0, 0.2):
            np.testing.assert_allclose(engine.answer(model, prefix, row, strength), packed.total(strength)[window], atol=1e-4)
        for place, request in enumerate(world.requests):
            alone = reranker.score(model, world.examples, some, [request[[window]]])
            np.testing.assert_allclose(alone[0, 0], packed.total()[window, place], atol=1e-4)
            np.testing.assert_allclose(engine.answer(model, prefix, row.only(place))[0], packed.total()[window, place], atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"readout": "index", "loss": "ranknet"}, {"readout": "candidate", "request_position": "before", "loss": "ranknet"}],
    ids=str,
)
def test_other_readouts_take_a_prior_too(world: World, changes: dict[str, Any]) -> None:
    model = trained(world, control="request", **changes)
    parts = reranker.score_parts(model, world.examples, world.pools, world.requests)
    assert (parts.relevance == 0).all() and parts.prior.std() > 0
    np.testing.assert_allclose(parts.total(0), parts.prior)


def test_a_constraint_that_could_not_be_drawn_changes_nothing(world: World) -> None:
    model = trained(world)
    asked = world.requests[1].copy()
    missing = np.concatenate([asked, np.full_like(asked, -1)], axis=1)
    before = np.concatenate([np.full_like(asked, -1), asked], axis=1)
    one, two, three = (reranker.score(model, world.examples, world.pools, [request]) for request in (asked, missing, before))
    np.testing.assert_allclose(two, one, atol=1e-5)
    np.testing.assert_allclose(three, one, atol=1e-5)


def test_a_saved_model_keeps_its_scores(world: World, tmp_path: Path) -> None:
    settings = params(world)
    model = world.build(settings)
    curve = reranker.train(model, world.examples, settings, None)
    reranker.save(model, curve, tmp_path / "kept")
    again = reranker.load(tmp_path / "kept", world.tables.items, world.prepared.vocabulary, settings.reranker)
    wanted = reranker.score(model, world.examples, world.pools, world.requests)
    np.testing.assert_allclose(reranker.score(again, world.examples, world.pools, world.requests), wanted, atol=1e-5)


def test_the_listwise_loss_is_zero_at_its_target_and_a_divergence_elsewhere() -> None:
    torch.manual_seed(0)
    targets, other = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    assert reranker.listwise(targets + 7, targets).item() == pytest.approx(0, abs=1e-6)
    wanted = torch.nn.functional.kl_div(other.log_softmax(-1), targets.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(reranker.listwise(other, targets), wanted.mean())


def test_the_match_loss_counts_present_constraints_only() -> None:
    match, met = torch.tensor([[[[2.0, -2.0], [9.0, 9.0]]]]), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    wanted = torch.nn.functional.softplus(torch.tensor(-2.0))
    torch.testing.assert_close(reranker.match_loss(match, met, torch.tensor([[[1.0, 0.0]]])), wanted)
    assert reranker.match_loss(match, met, torch.zeros(1, 1, 2)).item() == 0


def test_the_loss_does_not_depend_on_the_micro_batch(world: World) -> None:
    """Also where a constraint could not be drawn for one of the windows."""
    gradients = []
    for size in (1, 2):
        settings = params(world, micro_batch=size)
        model = trained(world, micro_batch=size)
        model.model.eval()
        batch = reranker.training_batch(world.examples, settings, 4)
        for request in batch.requests:
            request[0, -1:] = -1
        batch.targets.present[0] = 0
        batch.targets.met[0] = 0
        reranker.backward(model, reranker.make_rows(model, world.examples, batch.pools, batch.requests), batch.targets)
        gradients.append({name: value.grad.clone() for name, value in model.trainable().items() if value.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("truth_bonus", [True, False])
def test_an_exact_model_has_no_loss(world: World, truth_bonus: bool) -> None:
    """Parts that equal the target: gate 1, the truth as relevance, and certain matches."""
    settings = params(world, truth_bonus=truth_bonus, match_loss=0.0)
    batch = reranker.training_batch(world.examples, settings, 4)
    targets, chosen = batch.targets, settings.reranker
    prior = torch.from_numpy(np.stack([world.examples.prior[window] for window in batch.pools.window]))
    control = chosen.control_logits * torch.from_numpy(targets.met.sum(axis=2))
    relevance = chosen.truth_logits * torch.from_numpy(targets.truth)[:, None]
    parts = Parts(relevance, control, torch.ones(control.shape[:2]))
    assert loss_of(parts, prior, targets, chosen).item() == pytest.approx(0, abs=1e-6)
    worse = parts._replace(gate=torch.zeros(control.shape[:2]))
    assert loss_of(worse, prior, targets, chosen).item() > 0.01
    assert targets.truth.any() == truth_bonus
    assert ((targets.strength >= 0) & (targets.strength <= 1)).all() and targets.strength.std() > 0


def test_requests_in_rows_of_their_own_have_the_loss_of_packed_ones(world: World) -> None:
    settings = params(world)
    losses = []
    for packs in (True, False):
        model = trained(world)
        model.packs = packs
        model.model.eval()
        batch = reranker.training_batch(world.examples, settings, 4)
        rows = reranker.make_rows(model, world.examples, batch.pools, batch.requests)
        assert len(rows) == (2 if packs else 8)
        losses.append(reranker.backward(model, rows, batch.targets))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_training_learns_to_match_and_uses_every_parameter(world: World) -> None:
    settings = params(world, steps=60, curriculum_steps=0, requests_per_window=8, lr_head=1e-2)
    model = world.build(settings)
    curve = reranker.train(model, world.examples, settings, None)
    assert curve["loss"].tail(10).mean() < 0.8 * curve["loss"].head(10).mean()
    start = model.start
    moved = {name for name, value in model.trainable().items() if not torch.equal(value, start[name])}
    assert {"head.gate.bias", "head.gate.weight", "head.scale", "head.shift", "head.relevance.weight"} <= moved


def test_resuming_with_another_prior_starts_again(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = params(world)
    reranker.train(world.build(settings), world.examples, settings, tmp_path, stop_after=4)
    other = world.examples._replace(prior={window: prior + 1 for window, prior in world.examples.prior.items()})
    assert len(reranker.train(world.build(settings), other, settings, tmp_path, stop_after=1)) == 1
    assert "was made with other data or parameters" in capsys.readouterr().out


def test_other_seeds_are_trained_on_the_same_windows(world: World, tmp_path: Path) -> None:
    settings = params(world)
    one = reranker.repeat(world.tables.items, world.examples, settings, 1, tmp_path)
    two = reranker.repeat(world.tables.items, world.examples, settings, 2, tmp_path)
    assert (tmp_path / "seed-1" / "adapter").exists() and (tmp_path / "seed-2" / "head.safetensors").exists()
    found = [reranker.score(model, world.examples, world.pools, world.requests) for model in (one, two)]
    assert not np.allclose(*found)


def test_scores_are_read_as_they_were_written(world: World, start_stages: Any) -> None:
    settings = params(world).model_copy(update={"run": "r"})
    stage = start_stages(settings, "reranker")
    rng = np.random.default_rng(0)
    oracle = {("oracle", n): rng.permutation(world.prepared.requests["test", n]) for n in (0, 1, 2)}
    world.examples = world.examples._replace(prepared=world.prepared._replace(others=oracle))
    asked = settings.controls.model_copy(update={"other_protocols": ["oracle"]})
    made = {}
    for seed in (0, 1):
        by_protocol = reranker.score_split(trained(world), world.examples, "test", asked)
        made |= {("corec", "test", seed, protocol): part for protocol, part in by_protocol.items()}
    stage.finish([scores.save(made, world.prepared, [0, 1, 2], stage.folder)])
    for protocol in ("random-candidate", "oracle"):
        read = scores.load("r", protocol)
        assert list(read) == [("corec", "test")] and len(read["corec", "test"]) == 2
        for seed, one in enumerate(read["corec", "test"]):
            for left, right in zip(one, made["corec", "test", seed, protocol], strict=True):
                np.testing.assert_array_equal(left, right)
                assert left.dtype == np.float32
    alone = reranker.score(trained(world), world.examples, world.prepared.pools["test"], [oracle["oracle", n] for n in (0, 1, 2)])
    np.testing.assert_allclose(made["corec", "test", 0, "oracle"].total(), alone, atol=1e-5)
    assert world.examples.prepared.under("oracle").requests["test", 2] is oracle["oracle", 2]
    assert world.examples.prepared.under("oracle").requests["valid", 2] is world.prepared.requests["valid", 2]


def test_targets_for_ranknet_only() -> None:
    targets = Targets.of_control(np.ones((3, 2, 4)))
    assert targets.met.shape == (3, 2, 0, 4) and targets.take([0, 2]).strength.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reranker": {"prior": True}}, "'reranker.prior' needs the scores of a combiner: set evidence.combiner"),
        ({"reranker": {"control": "constraints", "readout": "index"}}, "'constraints' needs the states of the constraints"),
        ({"reranker": {"loss": "listwise", "readout": "index"}}, "'listwise' needs a score with a part for relevance"),
        ({"evidence": {"combiner": "best"}}, "needs training windows that no statistic has seen: set data.held_back"),
        ({"evaluation": {"strengths": [0, 1, 0.5]}}, "'evaluation.strengths' is .* list numbers in ascending order"),
        ({"evaluation": {"strengths": []}}, "'evaluation.strengths'"),
        (
            {"controls": {"other_protocols": ["random-candidate"]}},
            "'controls.other_protocols' .* without that of controls.protocol",
        ),
    ],
)
def test_parameters_that_do_not_go_together(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CorecError, match=sentence):
        Params.checked(changes)


def test_a_model_without_a_prior_has_no_gate() -> None:
    head = reranker.Head(8, 3, RerankerParams(control="constraints"))
    assert not hasattr(head, "gate") and hasattr(head, "scale")
