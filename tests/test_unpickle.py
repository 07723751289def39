"""Files of weights cannot run anything, whatever they name; what they should hold is read to the bit."""

import collections
import copyreg
import io
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dgutils.errors import UserError
from dgutils.networks import unpickle
from dgutils.networks.checkpoints import read_state_dict

FIXTURES = Path(__file__).parent / "fixtures"


class Evil:
    """Unpickling it runs a shell command that makes the file `canary`."""

    def __init__(self, canary):
        self.command = f"touch {canary}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something in a file was run"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def call(module, name, *arguments, stack_global=False):
    """A pickle of module.name(*arguments), which need not exist."""
    named = text(module) + text(name) + b"\x93" if stack_global else f"c{module}\n{name}\n".encode()
    packed = [a if isinstance(a, bytes) else text(a) for a in arguments]
    return named + b"(" + b"".join(packed) + b"tR"


def network(**extra):
    """A pickle's program that pushes a plausible EDM snapshot with extra entries, each a program too."""
    return b"\x80\x04}(" + b"".join(text(key) + program for key, program in extra.items()) + b"u."


def refused(tmp_path, data, match):
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=match) as caught:
        unpickle.read_pickle(path)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def torch_bytes(obj, legacy=True):
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def binbytes(data):
    return b"B" + struct.pack("<I", len(data)) + data


def test_the_canary_would_sing(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "sang")))
    assert (tmp_path / "sang").exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_reduce_of_os_system(protocol, tmp_path, canary):
    refused(tmp_path, pickle.dumps({"ema": Evil(canary)}, protocol=protocol), "refused: it names")


def test_the_first_refused_name_is_said(tmp_path, canary):
    data = network(a=call("os", "system", f"touch {canary}"), b=call("shutil", "rmtree", str(canary)))
    refused(tmp_path, data, r"it names os\.system, which no network needs")


@pytest.mark.parametrize("stack_global", [False, True])
@pytest.mark.parametrize(
    "module, name",
    [
        ("torch._utils_evil", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3"), ("torch.hub", "load"),
        ("torch", "load"), ("torch", "_utils._rebuild_tensor_v2"), ("torch._utils._rebuild_tensor_v2", "__globals__"),
        ("torch.storage", "os.system"), ("torch.serialization", "load"), ("torch.jit", "load"),
        ("numpy.f2py", "compile"), ("numpy.f2py.crackfortran", "myeval"), ("numpy", "load"),
        ("numpy.core.multiarray", "scalar.__class__"), ("collections", "OrderedDict.fromkeys"),
        ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "__import__"),
        ("__builtin__", "eval"), ("torch_utils.persistence", "_src_to_module"), ("dnnlib.util", "open_url"),
        ("dnnlib.util", "get_obj_by_name"), ("collections ", "OrderedDict"), ("", ""),
    ],
)  # fmt: skip
def test_names_that_only_look_right(module, name, stack_global, tmp_path, canary):
    program = call(module, name, f"__import__('os').system('touch {canary}')", stack_global=stack_global)
    refused(tmp_path, network(ema=program), "refused: it names ")
    refused(tmp_path, b"\x80\x04" + program[: program.rindex(b"(")] + b".", "refused: it names ")  # never called


def test_a_named_module_is_not_imported(tmp_path, canary, monkeypatch):
    (tmp_path / "evil_module.py").write_text(f"open({str(canary)!r}, 'w')\ndef run(*arguments): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused(tmp_path, network(ema=call("evil_module", "run")), r"evil_module\.run")


def test_source_in_a_persistent_object_is_not_run(tmp_path, canary):
    meta = (b"}(" + text("type") + text("class") + text("version") + b"K\x06" + text("class_name") + text("Net")
            + text("module_src") + text(f"open({str(canary)!r}, 'w')\nclass Net: pass") + text("state") + b"}u")
    path = tmp_path / "file.pkl"
    path.write_bytes(network(ema=call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)))
    found = unpickle.read_pickle(path)["ema"]
    assert found == unpickle.Saved("Net", (), {}, {})
    assert "canary" not in repr(found)


@pytest.mark.parametrize("legacy", [True, False])
def test_tensor_bytes_are_read_with_weights_only(legacy, tmp_path, canary):
    nested = call("torch.storage", "_load_from_bytes", binbytes(torch_bytes(Evil(canary), legacy)))
    refused(tmp_path, network(ema=nested), r"bytes of a tensor in it: it names \w+\.system")


def test_tensor_bytes_that_are_a_plain_pickle(tmp_path, canary):
    nested = call("torch.storage", "_load_from_bytes", binbytes(pickle.dumps(Evil(canary))))
    refused(tmp_path, network(ema=nested), "bytes of a tensor in it")


def test_functions_that_tensor_bytes_hold_are_not_called(tmp_path):
    bare = torch_bytes([]).replace(b"\x80\x02]q\x00.", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", 1)
    assert unpickle.load_weights_only(io.BytesIO(bare)) is torch._utils._rebuild_tensor_v2
    program = call("torch.storage", "_load_from_bytes", binbytes(bare)) + b"(" + text("x") + b"tR"
    refused(tmp_path, network(ema=program), "a call of no name")


@pytest.mark.parametrize("legacy", [True, False])
def test_pt_files_are_read_with_weights_only(legacy, tmp_path, canary, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what a hurried user may have set
    path = tmp_path / "32x32_classifier.pt"
    path.write_bytes(torch_bytes({"weight": torch.ones(2), "evil": Evil(canary)}, legacy))
    with pytest.raises(UserError, match=r"refused: it names \w+\.system") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value) and "safe_globals" not in str(caught.value)


@pytest.mark.parametrize(
    "module, name", [("torch._utils_evil", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v2.__globals__"),
                     ("torch.hub", "load"), ("collections", "OrderedDict.fromkeys"), ("torch.FloatStorage", "load")],
)  # fmt: skip
def test_pt_files_with_names_that_only_look_right(module, name, tmp_path, canary):
    path, program = tmp_path / "file.pt", network(weight=call(module, name, f"touch {canary}"))
    with zipfile.ZipFile(io.BytesIO(torch_bytes({}, legacy=False))) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.namelist():
            new.writestr(item, program if item.endswith("data.pkl") else old.read(item))
    with pytest.raises(UserError, match=re.escape(f"refused: it names {module}")):
        read_state_dict(path)


def test_extension_codes(tmp_path, canary):
    copyreg.add_extension("os", "system", 240)
    try:
        program = b"\x82\xf0" + b"(" + text(f"touch {canary}") + b"tR"
        pickle.loads(b"\x80\x02\x82\xf0.")  # now the code is in the cache that asks nobody
        for code in (b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"):
            refused(tmp_path, network(ema=program.replace(b"\x82\xf0", code)), "opcode EXT")
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg.clear_extension_cache()


@pytest.mark.parametrize(
    "program, names",
    [
        (lambda touch: b"(cos\nsystem\n" + text(touch) + b"o", r"os\.system"),  # OBJ
        (lambda touch: b"(" + text(touch) + b"ios\nsystem\n", "opcode INST"),
        (lambda touch: b"cos\nsystem\n" + text(touch) + b"\x85}\x92", r"os\.system"),  # NEWOBJ_EX
        (lambda touch: f"P{touch}\n".encode(), "opcode PERSID"),
        (lambda touch: text(touch) + b"Q", "opcode BINPERSID"),
        (lambda touch: b"\x96" + struct.pack("<Q", 1) + b"x", "opcode BYTEARRAY8"),
        (lambda touch: b"\x97", "opcode NEXT_BUFFER"),
    ],
    ids=["OBJ", "INST", "NEWOBJ_EX", "PERSID", "BINPERSID", "BYTEARRAY8", "NEXT_BUFFER"],
)
def test_other_ways_to_call(program, names, tmp_path, canary):
    refused(tmp_path, network(ema=program(f"touch {canary}")), names)


def test_build_sets_nothing_on_anything(tmp_path, canary):
    system = b"cos\nsystem\n"
    setstate = b"}(" + text("__setstate__") + system + b"u"
    refused(tmp_path, network(ema=system + setstate + b"b"), r"os\.system")
    # onto allowed names, containers and tensors, as __dict__ and as slots
    for target in (b"ccollections\nOrderedDict\n", call("collections", "OrderedDict"), b"}", b"]", text("x")):
        for state in (b"}(" + text("x") + b"K\x01u", b"}}" + text("x") + b"K\x01s\x86"):
            refused(tmp_path, network(ema=target + state + b"b"), "not a network pickle")
    assert not hasattr(collections.OrderedDict, "x")


@pytest.mark.parametrize(
    "program",
    [
        call("torch.storage", "_load_from_bytes", "no bytes"), call("numpy", "dtype", "f8"),
        call("torch_utils.persistence", "_reconstruct_persistent_obj", b"}"),
        call("collections", "OrderedDict", "an argument"), b"]" + b"K\x01" + b"R", b"K\x01" + b"]" + b"K\x02" + b"s",
        b"}" + b"]" + b"K\x01" + b"s", b"}" + b")\x85" + b"K\x01" + b"s",  # keys that are containers
        b"R", b"0", b"h\x07", b"(", b"u", b"a",
    ],
)  # fmt: skip
def test_known_calls_with_wrong_arguments(program, tmp_path):
    refused(tmp_path, network(ema=program), "not a network pickle|names opcode")


def tensor_program(offset, size, stride):
    storage = call("torch.storage", "_load_from_bytes", binbytes(torch_bytes(torch.arange(6.0)._typed_storage())))
    shape = [b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t" for values in (size, stride)]
    offset = b"J" + struct.pack("<i", offset)
    hooks = call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", storage, offset, *shape, b"\x89", hooks)


def test_tensors_are_views_inside_their_storage(tmp_path):
    path = tmp_path / "file.pkl"
    path.write_bytes(network(a=tensor_program(0, (2, 3), (3, 1)), b=tensor_program(1, (2, 2), (1, 3))))
    found = unpickle.read_pickle(path)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b"].tolist() == [[1, 4], [2, 5]]
    for outside in ((0, (7,), (1,)), (5, (2,), (1,)), (0, (3,), (3,)), (-1, (2,), (1,)), (0, (2,), (-1,)),
                    (0, (10000, 10000), (0, 0)), (0, (2, 3), (1,))):  # fmt: skip
        refused(tmp_path, network(a=tensor_program(*outside)), "tensor")


@pytest.mark.parametrize("kind", ["vp", "cond"])
def test_cut_short_at_any_length(kind, tmp_path):
    data = (FIXTURES / f"edm_{kind}.pkl").read_bytes()
    for length in (0, 1, 2, 100, len(data) // 2, len(data) - 1):
        refused(tmp_path, data[:length], "not a network pickle, or is cut short")
    refused(tmp_path, b"<!DOCTYPE html><html>quota exceeded</html>", "not a network pickle|names opcode")
    with pytest.raises(UserError, match="cannot read"):
        unpickle.read_pickle(tmp_path / "absent.pkl")


def test_a_snapshot_written_by_the_reference(tmp_path):
    found = unpickle.read_pickle(FIXTURES / "edm_cond.pkl")
    assert list(found) == ["ema", "loss_fn", "augment_pipe", "dataset_kwargs"]
    ema = found["ema"]
    assert (ema.class_name, ema.args, ema.kwargs["label_dim"]) == ("EDMPrecond", (), 10)
    assert ema.state["sigma_data"] == 0.5 and ema.state["sigma_max"] == float("inf")
    unet = ema.state["_modules"]["model"]
    block = unet.state["_modules"]["enc"].state["_modules"]["8x8_block0"]
    assert block.class_name == "UNetBlock" and block.state["skip_scale"] is None  # a NumPy number in the file
    assert found["augment_pipe"].kwargs == {"p": 0.12, "xflip": 1e8, "scale": 1}
    tensors = unpickle.state_dict(ema)
    assert tensors["model.map_layer0.weight"].dtype == torch.float16 and len(tensors) == 149
    assert load_file(FIXTURES / "edm_pickles.safetensors")["cond.out"].isfinite().all()


def test_modules_that_contain_themselves(tmp_path):
    empty = {"_parameters": {}, "_buffers": {}}
    loop = unpickle.Saved("Net", state=empty | {"_modules": {}})
    loop.state["_modules"]["again"] = loop
    with pytest.raises(UserError, match="'again.' is not a torch module of its own"):
        unpickle.state_dict(loop)
    shared = unpickle.Saved("Net", state=empty | {"_modules": {}})
    with pytest.raises(UserError, match="'b.' is not a torch module of its own"):
        unpickle.state_dict(unpickle.Saved("Net", state=empty | {"_modules": {"a": shared, "b": shared}}))
    for wrong in (3, {}, unpickle.Saved("Net"), unpickle.Saved("Net", state=empty | {"_modules": {"a": "b"}})):
        with pytest.raises(UserError, match="not a torch module"):
            unpickle.state_dict(wrong)
    with pytest.raises(UserError, match="w is not a tensor"):
        unpickle.state_dict(unpickle.Saved("Net", state={"_parameters": {"w": 1}, "_buffers": {}, "_modules": {}}))
