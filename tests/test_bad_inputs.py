"""Bad input is refused in one line that says what is wrong and what would be right; a command's exit status is 2."""

import dataclasses
import math
import re
from functools import partial

import numpy as np
import pytest
import test_jobs as tiny
import torch
from ledgers import blank_ledger

from dgutils import datasets, guidance, metrics, noise
from dgutils.cli import main as __main__
from dgutils.discriminator import Ensemble, MemberConfig
from dgutils.errors import UserError
from dgutils.networks import checkpoints, pretrain, weights
from dgutils.networks.adm import EncoderUNet, init_head
from dgutils.networks.edm import Denoiser
from dgutils.networks.features import image_features
from dgutils.pipeline import jobs
from dgutils.pipeline.store import Store
from dgutils.results.records import Results
from dgutils.sampler import autocast, edm_sampler, network_denoiser
from dgutils.training import Split, TrainingSettings, train_discriminators

NAN, INF = math.nan, math.inf
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(20, 4))
IMAGES = RNG.integers(0, 256, (16, 32, 32, 1), np.uint8)
LABELS = np.tile([0, 1], 8)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store; every network's name means a tiny one with random weights."""
    tiny.use_tiny_networks(monkeypatch)
    return Store(tmp_path, lambda line: None)


def network(cls=Denoiser, **changes):
    config = {Denoiser: tiny.SCORE, EncoderUNet: tiny.EXTRACTOR}[cls]
    return tiny.random_network(cls, config | changes, 0)


def sample(denoise, sigmas=None):
    return edm_sampler(denoise, noise.PerSampleNoise([5, 7], (1, 32, 32)), noise.karras_sigmas(3) if sigmas is None else sigmas)


def guided(**changes):
    return guidance.GuidedDenoiser(lambda x, sigma, step, order: x, None, **changes)


def train(images=IMAGES, labels=LABELS, members=tiny.MEMBERS, batch_size=8, precision="float32", extractor=None, head=None):
    return train_discriminators(extractor or network(EncoderUNet), partial(init_head, head or tiny.HEAD, 0),
                                Split(images, labels), Split(images, labels),
                                TrainingSettings(members, batch_size, precision=precision))


def member(**changes):
    return [dataclasses.replace(MemberConfig("m", 1e-3, 0.0, 1), **changes)]


def images(store, **changes):
    return jobs.ImageSet(store, tiny.sampling(**changes), 8).ensure()


def record(**changes):
    about = dict(key="a", value=1.0, label="a", section="c") | changes
    blank_ledger("smoke", "01_a").value(about.pop("key"), about.pop("value"), **about)


def nan_at(features, row):
    return np.where(np.arange(len(features))[:, None] == row, NAN, features)


CASES = {
    # noise levels and draws
    "one step": (lambda s: noise.karras_sigmas(1), "num_steps=1.*needs num_steps >= 2"),
    "sigma_min above sigma_max": (lambda s: noise.karras_sigmas(18, 80.0, 0.002), "needs .*sigma_min < sigma_max"),
    "sigma_min 0": (lambda s: noise.karras_sigmas(18, 0.0), "needs .*0 < sigma_min"),
    "negative rho": (lambda s: noise.karras_sigmas(18, rho=-7), "needs .*rho > 0"),
    "rho NaN": (lambda s: noise.karras_sigmas(18, rho=NAN), "needs .*rho > 0"),
    "sigma_max infinite": (lambda s: noise.karras_sigmas(18, sigma_max=INF), "needs .*sigma_max"),
    "no VP steps": (lambda s: noise.vp_sigmas(0), "num_steps=0: needs at least 1"),
    "no seeds": (lambda s: noise.PerSampleNoise([], (1, 8, 8)), "at least one seed"),
    "negative seed": (lambda s: noise.PerSampleNoise([-1], (1, 8, 8)), "each >= 0"),
    # networks
    "odd image size of a denoiser": (lambda s: network(img_resolution=30), "image size 30 is not divisible by patch_size 4"),
    "odd image size after patching": (lambda s: network(img_resolution=36), "resolution 9 is not divisible by 2"),
    "denoiser, other channels": (lambda s: network()(torch.zeros(2, 3, 32, 32), 1.0), r"expected images \[N, .*got \(2, 3, 32, 32\)"),
    "denoiser, one image without batch": (lambda s: network()(torch.zeros(1, 32, 32), 1.0), "expected images"),
    "odd image size of an encoder": (lambda s: network(EncoderUNet, image_size=30), "image_size 30 is not a multiple of 8"),
    "head channels that do not divide": (lambda s: network(EncoderUNet, num_head_channels=5), "multiples of num_head_channels 5"),
    "encoder too narrow for the published groups": (lambda s: network(EncoderUNet, num_group_channels=None), r"widths \[16, 16\] do not divide into 32 groups each: num_group_channels must"),
    "groups that do not divide": (lambda s: network(EncoderUNet, num_group_channels=3), "do not divide into groups of 3 channels"),
    "groups of no channels": (lambda s: network(EncoderUNet, num_group_channels=0), "do not divide into groups of 0 channels"),
    "groups of a head": (lambda s: checkpoints.head_config("fashion-mnist-adm", 18, 1, 18), r"widths \[18\] do not divide into groups of 4"),
    "encoder without blocks to widen": (lambda s: network(EncoderUNet, num_res_blocks=0, channel_mult=(1, 2)), "num_res_blocks 0: at least 1"),
    "fewer blocks of a head than none": (lambda s: checkpoints.head_config("fashion-mnist-adm", 16, -1, 16), "num_res_blocks -1: at least 0"),
    "head without width": (lambda s: checkpoints.head_config("fashion-mnist-adm", 0, 1, 16), "model_channels 0, .*: the first is even"),
    "encoder, other size": (lambda s: network(EncoderUNet).features(torch.zeros(2, 1, 28, 28), 0.5), r"takes inputs \[N, 1, 32, 32\], got"),
    "labels for an unconditional encoder": (lambda s: network(EncoderUNet)(torch.zeros(2, 1, 32, 32), 0.5, torch.zeros(2, dtype=torch.int64)),
                                            "class labels are needed by class-conditional"),
    "no labels for a conditional encoder": (lambda s: network(EncoderUNet, num_classes=10)(torch.zeros(2, 1, 32, 32), 0.5),
                                            "class labels are needed by class-conditional"),
    # sampling
    "NaN of a denoiser": (lambda s: sample(lambda x, *_: x * NAN), r"not finite at step 0 \(sigma 80\) for seeds \[5, 7\]"),
    "unknown precision": (lambda s: autocast("cpu", "float16"), "unknown precision 'float16': choose float32 or bfloat16"),
    "unknown precision of a denoiser": (lambda s: network_denoiser(network(), "float16"), "unknown precision 'float16'"),
    "unknown precision of a sampling": (lambda s: images(s, precision="float16"), "unknown precision 'float16'"),
    "unknown sampler": (lambda s: tiny.sampling(sampler="euler"), "unknown sampler 'euler': choose heun or ancestral"),
    "shard that is no multiple": (lambda s: tiny.sampling(batch_size=3), "shard_size 8 is not a multiple of batch_size 3"),
    "batch of 0": (lambda s: tiny.sampling(batch_size=0), "batch_size 0"),
    "negative batch": (lambda s: tiny.sampling(batch_size=-8), "batch_size -8"),
    "shard of 0": (lambda s: images(s, shard_size=0), "shard.size 0"),
    "no images": (lambda s: jobs.ImageSet(s, tiny.sampling(), 0).ensure(), "0 rows asked for; ask for at least 1"),
    "negative first seed": (lambda s: jobs.ImageSet(s, tiny.sampling(), 8, -1).ensure(), "first seed -1"),
    "classes of an unconditional network": (lambda s: images(s, conditional=True), "knows no classes"),
    "classifier-free without classes": (lambda s: tiny.sampling(cfg_network="tiny"), "set conditional"),
    "weight of classifier-free guidance NaN": (lambda s: images(s, cfg_weight=NAN), "cfg_weight is nan"),
    "... infinite": (lambda s: images(s, cfg_weight=INF), "cfg_weight is inf, .*null for"),
    # guidance
    "unknown rule": (lambda s: Ensemble(network(EncoderUNet), [network(EncoderUNet)], "mode"), "unknown combination rule 'mode'"),
    "no heads": (lambda s: Ensemble(network(EncoderUNet), [], "mean_logit"), "at least one discriminator"),
    "unknown clock": (lambda s: Ensemble(network(EncoderUNet), [network(EncoderUNet)], "mean_logit", "sine"), "unknown clock 'sine'"),
    "head of other features": (lambda s: Ensemble(network(EncoderUNet), [tiny.random_network(EncoderUNet, tiny.HEAD | {"in_channels": 8}, 0)], "mean_logit")
                               .log_density_ratio(torch.zeros(2, 1, 32, 32), 0.5), r"takes inputs \[N, 8, 4, 4\], got"),
    "window upside down": (lambda s: guided(time_min=0.5, time_max=0.1), r"window \[0.5, 0.1\]: needs 0 <= time_min <= time_max <= 1"),
    "window beyond 1": (lambda s: guided(time_max=1.5), "needs .*time_max <= 1"),
    "window NaN": (lambda s: guided(time_min=NAN), "needs 0 <= time_min"),
    "negative weight": (lambda s: guided(weight_1st_order=-1.0), "must be finite, not negative"),
    "weight NaN": (lambda s: guided(weight_2nd_order=NAN), "weights 2.0, nan"),
    "unknown boosting": (lambda s: guidance.check_settings(2.0, 0.0, 0.01, 1.0, "yes"), "unknown boosting 'yes'; choose one of none, released, paper"),
    "unknown log ratio": (lambda s: guided(log_ratio="log"), "unknown log_ratio 'log'; choose one of logit, clipped"),
    # training of discriminators
    "no images to train on": (lambda s: train(IMAGES[:0], LABELS[:0]), "0 images|no images"),
    "mismatched labels": (lambda s: train(labels=LABELS[:-2]), "16 images, 14 labels"),
    "more real than generated": (lambda s: train(labels=np.ones(16)), "16 real: give as many real as generated"),
    "batch larger than the data": (lambda s: train(batch_size=17), "batch_size 17: use at most the 16 training images"),
    "batch of no images": (lambda s: train(batch_size=0), "batch_size 0"),
    "floating-point images": (lambda s: train(IMAGES / 255.0), "uint8"),
    "images with channels first": (lambda s: train(IMAGES.transpose(0, 3, 1, 2)), r"inputs \[N, 1, 32, 32\], got|uint8 \[N, H, W, C\]"),
    "no members": (lambda s: train(members=[]), "member"),
    "no epochs": (lambda s: train(members=member(epochs=0)), "discriminator m: epochs must be >= 1"),
    "minimum time 0": (lambda s: train(members=member(min_time=0.0)), "0 < min_time < 1"),
    "negative learning rate": (lambda s: train(members=member(learning_rate=-1.0)), "discriminator m: .*learning_rate"),
    "learning rate NaN": (lambda s: train(members=member(learning_rate=NAN)), "discriminator m: .*learning_rate"),
    "negative weight decay": (lambda s: train(members=member(weight_decay=-1.0)), "discriminator m: .*weight_decay"),
    "fewer images than asked for": (lambda s: jobs.Trained(s, tiny.training(num_real=16), images(s)).ensure(), "16 real and 8 generated images: give as many"),
    "nothing held out": (lambda s: datasets.split_indices(np.zeros(9), 0, 2), "held_out_every 2"),
    "unknown state": (lambda s: jobs.Trained(s, tiny.training(num_real=16), jobs.ImageSet(s, tiny.sampling(), 16).ensure()).ensure().ensemble([0], state="first"),
                      "states are last, best, initial"),
    # data and weights
    "unknown dataset": (lambda s: datasets.load_dataset("mnist", "train"), "no dataset 'mnist' with split 'train'; there are:"),
    "unknown split": (lambda s: datasets.load_dataset("fashion_mnist", "val"), "no dataset 'fashion_mnist' with split 'val'"),
    "digest of an unknown dataset": (lambda s: datasets.dataset_digest("mnist", "train"), "no dataset 'mnist'"),
    "more images than there are": (lambda s: jobs.RealSet("fashion_mnist", "test", 10_001).images, "has 10000 test images, not 10001"),
    "no real images": (lambda s: jobs.RealSet("fashion_mnist", "test", 0).images, "at least 1"),
    "unknown recipe": (lambda s: pretrain.load_recipe("imagenet-edm"), "no recipe 'imagenet-edm' .*there are: cifar10-adm"),
    "unknown published file": (lambda s: weights.published("edm"), "no published file 'edm'; there are:"),
    # scores
    "features of one row": (lambda s: metrics.frechet_distance(FEATURES[:1], FEATURES), "at least 2 images, got 1"),
    "features that are no matrix": (lambda s: metrics.frechet_distance(FEATURES[0], FEATURES), r"matrix \[N,d\], got shape \(4,\)"),
    "features of no columns": (lambda s: metrics.FeatureStats.of(FEATURES[:, :0]), "matrix"),
    "features of two spaces": (lambda s: metrics.frechet_distance(FEATURES, FEATURES[:, :3]), "feature dimensions differ"),
    "NaN in features": (lambda s: metrics.FeatureStats.of(nan_at(FEATURES, 3)), r"1 feature rows are not finite \(rows 3\)"),
    "fewer images than neighbours": (lambda s: metrics.PairReference(FEATURES[:5]), "at least 6 feature rows, got 5"),
    "no neighbours": (lambda s: metrics.PairReference(FEATURES, 0), "k_pr 0"),
    "fewer generated than neighbours": (lambda s: metrics.PairReference(FEATURES).compare(FEATURES[:3]), "at least 4 feature rows, got 3"),
    "no resamples": (lambda s: metrics.bootstrap(np.mean, FEATURES, 0, 0), "n_resamples 0: give a whole number, at least 1"),
    "level of 95": (lambda s: metrics.bootstrap(np.mean, FEATURES, 9, 0, level=95), "level 95: a confidence level lies between"),
    "logits without labels": (lambda s: metrics.binary_scores([0.1, 0.2], [1]), r"shapes \(2,\) and \(1,\)"),
    "labels that are no classes": (lambda s: metrics.calibration_error([0.1], [2]), "labels 0 .fake. or 1 .real."),
    "images to score in [0, 1]": (lambda s: image_features(IMAGES / 255, "inception"), "uint8"),
    "images to score with two channels": (lambda s: image_features(np.zeros((2, 32, 32, 2), np.uint8)), "1 or 3 channels"),
    "unknown feature space": (lambda s: image_features(IMAGES, "efficientnet-b0"), "unknown feature space 'efficientnet-b0': use 'inception'"),
    "scores of other seeds": (lambda s: tiny_scores(s, 0).minus(tiny_scores(s, 8)), "other seeds or spaces"),
    # records and artifacts
    "config with NaN": (lambda s: s.artifact("train", 1, {"rate": NAN}), "train.config.rate is nan"),
    "result that is NaN": (lambda s: record(value=NAN), "result a is nan"),
    "result key": (lambda s: record(key="A b"), "result key 'A b'"),
    "interval upside down": (lambda s: record(value=metrics.Interval(1.0, 2.0, 1.0, 0.95, 0)), "is not .low, high."),
    "row of another length": (lambda s: blank_ledger("smoke", "01_a").show("t", ["a", "b"], [("x",)]), "every row needs 2 cells"),
    "result that nobody recorded": (lambda s: Results("smoke", {}, {})["fd"], "no result 'fd' in profile smoke"),
}  # fmt: skip


def tiny_scores(store, first_seed):
    arm = jobs.ImageSet(store, tiny.sampling(), 8, first_seed, label="arm").ensure()
    return jobs.Score(store, arm, jobs.RealSet("fashion_mnist", "test", 16), "tiny", 2).ensure()


@pytest.mark.parametrize(("call", "message"), CASES.values(), ids=CASES)
def test_bad_input_is_one_line(store, call, message):
    with pytest.raises(UserError, match=message) as caught:
        call(store)
    assert "\n" not in str(caught.value)


# --- files of weights


@pytest.mark.parametrize("content", [b"", b"PK\3\4 not a zip", b"\x80\4K\1.", b"<html>404</html>", bytes(1000)])
def test_file_that_is_no_safetensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file .*restore or delete it"):
        checkpoints.read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("load", "message"), [
    (lambda: checkpoints.load_denoiser("fashion-mnist-adm"), "'fashion-mnist-adm' is no denoiser but: Noise-conditional ADM"),
    (lambda: checkpoints.load_feature_extractor("fashion-mnist-edm"), "'fashion-mnist-edm' is no extractor but: Unconditional EDM"),
    (lambda: checkpoints.load_denoiser("fashion-mnist"), "no network 'fashion-mnist'; shipped: .*fashion-mnist-edm.*; published: "),
    (lambda: checkpoints.weights_digest("fashion-mnist"), "no network 'fashion-mnist'; shipped: .*fashion-mnist-edm.*; published: "),
])  # fmt: skip
def test_networks_of_another_architecture_or_name(load, message):
    with pytest.raises(UserError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


# --- the command line

COMMANDS = {
    "no command": ([], "Missing command"),
    "unknown command": (["reproduse"], "No such command 'reproduse'. Did you mean 'reproduce'"),
    "unknown option": (["reproduce", "--fast"], "No such option '--fast'"),
    "unknown profile": (["reproduce", "--profile", "quik"], "unknown profile quik: there are"),
    "profile that is a path": (["reproduce", "--profile", "../profiles/quick"], "profile '../profiles/quick': a name is one word"),
    "unknown notebook": (["reproduce", "--only", "09"], "no notebook begins with 09"),
    "unknown parameter": (["reproduce", "--set", "num_stepz=3"], "did you mean num_steps"),
    "parameter without value": (["reproduce", "--set", "num_steps"], "--set num_steps: write name=value"),
    "parameter without name": (["reproduce", "--set", "=3"], "write name=value"),
    "value that is no YAML": (["reproduce", "--set", "num_steps=[1,"], "--set num_steps=.*"),
    "text for a number": (["reproduce", "--set", "num_steps=many"], "--set: num_steps is 'many': input should be a valid integer"),
    "number for a list": (["reproduce", "--set", "epochs=60"], "--set: epochs is 60: input should be a valid list"),
    "fraction for an integer": (["reproduce", "--set", "num_steps=2.5"], "num_steps is 2.5: input should be a valid integer"),
    "parameter that is NaN": (["reproduce", "--set", "sigma_max=nan"], "sigma_max is 'nan': input should be"),
    "profile among the parameters": (["reproduce", "--set", "profile=paper"], "choose it with --profile only"),
    "time-out in words": (["reproduce", "--cell-timeout", "long"], "'long' is not a valid integer"),
    "negative time-out": (["reproduce", "--cell-timeout", "-1"], "--cell-timeout -1: give seconds"),
    "recipe that there is not": (["train-score", "imagenet"], "no recipe 'imagenet' .*there are"),
    "nothing to join": (["train-score", "fashion-mnist-edm", "--join", "{tmp}"], "fashion-mnist-edm.json is absent: it belongs to"),
    "folder that is a file": (["train-extractor", "fashion-mnist-adm", "--out", "{tmp}/file"], "{tmp}/file"),
    "minutes in words": (["train-score", "fashion-mnist-edm", "--minutes", "all"], "'all' is not a valid float"),
    "profile that is a folder of somebody": (["keep", "--profile", "/"], "profile '/': a name is one word"),
    "profile with results below": (["plan", "--profile", "../results/cifar10"], "a name is one word of a-z, 0-9"),
    "profile of two words": (["plan", "--profile", "my profile"], "a name is one word"),
    "empty profile": (["keep", "--profile", ""], "a name is one word"),
    "minutes that are no number": (["work", "--minutes", "nan"], "give minutes, more than 0"),
    "no minutes": (["train-score", "fashion-mnist-edm", "--minutes", "0"], "give minutes, more than 0"),
    "no ranks": (["work", "--nproc", "0"], "start at least 1 rank"),
    "no file to inspect": (["inspect"], "Missing argument 'FILE...'"),
    "file that is not there": (["inspect", "{tmp}/x.pkl"], "no file {tmp}/x.pkl"),
    "one argument too many": (["plan", "quick"], "unexpected extra argument"),
    "doctor of an unknown profile": (["doctor", "--profile", "quik"], "unknown profile quik"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), COMMANDS.values(), ids=COMMANDS)
def test_bad_command_is_one_line_and_exit_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    for name in ("notebooks", "pyproject.toml", "requirements.txt"):
        (tmp_path / name).symlink_to(pretrain.ASSETS.parent.parent / name)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    status = __main__.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.startswith("dgutils: "), error
    assert re.search(message.replace("{tmp}", str(tmp_path)), error), error
    assert not (tmp_path / "runs").exists()  # nothing has run
