"""What an accelerator does for this project, measured in minutes: python tests/gpu_check.py --minutes 2.5 --out DIR

Most wanted first; after each measurement DIR/check.json is written anew, so that whatever cuts this off leaves what was
measured. `--tiny` runs the same code at sizes for a test on a CPU. Images are noise: no data set is needed, and the
published architecture has random weights that act.
"""

import argparse
import copy
import functools
import gc
import json
import math
import os
import platform
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

START = time.monotonic()  # before torch is imported, which takes seconds


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.5, help="the clock, from the start of this process")
    parser.add_argument("--out", type=Path, required=True, help="folder of check.json")
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the accelerator if there is one, unless given")
    parser.add_argument("--only", nargs="+", default=(), help="names of measurements")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = _arguments()
    os.environ.setdefault("TQDM_DISABLE", "1")  # of what is printed the end counts
    if ARGUMENTS.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all of dgutils asks torch which device there is

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import bench  # noqa: E402
import numpy as np  # noqa: E402
import test_parity_networks as networks  # noqa: E402
import test_parity_sampling as sampling  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import dgutils.training  # noqa: E402
from dgutils import datasets  # noqa: E402
from dgutils.discriminator import Ensemble, MemberConfig  # noqa: E402
from dgutils.guidance import BOOSTING, GuidedDenoiser, grad_log_density_ratio  # noqa: E402
from dgutils.networks import checkpoints  # noqa: E402
from dgutils.networks.adm import EncoderUNet, init_head  # noqa: E402
from dgutils.networks.edm import Denoiser, GroupNorm  # noqa: E402
from dgutils.noise import PerSampleNoise, karras_sigmas  # noqa: E402
from dgutils.pipeline import jobs  # noqa: E402
from dgutils.sampler import edm_sampler, network_denoiser  # noqa: E402
from dgutils.training import Split, TrainingSettings, train_discriminators  # noqa: E402

parity = networks.parity
PUBLISHED, SHIPPED = "CIFAR-10, published", "CIFAR-10, small"
REAL = dict(names=(PUBLISHED, SHIPPED), side=8192, copy=2**28, batch=256, steps=3, whole=18, compared=32, runs=3,
            batches=(64, 256, 1024, 1536, 2048, 3072), train=1280, graphed=16)  # fmt: skip
TINY = dict(names=("Fashion-MNIST, small",) * 2, side=64, copy=2**12, batch=2, steps=3, whole=3, compared=2, runs=1,
            batches=(1, 2), train=16, graphed=1)  # fmt: skip
ENOUGH = 300e12  # operations/s in bfloat16 of a card for which the expected seconds below are meant


class TimeIsUp(BaseException):
    """The clock ran out, or somebody ended the process: past every `except Exception` of torch's compiler."""


def _stop(number, frame):
    raise TimeIsUp(signal.Signals(number).name)


# ---- what measurements share -------------------------------------------------------------


@contextmanager
def products(kind: str):
    """Float32 products as "float32", as "TF32", or as "default": torch's own, TF32 in convolutions only."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if kind != "default":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "TF32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _within(kind: str, call):
    """The call, its float32 products as `kind` says."""

    def inside(*arguments):
        with products(kind):
            return call(*arguments)

    return inside


class TorchNorm(GroupNorm):
    """Group normalisation by torch's own kernels, which autocast runs in float32 on CUDA, and SiLU after it."""

    def forward(self, x, silu=False, adapt=None):
        y = torch.nn.GroupNorm.forward(self, x)
        if adapt:
            scale, shift = (part[:, :, None, None] for part in adapt)
            y = torch.addcmul(shift, y, 1 + scale)
        return F.silu(y) if silu else y


def _torch_norms(network):
    """A copy of a network with `TorchNorm` for each group normalisation."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.__class__ = TorchNorm
    return network


class Kept(PerSampleNoise):
    """Noise drawn once and kept: what sampling would cost if noise cost nothing."""

    draw = functools.cache(PerSampleNoise.draw)


class Networks:
    """A score network, an extractor and six heads of a size of `bench.SIZES`, all of whose layers act."""

    def __init__(self, name: str):
        score_name, extractor_name, *head, _, _ = bench.SIZES[name]
        self.name, self.extractor_name, self.head = name, extractor_name, head
        self.weights = {part: "trained" if (checkpoints.ASSETS / f"{part}.safetensors").exists() else "random"
                        for part in (score_name, extractor_name)}  # fmt: skip
        self.score, self.extractor, self.heads = bench.networks(name)

    def guided(self, precision: str, count: int = 1, torch_norms: bool = False):
        """A guided denoiser by `count` heads."""
        parts = [self.score, self.extractor, *self.heads[:count]]
        score, extractor, *heads = [_torch_norms(part) for part in parts] if torch_norms else parts
        return bench._guided(score, extractor, heads, precision)

    @functools.cached_property
    def plain(self):
        """The networks as the published code runs them, with one head."""
        return [bench._plain(part) for part in (self.score, self.extractor, self.heads[0])]

    def noise(self, count: int):
        return Kept(range(count), self.score.shape, jobs.device())

    def published(self, noise, sigmas):
        """Images of the published loop."""
        score, extractor, head = self.plain
        return bench.plain_sampler(score, extractor, [head], noise, sigmas.to(noise.device))


@functools.cache
def _networks(name: str) -> Networks:
    return Networks(name)


def _relative(ours, theirs) -> float:
    """The largest error over the largest value."""
    theirs = torch.as_tensor(theirs).double()
    return ((ours.double().cpu() - theirs).abs().max() / theirs.abs().max()).item()


def _kinds(compute) -> dict:
    """compute(dtype)'s relative errors in float64, float32 and TF32, in this order: weights are rounded once."""
    return {kind: _within(kind if kind == "TF32" else "float32", compute)(
        torch.float64 if kind == "float64" else torch.float32) for kind in ("float64", "float32", "TF32")}  # fmt: skip


def _peak() -> float | None:
    """GiB of device memory at most since the last call."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rates(took: dict[str, float], count: int) -> dict[str, dict]:
    return {"seconds": took, "images_per_s": {name: count / value for name, value in took.items()}}


# ---- measurements: (sizes, results so far) -> what was found ------------------------------


def facts(size, found) -> dict:
    """The card, its rate of matrix products and its memory bandwidth."""
    device = jobs.device()
    on_gpu = device.type == "cuda"
    card = torch.cuda.get_device_properties(0) if on_gpu else None
    side, rates = size["side"], {}
    for kind, dtype in (("bfloat16", torch.bfloat16), ("TF32", torch.float32), ("float32", torch.float32)):
        a = torch.randn(side, side, device=device, dtype=dtype)
        took = bench.seconds({kind: _within(kind, lambda a=a: a @ a)}, size["runs"], kind)
        rates[kind] = 2 * side**3 / took[kind]
    x = torch.empty(size["copy"], device=device)
    y = torch.empty_like(x)
    took = bench.seconds({"copy": lambda: y.copy_(x)}, size["runs"], "copy")["copy"]
    return {"card": card.name if card else platform.processor() or platform.machine(), "torch": torch.__version__,
            "python": platform.python_version(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
            "memory_gib": card.total_memory / 2**30 if card else None, "threads": torch.get_num_threads(),
            "products_per_s": rates, "bytes_per_s": 2 * x.numel() * 4 / took,
            "tf32_by_default": {"products": torch.backends.cuda.matmul.allow_tf32,
                                "convolutions": torch.backends.cudnn.allow_tf32}}  # fmt: skip


def parity_networks(size, found) -> dict:
    """Relative errors against the reference's own values, of the parity tests' denoisers and encoders."""
    device, errors = jobs.device(), {}
    tiny = size is TINY
    for name in list(parity.EDM)[:1] if tiny else parity.EDM:
        network = Denoiser(**parity.EDM[name]).eval().requires_grad_(False)
        parity.fill(network)
        side = network.shape[1]
        x = parity.draw(f"{name}.x", (len(parity.SIGMAS), 3, side, side))
        sigma = torch.tensor(parity.SIGMAS, dtype=torch.float64)
        labels = torch.eye(10, dtype=torch.float64)[[1, 4, 9]] if network.label_dim else None

        def denoiser(dtype, name=name, network=network, x=x, sigma=sigma, labels=labels):
            there = [None if value is None else value.to(device, dtype) for value in (x, sigma, labels)]
            return _relative(network.to(device, dtype)(*there), networks.REFERENCE[f"edm.{name}"])

        errors[f"denoiser {name}"] = _kinds(denoiser)
    for name in ("head",) if tiny else parity.ADM:
        network = EncoderUNet(model_channels=128, **parity.ADM[name]).eval().requires_grad_(False)
        parity.fill(network)
        config, times = network.config, torch.tensor(parity.TIMES, dtype=torch.float64)
        x = parity.draw(f"{name}.x", (2, config["in_channels"], config["image_size"], config["image_size"]))
        labels = torch.tensor(parity.LABELS).to(device) if config["num_classes"] else None

        def encoder(dtype, name=name, network=network, x=x, times=times, labels=labels):
            answer = network.to(device, dtype)(x.to(device, dtype), times.to(device, dtype), labels)
            return _relative(answer, networks.REFERENCE[f"adm.{name}"])

        errors[f"encoder {name}"] = _kinds(encoder)
    return {"relative_errors": errors}


def parity_sampling(size, found) -> dict:
    """Relative errors of guided trajectories and guidance terms against the reference's own values."""
    device, errors = jobs.device(), {}
    for name, case in parity.TRAJECTORIES.items():
        if case["steps"] != 18 or (size is TINY and not name.startswith("first")):
            continue
        network = Denoiser(**parity.EDM[case["network"]]).eval().requires_grad_(False)
        parity.fill(network)
        labels = torch.tensor(parity.CLASSES).to(device) if network.label_dim else None
        options = {key.lower(): value for key, value in case["options"].items()}
        schedule = {key: options.pop(key) for key in ("sigma_min", "sigma_max", "rho") if key in options}

        def trajectory(dtype, name=name, case=case, network=network, labels=labels, options=options,
                       schedule=schedule):  # fmt: skip
            network.to(device, dtype)
            one_hot = None if labels is None else torch.eye(network.label_dim, dtype=dtype, device=device)[labels]
            denoise = GuidedDenoiser(network_denoiser(network, "float32", one_hot),
                                     sampling.Discriminator(case["gain"]), case["first"], case["second"],
                                     class_labels=labels, log_ratio="clipped")  # fmt: skip
            denoise = BOOSTING[case["boosting"]](denoise)
            noise = PerSampleNoise(parity.SEEDS, (3, 16, 16), device)
            images = edm_sampler(denoise, noise, karras_sigmas(18, **schedule), churn=denoise.churn, **options)
            return _relative(images, sampling.REFERENCE[name])

        errors[name] = _kinds(trajectory)
    sigma = torch.tensor(parity.LEVELS, dtype=torch.float64)
    x = parity.draw("guidance", (len(sigma), 3, 16, 16)) * sigma[:, None, None, None]
    for clock, suffix in (("linear", ""), ("cosine", "_cosine")):
        stage = sampling.Stage()
        guided = GuidedDenoiser(None, Ensemble(stage, [stage], "mean_logit", clock), 1.0, log_ratio="clipped")
        term = -guided.guidance(x.to(device), sigma.to(device), 0, 1)
        errors[f"guidance term, {clock} clock"] = {
            "float64": _relative(term, sampling.REFERENCE[f"guidance{suffix}"])}  # fmt: skip
    return {"relative_errors": errors}


def parity_guided(size, found) -> dict:
    """A guided step and a guided trajectory, extractor and two heads included: against the CPU in float64."""
    score_name, extractor_name, *head, _, _ = bench.SIZES["Fashion-MNIST, small"]
    score = Denoiser(**checkpoints.network_config(score_name))
    parts = [score, EncoderUNet(**checkpoints.network_config(extractor_name)),
             *(EncoderUNet(**checkpoints.head_config(extractor_name, *head)) for _ in range(2))]  # fmt: skip
    for part in parts:
        parity.fill(part.eval().requires_grad_(False))
    score.float32_levels = (math.inf, 0.0)

    def guided(heads):
        return GuidedDenoiser(network_denoiser(score), Ensemble(parts[1], heads, "mean_probability"), 2.0)

    for one in parts[2:]:
        bench._calibrate(guided([one]), score.shape)

    def images(device, dtype):
        for part in parts:
            part.to(device, dtype)
        denoise, noise = guided(parts[2:]), PerSampleNoise(range(4), score.shape, device)
        level = torch.tensor([0.1, 0.5, 2.0, 20.0], dtype=torch.float64, device=device)
        step = denoise(noise.draw(0) * level[:, None, None, None], level, 0, 1)
        return step.cpu(), edm_sampler(denoise, noise, karras_sigmas(size["whole"])).cpu()

    exact = images("cpu", torch.float64)
    found = _kinds(lambda dtype: [_relative(ours, theirs)
                                  for ours, theirs in zip(images(jobs.device(), dtype), exact, strict=True)])
    return {"relative_errors": {what: {kind: errors[i] for kind, errors in found.items()} for i, what in
                                enumerate(("guided step", f"guided trajectory, {size['whole']} steps"))}}  # fmt: skip


def speed(size, found) -> dict:
    """Guided sampling by one discriminator against the published loop, and by six against one; they take turns."""
    ours, sigmas = _networks(size["names"][0]), karras_sigmas(size["steps"])
    noise = ours.noise(size["batch"])
    noise.draw(0)
    def sample(kind, precision, count=1, torch_norms=False):
        denoise = ours.guided(precision, count, torch_norms)
        return _within(kind, lambda: edm_sampler(denoise, noise, sigmas))

    calls = {"published": _within("default", lambda: ours.published(noise, sigmas)),
             "default": sample("default", "float32"), "TF32": sample("TF32", "float32"),
             "bfloat16": sample("TF32", "bfloat16"),
             "bfloat16, torch's norms": sample("TF32", "bfloat16", torch_norms=True),
             "bfloat16, six": sample("TF32", "bfloat16", 6)}  # fmt: skip
    strict = {"published, float32": _within("float32", lambda: ours.published(noise, sigmas)),
              "float32": sample("float32", "float32")}  # fmt: skip
    took = bench.seconds(calls, size["runs"], "speed") | bench.seconds(strict, 1, "speed, float32")  # those are slow
    return {"networks": ours.name, "weights": ours.weights, "batch": size["batch"], "steps": size["steps"],
            **_rates(took, size["batch"]), "peak_gib": _peak(),
            "times_as_fast": {base: {name: took[base] / value for name, value in took.items()}
                              for base in ("published", "published, float32")},
            "six_against_one": took["bfloat16, six"] / took["bfloat16"]}  # fmt: skip


def _agree(images, exact) -> dict:
    """Pixels within one grey level, the largest difference in grey levels, and the relative error."""
    grey = np.abs(datasets.to_uint8(images).astype(int) - datasets.to_uint8(exact).astype(int))
    return {"within_one_grey": float((grey <= 1).mean()), "largest": int(grey.max()),
            "relative_error": _relative(images, exact.cpu())}  # fmt: skip


@functools.cache
def _exact(name: str, count: int, steps: int):
    """Images in float32 proper, which others are compared to."""
    ours = _networks(name)
    return _within("float32", edm_sampler)(ours.guided("float32"), ours.noise(count), karras_sigmas(steps))


def _agreement(name: str, size) -> dict:
    ours, count, sigmas = _networks(name), size["compared"], karras_sigmas(size["whole"])
    exact, noise, rows = _exact(name, count, size["whole"]), ours.noise(count), {}
    rows["published"] = _agree(_within("default", ours.published)(noise, sigmas), exact)
    rows["published, float32"] = _agree(_within("float32", ours.published)(noise, sigmas), exact)
    for row, kind, precision, torch_norms in (
        ("default", "default", "float32", False), ("TF32", "TF32", "float32", False),
        ("bfloat16", "TF32", "bfloat16", False), ("bfloat16, torch's norms", "TF32", "bfloat16", True),
    ):  # fmt: skip
        rows[row] = _agree(_within(kind, edm_sampler)(ours.guided(precision, 1, torch_norms), noise, sigmas), exact)
    return {"networks": name, "weights": ours.weights, "images": count, "steps": size["whole"],
            "spread": exact.std().item(), "agreement": rows}  # fmt: skip


def agreement(size, found) -> dict:
    """Images in each precision against float32's, at all steps, with random weights."""
    return _agreement(size["names"][0], size)


def agreement_trained(size, found) -> dict:
    """The same with the shipped score network and extractor, whose weights are trained; the heads' are random."""
    return _agreement(size["names"][1], size)


def evaluations(size, found) -> dict:
    """Seconds an image of each kind of work that `plan` counts, by precision; peak memory."""
    ours, batch, device = _networks(size["names"][0]), size["batch"], jobs.device()
    x = ours.noise(batch).draw(0)
    sigma, seconds = torch.ones(batch, dtype=torch.float64, device=device), {}
    for name, precision in (("float32", "float32"), ("default", "float32"), ("TF32", "float32"), ("bfloat16",) * 2):
        denoise, one, six = network_denoiser(ours.score, precision), *(ours.guided("float32", n).ensemble
                                                                         for n in (1, 6))  # fmt: skip
        calls = {"score": lambda denoise=denoise: denoise(x, sigma, 0, 1),
                 "gradient": lambda one=one, precision=precision: grad_log_density_ratio(one, x, sigma, precision),
                 "gradients": lambda six=six, precision=precision: grad_log_density_ratio(six, x, sigma, precision)}
        took = _within("TF32" if name == "bfloat16" else name, bench.seconds)(
            calls, 1 if name == "float32" else size["runs"], name)
        seconds[name] = {kind: value / batch for kind, value in took.items()}
    rates = {name: {kind: 1 / value for kind, value in kinds.items()} for name, kinds in seconds.items()}
    return {"networks": ours.name, "batch": batch, "seconds_an_image": seconds, "images_per_s": rates,
            "peak_gib": _peak()}  # fmt: skip


def training(size, found) -> dict:
    """Batches of training table 1's six members, against its first alone: recorded, and launched one by one.

    What is done once (heads made, the recording, validation) cancels: a rate is of the batches by which an epoch is
    longer than another.
    """
    ours, size_batch = _networks(size["names"][0]), min(128, size["train"])
    many, few = 6 * size_batch + size["train"], 6 * size_batch
    channels, height, width = ours.score.shape
    pixels = np.random.default_rng(0).integers(0, 256, (many, height, width, channels), np.uint8)
    labels, config = np.arange(many) % 2, checkpoints.head_config(ours.extractor_name, *ours.head)
    members = tuple(MemberConfig(f"D{i}", 1e-4, 0.0, 1, t) for i, t in enumerate((1e-5, 1e-5, 1e-2, 1e-3, 1e-3, 1e-5)))

    def train(count, recorded, images):
        usual = dgutils.training._records
        dgutils.training._records = lambda device, parts: recorded and usual(device, parts)
        try:
            settings = TrainingSettings(members[:count], size_batch, precision="bfloat16")
            train_discriminators(ours.extractor, functools.partial(init_head, config, 0),
                                 Split(pixels[:images], labels[:images]), Split(pixels[:2], labels[:2]), settings)
        finally:
            dgutils.training._records = usual

    kinds = {"one": (1, True), "six": (6, True), "one, launched": (1, False), "six, launched": (6, False)}
    calls = {(name, images): functools.partial(train, *kind, images) for name, kind in kinds.items()
             for images in (few, many)}  # fmt: skip
    spent = bench.seconds(calls, 1, "training")
    took = {name: max(spent[name, many] - spent[name, few], 1e-9) for name in kinds}
    return {"images": many - few, **_rates(took, many - few), "six_against_one": took["six"] / took["one"],
            "times_as_fast_as_launched": {name: took[f"{name}, launched"] / took[name] for name in ("one", "six")},
            "peak_gib": _peak()}  # fmt: skip


def hours(size, found) -> dict:
    """Hours that the profile `paper` would take on this card, all of it missing; features and scores not counted."""
    work = json.loads((HERE / "fixtures" / "paper_work.json").read_text())
    rates, rows = found["evaluations"]["seconds_an_image"], {}
    took, images = found["training"]["seconds"], found["training"]["images"]
    train = took["one"] / images
    for precision, seconds in rates.items():
        parts = {kind: work[kind] * value / 3600 for kind, value in (seconds | {"train": train}).items()}
        rows[precision] = parts | {"all": sum(parts.values())}
    return {"work": work, "hours": rows, "not_counted": "features and scores; training in bfloat16 throughout"}


def noise(size, found) -> dict:
    """Drawing noise image by image against a guided step, and what churn's draws cost."""
    ours, batch, device = _networks(size["names"][0]), size["batch"], jobs.device()
    denoise, sigmas = ours.guided("bfloat16"), karras_sigmas(size["steps"])
    shape, x, ones = ours.score.shape, ours.noise(batch).draw(0), torch.ones(batch, dtype=torch.float64, device=device)

    kept = ours.noise(batch)
    calls = {"draw": lambda: PerSampleNoise(range(batch), shape, device).draw(0),
             "guided evaluation": lambda: denoise(x, ones, 0, 1), "evaluation": lambda: denoise.denoise(x, ones, 0, 2),
             "churned, drawn in turn": lambda: edm_sampler(
                 denoise, PerSampleNoise(range(batch), shape, device), sigmas, s_churn=40.0),
             "churned, noise for nothing": lambda: edm_sampler(denoise, kept, sigmas, s_churn=40.0)}  # fmt: skip
    took = bench.seconds(calls, size["runs"], "noise")
    step = took["guided evaluation"] + took["evaluation"]
    free = took["churned, noise for nothing"]
    return {"batch": batch, "seconds": took, "draw_over_guided_step": took["draw"] / step,
            "draw_over_18_steps": took["draw"] / (15 * took["guided evaluation"] + 20 * took["evaluation"]),
            "churned_over_noise_for_nothing": took["churned, drawn in turn"] / free}  # fmt: skip


def batches(size, found) -> dict:
    """Images/s and peak memory of guided sampling in bfloat16 by batch size; the largest that fits."""
    ours, rows, sigmas = _networks(size["names"][0]), {}, karras_sigmas(size["steps"])
    denoise, largest, stopped = ours.guided("bfloat16"), None, "the largest tried"
    pattern = Kept(range(min(size["batches"])), ours.score.shape, jobs.device()).draw(0)
    _free()
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else None
    for batch in size["batches"]:
        seeds = ours.noise(batch)
        seeds.draw = lambda step, batch=batch: pattern.repeat(batch // len(pattern), 1, 1, 1)
        _peak()
        try:
            took = bench.seconds({"ours": lambda seeds=seeds: edm_sampler(denoise, seeds, sigmas)}, 1, str(batch))
        except RuntimeError as error:  # out of memory, or more numbers than a kernel can count
            stopped = f"{batch}: {str(error).splitlines()[0]}"
            break
        largest = batch
        rows[str(batch)] = {"images_per_s": batch / took["ours"], "peak_gib": _peak()}
        found["batches"] = {"batches": rows}  # should the clock run out
    return {"steps": size["steps"], "free_gib": free, "batches": rows, "largest_that_fits": largest,
            "stopped": stopped}  # fmt: skip


def graphs(size, found) -> dict:
    """A CUDA graph of a guided evaluation of few images, whose kernels are small, against eager."""
    ours, device = _networks(size["names"][0]), jobs.device()
    if device.type != "cuda":
        return {"none": "CUDA graphs need CUDA"}
    x = ours.noise(size["graphed"]).draw(0)
    sigma, denoise = torch.ones(len(x), dtype=torch.float64, device=device), network_denoiser(ours.score, "bfloat16")
    ensemble = ours.guided("bfloat16").ensemble

    def evaluate():
        return denoise(x, sigma, 0, 1), grad_log_density_ratio(ensemble, x, sigma, "bfloat16")[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            evaluate()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = evaluate()
    took = bench.seconds({"eager": evaluate, "graph": graph.replay}, size["runs"], "graphs")
    errors = [_relative(ours, theirs.cpu()) for ours, theirs in zip(replayed, evaluate(), strict=True)]
    return {"batch": len(x), **_rates(took, len(x)), "times_as_fast": took["eager"] / took["graph"],
            "largest_relative_error": max(errors)}  # fmt: skip


def norms(size, found) -> dict:
    """One layer's group norm and SiLU in bfloat16, forward and backward: compiled against torch's; seconds to compile.

    The least time is that of reading x twice and writing y, then reading both and x again, and writing the gradient.
    """
    device, shape = jobs.device(), (size["batch"], 256, 32, 32)
    x = torch.randn(shape, device=device).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    layers = {"ours": GroupNorm(256).to(device), "torch": _torch_norms(GroupNorm(256)).to(device)}

    def passes(layer):
        with torch.autocast(device.type, torch.bfloat16):
            y = layer(x, silu=True)
        torch.autograd.grad(y.sum(), x)

    start = time.perf_counter()
    passes(layers["ours"])
    compiling = time.perf_counter() - start
    took = bench.seconds({name: lambda layer=layer: passes(layer) for name, layer in layers.items()}, size["runs"],
                         "norms")  # fmt: skip
    least = 7 * 2 * x.numel() / found["facts"]["bytes_per_s"] if "facts" in found else None
    return {"seconds": took, "seconds_to_compile": compiling, "times_as_fast": took["torch"] / took["ours"],
            "share_of_bandwidth": least and least / took["ours"]}  # fmt: skip


# Most wanted first, with the seconds that each is expected to need on one H100.
MEASUREMENTS = {
    facts: 6, norms: 8, parity_networks: 8, parity_sampling: 8, parity_guided: 6, speed: 20, agreement: 12,
    evaluations: 8, noise: 5, training: 20, hours: 0, batches: 12, agreement_trained: 5, graphs: 3,
}  # fmt: skip


# ---- the run -----------------------------------------------------------------------------


def _name(measure) -> str:
    return measure.__name__


def write(out: Path, state: dict) -> None:
    """check.json, whole or as it was."""
    temporary = out / ".check.json.tmp"
    temporary.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(temporary, out / "check.json")


def run(minutes: float, out: Path, tiny: bool, only=()) -> dict:
    """Measure until the time is up; returns what check.json holds."""
    out.mkdir(parents=True, exist_ok=True)
    size, end = TINY if tiny else REAL, START + 60 * minutes
    state = {"minutes": minutes, "tiny": tiny, "device": jobs.device().type, "results": {}, "seconds": {},
             "skipped": {}, "failed": {}, "running": None, "complete": False}  # fmt: skip
    write(out, state)
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_REAL, max(0.1, end - time.monotonic()))
    try:
        for measure, expected in MEASUREMENTS.items():
            name, slower = measure.__name__, 0.02 if tiny else 1.0
            if name not in (only or map(_name, MEASUREMENTS)):
                continue
            if "facts" in state["results"] and not tiny:
                slower = max(1.0, ENOUGH / state["results"]["facts"]["products_per_s"]["bfloat16"])
            left = end - time.monotonic()
            if left < slower * expected:
                state["skipped"][name] = f"{left:.0f} s left, {slower * expected:.0f} s needed"
                print(f"{name}: skipped, {state['skipped'][name]}", flush=True)
                continue
            state["running"] = name
            write(out, state)
            start = time.monotonic()
            try:
                state["results"][name] = measure(size, state["results"])
            except Exception as error:
                state["failed"][name] = traceback.format_exc()
                print(f"{name}: failed, {type(error).__name__}: {error}", flush=True)
            state["seconds"][name] = time.monotonic() - start
            print(f"{name}: {state['seconds'][name]:.1f} s", flush=True)
            write(out, state)
            _free()
        state["complete"] = True
    except TimeIsUp as why:
        name = state["running"] or "start"
        print(f"{name}: cut off ({why})", flush=True)
        state["skipped"][name] = f"cut off ({why})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    state["running"] = None
    write(out, state)
    return state


DETAILS = {"seconds", "seconds_an_image", "weights", "work", "python", "threads"}  # in check.json only


def _flat(path: tuple, value):
    """Leaves of nested results as (path, value), without `DETAILS`; of relative errors the largest of each kind."""
    if not isinstance(value, dict):
        yield path, value
    elif path[-1] == "relative_errors":
        for kind in ("float64", "float32", "TF32"):
            yield (*path, f"largest in {kind}"), max(errors.get(kind, 0.0) for errors in value.values())
    else:
        for key, inner in value.items():
            if key not in DETAILS:
                yield from _flat((*path, key), inner)


def table(state: dict) -> str:
    """What was found, one value a line."""
    rows = [row for name, result in state["results"].items() for row in _flat((name,), result)]
    lines = [f"{' / '.join(path):<64} {value:.4g}" if isinstance(value, float) else f"{' / '.join(path):<64} {value}"
             for path, value in rows]  # fmt: skip
    lines += [f"{name:<64} skipped: {why}" for name, why in state["skipped"].items()]
    lines += [f"{name:<64} FAILED: {why.splitlines()[-1]}" for name, why in state["failed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run(ARGUMENTS.minutes, ARGUMENTS.out, ARGUMENTS.tiny, ARGUMENTS.only)))
