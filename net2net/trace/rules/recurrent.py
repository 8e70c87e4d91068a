"""Recurrent functions of torch, rewritten as two time steps: these show everything that a step does to units.

A first step from nothing makes a state, a second one reads it (and shows the bias that the first leaves out). Where the
network gives a first state of its own, both read one. The results have the labels of the second, at every position: the
units of all steps are the same.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]  # what is shown, and of an LSTM what is kept
Step = Callable[[Tensor, Tensor | None, State | None], State]  # of what is seen, what the last state says, and that


def _gates(seen: Tensor, back: Tensor | None, count: int) -> list[Tensor]:
    """Gate by gate, so that each meets its own."""
    gates = seen.chunk(count, -1)
    return list(gates) if back is None else [a + b for a, b in zip(gates, back.chunk(count, -1), strict=True)]


def _lstm(seen: Tensor, back: Tensor | None, state: State | None) -> State:
    enter, forget, new, leave = _gates(seen, back, 4)
    kept = enter.sigmoid() * new.tanh()
    if state is not None:
        kept = forget.sigmoid() * state[1] + kept
    return leave.sigmoid() * kept.tanh(), kept


def _gru(seen: Tensor, back: Tensor | None, state: State | None) -> State:
    reset, update, new = seen.chunk(3, -1)
    if back is not None:
        to_reset, to_update, to_new = back.chunk(3, -1)
        update, new = update + to_update, new + (reset + to_reset).sigmoid() * to_new
    update, new = update.sigmoid(), new.tanh()
    return ((1 - update) * new + (update * state[0] if state is not None else 0.0),)


def _simple(bend: Callable[[Tensor], Tensor], seen: Tensor, back: Tensor | None, state: State | None) -> State:
    return (bend(seen if back is None else seen + back),)


def _blank(state: Tensor) -> bool:
    """Whether nothing is known of a first state but that it is zero, as torch makes one."""
    followed = isinstance(state, nn.Parameter) or any(key.startswith("_net2net") for key in vars(state))
    return not (followed or state.any())


def _second(
    step: Step, seen: Sequence[Tensor], first: State, weight: Tensor, bias: Tensor | None, *project: Tensor
) -> State:
    """The state after two steps; `weight` and `bias` read the state, `project` makes what is shown (proj_size)."""
    state = None if all(map(_blank, first)) else first
    for x in seen:
        back = None if state is None else F.linear(state[0], weight, bias)
        shown, *kept = step(x, back, state)
        state = (F.linear(shown, *project) if project else shown, *kept)
    assert state is not None
    return state


def _cell(step: Step, x: Tensor, state: Any, weight: Tensor, back: Tensor, *biases: Tensor | None) -> Any:
    bias, bias_back = biases or (None, None)
    seen = F.linear(x, weight, bias)
    made = _second(step, (seen, seen), state if isinstance(state, tuple) else (state,), back, bias_back)
    return made if isinstance(state, tuple) else made[0]


def _stack(step: Step, x: Tensor, *rest: Any) -> Any:
    """Layers and directions of an nn.RNNBase, on a sequence or a packed one."""
    packed = isinstance(rest[2], (list, tuple))
    sizes, (states, weights, biased, layers, _, _, both, *first) = (rest[0], rest[1:]) if packed else (None, rest)
    time = 1 if first and first[0] else 0
    starts = states if isinstance(states, tuple) else (states,)
    runs = layers * (2 if both else 1)
    each = len(weights) // runs
    shown: list[Tensor] = []
    ends: list[State] = []
    for run in range(runs):
        weight, back, *others = weights[run * each : (run + 1) * each]
        bias, bias_back, *project = others if biased else (None, None, *others)
        seen = F.linear(x, weight, bias)
        steps = [seen.select(time, place) for place in (0, -1)] if sizes is None else [seen[: int(sizes[0])]] * 2
        ends.append(_second(step, steps, tuple(start[run] for start in starts), back, bias_back, *project))
        last = ends[-1][0]
        everywhere = last.unsqueeze(time) if sizes is None else last[:1]
        shown.append(everywhere.expand(*seen.shape[:-1], last.shape[-1]))
        if not both or run % 2:
            x, shown = torch.cat(shown, -1) if both else shown[0], []
    return x, *(torch.stack(column) for column in zip(*ends, strict=True))


def _rows(sizes: Tensor) -> tuple[list[int], list[int]]:
    """Of every row of a packed sequence its step and its place in the batch."""
    rows = [(step, place) for step, size in enumerate(sizes.tolist()) for place in range(size)]
    return [step for step, _ in rows], [place for _, place in rows]


def _packed(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor]:
    sizes = torch.stack([(lengths > step).sum() for step in range(int(lengths.max()))])
    return ((x.transpose(0, 1) if batch_first else x)[_rows(sizes)],)


def _padded(data: Tensor, sizes: Tensor, batch_first: bool, value: float, length: int) -> tuple[Tensor]:
    rows = torch.zeros(max(length, len(sizes)), int(sizes[0]), dtype=torch.long)  # what is padded is of the same units
    rows[_rows(sizes)] = torch.arange(len(data))
    x = data[rows]
    return (x.transpose(0, 1) if batch_first else x,)


STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_simple, torch.tanh),
    "rnn_relu": partial(_simple, F.relu),
}
RECURRENT: dict[str, Callable] = {
    **{name: partial(_stack, step) for name, step in STEPS.items()},
    **{f"{name}_cell": partial(_cell, step) for name, step in STEPS.items()},
    "_pack_padded_sequence": _packed,
    "_pad_packed_sequence": _padded,
}
