"""The piece that goes on with a study on a GPU, on a CPU: what it hands over is whole, wherever it is cut off."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dgutils.networks import checkpoints
from dgutils.pipeline.store import digest_of_file, read_kept, read_manifest

ROOT = Path(__file__).resolve().parent.parent
SMALLEST = ["num_fake=40", "num_eval=16", "num_reference=32", "num_resamples=4", "num_sweep=16", "num_key=16",
            "variants=[]", "ladder=[]", "seed_blocks=1", "repeats=1", "num_steps=2", "epochs=[1, 1, 1, 1, 1, 1]",
            "epoch_scale=1", "sweep_weights=[]", "ancestral_steps=0", "batch_size=16", "shard_size=16",
            "discriminator_batch_size=16", "feature_spaces=[fashion-mnist-adm]"]  # fmt: skip


@pytest.fixture
def command(tmp_path):
    for name in ("notebooks", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "report").mkdir()
    words = [sys.executable, ROOT / "tests" / "gpu_study.py", "--profile", "smoke", "--out", tmp_path / "out"]
    environment = os.environ | {"DGUTILS_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    return [*words, "--set", *SMALLEST], dict(cwd=ROOT, env=environment)


def test_scores_as_many_as_the_time_allows_and_goes_on(command, tmp_path):
    words, where = command
    started = time.monotonic()
    subprocess.run([*words, "--minutes", "0.25"], check=True, capture_output=True, **where)
    first = read_kept(tmp_path / "out" / "scores.json")["scores"] if (tmp_path / "out" / "scores.json").exists() else {}
    assert time.monotonic() - started < 120
    subprocess.run([*words, "--minutes", "5"], check=True, capture_output=True, **where)
    kept = read_kept(tmp_path / "out" / "scores.json")
    assert first.items() <= kept["scores"].items() and len(kept["scores"]) > 5 and kept["lineage"]
    store = tmp_path / "runs" / "smoke" / "store" / "train"
    before = {folder.name: checkpoints.read_tensors(folder / "heads.safetensors")[0] for folder in store.iterdir()}
    shutil.rmtree(store)
    take = [*words[: words.index("--out")], "--take", tmp_path / "out"]
    for told in (f"took {len(before)} trainings", "took 0 trainings"):
        assert told in subprocess.run(take, check=True, capture_output=True, text=True, **where).stdout
    for name, heads in before.items():
        manifest = read_manifest(store / name)
        assert manifest["files"]["heads.safetensors"]["sha256"] == digest_of_file(store / name / "heads.safetensors")
        taken = checkpoints.read_tensors(store / name / "heads.safetensors")[0]
        several = {key.partition(".")[0] for key in heads} > {"0"}
        independent = several and manifest["identity"]["config"].get("real_seed") is not None
        assert taken.keys() == {key for key in heads if ".best." in key or not independent}
        assert all(torch.equal(heads[key], value) for key, value in taken.items())


def test_cut_off_at_a_random_moment_it_leaves_whole_scores_or_none(command, tmp_path):
    _, where = command
    moment = random.uniform(2, 25)
    print(f"killed after {moment:.1f} s")
    code = "\n".join(["import sys", f"sys.path.insert(0, {str(ROOT / 'tests')!r})", "from pathlib import Path",
                      "import gpu_study",
                      f"gpu_study.run('smoke', 5, Path({str(tmp_path / 'out')!r}), {SMALLEST!r}, 0.5)"])  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               **where)  # fmt: skip
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    scores = tmp_path / "out" / "scores.json"
    assert not scores.exists() or read_kept(scores)["scores"]
