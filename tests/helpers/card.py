"""A CUDA card that is none: tensors that say `cuda:0`, hold their numbers in the memory of the host,
and refuse what CUDA refuses. It finds what would break at the first touch of a GPU, without one.

Every operation on such tensors is computed by the CPU's kernel, so results can be compared with those
of a CPU; what differs on a real card (rounding, speed, memory, order between streams) it cannot tell.

Torch asks for the hooks of its device once, as it is imported, so a process is a card's from its first
import on: `python card.py SCRIPT ARGUMENTS` runs a script in one. `take` must come before torch.

Refused are operands of which one lies on the host, unless it is a number, an index or the source of a
copy; `numpy()` and `from_numpy` are refused by torch itself. Counted are `waits`, where the host needs
a value of the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct Card : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device device() { return {c10::DeviceType::CUDA, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Card)
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""
"""What autograd asks of a device: how many there are, and streams and events, which do nothing."""

CAPABILITY = (9, 0)
MEMORY = 80 << 30
PROCESSORS = 4


def build(folder: Path) -> Path:
    """Compile the hooks into a library in `folder`."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    source, library = folder / "card.cpp", folder / "card.so"
    source.write_text(HOOKS)
    subprocess.run(
        [
            *("g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder}/include", source),
            *("-o", library, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"),
        ],
        check=True,
    )
    return library


def take(library: Path) -> None:
    """Make this process one of a card. Torch must not have been imported."""
    assert "torch" not in sys.modules
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
    _stand_in()


def _stand_in() -> None:
    """Give torch and Triton's interpreter what they look for on a card."""
    import torch
    from triton.runtime import interpreter

    torch.__future__.set_swap_module_params_on_conversion(True)
    # A tensor made of Python numbers is put on its device below every mode of dispatch.
    plain = torch.tensor

    def tensor(data: Any, *, device: Any = None, **how: Any) -> Any:
        made = plain(data, **how)
        return made if device is None else made.to(device)

    torch.tensor = tensor
    # A mask that is no more than its sizes is no tensor of the card.
    from torch.nn.attention.bias import CausalBias

    def make_bias(cls: Any, *sizes: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            return torch.Tensor._make_subclass(cls, torch.empty(0))

    CausalBias.__new__ = make_bias  # type: ignore[method-assign]
    cuda: Any = torch.cuda
    cuda._lazy_init = lambda: None
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.device = lambda device: contextlib.nullcontext()
    cuda.mem_get_info = lambda device=None: (MEMORY, MEMORY)
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_properties = lambda device=None: SimpleNamespace(
        total_memory=MEMORY, multi_processor_count=PROCESSORS, major=9, minor=0, name="card"
    )
    _load_beside_the_card(plain)
    execute = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        from torch.utils._pytree import tree_map

        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        wrong = [one.shape for one in given if not isinstance(one, _card_class())]
        if wrong and len(wrong) < len(given):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        with torch.utils._python_dispatch._disable_current_modes():
            return execute(self, *tree_map(held, args), **tree_map(held, kwargs))

    interpreter.GridExecutor.__call__ = launch


def _load_beside_the_card(plain: Any) -> None:
    """transformers loads on the host, in ways of its own, and moves the whole model later: what
    stands in for a card would leave it buffers without values."""
    import torch
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tensor, torch.tensor = torch.tensor, plain
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(False)
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                return load(cls, *args, **kwargs)
        finally:
            torch.tensor = tensor
            torch.__future__.set_swap_module_params_on_conversion(swaps)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


_classes: list[Any] = []


def _card_class() -> Any:
    if not _classes:
        import torch

        class CardTensor(torch.Tensor):
            """A tensor on the card; `held` are its numbers, in the memory of the host."""

            held: Any
            __torch_function__ = torch._C._disabled_torch_function_impl

            def data_ptr(self) -> int:
                return int(self.held.data_ptr())

            def tolist(self) -> Any:
                return self.cpu().tolist()

            def new_tensor(self, data: Any, *, device: Any = None, **how: Any) -> Any:
                how = {"dtype": self.dtype, **how}
                return torch.tensor(data, device=self.device if device is None else device, **how)

            @staticmethod
            def __new__(cls: Any, numbers: Any) -> Any:
                tensor = torch.Tensor._make_wrapper_subclass(
                    cls,
                    numbers.shape,
                    strides=numbers.stride(),
                    storage_offset=numbers.storage_offset(),
                    dtype=numbers.dtype,
                    layout=numbers.layout,
                    device=torch.device("cuda", 0),
                )
                tensor.held = numbers
                return tensor

            @classmethod
            def __torch_dispatch__(
                cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                return compute(func, args, kwargs or {})

        _classes.append(CardTensor)
    return _classes[0]


def held(value: Any) -> Any:
    """The numbers of a tensor on the card; anything else unchanged."""
    return value.held if isinstance(value, _card_class()) else value


max_bytes = [MEMORY]
"""The largest tensor that the card has room for."""

waits: Counter[str] = Counter()
"""How often the host waited for the device, by the operation."""

_HOST_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
_COPIES = ("copy_", "_to_copy", "copy", "set_")
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
          "equal", "is_nonzero", "bincount")  # fmt: skip


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation, by the CPU's kernel; its results lie on the card if an operand does or the card
    is named. Raises RuntimeError for operands on two devices, as CUDA does."""
    import torch
    from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

    card, name = _card_class(), func._schema.name.rpartition("::")[2]
    if func.namespace == "zppo_kernels":
        from torch._library.custom_ops import OPDEFS

        with on_card():
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with on_card():  # so it comes in inference mode
            return func.decompose(*args, **kwargs)
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    there = [one for one in tensors if isinstance(one, card)]
    device = kwargs.get("device")
    to_card = bool(there) if device is None else torch.device(device).type == "cuda"
    if device is not None and to_card:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if there and name not in _COPIES:
        _check(name, args, kwargs, card)
    if (name in _WAITS and there) or (there and device is not None and not to_card):
        waits[name] += 1
    if name == "copy_" and isinstance(args[1], card) and not isinstance(args[0], card):
        waits[name] += 1
    flat, spec = tree_flatten((args, kwargs))
    bare = [held(one) for one in flat]
    plain_args, plain_kwargs = tree_unflatten(bare, spec)
    found = _call(func, name, plain_args, plain_kwargs)
    known = {id(inner): outer for inner, outer in zip(bare, flat, strict=True)}

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        if not to_card:
            return value
        # What is seen of an ordinary tensor in inference mode is an ordinary one.
        if value.nbytes > max_bytes[0]:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {value.nbytes} bytes."
            )
        with torch.inference_mode(value.is_inference() and name != "detach"):
            return card(value)

    return tree_map(placed, found)


def _call(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Products with a result wider than their operands exist on CUDA alone."""
    import torch

    overload = func._overloadname
    if name == "mm" and overload.startswith("dtype"):
        return torch.mm(args[0].to(args[2]), args[1].to(args[2]), **kwargs)
    if name == "addmm" and overload.startswith("dtype"):
        wide = [one.to(args[3]) for one in args[:3]]
        return torch.addmm(*wide, **kwargs)
    return func(*args, **kwargs)


def _check(name: str, args: Any, kwargs: Any, card: Any) -> None:
    import torch
    from torch.utils._pytree import tree_leaves

    if name in _HOST_INDEX:  # the positions may lie on the host
        args = (args[0], *args[2:])
    for one in tree_leaves((args, kwargs)):
        if isinstance(one, torch.Tensor) and not isinstance(one, card) and one.dim():
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({name})"
            )


@contextlib.contextmanager
def on_card() -> Iterator[None]:
    """Let tensors be made on the card in what follows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Making(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return compute(func, args, kwargs or {})

    with Making():
        yield


def main(argv: list[str]) -> None:
    """Run a script as `LIBRARY SCRIPT ARGUMENTS` with a card."""
    take(Path(argv[0]))
    sys.argv = argv[1:]
    sys.modules["card"] = sys.modules["__main__"]
    with on_card():
        runpy.run_path(argv[1], run_name="__card__")


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if sys.argv[1] == "--build":
        print(build(Path(sys.argv[2])))
    else:
        main(sys.argv[1:])
