"""Two traces of one network: what the eval mode shows, and what the training mode adds to it.

The trace of the eval mode decides what can grow. The network runs in training mode, too, if its own code asks for the
mode, or if there are parameters that the eval mode does not reach. The second trace goes on from the first: a growth
that fits both is exact in both modes. The first trace then takes over the layers that only training reaches, with their
units. It takes over nothing about units that the eval mode shows.
"""

from collections import Counter
from copy import copy
from typing import TypeVar

from torch import Tensor

from .facts import LayerKind
from .graph import Trace

Held = TypeVar("Held")


def fork(trace: Trace) -> Trace:
    """Return a trace that goes on from here into the training mode; this one stays as it is."""
    both, both_units, parameters = _copy(trace), trace.units.copy(), _copy(trace.parameters)
    both.units, both.parameters = both_units, parameters
    both_units.mode, parameters.units = " in training", both_units
    parameters.reached = {name: reached.clone() for name, reached in parameters.reached.items()}
    return both


def _copy(holder: Held) -> Held:
    """Copy an object, the containers in it, and the containers in those; tensors are shared."""
    copied = copy(holder)
    for name, value in vars(holder).items():
        if type(value) in (dict, list, set, Counter):  # not the network's output, which may refuse it
            vars(copied)[name] = held = copy(value)
            if isinstance(held, dict):
                held.update({key: copy(item) for key, item in held.items() if isinstance(item, (list, set))})
    return copied


def learn_missed(trace: Trace, both: Trace, missed: set[str]) -> None:
    """Add to the trace of the eval mode what `both`, which went on from it, shows of the parameters `missed` there."""
    shown = trace.units.learn_new(both.units)

    def is_new(labels: Tensor) -> bool:
        return not bool(shown[labels].any())

    norms = both.norms[len(trace.norms) :]
    trace.norms += [n for n in norms if is_new(n.units) or (n.tensors and missed >= set(n.tensors.values()))]
    trace.contractions += [c for c in both.contractions[len(trace.contractions) :] if is_new(c.left)]
    for name, layer in both.layers.items():
        if name not in trace.layers and layer.kind != LayerKind.OUTPUT:
            trace.layers[name] = layer
    trace.outputs, trace.packed = both.outputs | trace.outputs, both.packed | trace.packed
    trace.parameters.used |= both.parameters.used
    for kind in ("axes", "values", "read_axis", "inner", "reached", "tensors"):
        found = getattr(both.parameters, kind)
        getattr(trace.parameters, kind).update({name: found[name] for name in missed & found.keys()})
