"""The prompt: new tokens, rows of token numbers, and batches of rows.

A window becomes a *prefix* (instruction, history, candidates) and one or more *suffixes* (a request each). With
``request_position: after`` all suffixes of a window share one prefix: they lie behind it in one row, each seeing
the prefix and itself only, its positions counted from the prefix's end. With ``before`` (the paper's order) the
request is part of the prefix, so every request is a row of its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from corec import CorecError
from corec.controls import Vocabulary
from corec.params import RerankerParams

MAX_K = 50  # the most candidates of a prompt


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token numbers of texts as ordinary text: what looks like a control token or another special token in them is not one."""
    return list(tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"])


def letters(place: int) -> str:
    """Index of a candidate as a reader sees it: A to Z, then AA, AB and so on."""
    return (chr(64 + place // 26) if place >= 26 else "") + chr(65 + place % 26)


def index_token(place: int) -> str:
    """The dedicated token of a candidate's index: one token for every K, unlike letters."""
    return f"<candidate {letters(place)}>"


def value_token(table: Vocabulary, value: int) -> str:
    """The token of one attribute value, e.g. ``<genre: Comedy>``."""
    return f"<{table.name(value)}>"


def new_tokens(table: Vocabulary, params: RerankerParams) -> dict[str, str]:
    """All tokens to be added, each with the words its row starts from."""
    tokens = {f"<{attribute.name}>": f" {attribute.name}" for attribute in table.attributes}
    if params.values == "token":
        tokens |= {
            value_token(table, value): f" {table.attributes[table.attribute_of[value]].name} {label}"
            for value, label in enumerate(table.labels)
        }
    if params.readout == "index":
        tokens |= {index_token(place): f" {letters(place)}" for place in range(MAX_K)}
    return tokens


def extend_tokenizer(model: Any, tokenizer: Any, tokens: dict[str, str]) -> list[int]:
    """Add tokens to tokenizer and model; each new row starts as the mean of its words' rows.

    All are added in one call (a second would replace the first list). Returns their numbers.
    """
    before = len(tokenizer)
    pieces = encode(tokenizer, list(tokens.values()))
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    added = list(range(before, before + len(tokens)))
    assert tokenizer.convert_tokens_to_ids(list(tokens)) == added, "new tokens must be new and in order"
    model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings), mean_resizing=False)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight[added] = torch.stack([layer.weight[ids].float().mean(0) for ids in pieces]).to(layer.weight.dtype)
    return added


class Row(NamedTuple):
    """One sequence for the model: a prefix with its candidates, and the suffixes that share it."""

    prefix: list[int]
    spans: list[tuple[int, int]]  # start and end of each candidate's line in the prefix
    suffixes: list[list[int]]


class Prompter:
    """Builds rows from windows; tokenises every item once.

    Parameters
    ----------
    tokenizer
        Already extended.
    items
        The items table.
    table
        Attributes and values.
    params
        Position of the request, form of the values, read-out.
    limit
        Positions that the model has. Where a prompt with the longest possible request would need more, all its titles
        are cut to the same shorter length; if that is not enough, the oldest of the history goes. `cut` counts both.
    """

    def __init__(
        self, tokenizer: Any, items: pd.DataFrame, table: Vocabulary, params: RerankerParams, limit: int | None = None
    ) -> None:
        self.params, self.table, self.limit = params, table, limit
        self.cut = {"rows": 0, "shorter titles": 0, "shorter histories": 0}
        self._encode = lambda text: encode(tokenizer, [text])[0]
        self._ids = {token: i for token, i in tokenizer.get_added_vocab().items()}
        self.titles = [[], *(ids[: params.title_tokens] for ids in encode(tokenizer, items["title"].tolist()))]
        in_history = np.array([attribute.in_history for attribute in table.attributes])
        self.values = [self._value_ids(values) for values in range(len(table.labels))]
        owned = [row[row >= 0] for row in table.values_of]
        self.described = [self._describe(values) for values in owned]
        self.described_short = [self._describe(values[in_history[table.attribute_of[values]]]) for values in owned]
        self.newline, self.between = self._encode("\n"), self._encode(" |||") if params.values == "words" else []
        self.heading_history = self._encode("The user's history, oldest first:\n")
        self.heading_candidates = self._encode("Rank these candidates for the user's next choice:\n")
        self.heading_request = self._encode("Control Tokens:")
        self.question = self._encode("\nThe best candidate is:") if params.readout == "index" else self.newline
        longest = [0] * len(table.attributes)
        for value, tokens in enumerate(self.values):
            attribute = table.attribute_of[value]
            longest[attribute] = max(longest[attribute], len(tokens) + len(self.between))
        self.reserve = len(self.heading_request) + sum(longest) + len(self.question) + len(self.newline)

    def _value_ids(self, value: int) -> list[int]:
        """Tokens of one value, as in a request."""
        name = self.table.attributes[self.table.attribute_of[value]].name
        if self.params.values == "token":
            return [self._ids[value_token(self.table, value)]]
        return [self._ids[f"<{name}>"], *self._encode(f" {self.table.labels[value]}")]

    def _describe(self, values: np.ndarray) -> list[int]:
        """Tokens of an item's values, as in its line."""
        return [token for value in values for token in self.values[value]]

    def request(self, values: Sequence[int]) -> list[int]:
        """Tokens of a request: its constraints in order; none for an empty one."""
        ids = list(self.heading_request)
        for place, value in enumerate(value for value in values if value >= 0):
            ids += (self.between if place else []) + self.values[value]
        return ids

    def row(
        self, history: Sequence[int], candidates: Sequence[int], requests: Sequence[Sequence[int]], plain: bool = False
    ) -> Row:
        """One row of a window.

        Parameters
        ----------
        history, candidates
            Items.
        requests
            Value numbers of each request; with ``request_position: before`` exactly one.
        plain
            Attributes only, no titles and no history: the curriculum's first part.

        Raises
        ------
        CorecError
            When the model has too few positions even without titles and history.
        """
        self.cut["rows"] += 1
        titles, kept = self.params.title_tokens, list(history)
        row = self._row(kept, candidates, requests, plain, titles)
        while self.limit and (over := len(row.prefix) + self.reserve - self.limit) > 0:
            if titles:  # each line gets shorter by the same number of tokens, at least one
                titles = max(0, titles - -(-over // (len(kept) + len(candidates))))
            elif kept:
                kept = kept[1:]
            else:
                raise CorecError(
                    f"A prompt of {len(candidates)} candidates takes {self.limit + over} positions even without titles and "
                    f"history, the backbone has {self.limit}: lower controls.k, or name a reranker.backbone with more."
                )
            row = self._row(kept, candidates, requests, plain, titles)
        self.cut["shorter titles"] += titles < self.params.title_tokens
        self.cut["shorter histories"] += len(kept) < len(history)
        return row

    def report_cut(self) -> None:
        """Say how many rows were cut to fit, if any were, and count anew."""
        if self.cut["shorter titles"]:
            print(f"prompts cut to the backbone's {self.limit} positions: {self.cut}", flush=True)
        self.cut = dict.fromkeys(self.cut, 0)

    def _row(
        self, history: Sequence[int], candidates: Sequence[int], requests: Sequence[Sequence[int]], plain: bool, titles: int
    ) -> Row:
        """The row of :meth:`row`, with `titles` tokens a title at the most."""
        ids: list[int] = []
        if not plain:
            ids += self.heading_history
            for item in history:
                ids += self.titles[item][:titles] + self.described_short[item] + self.newline
        before = self.params.request_position == "before"
        if before:
            assert len(requests) == 1, "a request before the candidates has a row of its own"
            ids += self.request(requests[0]) + self.newline
        ids += self.heading_candidates
        spans = []
        for place, item in enumerate(candidates):
            start = len(ids)
            if self.params.readout == "index":
                ids.append(self._ids[index_token(place)])
            ids += ([] if plain else self.titles[item][:titles]) + self.described[item] + self.newline
            spans.append((start, len(ids)))
        suffixes = [(self.newline if before else self.request(values)) + self.question for values in requests]
        return Row(ids, spans, suffixes)


class Batch(NamedTuple):
    """Rows as tensors. L is the longest row; R and K are the most requests and candidates of a row."""

    ids: Tensor  # [batch, L]
    positions: Tensor  # [batch, L]
    mask: Tensor  # [batch, 1, L, L], True where the row may see the column
    real: Tensor  # [batch, L], False for padding
    candidates: Tensor  # [batch, K, L] weights that pool states to candidates
    requests: Tensor  # [batch, R, L] weights that pool states to requests
    answers: Tensor  # [batch, R] place of the last token of each suffix


def collate(rows: Sequence[Row], pad: int, pooling: str, device: torch.device | str = "cpu") -> Batch:
    """Pad rows on the right and lay out who sees whom.

    A suffix sees the prefix and its own earlier tokens. Padding sees itself only, and nothing sees it.
    """
    lengths = [len(row.prefix) + sum(map(len, row.suffixes)) for row in rows]
    size, n = max(lengths), len(rows)
    k, r = max(len(row.spans) for row in rows), max(len(row.suffixes) for row in rows)
    ids, positions = np.full((n, size), pad), np.zeros((n, size), dtype=int)
    owner = np.full((n, size), -1)  # 0 = prefix, 1 … R = suffix, -1 = padding
    candidates, requests = np.zeros((n, k, size), dtype=np.float32), np.zeros((n, r, size), dtype=np.float32)
    answers = np.zeros((n, r), dtype=int)
    for b, row in enumerate(rows):
        end = len(row.prefix)
        ids[b, :end], positions[b, :end], owner[b, :end] = row.prefix, np.arange(end), 0
        for place, (first, last) in enumerate(row.spans):
            first = last - 1 if pooling == "end" else first
            candidates[b, place, first:last] = 1 / (last - first)
        start = end
        for place, suffix in enumerate(row.suffixes):
            stop = start + len(suffix)
            ids[b, start:stop] = suffix
            positions[b, start:stop] = np.arange(end, end + len(suffix))
            owner[b, start:stop] = place + 1
            first = stop - 1 if pooling == "end" else start
            requests[b, place, first:stop] = 1 / (stop - first)
            answers[b, place], start = stop - 1, stop
    whose = torch.from_numpy(owner)
    mask = (whose[:, :, None] == whose[:, None, :]) | (whose[:, None, :] == 0)
    mask = mask & (whose >= 0)[:, :, None] & torch.ones(size, size, dtype=torch.bool).tril()
    mask = mask | torch.eye(size, dtype=torch.bool)
    arrays = [torch.from_numpy(values) for values in (ids, positions, candidates, requests, answers)]
    arrays[2:2] = [mask[:, None], whose >= 0]
    return Batch(*(values.to(device) for values in arrays))
