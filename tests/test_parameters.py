"""Parameters: written once, read strictly; what no run can mean is one line that names its place."""

import re
from functools import partial

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from dgutils.errors import UserError
from dgutils.paths import repo_root
from dgutils.pipeline import parameters
from dgutils.pipeline.parameters import Parameters, load, parse_overrides

PROFILES = sorted((repo_root() / "notebooks" / "profiles").glob("*.yaml"))


@pytest.fixture
def profiles(monkeypatch, tmp_path):
    """A repository without profiles; profiles(name=text or bytes, ...) writes some."""
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    folder = tmp_path / "notebooks" / "profiles"
    folder.mkdir(parents=True)

    def write(**texts):
        for name, text in texts.items():
            (folder / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def refused(message, call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_profiles_say_only_what_differs(path):
    own = yaml.safe_load(path.read_text()) or {}
    under = load(base).model_dump() if (base := own.pop("base", None)) else Parameters().model_dump()
    assert not [name for name, value in own.items() if under[name] == value]
    assert load(path.stem).profile == path.stem


def test_defaults_are_the_quick_profile_and_all_are_explained():
    assert load("quick") == Parameters()
    assert all(field.description for field in Parameters.model_fields.values())


def test_profiles_that_stand_on_another_differ_only_in_what_they_say():
    paper, study, rehearsal = (load(name) for name in ("paper", "study", "rehearsal"))
    assert rehearsal.watermark == "rehearsal" and not paper.watermark
    for name in ("score_network", "feature_extractor", "feature_spaces", "published_discriminator",
                 "conditional_network", "conditional_discriminator", "head_width", "head_blocks", "head_channels",
                 "log_ratio", "dg_weight_1st_order", "boosting", "precision", "dataset"):  # fmt: skip
        assert getattr(rehearsal, name) == getattr(paper, name)
    assert (paper.num_steps, paper.discriminator_batch_size, paper.boosting) == (18, 128, "none")
    assert (study.num_steps, study.discriminator_batch_size, study.held_out_every) == (35, 64, 10)
    assert study.boosting == "released" and study.sequential
    assert paper.epochs == study.epochs == [60, 40, 40, 40, 40, 200]


@pytest.mark.parametrize("text, number", [
    ("1e-4", 1e-4), ("'1e-4'", 1e-4), ("1.5E3", 1500), ("7", 7), ("+.5", 0.5), ("0.5", 0.5), ("1.", 1), ("1e+2", 100),
    ("1e-04", 1e-4), ("10", 10), ("5  # five", 5)])
def test_a_decimal_number_is_that_number_however_it_is_written(profiles, text, number):
    profiles(a=f"rho: {text}")
    assert load("a").rho == load("a", parse_overrides([f"rho={text}"])).rho == number


@pytest.mark.parametrize("text", ["010", "00.5", "-01", "007e1"])
def test_leading_zeros_mean_ten_to_some_and_eight_to_others_so_nothing_here(profiles, text):
    profiles(a=f"rho: {text}", b="", c=f"epochs: [{text}, 1, 1, 1, 1, 1]")
    calls = [partial(load, "a"), partial(load, "c"), partial(load, "b", {"rho": text})]
    calls += [partial(load, "b", parse_overrides([f"{name}={text}"])) for name in ("rho", "num_steps")]
    for call in calls:
        refused("is '.*': input should be a valid .*, without leading zeros", call)


@pytest.mark.parametrize("text", ["1:30", "0x10", "0o17", "0b1", "1_000", ".inf", "-.inf", ".nan", "nan", "inf", "yes",
                                  "on", "true", "2001-01-01", "1e999", "1e-4x", "[7]", "", "None", "~", "'7 '"])
def test_what_only_looks_like_a_number_is_refused(profiles, text):
    profiles(a=f"rho: {text}", b="")
    refused("rho is .*: input should be ", load, "a")
    refused("--set: rho is .*: input should be ", lambda: load("b", parse_overrides([f"rho={text}"])))


@pytest.mark.parametrize("values, message", [
    ("training_seed: -1", "training_seed is -1: input should be greater than or equal to 0"),
    ("epoch_scale: -1", "epoch_scale is -1: input should be greater than 0"),
    ("num_steps: 100000000000000000000", "num_steps is 100000000000000000000: input should be less than"),
    ("num_steps: 2.0", "num_steps is 2.0: input should be a valid integer"),
    ("num_steps: true", "num_steps is True"),
    ("num_steps: '12'", "num_steps is '12'"),
    ("sequential: 1", "sequential is 1: input should be a valid boolean"),
    ("feature_spaces: []", r"feature_spaces is \[\]: list should have at least 1 item"),
    ("feature_spaces: inception", "feature_spaces is 'inception': input should be a valid list"),
    ("score_network: cifar10-edm-2m", "cifar10-edm-2m is of images with 3 channels, those of fashion_mnist"),
    ("score_network: nope", "no network 'nope'; shipped: "),
    ("score_network: fashion-mnist-adm", "'fashion-mnist-adm' is no denoiser but: Noise-conditional ADM classifier"),
    ("stronger_networks: [32x32_classifier]", "is no denoiser but: "),
    ("stronger_networks: [edm-cifar10-uncond-vp-ddo]", "stronger_networks edm-cifar10-uncond-vp-ddo is of images with"),
    ("conditional_network: 32x32_classifier", "is no denoiser but: "),
    ("feature_extractor: fashion-mnist-edm", "'fashion-mnist-edm' is no extractor but: Unconditional EDM denoiser"),
    ("feature_extractor: cifar10-adm", "feature_extractor cifar10-adm is of images with 3 channels, those of fash"),
    ("feature_extractor: ''", "no network ''; shipped"),
    ("feature_spaces: [vgg]", "no network 'vgg'; shipped"),
    ("feature_spaces: [efficientnet-lite0@33]", "unknown feature space 'efficientnet-lite0@33'"),
    ("feature_spaces: [inception, cifar10-adm]", "feature_spaces cifar10-adm is of images with 3 channels"),
    ("feature_spaces: [fashion-mnist-edm]", "'fashion-mnist-edm' is no extractor"),
    ("published_discriminator: fashion-mnist-adm", "'fashion-mnist-adm' is no discriminator but"),
    ("conditional_discriminator: edm-cifar10-32x32-cond-vp", "is no discriminator but"),
    ("epochs: [60, 40]", "table 1 needs one value a member in every column, not member_names 6, .*, epochs 2, "),
    ("learning_rates: [a, 1, 1, 1, 1, 1]", "learning_rates.0 is 'a'"),
    ("min_times: [0, 0, 0, 0, 0, 2]", "min_times.5 is 2: input should be less than or equal to 1"),
    ("member_names: [a, a, b, c, d, e]", "member_names has a twice"),
    ("sigma_min: 90", "sigma_min 90 is not below sigma_max 80"),
    ("shard_size: 99", "shard_size 99 is not a multiple of batch_size 160"),
    ("num_fake: 60001", "num_fake is 60001: fashion_mnist has 60000 training images"),
    ("reference_split: train\nnum_reference: 60001", "num_reference is 60001: fashion_mnist has 60000 training"),
    ("training_parts: 5000", "training_parts is 5000: input should be less than or equal to 4096"),
    ("ladder: [raw]", "ladder.0 is 'raw': input should be 'steps', 'raw_logits'"),
    ("ladder: [wrong_file]\nmember_names: [a]\nlearning_rates: [1]\nweight_decays: [0]\nepochs: [1]\nmin_times: [0.1]",
     "fault wrong_file needs at least 4 members"),
    ("as_run: {num_stes: 3}", "as_run.num_stes"),
    ("boosting: sometimes", "boosting is 'sometimes': input should be 'none', 'released' or 'paper'"),
    ("stps: 3", "unknown parameter stps in profile a"),
    ("num_stepz: 3", "unknown parameter num_stepz in profile a; did you mean num_steps?"),
    ("? [1, 2]\n: 3", "a.yaml is not YAML: .*unhashable key"),
    ("1: 2", "unknown parameter 1 in profile a"),
])  # fmt: skip
def test_numbers_that_no_run_can_mean_are_one_line(profiles, values, message):
    profiles(a=values)
    refused(message, load, "a")


@pytest.mark.parametrize("text, message", [
    ("num_steps: 3\nrho: 1\nnum_steps: 4", "a.yaml is not YAML: num_steps is there twice"),
    ("as_run: {num_steps: 3, num_steps: 4}", "num_steps is there twice"),
    ("num_steps: [", "a.yaml is not YAML: while parsing"),
    ("num_steps", "a.yaml must hold lines `name: value`"),
    ("- 1", "a.yaml must hold lines"),
    (b"# \xe9\nnum_steps: 3", "a.yaml is not YAML: .*position 2"),
    ("rho: !!python/object/apply:os.system [x]", "a.yaml is not YAML: could not determine a constructor"),
    ("a: &a [*a]", "unknown parameter a|is not YAML"),
    ("x: " + "[" * 4000, "a.yaml is not YAML"),
    ("base: b", "unknown profile b: there are a in "),
    ("base: 3", "unknown profile 3: there are a in "),
    ("base: a", r"a.yaml: profiles are based on each other in a circle: a on a"),
    ("profile: b", "a.yaml: profile is 'b', but the file is named a"),
])  # fmt: skip
def test_profiles_that_cannot_be_read_are_one_line_with_the_file(profiles, text, message):
    profiles(a=text)
    refused(message, load, "a")


def test_circles_of_profiles_are_named(profiles):
    profiles(a="base: b", b="base: c", c="base: a")
    refused("a on b on c on a", load, "a")


def test_an_empty_profile_is_the_defaults_but_for_its_name(profiles):
    profiles(a="", b="# nothing\n", c="base: a\nrho: 5")
    assert load("a") == Parameters(profile="a") and load("b") == Parameters(profile="b")
    assert load("c") == Parameters(profile="c", rho=5.0)


@pytest.mark.parametrize("texts, message", [
    (["a"], "--set a: write name=value"), (["=1"], "write name=value"), (["a b=1"], "write name=value"),
    (["rho=1", "rho=2"], "--set rho=2: rho is set twice"), (["rho=[1"], "--set rho=.1: is not YAML"),
])  # fmt: skip
def test_overrides_that_say_nothing_are_one_line(texts, message):
    refused(message, parse_overrides, texts)


def test_overrides_are_read_as_a_profile_is():
    assert parse_overrides(["a=1e-4", "b=[1, 2]", "c=true", "d=None", "e=median_logit", "f=b=c", "g="]) == {
        "a": 1e-4, "b": [1, 2], "c": True, "d": None, "e": "median_logit", "f": "b=c", "g": None}
    refused("profile is set to 'paper': choose it with --profile only", load, "quick", {"profile": "paper"})
    assert load("quick", {"profile": "quick", "num_steps": 9}).num_steps == 9


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=1e-8, max_value=1e8))
@example(1e-8)
def test_every_float_survives_being_written_down(value):
    for text in (repr(value), f"{value:.17e}"):
        assert parse_overrides([f"rho={text}"])["rho"] == value
    assert parameters.load("quick", {"rho": repr(value)}).rho == value
