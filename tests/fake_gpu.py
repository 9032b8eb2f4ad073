"""A GPU for machines without one: it computes on the CPU, but nothing else knows that.

`with fake_gpu() as gpu:` PyTorch has one CUDA device. A tensor that was brought there says so
(`.device`, `.is_cuda`), holds the CPU's numbers, and is as strict as a real one: together with a
tensor that is on the CPU it raises, and it becomes an array only by way of `.cpu()`. What is
counted: `uploads` (from the CPU), `waits` (what a program waits for: a tensor or a number read
back), and `left`, the large operations (matrix products, convolutions, norms) that ran on the CPU.

To PyTorch itself the tensors are on "meta", the device that has shapes and no numbers, as the
kernels and streams of another would be looked for. It stands for CUDA as far as a program can see,
in one thread; precision (autocast), memory and time are the CPU's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils import pin_memory as pinning

from lib.model import adapter, predict

GPU, STANDS_IN = torch.device("cuda", 0), torch.device("meta")
LARGE = ("mm", "bmm", "addmm", "baddbmm", "convolution", "native_layer_norm", "_scaled_dot_product")
# Operations whose result, or the size of it, the program has to wait for.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
aten = torch.ops.aten


@dataclass
class Counted:
    """What the GPU and the CPU were asked for."""

    uploads: int = 0
    waits: int = 0
    large: int = 0  # operations of LARGE on the GPU
    left: list[str] = field(default_factory=list)  # those on the CPU: name and shapes

    def reset(self) -> None:
        self.__init__()


_counted = Counted()


class _OnGpu(Tensor):
    """A tensor on the GPU; its numbers are those of `_inner`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda, is_meta = (property(lambda self, yes=yes: yes) for yes in (True, False))

    @staticmethod
    def __new__(cls, inner: Tensor) -> _OnGpu:
        form = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        kind = {"dtype": inner.dtype, "device": STANDS_IN}
        with torch.inference_mode(inner.is_inference()):  # a view of a weight is none of these
            new = Tensor._make_wrapper_subclass(cls, inner.size(), **form, **kind)
        new._inner = inner
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return self.detach().cpu().numpy()

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def tolist(self):
        return self.detach().cpu().tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else repr(self)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"{self._inner!r} on {GPU}"

    def __reduce_ex__(self, protocol):
        return self._inner.__reduce_ex__(protocol)  # as a file has it that is read on the CPU

    def __deepcopy__(self, memo):
        new = self.detach().clone().requires_grad_(self.requires_grad)
        new._is_param = isinstance(self, torch.nn.Parameter)
        return memo.setdefault(id(self), new)


def _compute(func, args: tuple, kwargs: dict):
    """One operation of PyTorch, wherever its tensors are."""
    name = func._schema.name.removeprefix("aten::")
    tensors: list[Tensor] = []
    inside = _changed(
        (args, kwargs), lambda one: tensors.append(one) or getattr(one, "_inner", one)
    )
    there = [one for one in tensors if isinstance(one, _OnGpu)]
    here = [one for one in tensors if not isinstance(one, _OnGpu) and one.ndim]
    wanted = kwargs.get("device")
    to_gpu = bool(there) if wanted is None else wanted == STANDS_IN
    if name in ("_to_copy", "copy_"):
        from_gpu = isinstance(args[-1], _OnGpu)
        to_gpu = isinstance(args[0], _OnGpu) if name == "copy_" else to_gpu
        _counted.uploads += to_gpu and not from_gpu
        _counted.waits += from_gpu and not to_gpu
    elif there and here:
        by_index = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if not (by_index and isinstance(args[0], _OnGpu) and args[1] and not _any_here(args[2:])):
            shapes = ", ".join(f"{list(one.shape)} on {one.device}" for one in tensors)
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {name} has {shapes}"
            )
        _counted.uploads += 1
    is_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
    _counted.waits += bool(there) and (name in READS or is_mask)
    if name.startswith(LARGE):
        if there:
            _counted.large += 1
        elif not _loads():
            _counted.left.append(f"{name} {[tuple(one.shape) for one in tensors]}")
    if wanted is not None:
        inside[1]["device"] = torch.device("cpu")
    found = func(*inside[0], **inside[1])
    if any(out.alias_info and out.alias_info.is_write for out in func._schema.returns):
        return args[0]  # in place
    return _changed(found, _OnGpu) if to_gpu else found


def _changed(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """The same with other tensors; PyTorch's own `tree_map` takes twenty times as long."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_changed(one, change) for one in value])
    if isinstance(value, dict):
        return {name: _changed(one, change) for name, one in value.items()}
    return value


def _loads() -> bool:
    """Whether a data set is at work, whose place is the CPU."""
    frame = sys._getframe()
    while frame and not frame.f_globals.get("__name__", "").startswith("lib.data."):
        frame = frame.f_back
    return frame is not None


def _any_here(values: tuple) -> bool:
    return any(isinstance(v, Tensor) and not isinstance(v, _OnGpu) and v.ndim for v in values)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # in inference mode, what is made of other operations is not taken apart yet
            found = func.decompose(*args, **kwargs)
        return _compute(func, args, kwargs) if found is NotImplemented else found


class _Words(TorchFunctionMode):
    """Where a program says "cuda", PyTorch hears "meta", before it looks for a driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and _is_gpu(kwargs.get("device")):
            # Made on "meta" at once, it would have no numbers.
            return func(*args, **kwargs | {"device": None}).to(STANDS_IN)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], _OnGpu):
            args = (args[0], _with_tensors(args[1]), *args[2:])  # as above
        args = [STANDS_IN if _is_gpu(one) else one for one in args]
        kwargs = {name: STANDS_IN if _is_gpu(one) else one for name, one in kwargs.items()}
        return func(*args, **kwargs)


def _with_tensors(index: object) -> object:
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return torch.tensor(index) if isinstance(index, list | np.ndarray) else index


def _is_gpu(value: object) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


@contextmanager
def fake_gpu() -> Iterator[Counted]:
    """PyTorch and Accelerate find one CUDA device meanwhile; what is counted starts at 0."""
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None}
    # Older than bf16: autocast would not know of this GPU.
    answers |= {"is_bf16_supported": False, "get_device_capability": (7, 5), "synchronize": None}
    answers |= {"get_device_name": "fake", "get_rng_state": torch.zeros(1), "set_rng_state": None}
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    _counted.reset()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, a=answer, **__: a))
        # Memory cannot be pinned here, and a thread or process would not know of this GPU.
        stack.enter_context(patch.object(pinning, "pin_memory", lambda data, *_: data))
        stack.enter_context(patch.object(predict, "count_workers", lambda *_: 0))
        # A few tokens are computed where a model is made, which is the CPU.
        stack.enter_context(patch.object(adapter, "_refuse_other_results", lambda _: None))
        # Of optimisers, by their names in older and newer versions: is a CUDA graph recorded?
        for name in ("_accelerator", "_cuda"):
            name += "_graph_capture_health_check"
            none = patch.object(torch.optim.Optimizer, name, lambda _: None, create=True)
            stack.enter_context(none)
        # `Module.to` changes the parameters that are there, as it does on a real GPU.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        for state in (AcceleratorState, PartialState):
            state._reset_state()
            stack.callback(state._reset_state)
        stack.enter_context(_Words())
        stack.enter_context(_Operations())
        yield _counted
