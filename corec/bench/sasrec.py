"""``python -m corec.bench sasrec``: the retriever compared with a textbook version and with bare matrix products."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from corec import data, machine, sasrec
from corec.bench.clock import Timing, process
from corec.bench.plain import sasrec as textbook
from corec.params import DataParams, SasrecParams

# Program of a whole training of the retriever on MovieLens-100K. Prints the seconds to 95 % of the best validation NDCG@10, the
# peak memory in MB and the best validation NDCG@10.
TO_95 = """
import sys
from corec import data, profiles, sasrec
from corec.studies import retriever
settings = profiles.load("params/ml-100k-ranknet.yaml")
own = settings.sasrec.model_copy(update={"fast": sys.argv[1] == "fast"})
tables = data.prepare(settings.data)
trained = sasrec.train(tables.interactions, tables.windows, len(tables.items), own, 0)
row = retriever.summary_row(trained, tables, settings)
print(row["seconds_to_95"], trained.curve["peak_memory_mb"].iloc[-1], row["valid NDCG@10"])
"""


def short_tailed(users: int, n_items: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random sequences with lengths as in the Amazon data: median 3 items, at most 200."""
    lengths = np.ceil(rng.lognormal(np.log(2.6), 0.95, users)).clip(2, 200).astype(int)
    return [rng.integers(1, n_items + 1, length) for length in lengths]


# Steps from the textbook training to that of corec.sasrec.
LADDER = (
    "textbook: everything padded to 200, attention written out, all logits",
    "fused attention (is_causal)",
    "only real positions meet the items",
    "padding to the longest of the batch",
    "batches of like length",
    "softmax and its gradient in blocks",
    "dropout from bytes",
    "fused AdamW",
    "bfloat16 products where they are faster",
)


class Rung(NamedTuple):
    """Training with the first steps of :data:`LADDER`."""

    model: Any
    loss: Callable[[list[np.ndarray]], Any]  # loss of a list of sequences
    epoch: Callable[[], None]  # one pass over all sequences


def ladder(level: int, cut: list[np.ndarray], n_items: int, params: Any) -> Rung:
    """Set up training with the first `level` steps of :data:`LADDER`.

    Parameters
    ----------
    level
        Number of steps after the textbook version, 0 to 8.
    cut
        Item sequences, each of at most ``max_length + 1`` items.
    n_items
        Number of items.
    params
        Parameters of SASRec.
    """
    rng = np.random.default_rng(0)
    settings = params.model_copy(update={"fast": level >= 5, "dtype": "auto" if level >= 8 else "float32"})
    plain, optimised = textbook.Textbook(n_items, settings), sasrec.SASRec(n_items, settings)
    optimised.noise.fast = level >= 6
    model = optimised if level else plain
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=level >= 7)
    lengths = np.array([len(piece) for piece in cut])

    def loss(batch: list[np.ndarray]) -> torch.Tensor:
        sequences = sasrec.pad(batch) if level >= 3 else textbook.pad_full(batch, settings.max_length + 1)
        if level == 0:
            return plain.loss(sequences)
        if level == 1:
            scores = optimised.scores(optimised(sequences[:, :-1]))
            return F.cross_entropy(scores.flatten(0, 1), sequences[:, 1:].flatten(), ignore_index=0)
        return sasrec.loss(optimised, sequences, settings)

    def epoch() -> None:
        model.train()
        order = rng.permutation(len(cut))
        size = settings.batch_size
        random = [order[start : start + size] for start in range(0, len(cut), size)]
        for group in sasrec.batches(lengths, size, rng) if level >= 4 else random:
            value = loss([cut[place] for place in group])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

    return Rung(model, loss, epoch)


def bench_sasrec() -> Iterator[Timing]:
    """Time training of SASRec step by step from the textbook version, inference, and time to 95 % of the best NDCG@10."""
    params = SasrecParams(hidden=64, layers=2, heads=2, dropout=0.2, max_length=200, batch_size=128, fast=True)
    tables = data.prepare(DataParams(source="ml-1m"))
    train = tables.interactions[tables.interactions["split"] == "train"]
    rng, n_items = np.random.default_rng(0), len(tables.items)
    long = list(sasrec.items_by_user(train).values())
    for name, sequences in (("ml1m", long), ("short", short_tailed(60_000, n_items, rng))):
        cut = [piece for items in sequences for piece in sasrec.pieces(items, params.max_length + 1, params.max_length + 1)]
        cut = [cut[place] for place in rng.permutation(len(cut))[: 8 * params.batch_size * (1 if name == "ml1m" else 4)]]
        lengths = np.array([len(piece) for piece in cut])
        count = int(lengths.sum() - len(cut))
        times: list[float] = []
        for level, label in enumerate(LADDER):
            times.append(machine.seconds(ladder(level, cut, n_items, params).epoch))
            before, ratio = (LADDER[level - 1], times[-2] / times[-1]) if level else ("", None)
            yield Timing(f"ladder_{name}_{level}: {label}", count / times[-1], "interactions/s", before, ratio)
        yield Timing(f"train_textbook_{name}", count / times[0], "interactions/s")
        yield Timing(f"train_vs_textbook_{name}", count / times[-1], "interactions/s", "textbook", times[0] / times[-1])
        order, size = rng.permutation(len(cut)), params.batch_size
        random = [order[start : start + size] for start in range(0, len(cut), size)]
        yield Timing(f"padding_{name}_full", 1 - count / (len(cut) * params.max_length), "share")
        yield Timing(f"padding_{name}_batch", sasrec.padding_share(lengths - 1, random), "share")
        yield Timing(f"padding_{name}_bucketed", sasrec.padding_share(lengths - 1, sasrec.batches(lengths, size, rng)), "share")
    yield from bench_encoding(tables, params)
    slow, fast = process(TO_95, "plain")[1], process(TO_95, "fast")[1]
    yield Timing("seconds_to_95_ml100k", fast[0], "s", f"fast: false, {slow[0]:.1f} s", slow[0] / fast[0])
    yield Timing("peak_to_95_ml100k", fast[1], "MB", f"fast: false, {slow[1]:.0f} MB")
    yield Timing("valid_ndcg10_ml100k", fast[2], "", f"fast: false, {slow[2]:.4f}")


def bench_encoding(tables: Any, params: Any) -> Iterator[Timing]:
    """Time encoding, full ranking and retrieval on MovieLens-1M, compared with bare matrix products of the same shapes.

    The weights are random, because the time does not depend on them.
    """
    n_items, rng = len(tables.items), np.random.default_rng(0)
    model = sasrec.SASRec(n_items, params).eval()
    items = sasrec.items_by_user(tables.interactions)
    batch, length, width, head = 64, params.max_length, params.hidden, params.hidden // params.heads
    ids = torch.from_numpy(rng.integers(1, n_items + 1, (batch, length)))
    states, square = torch.randn(batch * length, width), torch.randn(width, width)
    triple, one = torch.randn(width, 3 * width), torch.randn(batch * params.heads, length, head)
    weights = torch.randn(batch * params.heads, length, length)

    def products() -> None:
        for _ in range(params.layers):
            states @ triple
            one @ one.transpose(1, 2)
            weights @ one
            for _ in range(3):
                states @ square

    with torch.inference_mode():
        bare, whole = machine.seconds(products), machine.seconds(lambda: model(ids))
        flop = params.layers * (2 * batch * length * width * 6 * width + 4 * batch * params.heads * length**2 * head)
        yield Timing(
            "encode_vs_matmul_rate", flop / whole / 1e9, "GFLOP/s", f"bare products, {flop / bare / 1e9:.0f}", bare / whole
        )
        test = tables.windows[tables.windows["split"] == "test"]
        queries = sasrec.queries(tables.interactions, test, params.max_length)
        encoded = sasrec.encode(model, queries.inputs)

        def sort() -> None:
            for start in range(0, len(encoded), 1024):
                model.scores(encoded[start : start + 1024]).argsort(descending=True)

        counting, sorting = machine.seconds(lambda: sasrec.rank_states(model, encoded, queries)), machine.seconds(sort)
        yield Timing("full_ranking_6040_users_s", counting, "s", f"product and sorting, {sorting:.2f} s", sorting / counting)
        yield Timing("full_ranking_users", len(encoded) / counting, "users/s")
        users = list(items)
        positions = [np.arange(1, len(items[user])) for user in users]
        prefixes = torch.randn(sum(map(len, positions)), width)
        parts = np.cumsum([0, *map(len, positions)])

        def retrieve() -> None:
            for user, place, start, stop in zip(users, positions, parts[:-1], parts[1:], strict=True):
                for first in range(0, stop - start, 256):
                    chunk = slice(start + first, min(start + first + 256, stop))
                    sasrec.retrieve(model, prefixes[chunk], items[user], place[first : first + 256], 50)

        def matmul_and_topk() -> None:
            for start in range(0, len(prefixes), 256):
                (prefixes[start : start + 256] @ model.items.weight.T).topk(50)

        bare, whole = machine.seconds(matmul_and_topk), machine.seconds(retrieve)
        yield Timing("retrieve_vs_matmul_topk", whole, "s", f"matrix product + topk, {bare:.1f} s", whole / bare)
