"""Loading and launching machine code through the CUDA driver, in the context that torch made."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, Protocol

from edadm_compile.errors import TargetError
from edadm_compile.kernels.cubin import INTEGER, POINTER, Cubin

#: Programs may use this much dynamic shared memory without asking, in bytes.
_FREE_SHARED = 48 << 10
_CTYPES: dict[str, Any] = {POINTER: ctypes.c_uint64, INTEGER: ctypes.c_int32}


class Arguments:
    """Kernel parameters packed once for any number of launches.

    Args:
        values: pointers and integers in order.
        kinds: their PTX types, `POINTER` or `INTEGER`.
    """

    def __init__(self, values: Sequence[int], kinds: Sequence[str]) -> None:
        self.values, self.kinds = tuple(values), tuple(kinds)
        self._cells = [_CTYPES[kind](value) for value, kind in zip(values, kinds, strict=True)]
        self._table = (ctypes.c_void_p * len(self._cells))(*(ctypes.addressof(cell) for cell in self._cells))

    @property
    def address(self) -> int:
        """Of the table of pointers to the values, as ``kernelParams`` of cuLaunchKernel."""
        return ctypes.addressof(self._table)


class Driver(Protocol):
    """What the engine needs of a device."""

    def load(self, cubin: Cubin) -> Any:
        """Put a kernel on the current device; returns a handle for `launch`."""

    def launch(
        self, function: Any, grid: tuple[int, int, int], block: int, shared: int, stream: int, arguments: Arguments,
        early: bool = False,
    ) -> None:  # fmt: skip
        """Enqueue a kernel.

        Args:
            function: from `load`.
            grid: programs in x, y, z.
            block: threads per program.
            shared: bytes of dynamic shared memory.
            stream: handle of a CUDA stream.
            arguments: kept alive by the caller; read before this returns.
            early: it may start while the kernel before it on the stream still runs; for kernels that wait themselves.
        """


class CudaDriver:
    """The real driver, through cuda-bindings.

    Raises:
        TargetError: cuda-bindings or the GPU driver is not installed.
    """

    def __init__(self) -> None:
        try:
            driver: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError:
            raise TargetError(
                "running on a GPU needs the package cuda-bindings, which is not installed: "
                "pip install 'edadm-compile[cuda]'"
            ) from None
        self._api = driver
        self._loaded: dict[tuple[int, str], Any] = {}
        try:
            self._call(driver.cuInit, 0)
        except (RuntimeError, ImportError) as error:  # libcuda is not there
            raise TargetError(f"running on a GPU needs NVIDIA's driver: {error}") from None

    def load(self, cubin: Cubin) -> Any:
        """Load into the current context; the same code is loaded once per context and stays until the process ends."""
        context = int(self._call(self._api.cuCtxGetCurrent))
        key = (context, hashlib.sha256(cubin.data).hexdigest())
        if key not in self._loaded:
            module = self._call(self._api.cuModuleLoadData, cubin.data)
            function = self._call(self._api.cuModuleGetFunction, module, cubin.name.encode())
            if cubin.shared > _FREE_SHARED:
                attribute = self._api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._call(self._api.cuFuncSetAttribute, function, attribute, cubin.shared)
            self._loaded[key] = function
        return self._loaded[key]

    def launch(
        self, function: Any, grid: tuple[int, int, int], block: int, shared: int, stream: int, arguments: Arguments,
        early: bool = False,
    ) -> None:  # fmt: skip
        """As `Driver.launch`."""
        if not early:
            self._call(self._api.cuLaunchKernel, function, *grid, block, 1, 1, shared, stream, arguments.address, 0)
            return
        config = self._api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes, config.hStream = shared, self._api.CUstream(stream)
        config.attrs, config.numAttrs = [self._early], 1
        self._call(self._api.cuLaunchKernelEx, config, function, arguments.address, 0)

    def version(self) -> int:
        """The CUDA version the driver offers: 12080 for 12.8."""
        return int(self._call(self._api.cuDriverGetVersion))

    def gpus(self) -> list[dict[str, Any]]:
        """Name, architecture and memory (bytes) of each GPU; starts no context."""
        attributes = self._api.CUdevice_attribute
        found = []
        for index in range(int(self._call(self._api.cuDeviceGetCount))):
            device = self._call(self._api.cuDeviceGet, index)
            kinds = (attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                     attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)  # fmt: skip
            major, minor = (int(self._call(self._api.cuDeviceGetAttribute, kind, device)) for kind in kinds)
            text = bytes(self._call(self._api.cuDeviceGetName, 256, device)).split(b"\0")[0].decode()
            memory = int(self._call(self._api.cuDeviceTotalMem, device))
            found.append({"name": text, "arch": f"sm_{major}{minor}", "bytes": memory})
        return found

    @cached_property
    def _early(self) -> Any:
        """The launch attribute that lets a kernel start before the one in front of it has ended."""
        attribute = self._api.CUlaunchAttribute()
        kinds = self._api.CUlaunchAttributeID
        attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        return attribute

    def _call(self, function: Any, *arguments: Any) -> Any:
        status, *values = function(*arguments)
        if status != self._api.CUresult.CUDA_SUCCESS:
            _, text = self._api.cuGetErrorString(status)
            reason = text.decode() if isinstance(text, bytes) else str(status)
            raise TargetError(f"{function.__name__} failed: {reason} ({getattr(status, 'name', status)})")
        return values[0] if values else None


@cache
def cuda_driver() -> CudaDriver:
    """The driver of this process."""
    return CudaDriver()
