"""Published networks: read in their authors' formats, refused by name when they do not fit."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import standins
import torch
import yaml
from safetensors.torch import load_file

from dgutils.cli import main as cli
from dgutils.errors import UserError
from dgutils.networks import checkpoints, pretrain, weights
from dgutils.networks.adm import EncoderUNet
from dgutils.networks.checkpoints import look_into
from dgutils.networks.edm import Denoiser
from dgutils.noise import vp_to_cosine_time
from dgutils.pipeline import jobs

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = dict(img_resolution=8, img_channels=3, sigma_data=0.5, model_channels=8, channel_mult=[1, 2], num_blocks=1,
             attn_resolutions=[4], augment_dim=9)  # fmt: skip
VP, COND = SMALL | dict(label_dim=0), SMALL | dict(label_dim=10)
ADM = dict(image_size=16, in_channels=3, model_channels=32, out_channels=10, num_res_blocks=1,
           attention_resolutions=[2], channel_mult=[1, 2], num_head_channels=32)  # fmt: skip
HEAD = dict(image_size=8, in_channels=64, model_channels=32, out_channels=1, num_res_blocks=1,
            attention_resolutions=[1], channel_mult=[1], num_head_channels=32, num_classes=0)  # fmt: skip


def entry(name, kind, config, suffix="pt", **fields):
    return weights.Published(name, kind, f"small {name}", f"{name}.{suffix}", f"https://weights.test/{name}", "MIT", 1,
                             config, **fields)  # fmt: skip


ENTRIES = [
    entry("edm_vp", "denoiser", VP, "pkl"), entry("edm_cond", "denoiser", COND, "pkl"),
    entry("small32", "extractor", ADM),
    entry("small64", "extractor", ADM | dict(image_size=32, channel_mult=[1, 1, 2]), clock="cosine"),
    entry("uncond", "discriminator", HEAD), entry("cond", "discriminator", HEAD | {"num_classes": 1000}),
    entry("inception", "inception", None), entry("stats", "data", None, "npz"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(weights, "registry", lambda: {e.name: e for e in ENTRIES})
    checkpoints._load.cache_clear()
    yield tmp_path
    checkpoints._load.cache_clear()


def place(folder, name, data=None):
    source = FIXTURES / f"{name}.pkl"
    (folder / weights.published(name).file).write_bytes(source.read_bytes() if data is None else data)


def save(folder, name, obj, **options):
    torch.save(obj, folder / weights.published(name).file, **options)


def encoder(name, **changes):
    """Random weights, none of them zero throughout, as training leaves them."""
    torch.manual_seed(0)
    network = EncoderUNet(**weights.published(name).config | changes)
    for value in network.parameters():
        value.data += 0.01 * torch.randn_like(value)
    return network


# ---- EDM ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edm_vp", "edm_cond"])
def test_the_references_pickle_gives_the_references_output(name, folder):
    place(folder, name)
    network, kind = checkpoints.load_denoiser(name), name.removeprefix("edm_")
    given = load_file(FIXTURES / "edm_pickles.safetensors")
    labels = given[f"{kind}.labels"] if network.label_dim else None
    out = network(given[f"{kind}.x"], given[f"{kind}.sigma"], labels)
    assert (out - given[f"{kind}.out"]).abs().max() <= 1e-6  # of outputs up to 2.5, in float32
    assert not network.training and all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())
    assert checkpoints.clock(name) == "linear"


def test_conditional_network_in_the_place_of_the_unconditional(folder):
    place(folder, "edm_vp", (FIXTURES / "edm_cond.pkl").read_bytes())
    with pytest.raises(UserError, match=r"edm_vp.pkl is not the small edm_vp: label_dim is 10, not 0: get "
                       "the file again"):
        checkpoints.load_denoiser("edm_vp")
    assert not (folder / "checksums.json").exists()


def renamed(old, new):
    """The reference's pickle with one text in it replaced by another of the same length."""
    data = (FIXTURES / "edm_vp.pkl").read_bytes()
    assert len(old) == len(new) and old in data
    return data.replace(old, new)


@pytest.mark.parametrize(
    "data, fault",
    [
        (renamed(b"EDMPrecond", b"iDMPrecond"), "holds iDMPrecond around SongUNet; supported is EDMPrecond around"),
        (renamed(b"SongUNet", b"DhariwaU"), "holds EDMPrecond around DhariwaU"),
        (renamed(b"\x03ema", b"\x03net"), "has no network under 'ema'"),
        (renamed(b"encoder_type", b"encoder_kind"), r"arguments that are unknown here: \['encoder_kind'\]"),
        (renamed(b"positional", b"positionaL"), "its embedding_type is positionaL; supported is positional"),
    ],
)
def test_other_networks_in_a_pickle_are_named(data, fault, folder):
    place(folder, "edm_vp", data)
    with pytest.raises(UserError, match=fault):
        checkpoints.load_denoiser("edm_vp")


def changed(folder, change):
    """A stand-in whose snapshot `change` has altered before it was pickled."""
    network, saved = Denoiser(**VP), standins._saved

    def alter(module, kwargs, **attributes):
        made = saved(module, kwargs, **attributes)
        change(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standins, "_saved", alter)
        standins.write_edm(folder / "edm_vp.pkl", network, VP)


def set_filter(module):
    if module.class_name == "SongUNet":
        module.kwargs["resample_filter"] = loop = []
        loop.append(loop)


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda module: module.state.update(_buffers=None), "edm_vp.pkl: the object at '.*' is not a torch module"),
        (set_filter, "edm_vp.pkl: its network's arguments are not plain numbers and text"),
        (lambda module: module.state["_parameters"].update(extra=3), "edm_vp.pkl: .*extra is not a tensor"),
        (lambda module: module.state["_modules"].update(again=module), "edm_vp.pkl: the object at '.*again.' is not"),
    ],
)  # fmt: skip
def test_snapshots_of_the_wrong_make_are_named(change, fault, folder):
    changed(folder, change)
    with pytest.raises(UserError, match=fault):
        checkpoints.load_denoiser("edm_vp")
    assert look_into(folder / "edm_vp.pkl")[-1].startswith("REFUSED: ")


# ---- state dicts -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_state_dicts(folder, options):
    extractor, head = encoder("small32"), encoder("uncond")
    save(folder, "small32", extractor.state_dict(), **options)
    save(folder, "uncond", {k: v.half() for k, v in head.state_dict().items()}, **options)
    x, time = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 0.9])
    assert torch.equal(checkpoints.load_feature_extractor("small32")(x, time), extractor.eval()(x, time))
    loaded = checkpoints.load_discriminator("uncond")
    assert not hasattr(loaded, "label_emb") and loaded.time_embed[0].weight.dtype == torch.float32
    assert set(json.loads((folder / "checksums.json").read_text())) == {"small32.pt", "uncond.pt"}


@pytest.mark.parametrize("classes", [1000, 10])
def test_class_conditional_head(folder, classes):
    save(folder, "cond", encoder("cond", num_classes=classes).state_dict())
    head = checkpoints.load_discriminator("cond")
    assert head.label_emb.weight.shape == (classes, 128)
    assert head(torch.randn(2, 64, 8, 8), 0.5, torch.tensor([3, 9])).shape == (2, 1)


def test_cosine_clock_of_the_64_pixel_extractor(folder):
    save(folder, "small64", encoder("small64").state_dict())
    assert checkpoints.load_feature_extractor("small64").feature_shape == (64, 8, 8)
    assert checkpoints.clock("small64") == "cosine" and checkpoints.clock("small32") == "linear"
    assert checkpoints.clock("fashion-mnist-adm") == "linear"


def test_discriminator_at_64_pixels_reads_time_by_the_cosine_clock(folder):
    """In extractor and head alike; a head is the same network at either size, its features 8 x 8."""
    for name in ("small64", "uncond"):
        save(folder, name, encoder(name).state_dict())
    ensemble = jobs.Published("small64", ("uncond",)).ensemble((0,), "mean_logit", "last")
    x, time = torch.randn(2, 3, 32, 32), torch.tensor([0.1, 0.7])
    logit = ensemble.log_density_ratio(x, time)
    extractor, head = checkpoints.load_feature_extractor("small64"), checkpoints.load_discriminator("uncond")
    at = vp_to_cosine_time(time)
    assert torch.equal(logit, head(extractor.features(x, at), at)[:, 0])
    assert not torch.allclose(at, time, atol=0.01)


@pytest.mark.parametrize(
    "name, given, fault",
    [
        ("uncond", "cond", r"label_emb.weight is \[1000, 128\], not absent: get"),
        ("cond", "uncond", r"label_emb.weight is absent, not \[1000, 128\]: get"),
        ("small32", "small64", r"is \[.*\], not \[.*, and \d+ more: get"),
        ("small64", "small32", r"is \[.*\], not \[.*, and \d+ more: get"),
        ("small32", "uncond", r"is \[32, 64, 3, 3\], not \[32, 3, 3, 3\], and"),
        ("uncond", "small32", r"is \[32, 3, 3, 3\], not \[32, 64, 3, 3\], and"),
    ],
)
def test_one_network_in_the_place_of_another(name, given, fault, folder):
    save(folder, name, encoder(given).state_dict())
    load = checkpoints.load_discriminator if name in ("cond", "uncond") else checkpoints.load_feature_extractor
    with pytest.raises(UserError, match=f"{name}.pt is not the small {name}: .*{fault}"):
        load(name)
    assert not (folder / "checksums.json").exists()  # a file that does not fit is not remembered


@pytest.mark.parametrize(
    "make, fault",
    [
        (lambda state: {"state_dict": state, "epoch": 60}, "not a state dict but a dict of state_dict, epoch: a"),
        (lambda state: [*state.values()], "not a state dict but list"),
        (lambda state: state | {"out.3.weight": torch.ones(1)}, r"out.3.weight is \[1\], not absent: get"),
        (lambda state: {}, "is absent, not .* and .* more: get"),
    ],
)
def test_misfits_are_named_with_their_cause(make, fault, folder):
    save(folder, "uncond", make(encoder("uncond").state_dict()))
    with pytest.raises(UserError, match=fault):
        checkpoints.load_discriminator("uncond")


def one(value):
    """A change of one number of a tensor."""
    def change(tensor):
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


FAULTS = {
    "one NaN": (one(math.nan), "holds 1 numbers that are NaN or infinite"),
    "one infinity": (one(math.inf), "holds 1 numbers that are NaN or infinite"),
    "minus infinity throughout": (lambda v: torch.full_like(v, -math.inf), "holds 9,216 numbers that are NaN"),
    "a NaN in half precision": (lambda v: one(math.nan)(v.half()), "holds 1 numbers that are NaN or infinite"),
    "zeros": (torch.zeros_like, "is zero throughout"),
    "zeros in bfloat16": (lambda v: torch.zeros_like(v).bfloat16(), "is zero throughout"),
    "negative zeros": (lambda v: -torch.zeros_like(v), "is zero throughout"),
    "complex": (lambda v: v.to(torch.complex64), "holds complex64 numbers, not real ones"),
    "int64": (lambda v: (100 * v).long(), "holds int64 numbers, not real ones"),
    "uint8": (lambda v: (100 * v).to(torch.uint8), "holds uint8 numbers, not real ones"),
    "bool": (lambda v: v > 0, "holds bool numbers, not real ones"),
    "sparse": (lambda v: v.flatten(1).to_sparse(), "sparse"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_numbers_that_no_training_leaves_are_refused_and_never_recorded(name, folder):
    change, fault = FAULTS[name]
    state, key = encoder("uncond").state_dict(), "middle_block.0.in_layers.2.weight"
    save(folder, "uncond", state | {key: change(state[key].clone())})
    if name != "sparse":  # which is of another shape, too
        with pytest.raises(UserError, match=f"uncond.pt refused: {key} {fault}"):
            checkpoints.load_discriminator("uncond")
    assert not (folder / "checksums.json").exists()
    assert fault in look_into(folder / "uncond.pt")[-1] and look_into(folder / "uncond.pt")[-1].startswith("REFUSED: ")
    assert cli.main(["inspect", str(folder / "uncond.pt")]) == 2


@pytest.mark.parametrize("name", ["one NaN", "complex", "zeros"])
def test_neither_are_those_of_a_pickle(name, folder):
    change, fault = FAULTS[name]
    network, key = Denoiser(**VP), "model.map_layer0.weight"
    network.model.map_layer0.weight = torch.nn.Parameter(change(network.model.map_layer0.weight.data))
    standins.write_edm(folder / "edm_vp.pkl", network, VP)
    with pytest.raises(UserError, match=f"edm_vp.pkl refused: {key} {fault}"):
        checkpoints.load_denoiser("edm_vp")
    assert not (folder / "checksums.json").exists()
    assert fault in look_into(folder / "edm_vp.pkl")[-1]


def test_names(folder):
    with pytest.raises(UserError, match="no network 'edm'; shipped: .*fashion-mnist-edm.*; published: edm_vp, edm_c"):
        checkpoints.load_denoiser("edm")
    with pytest.raises(UserError, match="'uncond' is no extractor but: small uncond"):
        checkpoints.load_feature_extractor("uncond")
    with pytest.raises(UserError, match="edm_vp.pkl is not in .*: run `python -m dgutils fetch edm_vp`"):
        checkpoints.load_denoiser("edm_vp")
    with pytest.raises(UserError, match="'fashion-mnist-adm' is no denoiser but: Noise-conditional ADM classifier"):
        checkpoints.load_denoiser("fashion-mnist-adm")
    assert checkpoints.image_shape("edm_vp") == (3, 8, 8) and checkpoints.network_config("small32") == ADM
    assert checkpoints.image_shape("fashion-mnist-edm") == (1, 32, 32)


def test_weights_digest_is_the_files(folder):
    place(folder, "edm_vp")
    first = checkpoints.weights_digest("edm_vp")
    assert first == weights.sha256_of(FIXTURES / "edm_vp.pkl")
    place(folder, "edm_vp", b"\x80" + bytes(10))
    assert checkpoints.weights_digest("edm_vp") != first
    assert checkpoints.weights_digest("fashion-mnist-edm") == checkpoints.model_card("fashion-mnist-edm")["sha256"]


def test_registry_and_architectures_agree():
    counts = {name: sum(math.prod(shape) for shape in checkpoints._shapes(e.kind, e.config).values())
              for name, e in weights.registry().items() if e.config}  # fmt: skip
    for name, count in counts.items():  # 4 bytes a number; an EDM file also has about 0.2 MB of structure
        assert abs(weights.published(name).megabytes - count * 4e-6) < 1.0
    assert counts["64x64_classifier"] == 65_438_568 and counts["discriminator_250"] == 3_395_841


# ---- look into -----------------------------------------------------------------------------


def test_what_is_in_a_pickle(folder):
    lines = look_into(FIXTURES / "edm_cond.pkl")
    assert f"edm_cond.pkl: 164,014 bytes, sha256 {weights.sha256_of(FIXTURES / 'edm_cond.pkl')}" in lines[0]
    assert {"label_dim: 10", "num_blocks: 1", "sigma_data: 0.5",
            "  model.map_label.weight [8, 10]"} <= set(lines)
    assert any(line.endswith(" tensors, float16") for line in lines)


def test_what_is_in_the_other_formats(folder):
    save(folder, "cond", encoder("cond").state_dict())
    save(folder, "uncond", encoder("uncond").state_dict(), _use_new_zipfile_serialization=False)
    assert "  time_embed.0.weight [128, 32]" in look_into(folder / "cond.pt")
    assert look_into(folder / "uncond.pt")[-1] == "  out.2.c_proj.bias [1]"
    shipped = look_into(checkpoints.ASSETS / "fashion-mnist-edm.safetensors")
    assert shipped[1].startswith("recipe: ")
    (folder / "short.pt").write_bytes((folder / "cond.pt").read_bytes()[:-50])
    assert look_into(folder / "short.pt")[-1].startswith("REFUSED: ")
    (folder / "page.pt").write_bytes(b"<html>")
    assert "is not a file of tensors" in look_into(folder / "page.pt")[1]
    (folder / "evil.pkl").write_bytes(b"\x80\x04cos\nsystem\n)R.")
    assert "REFUSED: " in look_into(folder / "evil.pkl")[-1]
    assert "it names os.system, which" in look_into(folder / "evil.pkl")[-1]
    with pytest.raises(UserError, match="no file"):
        look_into(folder / "absent.pt")


# ---- stand-ins ---------------------------------------------------------------------------


def test_stand_ins_are_loaded_like_the_real_files(folder, monkeypatch):
    names = ["edm_vp", "edm_cond", "small32", "uncond", "cond"]
    standins.write_stand_ins(folder / "rehearsal", names, seed=7)
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(folder / "rehearsal"))
    assert weights.is_rehearsal()
    x = 80 * torch.randn(2, 3, 8, 8)
    for name in ("edm_vp", "edm_cond"):
        out = checkpoints.load_denoiser(name)(x, 80.0)
        assert out.isfinite().all() and 0.05 < out.std() < 5
    features = checkpoints.load_feature_extractor("small32").features(torch.randn(2, 3, 16, 16), 0.5)
    logit = checkpoints.load_discriminator("uncond")(features, 0.5)
    assert logit.isfinite().all() and logit.abs().min() > 0
    assert checkpoints.load_discriminator("cond").label_emb.num_embeddings == 1000
    before = {name: checkpoints.weights_digest(name) for name in names}
    standins.write_stand_ins(folder / "rehearsal", names, seed=7)  # kept, so that what was computed stays valid
    assert before == {name: checkpoints.weights_digest(name) for name in names}
    for other in (lambda: standins.write_stand_ins(folder / "rehearsal", names, seed=8),
                  lambda: standins.write_stand_ins(FIXTURES, names)):  # fmt: skip
        with pytest.raises(UserError, match="give an empty folder"):
            other()
    with pytest.raises(UserError, match="'stats' holds data, not weights"):
        standins.write_stand_ins(folder / "rehearsal", ["stats"], seed=7)


def test_inception_stand_in_goes_through_clean_fids_loader(folder):
    from cleanfid.inception_torchscript import InceptionV3W

    stand_in = dataclasses.replace(weights.published("inception"), file="inception-2015-12-05.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "registry", lambda: {"inception": stand_in})
        standins.write_stand_ins(folder / "rehearsal", ["inception"])
    network = InceptionV3W(str(folder / "rehearsal"), download=False, resize_inside=True).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32)).float()
    with torch.no_grad():
        features = network(images)
        network.resize_inside = False
        resized = network(torch.nn.functional.interpolate(images, (299, 299), mode="bilinear"))
    assert features.shape == (2, 2048) and features.isfinite().all() and features.std() > 0.1
    assert torch.allclose(features, resized, atol=1e-3)
    assert "REFUSED: " in look_into(folder / "rehearsal" / "inception-2015-12-05.pt")[1]  # it is a program


def test_loading_needs_none_of_the_references_packages(folder):
    place(folder, "edm_vp")
    code = ("import sys; from dgutils.networks import checkpoints; checkpoints.read_edm(sys.argv[1]); "
            "print([m for m in sys.modules if m.split('.')[0] in ('dnnlib', 'torch_utils', 'training', "
            "'guided_diffusion')])")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, folder / "edm_vp.pkl"], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", sorted(checkpoints.ASSETS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_recipe_of_a_shipped_network_is_the_same_beside_in_its_card_and_in_its_file(path):
    """Its file above all: the store knows a network by the file's checksum, so other options need another file."""
    card, recipe = checkpoints.model_card(path.stem), yaml.safe_load(path.with_suffix(".yaml").read_text())
    if path.stem != "fashion-mnist-head":  # which tests/train_head.py trains, by the loop of discriminators
        recipe = pretrain.load_recipe(path.stem)
    inside = json.loads(checkpoints.read_tensors(path)[1]["recipe"])
    if path.stem in ("cifar10-adm", "fashion-mnist-adm"):  # written when a narrow encoder's groups were always of four
        inside["config"]["num_group_channels"] = 4
    assert inside == card["recipe"] == recipe
    assert checkpoints.sha256_of(path) == card["sha256"]
