"""Reads the pickle of a torch file without running any of it: what it says of storages and tensors.

`torch.load(weights_only=True)` runs nothing either, but it believes sizes: a storage of a terabyte in a file of a kilobyte
is allocated, one that is larger than its record in the archive is read past its end. Here every class and function of the
pickle becomes an object that does nothing, and the sizes come out as numbers.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn

#: Bytes of a pickle; a checkpoint of thousands of tensors has less than one million.
_LARGEST = 32 << 20
_SIZES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexFloat": 8, "ComplexDouble": 16, "Untyped": 1, "QInt8": 1, "QUInt8": 1, "QInt32": 4,
}  # fmt: skip
#: Functions of torch that make a tensor from a storage, an offset, sizes and strides.
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
_PASSED = ("_rebuild_parameter", "_rebuild_parameter_with_state")


@dataclass(frozen=True)
class Storage:
    """Memory that a pickle asks for.

    Attributes:
        key: of its record.
        elements: as the pickle says.
        itemsize: bytes of an element.
    """

    key: str
    elements: int
    itemsize: int


@dataclass(frozen=True)
class View:
    """A tensor on a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class Contents:
    """What a pickle holds.

    Attributes:
        storages: by key.
        views: every tensor.
        foreign: names of things that plain tensors do not need and that take memory when they are made.
    """

    storages: dict[str, Storage] = field(default_factory=dict)
    views: list[View] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


class _Inert:
    """In place of every object: takes everything, does nothing."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Nothing."""

    def extend(self, values: Any) -> None:
        """Nothing."""

    def add(self, value: Any) -> None:
        """Nothing."""


class _Table(dict[Any, Any]):
    """An ordered dictionary; what it has beside its items (a state dict's ``_metadata``) is dropped."""

    def __setstate__(self, state: Any) -> None: ...


@dataclass(frozen=True)
class _StorageType:
    itemsize: int


class _Bounded:
    """A stream that ends with an error behind `_LARGEST` bytes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._left = stream, _LARGEST

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise pickle.UnpicklingError(f"more than {_LARGEST} bytes of pickle")
        return data

    def read(self, size: int = -1) -> bytes:
        """As a stream's; never more than what is left."""
        return self._taken(self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1))

    def readline(self) -> bytes:
        """As a stream's."""
        return self._taken(self._stream.readline(self._left + 1))


class _Reader(pickle.Unpickler):
    def __init__(self, stream: Any, contents: Contents) -> None:
        super().__init__(stream)
        self._contents = contents

    def find_class(self, module: str, name: str, /) -> Any:
        """Never the thing itself."""
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return _StorageType(_SIZES.get(name.removesuffix("Storage"), 1))
        if module == "torch._utils" and name in _REBUILD:
            return self._view
        if module == "torch._utils" and name in _PASSED:
            return _Inert
        if (module, name) == ("collections", "OrderedDict"):
            return _Table
        if module == "torch._utils" or (module, name) in (("builtins", "bytearray"), ("__builtin__", "bytearray")):
            self._contents.foreign.append(f"{module}.{name}")
        return _Inert

    def persistent_load(self, pid: Any, /) -> Any:
        """A storage; anything else is left to torch to refuse."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _StorageType):
            return _Inert()
        if type(pid[4]) is not int or pid[4] < 0:
            _refuse(f"a storage of {str(pid[4])[:40]} elements")
        found = Storage(str(pid[2]), pid[4], pid[1].itemsize)
        known = self._contents.storages.setdefault(found.key, found)
        if known.elements * known.itemsize < found.elements * found.itemsize:
            self._contents.storages[found.key] = found
        return found

    def _view(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Any:
        if not isinstance(storage, Storage):
            return _Inert()
        numbers = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 64
        if not numbers or any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
            _refuse(f"a tensor of shape {str(shape)[:80]}")
        self._contents.views.append(View(storage, offset, shape, strides))
        return _Inert()


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(what)


def contents_of(stream: IO[bytes], pickles: int = 1) -> Contents:
    """What the last of some pickles in a row holds.

    Raises:
        Exception: whatever the reader of pickles raises on a malformed one.
    """
    bounded = _Bounded(stream)
    contents = Contents()
    for _ in range(pickles):
        contents = Contents()
        _Reader(bounded, contents).load()
    return contents
