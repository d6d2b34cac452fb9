"""Tastes planted in synthetic files of Amazon's format must be found again by the pipeline."""

from pathlib import Path

import numpy as np
import pytest

from corec import controls, data, evaluation, reranker, sasrec
from corec.data import synthetic
from corec.params import ControlsParams, DataParams, MaxWindows, Params, RerankerParams, SasrecParams

K = 10


class Shop:
    """Stages 01 to 03 on a synthetic shop."""

    def __init__(self, folder: Path, tastes: tuple[str, ...], n_tokens: list[int]) -> None:
        synthetic.write(folder, users=500, items=160, reviews=16000, brands=8, tastes=tastes, strength=0.9, seed=1)
        required = ["title", "description", "brand", "rank", "price"]
        source = DataParams(source="amazon-2018", category="Synthetic", path=str(folder), required=required, window=4)
        self.tables = data.prepare(source)
        retriever = SasrecParams(hidden=32, max_length=40, lr=5e-3, epochs=60, patience=15, dropout=0.2, top_k=20)
        self.trained = sasrec.train(self.tables.interactions, self.tables.windows, len(self.tables.items), retriever, seed=0)
        found = sasrec.candidates(self.trained.model, self.tables.interactions, self.tables.windows, retriever)
        limits = MaxWindows(train=1500, valid=60, test=100)
        asked = ControlsParams(scheme="amazon", k=K, n_tokens=n_tokens, max_windows=limits)
        self.prepared = controls.prepare(self.tables.windows, found, self.tables.items, asked, seed=0)
        language = RerankerParams(backbone="tiny", steps=30, curriculum_steps=30, batch_size=4, title_tokens=2)
        self.params = Params(controls=asked, reranker=language)

    def test_queries(self, params: SasrecParams) -> sasrec.Queries:
        windows = self.tables.windows
        return sasrec.queries(self.tables.interactions, windows[windows["split"] == "test"], params.max_length)


def popularity_ndcg(shop: Shop, wanted: sasrec.Queries) -> float:
    """NDCG@10 of ranking all unseen items by their training count."""
    counts = np.concatenate([[-1], shop.tables.items.sort_values("item")["train_count"]]).astype(float)
    ranks = []
    for target, seen in zip(wanted.targets, wanted.seen, strict=True):
        scores = counts.copy()
        scores[seen] = -1
        ranks.append((scores >= scores[target]).sum())
    return sasrec.ranking_metrics(np.array(ranks))["NDCG@10"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


def test_planted_tastes_are_found_again(cache: Path) -> None:
    shop = Shop(cache / "all", synthetic.TASTES, [0, 1, 2])
    wanted = shop.test_queries(SasrecParams(max_length=40))
    ours = sasrec.ranking_metrics(sasrec.rank_targets(shop.trained.model, wanted))["NDCG@10"]
    assert ours > 1.5 * popularity_ndcg(shop, wanted), "the retriever knows more than popularity"
    examples = reranker.load_examples(shop.tables.windows, shop.prepared)
    model = reranker.build(shop.tables.items, shop.prepared.vocabulary, shop.params.reranker, seed=0)
    pools, precision = shop.prepared.pools["test"], []
    for _ in range(2):
        requests = [shop.prepared.requests["test", n] for n in (1, 2)]
        scores = reranker.score(model, examples, pools, requests)
        for place, request in enumerate(requests):
            judged = evaluation.judge(pools, request, shop.prepared.vocabulary.values_of)
            n = request.shape[1]
            precision += [evaluation.by_window(evaluation.order_by(scores[:, place]), judged, [3])["cp", 3, n].mean()]
        reranker.train(model, examples, shop.params, None)
    assert precision[2] > precision[0] + 0.1 and precision[3] > precision[1] + 0.1, "control precision rises with training"


def test_with_tastes_in_brand_the_brand_token_changes_the_ranking_and_others_do_not(cache: Path) -> None:
    """Only the brand tells candidates apart here: a token of what they all share must not move them against each other."""
    shop = Shop(cache / "brand", ("brand",), [0, 1])
    examples = reranker.load_examples(shop.tables.windows, shop.prepared)
    model = reranker.build(shop.tables.items, shop.prepared.vocabulary, shop.params.reranker, seed=0)
    reranker.train(model, examples, shop.params, None)
    table, pools = shop.prepared.vocabulary, shop.prepared.pools["test"]
    rng = np.random.default_rng(0)
    requests = [np.empty((len(pools.window), 0), dtype=int)]
    for number in range(len(table.attributes)):
        values = np.flatnonzero(table.attribute_of == number)
        requests.append(rng.choice(values, (len(pools.window), 1)))
    scores = reranker.score(model, examples, pools, requests)
    centred = scores - scores.mean(axis=2, keepdims=True)  # what all candidates gain alike changes no ranking
    moved = np.sqrt(np.mean((centred[:, 1:] - centred[:, :1]) ** 2, axis=(0, 2)))
    found = dict(zip((attribute.name for attribute in table.attributes), moved.tolist(), strict=True))
    brand = found.pop("brand")
    assert brand > 4 * max(found.values())
