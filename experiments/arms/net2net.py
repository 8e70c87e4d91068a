"""The method (paper, sections 3.3 and 3.4): the student begins as its teacher."""

from .arm import Arm, Start


def start(start: Start) -> None:
    """Fill the student so that it computes its teacher's function."""
    start.transfer()


ARM = Arm(
    name="net2net",
    place=0,
    summary="the student begins with its teacher's function (paper, sections 3.3 and 3.4)",
    look=("#0072b2", "-", "o"),
    rate=0.1,  # the paper's (appendix A)
    start=start,
    needs_teacher=True,
    starts_from_teacher=True,
    keeps_function=True,
    reads=("noise", "split", "calibrate", "optimizer_state"),
)
