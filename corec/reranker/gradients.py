"""Operations of a decoder layer with gradients of their own, for training on a CPU.

Each is one node of torch's graph instead of several. A projection adds LoRA to the result of its product, with the matrices of
all its parts at once; attention omits the columns that no token of a block attends to; the norm and the gated activation make few
passes over their input. Only the gradients that fine-tuning needs are computed: those of the inputs and of LoRA, not those of the
frozen weights.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

BLOCK = 128  # largest number of tokens in a block of attention


class Lora(NamedTuple):
    """Adapter of one projection, or of several with the same input, one after another in the output."""

    down: list[Tensor]  # A of each part [r, input width]
    up: list[Tensor]  # B of each part [its output width, r]
    scale: float  # alpha / r


class Adapted(Function):
    """y = x W' + b + scale * (x A') B', with the gradients of x, A and B (LoRA; Hu et al., 2022)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:  # noqa: D102
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ down.t()  # [tokens, r of all parts]
        output = F.linear(flat, weight, bias).addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(flat, weight, down, up, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, weight, down, up, inner = ctx.saved_tensors
        gradient = gradients[0].reshape(len(x), -1)
        of_inner = (gradient @ up).mul_(ctx.scale)
        of_x = (gradient @ weight).addmm_(of_inner, down).view(ctx.shape)
        return of_x, None, None, of_inner.t() @ x, (inner.t() @ gradient).t().mul_(ctx.scale), None


def adapted(x: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora) -> Tensor:
    """Linear layer of `x` [..., input width] with an adapter: [..., output width]."""
    down = torch.cat(lora.down) if len(lora.down) > 1 else lora.down[0]
    up = torch.block_diag(*lora.up) if len(lora.up) > 1 else lora.up[0]
    return Adapted.apply(x, weight, bias, down, up, lora.scale)  # type: ignore[no-any-return, no-untyped-call]


class Norm(Function):
    """RMSNorm (Zhang and Sennrich, 2019) with a frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return F.rms_norm(x, x.shape[-1:], weight, epsilon)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        x, weight = ctx.saved_tensors
        width, gradient, precise = x.shape[-1], gradients[0] * weight, torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise).square() / width
        inverse = (square + ctx.epsilon).rsqrt()  # 1 / root mean square [..., 1]
        along = (gradient * x).sum(-1, keepdim=True, dtype=precise)
        shift = (-along * inverse.pow(3) / width).to(x.dtype)
        return torch.addcmul(x * shift, gradient, inverse.to(x.dtype)), None, None


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of `x` [..., width]."""
    return Norm.apply(x, weight, epsilon)  # type: ignore[no-any-return, no-untyped-call]


class Gated(Function):
    """silu(g) * u of [..., g and u] (SwiGLU; Shazeer, 2020)."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: D102
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        found = torch.empty_like(both)
        of_gate, of_up = found.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=of_gate)
        torch.mul(gradients[0], F.silu(gate), out=of_up)
        return found


def gated(both: Tensor) -> Tensor:
    """silu(g) * u for `both`, in which g [..., width] and u [..., width] are concatenated along the last dimension."""
    return Gated.apply(both)  # type: ignore[no-any-return, no-untyped-call]


class Attention(Function):
    """Grouped-query attention, spelled out: softmax(scale * q k' + bias) v in blocks of queries, one batch element at a time.

    The queries attend to no later key, so a block of them needs the columns up to its own end only; and a block's scores stay in
    the cache of the processor.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, keep: bool, *blocks: Tensor) -> Tensor:  # noqa: D102
        (batch, heads, length, width), groups, cached = query.shape, key.shape[1], key.shape[2] - query.shape[2]
        output, kept, start = query.new_empty(batch, length, heads, width), [], 0
        for block in blocks:  # [batch, 1, heads / groups * tokens, columns]
            stop = block.shape[3] - cached
            for i in range(batch):
                q = query[i, :, start:stop].reshape(groups, -1, width)
                k, v = key[i, :, : block.shape[3]], value[i, :, : block.shape[3]]
                scores = torch.baddbmm(block[i].expand(groups, -1, -1), q, k.mT, alpha=scale).softmax(-1)
                output[i, start:stop] = torch.bmm(scores, v).view(heads, stop - start, width).transpose(0, 1)
                if keep:
                    kept.append(scores)
            start = stop
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        query, key, value, *kept = ctx.saved_tensors
        (batch, heads, _, width), groups, cached = query.shape, key.shape[1], key.shape[2] - query.shape[2]
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for i in range(batch):
            start = 0
            for scores in kept[i::batch]:
                columns = scores.shape[2]
                stop = columns - cached
                g = gradients[0][i, start:stop].transpose(0, 1).reshape(groups, -1, width)
                q = query[i, :, start:stop].reshape(groups, -1, width)
                of_value[i, :, :columns] += torch.bmm(scores.mT, g)
                change = torch._softmax_backward_data(torch.bmm(g, value[i, :, :columns].mT), scores, -1, scores.dtype)
                of_query[i, :, start:stop] = torch.bmm(change, key[i, :, :columns]).view(heads, stop - start, width)
                of_key[i, :, :columns] += torch.bmm(change.mT, q)
                start = stop
        return of_query.mul_(ctx.scale), of_key.mul_(ctx.scale), of_value, *([None] * (2 + len(kept) // batch))


def blocks_of(bias: Tensor, rows: int, size: int = BLOCK) -> list[Tensor]:
    """Cut an additive mask [batch, 1, L, columns] into blocks of at most `size` tokens for :func:`attention`.

    The columns that come after the tokens of a block are left out, and what is left is repeated `rows` times, once for each query
    head of a group: [batch, 1, rows * tokens, columns].
    """
    length, columns = bias.shape[2:]
    number = -(-length // size)
    ends = [length * place // number for place in range(number + 1)]
    return [bias[:, :, start:stop, : columns - length + stop].repeat(1, 1, rows, 1) for start, stop in pairwise(ends)]


def attention(query: Tensor, key: Tensor, value: Tensor, blocks: list[Tensor], scale: float) -> Tensor:
    """Grouped-query attention with an additive mask.

    Parameters
    ----------
    query
        [batch, heads, L, head width].
    key, value
        [batch, key heads, columns, head width]; the last L columns are those of the queries.
    blocks
        The mask, as :func:`blocks_of` gives it.
    scale
        Factor of the products of query and key.

    Returns
    -------
    [batch, L, heads, head width].
    """
    keep = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return Attention.apply(query, key, value, scale, keep, *blocks)  # type: ignore[no-any-return, no-untyped-call]
