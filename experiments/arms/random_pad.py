"""The paper's baseline (section 4.2): the teacher's weights in a corner of each tensor, random ones around them."""

from .arm import Arm, Start


def start(start: Start) -> None:
    """Fill a corner of each tensor with the teacher's."""
    start.random_pad()


ARM = Arm(
    name="random_pad",
    place=1,
    summary="the teacher's weights, padded with random ones (paper, section 4.2)",
    look=("#e69f00", (0, (5, 1.5)), "s"),
    rate=0.1,
    start=start,
    needs_teacher=True,
    starts_from_teacher=True,
)
