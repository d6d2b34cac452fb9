"""Interference of control tokens: the contrast of the rows, cosines by hand, and the study."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_prior import params as with_prior
from test_prior import world_with_priors

from corec import CorecError, pages, paths, reranker
from corec.params import EvaluationParams, StudyParams
from corec.reranker.training import add_contrast, spread
from corec.studies import saturation


def test_the_uniformity_loss_by_hand() -> None:
    one = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
    assert spread(one).item() == pytest.approx(0, abs=1e-6), "one direction; the length does not count"
    assert spread(torch.eye(3)).item() == pytest.approx(-4), "squared distance 2"
    mixed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert spread(mixed).item() == pytest.approx(np.log((2 * np.exp(-4) + np.exp(-8)) / 3), rel=1e-5)
    rows = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spread(x).double(), rows, eps=1e-3, atol=1e-2, rtol=1e-2)


def test_contrast_adds_to_the_gradient_of_the_rows_only(atomic: Path) -> None:
    world = world_with_priors(atomic)
    model = world.build(with_prior(world, row_contrast=0.5))
    values = model.trainable()
    (name,) = [name for name in values if "trainable_tokens" in name]
    (wanted,) = torch.autograd.grad(0.5 * spread(values[name]), values[name])
    for value in values.values():
        value.grad = torch.ones_like(value)
    add_contrast(model)
    torch.testing.assert_close(values[name].grad, wanted + 1)
    assert all((value.grad == 1).all() for other, value in values.items() if other != name)


def test_training_with_contrast_spreads_the_rows(atomic: Path) -> None:
    world = world_with_priors(atomic)
    after = {}
    for weight in (0.0, 10.0):
        params = with_prior(world, row_contrast=weight, steps=10)
        model = world.build(params)
        reranker.train(model, world.examples, params, None)
        rows = next(value for name, value in model.trainable().items() if "trainable_tokens" in name)
        after[weight] = spread(rows).item()
    assert after[10.0] < after[0.0] - 0.01


def test_mean_cosines_by_hand() -> None:
    vectors = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert saturation.mean_cosine(vectors, np.array([0, 0, 1])) == (1.0, 0.0)
    counts = np.array([[0, 0, 1], [0, 0, 0], [0, 0, 0]], dtype=bool)
    assert saturation.mean_cosine(vectors, np.array([0, 0, 0]), counts)[0] == 0
    same, other = saturation.mean_cosine(vectors[:1], np.array([0]))
    assert np.isnan(same) and np.isnan(other)


def test_the_rows_are_those_of_the_values(atomic: Path) -> None:
    world = world_with_priors(atomic)
    params, vocabulary = with_prior(world), world.prepared.vocabulary
    model = world.build(params)
    names = saturation.value_tokens(vocabulary)
    assert len(names) == len(vocabulary.labels) and set(names) <= set(reranker.new_tokens(vocabulary, params.reranker))
    assert all(label in name for name, label in zip(names, vocabulary.labels, strict=True))
    same, other = saturation.mean_cosine(reranker.token_rows(model, names).to_numpy(), vocabulary.attribute_of)
    row = saturation.cosines(model, world.examples, params).iloc[0]
    assert (row["of"], row["same"], row["other"]) == ("rows", same, other)


def test_the_study_of_saturation(atomic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_with_priors(atomic)
    own = with_prior(world, seeds=2).model_copy(update={"evaluation": EvaluationParams(bootstrap=20), "run": "tried"})
    own = own.model_copy(update={"study": StudyParams(contrast=[0.1, 3], seeds=2)})
    stage = paths.stage_dir("tried", "reranker")
    for place, seed in ((stage, 0), (stage / "seed-1", 1)):
        place.mkdir(parents=True)
        model = reranker.build(world.tables.items, world.prepared.vocabulary, own.reranker, seed)
        reranker.save(model, reranker.train(model, world.examples, own.model_copy(update={"seed": seed}), None), place)
    made = saturation.compare(world.tables, world.examples, own, tmp_path / "scores")
    assert {name: len(each) for name, each in made.trained.items()} == {
        "before training": 1, "corec": 2, "corec, contrast": 2,
    }  # fmt: skip
    assert list(made.chosen) == ["0", "0.1", "3"] and made.weight in (0.1, 3)
    assert len(list((tmp_path / "scores").glob("contrast-*.npz"))) == 3
    monkeypatch.setattr(saturation, "train", lambda *_: pytest.fail("it is read, not trained again"))
    again = saturation.compare(world.tables, world.examples, own, tmp_path / "scores")
    assert again.weight == made.weight
    users = world.tables.windows.set_index("window").loc[world.prepared.pools["test"].window, "user"].to_numpy()
    table = saturation.measure(made, world.examples, users, own)
    pd.testing.assert_frame_equal(table, saturation.measure(again, world.examples, users, own))
    gaps = table[table["metric"] == "cp_gap"]
    assert (gaps["value"] <= 1e-9).all() and (table[table["model"] == "corec"]["ahead"] == 0).all()
    assert (table[table["metric"] == "cd_gap"]["value"] >= -1e-9).all()
    similar = saturation.similarity(made.trained)
    pd.testing.assert_frame_equal(similar, saturation.similarity(again.trained), rtol=1e-4)
    assert set(similar["of"]) == set(saturation.OF) and similar["other"].between(-1, 1).all()
    alone = table[table["model"] == saturation.ALONE]
    assert set(alone["n_tokens"]) == {2}, "one constraint cannot interfere with itself"
    one = made.trained["corec"][0]
    assert one.alone is not None and (one.alone[1] == one.test.control[:, 1]).all()
    assert abs(one.alone[2] - one.test.control[:, 2]).max() < 4, "nearly the sum of both"
    written = saturation.keep(table, similar, tmp_path / "figures")
    assert sorted(path.name for path in written) == ["saturation.csv", "saturation.png", "similarity.csv"]
    assert (tmp_path / "figures" / "results.md").read_text() == pages.study_page(tmp_path / "figures")


@pytest.mark.parametrize("changes", [{"values": "words"}, {"row_contrast": 0.1}, {"lr_rows": 0.0}], ids=str)
def test_without_tokens_to_train_nothing_is_trained(atomic: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    world = world_with_priors(atomic)
    with pytest.raises(
        CorecError, match="set reranker.values to 'token', reranker.lr_rows above 0 and reranker.row_contrast to 0"
    ):
        saturation.compare(world.tables, world.examples, with_prior(world, **changes), tmp_path)
