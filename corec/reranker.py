"""Stage 04: the language model that re-ranks K candidates under a request in one forward pass.

A window becomes a *prefix* (instruction, history, candidates) and one or more *suffixes* (a request each). With
``request_position: after`` all suffixes of a window share one prefix: they lie behind it in one row, each seeing
the prefix and itself only, its positions counted from the prefix's end. With ``before`` (the paper's order) the
request is part of the prefix, so every request is a row of its own.

Read-outs (`late` and `candidate` are ours, for small backbones):

- ``index``: s_i = logit of candidate i's index token where the answer would come (the paper's).
- ``candidate``: s_i = w · h_i, with h_i the state of candidate i's line, which has seen the request.
- ``late``: s_i = (P h_i) · (Q g) / sqrt(width) + w · h_i, with g the state of the request that follows.
"""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from corec import CorecError, backbones, controls, data, machine, optimizer, parallel, paths
from corec import params as parameters
from corec.controls import Pools, Vocabulary
from corec.parallel import ALONE, Devices
from corec.params import Params, RerankerParams

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_K = 50


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
    pieces = [tokenizer(words, add_special_tokens=False)["input_ids"] for words in tokens.values()]
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
        self._encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self._ids = {token: i for token, i in tokenizer.get_added_vocab().items()}
        titles = tokenizer(items["title"].tolist(), add_special_tokens=False)["input_ids"]
        self.titles = [[], *(ids[: params.title_tokens] for ids in titles)]
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


class Head(nn.Module):
    """What turns states into scores for the read-outs `candidate` and `late` (float32).

    States come from the last layer, or from a mix of all layers with learned weights (softmax, equal at the
    start; ELMo's scalar mix): the last layer of a language model tells of the token to come, lower ones of the
    token itself. P and Q start equal, so that the product starts as a similarity of the two states.
    """

    def __init__(self, hidden: int, layers: int, params: RerankerParams) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(layers if params.layers == "mix" else 1))
        self.relevance = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.relevance.weight)
        if params.readout == "late":
            self.candidate = nn.Linear(hidden, params.head_width, bias=False)
            self.request = nn.Linear(hidden, params.head_width, bias=False)
            self.request.weight = nn.Parameter(self.candidate.weight.detach().clone())

    def pool(self, weights: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Mixed, pooled states [batch, N, hidden] of `states` [batch, L, hidden] a layer, by `weights` [batch, N, L]."""
        pooled = torch.stack([weights @ layer.float() for layer in states])  # [layers, batch, N, hidden]
        return torch.tensordot(self.mix.softmax(0), F.layer_norm(pooled, pooled.shape[-1:]), dims=1)

    def forward(self, candidates: Tensor, requests: Tensor) -> Tensor:
        """Scores [batch, R, K] of states [batch, K, hidden] under requests [batch, R, hidden]."""
        relevance = self.relevance(candidates).transpose(1, 2)  # [batch, 1, K]
        if not hasattr(self, "candidate"):
            return relevance.expand(-1, requests.shape[1], -1)
        ours, theirs = self.candidate(candidates), self.request(requests)
        return theirs @ ours.transpose(1, 2) / math.sqrt(ours.shape[-1]) + relevance


def ranknet(scores: Tensor, control: Tensor) -> Tensor:
    """RankNet on control scores: mean of softplus(-(s_i - s_j)) over all pairs with r_i > r_j, then over requests.

    Parameters
    ----------
    scores, control
        s and r, both [..., K]. A request all of whose r are equal has no pair and a loss of 0.
    """
    above = control[..., :, None] > control[..., None, :]
    terms = F.softplus(scores[..., None, :] - scores[..., :, None]) * above
    return (terms.sum((-1, -2)) / above.sum((-1, -2)).clamp(min=1)).mean()


@dataclass
class Reranker:
    """A backbone with adapter, tokenizer, read-out head and prompter. Made by :func:`build` or :func:`load`."""

    model: Any  # peft's model, or the bare backbone
    tokenizer: Any
    head: Head
    prompter: Prompter
    params: RerankerParams
    packs: bool = True  # the architecture lets requests share a prefix (see :func:`can_pack`)
    logit_scale: float = 1.0  # what the backbone multiplies its logits by (see :func:`logit_scale`)
    fused: Any = None  # the backbone's layers in fewer operations, for scoring (see :func:`corec.engine.merge`)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @property
    def causal(self) -> Any:
        """The causal LM, its adapter in place, without peft's wrapping."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., hidden] of `ids` [...], with the trained rows of the new tokens.

        peft would write those rows into a copy of the whole table in every pass, and differentiate by all of it.
        """
        layer = self.causal.get_input_embeddings()
        trained = getattr(layer, "token_adapter", None)
        if trained is None or trained.merged:
            return layer(ids)
        table, rows = trained.get_base_layer(), trained.trainable_tokens_delta["default"]  # [new tokens, hidden]
        place = ids - trained.token_indices["default"][0]
        new = F.embedding(place.clamp(min=0), rows) * getattr(table, "embed_scale", 1.0)
        return torch.where((place >= 0)[..., None], new.to(table.weight.dtype), table(ids))

    def states(self, ids: Tensor, positions: Tensor | None, mask: Tensor, cache: Any = None) -> Sequence[Tensor]:
        """States [batch, L, hidden] of those layers that the read-out takes.

        A transformers `cache` is read and added to; the fused layers also take the kept keys and values themselves, which
        are only read (see :class:`corec.fused.Fused`).
        """
        mixed = self.params.readout != "index" and self.params.layers == "mix"
        if self.fused is not None and positions is not None:
            return self.fused(self.embed(ids), positions, mask, cache, every=mixed)  # type: ignore[no-any-return]
        output = self.causal.base_model(
            inputs_embeds=self.embed(ids),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=mixed,
        )
        return output.hidden_states if mixed else (output.last_hidden_state,)

    def index_logits(self, states: Tensor, k: int) -> Tensor:
        """Logits [..., k] of the first `k` candidates' index tokens at `states` [..., hidden], and of nothing else."""
        layer = self.causal.get_output_embeddings()
        wanted = torch.tensor(self.tokenizer.convert_tokens_to_ids([index_token(i) for i in range(k)]), device=states.device)
        trained = getattr(layer, "token_adapter", None)
        if trained is None or trained.merged:
            rows = layer.weight[wanted]
        else:
            rows = trained.trainable_tokens_delta["default"][wanted - trained.token_indices["default"][0]]
        logits = states @ rows.T.to(states.dtype)
        bias = getattr(layer, "bias", None)
        logits = (logits if bias is None else logits + bias[wanted]).float() * self.logit_scale
        cap = getattr(self.causal.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, rows: Sequence[Row]) -> Tensor:
        """Scores [rows, R, K] of rows with equally many requests and candidates, in one forward pass."""
        batch = collate(rows, self.tokenizer.pad_token_id, self.params.pooling, self.device)
        layers = self.states(batch.ids, batch.positions, batch.mask) if self.packs else self.states(batch.ids, None, batch.real)
        if self.params.readout == "index":
            last = layers[-1][torch.arange(len(rows), device=self.device)[:, None], batch.answers]  # [rows, R, hidden]
            return self.index_logits(last, len(rows[0].spans))
        pooled = self.head.pool(torch.cat([batch.candidates, batch.requests], dim=1), layers)
        return self.head(*pooled.split([batch.candidates.shape[1], batch.requests.shape[1]], dim=1))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that training moves, by name."""
        named = {f"model.{name}": value for name, value in self.model.named_parameters() if value.requires_grad}
        if self.params.readout != "index":
            named |= {f"head.{name}": value for name, value in self.head.named_parameters()}
        return named


@contextmanager
def memory_for(parameter: str) -> Iterator[None]:
    """Turn want of memory, on a GPU or in the machine, into a sentence that names the `parameter` to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(sign in str(error) for sign in signs):
            raise
        raise CorecError(
            f"The memory is not enough: lower reranker.{parameter} (or, where it is 1, reranker.requests_per_window or "
            "reranker.title_tokens, or set reranker.gradient_checkpointing) and run it again."
        ) from error


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide a warning that peft's use of transformers sets off, and that no user can act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def build(
    items: pd.DataFrame,
    table: Vocabulary,
    params: RerankerParams,
    seed: int,
    adapted: bool = True,
    device: str | None = None,
) -> Reranker:
    """A re-ranker on a fresh backbone.

    Parameters
    ----------
    items, table
        Of stages 01 and 03.
    adapted
        Add LoRA (on the paper's seven projections, or on all linear layers where the architecture names them otherwise)
        and trainable rows for the new tokens; without, the model is the zero-shot baseline.
    device
        Where it goes; without one, to a GPU where there is one.
    """
    torch.manual_seed(seed)
    model, tokenizer = backbones.load(params.backbone, machine.resolve_dtype(params.dtype))
    packs = can_pack(model)
    if not packs and params.request_position == "after":
        warnings.warn(
            f"{type(model).__name__} cannot share a prefix among requests: each request is computed by itself.", stacklevel=2
        )
    scale = logit_scale(model) if params.readout == "index" else 1.0
    added = extend_tokenizer(model, tokenizer, new_tokens(table, params))
    if adapted:
        model = adapt(model, added, params)
        if params.gradient_checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    head = Head(model.config.hidden_size, model.config.num_hidden_layers + 1, params)
    device = device or machine.device()
    prompter = Prompter(tokenizer, items, table, params, positions(model.config, packs))
    return Reranker(model.to(device), tokenizer, head.to(device), prompter, params, packs, scale)


def positions(config: Any, packs: bool) -> int | None:
    """Positions that a prompt may take; a packed one must fit into a sliding window, which its mask knows nothing of."""
    bounds = [getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None) if packs else None]
    return min((bound for bound in bounds if bound), default=None)


@torch.inference_mode()
def can_pack(model: Any) -> bool:
    """Whether two requests behind one prefix get, in one row of `model`, the states that each gets alone.

    It takes an architecture whose attention obeys a mask of rows by columns and counts positions as it is told: not one
    with recurrent layers, with a sliding window, or with positions of its own (ALiBi). Tried on a dozen tokens.
    """
    if set(getattr(model.config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    row = Row([5, 6, 7, 8, 9], [(0, 5)], [[10, 11, 12], [13, 14]])
    batch = collate([row], 0, "end", next(model.parameters()).device)
    alone = torch.tensor([row.prefix + row.suffixes[1]], device=batch.ids.device)
    try:
        packed = model.base_model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False)
    except (TypeError, ValueError, RuntimeError):
        return False
    one = model.base_model(input_ids=alone, use_cache=False).last_hidden_state[0, -2:].float()
    return bool((packed.last_hidden_state[0, -2:].float() - one).norm() < 0.02 * one.norm())


@torch.inference_mode()
def logit_scale(model: Any) -> float:
    """What a causal LM multiplies its output product by, as Cohere's and Granite's do; measured on three tokens."""
    layer, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    ids = torch.tensor([[5, 6, 7]], device=layer.weight.device)
    plain = layer(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)[0, -1].float()
    given = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    if cap:  # undone where rounding does not grow by it
        few = given.abs() < cap / 2
        given, plain = cap * torch.atanh(given[few] / cap), plain[few]
    factor = float((given @ plain) / (plain @ plain))
    return factor if abs(factor - 1) >= 0.01 and math.isfinite(factor) else 1.0


def adapt(model: Any, added: list[int], params: RerankerParams) -> Any:
    """The backbone with LoRA on its projections and trainable rows for the tokens `added`.

    Raises
    ------
    CorecError
        When peft has no LoRA for the architecture.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    lora = LoraConfig(
        r=params.lora_r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        target_modules=TARGETS if names.issuperset(TARGETS) else "all-linear",
        trainable_token_indices=token_layers(model, added, params.readout),
        task_type="CAUSAL_LM",
    )
    try:
        with quiet_peft():
            return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise CorecError(
            f"Parameter reranker.backbone: {type(model).__name__} takes no LoRA ({error}): choose another model."
        ) from error


def zero_shot(items: pd.DataFrame, table: Vocabulary, params: RerankerParams) -> Reranker:
    """The bare backbone as a re-ranker: read-out `index`, values in plain words, nothing trained.

    A new token's row is the mean of its words', so it reads an attribute's name as that word.
    """
    plain = {"readout": "index", "request_position": "after", "values": "words"}
    return build(items, table, params.model_copy(update=plain), seed=0, adapted=False)


def token_layers(model: Any, added: list[int], readout: str) -> dict[str, list[int]]:
    """peft's ``trainable_token_indices``: the input embedding, and where it is untied and read the output layer too."""
    layers = {"input": model.get_input_embeddings()}
    if not model.config.tie_word_embeddings and readout == "index":
        layers["output"] = model.get_output_embeddings()
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[id(layer)]: added for layer in layers.values()}


class Examples(NamedTuple):
    """What the re-ranker reads of a run: histories by window, and stage 03's pools and vocabulary."""

    history: dict[int, list[int]]
    prepared: controls.Prepared


def load_examples(windows: pd.DataFrame, prepared: controls.Prepared) -> Examples:
    """Histories of the windows that were kept, beside their pools."""
    kept = np.concatenate([pools.window for pools in prepared.pools.values()])
    rows = windows.set_index("window").loc[kept, "history"]
    return Examples({window: list(history) for window, history in rows.items()}, prepared)


def make_rows(
    reranker: Reranker, examples: Examples, pools: Pools, requests: Sequence[np.ndarray], plain: bool = False
) -> list[Row]:
    """Rows of some windows under several requests each.

    Parameters
    ----------
    requests
        One array [windows, n] for each request; n may differ.

    Returns
    -------
    One row a window (`after`), or one a window and request, a window's requests together (`before`, or where the
    architecture cannot share a prefix).
    """
    rows = []
    for i, window in enumerate(pools.window):
        given = [request[i] for request in requests]
        shared = reranker.packs and reranker.params.request_position == "after"
        groups = [given] if shared else [[request] for request in given]
        rows += [reranker.prompter.row(examples.history[window], pools.candidates[i], g, plain) for g in groups]
    return rows


@torch.inference_mode()
def score(
    reranker: Reranker, examples: Examples, pools: Pools, requests: Sequence[np.ndarray], report: str | None = None
) -> np.ndarray:
    """Scores [windows, R, K] of every window's candidates under its R requests.

    Rows are batched by length, so that little padding is computed.

    Parameters
    ----------
    requests
        R arrays [windows, n].
    report
        What to call this in a progress line, printed every 20 s.
    """
    reranker.model.eval()
    rows = make_rows(reranker, examples, pools, requests)
    reranker.prompter.report_cut()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prefix))
    result, shown = np.empty((len(rows), len(rows[0].suffixes), pools.candidates.shape[1]), np.float32), time.monotonic()
    size = reranker.params.eval_batch_size
    for start in range(0, len(order), size):
        part = order[start : start + size]
        with memory_for("eval_batch_size"):
            result[part] = reranker.forward([rows[i] for i in part]).cpu().numpy()
        if report and time.monotonic() - shown > 20:
            print(f"{report}: {start + len(part)} of {len(rows)} prompts", flush=True)
            shown = time.monotonic()
    return result.reshape(len(pools.window), len(requests), -1)


class TrainingBatch(NamedTuple):
    """One optimiser step's windows with their requests and control scores."""

    pools: Pools
    requests: list[np.ndarray]  # R arrays [windows, n]
    control: np.ndarray  # [windows, R, K]
    plain: bool


def training_batch(examples: Examples, params: Params, step: int) -> TrainingBatch:
    """The batch of a step, drawn from the seed and the step alone, so that resuming repeats nothing.

    In the first `curriculum_steps` steps prompts are plain: one constraint a request in the first half of them, then
    the lengths of ``controls.n_tokens`` in turn without 0. Afterwards a window's requests go through all lengths.
    """
    settings, prepared = params.reranker, examples.prepared
    rng = np.random.default_rng([params.seed, 4, step])
    plain = step < settings.curriculum_steps
    pools = prepared.pools["train"]
    pools = pools.take(rng.choice(len(pools.window), min(settings.batch_size, len(pools.window)), replace=False))
    lengths = params.controls.n_tokens
    if plain:
        lengths = [1] if 2 * step < settings.curriculum_steps else [n for n in lengths if n] or [1]
    wanted = settings.requests_per_window
    first = step * wanted if wanted < len(lengths) else 0  # too few for all lengths: take them in turn over the steps
    lengths = [lengths[(first + i) % len(lengths)] for i in range(wanted)]
    requests = [controls.draw_requests(pools, n, params.controls.protocol, prepared.table, rng) for n in lengths]
    truth = pools.is_truth() if settings.truth_bonus and not plain else None
    control = [
        controls.control_scores(controls.matches(pools.candidates, request, prepared.table.values_of), truth)
        for request in requests
    ]
    return TrainingBatch(pools, requests, np.stack(control, axis=1), plain)


def schedule(progress: float, warmup: float) -> float:
    """Learning-rate factor after a share `progress` of training: linear warm-up, then a cosine to 0."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))))


def backward(reranker: Reranker, rows: Sequence[Row], control: np.ndarray, of: int | None = None) -> float:
    """Add the gradient of the batch's loss, a few windows in memory at a time; returns the loss.

    Windows of like length share a pass, so that little padding is computed.

    Parameters
    ----------
    rows
        Of all windows, in order (see :func:`make_rows`).
    control
        Control scores [windows, R, K].
    of
        Windows of the whole batch, where these are a share of it: the loss is their part of its mean.
    """
    windows, total = len(control), 0.0
    per_window = len(rows) // windows
    groups = [rows[i * per_window : (i + 1) * per_window] for i in range(windows)]
    order = sorted(range(windows), key=lambda i: max(len(row.prefix) for row in groups[i]))
    for start in range(0, windows, reranker.params.micro_batch):
        some = order[start : start + reranker.params.micro_batch]
        with memory_for("micro_batch"):
            scores = reranker.forward([row for i in some for row in groups[i]])
            wanted = torch.from_numpy(control[some]).to(reranker.device)
            loss = ranknet(scores.reshape(wanted.shape), wanted) * (len(wanted) / (of or windows))
            loss.backward()
        total += loss.item()
    return total


def train(
    reranker: Reranker,
    examples: Examples,
    params: Params,
    folder: Path | None,
    stop_after: int | None = None,
    devices: Devices = ALONE,
) -> pd.DataFrame:
    """Fine-tune with RankNet on control scores; resumes from `folder` where it was interrupted.

    Training ends after ``curriculum_steps + steps`` steps, or at `max_minutes`. While the time spent foretells that the
    steps will not be done by then, the schedule follows the clock instead, so that the learning rate still ends at 0.

    Parameters
    ----------
    folder
        Where checkpoints go; without one none is kept.
    stop_after
        Stop after so many steps, as if interrupted.
    devices
        The processes among which each step's windows are shared (see :mod:`corec.parallel`).

    Returns
    -------
    One row a step: ``step plain loss seconds tokens``.

    Raises
    ------
    CorecError
        When the loss is no longer a number (then the batch is kept in ``failed_batch.json``), the memory is not enough, or a
        step's windows cannot be shared equally.
    """
    settings = params.reranker
    master = optimizer.make(reranker.trainable(), settings, devices)
    total = settings.curriculum_steps + settings.steps
    checkpoint, rows, spent = folder / "checkpoint.pt" if folder else None, [], 0.0
    identity = paths.digest([paths.section(params, stage) for stage in ("data", "sasrec", "controls", "reranker")])
    say = print if devices.first else lambda *_, **__: None
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=reranker.device, weights_only=True)
        if saved["identity"] == identity:
            rows, spent = saved["rows"], saved["spent"]
            master.load(saved)
            say(f"resumed after step {len(rows)}", flush=True)
        else:
            say(f"{checkpoint.name} is of other data or parameters: training begins anew", flush=True)

    if devices.total(float(len(rows) != devices.agreed(len(rows)))):
        raise CorecError(
            f"The processes do not find the same {checkpoint}: give all machines one folder for runs/, or delete it on all."
        )

    def keep() -> None:
        state = {"identity": identity, "rows": rows, "spent": spent} | master.state()
        if checkpoint and devices.first:
            part = checkpoint.with_suffix(".part")
            torch.save(state, part)
            part.replace(checkpoint)

    started, shown = time.monotonic() - spent, time.monotonic()
    end, before = min(total, stop_after or total), len(rows)
    while len(rows) < end and spent < 60 * settings.max_minutes:
        step = len(rows)
        reranker.model.train()
        torch.manual_seed(params.seed * 1_000_003 + step + (devices.rank << 32))
        batch = training_batch(examples, params, step)
        mine = devices.share(len(batch.control))
        places = np.arange(len(batch.control))[mine]
        asked = [request[mine] for request in batch.requests]
        prompts = make_rows(reranker, examples, batch.pools.take(places), asked, batch.plain)
        value = devices.total(backward(reranker, prompts, batch.control[mine], len(batch.control)))
        spent = devices.agreed(time.monotonic() - started)
        late = spent / (step + 1) * total > 60 * settings.max_minutes and spent > 60
        progress = spent / (60 * settings.max_minutes) if late else step / total
        if not math.isfinite(master.step(schedule(progress, settings.warmup)) + value):
            where = ""
            if folder and devices.first:
                kept = {
                    "step": step,
                    "plain": batch.plain,
                    "window": batch.pools.window.tolist(),
                    "candidates": batch.pools.candidates.tolist(),
                }
                kept |= {"requests": [r.tolist() for r in batch.requests], "control": batch.control.tolist()}
                paths.write_text(folder / "failed_batch.json", json.dumps(kept))
                where = f" (its batch is in {folder / 'failed_batch.json'})"
            devices.total(0.0)  # all wait until it is kept
            raise CorecError(
                f"The training loss or its gradient is not a number at step {step}{where}: lower reranker.lr or reranker.lr_head."
            )
        tokens = round(devices.total(sum(len(row.prefix) + sum(map(len, row.suffixes)) for row in prompts)))
        rows.append([step, batch.plain, value, spent, tokens])
        if time.monotonic() - shown > 20 or step + 1 == end:
            recent = np.mean([row[2] for row in rows[-10:]])
            say(f"step {step + 1} of {end}: loss {recent:.3f}, {spent / 60:.1f} min", flush=True)
            shown = time.monotonic()
        if checkpoint and len(rows) % settings.checkpoint_steps == 0 and len(rows) < total:
            keep()
    if checkpoint and not stop_after and len(rows) > before:
        keep()
    if devices.first:
        reranker.prompter.report_cut()
    return pd.DataFrame(rows, columns=["step", "plain", "loss", "seconds", "tokens"])


@torch.inference_mode()
def token_rows(reranker: Reranker, tokens: Iterable[str]) -> pd.DataFrame:
    """Embedding rows of some tokens, one a row, as they are now."""
    tokens = list(tokens)
    ids = torch.tensor(reranker.tokenizer.convert_tokens_to_ids(tokens), device=reranker.device)
    return pd.DataFrame(reranker.model.get_input_embeddings()(ids).float().cpu().numpy(), index=tokens)


def row_drift(before: pd.DataFrame, after: pd.DataFrame) -> pd.Series:
    """How far each token's row has moved, as a share of the length it had."""
    return pd.Series(np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1), index=before.index)


def standard(scores: np.ndarray) -> np.ndarray:
    """Scores [..., K] with zero mean and unit variance within each pool (a constant row becomes zeros)."""
    centred = scores - scores.mean(axis=-1, keepdims=True)
    return centred / np.maximum(scores.std(axis=-1, keepdims=True), 1e-9)


def score_gap(scores: np.ndarray, pools: Pools, requests: Sequence[np.ndarray], values_of: np.ndarray) -> dict[int, float]:
    """Mean standardised score of candidates that meet a whole request less that of the others, by request.

    Parameters
    ----------
    scores
        [windows, R, K], of the R `requests`.
    """
    gaps = {}
    for place, request in enumerate(requests):
        if request.shape[1]:
            met = controls.matches(pools.candidates, request, values_of).all(axis=2)
            values = standard(scores[:, place])
            gaps[place] = float(values[met].mean() - values[~met].mean())
    return gaps


def save(reranker: Reranker, curve: pd.DataFrame, folder: Path) -> list[Path]:
    """Write the adapter in peft's own format, the tokenizer, the head and the learning curve; returns the files."""
    adapter = folder / "adapter"
    reranker.model.save_pretrained(adapter, save_embedding_layers=False)
    reranker.tokenizer.save_pretrained(adapter)
    save_file(reranker.head.state_dict(), folder / "head.safetensors")
    curve.to_parquet(folder / "curve.parquet", index=False)
    return [adapter / "adapter_model.safetensors", folder / "head.safetensors", folder / "curve.parquet"]


def load(folder: Path, items: pd.DataFrame, table: Vocabulary, params: RerankerParams) -> Reranker:
    """A saved re-ranker on its backbone; gives the same scores as the one that was saved.

    Raises
    ------
    CorecError
        When the folder holds no adapter.
    """
    if not (folder / "adapter" / "adapter_config.json").exists():
        raise CorecError(f"{folder} holds no adapter: run notebooks/04_reranker.ipynb first.")
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")  # as it was trained, should `auto` now differ
    bare = build(items, table, params.model_copy(update={"dtype": dtype}), seed=0, adapted=False)
    with quiet_peft():
        model = PeftModel.from_pretrained(bare.model, str(folder / "adapter"), autocast_adapter_dtype=False)
    bare.head.load_state_dict(load_file(folder / "head.safetensors"))
    return Reranker(model.to(bare.device), bare.tokenizer, bare.head, bare.prompter, params, bare.packs, bare.logit_scale)


def main(arguments: list[str] | None = None) -> int:
    """Fine-tune on all processes of ``accelerate launch``; returns the exit status.

    It takes stages 01 to 03 of the run as the notebooks left them, and leaves a checkpoint with which notebook 4, run with the
    same parameters, goes on: there nothing is trained again.
    """
    parser = argparse.ArgumentParser(
        prog="accelerate launch -m corec.reranker", description="Fine-tune the re-ranker of a run on several devices."
    )
    parser.add_argument("--params", type=Path, required=True, help="parameter file, e.g. params/amazon-electronics.yaml")
    given = parser.parse_args(arguments)
    try:
        settings = parameters.load(given.params)
        paths.check(settings, "controls")
        devices = parallel.join()
        tables, prepared = data.load(settings.run), controls.load(settings.run)
        examples = load_examples(tables.windows, prepared)
        devices.share(min(settings.reranker.batch_size, len(prepared.pools["train"].window)))
        fast = devices.agreed(float(machine.resolve_dtype(settings.reranker.dtype) == torch.bfloat16))
        own = settings.reranker.model_copy(update={"dtype": "bfloat16" if fast else "float32"})  # the same on all
        with parallel.one_first():
            device = "cpu" if devices.sharded else None
            reranker = build(tables.items, prepared.table, own, settings.seed, device=device)
        if devices.sharded:
            parallel.shard(reranker.causal, devices)
            reranker.head.to(parallel.here())
        folder = paths.stage_dir(settings.run, "reranker")
        folder.mkdir(parents=True, exist_ok=True)
        curve = train(reranker, examples, settings, folder, devices=devices)
    except CorecError as error:
        print(f"corec: {error}", file=sys.stderr)
        return 1
    if devices.first:
        print(
            f"{len(curve)} steps on {devices.size} processes are kept in {folder / 'checkpoint.pt'}: notebooks/04_reranker.ipynb "
            "with the same parameters goes on from there."
        )
    parallel.leave(devices)
    return 0


if __name__ == "__main__":
    sys.exit(main())
