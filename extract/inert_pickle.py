"""What the pickle of a weights file describes, read without running anything of it.

A pickle is a program for a small stack machine whose instructions may import and call anything. This machine knows only
the instructions that torch's own writers use, and it has nothing to call: a class becomes an empty `Instance`, one of
the few known functions becomes what it would return, every other name is refused. Nothing of what it makes is larger
than in the pickle, however often an instruction refers to it: neither here nor where torch itself reads it afterwards.
"""

import io
import math
import pickletools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

MOST_BYTES = 4 * 2**20
"""Of such a pickle: tens of thousands of tensors. A byte of it can ask for a hundred bytes of memory, not more."""

_MOST_ELEMENTS = 2**40
_MOST_DIMENSIONS = 8
_MOST_ARGUMENTS = 8
_LONGEST_NAME = 250
"""Of a class or a function."""
_LARGEST_KEY = 2**31
"""Numbers that are far apart can have the same hash; a dictionary of many such ones takes for ever."""

_CLASS = re.compile(r"__torch__\.?[\w.]* \w+|argparse Namespace")
_DICTIONARY = re.compile(r"yacs\.config CfgNode")
"""Classes that only are dictionaries: settings."""
_STORAGE = re.compile(r"torch (\w+)Storage")
_DTYPE = re.compile(r"torch (u?int|float|bfloat|complex|bool)\d*")


class RefusedError(Exception):
    """Something that no weights file needs; `str(error)` says what."""


class NoPickleError(RefusedError):
    """No pickle, or a damaged one."""


class Name(str):
    """A class or function as `module name`."""


class Instance:
    """An object of a class in the archive's own code: its attributes, if it has any."""

    def __init__(self) -> None:
        self.state: Any = None


class StorageRef(NamedTuple):
    """The bytes of one or several tensors: a record of the archive, and how many elements of which type it holds."""

    type_name: str
    """`Float`, `Half`, `Long`, ..."""
    key: str
    num_elements: int


class TensorRef(NamedTuple):
    """A tensor in its storage; offset and strides in elements."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef):
        raise RefusedError("a tensor without a storage")
    if len(_sides(size)) != len(_sides(stride)):
        raise RefusedError(f"a tensor of {len(size)} dimensions with {len(stride)} strides")
    _sides((offset,))
    num_elements = math.prod(size)
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if num_elements and (last >= storage.num_elements or num_elements > storage.num_elements):
        raise RefusedError(f"a tensor of shape {size} that is larger than its storage of {storage.num_elements}")
    return TensorRef(storage, offset, size, stride)


def _sides(numbers: Any) -> tuple[int, ...]:
    """Sizes, strides, offsets: a few counts. Others are not shown: a value that holds itself often is endless text."""
    if not isinstance(numbers, tuple) or len(numbers) > _MOST_DIMENSIONS:
        found = f"{len(numbers)} dimensions" if isinstance(numbers, tuple) else f"a {type(numbers).__name__} as size"
        raise RefusedError(f"a tensor of {found}, at most {_MOST_DIMENSIONS} dimensions are expected")
    if not all(type(number) is int and 0 <= number < _MOST_ELEMENTS for number in numbers):
        raise RefusedError(f"a tensor of a size, stride or offset that is no count below {_MOST_ELEMENTS}")
    return numbers


def _encoded(text: Any, *_: Any) -> None:
    """Bytes, which old protocols write as text: of a number. Each call makes a new copy of the text."""
    if len(_expect(str, text)) > _LONGEST_NAME:
        raise RefusedError(f"{len(text)} bytes outside of any tensor")


def _ordered(*items: Any) -> dict[Any, Any]:
    if items:  # each call would copy them
        raise RefusedError("an OrderedDict as Python 2 writes it")
    return {}


def _few(items: Any) -> None:
    """Of a schedule or a setting. Each call makes a new copy of the items."""
    if not isinstance(items, (dict, list)) or len(items) > _MOST_ARGUMENTS:
        raise RefusedError(f"a set or counter of something else than at most {_MOST_ARGUMENTS} items")
    for item in items:
        _check_key(item)


def _first(value: Any, *_: Any) -> Any:
    return value


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _first,
    "torch.jit._pickle restore_type_tag": _first,
    "torch.jit._pickle build_intlist": _first,
    "torch.jit._pickle build_doublelist": _first,
    "torch.jit._pickle build_boollist": _first,
    "torch.jit._pickle build_tensorlist": _first,
    "collections OrderedDict": _ordered,
    "collections Counter": _few,
    "__builtin__ set": _few,
    "torch Size": _sides,
    "torch device": lambda *_: None,
    "builtins complex": lambda *_: None,
    "__builtin__ complex": lambda *_: None,
    "_codecs encode": _encoded,
    "numpy dtype": lambda *_: Instance(),
    "numpy.core.multiarray scalar": lambda *_: None,
    "numpy._core.multiarray scalar": lambda *_: None,
}
"""What the known functions return. They only arrange their arguments."""


def read_inert(data: bytes | io.BytesIO) -> Any:
    """The object that a pickle describes, of plain values, `Instance`s and `TensorRef`s.

    Args:
        data: a stream is left at the end of the pickle.

    Raises:
        RefusedError: it asks for anything else, or is too large.
        NoPickleError: it is cut off or damaged.
    """
    num_bytes = len(data) if isinstance(data, bytes) else data.getbuffer().nbytes
    if num_bytes > MOST_BYTES:
        raise RefusedError(f"{num_bytes} bytes of structure, at most {MOST_BYTES} are expected")
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except RefusedError:
        raise
    except Exception as error:  # an instruction that finds no operand, a text that is none
        raise NoPickleError(f"a damaged pickle ({error})"[:200]) from error
    raise NoPickleError("a pickle that does not end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(int(name[-1]))))
            case "APPEND":
                [item] = self._take(1)
                _expect(list, stack[-1]).append(item)
            case "APPENDS":
                items = self._since_mark()
                _expect(list, stack[-1]).extend(items)
            case "SETITEM":
                _fill(stack, self._take(2))
            case "SETITEMS":
                _fill(stack, self._since_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_known(argument))
            case "NEWOBJ":
                stack.append(_new(*self._take(2)))
            case "BUILD":
                [state] = self._take(1)
                _build(stack[-1], state)
            case "REDUCE":
                function, arguments = self._take(2)
                if _expect(Name, function) not in _FUNCTIONS:
                    raise RefusedError(f"a call of {function}")
                if len(_expect(tuple, arguments)) > _MOST_ARGUMENTS:
                    raise RefusedError(f"a call of {function} with {len(arguments)} arguments")
                stack.append(_FUNCTIONS[function](*arguments))
            case "BINPERSID":
                [identity] = self._take(1)
                stack.append(_storage(identity))
            case _:
                raise RefusedError(f"the instruction {name}")

    def _take(self, count: int) -> list[Any]:
        bottom = self.marks[-1] if self.marks else 0
        if len(self.stack) - count < bottom:
            raise RefusedError("an instruction without its operands")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken


def _new(cls: Any, arguments: Any) -> Instance | dict[Any, Any]:
    """An empty object of a known class."""
    if arguments == () and _CLASS.fullmatch(_expect(Name, cls)):
        return Instance()
    if arguments == () and _DICTIONARY.fullmatch(cls):
        return {}
    raise RefusedError(f"an object of {cls}")


def _expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise RefusedError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _fill(stack: list[Any], items: list[Any]) -> None:
    target = _expect(dict, stack[-1])
    for key, value in zip(items[::2], items[1::2], strict=True):
        _check_key(key)
        target[key] = value


def _check_key(key: Any) -> None:
    if not isinstance(key, (str, int)):  # the hash of nested tuples can take for ever
        raise RefusedError(f"a dictionary with a {type(key).__name__} as key")
    if isinstance(key, int) and not -_LARGEST_KEY <= key < _LARGEST_KEY:
        raise RefusedError("a dictionary with a huge number as key")


def _build(target: Any, state: Any) -> None:
    """Give an object its attributes. Those of a dictionary (a `state_dict`'s `_metadata`) are of no interest here."""
    if not isinstance(target, dict):
        _expect(Instance, target).state = state
    elif len(_expect(dict, state)) > _MOST_ARGUMENTS:  # each dictionary would have a copy
        raise RefusedError(f"a dictionary with {len(state)} attributes")


def _known(name: str) -> Name:
    is_known = name in _FUNCTIONS or any(kind.fullmatch(name) for kind in (_CLASS, _DICTIONARY, _STORAGE, _DTYPE))
    if len(name) > _LONGEST_NAME or not is_known:
        raise RefusedError(name.replace(" ", ".")[:_LONGEST_NAME])
    return Name(name)


def _storage(identity: Any) -> StorageRef:
    match identity:
        case ("storage", Name() as name, str(key), str(), int(count), *old) if count >= 0 and old in ([], [None]):
            if found := _STORAGE.fullmatch(name):
                return StorageRef(found[1], key, count)
    raise RefusedError("a reference that is not to a storage")
