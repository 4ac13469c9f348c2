"""A pretend GPU, for tests on a machine without one.

    with pretend_gpu():
        x = torch.zeros(3, device="cuda")        # x.device is cuda:0, and it is computed on the CPU
        x + torch.zeros(3)                       # RuntimeError: Expected all tensors to be on ...

Which device a tensor is on is a mark on its storage. So views share it, in-place operations keep
it, and a parameter that is moved stays the same object, as on a real GPU. Two modes do the rest:

    Functions    sees each call of PyTorch's Python interface: `device=`, .device, .to, .cpu, .numpy
    Operations   sees each operator that is computed, those of the backward pass, too: refuses
                 inputs on two devices, and marks what comes out

Not pretended: CUDA's own random numbers (these are the CPU's, so that results are the same bit for
bit), CUDA's generators, its kernels and their rounding, its lists of what autocast computes in
which type, streams, and torch.compile.
"""
import contextlib
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def place(x):
    """The device of a tensor, by its storage."""
    return getattr(x.untyped_storage(), "place", CPU)


def put(x, device):
    """Marks a tensor, and all that share its storage, as being on a device. Returns it."""
    x.untyped_storage().place = device
    return x


def tensors(*things):
    """All tensors in arguments or results."""
    for x in things:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors(*x)


def known(device):
    """A device as one of the two above, or another kind. Raises RuntimeError for a second GPU."""
    device = torch.device(device)
    if device.type == "cuda" and device.index not in (None, 0):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return CUDA if device.type == "cuda" else device


def to(x, *args, copy=False, **kwargs):
    """Tensor.to: a copy where it goes to another device."""
    if args and isinstance(args[0], torch.Tensor):
        args = (place(args[0]), args[0].dtype, *args[1:])
    device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    device = known(device or place(x))
    new = device != place(x)
    y = x.to(dtype or x.dtype, copy=copy or new, memory_format=layout or torch.preserve_format)
    if new and y.requires_grad:                                # the gradient goes the way back
        back = place(x)
        y.register_hook(lambda gradient: put(gradient.clone(), back))
    return put(y, device) if new else y


def numpy(x, **kwargs):
    """Tensor.numpy, which takes no tensors of a GPU."""
    if place(x) == CUDA:
        raise TypeError(f"can't convert {CUDA} device type tensor to numpy. Use Tensor.cpu() to "
                        "copy the tensor to host memory first.")
    return x.numpy(**kwargs)


def array(x, dtype=None):
    """Tensor.__array__, which NumPy calls."""
    return numpy(x) if dtype is None else numpy(x).astype(dtype)


def as_tensor(data, dtype=None, device=None):
    """torch.as_tensor: no copy where data is a tensor that is there already."""
    x = torch.as_tensor(data, dtype=dtype)
    return x if device is None else to(x, device)


Tensor = torch.Tensor
OWN = {Tensor.to: to, Tensor.numpy: numpy, Tensor.__array__: array, torch.as_tensor: as_tensor,
       Tensor.cpu: lambda x, **_: to(x, CPU), Tensor.cuda: lambda x, *_, **__: to(x, CUDA),
       Tensor.device.__get__: place, Tensor.is_cuda.__get__: lambda x: place(x) == CUDA,
       Tensor.is_cpu.__get__: lambda x: place(x) == CPU}
COPIES = Tensor.__deepcopy__, Tensor.new_tensor      # whose results no operator of a tensor makes


class Functions(TorchFunctionMode):
    """What a call of the Python interface means on a GPU. here: the device of what an operator
    makes inside of it from no tensor, such as the zeros of F.one_hot."""
    here = CPU

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in OWN:
            return OWN[func](*args, **kwargs)
        given = kwargs.get("device")
        inputs = list(tensors(*args, *kwargs.values()))
        here = CUDA if any(place(x) == CUDA for x in inputs) else CPU
        if given is not None:
            here, kwargs = known(given), kwargs | dict(device=CPU)
        generator = kwargs.get("generator")
        if generator is not None and here == CUDA:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        before, self.here = self.here, here
        out = func(*args, **kwargs)
        self.here = before                              # where a hook was called in the midst
        return put(out, here) if given is not None or func in COPIES else out


class Operations(TorchDispatchMode):
    """Where an operator computes, if it does."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = list(tensors(*args, *(kwargs or {}).values()))
        places = {place(x) for x in inputs}
        if len(places) > 1:
            check(func, args, inputs)
        out = func(*args, **kwargs or {})
        here = CUDA if CUDA in places else CPU if places else self.functions.here
        if here == CUDA and func is not torch.ops.aten.copy_.default:
            for x in tensors(out):
                put(x, CUDA)
        return out


def check(func, args, inputs):
    """Raises RuntimeError unless an operator takes tensors of two devices: a copy, indices on the
    CPU, and where each element is computed by itself, numbers on the CPU that are not written."""
    name = func._schema.name.removeprefix("aten::")
    if name == "copy_":
        return
    if name.strip("_") in ("index", "index_put", "index_put_impl"):
        if place(args[0]) == CPU and any(place(x) == CUDA for x in tensors(args[1])):
            raise RuntimeError("indices should be either on cpu or on the same device as the "
                               "indexed tensor (cpu)")
        inputs = list(tensors(args[0], *args[2:]))
    number = torch.Tag.pointwise in func.tags or name.startswith("_foreach") or \
        name.strip("_") in ("masked_fill", "fill", "index_put", "index_put_impl")
    written = [x for x, a in zip(args, func._schema.arguments) if a.is_write]
    for x in inputs:
        if place(x) == CPU and (x.ndim or not number or any(x is y for y in written)):
            raise RuntimeError("Expected all tensors to be on the same device, but found at least "
                               f"two devices, {CUDA} and {CPU}! (in {name})")


class Autocast(torch.autocast):
    """torch.autocast, on the CPU."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__(CPU.type, *args, **kwargs)


def restore(storage, location):
    """torch.load: where a storage is put; None: not here."""
    if str(location).startswith("cuda"):
        storage.place = known(location)
        return storage


@contextlib.contextmanager
def pretend_gpu(bfloat16=False):
    """Inside, there is a GPU; bfloat16: whether it computes in bfloat16 by itself."""
    functions, packages = Functions(), torch.serialization._package_registry
    engine = torch.autograd._engine_run_backward

    def backward(*args, **kwargs):                 # with the mode on: hooks call PyTorch, too
        with functions:
            return engine(*args, **kwargs)
    kept, tag = list(packages), lambda x: str(CUDA) if getattr(x, "place", CPU) == CUDA else None
    api = dict(is_available=lambda: True, device_count=lambda: 1, synchronize=lambda *_: None,
               get_device_name=lambda *_: "Pretend GPU", is_bf16_supported=lambda **_: bfloat16)
    with patch.multiple(torch.cuda, **api), patch.object(torch, "autocast", Autocast), \
            patch.object(torch.autograd, "_engine_run_backward", backward):
        torch.serialization.register_package(0, tag, restore)
        try:
            with functions, Operations(functions):
                yield
        finally:
            packages[:] = kept
