"""Modules without values, for which nothing is drawn."""

from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

DRAWS = (init.normal_, init.uniform_, init.kaiming_uniform_)


class Uninitialised(TorchFunctionMode):
    """Modules made under this draw no initial values.

    On the meta device torch imports its compiler to draw them, which takes longer than reading a gigabyte.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.randn:
            return torch.empty(*args, **kwargs or {})
        if func in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs or {})
