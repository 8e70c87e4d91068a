"""A rival: the student from scratch also learns its teacher's outputs (Hinton et al. 2015, arXiv 1503.02531)."""

from .arm import Arm

ARM = Arm(
    name="distilled",
    place=5,
    summary="the student from scratch, which also learns its teacher's outputs (Hinton et al. 2015)",
    look=("#009e73", (0, (3, 1, 1, 1)), "P"),
    rate=1.0,
    needs_teacher=True,
    is_default=False,
    is_guided=True,
    reads=("guide_share", "guide_temperature"),
)
