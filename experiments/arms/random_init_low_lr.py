"""Our control: the student from scratch at the low rate of the grown ones. It tells the start from the rate."""

from .arm import Arm

ARM = Arm(
    name="random_init_low_lr",
    place=4,
    summary="the student from scratch at a tenth of the rate",
    look=("#cc79a7", (0, (5, 1.2, 1, 1.2, 1, 1.2)), "v"),
    rate=0.1,
)
