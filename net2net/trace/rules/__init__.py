"""What each torch function does to units: one short rule for each family of functions.

A rule reads the labels of a call's arguments and labels its results. A function without a rule pins the units that it
meets: they keep their width, and an attempt to grow them is refused with the function's name. Rules register
themselves with `rule`; users register their own in the same way. What these need is here: the types of a rule's
arguments, `first_labels`, `spread`, `CannotFollow`, and the rules that fit whole families.
"""

from ..facts import Call, Labels
from ..graph import Trace
from ..units import spread
from . import layers, norms, recurrent, rewrites  # noqa: F401 (they register their rules)
from .elementwise import pointwise
from .movement import movement
from .reductions import channelwise, lengthwise
from .registry import CannotFollow, first_labels, rule

__all__ = ["Call", "CannotFollow", "Labels", "Trace", "channelwise", "first_labels", "lengthwise", "movement"]
__all__ += ["pointwise", "rule", "spread"]
