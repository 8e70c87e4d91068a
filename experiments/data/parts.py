"""A random part of a picture, as networks for ImageNet are trained on (Szegedy et al. 2015, section 6)."""

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .image_folder import picture

if TYPE_CHECKING:
    from PIL import Image

AREA = (0.08, 1.0)  # share of the picture
RATIO = (3 / 4, 4 / 3)  # width by height
SPARE = 2  # a picture may be decoded smaller while the part keeps so many times the pixels that are asked for

Box = tuple[int, int, int, int]  # left, top, right, bottom


def random_box(width: int, height: int, draw: random.Random) -> Box:
    """The sides of a part: its share of the area is uniform, its ratio log-uniform, its place uniform.

    What does not fit into the picture is drawn again, ten times; then it is the largest part in the centre.
    """
    low, high = (math.log(ratio) for ratio in RATIO)
    for _ in range(10):
        area = draw.uniform(*AREA) * width * height
        ratio = math.exp(draw.uniform(low, high))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = draw.randint(0, width - across), draw.randint(0, height - down)
            return left, top, left + across, top + down
    across, down = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


@dataclass(frozen=True)
class RandomPart:
    """A random part of the picture in a file, resized to a square of `size` pixels; with `flip`, half are mirrored.

    A JPEG whose part is large is decoded at 1/2, 1/4 or 1/8 of its size (a few cosines of each block are left out), as
    long as the part still has `SPARE` times the pixels: on photographs that is within 2 % of all grey levels of what
    full decoding gives, root mean square, and takes half of the time.
    """

    size: int
    flip: bool

    def __call__(self, file: str, seed: int) -> "Image.Image":
        """Depends on the file and the seed alone. Raises ExperimentError if the picture cannot be read."""
        from PIL import Image

        draw = random.Random(seed)
        mirror = draw.random() < 0.5 and self.flip
        box: Box = (0, 0, 0, 0)
        full = (0, 0)

        def before(opened: "Image.Image") -> None:
            nonlocal box, full
            full = opened.size
            box = random_box(*full, draw)
            times = min(box[2] - box[0], box[3] - box[1]) // (SPARE * self.size)
            if times > 1:
                opened.draft(None, (full[0] // times, full[1] // times))  # pyright: ignore[reportArgumentType]

        image = picture(file, before)
        across, down = (now / once for now, once in zip(image.size, full, strict=True))
        left, top, right, bottom = box
        within = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, within)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image
