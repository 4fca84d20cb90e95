"""What a TorchScript archive's pickle describes, read without running anything of it.

A pickle is a program for a small stack machine whose instructions may import and call anything. This machine knows only
the instructions that torch's own TorchScript writer uses, and it has nothing to call: a class becomes an empty
`Instance`, one of the few known functions becomes what it would return, every other name is refused.
"""

import pickletools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

MOST_BYTES = 8 * 2**20
"""Of such a pickle: tens of thousands of tensors. A byte of it can ask for a hundred bytes of memory, not more."""

_MOST_ELEMENTS = 2**40

_CLASS = re.compile(r"__torch__\.?[\w.]* \w+")
_STORAGE = re.compile(r"torch (\w+)Storage")
_PLAIN_KEYS = (str, int, float)


class RefusedError(Exception):
    """Something that no weights file needs; `str(error)` says what."""


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
    for numbers in (size, stride, (offset,)):
        if not isinstance(numbers, tuple) or not all(
            type(number) is int and 0 <= number < _MOST_ELEMENTS for number in numbers
        ):
            raise RefusedError(f"a tensor of size {size!r}, stride {stride!r}, offset {offset!r}"[:200])
    if not isinstance(storage, StorageRef) or len(size) != len(stride):
        raise RefusedError("a tensor without a storage, or with another number of strides than of dimensions")
    return TensorRef(storage, offset, size, stride)


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
    "collections OrderedDict": lambda *_: {},
    "torch device": lambda *_: None,
    "builtins complex": lambda *_: None,
}
"""What the known functions return. They only arrange their arguments."""


def read_inert(data: bytes) -> Any:
    """The object that a pickle describes, of plain values, `Instance`s and `TensorRef`s.

    Raises:
        RefusedError: it asks for anything else, is cut off, or is too large.
    """
    if len(data) > MOST_BYTES:
        raise RefusedError(f"{len(data)} bytes of structure, at most {MOST_BYTES} are expected")
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except RefusedError:
        raise
    except Exception as error:  # an instruction that finds no operand, a text that is none
        raise RefusedError(f"a damaged pickle ({error})"[:200]) from error
    raise RefusedError("a pickle that does not end")


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
                cls, _ = self._take(2)
                if not _CLASS.fullmatch(_expect(Name, cls)):
                    raise RefusedError(f"an object of {cls}")
                stack.append(Instance())
            case "BUILD":
                [state] = self._take(1)
                _expect(Instance, stack[-1]).state = state
            case "REDUCE":
                function, arguments = self._take(2)
                if _expect(Name, function) not in _FUNCTIONS:
                    raise RefusedError(f"a call of {function}")
                stack.append(_FUNCTIONS[function](*_expect(tuple, arguments)))
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


def _expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise RefusedError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _fill(stack: list[Any], items: list[Any]) -> None:
    target = _expect(dict, stack[-1])
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, _PLAIN_KEYS):  # the hash of nested tuples can take for ever
            raise RefusedError(f"a dictionary with a {type(key).__name__} as key")
        target[key] = value


def _known(name: str) -> Name:
    if name not in _FUNCTIONS and not _CLASS.fullmatch(name) and not _STORAGE.fullmatch(name):
        raise RefusedError(f"the name {name.replace(' ', '.')}"[:200])
    return Name(name)


def _storage(identity: Any) -> StorageRef:
    match identity:
        case ("storage", Name() as name, str(key), str(), int(count)) if count >= 0:
            if found := _STORAGE.fullmatch(name):
                return StorageRef(found[1], key, count)
    raise RefusedError("a reference that is not to a storage")


def walk_tensors(root: Any, *, most_names: int = 100_000, most_levels: int = 100) -> Iterator[tuple[str, TensorRef]]:
    """The tensors of a tree of modules, by the dotted names of attributes, as a module's `state_dict` has them.

    Raises:
        RefusedError: a module that contains itself, or far too many names (modules shared by modules that are shared).
    """
    left, pending = most_names, [("", root, 0)]
    while pending:
        prefix, module, level = pending.pop()
        if level > most_levels:
            raise RefusedError(f"modules inside modules more than {most_levels} deep")
        for name, value in module.state.items() if isinstance(module.state, dict) else ():
            left -= 1
            if left < 0:
                raise RefusedError(f"more than {most_names} attributes")
            if isinstance(value, TensorRef):
                yield f"{prefix}{name}", value
            elif isinstance(value, Instance):
                pending.append((f"{prefix}{name}.", value, level + 1))
