"""The benchmark runs, and what it measures against computes the same images; no test looks at a clock."""

from types import SimpleNamespace

import bench
import pytest
import torch

from dgutils.errors import UserError
from dgutils.noise import PerSampleNoise, karras_sigmas
from dgutils.sampler import edm_sampler


def test_the_published_loop_draws_our_images():
    score_name, extractor_name, *head, _, _ = bench.SIZES["Fashion-MNIST, small"]
    score, extractor = bench._load(score_name, "score"), bench._load(extractor_name, "extractor")
    heads, sigmas = bench._heads(extractor_name, *head, 2), karras_sigmas(4)
    draw = lambda: PerSampleNoise([3, 8], score.shape)  # noqa: E731
    ours = edm_sampler(bench._guided(score, extractor, heads, "float32"), draw(), sigmas)
    plain = [bench._plain(network) for network in (score, extractor, *heads)]
    theirs = bench.plain_sampler(plain[0], plain[1], plain[2:], draw(), sigmas)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    unguided = edm_sampler(lambda x, sigma, *_: score(x, sigma).double(), draw(), sigmas)
    assert (ours - unguided).abs().max() > 1e-2  # guidance is part of what agrees
    kinds = [{type(module) for network in networks for module in network.modules()}
             for networks in ([score, extractor, *heads], plain)]
    assert set(bench.PLAIN) <= kinds[0] and set(bench.PLAIN.values()) <= kinds[1] and not set(bench.PLAIN) & kinds[1]


def test_networks_without_a_file_act_in_every_layer_so_that_precision_shows(monkeypatch, tmp_path):
    """At initialisation a network's last layer is nearly zero: then any precision draws the same images."""
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(tmp_path))
    score = bench._load("edm-cifar10-32x32-uncond-vp", "score")
    assert min(value.abs().max() for value in score.parameters() if value.ndim > 1) > 1e-3
    x, sigma = 2 * torch.randn(1, *score.shape), torch.tensor([2.0])
    exact = score(x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = score(x, sigma)
    assert (rounded - exact).abs().max() > 1 / 127.5  # a grey level


def test_calls_take_turns_and_the_median_counts(monkeypatch):
    order, clock = [], iter([0, 0, 0, 1, 0, 5, 0, 2, 0, 6, 0, 3, 0, 7])
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    took = bench.seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "both")
    assert order == ["a", "b"] * 4 and took == {"a": 2, "b": 6}  # the first turns only warm up


def test_page_has_every_table_and_keeps_what_is_not_measured_again(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "growth", lambda counts, steps: [[f"{counts[0]}", "1.00", "700"]])
    monkeypatch.setattr(bench, "_scores", lambda quick: [["Fréchet distance"] + ["-"] * 9])
    file = tmp_path / "docs" / "bench.md"
    bench.run(True, file, ["growth"])
    assert file.read_text().count("Not measured yet.") == len(bench.TABLES) - 1
    bench.run(True, file)
    page = file.read_text()
    assert "which says nothing" in page and torch.__version__ in page
    for title, text, heads in bench.TABLES.values():
        assert f"## {title}\n\n{text}\n\n" in page and f"| {' | '.join(heads)} |\n" in page
    assert page.count("| Fashion-MNIST, small |") == 6
    monkeypatch.setattr(bench, "growth", lambda counts, steps: [["250", "2.00", "800"]])
    bench.run(True, file, ["growth"])
    assert file.read_text() == page.replace("| 250 | 1.00 | 700 |", "| 250 | 2.00 | 800 |")
    with pytest.raises(UserError, match="unknown measurement 'speed': choose from sampling, "):
        bench.run(True, file, ["speed"])
