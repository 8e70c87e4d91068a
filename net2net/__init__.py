"""Net2Net: grow a trained network into a wider or deeper one that computes the same function.

Chen, Goodfellow and Shlens, "Net2Net: Accelerating learning via knowledge transfer", ICLR 2016.
"""

from .equivalence import Equivalence, equivalence
from .errors import TransferError
from .transfer import Axis, Origin, Transfer, random_pad, transfer

__all__ = ["Axis", "Equivalence", "Origin", "Transfer", "TransferError", "equivalence", "random_pad", "transfer"]
