"""Prompts: new tokens, rows of token ids, and batches of rows.

A window is encoded as one *prefix* (instruction, history, candidates) and one *suffix* per request. With
``request_position: after``, all suffixes of a window share the prefix: they follow it in one row, each attends to the
prefix and to itself only, and its positions continue from the end of the prefix. With ``before`` (the paper's order),
the request is part of the prefix, so each request is a separate row.
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

MAX_K = 50  # maximum number of candidates in a prompt
MAX_SENTENCE = 48  # maximum number of tokens of a sentence as request; the rest is dropped
SOFT = "<item>"  # token at the start of a candidate's line, to whose embedding the retriever's states are added


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text. Text that looks like a control token or another special token is encoded as ordinary text."""
    return list(tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"])


def letters(place: int) -> str:
    """Displayed index of the candidate at 0-based position `place`: A to Z, then AA, AB and so on."""
    return (chr(64 + place // 26) if place >= 26 else "") + chr(65 + place % 26)


def index_token(place: int) -> str:
    """Index token of the candidate at position `place`, for example ``<candidate A>``. Unlike letters, always a single token."""
    return f"<candidate {letters(place)}>"


def value_token(vocabulary: Vocabulary, value: int) -> str:
    """Token of one attribute value, for example ``<genre: Comedy>``."""
    return f"<{vocabulary.name(value)}>"


def new_tokens(vocabulary: Vocabulary, params: RerankerParams) -> dict[str, str]:
    """Tokens to add to the vocabulary, each mapped to the text that initialises its embedding row.

    One token per attribute; with ``values: token`` one per attribute value; with ``soft_width`` the token :data:`SOFT`; with
    read-out ``index`` one per candidate position, :data:`MAX_K` in all.
    """
    tokens = {f"<{attribute.name}>": f" {attribute.name}" for attribute in vocabulary.attributes}
    if params.values == "token":
        tokens |= {
            value_token(vocabulary, value): f" {vocabulary.attributes[vocabulary.attribute_of[value]].name} {label}"
            for value, label in enumerate(vocabulary.labels)
        }
    if params.soft_width:
        tokens[SOFT] = " item"
    if params.readout == "index":
        tokens |= {index_token(place): f" {letters(place)}" for place in range(MAX_K)}
    return tokens


def extend_tokenizer(model: Any, tokenizer: Any, tokens: dict[str, str]) -> list[int]:
    """Add tokens to the tokenizer and to the input and output embeddings of the model, in place.

    Each new row is initialised with the mean of the rows of its text. All tokens are added in one call, because a second
    call would replace the list of the first.

    Parameters
    ----------
    model, tokenizer
        Causal LM and tokenizer of Hugging Face.
    tokens
        New tokens and their texts (see :func:`new_tokens`).

    Returns
    -------
    Token ids of the new tokens, consecutive and in the order of `tokens`.

    Raises
    ------
    CorecError
        If the tokenizer has one of the tokens already.
    """
    before = len(tokenizer)
    pieces = encode(tokenizer, list(tokens.values()))
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    added = list(range(before, before + len(tokens)))
    numbers = tokenizer.convert_tokens_to_ids(list(tokens))
    if numbers != added:
        taken = next(token for token, number in zip(tokens, numbers, strict=True) if number < before)
        raise CorecError(f"The backbone has a token {taken} already: give the attribute another name in the scheme.")
    model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings), mean_resizing=False)
    with torch.no_grad():
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            layer.weight[added] = torch.stack([layer.weight[ids].float().mean(0) for ids in pieces]).to(layer.weight.dtype)
    return added


class Row(NamedTuple):
    """One input sequence: a prefix that contains the candidates, and the suffixes that share it."""

    prefix: list[int]  # token ids
    spans: list[tuple[int, int]]  # start and end (exclusive) of each candidate's line in the prefix
    suffixes: list[list[int]]  # token ids, one list per request
    # Start and end (exclusive) of each constraint in its suffix, by request; equal if the constraint could not be drawn.
    constraints: list[list[tuple[int, int]]] = []
    prior: np.ndarray | None = None  # scores of the combiner [K]
    soft: np.ndarray | None = None  # states of the retriever [K, soft_width]

    def only(self, *requests: int) -> "Row":
        """The row with these requests only."""
        constraints = [self.constraints[number] for number in requests] if self.constraints else []
        return self._replace(suffixes=[self.suffixes[number] for number in requests], constraints=constraints)


class Prompter:
    """Build rows from windows. The titles of all items are tokenised once, at construction.

    Parameters
    ----------
    tokenizer
        Tokenizer with the new tokens (see :func:`extend_tokenizer`).
    items
        Items table, items 1 to n in order.
    vocabulary
        Attributes and values.
    params
        Position of the request, form of the values, read-out, length of the titles.
    limit
        Maximum number of positions of the model; None for no limit. If a prompt with the longest possible request needs
        more, all its titles are truncated to the same shorter length; if that is not enough, the oldest history items
        are dropped.

    Attributes
    ----------
    cut
        Number of rows, of rows with truncated titles and of rows with truncated histories since the last report.
    reserve
        Tokens of the longest possible request of values, with its heading and what follows it.
    """

    def __init__(
        self, tokenizer: Any, items: pd.DataFrame, vocabulary: Vocabulary, params: RerankerParams, limit: int | None = None
    ) -> None:
        self.params, self.vocabulary, self.limit = params, vocabulary, limit
        self.cut = {"rows": 0, "shorter titles": 0, "shorter histories": 0}
        self._encode = lambda text: encode(tokenizer, [text])[0]
        self._ids = {token: i for token, i in tokenizer.get_added_vocab().items()}
        self.titles = [[], *(ids[: params.title_tokens] for ids in encode(tokenizer, items["title"].tolist()))]
        in_history = np.array([attribute.in_history for attribute in vocabulary.attributes])
        self.values = [self._value_ids(value) for value in range(len(vocabulary.labels))]
        self.item_values = [row[row >= 0] for row in vocabulary.values_of]
        self.described = [self._describe(values) for values in self.item_values]
        short = (values[in_history[vocabulary.attribute_of[values]]] for values in self.item_values)
        self.described_short = [self._describe(values) for values in short]
        self.newline, self.between = self._encode("\n"), self._encode(" |||") if params.values == "words" else []
        self.heading_history = self._encode("The user's history, oldest first:\n")
        self.heading_candidates = self._encode("Rank these candidates for the user's next choice:\n")
        self.heading_request = self._encode("Control Tokens:")
        self.question = self._encode("\nThe best candidate is:") if params.readout == "index" else self.newline
        longest = [0] * len(vocabulary.attributes)
        for value, tokens in enumerate(self.values):
            attribute = vocabulary.attribute_of[value]
            longest[attribute] = max(longest[attribute], len(tokens) + len(self.between))
        self.reserve = len(self.heading_request) + sum(longest) + len(self.question) + len(self.newline)

    def _value_ids(self, value: int) -> list[int]:
        """Token ids of one value, as in a request."""
        name = self.vocabulary.attributes[self.vocabulary.attribute_of[value]].name
        if self.params.values == "token":
            return [self._ids[value_token(self.vocabulary, value)]]
        return [self._ids[f"<{name}>"], *self._encode(f" {self.vocabulary.labels[value]}")]

    def _describe(self, values: np.ndarray) -> list[int]:
        """Token ids of an item's values, as in its line; empty without ``show_attributes``."""
        if not self.params.show_attributes:
            return []
        return [token for value in values for token in self.values[value]]

    def request(self, values: Sequence[int] | str) -> list[int]:
        """Token ids of a request: the heading, then its constraints in order. Values of -1 (no constraint) are skipped.

        A sentence is followed by the tokens of all attributes, each for the constraint that the sentence has on it, if any.
        """
        return self.request_spans(values)[0]

    def request_spans(self, values: Sequence[int] | str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a request (see :meth:`request`), and start and end of each constraint, equal for a value of -1."""
        if isinstance(values, str):
            ids = self.heading_request + self._encode(f" {values}")[:MAX_SENTENCE] + self.newline
            names = [self._ids[f"<{attribute.name}>"] for attribute in self.vocabulary.attributes]
            return ids + names, [(len(ids) + place, len(ids) + place + 1) for place in range(len(names))]
        ids, spans = list(self.heading_request), []
        for value in values:
            if value >= 0:
                ids += self.between if len(ids) > len(self.heading_request) else []
                ids += self.values[value]
            spans.append((len(ids) - (len(self.values[value]) if value >= 0 else 0), len(ids)))
        return ids, spans

    def row(
        self,
        history: Sequence[int],
        candidates: Sequence[int],
        requests: Sequence[Sequence[int] | str],
        plain: bool = False,
        hidden: np.ndarray | None = None,
    ) -> Row:
        """Encode one window as a row.

        Parameters
        ----------
        history, candidates
            Item numbers; the history oldest first.
        requests
            Value ids of each request, or a sentence; exactly one request with ``request_position: before``.
        plain
            Omit the titles and the history (first part of the curriculum).
        hidden
            Attributes that the line of each candidate omits [K, attributes]; None for none.

        Raises
        ------
        CorecError
            If the prompt exceeds `limit` even without titles and history.
        """
        self.cut["rows"] += 1
        titles, recent = self.params.title_tokens, list(history)
        row = self._row(recent, candidates, requests, plain, titles, hidden)
        reserve = max([self.reserve, *map(len, row.suffixes)])  # a sentence may be longer
        while self.limit and (over := len(row.prefix) + reserve - self.limit) > 0:
            if titles:  # shorten every line by the same number of tokens, at least one
                titles = max(0, titles - -(-over // (len(recent) + len(candidates))))
            elif recent:
                recent = recent[1:]
            else:
                raise CorecError(
                    f"A prompt of {len(candidates)} candidates takes {self.limit + over} positions even without titles and "
                    f"history, the backbone has {self.limit}: lower controls.k, or name a reranker.backbone with more."
                )
            row = self._row(recent, candidates, requests, plain, titles, hidden)
        self.cut["shorter titles"] += titles < self.params.title_tokens
        self.cut["shorter histories"] += len(recent) < len(history)
        return row

    def report_cut(self) -> None:
        """Print how many rows were truncated, if any, and reset the counts."""
        if self.cut["shorter titles"]:
            print(f"prompts cut to the backbone's {self.limit} positions: {self.cut}", flush=True)
        self.cut = dict.fromkeys(self.cut, 0)

    def _row(
        self,
        history: Sequence[int],
        candidates: Sequence[int],
        requests: Sequence[Sequence[int] | str],
        plain: bool,
        titles: int,
        hidden: np.ndarray | None = None,
    ) -> Row:
        """Encode a window as in :meth:`row`, with at most `titles` tokens per title."""
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
            if self.params.soft_width:
                ids.append(self._ids[SOFT])
            described = self.described[item]
            if hidden is not None:
                values = self.item_values[item]
                described = self._describe(values[~hidden[place, self.vocabulary.attribute_of[values]]])
            ids += ([] if plain else self.titles[item][:titles]) + described + self.newline
            spans.append((start, len(ids)))
        if before:
            return Row(ids, spans, [self.newline + self.question])
        asked = [self.request_spans(values) for values in requests]
        return Row(ids, spans, [request + self.question for request, _ in asked], [places for _, places in asked])


class Batch(NamedTuple):
    """Rows as padded tensors. L, R, K and n are the largest length of a row and numbers of requests, candidates, constraints."""

    ids: Tensor  # [batch, L] token ids
    positions: Tensor  # [batch, L] position ids
    mask: Tensor  # [batch, 1, L, L] attention mask, True where the query (row) attends to the key (column)
    real: Tensor  # [batch, L] False for padding
    candidates: Tensor  # [batch, K, L] weights that pool token states into candidate states
    requests: Tensor  # [batch, R, L] weights that pool token states into request states
    answers: Tensor  # [batch, R] index of the last token of each suffix
    constraints: Tensor  # [batch, R, n, L] weights that pool token states into constraint states
    starts: Tensor  # [batch, K] index of the first token of each candidate's line
    prior: Tensor | None  # [batch, K] scores of the combiner
    soft: Tensor | None  # [batch, K, soft_width] states of the retriever


def collate(rows: Sequence[Row], pad: int, pooling: str, device: torch.device | str = "cpu") -> Batch:
    """Pad rows on the right and build the attention mask and the pooling weights.

    Attention is causal. A suffix attends to the prefix and to its own earlier tokens; padding attends to itself only,
    and no other token attends to it.

    Parameters
    ----------
    rows
        Rows of one batch.
    pad
        Token id of the padding.
    pooling
        ``end``: the state of the last token of a line or suffix; ``mean``: the mean over its tokens.
    device
        Device of the tensors.
    """
    lengths = [len(row.prefix) + sum(map(len, row.suffixes)) for row in rows]
    size, n = max(lengths), len(rows)
    k, r = max(len(row.spans) for row in rows), max(len(row.suffixes) for row in rows)
    ids, positions = np.full((n, size), pad), np.zeros((n, size), dtype=int)
    segments = np.full((n, size), -1)  # 0 = prefix, 1 … R = suffix, -1 = padding
    candidates, requests = np.zeros((n, k, size), dtype=np.float32), np.zeros((n, r, size), dtype=np.float32)
    answers, starts = np.zeros((n, r), dtype=int), np.zeros((n, k), dtype=int)
    most = max((len(places) for row in rows for places in row.constraints), default=0)
    constraints = np.zeros((n, r, most, size), dtype=np.float32)
    for b, row in enumerate(rows):
        end = len(row.prefix)
        ids[b, :end], positions[b, :end], segments[b, :end] = row.prefix, np.arange(end), 0
        for place, (first, last) in enumerate(row.spans):
            starts[b, place] = first
            first = last - 1 if pooling == "end" else first
            candidates[b, place, first:last] = 1 / (last - first)
        start = end
        for place, suffix in enumerate(row.suffixes):
            stop = start + len(suffix)
            ids[b, start:stop] = suffix
            positions[b, start:stop] = np.arange(end, end + len(suffix))
            segments[b, start:stop] = place + 1
            first = stop - 1 if pooling == "end" else start
            requests[b, place, first:stop] = 1 / (stop - first)
            for number, (low, high) in enumerate(row.constraints[place] if row.constraints else ()):
                low = max(low, high - 1) if pooling == "end" else low
                constraints[b, place, number, start + low : start + high] = 1 / max(high - low, 1)
            answers[b, place], start = stop - 1, stop
    segment_ids = torch.from_numpy(segments)
    mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) | (segment_ids[:, None, :] == 0)
    mask = mask & (segment_ids >= 0)[:, :, None] & torch.ones(size, size, dtype=torch.bool).tril()
    mask = mask | torch.eye(size, dtype=torch.bool)
    arrays = [torch.from_numpy(values) for values in (ids, positions, candidates, requests, answers, constraints, starts)]
    arrays[2:2] = [mask[:, None], segment_ids >= 0]
    tensors: list[Tensor | None] = [values.to(device) for values in arrays]
    for parts in ([row.prior for row in rows], [row.soft for row in rows]):
        given = [part for part in parts if part is not None]
        tensors.append(torch.from_numpy(np.stack(given)).to(device) if len(given) == len(rows) else None)
    return Batch(*tensors)  # type: ignore[arg-type]
