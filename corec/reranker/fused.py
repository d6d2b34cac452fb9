"""Layers of a Llama-like decoder with fewer operations, with LoRA or without.

For a request of seven tokens, the forward of transformers spends most of its time on the overhead of about forty operations
per layer. Here one product computes query, key and value, and another gate and up; the rotary embedding takes three operations;
the mask is converted to an additive bias once instead of in every layer. The remaining cost is reading the weights.

In training, the operations of :mod:`corec.reranker.gradients` compute LoRA together with the projections, and the gradients.

Architectures are not listed by name: :func:`fuse` looks for the modules it knows, compares the fused layers with the model, and
returns None if they differ.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from corec import machine
from corec.reranker import gradients
from corec.reranker.gradients import Lora

PROBE = 12  # tokens of the comparison of the fused layers with the model
FEW = 128  # maximum number of tokens for which a product may be transposed


class Projection(NamedTuple):
    """A projection, or several of the same input, concatenated along the output dimension."""

    weight: Tensor  # [sum of output widths, input width]
    bias: Tensor | None
    lora: Lora | None  # adapter, if the model has one


class Layer(NamedTuple):
    """Weights of one layer."""

    qkv: Projection  # to (heads + 2 key heads) * head width
    out: Projection
    gate_up: Projection  # to 2 * inner
    down: Projection
    before: tuple[Tensor, float]  # weight and epsilon of the norm before attention
    after: tuple[Tensor, float]  # weight and epsilon of the norm before the MLP
    heads: tuple[tuple[Tensor, float], tuple[Tensor, float]] | None  # norms of the query and key heads (Qwen3)


def together(*modules: Any) -> Projection:
    """Concatenate the weights and biases of several projections of the same input.

    The parameters of `modules` become views of the result, so no memory is added.

    Parameters
    ----------
    modules
        Linear layers, or peft's LoRA around them.

    Raises
    ------
    TypeError
        If a module is of another kind, for example quantised, or its adapter has dropout, is merged, or is not plain LoRA.
    """
    parts = [module.base_layer if isinstance(module, LoraLayer) else module for module in modules]
    adapted = [isinstance(module, LoraLayer) for module in modules]
    if any(type(part) is not nn.Linear for part in parts) or any(adapted) != all(adapted):
        raise TypeError("projections of another kind")
    lora = adapter(modules) if adapted[0] else None
    if len(parts) == 1:
        return Projection(parts[0].weight.detach(), None if parts[0].bias is None else parts[0].bias.detach(), lora)
    weight = torch.cat([part.weight.detach() for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])
    start = 0
    for part in parts:
        stop = start + part.out_features
        part.weight = nn.Parameter(weight[start:stop], requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias[start:stop], requires_grad=False)
        start = stop
    return Projection(weight, bias, lora)


def adapter(modules: tuple[Any, ...]) -> Lora:
    """Matrices of the LoRA of `modules`, which are trained in place (raises TypeError unless it is plain LoRA)."""
    active = [name for module in modules for name in module.active_adapters]
    name = active[0] if active else ""
    known = active == [name] * len(modules) and all(name in module.lora_A for module in modules)
    if not known or any(module.merged or module.lora_variant or module.lora_bias[name] for module in modules):
        raise TypeError("an adapter of another kind")
    scales = {module.scaling[name] for module in modules}
    if len(scales) > 1 or any(not isinstance(module.lora_dropout[name], nn.Identity) for module in modules):
        raise TypeError("an adapter of another kind")
    down, up = ([getattr(module, part)[name].weight for module in modules] for part in ("lora_A", "lora_B"))
    return Lora(down, up, scales.pop())


def norm(module: Any) -> tuple[Tensor, float]:
    """Weight and epsilon of an RMSNorm."""
    return module.weight.detach(), module.variance_epsilon


def product(state: Tensor, part: Projection, turned: bool = False) -> Tensor:
    """Project `state` [..., input width].

    With `turned`, at most :data:`FEW` tokens and no adapter, it is computed transposed, as weight times state, for which the
    library chooses another kernel.
    """
    if part.lora is not None:
        return gradients.adapted(state, part.weight, part.bias, part.lora)
    tokens = state.shape[:-1].numel()
    if not turned or tokens > FEW:
        return F.linear(state, part.weight, part.bias)
    output = (part.weight @ state.reshape(tokens, -1).t()).t()
    return (output if part.bias is None else output + part.bias).reshape(*state.shape[:-1], -1)


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | list[Tensor], scale: float) -> Tensor:
    """Grouped-query attention with an additive mask.

    Parameters
    ----------
    query
        [batch, heads, L, head width].
    key, value
        [batch, key heads, columns, head width].
    bias
        Added to the attention scores [batch, 1, L, columns], for torch's kernel; or its blocks (see
        :func:`corec.reranker.gradients.blocks_of`), for attention spelled out as two matrix products and a softmax.
    scale
        Factor of the products of query and key.

    Returns
    -------
    [batch, L, heads, head width].
    """
    if isinstance(bias, list):
        return gradients.attention(query, key, value, bias, scale)
    heads, groups = query.shape[1], key.shape[1]
    grouped = query.device.type == "cpu"
    if heads > groups and not grouped:  # the CUDA kernel with a mask needs one key head per query head
        key, value = key.repeat_interleave(heads // groups, 1), value.repeat_interleave(heads // groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped).transpose(1, 2)


class Fused:
    """Fused layers of a causal LM, with LoRA or without. Create it with :func:`fuse`.

    Raises
    ------
    TypeError
        If a projection is not an ``nn.Linear``, or its adapter not plain LoRA (see :func:`together`).
    AttributeError
        If a module of the Llama architecture is missing.
    """

    def __init__(self, causal: Any) -> None:
        base, config = causal.base_model, causal.config
        self.rotary, self.norm, self.activation = base.rotary_emb, norm(base.norm), base.layers[0].mlp.act_fn
        attention = base.layers[0].self_attn
        self.width, self.scale = attention.head_dim, attention.scaling
        self.queries, self.keys = config.num_attention_heads, config.num_key_value_heads
        self.layers = [self.take(layer) for layer in base.layers]
        self.device = self.norm[0].device
        self.turned, self.spelled = self.choose_turned(), self.choose_spelled()
        self.silu = isinstance(self.activation, nn.SiLU) or type(self.activation).__name__ == "SiLUActivation"

    def choose_turned(self) -> bool:
        """Whether products of up to :data:`FEW` tokens are transposed: on a CPU with matrix units (AMX), in bfloat16.

        The transposed product took two thirds of the time there, and 1.6 times as long on a CPU without them (AMD Zen). The
        choice depends on the processor only, not on a timing: the alternatives round differently, and the same run has to give
        the same numbers. Always False on a GPU, and with an adapter.
        """
        return self.on_cpu_in_half() and "amx_bf16" in (machine.bfloat16_instructions() or []) and self.layers[0].qkv.lora is None

    def choose_spelled(self) -> bool:
        """Whether attention is computed explicitly, not by torch's kernel: on a CPU without matrix units, in half precision.

        Explicit attention took 0.4 of the kernel's time on an AMD EPYC, and twice the kernel's time on a Xeon, where the kernel
        uses the matrix units (see :meth:`choose_turned` for why it is not timed). With an adapter, whose forward passes are
        mostly those of training, it is always explicit: with its backward pass, the kernel took three times as long on the EPYC.
        """
        lora = self.layers[0].qkv.lora is not None
        return self.on_cpu_in_half() and (lora or "amx_bf16" not in (machine.bfloat16_instructions() or []))

    def on_cpu_in_half(self) -> bool:
        """Whether the model is on a CPU, in half precision."""
        return self.device.type == "cpu" and self.norm[0].dtype != torch.float32

    @staticmethod
    def take(layer: Any) -> Layer:
        """Concatenate the weights of one decoder layer of the model (see :func:`together`)."""
        attention, mlp = layer.self_attn, layer.mlp
        heads = (norm(attention.q_norm), norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        return Layer(
            qkv=together(attention.q_proj, attention.k_proj, attention.v_proj),
            out=together(attention.o_proj),
            gate_up=together(mlp.gate_proj, mlp.up_proj),
            down=together(mlp.down_proj),
            before=norm(layer.input_layernorm),
            after=norm(layer.post_attention_layernorm),
            heads=heads,
        )

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

    def tables(self, like: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor | list[Tensor], Tensor, Tensor]:
        """Inputs common to all layers: the additive mask or its blocks, and cosine and signed sine of the rotary embedding.

        `like` [batch, L, hidden] gives the dtype and the number of tokens. Cosine and sine are [batch, L, 1, head width]; the
        first half of the sine is negated.
        """
        added = torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        bias = gradients.blocks_of(added, self.queries // self.keys) if self.spelled else added
        cos, sin = (table[:, :, None] for table in self.rotary(like, positions))  # [batch, L, 1, head width]
        half = self.width // 2
        return bias, cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    def last(self, state: Tensor) -> Tensor:
        """Apply the final norm."""
        return gradients.norm(state, *self.norm)

    def layer(
        self, number: int, state: Tensor, bias: Tensor | list[Tensor], cos: Tensor, turned: Tensor, cache: Any = None
    ) -> Tensor:
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
        layer, (batch, length, _) = self.layers[number], state.shape
        normed = gradients.norm(state, *layer.before)
        qkv = product(normed, layer.qkv, self.turned).contiguous().view(batch, length, -1, self.width)
        both, value = qkv.split([self.queries + self.keys, self.keys], dim=2)
        if layer.heads:
            parts = zip(both.split([self.queries, self.keys], dim=2), layer.heads, strict=True)
            both = torch.cat([gradients.norm(part, *weights) for part, weights in parts], dim=2)
        both = torch.addcmul(both * cos, both.roll(self.width // 2, -1), turned)
        query, key = (part.transpose(1, 2) for part in both.split([self.queries, self.keys], dim=2))
        value = value.transpose(1, 2)
        if isinstance(cache, list):
            cached_key, cached_value = cache[number]
            key, value = torch.cat([cached_key, key], dim=2), torch.cat([cached_value, value], dim=2)
        elif cache is not None:
            key, value = cache.update(key, value, number)
        attended = attention(query, key, value, bias, self.scale).reshape(batch, length, -1)
        state = state + product(attended, layer.out, self.turned)
        both = product(gradients.norm(state, *layer.after), layer.gate_up, self.turned)
        if self.silu:
            inner = gradients.gated(both)
        else:
            gate, up = both.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        return state + product(inner, layer.down, self.turned)


@torch.no_grad()
def fuse(causal: Any) -> Fused | None:
    """Fuse the layers of a Hugging Face causal LM, with LoRA or without. The model remains usable: the weights are shared.

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
