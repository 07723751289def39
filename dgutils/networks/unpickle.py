"""A reader of NVIDIA's network pickles that runs nothing they name.

A pickle is a program for a stack machine, and may call any function of any module. The reader here knows only
the opcodes and the calls that those files are made of. It never looks a name up: what it builds are numbers,
text, plain containers, tensors and `Saved` objects. A file that names anything else is refused, with the name.
"""

import io
import math
import pickle
import pickletools
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dgutils.errors import UserError, require


@dataclass
class Saved:
    """An object in the file: its class's name, its constructor's arguments and its attributes; never its code."""

    class_name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)


class _Refused(Exception):
    """The file asks for something that no network needs; the text says what."""


def _expect(condition, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _keys(values):
    """Keys are text or numbers: nothing whose hash takes long or recurses."""
    _expect(all(type(v) in (str, int, float, bool) for v in values), "a key that is neither text nor number")
    return values


def _saved(meta):
    """torch_utils.persistence: class name and attributes; the class's source, also in `meta`, is dropped."""
    _expect(type(meta) is dict and meta.get("type") == "class" and type(meta.get("class_name")) is str
            and type(meta.get("state")) is dict, "a persistent object without class name and state")  # fmt: skip
    state = dict(meta["state"])
    args, kwargs = state.pop("_init_args", None) or (), state.pop("_init_kwargs", None) or {}
    _expect(type(args) is tuple and type(kwargs) is dict, "a persistent object without arguments")
    return Saved(meta["class_name"], args, kwargs, state)


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None):
    """A view of a storage, copied; it must lie inside, and hold no more elements than the storage does."""
    _expect(type(storage) is torch.storage.TypedStorage and type(size) is type(stride) is tuple
            and all(type(v) is int and v >= 0 for v in (offset, *size, *stride)) and len(size) == len(stride),
            "a tensor without storage or shape")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # typed storages are deprecated, but what the files hold
        dtype, data, length = storage.dtype, storage.untyped(), storage.size()
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    _expect(math.prod(size) <= length and (0 in size or last < length), "a tensor larger than its storage")
    return torch.empty(0, dtype=dtype).set_(data, offset, size, stride).clone(memory_format=torch.contiguous_format)


# What the files may call, and what is called in its place.
_CALLS = {
    "torch_utils.persistence._reconstruct_persistent_obj": _saved,
    "torch.nn.modules.container.ModuleDict": lambda: Saved("ModuleDict"),
    "torch._utils._rebuild_parameter": lambda tensor, requires_grad=False, hooks=None: tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": lambda data: load_weights_only(io.BytesIO(data)),
    # What no network's tensors or options depend on: NumPy's numbers become None, and sets lists.
    "numpy.dtype": lambda name, align, copy: Saved("dtype"),
    "numpy.core.multiarray.scalar": lambda dtype, data: None,
    "numpy._core.multiarray.scalar": lambda dtype, data: None,  # its name since NumPy 2
    "builtins.set": lambda members: members,
    "collections.OrderedDict": lambda: {},
    "dnnlib.util.EasyDict": lambda: {},  # a dict whose items are attributes too
}
_OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE
    BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 APPEND APPENDS MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL"""


class _Opcodes(dict):
    def __missing__(self, code):
        raise _Refused(f"opcode {pickletools.code2op[chr(code)].name}")


class _Reader(pickle._Unpickler):
    """Python's own unpickler less its opcodes that reach beyond the file; what calls or fills is written anew."""

    dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code]
                         for code in (getattr(pickle, name)[0] for name in _OPCODES.split())})  # fmt: skip

    def find_class(self, module, name):
        if (named := _CALLS.get(f"{module}.{name}")) is None or "." in name:
            raise _Refused(f"{module}.{name}")
        return named

    def call(self):
        arguments, called = self.stack.pop(), self.stack[-1]  # tensors' bytes may hold other functions, of torch
        _expect(type(arguments) is tuple and any(called is ours for ours in _CALLS.values()), "a call of no name")
        self.stack[-1] = called(*arguments)

    def set_items(self, items):
        _expect(type(self.stack[-1]) is dict, "items for a dict that is none")
        self.stack[-1].update(zip(_keys(items[::2]), items[1::2], strict=True))

    def build(self):
        state, target = self.stack.pop(), self.stack[-1]
        _expect(type(target) is Saved and type(state) in (dict, tuple), "attributes for something that has none")
        if type(state) is dict:  # a tuple says how a NumPy type orders its bytes
            target.state.update(state)

    dispatch |= {pickle.REDUCE[0]: call, pickle.NEWOBJ[0]: call, pickle.BUILD[0]: build,
                 pickle.EMPTY_SET[0]: pickle._Unpickler.load_empty_list,
                 pickle.ADDITEMS[0]: pickle._Unpickler.load_appends,
                 pickle.SETITEM[0]: lambda self: self.set_items([self.stack.pop(-2), self.stack.pop()]),
                 pickle.SETITEMS[0]: lambda self: self.set_items(self.pop_mark())}  # fmt: skip


def read_pickle(path: Path):
    """What a network pickle holds, as plain containers, tensors and `Saved` objects. Nothing of it is run.

    Raises UserError if the file is unreadable, cut short, or names anything beyond what network pickles need.
    """
    try:
        return _Reader(io.BytesIO(Path(path).read_bytes())).load()
    except UserError as error:
        raise UserError(f"{path} refused: the bytes of a tensor in it: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    except _Refused as error:
        raise UserError(f"{path} refused: it names {error}, which no network needs; nothing of it was run") from error
    except Exception as error:  # a program that does not work fails in a dozen ways
        raise UserError(f"{path} is not a network pickle, or is cut short ({error}): get it again") from error


def state_dict(module: Saved, prefix: str = "") -> dict[str, torch.Tensor]:
    """Parameters and buffers of a saved torch module, named as torch names them; they are taken out of it.

    Raises UserError for what is no torch module of its own: one that stands in two places, or within itself, is empty
    at the second.
    """
    state = module.state if type(module) is Saved else {}
    parameters, buffers, children = (state.pop(key, None) for key in ("_parameters", "_buffers", "_modules"))
    require(type(parameters) is type(buffers) is type(children) is dict,
            f"the object at '{prefix}' is not a torch module of its own")
    tensors = {f"{prefix}{key}": value for key, value in (parameters | buffers).items() if value is not None}
    for key, value in tensors.items():
        require(type(value) is torch.Tensor, f"{key} is not a tensor")
    for key, child in children.items():
        tensors |= state_dict(child, f"{prefix}{key}.") if child is not None else {}
    return tensors


def load_weights_only(file):
    """torch.load(weights_only=True), whose refusals become one line that does not advise to lift them.

    file: path or stream. Raises UserError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles, about to be refused
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, zipfile's, torch's and plain RuntimeErrors
        if named := re.search(r"GLOBAL `?([\w.]+)", str(error)):
            raise UserError(f"it names {named[1]}, which no weights need; nothing of it was run") from error
        raise UserError("it is not a file of tensors as torch saves them, or is cut short") from error
