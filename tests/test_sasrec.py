from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from corec import CorecError, data, sasrec
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
    value = sasrec.loss(model, sequences, kind)
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
    scores = sasrec.unseen_scores(model, wanted, slice(0, None)).detach().numpy()
    for row, (items, values) in enumerate(zip(found["candidates"], found["scores"], strict=True)):
        assert not set(items) & set(wanted.seen[row]) and 0 not in items
        np.testing.assert_allclose(np.sort(scores[row])[::-1][:20], values, rtol=1e-5)


def test_k_larger_than_the_catalogue(tables: data.Tables) -> None:
    model = sasrec.SASRec(len(tables.items), SMALL)
    with pytest.raises(CorecError, match="lower sasrec.top_k and controls.k"):
        sasrec.candidates(model, tables.interactions, tables.windows, SMALL.model_copy(update={"top_k": 55}))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(CorecError, match="not a multiple"):
        sasrec.SASRec(10, SMALL.model_copy(update={"heads": 3}))
