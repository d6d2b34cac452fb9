"""The layers of a Llama-like decoder in few operations, for scoring alone.

A request of seven tokens is so little arithmetic that the library's forward spends most of its time between the operations, some
forty a layer. Here the projections to query, key and value are one product, gate and up another, the rotation of the positions
three operations, and the mask is turned into numbers once instead of in every layer; reading the weights is what remains.

Architectures are not listed by name: :func:`fuse` looks for the modules it knows, tries the result against the model itself,
and gives None where the two differ.
"""

import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROBE = 12  # tokens on which the fused layers are tried
FEW = 128  # tokens up to which a product may be turned round
MANY = 320  # tokens of a prompt, with which attention is timed


class Layer(NamedTuple):
    """Weights of one layer; those of several projections lie one below the other."""

    qkv: Tensor  # [(heads + 2 key heads) * head width, hidden]
    qkv_bias: Tensor | None
    out: nn.Linear
    gate_up: Tensor  # [2 * inner, hidden]
    gate_up_bias: Tensor | None
    down: nn.Linear
    before: tuple[Tensor, float]  # weight and epsilon of the norm before attention
    after: tuple[Tensor, float]  # and of the one before the MLP
    heads: tuple[tuple[Tensor, float], tuple[Tensor, float]] | None  # norms of query and key heads, as in Qwen3


def together(*parts: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of several projections of one input, as one; the parts become views of it, so no memory is added."""
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
    """Whether ``work(True)`` takes less time than ``work(False)``, the fastest of five times `number` calls of each."""
    taken = [min(timeit.repeat(partial(work, way), number=number, repeat=5)) for way in (True, False)]
    return taken[0] < taken[1]


def product(state: Tensor, weight: Tensor, bias: Tensor | None, turned: bool = False) -> Tensor:
    """``F.linear``; of few tokens, where `turned`, as weight times state, which gives the kernel another shape to choose from."""
    tokens = state.shape[:-1].numel()
    if not turned or tokens > FEW:
        return F.linear(state, weight, bias)
    made = (weight @ state.reshape(tokens, -1).t()).t()
    return (made if bias is None else made + bias).reshape(*state.shape[:-1], -1)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, spelled: bool) -> Tensor:
    """What every head sees, [batch, L, heads, head width].

    Parameters
    ----------
    query, key, value
        [batch, heads, L, head width] and twice [batch, key heads, columns, head width].
    bias
        To be added to the scores: [batch, 1, L, columns], or where attention is `spelled` the same once for each head of a
        group, [batch, 1, heads / key heads * L, columns].
    spelled
        As two products and a softmax, not by torch's kernel.
    """
    (batch, heads, length, width), groups = query.shape, key.shape[1]
    if spelled:  # row by row, so that the scores stay in the processor's cache
        seen = query.new_empty(batch, length, heads, width)
        for ours, theirs, values, added, out in zip(query, key, value, bias, seen, strict=True):
            scores = torch.baddbmm(added.expand(groups, -1, -1), ours.reshape(groups, -1, width), theirs.mT, alpha=scale)
            out.copy_(torch.bmm(scores.softmax(-1), values).view(heads, length, width).transpose(0, 1))
        return seen
    grouped = query.device.type == "cpu"
    if heads > groups and not grouped:  # CUDA's kernel that takes a mask wants a key for every query head
        key, value = key.repeat_interleave(heads // groups, 1), value.repeat_interleave(heads // groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped).transpose(1, 2)


class Fused:
    """The layers of a causal LM, its adapter merged; made by :func:`fuse`."""

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
        if any(type(part) is not nn.Linear for part in plain):  # quantised weights, say, which are to stay as they are
            raise TypeError("projections of another kind")
        self.layers = [self.take(layer) for layer in base.layers]
        self.turned, self.spelled = self.faster_turned(), (self.faster_spelled(PROBE), self.faster_spelled(MANY))

    def faster_turned(self) -> bool:
        """Whether products of a few tokens are faster turned round, timed on all layers' weights as they come from memory.

        On a CPU that reads weights straight into its matrix units (Intel's AMX) they took two thirds of the time, on one
        without (AMD's Zen) 1.6 times as long.
        """
        if self.norm[0].device.type != "cpu":
            return False
        weights = [weight for layer in self.layers for weight in (layer.qkv, layer.out.weight, layer.gate_up, layer.down.weight)]
        states = {weight.shape[1]: weight.new_ones(PROBE, weight.shape[1]) for weight in weights}
        return faster(lambda turned: [product(states[w.shape[1]], w, None, turned) for w in weights], 1)

    def faster_spelled(self, tokens: int) -> bool:
        """Whether attention of so many tokens to a prompt is faster as two products and a softmax than by torch's kernel, timed.

        Considered on a CPU in half precision. Of a whole prompt it took 0.4 of the kernel's time on an AMD EPYC, twice as long on
        a Xeon whose matrix units the kernel uses.
        """
        like = self.norm[0]
        if like.device.type != "cpu" or like.dtype == torch.float32:
            return False
        query, key = (like.new_ones(1, heads, n, self.width) for heads, n in ((self.queries, tokens), (self.keys, MANY)))
        bias = like.new_zeros(1, 1, tokens, MANY)
        rows = bias.repeat(1, 1, self.queries // self.keys, 1)
        return faster(lambda spelled: attention(query, key, key, rows if spelled else bias, self.scale, spelled), 5)

    def spells(self, state: Tensor) -> bool:
        """Whether attention of the tokens of `state` [batch, L, hidden] is spelled out."""
        return self.spelled[state.shape[:-1].numel() > FEW]

    @staticmethod
    def take(layer: Any) -> Layer:
        """The weights of one of the model's layers."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = together(attention.q_proj, attention.k_proj, attention.v_proj)
        gate_up, gate_up_bias = together(mlp.gate_proj, mlp.up_proj)
        heads = (norm(attention.q_norm), norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        before, after = norm(layer.input_layernorm), norm(layer.post_attention_layernorm)
        return Layer(qkv, qkv_bias, attention.o_proj, gate_up, gate_up_bias, mlp.down_proj, before, after, heads)

    def __call__(self, embedded: Tensor, positions: Tensor, mask: Tensor, cache: Any = None, every: bool = True) -> list[Tensor]:
        """States [batch, L, hidden] behind every layer, the embeddings first and the last one normed, as transformers has them.

        Parameters
        ----------
        embedded
            [batch, L, hidden].
        positions
            [batch, L].
        mask
            [batch, 1, L, kept + L], True where the row may see the column.
        cache
            Keys and values [batch, key heads, kept, head width] of every layer, which are seen too; or a transformers cache,
            which also gets those computed here.
        every
            False to keep the last one's alone.
        """
        tables, states = self.tables(embedded, positions, mask), [embedded]
        for number in range(len(self.layers)):
            made = self.layer(number, states[-1], *tables, cache)
            states = [*states, made] if every else [made]
        states[-1] = self.last(states[-1])
        return states

    def tables(self, like: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What all layers share: the mask as numbers to add, cosine, and sine with its first half negated, of the positions."""
        bias = torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        if self.spells(like):
            bias = bias.repeat(1, 1, self.queries // self.keys, 1)
        cos, sin = (table[:, :, None] for table in self.rotary(like, positions))  # [batch, L, 1, head width]
        half = self.width // 2
        return bias, cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    def last(self, state: Tensor) -> Tensor:
        """The norm behind the last layer."""
        return F.rms_norm(state, state.shape[-1:], *self.norm)

    def layer(self, number: int, state: Tensor, bias: Tensor, cos: Tensor, turned: Tensor, cache: Any = None) -> Tensor:
        """State [batch, L, hidden] behind one layer; `bias` is added to attention, `cos` and `turned` rotate the positions."""
        layer, (batch, length, hidden) = self.layers[number], state.shape
        normed = F.rms_norm(state, (hidden,), *layer.before)
        made = product(normed, layer.qkv, layer.qkv_bias, self.turned).contiguous().view(batch, length, -1, self.width)
        both, value = made.split([self.queries + self.keys, self.keys], dim=2)
        if layer.heads:
            parts = zip(both.split([self.queries, self.keys], dim=2), layer.heads, strict=True)
            both = torch.cat([F.rms_norm(part, (self.width,), *weights) for part, weights in parts], dim=2)
        both = torch.addcmul(both * cos, both.roll(self.width // 2, -1), turned)
        query, key = (part.transpose(1, 2) for part in both.split([self.queries, self.keys], dim=2))
        value = value.transpose(1, 2)
        if isinstance(cache, list):
            kept_key, kept_value = cache[number]
            key, value = torch.cat([kept_key, key], dim=2), torch.cat([kept_value, value], dim=2)
        elif cache is not None:
            key, value = cache.update(key, value, number)
        seen = attention(query, key, value, bias, self.scale, self.spells(state)).reshape(batch, length, -1)
        state = state + product(seen, layer.out.weight, layer.out.bias, self.turned)
        normed = F.rms_norm(state, (hidden,), *layer.after)
        gate, up = product(normed, layer.gate_up, layer.gate_up_bias, self.turned).chunk(2, dim=-1)
        return state + product(self.activation(gate) * up, layer.down.weight, layer.down.bias, self.turned)


@torch.no_grad()
def fuse(causal: Any) -> Fused | None:
    """The fused layers of a Hugging Face causal LM without adapter; None where its architecture is another.

    Tried on a dozen tokens, each layer on the state that the model itself has before it: in bfloat16, differences of rounding
    would otherwise grow from layer to layer. The median token decides, since a single one may have a state a hundred times
    another's and be rounded accordingly. The model goes on working: the weights are shared.
    """
    try:
        fused = Fused(causal)
    except (AttributeError, TypeError, RuntimeError):
        return None
    ids = torch.arange(3, 3 + PROBE, device=causal.get_input_embeddings().weight.device)[None] % causal.config.vocab_size
    mask = torch.ones(1, 1, PROBE, PROBE, dtype=torch.bool, device=ids.device).tril()
    wanted = causal.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    places = torch.arange(PROBE, device=ids.device)[None]
    bound = 1e-5 if wanted[0].dtype == torch.float32 else 0.01
    embedded = causal.get_input_embeddings()(ids)
    if len(wanted) != len(fused.layers) + 1 or not torch.equal(wanted[0], embedded):  # the model multiplies its embeddings
        return None
    try:
        tables = fused.tables(wanted[0], places, mask)
        found = [fused.layer(number, state, *tables) for number, state in enumerate(wanted[:-1])]
    except RuntimeError:
        return None
    found[-1] = fused.last(found[-1])
    for before, ours, after in zip(wanted[:-1], found, wanted[1:], strict=True):
        size = before.float().norm(dim=-1) + after.float().norm(dim=-1)
        if not bool(((ours.float() - after.float()).norm(dim=-1) / size).median() < bound):
            return None
    return fused
