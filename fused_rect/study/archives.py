"""CIFAR's python archives are pickles. This reads them without numpy's or anybody's unpickling code: plain values
(numbers, strings, lists, dicts) and arrays of plain numbers come out, anything else is refused.

The opcodes are looked through before any is executed. A pickle is a program: with a container that is used twice, 279
bytes describe a value of 2^60 parts, which takes for ever to hash; one memo index makes the unpickler reserve 32 GB;
and tuples nested deeply enough overflow the C stack. CIFAR's files need none of this, nor do lists and dicts.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from typing import Any

import numpy as np


class UnsafePickle(ValueError):
    """The pickle asks for something else than arrays and plain values."""


class _Dtype:
    """Stands in for `numpy.dtype`, whose own unpickling trusts the flags that it reads."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or code not in {k + str(n) for k in "iuf" for n in (1, 2, 4, 8)} | {"b1"}:
            raise UnsafePickle(f"an array of dtype {code!r}, where numbers are expected")
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise UnsafePickle(f"byte order {order!r}")
        self.order = order

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """Stands in for `numpy.ndarray`: keeps the bytes, and checks them against shape and dtype when asked for."""

    value: np.ndarray[Any, Any]

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or not all(type(n) is int for n in shape):
            raise UnsafePickle("an array whose contents are not plain bytes")
        try:
            flat = np.frombuffer(data, dtype.dtype())
            self.value = flat.reshape(shape, order="F" if fortran else "C").astype(flat.dtype.newbyteorder("="))
        except ValueError as error:
            raise UnsafePickle(f"an array whose bytes do not fit its shape: {error}") from error


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _Array:
        raise UnsafePickle("an array of a class of its own")
    return _Array()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickle(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _empty() -> bytes:
    return b""


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsafePickle(f"the name {module}.{name}, which only arrays and plain values never need") from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickle("a reference to something outside the file")


# What may be used a second time: none of it holds another value.
_ATOMS = {
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "GLOBAL", "STACK_GLOBAL",
    "REDUCE",
}  # fmt: skip
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_OTHERS = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "FLOAT", "BINFLOAT", "EMPTY_LIST", "LIST",
    "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "BUILD",
}  # fmt: skip
_KNOWN = _ATOMS | _PUTS | _GETS | _TUPLES | _OTHERS
_MOST_TUPLES = 100  # an array has 5


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_SIZES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4, pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # fmt: skip


def _opcodes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and raw argument of each opcode; pickletools.genops decodes them, but Python 2's text need not be ASCII."""
    file = io.BytesIO(data)
    name = ""
    while name != "STOP":
        opcode = _OPCODES[file.read(1).decode("latin1")]  # none at the end of a file that was cut short
        name, kind = opcode.name, opcode.arg.n if opcode.arg else 0
        if kind == pickletools.UP_TO_NEWLINE:
            yield name, file.readline() + (file.readline() if name == "GLOBAL" else b"")
        else:
            yield name, file.read(kind if kind >= 0 else int.from_bytes(file.read(_SIZES[kind]), "little"))


def _check(data: bytes) -> None:
    """Raises UnsafePickle for what only other files than CIFAR's hold."""
    memo, tuples, previous = list[str](), 0, ""
    for name, argument in _opcodes(data):
        if name not in _KNOWN:
            raise UnsafePickle(f"the opcode {name}, which only arrays and plain values never need")
        index = len(memo)
        if name in ("PUT", "GET"):
            index = int(argument)
        elif name in _GETS or (name in _PUTS and argument):
            index = int.from_bytes(argument, "little")
        if name in _PUTS:
            if not 0 <= index <= len(memo) + 1:  # Python 2 began at 1
                raise UnsafePickle(f"a memo of {index} places after {len(memo)} values")
            memo += [""] * (index + 1 - len(memo))
            memo[index] = previous
            continue
        if name in _GETS and (not 0 <= index < len(memo) or memo[index] not in _ATOMS):
            raise UnsafePickle("a container that is used twice")
        tuples += name in _TUPLES
        if tuples > _MOST_TUPLES:
            raise UnsafePickle(f"more than {_MOST_TUPLES} tuples")
        previous = memo[index] if name in _GETS else name


def loads(data: bytes) -> Any:
    """The plain value that ``data`` pickles; byte strings of Python 2 come out as bytes.

    Raises :class:`UnsafePickle` (a ValueError) for damaged data, and for all but number arrays and plain values.
    """
    try:
        _check(data)
        return _plain(_Unpickler(io.BytesIO(data), encoding="bytes").load())
    except UnsafePickle:
        raise
    except Exception as error:  # a damaged pickle fails in many ways: EOFError, KeyError, IndexError, TypeError, ...
        raise UnsafePickle(f"not a readable pickle ({type(error).__name__}: {error})") from error


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise UnsafePickle(f"a value of type {type(value).__name__}")
