"""The check of an accelerator runs on a CPU at tiny size, and whatever cuts it off leaves what was measured."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import torch

from dgutils.cli import plan
from dgutils.pipeline import jobs
from dgutils.pipeline.work import Declared

SCRIPT = Path(gpu_check.__file__)


def start(out, *options) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "--out", out, "--tiny", "--device", "cpu", *options]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip


def read(out) -> dict:
    return json.loads((out / "check.json").read_text())


def test_every_measurement_runs(tmp_path):
    printed, _ = start(tmp_path, "--minutes", "5").communicate()
    state = read(tmp_path)
    assert state["complete"] and state["device"] == "cpu" and not state["failed"] and not state["skipped"]
    assert list(state["results"]) == [measure.__name__ for measure in gpu_check.MEASUREMENTS]
    results = state["results"]
    errors = [errors for name in ("parity_networks", "parity_sampling", "parity_guided")
              for errors in results[name]["relative_errors"].values()]  # fmt: skip
    assert all(error["float64"] < 1e-10 and error.get("float32", 0) < 1e-3 for error in errors)
    exact = results["agreement"]["agreement"]["published, float32"]
    assert exact["within_one_grey"] == 1 and exact["relative_error"] < 1e-4
    assert "hours / hours / bfloat16 / all" in printed


def test_cut_off_anywhere_it_leaves_what_was_measured(tmp_path):
    process = start(tmp_path)
    while not (tmp_path / "check.json").exists() or "facts" not in read(tmp_path)["results"]:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(random.uniform(0, 8))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    state = read(tmp_path)
    assert state["results"]["facts"]["torch"] == torch.__version__ and not state["failed"]
    assert state["seconds"].keys() == state["results"].keys()


def test_clock_skips_ends_and_a_failure_stops_nothing(monkeypatch, tmp_path, capsys):
    def quick(size, found):
        return {"value": 1.0}

    def broken(size, found):
        raise RuntimeError("no such kernel")

    def long(size, found):
        return {"never": True}

    def endless(size, found):
        time.sleep(60)

    measurements = {quick: 0, broken: 0, long: 1e9, endless: 0}
    monkeypatch.setattr(gpu_check, "MEASUREMENTS", measurements)
    monkeypatch.setattr(gpu_check, "START", time.monotonic())
    state = gpu_check.run(0.05, tmp_path, True, ["quick", "broken", "long", "endless"])
    assert state == read(tmp_path) and not state["complete"] and state["results"] == {"quick": {"value": 1.0}}
    assert "no such kernel" in state["failed"]["broken"]
    assert state["skipped"].keys() == {"long", "endless"} and "SIGALRM" in state["skipped"]["endless"]
    assert "long: skipped, " in capsys.readouterr().out
    shown = gpu_check.table(state).splitlines()
    assert shown[0].split() == ["quick", "/", "value", "1"] and "FAILED: RuntimeError" in shown[-1]


def test_the_work_of_the_paper_profile_is_what_plan_counts(monkeypatch, tmp_path):
    for function in ("runs_dir", "results_dir"):
        monkeypatch.setattr(jobs, function, lambda profile, function=function: tmp_path / function / profile)
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(tmp_path / "weights"))
    steps, features = plan.steps(Declared("paper")), {}
    for step in steps:
        for space, count in step.features.items():
            features[space] = features.get(space, 0) + count
    work = {kind: sum(step.work[kind] for step in steps) for kind in plan.KINDS}
    kept = json.loads((SCRIPT.parent / "fixtures" / "paper_work.json").read_text())
    assert kept == work | {"features": features}
