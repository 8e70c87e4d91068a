"""The one error that this package raises on purpose."""

from collections.abc import Iterable


class TransferError(Exception):
    """What was asked for cannot be done exactly, or not at all.

    The message names the layer, if one stands in the way, and the reason.

    Attributes:
        reasons: why each way to pair and fill the networks was refused, each reason once, the likeliest first. The
            message is the first of them. Most errors have one reason; where `transfer` tries several ways and all of
            them fail, it has one for each, and the errors themselves are the `ExceptionGroup` that is its cause.

    Example:
        >>> try:
        ...     net2net.transfer(teacher, student, images)
        ... except net2net.TransferError as error:
        ...     for reason in error.reasons:
        ...         print(reason)
    """

    def __init__(self, message: str, reasons: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.reasons = tuple(dict.fromkeys((message, *reasons)))


def used_differently(name: str) -> TransferError:
    """Return the error of a tensor that the two networks do not use for the same."""
    where = "in the teacher and in the student, or in one of them not at all"
    return TransferError(f"The forward pass uses {name} differently {where}.")
