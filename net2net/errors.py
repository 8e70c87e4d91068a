"""The one error that this package raises on purpose."""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


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


class Fault(TransferError):
    """An error that this package did not raise on purpose; it says where it was raised."""


@contextmanager
def no_other_error(doing: str) -> Iterator[None]:
    """Turn any exception but TransferError into a TransferError that says where it was raised, and `doing` what."""
    try:
        yield
    except TransferError:
        raise
    except Exception as error:
        package = Path(__file__).parent
        frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        file, line = [frame for frame in frames if package in frame[0].parents][-1]
        if file == Path(__file__):  # the call itself: an argument is missing, or unknown
            raise TransferError(
                f"{error}. The example of net2net.{doing} is an input of the network: a tensor, a tuple of arguments "
                "or a dict of keyword arguments."
            ) from None
        at = f"{file.relative_to(package.parent)}, line {line}"
        raise Fault(
            f"{doing} stopped at {at}: {type(error).__name__}: {error}. That is a fault of net2net, unless a function "
            "that you passed in raises it: please report it."
        ) from error


def used_differently(name: str) -> TransferError:
    """Return the error of a tensor that the two networks use differently."""
    where = "in the teacher and in the student, or in one of them not at all"
    advice = "if values choose what is used, give an example with more rows"
    return TransferError(f"The forward pass uses {name} differently {where}: {advice}.")
