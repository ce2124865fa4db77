"""A stand-in for a GPU: it computes on the CPU, refuses what a GPU refuses and counts what makes the CPU wait."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
"""The stand-in's device: any but the CPU's that torch knows without hardware."""
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "nms"}
"""Operations after which the CPU has read something from the GPU, `nms` and `nonzero` to know how many there are."""
READS |= {"repeat_interleave", "equal", "is_nonzero", "item"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class _OnDevice(Tensor):
    """A tensor of the stand-in, with its values in `held`, a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _OnDevice:
        tensor = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        """As that of a GPU's tensor: by way of the CPU."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function}: outside of the `with` block of the stand-in")


class _FromPython(TorchFunctionMode):
    """Makes tensors of Python numbers as for a GPU: on the CPU, then copied. Torch would keep no values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.new_tensor:
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            function, args = torch.tensor, args[1:]
        if function in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


def _needs_reading(index: Tensor | None) -> bool:
    """Whether a GPU's tensor cannot be indexed with it at once: how many are true is read, and what is on the CPU copied."""
    return index is not None and (index.dtype in (torch.bool, torch.uint8) or not isinstance(index, _OnDevice))


class StandIn(TorchDispatchMode):
    """Within its `with` block tensors can be on `DEVICE`.

    `waits` counts, by name of the operation, what makes the CPU wait for a GPU; `sent` the bytes copied to the device.

    Raises:
        RuntimeError: an operation on tensors of both devices, as on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.sent = 0
        self._from_python = _FromPython()

    def __enter__(self) -> StandIn:
        self._from_python.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._from_python.__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in tensors if isinstance(x, _OnDevice)]
        there = [x for x in tensors if not isinstance(x, _OnDevice)]
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if not here and target != DEVICE:
            return function(*args, **kwargs)
        copies = name in ("_to_copy", "copy_")
        blocking = copies and not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if name in READS or (name in INDEXING and any(_needs_reading(index) for index in args[1])):
            self.waits[name] += 1
        elif copies and there:  # to the device
            self.sent += sum(x.numel() * x.element_size() for x in there)
            self.waits[name] += blocking
        elif target is not None and target != DEVICE:  # from it
            self.waits[name] += 1
        elif any(x.dim() for x in there):
            raise RuntimeError(f"{name}: tensors of the CPU and of the device")
        if target == DEVICE:
            kwargs["device"] = torch.device("cpu")
        held_args, held_kwargs = tree_map_only(_OnDevice, lambda x: x.held, (args, kwargs))
        result = function(*held_args, **held_kwargs)
        if name == "copy_" and not isinstance(args[0], _OnDevice):
            self.waits[name] += 1
            return args[0]
        if target is not None and target != DEVICE:
            return result
        result = tree_map_only(Tensor, _OnDevice, result)
        return return_and_correct_aliasing(function, args, kwargs, result) if here else result
