"""The one error that this package raises on purpose."""


class TransferError(Exception):
    """The teacher cannot be carried into the student exactly; the message names the layer and the reason."""


def used_differently(name: str) -> TransferError:
    """The error of a tensor that the two networks do not use for the same."""
    return TransferError(f"The forward pass uses {name} differently in the teacher and in the student.")
