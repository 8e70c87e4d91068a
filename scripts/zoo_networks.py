"""The networks that zoo.py grows: the tables zoo.yaml and timm.yaml, and how their entries are built."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn
from torchvision.models import inception as inceptions
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.googlenet import BasicConv2d, GoogLeNet, Inception, InceptionAux
from torchvision.models.maxvit import MaxVit
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

from net2net.testing import look_trained

PIXELS = 64  # the side of the images that transformers of torchvision are built for


@dataclass(frozen=True)
class Pair:
    """A step-up of torchvision: two networks by name, and what grows: width, depth or both."""

    family: str
    grows: str
    teacher: str
    student: str
    pixels: int = PIXELS

    @property
    def key(self) -> str:
        """What --only matches."""
        return f"{self.teacher} -> {self.student}"

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class Network:
    """A network of timm: its module and name, the side of its images in pixels, its constructor's other arguments."""

    module: str
    model: str
    pixels: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What --only matches."""
        return self.module

    def __str__(self) -> str:
        return f"{self.module}: {self.model}"


ZOO, TIMM = (yaml.safe_load(Path(__file__).with_name(table).read_text()) for table in ("zoo.yaml", "timm.yaml"))
PAIRS = [
    Pair(entry["family"], entry["grows"], *names, entry.get("pixels", PIXELS))
    for entry in ZOO["pairs"]
    for names in pairwise(entry["networks"])
]
NETWORKS = [Network(**entry) for entry in TIMM]


def build(name: str) -> nn.Module:
    """Build the network of zoo.yaml, or else of torchvision, with fresh weights."""
    if name in ZOO["networks"]:
        return instantiate(ZOO["networks"][name], _convert_="all")
    return torchvision.models.get_model(name)


def build_timm(network: Network) -> nn.Module:
    """Build a network of timm in float64 and make it look trained."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = disturb_constants(timm.create_model(network.model, **network.options).double())
    return look_trained(model, images(8, network.pixels, seed=1))


@torch.no_grad()
def disturb_constants(model: nn.Module) -> nn.Module:
    """Add noise to each weight that starts almost constant, or almost zero: it would hide what flows through it."""
    for weight in model.parameters():
        fan = weight[0].numel() if weight.dim() > 1 else 0
        if fan and weight.std() < 0.5 / fan**0.5:
            weight += torch.randn_like(weight) / fan**0.5
    return model


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(count: int, pixels: int, seed: int) -> Tensor:
    """Draw noise images (count, 3, pixels, pixels) in float64.

    Every image has a colour of its own, so that images still differ after global pooling.
    """
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return draw(count, 3, 1, 1) + draw(count, 3, pixels, pixels)


def vgg(layers: Sequence[int | str], batch_norm: bool) -> VGG:
    """Build a VGG from the widths of its convolutions; "M" stands for a pooling layer."""
    return VGG(make_layers(list(layers), batch_norm))


def googlenet(reductions: float) -> GoogLeNet:
    """Build a GoogLeNet; `reductions` multiplies the widths of the 1x1 convolutions before the 3x3 and 5x5 ones."""

    def block(inputs: int, c1: int, r3: int, c3: int, r5: int, c5: int, pool: int) -> Inception:
        return Inception(inputs, c1, int(reductions * r3), c3, int(reductions * r5), c5, pool)

    return GoogLeNet(init_weights=False, blocks=[BasicConv2d, block, InceptionAux])


def inception_v3(channels_7x7: float) -> inceptions.Inception3:
    """Build an Inception v3; `channels_7x7` multiplies the inner widths of the factorised 7x7 convolutions."""

    def block(inputs: int, **widths: int) -> inceptions.InceptionC:
        return inceptions.InceptionC(inputs, int(channels_7x7 * widths["channels_7x7"]))

    names = ("BasicConv2d", "InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE", "InceptionAux")
    blocks: list[Any] = [block if name == "InceptionC" else getattr(inceptions, name) for name in names]
    return inceptions.Inception3(init_weights=False, inception_blocks=blocks)


def convnext(width: int, depths: Sequence[int]) -> ConvNeXt:
    """Build a ConvNeXt whose first stage has `width` channels; every stage doubles them."""
    widths = [width * 2**stage for stage in range(len(depths))]
    following = [*widths[1:], None]
    return ConvNeXt([CNBlockConfig(*stage) for stage in zip(widths, following, depths, strict=True)])


def regnet(depths: Sequence[int], widths: Sequence[int], group_width: int, se_ratio: float | None) -> RegNet:
    """Build a RegNet from the depths and widths of its stages."""
    each = len(depths)
    return RegNet(BlockParams(list(depths), list(widths), [group_width] * each, [1.0] * each, [2] * each, se_ratio))


def swin(width: int, heads: Sequence[int], mlp_ratio: float = 4.0) -> SwinTransformer:
    """Build a Swin of the depths of swin_t whose first stage has `width` channels; every stage doubles them."""
    return SwinTransformer([4, 4], width, [2, 2, 6, 2], list(heads), [7, 7], mlp_ratio)


def swin_v2(width: int, heads: Sequence[int], mlp_ratio: float = 4.0) -> SwinTransformer:
    """Build a Swin v2 of the depths of swin_v2_t; otherwise as `swin`."""
    v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer([4, 4], width, [2, 2, 6, 2], list(heads), [8, 8], mlp_ratio, **v2)


def vit(width: int, layers: int, heads: int, mlp: int, patch: int = 16) -> VisionTransformer:
    """Build a vision transformer for small images: growth does not depend on the number of patches."""
    return VisionTransformer(PIXELS, patch, layers, heads, width, mlp)


def maxvit(
    stem: int, channels: Sequence[int], layers: Sequence[int], mlp_ratio: int = 4, expansion: float = 4
) -> MaxVit:
    """Build a MaxViT for small images, which need small windows."""
    shape = (stem, 2, list(channels), list(layers))
    return MaxVit((PIXELS, PIXELS), *shape, 32, 0.2, mlp_ratio=mlp_ratio, expansion_ratio=expansion)
