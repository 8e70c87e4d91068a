"""Recurrent functions rewritten as two time steps, which show everything that a step does to units.

The first step has no state to read, and makes one. The second step reads it with the weights and the bias that the
first one did not use. If the network gives an initial state, both steps read a state. The results have the labels of
the second step at every position, because the units of all steps are the same.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import rule

State = tuple[Tensor, ...]  # the output, and the cell of an LSTM
Activation = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor | None, State | None], State]  # (from the input, from the last state, last state)


def _lstm(from_input: Tensor, from_state: Tensor | None, state: State | None) -> State:
    """Compute one step of an LSTM."""
    gates = from_input.chunk(4, -1)
    if from_state is not None:  # gate by gate, so that each gate meets its own
        gates = [a + b for a, b in zip(gates, from_state.chunk(4, -1), strict=True)]
    enter, forget, new, leave = gates
    cell = enter.sigmoid() * new.tanh()
    if state is not None:
        cell = forget.sigmoid() * state[1] + cell
    return leave.sigmoid() * cell.tanh(), cell


def _gru(from_input: Tensor, from_state: Tensor | None, state: State | None) -> State:
    """Compute one step of a GRU."""
    reset, update, new = from_input.chunk(3, -1)
    if from_state is not None:
        to_reset, to_update, to_new = from_state.chunk(3, -1)
        update, new = update + to_update, new + (reset + to_reset).sigmoid() * to_new
    update, new = update.sigmoid(), new.tanh()
    return ((1 - update) * new + (update * state[0] if state is not None else 0.0),)


def _simple(activation: Activation, from_input: Tensor, from_state: Tensor | None, _: State | None) -> State:
    """Compute one step of a simple recurrent layer."""
    return (activation(from_input if from_state is None else from_input + from_state),)


def _is_blank(state: Tensor) -> bool:
    """Tell whether an initial state is the zeros that torch makes, and neither learned nor computed."""
    is_known = isinstance(state, nn.Parameter) or any(key.startswith("_net2net") for key in vars(state))
    return not (is_known or state.any())


def _two_steps(
    step: Step, inputs: Sequence[Tensor], start: State, weight: Tensor, bias: Tensor | None, *project: Tensor
) -> State:
    """Return the state after two steps; `weight` and `bias` read the state, `project` (proj_size) makes the output."""
    state = None if all(map(_is_blank, start)) else start
    for from_input in inputs:
        from_state = None if state is None else F.linear(state[0], weight, bias)
        output, *cell = step(from_input, from_state, state)
        state = (F.linear(output, *project) if project else output, *cell)
    assert state is not None
    return state


def _cell(step: Step, x: Tensor, state: Any, weight: Tensor, state_weight: Tensor, *biases: Tensor | None) -> Any:
    """Rewrite an nn.RNNCellBase."""
    bias, state_bias = biases or (None, None)
    from_input = F.linear(x, weight, bias)
    start = state if isinstance(state, tuple) else (state,)
    result = _two_steps(step, (from_input, from_input), start, state_weight, state_bias)
    return result if isinstance(state, tuple) else result[0]


def _layers(step: Step, x: Tensor, *rest: Any) -> Any:
    """Rewrite the layers and directions of an nn.RNNBase, on a sequence or a packed one."""
    packed = isinstance(rest[2], (list, tuple))
    sizes, (states, weights, has_bias, layers, _, _, both, *more) = (rest[0], rest[1:]) if packed else (None, rest)
    time = 1 if more and more[0] else 0
    starts = states if isinstance(states, tuple) else (states,)
    runs = layers * (2 if both else 1)
    count = len(weights) // runs
    outputs: list[Tensor] = []
    ends: list[State] = []
    for run in range(runs):
        weight, state_weight, *others = weights[run * count : (run + 1) * count]
        bias, state_bias, *project = others if has_bias else (None, None, *others)
        seen = F.linear(x, weight, bias)
        steps = [seen.select(time, place) for place in (0, -1)] if sizes is None else [seen[: int(sizes[0])]] * 2
        ends.append(_two_steps(step, steps, tuple(each[run] for each in starts), state_weight, state_bias, *project))
        last = ends[-1][0]
        everywhere = last.unsqueeze(time) if sizes is None else last[:1]
        outputs.append(everywhere.expand(*seen.shape[:-1], last.shape[-1]))
        if not both or run % 2:
            x, outputs = torch.cat(outputs, -1) if both else outputs[0], []
    return x, *(torch.stack(column) for column in zip(*ends, strict=True))


for _name, _step in {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": partial(_simple, torch.tanh),
    "rnn_relu": partial(_simple, F.relu),
}.items():
    rule(_name, rewrite=True)(partial(_layers, _step))
    rule(f"{_name}_cell", rewrite=True)(partial(_cell, _step))


def _rows(sizes: Tensor) -> tuple[list[int], list[int]]:
    """Return the step and the place in the batch of every row of a packed sequence."""
    rows = [(step, place) for step, size in enumerate(sizes.tolist()) for place in range(size)]
    return [step for step, _ in rows], [place for _, place in rows]


@rule("_pack_padded_sequence", rewrite=True)
def pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor]:
    """Take the rows of a packed sequence out of a padded one."""
    sizes = torch.stack([(lengths > step).sum() for step in range(int(lengths.max()))])
    return ((x.transpose(0, 1) if batch_first else x)[_rows(sizes)],)


@rule("_pad_packed_sequence", rewrite=True)
def unpack(data: Tensor, sizes: Tensor, batch_first: bool, value: float, length: int) -> tuple[Tensor]:
    """Put the rows of a packed sequence in their places; the padding has the units of a row."""
    rows = torch.zeros(max(length, len(sizes)), int(sizes[0]), dtype=torch.long)
    rows[_rows(sizes)] = torch.arange(len(data))
    x = data[rows]
    return (x.transpose(0, 1) if batch_first else x,)
