"""The one error that this package raises on purpose."""


class TransferError(Exception):
    """The teacher cannot be carried into the student exactly; the message names the layer and the reason."""
