"""The store keeps what is whole, computes what is missing, and never uses or loses what is damaged."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dgutils.errors import UserError
from dgutils.files import digest_of_file, lock, save_array, write_file
from dgutils.pipeline.store import Store, canonical_json, read_manifest

REPO = Path(__file__).parent.parent
CONFIG = {"num_steps": 18, "weight": 2.0, "window": [0.01, 1.0]}


@pytest.fixture
def lines():
    return []


@pytest.fixture
def store(tmp_path, lines):
    return Store(tmp_path / "runs", log=lines.append)


def numbers(folder):
    """A step that writes two files."""
    save_array(folder / "a.npy", np.arange(1000.0))
    (folder / "sub").mkdir()
    (folder / "sub" / "note.txt").write_text("hello")


def forbidden(_):
    raise AssertionError("computed what was there")


def rows_of(seeds):
    """A sharded step: rows are functions of their seeds."""
    images = [np.random.default_rng(seed).integers(0, 256, (4, 4), np.uint8) for seed in seeds]
    return {"images": np.array(images), "seed": np.array(seeds)}


def run_python(code, *arguments, **options):
    """Start a Python process on the store module."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=REPO, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def remove(path):
    path.unlink()


# --- identity


def test_digest_does_not_depend_on_key_order_or_number_form(store):
    other = {"window": (0.01, 1), "weight": np.float64(2), "num_steps": 18.0}
    assert store.artifact("generate", 1, CONFIG).digest == store.artifact("generate", 1, other).digest
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'


def test_digest_depends_on_every_component(store):
    base = dict(step="generate", version=1, config=CONFIG, inputs={"images": "ab"})
    changes = [{}, {"step": "train"}, {"version": 2}, {"config": CONFIG | {"weight": 2.0000001}},
               {"config": CONFIG | {"seed": None}}, {"config": CONFIG | {"weight": "2"}},
               {"config": CONFIG | {"window": [1.0, 0.01]}}, {"inputs": {"images": "ac"}},
               {"inputs": {"labels": "ab"}}, {"inputs": {}}]
    digests = [store.artifact(**(base | change)).digest for change in changes]
    shards = [store.artifact(**base).shards(*size).artifact.digest for size in ((10,), (20,), (10, 10))]
    assert len(set(digests + shards)) == len(digests) + len(shards)


def test_digest_of_n_rows_depends_on_n(store):
    fakes = store.artifact("generate", 1, CONFIG).shards(10)
    assert fakes.digest(10) != fakes.digest(11)


@pytest.mark.parametrize("config, words", [
    ({"s_max": float("inf")}, "s_max is inf"), ({"a": {"b": float("nan")}}, r"a\.b is nan"),
    ({"path": Path("x")}, "path is Posix"), ({"x": np.zeros(2)}, "x is array"), ({1: 2}, "config is {1: 2}, which")])
def test_config_that_is_not_json_is_refused(store, config, words):
    with pytest.raises(UserError, match=words):
        store.artifact("generate", 1, config)


def test_digest_of_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert digest_of_file(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")  # FIPS 180-2


# --- simple artifacts


def test_miss_computes_and_hit_does_not(store, lines):
    artifact = store.artifact("train", 1, CONFIG, label="member 1").ensure(numbers)
    again = store.artifact("train", 1, CONFIG, label="member 1").ensure(forbidden)
    assert [line.split()[0] for line in lines] == ["MISS", "HIT"]
    assert lines[0] == f"MISS train {artifact.digest[:16]} (member 1): not found"
    assert (again.path / "sub" / "note.txt").read_text() == "hello"
    manifest = read_manifest(again.path)
    assert set(manifest["files"]) == {"a.npy", "sub/note.txt"}
    assert manifest["files"]["a.npy"] == {"sha256": digest_of_file(again.path / "a.npy")}
    assert {"created", "seconds", "device", "revision", "versions", "identity"} <= manifest.keys()
    assert sorted(path.name for path in store.root.iterdir()) == ["locks", "train"]


def test_not_computed_says_so(store):
    with pytest.raises(UserError, match="run its step"):
        store.artifact("train", 1, {}).shards(10).load(5, "images")


@pytest.mark.parametrize("name", ["a.npy", "sub/note.txt", "manifest.json"])
@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, foreign, remove])
def test_damaged_file_is_quarantined_and_computed_again(store, lines, damage, name):
    artifact = store.artifact("train", 1, CONFIG).ensure(numbers)
    digest = digest_of_file(artifact.path / "a.npy")
    damage(artifact.path / name)
    damaged = (artifact.path / name).read_bytes() if damage is not remove else None
    assert artifact.lacks()
    store.artifact("train", 1, CONFIG).ensure(numbers)
    kept = store.root / "quarantine" / f"{artifact.name}.0" / name
    assert (kept.read_bytes() if kept.exists() else None) == damaged
    assert digest_of_file(artifact.path / "a.npy") == digest and not artifact.lacks()
    assert sum(line.startswith("QUARANTINED") and Path(name).name in line for line in lines) == 1


def test_second_quarantine_keeps_the_first(store):
    artifact, kept = store.artifact("train", 1, CONFIG), store.root / "quarantine"
    for i in range(3):
        truncate(artifact.ensure(numbers).path / "a.npy")
        if i == 2:
            (kept / f"{artifact.name}.0").rename(kept / "examined")
    artifact.ensure(numbers)
    assert sorted(path.name for path in kept.iterdir()) == ["examined"] + [f"{artifact.name}.{i}" for i in (0, 1)]


@pytest.mark.parametrize("place", [lambda link: link.write_text("mine"), lambda link: link.symlink_to("nowhere")])
def test_foreign_thing_in_an_artifacts_place_is_quarantined(store, lines, place):
    """A file where the artifact's folder, or a shard's, belongs."""
    artifact, fakes = store.artifact("train", 1, CONFIG), store.artifact("generate", 1, CONFIG).shards(10)
    for path in (artifact.path, fakes.artifact.path / "shard_00000"):
        path.parent.mkdir(parents=True)
        place(path)
    assert not artifact.ensure(numbers).lacks() and len(fakes.ensure(5, rows_of).load(5, "seed")) == 5
    assert sum(line.startswith("QUARANTINED") for line in lines) == 2
    assert all(path.is_symlink() or path.read_text() == "mine" for path in (store.root / "quarantine").iterdir())


@pytest.mark.parametrize("blocked", ["a.npy", "manifest.json"])
def test_folder_in_a_files_place_is_quarantined(store, lines, blocked):
    path = store.artifact("train", 1, CONFIG).ensure(numbers).path / blocked
    path.unlink()
    path.mkdir()
    assert not store.artifact("train", 1, CONFIG).ensure(numbers).lacks()
    assert any(line.startswith("QUARANTINED") and blocked in line for line in lines)


@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, foreign])
def test_damaged_state_of_unfinished_work_is_quarantined_and_the_work_begun_again(store, lines, damage):
    assert store.load_partial("train-x") is None
    for state in (b"first", bytes(range(256))):
        store.save_partial("train-x", state)
    assert store.load_partial("train-x") == state and lines == []
    path = store.root / "partial" / "train-x"
    damage(path)
    damaged = path.read_bytes()
    assert store.load_partial("train-x") is None and store.load_partial("train-x") is None
    assert (store.root / "quarantine" / "train-x.0").read_bytes() == damaged
    assert len(lines) == 1 and lines[0].startswith("QUARANTINED train-x: ") and "beginning it again" in lines[0]
    store.save_partial("train-x", state)
    store.drop_partial("train-x")
    store.drop_partial("train-x")
    assert list((store.root / "partial").iterdir()) == []


def test_artifact_of_another_identity_is_not_used(store):
    one = store.artifact("train", 1, CONFIG).ensure(numbers)
    two = store.artifact("train", 2, CONFIG)
    os.rename(one.path, two.path)
    assert "another artifact's" in two.lacks()


def test_failing_step_leaves_nothing(store):
    def fail(folder):
        numbers(folder)
        raise KeyError("broken step")

    with pytest.raises(KeyError, match="broken step"):
        store.artifact("train", 1, CONFIG).ensure(fail)
    assert list((store.root / "train").iterdir()) == []


# --- sharded sets


def test_rows_are_keyed_by_seed_and_a_larger_set_extends_a_smaller_one(store, lines):
    seeds = []

    def compute(shard):
        seeds.extend(shard)
        return rows_of(shard)

    def fakes():
        return store.artifact("generate", 1, CONFIG).shards(10, first_seed=100)

    fakes().ensure(15, compute)
    first = fakes().load(15, "images")
    fakes().ensure(15, forbidden).ensure(3, forbidden)
    assert [part.shard for part in fakes().missing(35)] == [2, 3]
    fakes().ensure(35, compute)
    assert seeds == list(range(100, 140))
    assert np.array_equal(fakes().load(35, "images"), rows_of(range(100, 135))["images"])
    assert np.array_equal(fakes().load(15, "images"), first) and len(first) == 15
    digest = fakes().artifact.digest[:16]
    assert lines == [f"MISS generate {digest}: 15 rows, 0 of 2 shards stored",
                     f"HIT generate {digest}: 15 rows",
                     f"HIT generate {digest}: 3 rows",
                     f"MISS generate {digest}: 35 rows, 2 of 4 shards stored"]


@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, foreign, remove])
def test_damaged_shard_is_quarantined_and_only_it_computed_again(store, lines, damage):
    fakes = store.artifact("generate", 1, CONFIG).shards(10)
    fakes.ensure(30, rows_of)
    before = fakes.load(30, "images")
    damage(fakes.artifact.path / "shard_00001" / "images.npy")
    computed = []

    def compute(seeds):
        computed.append(seeds)
        return rows_of(seeds)

    again = store.artifact("generate", 1, CONFIG).shards(10)
    with pytest.raises(UserError, match="shard_00001 is missing or damaged"):
        again.load(30, "images")
    assert np.array_equal(again.ensure(30, compute).load(30, "images"), before)
    assert computed == [range(10, 20)]
    assert any(line.startswith("QUARANTINED") and "images.npy" in line for line in lines)
    assert (store.root / "quarantine" / f"{fakes.artifact.name}-shard_00001.0" / "seed.npy").exists()


def test_shard_in_another_shards_place_is_not_used(store):
    fakes = store.artifact("generate", 1, CONFIG).shards(10)
    fakes.ensure(20, rows_of)
    before = fakes.load(20, "seed")
    zero, one, aside = (fakes.artifact.path / name for name in ("shard_00000", "shard_00001", "aside"))
    for old, new in ((zero, aside), (one, zero), (aside, one)):
        os.rename(old, new)
    again = store.artifact("generate", 1, CONFIG).shards(10)
    assert len(again.missing(20)) == 2
    assert np.array_equal(again.ensure(20, rows_of).load(20, "seed"), before)


@pytest.mark.parametrize("compute, error", [
    (lambda seeds: {"images": np.zeros((3, 2))}, "3 rows of images for 10 seeds"),
    (lambda seeds: {"images": np.array([{}] * 10)}, "Object arrays")])
def test_wrong_rows_are_refused(store, compute, error):
    with pytest.raises(ValueError, match=error):
        store.artifact("generate", 1, CONFIG).shards(10).ensure(5, compute)


def test_wrong_counts_are_refused(store):
    fakes = store.artifact("generate", 1, CONFIG).shards(10).ensure(5, rows_of)
    with pytest.raises(UserError, match="at least 1"):
        fakes.load(0, "images")
    with pytest.raises(UserError, match="shard size 0"):
        store.artifact("generate", 1, CONFIG).shards(0)


# --- whatever the parameters

NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)

SMALL = st.recursive(  # so that many pairs differ by little
    st.sampled_from([None, 0, "0", {}, []]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.just("0"), inner), max_leaves=3)


@given(value=JSON, data=st.data())
def test_identity_is_its_meaning(value, data):
    """Equal for another order of keys, tuples for lists, whole floats for integers; its canonical form reads back."""

    def retold(value):
        if isinstance(value, dict):
            return {key: retold(value[key]) for key in data.draw(st.permutations(list(value)))}
        if isinstance(value, list):
            return tuple(map(retold, value))
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if whole and data.draw(st.booleans()) else value

    assert canonical_json(retold(value)) == canonical_json(value)
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


@settings(max_examples=100)
@given(one=SMALL, other=SMALL)
def test_what_is_not_stored_is_never_a_hit(one, other):
    """An identity hits what was stored under its own meaning, and nothing else."""
    with tempfile.TemporaryDirectory() as root:
        store = Store(root, lambda line: None)
        store.artifact("train", 1, {"x": one}).ensure(lambda folder: None)
        lacks = store.artifact("train", 1, {"x": other}).lacks()
        assert bool(lacks) == (canonical_json(one) != canonical_json(other))


def meaning(name, content):
    """The JSON of a manifest, which white space does not change; any other file's bytes."""
    try:
        return json.loads(content) if name == "manifest.json" else content
    except ValueError:
        return None


@settings(max_examples=40)
@given(name=st.sampled_from(["a.npy", "sub/note.txt", "manifest.json"]), where=st.integers(0, 10**6 - 1),
       change=st.integers(0, 4))
def test_any_change_of_any_byte_is_found(name, where, change):
    with tempfile.TemporaryDirectory() as root:
        artifact = Store(root, lambda line: None).artifact("train", 1, CONFIG).ensure(numbers)
        path = artifact.path / name
        whole = path.read_bytes()
        at = where * len(whole) // 10**6  # a manifest's length varies with the time of day
        before, byte, after = whole[:at], whole[at], whole[at + 1 :]
        changed = [before, before + after, before + bytes([byte ^ 1]) + after, whole + b"\0",
                   whole[at:] + before][change]
        path.write_bytes(changed)
        same = meaning(name, changed) == meaning(name, whole)
        assert bool(artifact.lacks()) != same
        artifact.ensure(numbers)
        assert not artifact.lacks() and len(list(Path(root).glob("quarantine/*"))) == (not same)


class SetOfRows(RuleBasedStateMachine):
    """Any order of asking, damaging and starting anew: rows are always those of their seeds, nothing is lost."""

    @initialize(size=st.integers(1, 7), first_seed=st.integers(0, 2**40))
    def begin(self, size, first_seed):
        self.folder, self.size, self.first_seed = tempfile.TemporaryDirectory(), size, first_seed
        self.whole, self.computed, self.quarantined = set(), [], 0
        self.restart()

    @rule()
    def restart(self):
        self.store = Store(self.folder.name, lambda line: None)
        self.rows = self.store.artifact("generate", 1, CONFIG).shards(self.size, self.first_seed)

    @rule(n=st.integers(1, 30))
    def ask(self, n):
        self.computed.clear()
        self.rows.ensure(n, self.compute)
        wanted = set(range(-(-n // self.size)))
        assert set(self.computed) == wanted - self.whole and len(self.computed) == len(set(self.computed))
        self.whole |= wanted
        assert self.rows.load(n, "seed").tolist() == list(range(self.first_seed, self.first_seed + n))

    def compute(self, seeds):
        self.computed.append((seeds[0] - self.first_seed) // self.size)
        return {"seed": np.array(seeds)}

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), damage=st.sampled_from([flip_bit, truncate, empty, foreign, remove]))
    def hurt(self, data, damage):
        shard = data.draw(st.sampled_from(sorted(self.whole)))
        name = data.draw(st.sampled_from(["seed.npy", "manifest.json"]))
        damage(self.rows.artifact.path / f"shard_{shard:05d}" / name)
        self.whole.remove(shard)
        self.quarantined += 1
        self.restart()  # a running process has read its shards already

    @invariant()
    def nothing_is_deleted(self):
        if hasattr(self, "folder"):
            moved = len(list(self.store.root.glob("quarantine/*")))
            waiting = sum(bool(part.lacks()) and part.path.exists() for part in self.rows.parts(30))
            assert moved + waiting == self.quarantined

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestSetOfRows = SetOfRows.TestCase
TestSetOfRows.settings = settings(max_examples=15, stateful_step_count=12, deadline=None, derandomize=True)


# --- kills, other processes, disks

SAMPLER = """
import os, signal, sys, time
import numpy as np
from dgutils.pipeline.store import Store
root, kill_at, calls, others = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
real_rename = os.rename
count = 0
def rename(old, new):            # each shard: kill before it is renamed into place, or right after
    global count
    count += 1
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    real_rename(old, new)
    if count == -kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
def compute(seeds):
    with open(calls, "a") as file:
        file.write(f"{seeds[0]}\\n")
    while seeds[0] == 0 and others and len(open(calls).readlines()) < 4:
        time.sleep(0.01)         # until the other process has taken the other shards
    if kill_at == 100 and seeds[0] == 10:
        os._exit(9)              # in the middle of computing
    return {"images": np.array([np.random.default_rng(seed).bytes(64) for seed in seeds])}
Store(root).artifact("generate", 1, {}).shards(10).ensure(40, compute).load(40, "images")
"""


@pytest.mark.parametrize("kill_at", [1, 3, -2, 100])
def test_resumes_after_a_kill_with_the_same_bytes(tmp_path, kill_at):
    killed = run_python(SAMPLER, tmp_path / "a", kill_at, tmp_path / "calls", 0)
    assert killed.wait() == (9 if kill_at == 100 else -signal.SIGKILL)
    calls = []

    def compute(seeds):
        calls.append(seeds[0])
        return {"images": np.array([np.random.default_rng(seed).bytes(64) for seed in seeds])}

    sets = [Store(tmp_path / root).artifact("generate", 1, {}).shards(10) for root in ("a", "b")]
    sets[0].ensure(40, compute)
    assert calls == list(range({1: 0, 3: 20, -2: 20, 100: 10}[kill_at], 40, 10))
    sets[1].ensure(40, compute)
    arrays = [sorted(shards.artifact.path.rglob("*.npy")) for shards in sets]
    assert [path.read_bytes() for path in arrays[0]] == [path.read_bytes() for path in arrays[1]]
    assert len(arrays[0]) == 4 and not list(tmp_path.rglob("*.tmp"))


def test_two_processes_share_the_shards_of_one_set(tmp_path):
    processes = [run_python(SAMPLER, tmp_path / "runs", 0, tmp_path / "calls", 1) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sorted((tmp_path / "calls").read_text().split(), key=int) == ["0", "10", "20", "30"]


def test_two_processes_compute_a_simple_artifact_once_and_a_killed_one_leaves_no_lock(tmp_path):
    code = """
import sys, time
from dgutils.pipeline.store import Store
def make(folder):
    print("computing", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "x").write_text("x")
Store(sys.argv[1]).artifact("train", 1, {}).ensure(make)
"""
    killed = run_python(code, tmp_path, 60)
    assert killed.stdout.readline() == "computing\n"
    processes = [run_python(code, tmp_path, 0.2) for _ in range(2)]
    for process in processes:
        while "WAIT train" not in process.stderr.readline():
            assert process.poll() is None
    killed.kill()
    outputs = [process.communicate() for process in processes]
    assert sorted(out for out, _ in outputs) == ["", "computing\n"]
    killed.communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_the_file_system_has_no_locks_two_still_take_turns(tmp_path, monkeypatch, number):
    """As on Lustre or NFS; and a file that a dead process left in the lock's place stops nobody."""
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    held, path = [], tmp_path / "locks" / "a.lock"
    for wait in (True, False):
        with lock(path, wait, held.append) as ours, lock(path, False, held.append) as other:
            assert ours and not other
    script = (f"import fcntl, os, signal, sys\nfrom pathlib import Path\nfrom dgutils.pipeline.store import lock\n"
              f"def refuse(*a): raise OSError({number}, 'no')\nfcntl.flock = refuse\n"
              "with lock(Path(sys.argv[1]), True, print):\n    os.kill(os.getpid(), signal.SIGKILL)")
    assert run_python(script, path).wait(timeout=60) == -signal.SIGKILL
    with lock(path, True, held.append) as ours:
        assert ours


def test_unwritable_root_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("in the way")  # permissions would not stop root; a file does
    root = tmp_path / "file" / "runs"
    for use in (lambda a: a.ensure(numbers), lambda a: a.shards(10).ensure(5, rows_of)):
        with pytest.raises(UserError, match=f"cannot read and write under {root} .*not a directory") as error:
            use(Store(root, log=lambda line: None).artifact("train", 1, {}))
        assert "\n" not in str(error.value)


def test_read_only_store_still_gives_hits():
    code = """
import os
from dgutils.pipeline.store import Store
if os.geteuid() == 0:
    os.setuid(65534)  # nobody: permissions do not stop root
try:
    for version in (1, 2):
        Store(os.environ["ROOT"]).artifact("train", version, {}).ensure(lambda folder: None)
except ValueError as error:
    print(error)
"""
    with tempfile.TemporaryDirectory() as root:  # not below pytest's folder, which is closed to others
        Store(root, log=lambda line: None).artifact("train", 1, {}).ensure(numbers)
        folders = [Path(root), *(Path(root) / name for name in ("train", "locks"))]
        for folder in folders:
            folder.chmod(0o555)
        output, log = run_python(code, env=os.environ | {"ROOT": root}).communicate()
        for folder in folders:
            folder.chmod(0o755)
    assert "HIT train" in log and ": not found" in log
    assert output.startswith(f"cannot read and write under {root} (permission denied)")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "as the kernel says it"), OSError("1000 requested and 8 written"),  # NumPy's
    RuntimeError("I/O error: No space left on device (os error 28)")])  # that of safetensors
def test_full_disk_is_one_clear_line_and_what_was_done_stays(store, monkeypatch, error):
    def full(path):
        raise error

    fakes = store.artifact("generate", 1, CONFIG).shards(10).ensure(10, rows_of)
    with monkeypatch.context() as patch:
        patch.setattr("dgutils.files.sync", full)
        with pytest.raises(UserError, match="no space left under"):
            fakes.ensure(20, rows_of)
    assert [path.name for path in fakes.artifact.path.iterdir()] == ["shard_00000"]
    assert len(fakes.load(10, "images")) == 10


def test_errors_of_the_step_itself_pass(store):
    with pytest.raises(FileNotFoundError):
        store.artifact("train", 1, {}).ensure(lambda folder: Path("/no/such/file").read_text())


def test_write_file_replaces_whole(tmp_path):
    path = tmp_path / "x.json"
    for text in ("old", "new"):
        write_file(path, json.dumps(text).encode())
    assert path.read_text() == '"new"' and os.listdir(tmp_path) == ["x.json"]


def test_revision_is_dirty_by_code_and_not_by_results(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.com", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)

    def dirty():
        script = "from dgutils.machine import provenance; print(provenance()['revision'])"
        return subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, text=True,
                              stdout=subprocess.PIPE).stdout.strip().endswith("-dirty")  # fmt: skip

    shutil.copytree(REPO / "dgutils", tmp_path / "dgutils", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (tmp_path / "report/results").mkdir(parents=True)
    result = tmp_path / "report/results/01.json"
    result.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    assert not dirty()
    result.write_text("2")
    assert not dirty()
    with open(tmp_path / "dgutils/errors.py", "a") as file:
        file.write("# changed\n")
    assert dirty()
