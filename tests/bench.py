"""`make bench`: what is claimed of speed and memory, measured here and now: ratios within one run, medians of five.

Whatever is compared takes turns, so that other work on the machine weighs on all of it. The published loop that ours is
measured against is written out below from its description (EDM algorithm 2, DG eq. 8): float32, eager, default memory
layout, one network evaluation at a time, extractor and head called for each member, the extractor's attention computed
once more in the backward pass.
"""

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import bench_metrics
import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dgutils import datasets
from dgutils.discriminator import Ensemble, MemberConfig, perturb
from dgutils.errors import UserError
from dgutils.files import write_file
from dgutils.guidance import GuidedDenoiser, grad_log_density_ratio
from dgutils.machine import provenance
from dgutils.networks import checkpoints
from dgutils.networks.adm import AttentionBlock, EncoderUNet, Stem, init_head
from dgutils.networks.edm import Denoiser, UNetBlock
from dgutils.noise import PerSampleNoise, karras_sigmas, keyed_rng, sigma_to_vp_time, vp_scale
from dgutils.paths import repo_root
from dgutils.pipeline import jobs
from dgutils.pipeline.store import Store
from dgutils.sampler import edm_sampler, network_denoiser
from dgutils.training import Split, TrainingSettings, train_discriminators

RUNS = 5
# name -> score network, extractor, head's width, blocks and attention channels, images at once, steps
SIZES = {
    "Fashion-MNIST, small": ("fashion-mnist-edm", "fashion-mnist-adm", 16, 0, 16, 250, 6),
    "CIFAR-10, small": ("cifar10-edm-2m", "cifar10-adm", 32, 1, 32, 125, 6),
    "CIFAR-10, published": ("edm-cifar10-32x32-uncond-vp", "32x32_classifier", 128, 2, 64, 8, 3),
}
WEIGHT, TIME_MIN, TIME_MAX = 2.0, 0.01, 1.0
PUSH = 0.1  # root mean square of the guidance over sigma, at sigma 1: random heads would push without measure
ON_GPU = 256  # images at once there
WHOLE = 18  # steps of EDM on CIFAR-10: images are compared at the end of those; speed needs a few


# ---- the published loop ------------------------------------------------------------------


class _PlainStem(torch.nn.Conv2d):
    """The first convolution, which leaves the memory layout as it is."""

    def forward(self, x, embedding):
        return super().forward(x)


class _PlainAttention(AttentionBlock):
    """ADM's attention as published: whole matrices of weights, and all of it once more in the backward pass."""

    def forward(self, x, embedding):
        return checkpoint(self._attend, x, use_reentrant=False)

    def _attend(self, x):
        n, channels = x.shape[:2]
        qkv = self.qkv(self.norm(x).flatten(2)).view(n * self.heads, 3, channels // self.heads, -1)
        q, k, v = qkv.unbind(1)  # [N heads, c, T] each
        scale = q.shape[1] ** -0.25
        weights = torch.einsum("nct,ncs->nts", q * scale, k * scale).softmax(2)
        h = torch.einsum("nts,ncs->nct", weights, v).reshape(n, channels, -1)
        return x + self.proj_out(h).view_as(x)


class _PlainBlock(UNetBlock):
    """EDM's block, whose attention forms whole matrices of weights, as published."""

    def forward(self, x, emb):
        self.attention, attends = False, self.attention
        x = super().forward(x, emb)
        self.attention = attends
        if not attends:
            return x
        q, k, v = self.qkv(self.norm2(x)).view(*x.shape[:2], 3, -1).unbind(2)  # [N, C, T] each
        weights = torch.einsum("nct,ncs->nts", q, k / math.sqrt(q.shape[1])).softmax(2)
        return (x + self.proj(torch.einsum("nts,ncs->nct", weights, v).view_as(x))) * math.sqrt(0.5)


PLAIN = {Stem: _PlainStem, AttentionBlock: _PlainAttention, UNetBlock: _PlainBlock}


def _plain(network):
    """A copy of a network in the default memory layout, as the published code runs it."""
    network = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for module in network.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return network


def plain_guidance(extractor, heads, x, sigma):
    """grad log r of the mean probability, the probabilities clipped; one extractor pass and one head a member."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        time, probabilities = sigma_to_vp_time(sigma), []
        for head in heads:
            scaled = x * vp_scale(sigma)[:, None, None, None]
            logit = head(extractor.features(scaled.float(), time.float()), time.float())[:, 0]
            probabilities.append(torch.sigmoid(logit.double()))
        p = torch.stack(probabilities).mean(0).clamp(1e-5, 1 - 1e-5)
        (grad,) = torch.autograd.grad(torch.log(p / (1 - p)).sum(), x)
    return grad


@torch.no_grad()
def plain_sampler(score, extractor, heads, noise, sigmas):
    """Guided images [N, C, H, W], float64, of Heun's method; guidance on the predictor, inside the time window."""
    x = noise.draw(0) * sigmas[0]
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        levels = sigma.expand(len(x))
        slope = (x - score(x.float(), levels.float()).double()) / sigma
        if TIME_MIN <= sigma_to_vp_time(sigma) <= TIME_MAX:
            slope = slope - WEIGHT * sigma * plain_guidance(extractor, heads, x, levels)
        ahead = x + (following - sigma) * slope
        if following > 0:
            there = (ahead - score(ahead.float(), following.expand(len(x)).float()).double()) / following
            ahead = x + (following - sigma) * (slope + there) / 2
        x = ahead
    return x


# ---- measuring ---------------------------------------------------------------------------


def seconds(calls: dict, runs: int, what: str) -> dict[str, float]:
    """Median seconds of each call; after a warm-up they take turns. what: for the progress bar."""
    taken = {name: [] for name in calls}
    for run in tqdm(range(runs + 1), desc=what, unit=" turns", leave=False):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _load(name: str, kind: str):
    """A network; with random weights, all of which act, if its file is absent: the cost is the same."""
    try:
        network = checkpoints.load_denoiser(name) if kind == "score" else checkpoints.load_feature_extractor(name)
    except UserError:
        network = (Denoiser if kind == "score" else EncoderUNet)(**checkpoints.network_config(name))
        network.requires_grad_(False).to(memory_format=torch.channels_last)  # as checkpoints loads them
        _wake(network, torch.Generator().manual_seed(1))
    return network.eval().requires_grad_(False).to(jobs.device())


def _wake(network, generator) -> None:
    """Random weights in the place of those that training starts at zero or nearly, so that every layer acts."""
    for value in network.parameters():
        if value.ndim > 1 and value.abs().max() < 1e-3:
            value.copy_(torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel()))


def _heads(extractor_name: str, width: int, blocks: int, channels: int, count: int) -> list:
    """Heads that answer something: what training starts from zero is random here."""
    heads = [init_head(checkpoints.head_config(extractor_name, width, blocks, channels), 0, m) for m in range(count)]
    generator = torch.Generator().manual_seed(0)
    for head in heads:
        _wake(head.eval().requires_grad_(False), generator)
    return [head.to(jobs.device()) for head in heads]


def _calibrate(guided, shape) -> None:
    """Scale and shift the one head's last layer so that guidance at sigma 1 is `PUSH`, and log r about zero."""
    last = guided.ensemble.heads[0].out[2].c_proj
    x, device = PerSampleNoise([0, 1], shape, last.weight.device).draw(0), last.weight.device
    ones = torch.ones(2, dtype=torch.float64, device=device)
    last.weight.mul_(PUSH / guided.guidance(x, ones, 0, 1).square().mean().sqrt().item())
    guided.guidance(x, ones, 0, 1)
    last.bias.sub_(guided.last_log_ratio.mean())


def networks(name: str):
    """Score network, extractor and six heads of a size of `SIZES`; whatever is random acts, and guides moderately."""
    score_name, extractor_name, *head, _, _ = SIZES[name]
    score, extractor = _load(score_name, "score"), _load(extractor_name, "extractor")
    heads = _heads(extractor_name, *head, 6)
    for one in heads:
        _calibrate(_guided(score, extractor, [one], "float32"), score.shape)
    return score, extractor, heads


def _guided(score, extractor, heads, precision):
    ensemble = Ensemble(extractor, heads, "mean_probability").to(jobs.device())
    return GuidedDenoiser(network_denoiser(score, precision), ensemble, WEIGHT, 0.0, TIME_MIN, TIME_MAX, precision,
                          "clipped")  # fmt: skip


def _trained_head(name: str, score, extractor, images: int):
    """A head after 20 epochs on so many generated images and as many real ones: as strong as those that guide."""
    score_name, extractor_name, *head, _, _ = SIZES[name]
    noise = PerSampleNoise(range(1000, 1000 + images), score.shape, jobs.device())
    fake = datasets.to_uint8(edm_sampler(network_denoiser(score), noise, karras_sigmas(10)))
    real, _ = datasets.load_dataset({1: "fashion_mnist", 3: "cifar10"}[score.shape[0]], "train")
    split = Split(np.concatenate([real[:images], fake]), np.repeat([1, 0], images))
    settings = TrainingSettings((MemberConfig("trained", 3e-4, 1e-7, 20),), min(64, images))
    make = partial(init_head, checkpoints.head_config(extractor_name, *head), 0)
    (trained,) = train_discriminators(extractor, make, split, split, settings)
    return trained.head.eval().requires_grad_(False)


def _draws(name: str, size: int, steps: int, trained: int = 0) -> dict:
    """Calls that draw `size` images: the published loop's, and ours in float32, default precision, and by six.

    trained: by a head that was trained on so many images, instead of random ones.
    """
    score, extractor, heads = networks(name)
    heads = [_trained_head(name, score, extractor, trained)] if trained else heads
    plain = _plain(score), _plain(extractor), [_plain(heads[0])]
    sigmas, default = karras_sigmas(steps).to(jobs.device()), jobs.resolve_precision("auto")

    def noise():
        return PerSampleNoise(range(size), score.shape, jobs.device())

    def ours(count, precision):
        return edm_sampler(_guided(score, extractor, heads[:count], precision), noise(), sigmas)

    def unguided(precision="float32"):
        return edm_sampler(network_denoiser(score, precision), noise(), sigmas)

    return {"published": lambda: plain_sampler(*plain, noise(), sigmas), "float32": partial(ours, 1, "float32"),
            "default": partial(ours, 1, default), "bfloat16": partial(ours, 1, "bfloat16"),
            "six": partial(ours, 6, default), "unguided": unguided}  # fmt: skip


def sampling(names, runs: int, batch: int | None) -> dict[str, list]:
    """Guided sampling by one discriminator against the published loop, and by six against one."""
    speed, members = [], []
    for name in names:
        *_, size, steps = SIZES[name]
        size = batch or size
        calls = _draws(name, size, steps)
        del calls["bfloat16"], calls["unguided"]
        took = seconds(calls, runs, f"sampling, {name}")
        rates = {call: size / value for call, value in took.items()}
        speed.append([name, size, *(f"{rates[call]:.3g}" for call in ("published", "float32", "default")),
                      f"{took['published'] / took['float32']:.2f}", f"{took['published'] / took['default']:.2f}"])
        members.append([name, size, f"{rates['default']:.3g}", f"{rates['six']:.3g}",
                        f"{took['six'] / took['default']:.2f}"])  # fmt: skip
    return {"speed": speed, "members": members}


def agreement(names, steps: int, most: int, learnt: int) -> list:
    """The images of both loops at the same noise, in float32 and in bfloat16; few of the largest networks.

    learnt: on how many images the trained heads were trained.
    """
    rows = []
    for name in names:
        published = "published" in name
        count = min(most, 4) if published else most
        for heads in ("random",) if published else ("none", "trained", "random"):
            calls = _draws(name, count, steps, learnt * (heads == "trained"))
            plain = calls["unguided"]()
            if heads == "none":
                exact, rounded, error = plain, calls["unguided"]("bfloat16"), "-"
            else:
                theirs, exact, rounded = (calls[call]() for call in ("published", "float32", "bfloat16"))
                error = f"{((exact - theirs).abs().max() / theirs.abs().max()).item():.1e}"
            grey = np.abs(datasets.to_uint8(rounded).astype(int) - datasets.to_uint8(exact).astype(int))
            rows.append([name, "random" if published else "trained", heads, count, steps,
                         f"{127.5 * (exact - plain).square().mean().sqrt().item():.1f}", error,
                         f"{100 * (grey <= 1).mean():.2f} %", int(grey.max())])  # fmt: skip
    return rows


def training(names, runs: int, images: int) -> list:
    """An epoch of six members, their minimum times included, against an epoch of one."""
    rows, times = [], (1e-5, 1e-5, 1e-2, 1e-3, 1e-3, 1e-5)
    members = tuple(MemberConfig(f"D{i}", 1e-4, 0.0, 1, t) for i, t in enumerate(times))
    for name in names:
        score_name, extractor_name, *head, _, _ = SIZES[name]
        extractor = _load(extractor_name, "extractor")
        channels, height, width = checkpoints.image_shape(score_name)
        many = images // 8 if "published" in name else images  # those take their time
        pixels = np.random.default_rng(0).integers(0, 256, (many, height, width, channels), np.uint8)
        labels, config = np.arange(many) % 2, checkpoints.head_config(extractor_name, *head)

        def train(count, extractor=extractor, config=config, pixels=pixels, labels=labels):
            batch = min(128, len(pixels))
            settings = TrainingSettings(members[:count], batch, precision=jobs.resolve_precision("auto"))
            train_discriminators(extractor, partial(init_head, config, 0), Split(pixels, labels),
                                 Split(pixels[:batch], labels[:batch]), settings)  # fmt: skip

        took = seconds({"one": partial(train, 1), "six": partial(train, 6)}, runs, f"training, {name}")
        rows.append([name, many, f"{took['one']:.2f}", f"{took['six']:.2f}", f"{took['six'] / took['one']:.2f}"])
    return rows


def limits(name: str, runs: int, side: int, batch: int) -> list:
    """Which share of the machine's matrix multiplications a guided step reaches, by precision."""
    score_name, extractor_name, *head, _, _ = SIZES[name]
    score, extractor = _load(score_name, "score"), _load(extractor_name, "extractor")
    heads, rows = _heads(extractor_name, *head, 1), []
    x = torch.zeros(batch, *score.shape, dtype=torch.float64, device=jobs.device())
    sigma = torch.ones(batch, dtype=torch.float64, device=jobs.device())
    for precision in ("float32", "bfloat16"):
        denoise = _guided(score, extractor, heads, precision)
        a = torch.ones(side, side, dtype=getattr(torch, precision), device=jobs.device())
        took = seconds({"product": lambda a=a: a @ a, "step": partial(denoise, x, sigma, 0, 1)}, runs,
                       f"share of the limit, {precision}")  # fmt: skip
        with FlopCounterMode(display=False) as counter:
            denoise(x, sigma, 0, 1)
        limit, reached = 2 * side**3 / took["product"], counter.get_total_flops() / took["step"]
        rows.append([precision, f"{limit / 1e9:.0f}", f"{reached / 1e9:.0f}", f"{100 * reached / limit:.0f} %",
                     f"{batch / took['step']:.3g}"])  # fmt: skip
    return rows


def cosines(name: str, batch: int) -> list:
    """Guidance in bfloat16 autocast against float32: cosine of log r's gradient by noise level, over images."""
    _, extractor_name, *head, _, _ = SIZES[name]
    ensemble = Ensemble(_load(extractor_name, "extractor"), _heads(extractor_name, *head, 1), "mean_logit")
    ensemble.to(jobs.device())
    config, rows = checkpoints.network_config(extractor_name), []
    images, _ = datasets.load_dataset({1: "fashion_mnist", 3: "cifar10"}[config["in_channels"]], "test")
    for sigma in (0.05, 0.2, 1.0, 5.0, 20.0):
        level = torch.full((batch,), sigma, dtype=torch.float64)
        x_vp = perturb(images[:batch], sigma_to_vp_time(level), keyed_rng(0, 0, 0, 9))
        x = (x_vp / vp_scale(level)[:, None, None, None]).to(jobs.device())
        exact, rounded = (grad_log_density_ratio(ensemble, x, level.to(x.device), precision)[0].flatten(1)
                          for precision in ("float32", "bfloat16"))  # fmt: skip
        cosine = torch.nn.functional.cosine_similarity(exact, rounded)
        rows.append([f"{sigma:g}", f"{cosine.median():.5f}", f"{cosine.min():.5f}"])
    return rows


def growth(counts, steps: int) -> list:
    """Seconds an image and peak memory of sampling more and more images, each number in a process of its own."""
    rows = []
    for count in counts:
        command = [sys.executable, __file__, "--grow", str(count), str(steps)]
        found = json.loads(subprocess.run(command, cwd=repo_root(), check=True, stdout=subprocess.PIPE).stdout)
        rows.append([f"{count:,}", f"{1000 * found['seconds'] / count:.2f}", f"{found['mib']:.0f}"])
    return rows


def _grow(count: int, steps: int) -> dict:
    config = jobs.Sampling("fashion-mnist-edm", steps, batch_size=250, shard_size=250)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, lambda line: None)
        jobs.ImageSet(store, config, 250).ensure()  # loads the network
        start = time.perf_counter()
        jobs.ImageSet(store, replace(config, sigma_max=79.0), count).ensure()
        return {"seconds": time.perf_counter() - start, "mib": bench_metrics._peak_mib()}


# ---- the page ----------------------------------------------------------------------------


TABLES = {  # part -> title, what it says, heads of the columns
    "speed": ("Guided sampling against the published loop",
              "One discriminator; images a second, and how many times as fast as the published loop (float32, eager, "
              "one evaluation at a time; written out in tests/bench.py).",
              ["networks", "batch", "published loop", "ours, float32", "ours, default", "ratio, float32",
               "ratio, default"]),
    "agreement": ("The same images",
                  "At the same noise: relative error of ours in float32 against the published loop's, and pixels of "
                  "ours in bfloat16 within one grey level of ours in float32. Of random weights every layer acts. "
                  "Trained heads, after 20 epochs on 256 real and as many generated images, are what users have; "
                  "random ones push farther (by the root mean square, in grey levels).",
                  ["networks", "their weights", "heads", "images", "steps", "guidance moves by", "relative error",
                   "bfloat16 within 1 grey level", "largest difference"]),
    "members": ("Six discriminators against one",
                "Guided sampling, default precision; the last column is what six cost when one costs 1.",
                ["networks", "batch", "images/s, one", "images/s, six", "cost"]),
    "training": ("Training six members against one", "One epoch each, in seconds, with their own minimum times.",
                 ["networks", "images", "one", "six", "cost"]),
    "limits": ("Share of the machine's limit",
               "One guided step of the published architecture against a square matrix product in the same precision, "
               "in GFLOP/s. Over 100 %: the step's convolutions are oneDNN's, the product MKL's, slow on AMD.",
               ["precision", "matrix product", "guided step", "share", "steps of an image/s"]),
    "cosines": ("bfloat16 against float32 guidance", "Cosine of the gradients of log r on noised test images.",
                ["sigma", "median", "least"]),
    "growth": ("More images",
               "Unguided sampling through the store; milliseconds an image, and peak memory of the process in MiB. One "
               "run each.", ["images", "ms an image", "peak MiB"]),
    "scores": ("Scores",
               "Random correlated features; seconds and peak MiB, ours against clean-fid's and prdc's where these can "
               "do it.", ["what", "n", "d", "runs", "ours, s", "ours, MiB", "theirs, s", "theirs, MiB", "ratio",
                       "theirs are"]),
}  # fmt: skip


def _section(part: str, rows: list, quick: bool) -> str:
    """One table of the page, with where and when it was measured."""
    title, text, heads = TABLES[part]
    about = provenance()
    where = (f"Measured {datetime.now(UTC):%Y-%m-%d}, code {str(about['revision'])[:10]}, torch {torch.__version__}, "
             f"on {about['device']}, threads: {torch.get_num_threads()}.")  # fmt: skip
    lines = [f"## {title}", "", text, "", where + " **A trial at tiny sizes, which says nothing.**" * quick, ""]
    table = ["| " + " | ".join(map(str, row)) + " |" for row in [heads, ["---"] * len(heads), *rows]]
    return "\n".join([*lines, *table])


def _page(sections: dict[str, str]) -> str:
    """The page from its tables; those that were never measured are named."""
    lines = ["# Speed and memory, measured", "",
             f"Written by `make bench`. Medians of {RUNS} turns unless a table says otherwise; what is compared takes "
             "turns within one run, and only ratios are claims."]  # fmt: skip
    lines += [f"\n{sections[part]}" if part in sections else f"\n## {title}\n\nNot measured yet."
              for part, (title, _, _) in TABLES.items()]  # fmt: skip
    return "\n".join([*lines, ""])


def _sections(page: str) -> dict[str, str]:
    """The tables of a page that was written before, by part."""
    parts = {title: part for part, (title, _, _) in TABLES.items()}
    found = {text.partition("\n")[0]: text.strip() for text in page.split("\n## ")[1:]}
    return {parts[title]: f"## {text}" for title, text in found.items() if title in parts and "| --- |" in text}


def _scores(quick: bool) -> list:
    rows = bench_metrics.compare(64, 8, 1) if quick else bench_metrics.run(False)
    table = []
    for row in rows:
        others = ["-" if row[key] is None else f"{row[key]:.1f}" for key in ("theirs_seconds", "theirs_mib", "ratio")]
        table.append([row["what"], f"{row['n']:,}", row["d"], row["runs"], f"{row['ours_seconds']:.1f}",
                      f"{row['ours_mib']:.0f}", *others, row["note"]])  # fmt: skip
    return table


def run(quick: bool, out: Path, only=()) -> None:
    """Measure and write the page `out`. quick: tiny sizes, to see that it runs.

    only: names of `measures` below; the other tables of the page stay as they are. Raises UserError for other names.
    """
    names, runs = (list(SIZES)[:1], 1) if quick else (list(SIZES), RUNS)
    on_gpu = jobs.device().type == "cuda"
    square = (64, 2) if quick else (8192, ON_GPU) if on_gpu else (2048, 16)
    measures = {
        "sampling": lambda: sampling(names, runs, 2 if quick else ON_GPU if on_gpu else None),
        "agreement": lambda: {"agreement": agreement(names, 3, 2, 8) if quick else agreement(names, WHOLE, 32, 256)},
        "training": lambda: {"training": training(names, runs, 32 if quick else 1024)},
        "limits": lambda: {"limits": limits(names[-1], runs, *square)},
        "cosines": lambda: {"cosines": cosines(names[0], 4 if quick else 128)},
        "growth": lambda: {"growth": growth((250,) if quick else (1000, 8000), 2)},
        "scores": lambda: {"scores": _scores(quick)},
    }
    if unknown := set(only) - measures.keys():
        raise UserError(f"unknown measurement {sorted(unknown)[0]!r}: choose from {', '.join(measures)}")
    sections = _sections(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in tqdm(only or measures, desc="bench"):
        sections |= {part: _section(part, rows, quick) for part, rows in measures[name]().items()}
        write_file(out, _page(sections).encode())  # what is measured is kept
    print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the claims of speed: ratios, each within one run")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions: does it run?")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="[the GPU if there is one]")
    parser.add_argument("--out", type=Path, help="the page [docs/bench.md, of a GPU docs/bench-gpu.md]")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these; other tables stay")
    parser.add_argument("--grow", nargs=2, type=int, help=argparse.SUPPRESS)  # a process of its own, for `growth`
    args = parser.parse_args()
    if args.grow:
        print(json.dumps(_grow(*args.grow)))
        return
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anybody asks torch which device there is
    elif args.device == "cuda" and jobs.device().type != "cuda":
        sys.exit("bench: torch finds no GPU: leave --device cuda out, or mend the driver (nvidia-smi)")
    page = "bench-gpu.md" if jobs.device().type == "cuda" else "bench.md"
    try:
        run(args.quick, args.out or repo_root() / "docs" / page, args.only)
    except UserError as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
