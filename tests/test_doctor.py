"""The doctor names what is missing and what to do, starts on a bare Python, and downloads nothing."""

import collections
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dgutils import datasets
from dgutils.cli import doctor
from dgutils.errors import UserError
from dgutils.networks import checkpoints

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"score_network": "fashion-mnist-edm", "feature_extractor": "fashion-mnist-adm"}


def absent(check, *arguments):
    """What is missing, and what to do, both in one line each."""
    with pytest.raises(doctor.Absent) as caught:
        check(*arguments)
    what, advice = caught.value.args
    assert "\n" not in what + advice
    return what, advice


def test_old_python(monkeypatch):
    assert doctor.check_python().endswith(sys.executable)
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    assert "Python 3.11 or newer" in absent(doctor.check_python)[1]


def test_packages_against_the_list(tmp_path, monkeypatch):
    assert "as pinned" in doctor.check_packages()
    monkeypatch.setenv("DGUTILS_ROOT", str(tmp_path))
    (tmp_path / "requirements.txt").write_text("# made by\nnumpy==0.1 \\\n    --hash=sha256:00\n"
                                               "no-such-thing==2.0 \\\n    --hash=sha256:00\n"
                                               "not-for-us==1.0 ; sys_platform == 'win32' \\\n    --hash=sha256:00\n")
    what, advice = absent(doctor.check_packages)
    assert re.fullmatch(r"numpy [\d.]+ instead of 0.1, no-such-thing absent instead of 2.0", what)
    assert "pip install --require-hashes -r requirements.txt" in advice


def test_most_lines_of_the_list_are_read():
    wanted = len(re.findall("^[a-z]", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert 100 < int(doctor.check_packages().partition(",")[0]) > wanted * 3 / 4


def test_full_disk(monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    values = {"num_fake": 50_000, "num_eval": 50_000}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 20e9))
    assert "20 GB free" in doctor.check_disk({"num_fake": 1})
    assert re.search("about 4[01] GB needed", absent(doctor.check_disk, values)[0])


def test_little_memory(monkeypatch):
    monkeypatch.setattr(doctor, "MEMORY_GB", 1e6)
    assert "1000000.0 GB needed" in absent(doctor.check_memory)[0]


def test_no_tex(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert absent(doctor.check_tex)[0] == "pdflatex, latexmk, kpsewhich"


def test_absent_data_is_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("would download"))
    monkeypatch.delenv("DGUTILS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    what, advice = absent(doctor.check_data, "cifar10")
    assert what == f"cifar10, looked for in {tmp_path}/dgutils/data/cifar-10-batches-py" and "170 MB" in advice


def test_data_is_looked_for_where_it_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "load_dataset", lambda dataset, split: (range(5),))
    monkeypatch.setenv("DGUTILS_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert absent(doctor.check_data, "cifar10")
    (tmp_path / "cifar10").mkdir()
    assert doctor.check_data("cifar10") == "cifar10: 5 and 5 images, checksums right"


def test_altered_data(monkeypatch, tmp_path):
    (tmp_path / "fashion-mnist").mkdir()
    monkeypatch.setenv("DGUTILS_DATA", str(tmp_path))
    datasets.load_dataset.cache_clear()
    try:
        with pytest.raises(UserError, match="cannot read fashion_mnist"):
            doctor.check_data("fashion_mnist")
    finally:
        datasets.load_dataset.cache_clear()
        monkeypatch.undo()
    assert "60,000 and 10,000 images" in doctor.check_data("fashion_mnist")


def test_shipped_weights(monkeypatch, tmp_path):
    assert doctor.check_networks("quick", QUICK) == "fashion-mnist-edm, fashion-mnist-adm: here, checksums right"
    with pytest.raises(UserError, match="no network 'edm-cifar'"):
        doctor.check_networks("quick", QUICK | {"score_network": "edm-cifar"})
    shutil.copytree(checkpoints.ASSETS, tmp_path / "assets")
    monkeypatch.setattr(checkpoints, "ASSETS", tmp_path / "assets")
    for path in (tmp_path / "assets").glob("fashion-mnist-edm.*"):
        path.rename(path.with_stem("another"))  # one that this process has not loaded yet
    weights = tmp_path / "assets" / "another.safetensors"
    for damage in (lambda: weights.write_bytes(weights.read_bytes()[:-1]), weights.unlink):
        damage()
        with pytest.raises(UserError, match="is absent or does not match its model card"):
            doctor.check_networks("quick", QUICK | {"score_network": "another"})


def test_published_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("DGUTILS_WEIGHTS", str(tmp_path))
    named = {"score_network": "edm-cifar10-32x32-uncond-vp", "feature_extractor": "cifar10-adm"}
    what, advice = absent(doctor.check_networks, "paper", named)
    assert what == f"edm-cifar10-32x32-uncond-vp: not in {tmp_path}" and "make fetch PROFILE=paper (" in advice
    assert "make rehearse" in advice


def test_list_has_a_line_for_each_thing_and_its_status_says_whether_all_is_there(capsys, monkeypatch):
    status = doctor.run("smoke")
    lines = re.findall(r"^  (OK|MISSING) +([A-Za-z ]+?)  ", capsys.readouterr().out, re.MULTILINE)
    assert [name for _, name in lines] == ["Python", "packages", "disk", "memory", "TeX", "device", "data", "networks"]
    assert [name for state, name in lines if state == "MISSING" and name != "TeX"] == []
    assert status == any(state == "MISSING" for state, _ in lines)
    monkeypatch.setattr(doctor, "MEMORY_GB", 1e6)
    assert doctor.run("smoke") == 1
    printed = capsys.readouterr().out
    assert "MISSING  memory" in printed and re.search(r"Missing: .*memory.*\.", printed)
    with pytest.raises(UserError, match="unknown profile smok"):
        doctor.run("smok")


def test_it_starts_on_a_python_without_packages():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" \
           "from dgutils.cli import doctor\nsys.exit(doctor.run('quick'))"  # fmt: skip
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == ""
    assert "MISSING  packages" in result.stdout and "absent instead of" in result.stdout
    assert "once the packages are there" in result.stdout
