"""Gluon kernels on the CPU, for want of an interpreter: their Python source, executed on whole tensors.

What is asynchronous happens as unfavourably as it may. A copy makes garbage of its target when it starts and delivers
when its group has been waited for; a product reads its operands when it starts and again when it has been waited for,
and both must be the same. So a buffer that is read too early or overwritten too early changes the result or raises.
Threads, registers and layouts do not exist here.
"""

import importlib
import types

import torch

PACKAGE = "edadm_compile.kernels"
MODULES = ("triton.weights", "triton.epilogue", "triton.overlap", "triton.matmul", "gluon.copies", "gluon.matmul", "gluon.epilogue",
           "gluon.qlinear", "gluon.qconv2d")  # fmt: skip
UNSIGNED = "uint32"


def plain(x):
    return x.data if isinstance(x, Block) else x


class Block:
    """A tensor of the device language."""

    def __init__(self, data):
        self.data = data
        self.shape = list(data.shape)
        self.type = types.SimpleNamespace(layout=None)

    def to(self, kind, bitcast=False):
        if kind == UNSIGNED:
            return Block(self.data.long() & 0xFFFFFFFF)
        return Block(self.data.view(kind) if bitcast else self.data.to(kind))

    def __getitem__(self, index):
        return Block(self.data[index])


def _operator(name):
    def apply(self, other=None):
        if isinstance(other, Pointer):
            return other + self
        function = getattr(self.data, f"__{name}__")
        return Block(function() if other is None else function(plain(other)))

    setattr(Block, f"__{name}__", apply)


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "and", "rshift", "lshift", "lt", "ge", "eq", "neg",
              "rtruediv"):  # fmt: skip
    _operator(_name)
Block.__truediv__ = lambda self, other: Block(self.data / plain(other))
Block.__floordiv__ = lambda self, other: Block(torch.div(self.data, plain(other), rounding_mode="trunc"))
Block.__mod__ = lambda self, other: Block(torch.fmod(self.data, plain(other)))


class Scalar(int):
    """An integer of the device language; converting it changes nothing here."""

    def to(self, kind):
        return self


def _scalar_operator(name):
    def apply(self, other):
        result = getattr(int, name)(self, other)
        return Scalar(result) if isinstance(result, int) else result

    setattr(Scalar, name, apply)


for _name in ("__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__floordiv__", "__mod__"):
    _scalar_operator(_name)


class Pointer:
    """One or more addresses, as indices into all the memory behind a tensor."""

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other):
        return Pointer(self.memory, self.offset + (other.data.long() if isinstance(other, Block) else other))

    def __getitem__(self, index):
        return Pointer(self.memory, self.offset[index])


class Buffer:
    """Shared memory; `data` is a view of it."""

    def __init__(self, data):
        self.data, self.shape = data, list(data.shape)

    def index(self, i):
        assert 0 <= i < self.shape[0]
        return Buffer(self.data[i])

    def permute(self, order):
        return Buffer(self.data.permute(order))

    def load(self, layout):
        return Block(self.data.clone())

    def store(self, value):
        self.data.copy_(value.data.reshape(self.data.shape))

    def reinterpret(self, kind, shape, layout):
        """[chunks, M, N / chunks] as [M, N], N the slow dimension."""
        return Buffer(self.data.permute(1, 0, 2))

    _reinterpret = reinterpret


class Device:
    """The language, and one program's asynchronous work."""

    int8, uint8, int32, int64 = torch.int8, torch.uint8, torch.int32, torch.int64
    float32, uint32, constexpr = torch.float32, UNSIGNED, None
    static_range = range

    def __init__(self, warps, generator):
        self.warps, self.generator = warps, generator
        self.reset((0, 0, 0))

    def reset(self, program):
        self.program, self.group, self.groups, self.products = program, [], [], []

    def noise(self, tensor):
        info = torch.iinfo(tensor.dtype)
        low, high = max(info.min, -(2**31)), min(info.max, 2**31 - 1)
        tensor.copy_(torch.randint(low, high, tensor.shape, generator=self.generator))

    # what the kernels call

    def program_id(self, axis):
        return self.program[axis]

    def SliceLayout(self, dim, parent):
        return None

    def num_warps(self):
        return self.warps

    def arange(self, start, end, layout=None):
        return Block(torch.arange(start, end, dtype=torch.int32))

    def zeros(self, shape, kind, layout=None):
        return Block(torch.zeros(shape, dtype=kind))

    def zeros_like(self, x):
        return Block(torch.zeros_like(x.data))

    def where(self, condition, a, b):
        if isinstance(condition, bool):
            return a if condition else b
        if isinstance(a, Pointer):
            # Where the memories differ, the second one is put behind the first.
            start = -(-a.memory.numel() // 16) * 16
            memory = torch.cat((a.memory, a.memory.new_zeros(start - a.memory.numel()), b.memory))
            return Pointer(memory, torch.where(condition.data, a.offset, b.offset + start))
        return Block(torch.where(condition.data, plain(a), plain(b)))

    def minimum(self, a, b):
        return Block(torch.minimum(*(torch.as_tensor(plain(x)) for x in (a, b)))) if _blocks(a, b) else min(a, b)

    def maximum(self, a, b):
        return Block(torch.maximum(*(torch.as_tensor(plain(x)) for x in (a, b)))) if _blocks(a, b) else max(a, b)

    def cdiv(self, a, b):
        return -(-a // b)

    def multiple_of(self, x, values):
        return x

    max_contiguous = multiple_of

    def convert_layout(self, x, layout):
        assert not self.products, "an accumulator is used while its product runs"
        return x

    def static_assert(self, condition, message=""):
        assert condition, message

    def debug_barrier(self):
        pass

    def load(self, pointer, mask=None):
        offset = torch.as_tensor(pointer.offset)
        if mask is None:
            return Block(pointer.memory[offset])
        inside = mask.data.expand(offset.shape) if offset.shape != mask.data.shape else mask.data
        return Block(torch.where(inside, pointer.memory[torch.where(inside, offset, 0)], 0))

    def store(self, pointer, value, mask=None):
        offset, data = torch.broadcast_tensors(pointer.offset, value.data)
        inside = mask.data.expand(offset.shape)
        pointer.memory[offset[inside]] = data[inside]

    def sum(self, x, axis):
        return Block(x.data.sum(axis))

    def exp(self, x):
        return Block(torch.exp(x.data))

    def erf(self, x):
        return Block(torch.erf(x.data))

    def div_rn(self, a, b):
        return Block(a.data / plain(b))

    def allocate_shared_memory(self, kind, shape, layout):
        data = torch.empty(shape, dtype=kind)
        self.noise(data)
        return Buffer(data)

    def copy_to_shared(self, buffer, pointer):
        assert list(pointer.offset.shape) == buffer.shape
        assert bool((pointer.offset[:, ::16] % 16 == 0).all()), "16 bytes at once"
        self.noise(buffer.data)
        self.group.append((buffer, pointer.memory[pointer.offset]))

    def commit_group(self):
        self.groups.append(self.group)
        self.group = []

    def wait_group(self, outstanding):
        assert not self.group
        done = len(self.groups) - outstanding
        for group in self.groups[: max(done, 0)]:
            for buffer, data in group:
                buffer.data.copy_(data)
        self.groups = self.groups[max(done, 0) :]

    def fence_async_shared(self):
        pass

    def warpgroup_mma(self, a, b, acc, is_async):
        assert is_async and b.data.dtype == torch.int8 and a.data.dtype == torch.int8
        product = _product(a, b)
        self.products.append((a, b, product))
        return acc + Block(product)

    def warpgroup_mma_wait(self, outstanding, deps):
        while len(self.products) > outstanding:
            a, b, product = self.products.pop(0)
            assert torch.equal(_product(a, b), product), "an operand was overwritten while its product ran"
        (acc,) = deps
        return acc


def _blocks(*values):
    return any(isinstance(v, Block) for v in values)


def _product(a, b):
    return (a.data.double() @ b.data.double()).to(torch.int32)


def rebuilt(device):
    """Every device function by module and name, with `device` in place of the language."""
    functions = {}
    for name in MODULES:
        module = importlib.import_module(f"{PACKAGE}.{name}")
        scope = dict(vars(module))
        for key, value in vars(module).items():
            if key in ("gl", "tl", "async_copy"):
                scope[key] = device
            elif hasattr(device, key):
                scope[key] = getattr(device, key)
            elif key.endswith("_layout"):
                scope[key] = lambda *_: None
            elif hasattr(value, "fn"):
                owner = value.fn.__module__.removeprefix(f"{PACKAGE}.")
                if owner == name:
                    functions[name, key] = types.FunctionType(value.fn.__code__, scope, key, value.fn.__defaults__)
                scope[key] = functions[owner, key]
            elif hasattr(value, "value"):
                scope[key] = value.value
    return functions


def run(found, tensors, values, warps, seed=0):
    """Launch a registered Gluon kernel on CPU tensors in place."""
    module, _, name = found.entry.removeprefix(f"{PACKAGE}.").partition(":")
    device = Device(warps, torch.Generator().manual_seed(seed))
    function = rebuilt(device)[module, name]
    pointers = []
    for role in found.roles:
        tensor = tensors.get(role)
        whole = None if tensor is None else torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        pointers.append(None if tensor is None else Pointer(whole, tensor.storage_offset()))
    named = {key: values[key] for key in (*found.constants, *found.sizes)}
    for program in range(found.grid(values)[0]):
        device.reset((Scalar(program), 0, 0))
        function(*pointers, *(values[s] for s in found.scalars), **named)
        assert not device.products and not any(device.groups) and not device.group
