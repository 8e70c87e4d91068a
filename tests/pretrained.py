"""A model with a config and `save_pretrained`, as those of transformers."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net2net.testing import look_trained


class Config:
    """As those of transformers: values by name, and a config inside."""

    def __init__(self, **values) -> None:
        self.vocabulary, self.hidden, self.heads, self.inner, self.blocks, self.eps = 11, 8, 2, None, 2, 1e-5
        self.kinds, self.scaled, self.tied, self.length = ["plain", "plain"], False, True, 5
        vars(self).update(values)

    def to_dict(self) -> dict:
        return json.loads(json.dumps(vars(self)))

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        if values["hidden"] % values["heads"]:
            raise ValueError("heads")
        return cls(**values)


class Block(nn.Module):
    def __init__(self, config: Config, place: int) -> None:
        super().__init__()
        self.config, self.place, self.kind = config, place, config.kinds[place]
        self.hidden, self.head = config.hidden, config.hidden // config.heads
        self.norm = nn.RMSNorm(self.hidden, config.eps)
        self.qkv, self.out = nn.Linear(self.hidden, 3 * self.hidden), nn.Linear(self.hidden, self.hidden)
        inner = config.inner or int(getattr(config, "ratio", 4) * self.hidden)
        self.up, self.down, self.act = nn.Linear(self.hidden, inner), nn.Linear(inner, self.hidden), F.gelu

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (-1, self.head)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(x)))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.width = config, config.hidden
        self.words = nn.Embedding(config.vocabulary, config.hidden)
        self.blocks = nn.ModuleList(Block(config, place) for place in range(config.blocks))
        self.norm, self.head = nn.RMSNorm(config.hidden, config.eps), nn.Linear(config.hidden, config.vocabulary)
        self.register_buffer("ramp", torch.linspace(1, 2, config.length)[:, None], persistent=False)
        self.scale = config.hidden**0.5 if config.scaled else 1.0

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) * self.scale * self.ramp[: words.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(self.config.to_dict()))
        torch.save(self.state_dict(), folder / "weights.pt")


def words() -> Tensor:
    return torch.randint(11, (4, 5))


def teacher(**values) -> Model:
    return look_trained(Model(Config(**values)))
