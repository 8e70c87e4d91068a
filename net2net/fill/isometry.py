"""One vector in more numbers, twice over, so that layer norms before and behind a row of weights see no difference.

A layer norm has a weight for each channel. Where its output is a stream that other layer norms read, a wider student
needs two isometries: A for what the norm sees, Q for the stream, and new weights between them:
diag(weight') A = Q diag(weight). Layer norms subtract the mean, which has to stay apart: Q sends means to means, and
what A makes of the rest has none. Copies of channels are one solution, where the width is a multiple of the teacher's.
For other widths we know of no closed form: `frames` finds a solution numerically, to rounding.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import TransferError

SMALLEST = 9  # channels that are solved for together, at least: fewer have more equations than unknowns
LARGEST = 1200  # entries of a block's Q: more take minutes
SIZES = (0.9, 0.7)  # of what is left of the mean behind A; at 1 the equations are singular
STARTS, STEPS, EXACT = 3, 60, 1e-12


def isometry(channels: int, wider: int) -> Tensor:
    """Q alone (`wider` x channels), for a stream that no norm begins: one such isometry, always the same."""
    return _isometry(channels, wider, torch.Generator().manual_seed(0))


def frames(weight: Tensor, wider: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q, A (each `wider` x channels) and new weights (`wider`), all in double precision, for a norm's `weight`.

    Q'Q = A'A = 1, Q1 = sqrt(channels / wider) 1, A'1 is a multiple of 1, and diag(new) A = Q diag(weight). The same for
    the same weights. Raises TransferError if none is found: there is one for most weights if `wider` is larger by three
    at least, and shares a divisor with the number of channels if that is large.
    """
    return _frames(tuple(weight.detach().double().tolist()), wider)


@lru_cache(maxsize=4)
def _frames(weights: tuple[float, ...], wider: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.tensor(weights, dtype=torch.double)
    channels, scale = len(weight), weight.abs().mean().clamp(min=torch.finfo(torch.double).tiny)
    units = math.gcd(channels, wider)  # of so many channels in so many, each block of them keeps the ratio
    each = channels // units
    parts = max(1, units // -(-SMALLEST // each))
    largest = -(-units // parts) * each
    solvable = largest * largest * wider <= LARGEST * channels and bool(weight.isfinite().all())
    for size in SIZES if solvable else ():
        solved = []
        for part in torch.arange(units).tensor_split(parts):
            block = weight[int(part[0]) * each : (int(part[-1]) + 1) * each] / scale
            solved.append(_solved(block, len(part) * wider // units, size))
            if solved[-1] is None:
                break
        else:
            stream, inverse = zip(*solved, strict=True)
            q, inverse = torch.block_diag(*stream), torch.cat(inverse) / scale
            return q, inverse[:, None] * q * weight, 1 / inverse
    raise TransferError(
        f"A norm with weights begins a stream of {channels} channels, and other norms take its mean: no way was found "
        f"to write them as {wider}. A multiple of {channels} serves, or a width that shares a larger divisor with it."
    )


def _solved(weight: Tensor, wider: int, size: float) -> tuple[Tensor, Tensor] | None:
    """Q and the inverse of the new weights, by damped Gauss-Newton steps from some starts; None if none leads there."""
    channels, mean = len(weight), math.sqrt(wider / len(weight))
    row, column = torch.triu_indices(channels, channels)
    one = torch.eye(channels, dtype=torch.double)[row, column]

    def residual(x: Tensor) -> Tensor:
        q, inverse = x[:-wider].reshape(wider, channels), x[-wider:]
        a = inverse[:, None] * q * weight
        frame = [(each.T @ each)[row, column] - one for each in (q, a)]
        return torch.cat([*frame, q.sum(1) - 1 / mean, a.sum(0) - mean * size])

    def slopes(x: Tensor) -> Tensor:
        return torch.func.jacrev(residual)(x)  # type: ignore[no-any-return]

    generator = torch.Generator().manual_seed(0)
    low, high = float(weight.abs().min()), float(weight.abs().max())
    for _ in range(STARTS):
        drawn = low + (high - low) * torch.rand(wider, generator=generator, dtype=torch.double)
        x = torch.cat([_isometry(channels, wider, generator).reshape(-1), 1 / drawn.clamp(min=0.1)])
        left, damping = residual(x), 1.0
        for _ in range(STEPS):
            u, s, v = torch.linalg.svd(slopes(x), full_matrices=False)
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


def _isometry(channels: int, wider: int, generator: torch.Generator) -> Tensor:
    """A random one that sends means to means."""
    bases = []
    for size in (wider, channels):
        drawn = torch.randn(size, size, generator=generator, dtype=torch.double)
        drawn[:, 0] = 1.0
        basis = torch.linalg.qr(drawn).Q
        bases.append(basis * basis[0, 0].sign())
    return bases[0][:, :channels] @ bases[1].T
