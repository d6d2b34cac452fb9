from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from corec import CorecError, data, sasrec
from corec.bench import sasrec as bench
from corec.bench.plain import sasrec as textbook
from corec.params import DataParams, SasrecParams

SMALL = SasrecParams(hidden=16, heads=2, layers=1, max_length=10, epochs=3, patience=3, top_k=20, dropout=0.0)


@pytest.fixture
def tables(atomic: Path) -> data.Tables:
    return data.prepare(DataParams(path=str(atomic), core=1))


def test_the_future_is_hidden_and_padding_is_not_seen() -> None:
    torch.manual_seed(0)
    model = sasrec.SASRec(30, SMALL).eval()
    one = torch.tensor([[3, 7, 9, 0, 0]])
    other = torch.tensor([[3, 7, 9, 4, 5]])
    torch.testing.assert_close(model(one)[:, :3], model(other)[:, :3])
    torch.testing.assert_close(model(one)[:, :3], model(one[:, :3]))


def test_pieces_cover_every_target_once() -> None:
    items = np.arange(100, 137)
    for offset in range(2, 12):
        cut = sasrec.pieces(items, 11, offset)
        assert max(map(len, cut)) <= 11
        assert np.concatenate([piece[1:] for piece in cut]).tolist() == items[1:].tolist()


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_loss_is_the_plain_sum_over_positions(kind: str) -> None:
    torch.manual_seed(0)
    model = sasrec.SASRec(12, SMALL).eval()
    sequences = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    torch.manual_seed(1)
    value = sasrec.loss(model, sequences, SMALL.model_copy(update={"loss": kind}))
    terms = []
    torch.manual_seed(1)
    negatives = torch.randint(1, 13, (2, 3))
    for _ in range(10):
        own = (negatives[:, :, None] == sequences[:, None, :]).any(-1)
        negatives = torch.where(own, torch.randint(1, 13, (2, 3)), negatives)
    for user, position in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        scores = model.scores(model(sequences[user : user + 1, : position + 1])[0, -1])
        target = sequences[user, position + 1]
        if kind == "ce":
            terms.append(-scores.log_softmax(-1)[target])
        else:
            pair = scores[torch.stack([target, negatives[user, position]])]
            terms.append(-(torch.sigmoid(pair[0]).log() + torch.sigmoid(-pair[1]).log()) / 2)
            assert negatives[user, position] not in sequences[user]
    torch.testing.assert_close(value, torch.stack(terms).mean())


def test_ranks_against_all_unseen_items_with_ties_against_the_model(tables: data.Tables) -> None:
    model = sasrec.SASRec(len(tables.items), SMALL).eval()
    wanted = sasrec.queries(tables.interactions, tables.windows.query("split == 'test'"), SMALL.max_length)
    ranks = sasrec.rank_targets(model, wanted, batch=7)
    for query in range(0, len(ranks), 9):
        with torch.inference_mode():
            scores = model.scores(model(torch.from_numpy(wanted.inputs[query])[None])[0, -1]).numpy()
        unseen = [item for item in range(1, len(tables.items) + 1) if item not in wanted.seen[query]]
        assert ranks[query] == sum(scores[item] >= scores[wanted.targets[query]] for item in unseen)
    with torch.no_grad():
        model.items.weight.zero_()
    constant = sasrec.rank_targets(model, wanted)
    assert (constant == [len(tables.items) - len(seen) for seen in wanted.seen]).all(), "a constant scorer ranks last"


def test_metrics_of_known_ranks() -> None:
    metrics = sasrec.ranking_metrics(np.array([1, 3, 7, 30]))
    assert metrics["HR@5"] == 0.5 and metrics["HR@10"] == 0.75
    assert metrics["NDCG@5"] == pytest.approx((1 + 0.5) / 4)


def test_training_never_looks_at_the_test_set(tables: data.Tables) -> None:
    params, n_items = SMALL, len(tables.items)
    first = sasrec.train(tables.interactions, tables.windows, n_items, params, seed=1)
    changed = tables.interactions.copy()
    changed.loc[changed["split"] == "test", "item"] = 1
    second = sasrec.train(changed, tables.windows, n_items, params, seed=1)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), "same seed, same result"
    assert len(first.curve) == 3


def test_it_learns_a_cycle() -> None:
    rows = [(user, 1 + (user + step) % 20, "train" if step < 10 else "valid" if step < 11 else "test", step)
            for user in range(60) for step in range(12)]  # fmt: skip
    interactions = pd.DataFrame(rows, columns=["user", "item", "split", "position"])
    windows = data.make_windows(interactions, DataParams(window=3))
    params = SMALL.model_copy(update={"epochs": 40, "patience": 40, "lr": 1e-2, "hidden": 32})
    trained = sasrec.train(interactions, windows, 20, params, seed=0)
    wanted = sasrec.queries(interactions, windows.query("split == 'test'"), params.max_length)
    assert sasrec.ranking_metrics(sasrec.rank_targets(trained.model, wanted))["NDCG@5"] > 0.9


def test_candidates_are_the_best_unseen(tables: data.Tables) -> None:
    model = sasrec.SASRec(len(tables.items), SMALL).eval()
    windows = tables.windows.query("split != 'train'")
    found = sasrec.candidates(model, tables.interactions, windows, SMALL, batch=16)
    wanted = sasrec.queries(tables.interactions, windows, SMALL.max_length)
    with torch.inference_mode():
        scores = model.scores(sasrec.encode(model, wanted.inputs)).numpy()
    for row, items in enumerate(wanted.seen):
        scores[row, items] = -np.inf
    for row, (items, values) in enumerate(zip(found["candidates"], found["scores"], strict=True)):
        assert not set(items) & set(wanted.seen[row]) and 0 not in items
        np.testing.assert_allclose(np.sort(scores[row])[::-1][:20], values, rtol=1e-5, atol=1e-6)


def test_k_larger_than_the_catalogue(tables: data.Tables) -> None:
    model = sasrec.SASRec(len(tables.items), SMALL)
    with pytest.raises(CorecError, match="lower sasrec.top_k and controls.k"):
        sasrec.candidates(model, tables.interactions, tables.windows, SMALL.model_copy(update={"top_k": 55}))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(CorecError, match="not a multiple"):
        sasrec.SASRec(10, SMALL.model_copy(update={"heads": 3}))


def oracle(model: sasrec.SASRec, params: SasrecParams) -> textbook.Textbook:
    """The textbook's version with the same parameters."""
    plain = textbook.Textbook(model.items.num_embeddings - 1, params)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def test_the_fast_loss_and_its_gradient_are_the_textbooks() -> None:
    torch.manual_seed(0)
    fast = SMALL.model_copy(update={"fast": True, "dtype": "float32"})
    model, rng = sasrec.SASRec(300, fast).eval(), np.random.default_rng(0)
    plain = oracle(model, SMALL)
    pieces = [rng.integers(1, 301, length) for length in rng.integers(2, 12, 90)]
    value = sasrec.loss(model, sasrec.pad(pieces), fast)
    value.backward()
    wanted = plain.loss(textbook.pad_full(pieces, 11))
    wanted.backward()
    torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(plain.named_parameters())[name].grad, atol=1e-5, rtol=1e-4)


def test_the_softmax_in_bfloat16_is_near() -> None:
    torch.manual_seed(0)
    states, items = torch.randn(700, 32, requires_grad=True), (0.2 * torch.randn(400, 32)).requires_grad_()
    targets = torch.randint(400, (700,))
    wanted = torch.nn.functional.cross_entropy(states @ items.T, targets)
    exact = torch.autograd.grad(wanted, (states, items))
    for dtype, close in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        value = sasrec.FullSoftmax.apply(states, items, targets, dtype)
        assert value.item() == pytest.approx(wanted.item(), rel=close)
        for mine, theirs in zip(torch.autograd.grad(value, (states, items)), exact, strict=True):
            assert mine.dtype == torch.float32 and (mine - theirs).norm() < close * theirs.norm()


def test_the_learning_rate_rises_and_falls(tables: data.Tables) -> None:
    params = SMALL.model_copy(update={"epochs": 4, "decay": True, "lr": 0.1, "batch_size": 16})
    model, rng = sasrec.SASRec(len(tables.items), params), np.random.default_rng(0)
    optimizer, rates = torch.optim.AdamW(model.parameters()), []
    optimizer.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))
    sequences = list(sasrec.items_by_user(tables.interactions).values())
    for epoch in range(1, 5):
        sasrec.train_epoch(model, optimizer, sequences, params, rng, epoch)
    top = int(np.argmax(rates))
    assert (np.diff(rates[:top]) > 0).all() and (np.diff(rates[top:]) < 0).all()
    assert 0.07 < max(rates) <= 0.1 and rates[0] < 0.05 and 0 < rates[-1] < 0.02


@pytest.mark.parametrize("kind", ["sampled", "gbce"])
def test_losses_against_sampled_items(kind: str) -> None:
    params = SMALL.model_copy(update={"loss": kind, "negatives": 5, "gbce_t": 0.6})
    torch.manual_seed(0)
    model = sasrec.SASRec(12, SMALL).eval()
    sequences = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    torch.manual_seed(1)
    value = sasrec.loss(model, sequences, params)
    torch.manual_seed(1)
    drawn = torch.randint(1, 13, (2, 5)).tolist()
    alpha, terms = 5 / 11, []
    beta = alpha * (0.6 * (1 - 1 / alpha) + 1 / alpha)
    for user, position in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        scores = model.scores(model(sequences[user : user + 1, : position + 1])[0, -1])
        target = int(sequences[user, position + 1])
        others = scores[[item for item in drawn[user] if item != target]]
        if kind == "sampled":
            terms.append(-torch.cat([scores[target][None], others]).log_softmax(0)[0])
        else:
            terms.append(-(torch.sigmoid(scores[target]) ** beta).log() - torch.sigmoid(-others).log().sum())
    torch.testing.assert_close(value, torch.stack(terms).mean())


def test_ranks_and_encodings_are_the_textbooks(tables: data.Tables) -> None:
    torch.manual_seed(0)
    model = sasrec.SASRec(len(tables.items), SMALL).eval()
    wanted = sasrec.queries(tables.interactions, tables.windows.query("split == 'test'"), SMALL.max_length)
    plain = textbook.ranks(oracle(model, SMALL), wanted.inputs, wanted.targets, wanted.seen)
    assert (sasrec.rank_targets(model, wanted, batch=7) == plain).all()
    one = torch.stack([model(torch.from_numpy(items)[None])[0, -1] for items in wanted.inputs])
    torch.testing.assert_close(sasrec.encode(model, wanted.inputs, tokens=30), one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [4, 10])
def test_one_pass_encodes_every_prefix(tables: data.Tables, length: int) -> None:
    params = SMALL.model_copy(update={"max_length": length})
    model = sasrec.SASRec(len(tables.items), params).eval()
    states = sasrec.window_states(model, tables.interactions, tables.windows, params)
    inputs = sasrec.queries(tables.interactions, tables.windows, length).inputs
    torch.testing.assert_close(states, sasrec.encode(model, inputs), atol=1e-5, rtol=1e-5)


def test_batches_hold_every_sequence_once_and_little_padding() -> None:
    rng = np.random.default_rng(0)
    lengths = np.ceil(rng.lognormal(1, 1, 5000)).clip(2, 200).astype(int)
    groups = sasrec.batches(lengths, 64, rng)
    assert sorted(np.concatenate(groups)) == list(range(5000))
    random = [rng.permutation(5000)[start : start + 64] for start in range(0, 5000, 64)]
    assert sasrec.padding_share(lengths, groups) < 0.2 < 0.8 < sasrec.padding_share(lengths, random)
    tokens = np.array([lengths[group].sum() for group in groups])
    assert np.median(tokens) == pytest.approx(64 * lengths.mean(), rel=0.2)


def test_dropout_from_bytes_keeps_the_share_and_the_mean() -> None:
    noise = sasrec.Noise(0.3, fast=True)
    noise.seed(1, 2)
    dropped = noise(torch.ones(200, 500), training=True)
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.01) and dropped.mean() == pytest.approx(1, abs=0.01)
    noise.seed(1, 2)
    torch.testing.assert_close(noise(torch.ones(200, 500), training=True), dropped)
    assert (noise(torch.ones(3), training=False) == 1).all()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", ["ce", "gbce"])
def test_resuming_gives_bitwise_the_same_parameters(tables: data.Tables, tmp_path: Path, kind: str, fast: bool) -> None:
    params = SMALL.model_copy(update={"epochs": 5, "dropout": 0.2, "loss": kind, "negatives": 8, "fast": fast})
    whole = sasrec.train(tables.interactions, tables.windows, len(tables.items), params, seed=1)
    sasrec.train(tables.interactions, tables.windows, len(tables.items), params, seed=1, folder=tmp_path, stop_after=2)
    again = sasrec.train(tables.interactions, tables.windows, len(tables.items), params, seed=1, folder=tmp_path)
    timings = ["seconds", "peak_memory_mb"]
    pd.testing.assert_frame_equal(again.curve.drop(columns=timings), whole.curve.drop(columns=timings))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    other = sasrec.train(tables.interactions, tables.windows, len(tables.items), params, seed=2, folder=tmp_path)
    assert len(other.curve) >= 3 and other.curve["loss"][0] != whole.curve["loss"][0], "another seed does not resume"


def test_every_step_of_the_ladder_trains_the_same_function() -> None:
    rng = np.random.default_rng(0)
    params = SMALL.model_copy(update={"fast": True, "batch_size": 8})
    cut = [rng.integers(1, 51, length) for length in rng.integers(2, 12, 40)]
    rungs = [bench.ladder(level, cut, 50, params) for level in range(len(bench.LADDER))]
    start = {name: value.clone() for name, value in rungs[0].model.state_dict().items()}
    wanted = rungs[0].loss(cut).item()
    for rung in rungs:
        rung.model.load_state_dict(start)
        value = rung.loss(cut)
        assert value.item() == pytest.approx(wanted, rel=5e-3)
        rung.epoch()
        assert rung.loss(cut).item() < value.item()
