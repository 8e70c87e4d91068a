"""The paper's baseline (section 4.2): the student is trained from scratch."""

from .arm import Arm

ARM = Arm(
    name="random_init",
    place=2,
    summary="the student from scratch (paper, section 4.2)",
    look=("#d55e00", (0, (1, 1)), "^"),
    rate=1.0,
)
