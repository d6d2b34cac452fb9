"""Layers of a Llama-like decoder with fewer operations, for scoring only.

For a request of seven tokens, the forward of transformers spends most of its time on the overhead of about forty operations
per layer. Here one product computes query, key and value, and another gate and up; the rotary embedding takes three operations;
the mask is converted to an additive bias once instead of in every layer. The remaining cost is reading the weights.

Architectures are not listed by name: :func:`fuse` looks for the modules it knows, compares the fused layers with the model, and
returns None if they differ.
"""

import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROBE = 12  # tokens of the comparison of the fused layers with the model, and of the timings for short inputs
FEW = 128  # maximum number of tokens for which a product may be transposed
MANY = 320  # tokens of a prompt in the timing of attention


class Layer(NamedTuple):
    """Weights of one layer, projections of the same input concatenated along the output dimension."""

    qkv: Tensor  # [(heads + 2 key heads) * head width, hidden]
    qkv_bias: Tensor | None
    out: nn.Linear
    gate_up: Tensor  # [2 * inner, hidden]
    gate_up_bias: Tensor | None
    down: nn.Linear
    before: tuple[Tensor, float]  # weight and epsilon of the norm before attention
    after: tuple[Tensor, float]  # weight and epsilon of the norm before the MLP
    heads: tuple[tuple[Tensor, float], tuple[Tensor, float]] | None  # norms of the query and key heads (Qwen3)


def together(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Concatenate the weights and biases of several projections of the same input.

    The parameters of `parts` become views of the result, so no memory is added.

    Returns
    -------
    Weight [sum of output widths, input width] and bias [sum of output widths] or None.
    """
    weight = torch.cat([part.weight.detach() for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
    start = 0
    for part in parts:
        stop = start + part.out_features
        part.weight = nn.Parameter(weight[start:stop], requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias[start:stop], requires_grad=False)
        start = stop
    return weight, bias


def norm(module: Any) -> tuple[Tensor, float]:
    """Weight and epsilon of an RMSNorm."""
    return module.weight.detach(), module.variance_epsilon


def faster(work: Callable[[bool], object], number: int) -> bool:
    """Whether ``work(True)`` takes less time than ``work(False)``: minimum over five repeats of `number` calls each."""
    times = [min(timeit.repeat(partial(work, flag), number=number, repeat=5)) for flag in (True, False)]
    return times[0] < times[1]


def product(state: Tensor, weight: Tensor, bias: Tensor | None, turned: bool = False) -> Tensor:
    """Linear layer of `state` [..., input width], as ``F.linear``.

    With `turned` and at most :data:`FEW` tokens, it is computed transposed, as weight times state, for which the library
    chooses another kernel.
    """
    tokens = state.shape[:-1].numel()
    if not turned or tokens > FEW:
        return F.linear(state, weight, bias)
    output = (weight @ state.reshape(tokens, -1).t()).t()
    return (output if bias is None else output + bias).reshape(*state.shape[:-1], -1)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, spelled: bool) -> Tensor:
    """Grouped-query attention with an additive bias.

    Parameters
    ----------
    query
        [batch, heads, L, head width].
    key, value
        [batch, key heads, columns, head width].
    bias
        Added to the attention scores: [batch, 1, L, columns]; if `spelled`, repeated for each query head of a group,
        [batch, 1, heads / key heads * L, columns].
    scale
        Factor of the products of query and key.
    spelled
        Compute explicitly, as two matrix products and a softmax, instead of with torch's fused kernel.

    Returns
    -------
    [batch, L, heads, head width].
    """
    (batch, heads, length, width), groups = query.shape, key.shape[1]
    if spelled:  # one batch element at a time, so that the scores stay in the CPU cache
        output = query.new_empty(batch, length, heads, width)
        for q, k, v, added, out in zip(query, key, value, bias, output, strict=True):
            scores = torch.baddbmm(added.expand(groups, -1, -1), q.reshape(groups, -1, width), k.mT, alpha=scale)
            out.copy_(torch.bmm(scores.softmax(-1), v).view(heads, length, width).transpose(0, 1))
        return output
    grouped = query.device.type == "cpu"
    if heads > groups and not grouped:  # the CUDA kernel with a mask needs one key head per query head
        key, value = key.repeat_interleave(heads // groups, 1), value.repeat_interleave(heads // groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped).transpose(1, 2)


class Fused:
    """Fused layers of a causal LM without adapter (or with a merged one). Create it with :func:`fuse`.

    Raises
    ------
    TypeError
        If a projection is not an ``nn.Linear``, for example with quantised weights.
    AttributeError
        If a module of the Llama architecture is missing.
    """

    def __init__(self, causal: Any) -> None:
        base, config = causal.base_model, causal.config
        self.rotary, self.norm, self.activation = base.rotary_emb, norm(base.norm), base.layers[0].mlp.act_fn
        attention = base.layers[0].self_attn
        self.width, self.scale = attention.head_dim, attention.scaling
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        plain = [
            part
            for layer in base.layers
            for part in (*layer.self_attn.children(), *layer.mlp.children())
            if hasattr(part, "out_features")
        ]
        if any(type(part) is not nn.Linear for part in plain):  # e.g. quantised weights, which must not be replaced
            raise TypeError("projections of another kind")
        self.layers = [self.take(layer) for layer in base.layers]
        self.turned, self.spelled = self.faster_turned(), (self.faster_spelled(PROBE), self.faster_spelled(MANY))

    def faster_turned(self) -> bool:
        """Whether the transposed product is faster for :data:`PROBE` tokens.

        Timed over the weights of all layers, so that they are read from memory. Always False on a GPU. The transposed product
        took two thirds of the time on a CPU with matrix units (Intel AMX), and 1.6 times as long on one without (AMD Zen).
        """
        if self.norm[0].device.type != "cpu":
            return False
        weights = [weight for layer in self.layers for weight in (layer.qkv, layer.out.weight, layer.gate_up, layer.down.weight)]
        states = {weight.shape[1]: weight.new_ones(PROBE, weight.shape[1]) for weight in weights}
        return faster(lambda turned: [product(states[w.shape[1]], w, None, turned) for w in weights], 1)

    def faster_spelled(self, tokens: int) -> bool:
        """Whether explicit attention of `tokens` queries to a prompt of :data:`MANY` tokens is faster than torch's kernel.

        Timed on a CPU in half precision; otherwise False. For a whole prompt, explicit attention took 0.4 of the kernel's time
        on an AMD EPYC, and twice the kernel's time on a Xeon, where the kernel uses the matrix units.
        """
        like = self.norm[0]
        if like.device.type != "cpu" or like.dtype == torch.float32:
            return False
        query, key = (like.new_ones(1, heads, n, self.width) for heads, n in ((self.queries, tokens), (self.keys, MANY)))
        bias = like.new_zeros(1, 1, tokens, MANY)
        rows = bias.repeat(1, 1, self.queries // self.keys, 1)
        return faster(lambda spelled: attention(query, key, key, rows if spelled else bias, self.scale, spelled), 5)

    def spells(self, state: Tensor) -> bool:
        """Whether attention is computed explicitly for the tokens of `state` [batch, L, hidden]."""
        return self.spelled[state.shape[:-1].numel() > FEW]

    @staticmethod
    def take(layer: Any) -> Layer:
        """Concatenate the weights of one decoder layer of the model (see :func:`together`)."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = together(attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up, gate_up_bias = together(mlp.gate_proj, mlp.up_proj)
        heads = (norm(attention.q_norm), norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        before, after = norm(layer.input_layernorm), norm(layer.post_attention_layernorm)
        return Layer(qkv, qkv_bias, attention.o_proj, gate_up, gate_up_bias, mlp.down_proj, before, after, heads)

    def __call__(self, embedded: Tensor, positions: Tensor, mask: Tensor, cache: Any = None, every: bool = True) -> list[Tensor]:
        """Hidden states, in the format of transformers: embeddings, output of each layer, the last one after the final norm.

        Parameters
        ----------
        embedded
            Input embeddings [batch, L, hidden].
        positions
            Position ids [batch, L].
        mask
            [batch, 1, L, cached + L], True where the query (row) attends to the key (column).
        cache
            Keys and values [batch, key heads, cached, head width] of each layer, which are only read; or a transformers
            cache, which is read and extended.
        every
            Return all states; otherwise only the last.

        Returns
        -------
        List of states [batch, L, hidden].
        """
        tables, states = self.tables(embedded, positions, mask), [embedded]
        for number in range(len(self.layers)):
            output = self.layer(number, states[-1], *tables, cache)
            states = [*states, output] if every else [output]
        states[-1] = self.last(states[-1])
        return states

    def tables(self, like: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs common to all layers: the mask as an additive bias, and the cosine and signed sine of the rotary embedding.

        `like` [batch, L, hidden] gives the dtype and the number of tokens. Cosine and sine are [batch, L, 1, head width]; the
        first half of the sine is negated.
        """
        bias = torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        if self.spells(like):
            bias = bias.repeat(1, 1, self.queries // self.keys, 1)
        cos, sin = (table[:, :, None] for table in self.rotary(like, positions))  # [batch, L, 1, head width]
        half = self.width // 2
        return bias, cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    def last(self, state: Tensor) -> Tensor:
        """Apply the final norm."""
        return F.rms_norm(state, state.shape[-1:], *self.norm)

    def layer(self, number: int, state: Tensor, bias: Tensor, cos: Tensor, turned: Tensor, cache: Any = None) -> Tensor:
        """Output [batch, L, hidden] of one layer.

        Parameters
        ----------
        number
            Index of the layer.
        state
            Input of the layer [batch, L, hidden].
        bias, cos, turned
            Additive mask, cosine and signed sine (see :meth:`tables`).
        cache
            As in :meth:`__call__`.
        """
        layer, (batch, length, hidden) = self.layers[number], state.shape
        normed = F.rms_norm(state, (hidden,), *layer.before)
        qkv = product(normed, layer.qkv, layer.qkv_bias, self.turned).contiguous().view(batch, length, -1, self.width)
        both, value = qkv.split([self.queries + self.keys, self.keys], dim=2)
        if layer.heads:
            parts = zip(both.split([self.queries, self.keys], dim=2), layer.heads, strict=True)
            both = torch.cat([F.rms_norm(part, (self.width,), *weights) for part, weights in parts], dim=2)
        both = torch.addcmul(both * cos, both.roll(self.width // 2, -1), turned)
        query, key = (part.transpose(1, 2) for part in both.split([self.queries, self.keys], dim=2))
        value = value.transpose(1, 2)
        if isinstance(cache, list):
            cached_key, cached_value = cache[number]
            key, value = torch.cat([cached_key, key], dim=2), torch.cat([cached_value, value], dim=2)
        elif cache is not None:
            key, value = cache.update(key, value, number)
        attended = attention(query, key, value, bias, self.scale, self.spells(state)).reshape(batch, length, -1)
        state = state + product(attended, layer.out.weight, layer.out.bias, self.turned)
        normed = F.rms_norm(state, (hidden,), *layer.after)
        gate, up = product(normed, layer.gate_up, layer.gate_up_bias, self.turned).chunk(2, dim=-1)
        return state + product(self.activation(gate) * up, layer.down.weight, layer.down.bias, self.turned)


@torch.no_grad()
def fuse(causal: Any) -> Fused | None:
    """Fuse the layers of a Hugging Face causal LM without adapter. The model remains usable: the weights are shared.

    The fused layers are compared with the model on :data:`PROBE` tokens. Each layer receives the model's own input to that
    layer, because in bfloat16 rounding differences would otherwise grow from layer to layer. The difference, relative to the
    sum of the norms of the layer's input and output, must be below 1e-5 in float32 and 0.01 in half precision for half of the
    tokens, and below five times that for every token: rounding alone leaves some tokens of SmolLM2 at 0.017 in bfloat16.

    Returns
    -------
    The fused layers, or None if the architecture is not supported.
    """
    try:
        fused = Fused(causal)
    except (AttributeError, TypeError, RuntimeError):
        return None
    ids = torch.arange(3, 3 + PROBE, device=causal.get_input_embeddings().weight.device)[None] % causal.config.vocab_size
    mask = torch.ones(1, 1, PROBE, PROBE, dtype=torch.bool, device=ids.device).tril()
    expected = causal.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    places = torch.arange(PROBE, device=ids.device)[None]
    bound = 1e-5 if expected[0].dtype == torch.float32 else 0.01
    embedded = causal.get_input_embeddings()(ids)
    if len(expected) != len(fused.layers) + 1 or not torch.equal(expected[0], embedded):  # the model scales its embeddings
        return None
    try:
        tables = fused.tables(expected[0], places, mask)
        outputs = [fused.layer(number, state, *tables) for number, state in enumerate(expected[:-1])]
    except RuntimeError:
        return None
    outputs[-1] = fused.last(outputs[-1])
    for before, output, after in zip(expected[:-1], outputs, expected[1:], strict=True):
        size = before.float().norm(dim=-1) + after.float().norm(dim=-1)
        differences = (output.float() - after.float()).norm(dim=-1) / size
        if not (differences.median() < bound and differences.max() < 5 * bound):
            return None
    return fused
