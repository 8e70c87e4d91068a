"""Functions that are rewritten in other functions, which have rules: gated units, attention, sums of products."""

import inspect
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import REWRITES, rule


@rule("glu", rewrite=True)
def gated_linear_unit(input: Tensor, dim: int = -1) -> Tensor:
    """Gate the first half of an axis with the second."""
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


@rule("normalize", rewrite=True)
def normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *_: Any) -> Tensor:
    """Divide by the length."""
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps)


def _fold_axis(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> object:
    """Let a convolution whose kernel covers all of one axis read the units of that axis as its channels."""
    if weight.shape[1] > 1 or groups > 1 or input.dim() != weight.dim():
        return NotImplemented
    for dim, size in enumerate(input.shape[2:], start=2):
        around = padding[dim - 2] if isinstance(padding, (list, tuple)) else padding
        if size == weight.shape[dim] > 1 and around in (0, "valid"):
            convolve = getattr(F, f"conv{weight.dim() - 2}d")
            return convolve(input.transpose(1, dim), weight.transpose(1, dim), bias, stride, padding, dilation)
    return NotImplemented


REWRITES |= dict.fromkeys(("conv1d", "conv2d", "conv3d"), _fold_axis)  # beside the rule, which the others follow


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", rewrite=True)
def distance(input: Tensor, target: Tensor, *args: Any, reduction: str = "mean", **kwargs: Any) -> object:
    """Take the mean or the sum of a function of differences, or all its values."""
    if any(isinstance(x, (bool, Tensor)) for x in (*args, *kwargs.values())):  # `reduce`, or a weight
        return NotImplemented
    reduction = next((x for x in args if isinstance(x, str)), reduction)
    lengths = (input - target).square()
    return lengths if reduction == "none" else getattr(lengths, reduction)()


@rule("embedding_bag", rewrite=True)
def embedding_bag(input: Tensor, weight: Tensor, offsets: Tensor | None = None, *args: Any, **kwargs: Any) -> object:
    """Sum the rows of each bag, or take their mean or maximum."""
    names = (
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "mode",
        "sparse",
        "per_sample_weights",
        "include_last_offset",
    )
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("max_norm") is not None or given.get("per_sample_weights") is not None:
        return NotImplemented
    bags = len(input) if offsets is None else len(offsets) - bool(given.get("include_last_offset"))
    rows = F.embedding(input.reshape(-1)[:1], weight)[None].expand(bags, 2, -1)
    return rows.amax(1) if given.get("mode") == "max" else rows.sum(1)


@rule("addmm", "baddbmm", rewrite=True)
def add_product(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, **_: Any) -> Tensor:
    """Add a matrix product."""
    product = a @ b if alpha == 1 else a @ b * alpha
    if beta == 0:
        return product
    return product + (bias if beta == 1 else bias * beta)


@rule("outer", "ger", rewrite=True)
def outer(a: Tensor, b: Tensor, **_: Any) -> Tensor:
    """Multiply every element of one vector by every element of another."""
    return a[:, None] * b


@rule("scaled_dot_product_attention", rewrite=True)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *_: Any,
    scale: float | None = None,
    enable_gqa: bool = False,
    **__: Any,
) -> Tensor:
    """Multiply the softmax of queries times keys by the values. Masks hide positions and say nothing of units."""
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    return _attention_weights(query, key, attn_mask, scale) @ value


def _attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    logits = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None and mask.is_floating_point():
        logits = logits + mask
    return logits.softmax(-1)


MULTI_HEAD_ATTENTION = inspect.signature(F.multi_head_attention_forward)


@rule("multi_head_attention_forward", rewrite=True)
def multi_head_attention(*args: Any, **kwargs: Any) -> object:
    """Project queries, keys and values, attend in every head, and project the heads' results."""
    given = MULTI_HEAD_ATTENTION.bind(*args, **kwargs)
    given.apply_defaults()
    call = SimpleNamespace(**given.arguments)
    if call.static_k is not None or call.static_v is not None:
        return NotImplemented
    if call.use_separate_proj_weight:
        weights = (call.q_proj_weight, call.k_proj_weight, call.v_proj_weight)
    else:
        weights = call.in_proj_weight.chunk(3)
    biases = (None, None, None) if call.in_proj_bias is None else call.in_proj_bias.chunk(3)
    inputs = (call.query, call.key, call.value)
    projected = [F.linear(x, weight, bias) for x, weight, bias in zip(inputs, weights, biases, strict=True)]
    for which, more in ((1, call.bias_k), (2, call.bias_v)):
        if more is not None:
            shape = (1, *projected[which].shape[1:])
            projected[which] = torch.cat([projected[which], more.reshape(-1).expand(shape)])
    # (..., head, position, unit)
    query, key, value = (x.unflatten(-1, (call.num_heads, -1)).movedim(0, -2) for x in projected)
    if call.add_zero_attn:
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
    if (mask := call.attn_mask) is not None:
        mask = F.pad(mask, (0, key.shape[-2] - mask.shape[-1]))
        mask = mask.reshape(*query.shape[:-1], -1) if mask.dim() == 3 else mask  # of each head, or of all
    weights = _attention_weights(query, key, mask)
    merged = (weights @ value).movedim(-2, 0).flatten(-2)
    returned = weights.mean(-3) if call.average_attn_weights else weights
    return F.linear(merged, call.out_proj_weight, call.out_proj_bias), returned


@rule("einsum", rewrite=True)
def einsum(equation: object, *operands: Tensor) -> object:
    """Write two factors as a matrix product, or as a product element by element and a sum; more, two at a time."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        return einsum(equation, *operands[0])
    if isinstance(equation, str) and len(operands) > 2 and "->" in equation and "." not in equation:
        a, b, *rest = equation.replace(" ", "").partition("->")[0].split(",")
        left = "".join(c for c in dict.fromkeys(a + b) if c in "".join([*rest, equation.partition("->")[2]]))
        product = torch.einsum(f"{a},{b}->{left}", *operands[:2])
        return torch.einsum(",".join([left, *rest]) + equation[equation.index("->") :], product, *operands[2:])
    terms, arrow, result = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    a, comma, b = terms.partition(",")
    if not (arrow and comma) or "." in terms or any(len(set(term)) < len(term) for term in (a, b, result)):
        return NotImplemented
    if len(operands) != 2 or not set(result) <= set(a) | set(b):
        return NotImplemented
    summed = [c for c in a if c in b and c not in result]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    if summed and rows and columns and set(rows + columns) <= set(result):
        return _einsum_by_matmul(operands, (a, b, result), summed)
    return _einsum_by_mul(operands, (a, b, result))


def _einsum_by_matmul(operands: Sequence[Tensor], terms: tuple[str, str, str], summed: list[str]) -> Tensor:
    """Multiply (own axes x `summed`) by (`summed` x own axes), for every entry of the axes that both factors keep."""
    a, b, result = terms
    batch = [c for c in a if c in b and c in result]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    sizes = dict(zip(a, operands[0].shape, strict=True)) | dict(zip(b, operands[1].shape, strict=True))

    def as_matrix(x: Tensor, term: str, *axes: list[str]) -> Tensor:
        x = x.permute([term.index(c) for c in [*batch, *axes[0], *axes[1]]])
        return x.reshape(*x.shape[: len(batch)], *(math.prod(sizes[c] for c in each) for each in axes))

    product = as_matrix(operands[0], a, rows, summed) @ as_matrix(operands[1], b, summed, columns)
    order = batch + rows + columns
    return product.reshape([sizes[c] for c in order]).permute([order.index(c) for c in result])


def _einsum_by_mul(operands: Sequence[Tensor], terms: tuple[str, str, str]) -> Tensor:
    """Multiply element by element, and sum over the axes that the result lacks."""
    a, b, result = terms
    axes = [*result, *(c for c in dict.fromkeys(a + b) if c not in result)]
    left, right = (
        x.permute([term.index(c) for c in axes if c in term]).reshape(
            [x.shape[term.index(c)] if c in term else 1 for c in axes]
        )
        for x, term in zip(operands, (a, b), strict=True)
    )
    product = left * right
    return product.sum(list(range(len(result), len(axes)))) if len(axes) > len(result) else product
