"""Our recipe: grown exactly, with new units in place of copies.

A version that also learned its teacher's outputs, as `distilled` does, ended below random_pad in two trials, one seed.
"""

from .arm import Arm, Start


def start(start: Start) -> None:
    """Fill the student so that it computes its teacher's function, with new units that nothing reads at first."""
    start.transfer(split="fresh")


ARM = Arm(
    name="net2net_recipe",
    place=7,
    summary="net2net with new units in place of copies (ours)",
    look=("#000000", (0, (3, 1)), "*"),
    rate=0.1,
    start=start,
    needs_teacher=True,
    starts_from_teacher=True,
    is_default=False,
    keeps_function=True,
    reads=("calibrate", "optimizer_state"),
)
