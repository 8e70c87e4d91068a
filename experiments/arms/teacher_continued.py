"""Our control: the teacher is trained on and never grown. It tells whether growing paid."""

from .arm import Arm

ARM = Arm(
    name="teacher_continued",
    place=3,
    summary="the teacher trained on, never grown",
    look=("#555555", (0, (5, 1.2, 1, 1.2)), "D"),
    rate=0.1,
    needs_teacher=True,
    starts_from_teacher=True,
    has_student=False,
    reads=("optimizer_state",),
)
