"""Width and depth step-ups of torchvision's classifiers, measured: python scripts/zoo.py [--only GLOB] [--list].

Writes results/zoo.md. With --only, the pairs whose name matches are measured and printed, and nothing is written.
"""

import argparse
import fnmatch
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.googlenet import BasicConv2d, GoogLeNet, Inception, InceptionAux
from torchvision.models.inception import BasicConv2d as Conv3
from torchvision.models.inception import (
    Inception3,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)
from torchvision.models.inception import InceptionAux as Aux3
from torchvision.models.maxvit import MaxVit
from torchvision.models.mnasnet import MNASNet
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import files  # noqa: E402 (the checkout is not installed)
from experiments.machine import describe  # noqa: E402
from net2net import TransferError, equivalence, transfer  # noqa: E402
from net2net.equivalence import compare  # noqa: E402
from net2net.testing import look_trained  # noqa: E402

PAGE = ROOT / "results" / "zoo.md"
EXACT = 1e-10  # the largest relative error that counts as rounding, in float64
ALIVE = 0.01  # an output that varies less than this between images would hide an error in the features
PIXELS = 64


def vgg(layers: Sequence[int | str], batch_norm: bool) -> VGG:
    """Widths of the convolutions, "M" for a pooling."""
    return VGG(make_layers(list(layers), batch_norm))


def googlenet(reductions: float) -> GoogLeNet:
    """The constructor takes no widths, but the block's class, and with it the widths inside a block."""

    def block(inputs: int, c1: int, r3: int, c3: int, r5: int, c5: int, pool: int) -> Inception:
        return Inception(inputs, c1, int(reductions * r3), c3, int(reductions * r5), c5, pool)

    return GoogLeNet(init_weights=False, blocks=[BasicConv2d, block, InceptionAux])


def inception_v3(channels_7x7: float) -> Inception3:
    """As `googlenet`: `channels_7x7` multiplies the inner width of the factorised 7x7 convolutions."""

    def block(inputs: int, **widths: int) -> InceptionC:
        return InceptionC(inputs, int(channels_7x7 * widths["channels_7x7"]))

    blocks = [Conv3, InceptionA, InceptionB, block, InceptionD, InceptionE, Aux3]
    return Inception3(init_weights=False, inception_blocks=blocks)


def convnext(width: int, depths: Sequence[int]) -> ConvNeXt:
    """`width` in the first of four stages, doubled from each to the next."""
    widths = [width * 2**stage for stage in range(len(depths))]
    following = [*widths[1:], None]
    return ConvNeXt([CNBlockConfig(*stage) for stage in zip(widths, following, depths, strict=True)])


def regnet(depths: Sequence[int], widths: Sequence[int], group_width: int, se_ratio: float | None) -> RegNet:
    """A RegNet by the widths and depths of its stages."""
    each = len(depths)
    shape = BlockParams(list(depths), list(widths), [group_width] * each, [1.0] * each, [2] * each, se_ratio)
    return RegNet(shape)


def swin(width: int, depths: Sequence[int], heads: Sequence[int], mlp_ratio: float = 4.0) -> SwinTransformer:
    """`width` in the first stage, doubled from each to the next."""
    return SwinTransformer([4, 4], width, list(depths), list(heads), [7, 7], mlp_ratio)


def swin_v2(width: int, depths: Sequence[int], heads: Sequence[int], mlp_ratio: float = 4.0) -> SwinTransformer:
    """As `swin`, with the blocks of the second version."""
    v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer([4, 4], width, list(depths), list(heads), [8, 8], mlp_ratio, **v2)


def vit(width: int, layers: int, heads: int, mlp: int, patch: int = 16) -> VisionTransformer:
    """A vision transformer for small images: the number of patches changes nothing about a step-up."""
    return VisionTransformer(PIXELS, patch, layers, heads, width, mlp)


def maxvit(
    stem: int, channels: Sequence[int], layers: Sequence[int], mlp_ratio: int = 4, expansion: float = 4
) -> MaxVit:
    """A MaxViT for small images, which need small windows."""
    shape = (stem, 2, list(channels), list(layers))
    return MaxVit((PIXELS, PIXELS), *shape, 32, 0.2, mlp_ratio=mlp_ratio, expansion_ratio=expansion)


MOBILENET_V2 = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2]]
WIDER_VGG11 = [96, "M", 192, "M", 512, 512, "M", 768, 768, "M", 768, 512, "M"]

# Every other network in PAIRS is torchvision's own under that name.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50, width 96": partial(models.resnet50, width_per_group=96),
    "resnext50_32x8d": partial(models.resnet50, groups=32, width_per_group=8),
    "resnext50_64x4d": partial(models.resnet50, groups=64, width_per_group=4),
    "resnext101_32x4d": partial(models.resnet101, groups=32, width_per_group=4),
    "vgg11, wider": partial(vgg, WIDER_VGG11, batch_norm=False),
    "vgg11_bn, wider": partial(vgg, WIDER_VGG11, batch_norm=True),
    "mobilenet_v2 x0.5": partial(models.mobilenet_v2, width_mult=0.5),
    "mobilenet_v2 x1.4": partial(models.mobilenet_v2, width_mult=1.4),
    "mobilenet_v2, deeper": partial(
        models.mobilenet_v2,
        inverted_residual_setting=[[t, c, n + (n > 1), s] for t, c, n, s in [*MOBILENET_V2, [6, 320, 1, 1]]],
    ),
    "mobilenet_v3_small x0.75": partial(models.mobilenet_v3_small, width_mult=0.75),
    "mobilenet_v3_small x2.0": partial(models.mobilenet_v3_small, width_mult=2.0),
    "mobilenet_v3_large x0.75": partial(models.mobilenet_v3_large, width_mult=0.75),
    "mobilenet_v3_large x1.4": partial(models.mobilenet_v3_large, width_mult=1.4),
    "shufflenet_v2_x1_0, deeper": partial(ShuffleNetV2, [6, 12, 6], [24, 116, 232, 464, 1024]),
    "densenet121, growth 48": partial(DenseNet, growth_rate=48, num_init_features=96),
    "densenet121, bn_size 6": partial(models.densenet121, bn_size=6),
    "mnasnet2_0": partial(MNASNet, 2.0),
    "googlenet": partial(googlenet, reductions=1),
    "googlenet, reductions x1.5": partial(googlenet, reductions=1.5),
    "inception_v3": partial(inception_v3, channels_7x7=1),
    "inception_v3, 7x7 x1.5": partial(inception_v3, channels_7x7=1.5),
    "convnext_tiny, 2x width": partial(convnext, 192, [3, 3, 9, 3]),
    "convnext_tiny, deeper": partial(convnext, 96, [4, 5, 12, 4]),
    "regnet_y_400mf, deeper": partial(regnet, [2, 4, 8, 7], [48, 104, 208, 440], 8, 0.25),
    "regnet_y_400mf, 2x width": partial(regnet, [1, 3, 6, 6], [96, 208, 416, 880], 8, 0.25),
    "regnet_y_400mf, 2x group width": partial(regnet, [1, 3, 6, 6], [96, 208, 416, 880], 16, 0.25),
    "regnet_x_400mf, 2x width": partial(regnet, [1, 2, 7, 12], [64, 128, 320, 800], 16, None),
    "swin_t, 2x width": partial(swin, 192, [2, 2, 6, 2], [6, 12, 24, 48]),
    "swin_t, wider mlp": partial(swin, 96, [2, 2, 6, 2], [3, 6, 12, 24], mlp_ratio=6.0),
    "swin_v2_t, 2x width": partial(swin_v2, 192, [2, 2, 6, 2], [6, 12, 24, 48]),
    "swin_v2_t, wider mlp": partial(swin_v2, 96, [2, 2, 6, 2], [3, 6, 12, 24], mlp_ratio=6.0),
    "vit_s_16": partial(vit, 384, 12, 6, 1536),
    "vit_s_16, wider heads": partial(vit, 768, 12, 6, 3072),
    "vit_b_16": partial(vit, 768, 12, 12, 3072),
    "vit_b_16, deeper": partial(vit, 768, 16, 12, 3072),
    "vit_b_16, wider mlp": partial(vit, 768, 12, 12, 4096),
    "vit_l_16": partial(vit, 1024, 24, 16, 4096),
    "vit_b_32": partial(vit, 768, 12, 12, 3072, patch=32),
    "vit_l_32": partial(vit, 1024, 24, 16, 4096, patch=32),
    "maxvit_t": partial(maxvit, 64, [64, 128, 256, 512], [2, 2, 5, 2]),
    "maxvit_t, deeper": partial(maxvit, 64, [64, 128, 256, 512], [2, 4, 7, 3]),
    "maxvit_t, 2x width": partial(maxvit, 128, [128, 256, 512, 1024], [2, 2, 5, 2]),
    "maxvit_t, 1.5x width": partial(maxvit, 64, [96, 192, 384, 768], [2, 2, 5, 2]),
    "maxvit_t, wider mlp": partial(maxvit, 64, [64, 128, 256, 512], [2, 2, 5, 2], mlp_ratio=6),
    "maxvit_t, wider expansion": partial(maxvit, 64, [64, 128, 256, 512], [2, 2, 5, 2], expansion=6),
}


@dataclass(frozen=True)
class Pair:
    """A step-up: two networks by name, and what grows (width, depth or both)."""

    family: str
    kind: str
    teacher: str
    student: str
    pixels: int = PIXELS

    @property
    def name(self) -> str:
        """What --only matches and EXPLANATIONS is keyed by."""
        return f"{self.teacher} -> {self.student}"


def steps(family: str, kind: str, *networks: str, pixels: int = PIXELS) -> list[Pair]:
    """Each network into the next."""
    return [Pair(family, kind, *pair, pixels) for pair in pairwise(networks)]


PAIRS = [
    *steps("ResNet", "depth", "resnet18", "resnet34"),
    *steps("ResNet", "depth", "resnet50", "resnet101", "resnet152"),
    *steps("ResNet", "width", "resnet50", "resnet50, width 96"),
    *steps("ResNet", "width", "resnet50", "wide_resnet50_2"),
    *steps("ResNet", "width", "resnet101", "wide_resnet101_2"),
    *steps("ResNet", "depth", "wide_resnet50_2", "wide_resnet101_2"),
    *steps("ResNeXt", "width", "resnext50_32x4d", "resnext50_32x8d"),
    *steps("ResNeXt", "width", "resnext50_32x4d", "resnext50_64x4d"),
    *steps("ResNeXt", "depth", "resnext50_32x4d", "resnext101_32x4d"),
    *steps("ResNeXt", "width", "resnext101_32x4d", "resnext101_32x8d"),
    *steps("ResNeXt", "both", "resnext50_32x4d", "resnext101_64x4d"),
    *steps("VGG", "depth", "vgg11", "vgg13", "vgg16", "vgg19"),
    *steps("VGG", "width", "vgg11", "vgg11, wider"),
    *steps("VGG", "depth", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    *steps("VGG", "width", "vgg11_bn", "vgg11_bn, wider"),
    *steps("MobileNetV2", "width", "mobilenet_v2 x0.5", "mobilenet_v2", "mobilenet_v2 x1.4"),
    *steps("MobileNetV2", "depth", "mobilenet_v2", "mobilenet_v2, deeper"),
    *steps("MobileNetV3", "width", "mobilenet_v3_small x0.75", "mobilenet_v3_small", "mobilenet_v3_small x2.0"),
    *steps("MobileNetV3", "width", "mobilenet_v3_large x0.75", "mobilenet_v3_large", "mobilenet_v3_large x1.4"),
    *steps(
        *("ShuffleNetV2", "width"),
        *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
    ),
    *steps("ShuffleNetV2", "depth", "shufflenet_v2_x1_0", "shufflenet_v2_x1_0, deeper"),
    *steps("DenseNet", "both", "densenet121", "densenet161"),
    *steps("DenseNet", "both", "densenet121", "densenet169", "densenet201"),
    *steps("DenseNet", "width", "densenet121", "densenet121, growth 48"),
    *steps("DenseNet", "width", "densenet121", "densenet121, bn_size 6"),
    *steps("Inception", "width", "googlenet", "googlenet, reductions x1.5"),
    *steps("Inception", "width", "inception_v3", "inception_v3, 7x7 x1.5", pixels=96),
    *steps("MNASNet", "width", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mnasnet2_0"),
    *steps("EfficientNet", "depth", "efficientnet_b0", "efficientnet_b1"),
    *steps("EfficientNet", "width", "efficientnet_b1", "efficientnet_b2"),
    *steps("EfficientNet", "both", *(f"efficientnet_b{size}" for size in range(2, 8))),
    *steps("EfficientNet", "both", "efficientnet_b0", "efficientnet_b3"),
    *steps("EfficientNetV2", "both", "efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"),
    *steps("ConvNeXt", "depth", "convnext_tiny", "convnext_small"),
    *steps("ConvNeXt", "depth", "convnext_tiny", "convnext_tiny, deeper"),
    *steps("ConvNeXt", "width", "convnext_tiny", "convnext_tiny, 2x width"),
    *steps("ConvNeXt", "width", "convnext_small", "convnext_base", "convnext_large"),
    *steps("ConvNeXt", "width", "convnext_small", "convnext_large"),
    *steps("RegNet", "both", "regnet_y_400mf", "regnet_y_800mf"),
    *steps("RegNet", "depth", "regnet_y_400mf", "regnet_y_400mf, deeper"),
    *steps("RegNet", "width", "regnet_y_400mf", "regnet_y_400mf, 2x width"),
    *steps("RegNet", "width", "regnet_y_400mf", "regnet_y_400mf, 2x group width"),
    *steps("RegNet", "both", "regnet_y_8gf", "regnet_y_16gf", "regnet_y_32gf"),
    *steps("RegNet", "width", "regnet_x_400mf", "regnet_x_400mf, 2x width"),
    *steps("RegNet", "both", "regnet_x_1_6gf", "regnet_x_3_2gf"),
    *steps("RegNet", "both", "regnet_x_16gf", "regnet_x_32gf"),
    *steps("Swin", "depth", "swin_t", "swin_s"),
    *steps("Swin", "width", "swin_s", "swin_b"),
    *steps("Swin", "width", "swin_t", "swin_t, 2x width"),
    *steps("Swin", "width", "swin_t", "swin_t, wider mlp"),
    *steps("SwinV2", "depth", "swin_v2_t", "swin_v2_s"),
    *steps("SwinV2", "width", "swin_v2_s", "swin_v2_b"),
    *steps("SwinV2", "width", "swin_v2_t", "swin_v2_t, 2x width"),
    *steps("SwinV2", "width", "swin_v2_t", "swin_v2_t, wider mlp"),
    *steps("ViT", "width", "vit_s_16", "vit_b_16"),
    *steps("ViT", "width", "vit_s_16", "vit_s_16, wider heads"),
    *steps("ViT", "depth", "vit_b_16", "vit_b_16, deeper"),
    *steps("ViT", "width", "vit_b_16", "vit_b_16, wider mlp"),
    *steps("ViT", "both", "vit_b_16", "vit_l_16"),
    *steps("ViT", "both", "vit_b_32", "vit_l_32"),
    *steps("MaxViT", "depth", "maxvit_t", "maxvit_t, deeper"),
    *steps("MaxViT", "width", "maxvit_t", "maxvit_t, 1.5x width"),
    *steps("MaxViT", "width", "maxvit_t", "maxvit_t, 2x width"),
    *steps("MaxViT", "width", "maxvit_t", "maxvit_t, wider mlp"),
    *steps("MaxViT", "width", "maxvit_t", "maxvit_t, wider expansion"),
]

# Why no filling of the student computes the teacher's function, by the name of the pair. In what PRINCIPLE says.
PRINCIPLE = (
    "Impossible means: for a student that holds, wherever its teacher holds units, linear functions of them (copies, "
    "means, mixtures), and for weights of a teacher that have nothing special about them (no two filters alike, no "
    "norm with equal weights)."
)
EXPLANATIONS: dict[str, str] = {
    "regnet_y_400mf -> regnet_y_800mf": (
        "No step-up, whatever the names suggest: the fourth stage has 6 blocks in the teacher and 2 in the student, "
        "which has 14 in all against 16. What four blocks compute has no place."
    ),
    "convnext_small -> convnext_base": (
        "Let the student's stream be s = Bx. A depthwise filter reads one channel, and a LayerNorm follows, which "
        "needs (up to what is the same in all channels, which it takes away) an image y' = Cy of the teacher's "
        "y_i = f_i * x_i that keeps the variance. So for every i there is a g_i with B_ji f'_j = C_ji f_i + g_i for "
        "all j. If one g_i is no multiple of f_i, then all f'_j lie in the plane of f_i and g_i, and with them, as "
        "differences over j, all of the teacher's filters; 96 filters of 49 taps do not. So every g_i is a multiple of "
        "f_i, and B_ji other than 0 makes f'_j a multiple of f_i: each channel of the student carries one channel of "
        "the teacher's, as p_j y_i before the norm. The variance stays what it is only if, over the copies of each i, "
        "the sum of p_j² is one number c and the square of the sum of p_j is 128/96 c. By Cauchy and Schwarz that "
        "takes at least 128/96 copies, so two of each of 96 channels, and there is room for 128."
    ),
    "convnext_base -> convnext_large": (
        "As convnext_small -> convnext_base: 192/128 copies, so two of each of 128 channels, and there is room for 192."
    ),
    "swin_v2_s -> swin_v2_b": (
        "The stream of the last stage is the sum of five LayerNorms' outputs, each with weights of its own, and the "
        "last norm takes mean and variance over it. Copies: as for convnext_small -> convnext_base, two of each of 768 "
        "channels, and there is room for 1024. Means: a channel that holds the mean before a LayerNorm is a constant "
        "behind it. Mixtures: one map B of the stream, which keeps distances from the mean, and for each of the five "
        "norms, with weights d and new ones d', a map A = B d / d' that keeps them, too. Those are 5 (767·768/2 + 766) "
        "equations, 1.5 million, in the 0.5 million numbers that B and the new weights are made of; weights that have "
        "nothing to do with each other do not fulfil what is left over. That is a count, and no proof; where 6 "
        "channels grow into 8, Newton's method finds such maps for one norm, to 1e-13, and for three or five it "
        "rests at 3e-4 and 9e-4. (Weights d' without bound come as near as one likes: a mean that is small before the "
        "norm, large behind it, and drowned in rounding.)"
    ),
    "regnet_x_16gf -> regnet_x_32gf": (
        "In the fourth stage the teacher has 16 groups of 128 units, the student 15 of 168. The ReLU behind a grouped "
        "convolution bends where its argument is zero, so that an argument of the student's must be the teacher's, up "
        "to a factor. That is bent itself where each of the 128 units that it reads is, which no sum of units that "
        "bend elsewhere makes up for: a group that gives it has these 128 among those that it reads. 168 units have no "
        "room for the 256 of two groups. So each of the student's groups serves one of the teacher's: 15, not 16."
    ),
}


@dataclass(frozen=True)
class Row:
    """What one pair gave.

    `sizes` are the parameters of teacher and student; `alive` is how much the teacher's output varies between images,
    as a part of its size, `rounding` how much when every value of the images is the next number. `error` and `reason`
    are None where there is none.
    """

    pair: Pair
    sizes: tuple[int, int]
    alive: float
    rounding: float
    seconds: float
    error: float | None = None
    reason: str | None = None
    crashed: bool = False

    @property
    def verdict(self) -> str:
        """exact, refused, or one of the faults: WRONG, CRASHED, and DEAD for a teacher that could prove nothing."""
        if self.reason is not None:
            return "CRASHED" if self.crashed else "refused"
        return judged(self.alive, self.error)

    def __str__(self) -> str:
        error = "" if self.error is None else f"{self.error:8.1e}"
        return f"{self.verdict:8} {error:8} {self.seconds:6.1f} s  {self.pair.name}  {self.reason or ''}".rstrip()


def build(name: str) -> nn.Module:
    """The network of that name, freshly drawn."""
    return NETWORKS[name]() if name in NETWORKS else models.get_model(name)


def measure(pair: Pair) -> Row:
    """Grow the teacher into the student and compare them on images that the growth has not seen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = look_trained(build(pair.teacher).double(), images(8, pair.pixels, seed=1))
        student = look_trained(build(pair.student).double(), seed=1)
    sizes = (parameters(teacher), parameters(student))
    example, fresh = (images(2, pair.pixels, seed) for seed in (2, 3))
    row = partial(Row, pair, sizes, spread(teacher, fresh), _rounding(teacher, fresh))
    started = time.perf_counter()
    try:
        transfer(teacher, student, example)
        seconds = time.perf_counter() - started
        return row(seconds, error=equivalence(teacher, student, fresh).max_relative)
    except TransferError as refusal:
        return row(time.perf_counter() - started, reason=shorten(str(refusal)))
    except Exception as error:  # which ought never to come from inside: it is counted, and the table goes on
        reason = shorten(f"{type(error).__name__}: {error}")
        return row(time.perf_counter() - started, reason=reason, crashed=True)


def images(count: int, pixels: int, seed: int) -> Tensor:
    """Noise, in a colour of its own for every image, so that images differ after global pooling too."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.double)
    return draw(count, 3, 1, 1) + draw(count, 3, pixels, pixels)


def parameters(model: nn.Module) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def spread(model: nn.Module, images: Tensor) -> float:
    """How much the output varies between images, as a part of its mean size."""
    output = model(images)
    return (output.std(0).mean() / output.abs().mean()).item()


def _rounding(model: nn.Module, images: Tensor) -> float:
    """How much the output changes when every value of the images is the next number, as a part of its largest size."""
    signs = torch.randn(images.shape, generator=torch.Generator().manual_seed(4)).sign()
    beside = torch.nextafter(images, images + signs)
    with torch.no_grad():
        return compare(model(images), model(beside)).max_relative


def shorten(reason: str) -> str:
    """As much of it as fits into the page."""
    return textwrap.shorten(reason, 400, placeholder=" …")


def judged(alive: float, error: float | None) -> str:
    """exact or WRONG; DEAD for a network whose output hardly varies: it proves nothing."""
    if not alive > ALIVE:
        return "DEAD"
    return "exact" if error is not None and error <= EXACT else "WRONG"


def counted(verdicts: Iterable[str]) -> str:
    """How many there are of each verdict, for the page: faults in bold."""
    count = Counter(verdicts)
    faults = "".join(f", **{count[fault]} {fault}**" for fault in ("CRASHED", "SLOW", "DEAD") if count[fault])
    wrong = f"{count['WRONG']} wrong" if not count["WRONG"] else f"**{count['WRONG']} WRONG**"
    return f"{count['exact']} exact, {count['refused']} refused, {wrong}{faults}"


def conclude(verdicts: Sequence[str], path: Path, text: str | None) -> int:
    """Print how many there are of each verdict, and write the page if there is one; returns 1 for a fault."""
    count = Counter(verdicts)
    print(", ".join(f"{number} {verdict}" for verdict, number in count.items()))
    if text is not None:
        files.write(path, text.encode())
        print(f"written to {path.relative_to(ROOT)}")
    return 0 if set(count) <= {"exact", "refused"} else 1


def page(rows: Sequence[Row]) -> str:
    """The results as markdown."""
    lines = [
        "# The zoo",
        "",
        "Width and depth step-ups inside torchvision's classification families, as far as constructors can express",
        "them: no stage of a student is meant to be narrower or shallower than its teacher's. AlexNet and SqueezeNet",
        "take neither widths nor depths. Each teacher was made to look trained (no constant biases, scales or heads,",
        "batch-norm statistics of images, disturbed), each student was filled at random, `net2net.transfer` grew the",
        f"one into the other in float64, and the two ran on 2 images that the growth had not seen ({PIXELS} pixels",
        "wide where the table says nothing else).",
        "",
        f"- **Result:** {len(rows)} pairs: {counted(row.verdict for row in rows)}",
        f"- **Exact:** largest |teacher - student| at most {EXACT:.0e} of the teacher's largest |output|",
        "- **Alive:** standard deviation of the teacher's output between the images over its mean size; under "
        f"{ALIVE:.0e} nothing counts",
        "- **Rounding:** what the last bit of every value of the images changes in the teacher's output, measured as "
        "the error is: an error of this size is none",
        "- **Seconds:** of `net2net.transfer`, its check included",
        f"- **Versions:** torch {torch.__version__}, torchvision {torchvision.__version__}",
        f"- **Hardware:** {describe(torch.device('cpu'))}",
        "- **Command:** `python scripts/zoo.py`",
        "",
        "| Family | Teacher | Student | Grows | Parameters, M | Alive | Rounding | Error | Seconds | Verdict |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
        *map(_line, rows),
        "",
    ]
    refused = [row for row in rows if row.reason is not None]
    if refused:
        lines += ["## Refusals", "", PRINCIPLE, "", *map(_refusal, refused), ""]
    built = dict.fromkeys(name for row in rows for name in (row.pair.teacher, row.pair.student) if name in NETWORKS)
    if built:
        lines += ["## Networks that torchvision has no name for, or that are built for small images", ""]
        lines += [*(f"- {name}: `{_expression(name)}`" for name in built), ""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    pair = row.pair
    teacher = pair.teacher if pair.pixels == PIXELS else f"{pair.teacher} ({pair.pixels} pixels)"
    millions = " → ".join(f"{size / 1e6:.1f}" for size in row.sizes)
    error = "–" if row.error is None else f"{row.error:.1e}"
    measured = [f"{row.alive:.2g}", f"{row.rounding:.0e}", error, f"{row.seconds:.1f}"]
    cells = [pair.family, teacher, pair.student, pair.kind, millions, *measured]
    return f"| {' | '.join(cells)} | {row.verdict} |"


def _refusal(row: Row) -> str:
    explanation = EXPLANATIONS.get(row.pair.name, "*Not explained.*")
    return f"- **{row.pair.teacher} → {row.pair.student}:** {explanation} In its own words: “{row.reason}”"


def _expression(name: str) -> str:
    """The call that builds the network."""
    made = NETWORKS[name]
    assert isinstance(made, partial)
    arguments = [*map(repr, made.args), *(f"{key}={value!r}" for key, value in made.keywords.items())]
    return f"{made.func.__name__}({', '.join(arguments)})"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a line a pair and write the page; returns 1 if a pair came out wrong, dead or crashed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="GLOB", help="measure the pairs whose name matches; write nothing")
    parser.add_argument("--list", action="store_true", help="print the names of the pairs")
    options = parser.parse_args(arguments)
    pairs = [pair for pair in PAIRS if fnmatch.fnmatchcase(pair.name, options.only or "*")]
    if not pairs:
        print(f"No pair is called {options.only}: see --list.", file=sys.stderr)
        return 1
    if options.list:
        print("\n".join(pair.name for pair in pairs))
        return 0
    torch.set_num_threads(1)  # sums in a fixed order
    rows = []
    for pair in pairs:
        rows.append(measure(pair))
        print(rows[-1], flush=True)
    return conclude([row.verdict for row in rows], PAGE, None if options.only else page(rows))


if __name__ == "__main__":
    sys.exit(main())
