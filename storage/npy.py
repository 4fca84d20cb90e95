"""`.npy` files: what numpy opens without pickle, written and read without taking anything in them on trust.

Source: the NPY format, version 1.0 (numpy.lib.format).
"""

import ast
import contextlib
import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.errors import DamagedError
from storage.files import REMEDY

NPY_MAGIC = b"\x93NUMPY\x01\x00"


@lru_cache(maxsize=16)
def npy_header(dtype: str | np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """The header of a `.npy` file, whose length is a multiple of 64 bytes."""
    buffer, descr = io.BytesIO(), np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def npy_bytes(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def read_npy(path: str, data: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The array of a `.npy` file, as a view of `data`: nothing is unpickled, and no memory is taken for what it claims.

    Raises:
        DamagedError: it does not hold exactly an array of that type and shape.
    """
    count = int(np.prod(shape))
    ours = npy_header(dtype, shape)
    if data.startswith(ours) and len(data) - len(ours) == count * dtype.itemsize:
        return np.frombuffer(data, dtype, count, len(ours)).reshape(shape)
    start = 10 + int.from_bytes(data[8:10], "little")  # another version of numpy may write the header otherwise
    header: Any = None
    with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that it may raise
        header = ast.literal_eval(data[10:start].decode("latin-1").strip()) if data[:8] == NPY_MAGIC else None
    expected = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    if header != expected or len(data) - start != count * dtype.itemsize:
        what = f"rows of {dtype.itemsize} bytes" if dtype.names else dtype.name
        raise DamagedError(f"{path} is no .npy file of {' x '.join(map(str, shape))} {what}; {REMEDY}")
    return np.frombuffer(data, dtype, count, start).reshape(shape)
