from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from corec import CorecError, backbones, controls, data, evidence, sasrec, scores, stages
from corec.data import Tables
from corec.data.split import describe_items
from corec.evidence import combiner, features
from corec.evidence.text import title_embeddings
from corec.params import ControlsParams, DataParams, EvidenceParams, MaxWindows, Params, SasrecParams

K = 6
SETTINGS = EvidenceParams(combiner="linear", history=5, recent=3, folds=2)


class World:
    """A small data set with held-back interactions, and pools of random candidates."""

    def __init__(self, atomic: Path, held_back: int = 3) -> None:
        self.tables = data.prepare(DataParams(path=str(atomic), core=1, window=2, held_back=held_back))
        rng, windows = np.random.default_rng(0), self.tables.windows
        found = [
            np.r_[target, rng.choice(np.setdiff1d(np.arange(1, 50), target), K - 1, replace=False)]
            for target in windows["target"]
        ]
        frame = pd.DataFrame(
            {"window": windows["window"], "candidates": found, "scores": list(rng.normal(size=(len(windows), K)))}
        )
        settings = ControlsParams(
            k=K, n_tokens=[0, 1, 2], train_truth="any", max_windows=MaxWindows(train=200, valid=40, test=40)
        )
        self.prepared = controls.prepare(windows, frame, self.tables.items, settings, seed=0)

    def gather(self, tables: Tables | None = None, split: str = "train", titles: np.ndarray | None = None) -> evidence.Evidence:
        tables = tables or self.tables
        similar = evidence.similarity_tables(tables, self.prepared.vocabulary, SETTINGS, titles)
        return evidence.gather(tables, self.prepared.pools[split], similar, SETTINGS)


@pytest.fixture
def world(atomic: Path) -> World:
    return World(atomic)


def test_held_back_interactions_are_the_latest_of_training(world: World) -> None:
    for _, own in world.tables.interactions.groupby("user"):
        assert own["split"].tolist() == ["train"] * (len(own) - 5) + ["held-back"] * 3 + ["valid", "test"]
    windows = world.tables.windows
    assert set(windows["split"]) == {"in-sample", "train", "valid", "test"}
    held = world.tables.interactions.query("split == 'held-back'")
    merged = windows.query("split == 'train'").merge(held, on=["user", "position"])
    assert len(merged) == len(held) and (merged["target"] == merged["item"]).all()
    before = windows.query("split == 'in-sample'").groupby("user")["position"]
    assert (before.max() == windows.query("split == 'train'").groupby("user")["position"].min() - 1).all()
    assert before.size().max() == 3


def test_at_most_half_of_the_training_interactions_are_held_back(atomic: Path) -> None:
    tables = data.prepare(DataParams(path=str(atomic), core=1, held_back=100))
    assert tables.interactions["split"].value_counts().to_dict() == {"train": 200, "held-back": 200, "valid": 40, "test": 40}


def test_nothing_is_held_back_by_default(atomic: Path) -> None:
    tables = data.prepare(DataParams(path=str(atomic), core=1))
    assert set(tables.windows["split"]) == {"train", "valid", "test"}
    assert set(tables.interactions["split"]) == {"train", "valid", "test"}


def test_evidence_against_loops(world: World) -> None:
    tables, pools = world.tables, world.prepared.pools["train"]
    rng = np.random.default_rng(1)
    titles = np.r_[np.zeros((1, 4)), rng.normal(size=(len(tables.items), 4))].astype(np.float32)
    titles[1:] /= np.linalg.norm(titles[1:], axis=1, keepdims=True)
    found = world.gather(titles=titles)
    assert found.names == evidence.NAMES and found.values.shape == (len(pools.window), K, len(evidence.NAMES))
    train = tables.interactions.query("split == 'train'")
    users = {item: set(own["user"]) for item, own in train.groupby("item")}
    sequences = [own["item"].tolist() for _, own in train.groupby("user")]
    counts = train["item"].value_counts()

    def cosine(left: int, right: int) -> float:
        one, two = users.get(left, set()), users.get(right, set())
        return len(one & two) / np.sqrt(len(one) * len(two)) if one and two and left != right else 0.0

    def follows(left: int, right: int) -> float:
        times = sum(s[i] == left and right in s[i + 1 : i + 4] for s in sequences for i in range(len(s)))
        return times / np.sqrt(counts.get(left, 1) * counts.get(right, 1))

    vocabulary = world.prepared.vocabulary
    weight = np.log((len(tables.items) + 1) / np.maximum(vocabulary.frequency(), 1))

    def vector(item: int) -> np.ndarray:
        row = np.zeros(len(vocabulary.labels))
        values = vocabulary.values_of[item]
        row[values[values >= 0]] = weight[values[values >= 0]]
        return row / max(np.linalg.norm(row), 1e-9)

    windows = tables.windows.set_index("window")
    for row in range(0, len(pools.window), 17):
        window = windows.loc[pools.window[row]]
        earlier = (tables.interactions["user"] == window["user"]) & (tables.interactions["position"] < window["position"])
        own = tables.interactions.loc[earlier, "item"].tolist()[::-1]
        history, recent = own[:5], own[:3]
        for place in range(K):
            item = pools.candidates[row, place]
            values = dict(zip(found.names, found.values[row, place], strict=True))
            wanted = {
                "popularity": np.log1p(counts.get(item, 0)),
                "rank": -np.log2(2 + pools.retriever_rank[row, place]),
                "cosine_last": np.sqrt(cosine(own[0], item)),
                "cosine_recent": np.sqrt(np.mean([cosine(h, item) for h in recent])),
                "cosine_history": np.sqrt(np.mean([cosine(h, item) for h in history])),
                "next_last": np.sqrt(follows(own[0], item)),
                "next_recent": np.sqrt(sum(follows(h, item) / (i + 1) for i, h in enumerate(recent)) / (1 + 1 / 2 + 1 / 3)),
                "values_recent": np.mean([vector(h) @ vector(item) for h in recent]),
                "values_history": np.mean([vector(h) @ vector(item) for h in history]),
                "text_last": titles[own[0]] @ titles[item],
                "text_recent": np.mean([titles[h] @ titles[item] for h in recent]),
            }
            for name, value in wanted.items():
                assert values[name] == pytest.approx(value, abs=1e-5), name


def test_sparse_similarities_give_the_same_evidence(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = world.gather()
    monkeypatch.setattr(features, "DENSE", 0)
    np.testing.assert_allclose(world.gather().values, dense.values, atol=1e-6)
    assert "text_last" not in dense.names, "no text, no evidence from text"


@pytest.mark.parametrize(("changed", "untouched"), [(["test"], ["train", "valid", "test"]), (["valid", "test"], ["train", "valid"]),
                                                   (["held-back", "valid", "test"], [])])  # fmt: skip
def test_no_later_interaction_leaks_into_the_evidence(world: World, changed: list[str], untouched: list[str]) -> None:
    """A marker in later interactions (another item, another rating) is looked for in every kind of evidence of earlier ones."""
    later = world.tables.interactions["split"].isin(changed)
    marked = world.tables.interactions.copy()
    marked.loc[later, "item"] = 7
    marked.loc[later, "rating"] = 99.0
    tables = world.tables._replace(interactions=marked)
    for split in untouched:
        np.testing.assert_array_equal(world.gather(tables, split).values, world.gather(split=split).values)
    old, new = (evidence.similarity_tables(t, world.prepared.vocabulary, SETTINGS) for t in (world.tables, tables))
    for name in ("cosine", "next"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name))


def marked(tables: Tables, splits: list[str]) -> pd.DataFrame:
    """Interactions of which those of `splits` have another item and rating."""
    interactions = tables.interactions.copy()
    later = interactions["split"].isin(splits)
    interactions.loc[later, "item"] = interactions.loc[later, "item"] % 50 + 1
    interactions.loc[later, "rating"] = 99.0
    return interactions


def test_no_later_interaction_leaks_into_the_buckets(world: World) -> None:
    columns = ["item_id", "title", "train_count", "popularity_rank", "mean_rating", "rating_std"]
    catalogue = world.tables.catalogue.drop(columns="complete")
    names = world.tables.items.set_index("item")["item_id"]
    plain, later = (
        table.assign(item_id=names[table["item"]].to_numpy())
        for table in (world.tables.interactions, marked(world.tables, ["held-back", "valid", "test"]))
    )
    one, two = (describe_items(catalogue, table).set_index("item")[columns] for table in (plain, later))
    common = one.index.intersection(two.index)
    pd.testing.assert_frame_equal(one.loc[common], two.loc[common])
    tables = [
        items.reset_index().merge(catalogue.drop(columns="title"), on="item_id") for items in (one.loc[common], two.loc[common])
    ]
    first, second = (controls.build_vocabulary(items.assign(item=range(1, len(items) + 1)), ControlsParams()) for items in tables)
    np.testing.assert_array_equal(first.values_of, second.values_of)


def test_no_test_interaction_leaks_into_the_candidates(world: World) -> None:
    """The retriever is trained on ``train`` and selected on ``valid``; test interactions change no weight and no candidate."""
    settings = SasrecParams(hidden=8, epochs=2, top_k=10, max_length=10)
    tables, n_items = world.tables, len(world.tables.items)
    found = []
    for interactions in (tables.interactions, marked(tables, ["test"])):
        trained = sasrec.train(interactions, tables.windows, n_items, settings, seed=0)
        found.append((trained.model, sasrec.candidates(trained.model, interactions, tables.windows, settings)))
    (one, first), (two, second) = found
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value)
    best = (first, second)
    np.testing.assert_array_equal(np.stack(list(best[0]["candidates"])), np.stack(list(best[1]["candidates"])))
    np.testing.assert_array_equal(np.stack(list(best[0]["scores"])), np.stack(list(best[1]["scores"])))


def test_statistics_of_the_items_end_before_the_held_back_interactions(world: World) -> None:
    train = world.tables.interactions.query("split == 'train'")["item"].value_counts()
    items = world.tables.items.set_index("item")["train_count"]
    assert items.sum() == len(world.tables.interactions.query("split == 'train'"))
    assert all(items[item] == count for item, count in train.items())


def made(windows: int, seed: int, strength: float = 2.0) -> tuple[evidence.Evidence, controls.Pools]:
    """Evidence of which the first column predicts the true item: P(i) = softmax(strength * x_i)."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(windows, K, 3)).astype(np.float32)
    odds = np.exp(strength * values[..., 0])
    truth = np.array([rng.choice(K, p=row / row.sum()) for row in odds])
    ranks = np.tile(np.arange(K), (windows, 1))
    candidates = rng.integers(1, 50, (windows, K))
    return evidence.Evidence(["a", "b", "c"], values), controls.Pools(
        np.arange(windows), candidates, ranks, -ranks.astype(float), truth
    )


@pytest.mark.parametrize("kind", ["linear", "lambdarank", "best"])
def test_the_combiner_finds_what_predicts_and_is_calibrated(kind: str) -> None:
    parts = {split: made(900 if split == "train" else 300, seed) for seed, split in enumerate(("train", "valid", "test"))}
    found, pools = ({split: part[place] for split, part in parts.items()} for place in (0, 1))
    settings = EvidenceParams(combiner=kind, folds=3)  # type: ignore[arg-type]
    combined = evidence.combine(found, pools, np.arange(900) // 3, settings, seed=0)
    assert combined.weights.abs().idxmax() == "a" and combined.table["chosen"].sum() == 1
    best = combiner.ndcg(found["test"].values[..., 0], pools["test"].truth).mean()
    assert combiner.ndcg(combined.priors["test"], pools["test"].truth).mean() > best - 0.05
    for split in ("train", "valid", "test"):
        slope = np.polyfit(found[split].values[..., 0].ravel(), combined.priors[split].ravel(), 1)[0]
        assert slope == pytest.approx(2.0, abs=0.5 if combined.table["chosen"].iloc[1] else 0.9), "log-odds"
        np.testing.assert_allclose(combined.priors[split].mean(axis=1), 0, atol=1e-5)


def test_scores_of_training_windows_are_out_of_fold() -> None:
    """All evidence but one is noise, so a model that had seen a window would put its true item first."""
    rng = np.random.default_rng(0)
    found, pools = {}, {}
    for split in ("train", "valid", "test"):
        part, pools[split] = made(150, 3, strength=1.0)
        values = np.concatenate([part.values[..., :1], rng.normal(size=(150, K, 200))], axis=2).astype(np.float32)
        found[split] = evidence.Evidence([f"x{i}" for i in range(201)], values)
    combined = evidence.combine(found, pools, np.arange(150), EvidenceParams(combiner="linear", folds=5), seed=0)
    scorer, _ = combiner.fit_linear(found["train"].values, pools["train"].truth, 0)
    seen = combiner.ndcg(scorer(found["train"].values), pools["train"].truth).mean()
    unseen = combiner.ndcg(combined.priors["train"], pools["train"].truth).mean()
    alone = combiner.ndcg(found["train"].values[..., 0], pools["train"].truth).mean()
    assert seen > alone + 0.1 and unseen < alone


def test_too_few_windows_for_a_combiner_are_named() -> None:
    parts = {split: made(12, seed) for seed, split in enumerate(("train", "valid", "test"))}
    found, pools = ({split: part[place] for split, part in parts.items()} for place in (0, 1))
    with pytest.raises(CorecError, match="evidence.combiner: only 12 training and 12 validation windows .* raise controls.k"):
        evidence.combine(found, pools, np.arange(12), EvidenceParams(combiner="linear"), seed=0)


def test_evidence_that_predicts_nothing_gives_no_prior(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {split: made(120, 0) for split in ("train", "valid", "test")}
    found, pools = ({split: part[place] for split, part in parts.items()} for place in (0, 1))
    # What predicts for the users of one fold predicts the opposite for those of the other.
    found["train"].values[60:, :, 0] *= -1
    found = {split: part._replace(names=["a"], values=part.values[..., :1]) for split, part in found.items()}
    combined = evidence.combine(found, pools, np.repeat([0, 1], 60), EvidenceParams(combiner="linear", folds=2), seed=0)
    assert "do not predict the next item of other users: the prior is 0" in capsys.readouterr().out
    assert all((prior == 0).all() for prior in combined.priors.values())


def test_ties_count_against_the_true_item() -> None:
    equal = np.zeros((1, K))
    assert combiner.ndcg(equal, np.array([2]))[0] == 0 and combiner.ndcg(equal[:, :2], np.array([0]))[0] == 1 / np.log2(3)
    assert combiner.ndcg(equal, np.array([-1]))[0] == 0


def test_titles_are_embedded_once_each_and_whitened() -> None:
    titles = [f"Film number {number}" for number in range(90)] + [""]
    found = title_embeddings(titles, "tiny")
    assert found.shape == (92, 64) and (found[0] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(found[1:], axis=1), 1, atol=1e-5)
    assert abs((found[1:] @ found[1:].T)[np.triu_indices(91, 1)].mean()) < 0.1, "means of states would all be alike"
    np.testing.assert_allclose(title_embeddings(titles[:90], "tiny")[1] @ title_embeddings(titles[:90], "tiny")[1], 1, atol=1e-5)


def test_the_encoder_of_sentences_gives_the_mean_of_its_last_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", "number", "one", "two"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    bert = BertModel(config).eval()
    bert.save_pretrained(tmp_path)
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(tmp_path)
    monkeypatch.setattr(backbones, "extract", lambda archive, member: tmp_path / Path(member).name)
    found = title_embeddings(["film number one", "two"], "minilm")
    with torch.no_grad():
        wanted = bert(input_ids=torch.tensor([[2, 8, 3]])).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found[2], (wanted / wanted.norm()).numpy(), atol=1e-5)
    assert found.shape == (3, 16) and (found[0] == 0).all()


def test_a_missing_language_model_of_the_titles_is_named() -> None:
    with pytest.raises(CorecError, match="Parameter evidence.text: no causal language model '/no/such' could be loaded"):
        title_embeddings(["a"], "/no/such")


def test_evidence_is_read_as_it_was_written(world: World) -> None:
    params = Params(
        run="r",
        controls=ControlsParams(k=K, n_tokens=[0, 1, 2]),
        data=DataParams(held_back=3),
        evidence=SETTINGS,
        figures={"k": 5},
    )  # type: ignore[arg-type]
    for name in ("data", "sasrec"):
        stages.start(params, name).finish()
    stage = stages.start(params, "controls")
    similar = evidence.similarities_of(world.tables, world.prepared.vocabulary, params)
    found, combined = evidence.make(world.tables, world.prepared, similar, params)
    stage.finish([evidence.save(found, world.prepared.pools, combined.priors, stage.folder)])
    for split, prior in scores.load_evidence("r").items():
        np.testing.assert_array_equal(prior, combined.priors[split])
    np.testing.assert_array_equal(scores.load_evidence("r", "cosine_last")["test"], found["test"].values[..., 4])
    assert scores.load_evidence("r", "text_last") == {}
