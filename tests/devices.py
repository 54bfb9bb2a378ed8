"""A test mode that finds tensors made on a device of their own: what would fall back to the CPU, or fail, on a GPU."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

PACKAGE = str(Path(__file__).parents[1] / "pyro_sb")
FACTORIES = {
    getattr(torch, name)
    for name in (
        "arange empty eye full linspace logspace normal ones rand randint randn randperm tensor tril_indices "
        "triu_indices zeros"
    ).split()
}


class OneDevice(TorchFunctionMode):
    """Notes every factory call of the package's own lines that names no device.

    On a machine without a GPU everything lies on the CPU, so a run cannot fail; but a factory that is called without
    ``device=`` (and without ``like`` or ``new_``) makes a CPU tensor wherever the arguments live. What a constructor
    makes follows its module's ``to()``.

    Attributes:
        found: ``path:line: factory`` of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES and kwargs.get("device") is None and not self._of_tensors(args, kwargs):
            frame = sys._getframe(1)
            while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
                frame = frame.f_back  # of another mode, which passes on what somebody calls
            if frame.f_code.co_filename.startswith(PACKAGE) and frame.f_code.co_name != "__init__":
                name = Path(frame.f_code.co_filename).relative_to(PACKAGE)
                self.found.add(f"{name}:{frame.f_lineno}: torch.{func.__name__}")
        return func(*args, **kwargs)

    def _of_tensors(self, args: Any, kwargs: Any) -> bool:
        """Whether the device is that of a tensor given: ``torch.normal(mean, sd)``, ``out=``, ``generator=``."""
        return (
            any(isinstance(x, torch.Tensor) for x in (*args, *kwargs.values())) or kwargs.get("generator") is not None
        )
