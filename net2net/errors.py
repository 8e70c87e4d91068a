"""The one error that this package raises on purpose."""


class TransferError(Exception):
    """What was asked for cannot be done exactly, or not at all; the message names the layer, if one stands in the way,
    and the reason."""


def used_differently(name: str) -> TransferError:
    """The error of a tensor that the two networks do not use for the same."""
    return TransferError(f"The forward pass uses {name} differently in the teacher and in the student.")
