"""Net2Net: grow a trained network into a wider or deeper one that computes the same function.

Chen, Goodfellow and Shlens, "Net2Net: Accelerating learning via knowledge transfer", ICLR 2016.
"""

from .blend import Blend
from .certificate import certify, verify
from .equivalence import Equivalence, equivalence
from .errors import TransferError
from .grow.deepen import deepen
from .grow.describe import Description, Group, describe
from .grow.widen import widen
from .record import Axis, Origin, save_record
from .saving import load, save
from .trace.rules import rule
from .transfer import Transfer, load_record, random_pad, replay, transfer

__version__ = "0.1.0"

__all__ = ["Blend", "Transfer", "TransferError", "deepen", "random_pad", "replay", "rule", "transfer", "widen"]
__all__ += ["Axis", "Description", "Equivalence", "Group", "Origin"]
__all__ += ["certify", "describe", "equivalence", "load", "load_record", "save", "save_record", "verify"]
