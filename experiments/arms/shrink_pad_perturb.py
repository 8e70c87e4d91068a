"""A rival that keeps no function: random_pad, shrunk towards fresh weights (Ash and Adams 2020, arXiv 1910.08475)."""

from .arm import Arm, Start


def start(start: Start) -> None:
    """Pad the teacher's weights with random ones, then move all weights towards fresh ones."""
    start.random_pad()
    start.shrink_towards_fresh(start.growth.shrink)


ARM = Arm(
    name="shrink_pad_perturb",
    place=6,
    summary="random_pad, shrunk towards fresh weights (after Ash and Adams 2020)",
    look=("#56b4e9", (0, (5, 1, 1, 1, 1, 1)), "d"),
    rate=1.0,
    start=start,
    needs_teacher=True,
    starts_from_teacher=True,
    is_default=False,
    reads=("shrink",),
)
