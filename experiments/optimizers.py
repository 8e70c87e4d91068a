"""The optimizer and the schedule of the learning rate."""

from inspect import signature
from typing import Any

from torch import nn, optim

from .config import ExperimentError, Schedule, nearest, steps


def make_optimizer(network: nn.Module, schedule: Schedule) -> optim.Optimizer:
    """Return the optimizer of a network. Weight decay spares parameters of one dimension (batch norms, biases).

    Frozen parameters are left out. The groups' `rate` multiplies the learning rate: `schedule.bias_rate` for biases.

    RMSProp is the paper's (section 2). The paper prints neither decay nor epsilon; these are Inception's (Szegedy et
    al. 2015b: decay 0.9, epsilon 1.0) but for epsilon: docs/reproduction.md, O6.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    weights = [p for p in trained.values() if p.dim() > 1]
    biases = [p for name, p in trained.items() if p.dim() <= 1 and name.endswith("bias")]
    scales = [p for name, p in trained.items() if p.dim() <= 1 and not name.endswith("bias")]
    groups = [
        {"params": weights, "weight_decay": schedule.weight_decay, "rate": 1.0},
        {"params": scales, "weight_decay": 0.0, "rate": 1.0},
        {"params": biases, "weight_decay": 0.0, "rate": schedule.bias_rate},
    ]
    if schedule.optimizer == "rmsprop":
        return optim.RMSprop(groups, lr=schedule.lr, alpha=0.9, eps=1e-3, momentum=schedule.momentum)
    if schedule.optimizer == "sgd":
        return optim.SGD(groups, lr=schedule.lr, momentum=schedule.momentum, nesterov=schedule.momentum > 0)
    kind = getattr(optim, schedule.optimizer, None)
    if not isinstance(kind, type) or not issubclass(kind, optim.Optimizer):
        classes = [name for name, each in vars(optim).items() if isinstance(each, type) and name != "Optimizer"]
        known = ["rmsprop", "sgd", *classes]
        what = f"schedule.optimizer: there is no {schedule.optimizer!r}{nearest(schedule.optimizer, reversed(known))}"
        raise ExperimentError(f"{what}. There are {', '.join(known)}; those with a capital are classes of torch.optim.")
    options: dict[str, Any] = {"lr": schedule.lr}
    if "momentum" in signature(kind).parameters:
        options["momentum"] = schedule.momentum
    try:
        return kind(groups, **options)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{schedule.optimizer} does not take this network: {error}.") from error


def rate_at(step: int, total: int, warmup: int, falling: int) -> float:
    """Return the learning rate of a step (from 0 on) as a share of the initial one.

    It rises linearly from zero for `warmup` steps, stays, and falls linearly to zero over the last `falling` steps.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    left = total - step
    return left / falling if left < falling else 1.0


def falling_steps(decay: str, per_epoch: int, total: int, warmup: int) -> int:
    """Return over how many steps the rate falls at the end: all behind the warm-up if linear, none if constant."""
    most = max(0, total - warmup)
    if decay in ("linear", "constant"):
        return most if decay == "linear" else 0
    return min(most, steps(decay, per_epoch, total))
