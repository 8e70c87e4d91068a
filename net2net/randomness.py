"""Random numbers that are the same for all units, so that networks can be compared in training mode."""

from typing import Any

from torch.overrides import TorchFunctionMode

# What is drawn instead. With 0.5 for `rand`, dropout at a rate below a half keeps a unit, however its mask is computed.
DRAWN = dict.fromkeys(["rand", "rand_like", "uniform"], 0.5)
DRAWN |= dict.fromkeys(["randn", "randn_like", "normal", "bernoulli", "exponential"], 1.0)
DROPOUT = {f"{kind}dropout" for kind in ("", "alpha_", "feature_", "feature_alpha_")}
DROPOUT |= {f"dropout{dims}d" for dims in (1, 2, 3)}
RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


class SameForAll(TorchFunctionMode):
    """While it is on, random numbers are constants, and the dropout of torch's own functions is off."""

    # Copies of a unit draw numbers of their own. A student can only be compared with its teacher if they do not.

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        if name.rstrip("_") in DROPOUT:
            return args[0] if args else options["input"]
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            options |= {key: 0.0 for key in options if key == "dropout_p"}
        elif name == "multi_head_attention_forward":
            options["training"] = False
        elif name in RECURRENT:  # the one fraction among its arguments is the rate of dropout
            args = tuple(0.0 if isinstance(value, float) else value for value in args)
        out = func(*args, **options)
        return out.fill_(DRAWN[name.rstrip("_")]) if name.rstrip("_") in DRAWN else out
