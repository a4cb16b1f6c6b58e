"""Two assumptions of NeMo AutoModel 0.7 that do not hold without CUDA, mended. Nothing happens where CUDA is there.

Line numbers are those of nemo-automodel 0.7.0; `tests/integration/test_training_torchrun.py` notices when one moves.
"""

from __future__ import annotations

import types
from typing import Any


def install() -> bool:
    """Mend the two calls; True when they were mended, False where CUDA is available and nothing was touched."""
    import torch

    if torch.cuda.is_available():
        return False
    from nemo_automodel._transformers import auto_model

    # recipes/llm/train_ft.py:561 and :1860 reset CUDA's memory statistics, which raises without a driver.
    torch.cuda.reset_peak_memory_stats = _nothing
    # _transformers/auto_model.py:498 and :1259 take torch.cuda.current_device() as the device, :770, :886 and :1255
    # torch.device("cuda", torch.cuda.current_device()). Only that module's name `torch` is replaced, so no other
    # library sees a changed torch.
    auto_model.torch = _TorchWithoutCuda("torch", torch)
    return True


def _nothing(*_: Any, **__: Any) -> None:
    return None


class _Forwarding(types.ModuleType):
    """A module that answers with another one's attributes."""

    def __init__(self, name: str, wrapped: Any) -> None:
        super().__init__(name)
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


class _CudaWithoutDevice(_Forwarding):
    def current_device(self) -> Any:
        import torch

        return torch.device("cpu")


class _TorchWithoutCuda(_Forwarding):
    def __init__(self, name: str, wrapped: Any) -> None:
        super().__init__(name, wrapped)
        self.cuda = _CudaWithoutDevice("torch.cuda", wrapped.cuda)

    def device(self, *arguments: Any, **named: Any) -> Any:
        if arguments and arguments[0] == "cuda":
            return self._wrapped.device("cpu")
        return self._wrapped.device(*arguments, **named)
