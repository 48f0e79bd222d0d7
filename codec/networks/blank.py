"""Modules without initial values, for weights that a file gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILL: set[Any] = {nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, nn.init.zeros_, nn.init.ones_}
_FILL |= {Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_, Tensor.mul_}
_FACTORIES: set[Any] = {torch.zeros, torch.ones, torch.rand, torch.randn}


class Uninitialized(TorchFunctionMode):
    """Context manager within which modules are built of memory that is not written, and take no random numbers.

    Memory that is not written takes no room and no time: an architecture can be compared with the shapes of the tensors
    in a file, however large it claims to be. (Meta tensors would do the same, but torch takes seconds to prepare for
    arithmetic on them.)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILL:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func in _FACTORIES else func)(*args, **kwargs)
