"""Rotate a stream into a width that is no multiple of the teacher's, so that its layer norms compute the same.

A norm with weights w begins the stream. Find isometries A and Q and new weights w' with diag(w') A = Q diag(w). A
rotates what this norm reads, and Q rotates the stream behind it. Layer norms subtract the mean, so the mean has to stay
apart: Q maps means to means, and A maps rows of mean zero to rows of mean zero. At multiples of the width, copies of
the channels are a solution. For other widths we know of no closed form, and search for a numerical one, to rounding.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import TransferError
from ..record import Matrix, Mixed, Origin

SMALLEST = 9  # the fewest channels to solve for together: fewer have more equations than unknowns
LARGEST = 1200  # the most entries of Q to solve for together: more take minutes
SIZES = (0.9, 0.7)  # how much of the mean A keeps, in the order of the attempts; at 1 the equations are singular
STARTS, STEPS, EXACT = 3, 60, 1e-12  # starting points, steps from each, and the largest residual of a solution


def mix(source: Tensor, origin: Origin, matrices: list[Tensor]) -> tuple[Tensor, Origin]:
    """Multiply a teacher's tensor by the matrices of its rotated axes; return it with the origin of its other axes."""
    if not origin.mixed:
        return source, origin
    for mixed, by in zip(origin.mixed, matrices, strict=True):
        by = by.to(source.device)
        is_matrix = by.dim() > 1
        source = (source.double().movedim(mixed.dim, -1) @ by.T).movedim(-1, mixed.dim) if is_matrix else by
    dims = {mixed.dim for mixed in origin.mixed}
    return source, replace(origin, axes={dim: axis for dim, axis in origin.axes.items() if dim not in dims})


def mixing_matrix(mixed: Mixed, theirs: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix (student's entries, teacher's entries) that a rotated axis is multiplied by, float64."""
    # For a norm's weight, and for the bias of any norm but the first, the result is the vector of new values instead.
    channels, wider = mixed.widths
    positions = len(mixed.columns) // channels
    ratio = (channels / wider) ** 0.5  # norms see the same squares spread over more entries
    if mixed.how == Matrix.OTHER:
        return torch.full((len(mixed.rows),), ratio, dtype=torch.double)
    if mixed.begins is None:
        rotation = _random_isometry(channels, wider, torch.Generator().manual_seed(0))
    else:
        weight = theirs[mixed.begins].detach().double()
        if not bool(weight.isfinite().all()):
            raise TransferError(f"{mixed.begins} of the teacher is not finite: no wider norm can do what it does.")
        rotation, before, first = find_isometries(tuple(weight.tolist()), wider)
        if mixed.how == Matrix.FIRST:
            return ratio * first[mixed.rows]
        if mixed.how == Matrix.BEFORE:
            rotation = before - before.mean(1, keepdim=True)  # the norm takes the mean away anyway
    # The biases of norms add a constant. A direction that is orthogonal to all that is on the stream carries it.
    one = torch.linalg.qr(rotation, mode="complete").Q[:, -1].repeat(positions)[mixed.rows]
    if mixed.how == Matrix.BIAS:
        return one
    matrix = torch.block_diag(*[rotation] * positions)[mixed.rows][:, mixed.columns]
    if mixed.how == Matrix.BEHIND:
        scale, shift = (None if name is None else theirs[name].to(matrix) for name in mixed.norm)
        if channels < len(mixed.columns):  # the norm saw each position alone
            position = mixed.columns % channels
            scale, shift = (x[position] if x is not None and len(x) == channels else x for x in (scale, shift))
        matrix = matrix * (ratio if scale is None else scale)  # a norm with a weight has the ratio in that
        matrix = matrix if shift is None else matrix + one[:, None] * shift / positions
    return matrix


@lru_cache(maxsize=4)
def find_isometries(weights: tuple[float, ...], wider: int) -> tuple[Tensor, Tensor, Tensor]:
    """Find Q (wider, channels), A (wider, channels) and new weights (wider), float64, for the weights of a norm."""
    # Q'Q = A'A = 1, Q1 = sqrt(channels / wider) 1, A'1 is a multiple of 1, and diag(new) A = Q diag(weight). Most
    # weights have a solution if `wider` is larger by at least three. Large widths must also share a divisor, because
    # the solution is found block by block, and every block of channels keeps the ratio of the two widths.
    weight = torch.tensor(weights, dtype=torch.double)
    channels, scale = len(weight), weight.abs().mean().clamp(min=torch.finfo(torch.double).tiny)
    units = math.gcd(channels, wider)
    each = channels // units
    blocks = max(1, units // -(-SMALLEST // each))
    largest = -(-units // blocks) * each
    for size in SIZES if largest * largest * wider <= LARGEST * channels else ():
        solved = []
        for part in torch.arange(units).tensor_split(blocks):
            block = weight[int(part[0]) * each : (int(part[-1]) + 1) * each] / scale
            solved.append(_solve(block, len(part) * wider // units, size))
            if solved[-1] is None:
                break
        else:
            stream, inverse = zip(*solved, strict=True)
            q, inverse = torch.block_diag(*stream), torch.cat(inverse) / scale
            return q, inverse[:, None] * q * weight, 1 / inverse
    raise TransferError(
        f"A norm with weights begins a stream of {channels} channels, and other norms take its mean: no rotation into "
        f"{wider} channels was found. A multiple of {channels} serves, or a width that shares a larger divisor with it."
    )


def _solve(weight: Tensor, wider: int, size: float) -> tuple[Tensor, Tensor] | None:
    """Find Q and the inverse of the new weights by damped Gauss-Newton steps; None if no start leads to a solution."""
    channels, mean = len(weight), math.sqrt(wider / len(weight))
    row, column = torch.triu_indices(channels, channels)
    one = torch.eye(channels, dtype=torch.double)[row, column]

    def residual(x: Tensor) -> Tensor:
        q, inverse = x[:-wider].reshape(wider, channels), x[-wider:]
        a = inverse[:, None] * q * weight
        orthogonal = [(each.T @ each)[row, column] - one for each in (q, a)]
        return torch.cat([*orthogonal, q.sum(1) - 1 / mean, a.sum(0) - mean * size])

    jacobian = torch.func.jacrev(residual)
    generator = torch.Generator().manual_seed(0)
    low, high = float(weight.abs().min()), float(weight.abs().max())
    for _ in range(STARTS):
        drawn = low + (high - low) * torch.rand(wider, generator=generator, dtype=torch.double)
        x = torch.cat([_random_isometry(channels, wider, generator).reshape(-1), 1 / drawn.clamp(min=0.1)])
        left, damping = residual(x), 1.0
        for _ in range(STEPS):
            u, s, v = torch.linalg.svd(jacobian(x), full_matrices=False)
            for _ in range(12):
                gain = torch.where(s > 1e-10 * s[0], s / (s * s + damping**2), 0.0)
                moved = x - v.T @ (gain * (u.T @ left))
                after = residual(moved)
                if after.norm() < left.norm():
                    break
                damping *= 4
            else:
                break
            x, left = moved, after
            damping = max(damping / 6, 1e-9 if left.norm() > 1e-3 else 1e-14)
            if left.abs().max() < EXACT / 100:
                break
        if left.abs().max() < EXACT and bool((x[-wider:] != 0).all()):
            return x[:-wider].reshape(wider, channels), x[-wider:]
    return None


def _random_isometry(channels: int, wider: int, generator: torch.Generator) -> Tensor:
    """Draw an isometry (wider, channels) that sends means to means."""
    bases = []
    for size in (wider, channels):
        drawn = torch.randn(size, size, generator=generator, dtype=torch.double)
        drawn[:, 0] = 1.0
        basis = torch.linalg.qr(drawn).Q
        bases.append(basis * basis[0, 0].sign())
    return bases[0][:, :channels] @ bases[1].T
