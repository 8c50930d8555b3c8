"""The choice of backends on a machine: checks, margins, the stored file, and replay."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import types

import pytest
import torch

from rlsedit_fast import doctor, ops
from rlsedit_fast.errors import BackendError, InputError
from rlsedit_fast.ops import choices, cpu, dispatch, measurement, reference, selection
from rlsedit_fast.ops.choices import Choice, Choices
from rlsedit_fast.ops.sizes import SizeClass, copies, problem, size_class

CPU = torch.device("cpu")
SIZES = [
    SizeClass("panel", (128,), 16),
    SizeClass("factor", (128, 32), 64),
    SizeClass("downdate_", (128,), 8),
    SizeClass("correct_", (32, 128), 4),
    SizeClass("correct_split_", (32, 128), 4),
    SizeClass("moment_", (128,), 128, torch.bfloat16),
]
D, N = 300, 10  # measured: 90,000 numbers


class Fake:
    """A backend whose operations are the reference, changed by `alter`."""

    def __init__(self, alter=None, *, ops=("panel",)):
        self.calls, self.BATCHED = 0, frozenset()
        self.OPS = {op: self.made(reference.OPS[op], alter) for op in ops}

    def made(self, real, alter):
        def run(*arguments):
            self.calls += 1
            result = real(*arguments)
            if alter:
                result = alter(arguments[0] if result is None else result) or result
            return result

        return run

    def unavailable_reason(self):
        return None

    def unsupported_reason(self, op, tensors):
        return None

    def preferred(self, size):
        return False


def bad(kind):
    def alter(result):
        if kind == "fails":
            raise RuntimeError("out of registers\nin a kernel")
        first = result[0] if isinstance(result, tuple) else result
        if kind == "wrong":
            first.view(-1)[-1] += 0.01
        if kind == "nan":
            first.view(-1)[0] = torch.nan
        return None

    return alter


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A CPU with the backends reference and `triton`, whose times are those of a table."""
    monkeypatch.setenv("RLSEDIT_TUNE", "1")
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RLSEDIT_BACKEND", raising=False)
    monkeypatch.setattr(dispatch, "CANDIDATES", {"cpu": ("reference", "triton")})
    monkeypatch.setattr(dispatch, "_used", {})
    here = types.SimpleNamespace(fake=Fake(), ms={"reference": 1.0, "triton": 0.1}, timed=[], folder=tmp_path / "cache")
    load = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda name: here.fake if name == "triton" else load(name))

    def times(size, runs, device, *, seconds=0):
        here.timed.append(size.key)
        return {name: [here.ms[name]] * 3 for name in runs}, {}

    monkeypatch.setattr(measurement, "times", times)
    here.new_process = dispatch.forget_selections
    here.new_process()
    dispatch._log_once.cache_clear()
    yield here
    here.new_process()


def run(n=N, d=D, **options):
    """Runs a panel and returns the name of the backend that ran."""
    keys = torch.randn(n, d)
    ops.panel(torch.eye(d), keys, keys[:0], keys[:0, 0], **options)
    return dispatch.used().get(size_class("panel", (torch.empty(d, d), keys)).key)


def stored(machine):
    (path,) = machine.folder.glob("backends-*.json")
    return json.loads(path.read_text()), path


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.op)
def test_check_accepts_correct_backends(size):
    for module in (reference, cpu):
        if size.op in module.OPS and module.unavailable_reason() is None:
            assert measurement.check(size, module.OPS[size.op], CPU) is None, module


@pytest.mark.parametrize("kind", ["wrong", "nan", "fails"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.op)
def test_check_rejects_wrong_and_failing_backends(size, kind):
    if size.op == "correct_split_" and kind != "fails":
        kind = "nan"
    run = Fake(bad(kind), ops=(size.op,)).OPS[size.op]
    expected = {
        "wrong": "relative error|failed pivot",
        "nan": "not finite",
        "fails": "RuntimeError: out of registers in a",
    }
    assert re.search(expected[kind], measurement.check(size, run, CPU))


@pytest.mark.parametrize("size", [size for size in SIZES if size.op in ("panel", "downdate_", "correct_")], ids=str)
def test_check_rejects_operands_in_tf32(size):
    """C loses positive definiteness with them."""

    def tf32(*arguments):
        def cut(tensor):
            return (tensor.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)

        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        rest = [cut(tensor) for tensor in tensors[1:]]
        if size.op == "panel":
            return reference.panel(cut(tensors[0]), *rest)
        return reference.OPS[size.op](tensors[0], *rest, *arguments[len(tensors) :])

    assert "relative error" in measurement.check(size, tf32, CPU)


def test_check_rejects_a_factor_that_reports_no_failure():
    def silent(*arguments):
        u, a, lower, info = reference.factor(*arguments)
        return u, a, lower, torch.zeros_like(info)

    assert "not positive definite" in measurement.check(SIZES[1], silent, CPU)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.op)
def test_times_every_backend_at_a_limited_size(size, monkeypatch):
    monkeypatch.setattr(measurement, "CAPS", {"cpu": (64, 1 << 14)})
    shapes = set()

    def watched(*arguments):
        shapes.add(tuple(arguments[0].shape))
        return reference.OPS[size.op](*arguments)

    def failing(*arguments):
        raise RuntimeError("no image")

    runs = {"one": watched, "two": reference.OPS[size.op], "three": failing}
    found, failed = measurement.times(size, runs, CPU, seconds=0)
    assert {name: len(each) for name, each in found.items()} == {"one": 3, "two": 3}
    assert all(ms > 0 for each in found.values() for ms in each)
    assert failed == {"three": "it fails (RuntimeError: no image)"}
    assert all(max(shape) <= 64 or size.op == "factor" for shape in shapes)


def test_problems_have_the_sizes_of_their_class():
    for size in SIZES:
        tensors, _ = problem(size, CPU)
        assert size_class(size.op, tensors) == size
        assert size.numbers == max(t.numel() for t in tensors if size.op != "panel" or t is tensors[0])
        assert all(torch.equal(one, other) for one, other in zip(copies((tensors, ())), tensors, strict=True))
    assert size_class("moment_", (torch.empty(3, 3), torch.empty(100, 3))).key == "moment_ d=3 t=128 float32"
    large = SizeClass("downdate_", (16384,), 512).within(4096, 1 << 32)
    assert (1 << 31) < large.work <= 1 << 32
    assert large.rows == 512


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.op)
def test_settings_and_random_numbers_of_the_caller_do_not_matter(size):
    state, before = torch.get_rng_state(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert measurement.check(size, reference.OPS[size.op], CPU) is None
        tensors, _ = problem(size, CPU)
    finally:
        torch.set_default_dtype(before)
    assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.bfloat16, torch.int16}
    assert torch.equal(torch.get_rng_state(), state)


def test_first_use_measures_stores_and_reports_once(machine, caplog):
    with caplog.at_level(logging.INFO, logger="rlsedit_fast.ops"):
        assert [run(), run(9), run()] == ["triton"] * 3
    text, path = stored(machine)
    assert text["identity"].keys() >= {"device", "threads", "torch", "rlsedit-fast", "backends"}
    assert text["choices"] == {
        "panel d=362 n=16": {"backend": "triton", "ms": {"reference": 1.0, "triton": 0.1}, "excluded": {}}
    }
    assert machine.timed == ["panel d=362 n=16"]
    (message,) = [m for m in caplog.messages if "stored in" in m]
    assert message == f"panel d=362 n=16 uses triton (reference 1 ms, triton 0.1 ms); stored in {path}"
    machine.new_process()
    machine.ms = {"reference": 1.0, "triton": 9.0}
    assert run() == "triton", "the stored choice"
    assert len(machine.timed) == 1


@pytest.mark.parametrize(("ms", "expected"), [(0.82, "triton"), (0.85, "reference"), (1.5, "reference")])
def test_default_is_left_only_by_a_clear_margin(machine, ms, expected):
    machine.ms["triton"] = ms
    assert run() == expected


def test_default_is_left_only_if_every_round_is_clear(machine, monkeypatch):
    monkeypatch.setattr(
        measurement, "times", lambda *_, **__: ({"reference": [1.0, 1.0, 1.0], "triton": [0.1, 0.1, 0.9]}, {})
    )
    assert run() == "reference"


def test_slow_backend_is_measured_and_not_used(machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("RLSEDIT_TUNE", "1")
    monkeypatch.setenv("RLSEDIT_CACHE", str(machine.folder))
    import time

    fake = Fake(lambda result: time.sleep(0.02))
    here = selection.Selection(Choices(choices.identity(CPU, ["reference", "triton"])), CPU)
    runs = {"reference": reference.panel, "triton": fake.OPS["panel"]}
    size = SizeClass("panel", (256,), 4)
    assert here.backend(size, lambda: runs, [*runs], "triton") == "reference"
    assert here.backend(size, lambda: pytest.fail("is known"), [*runs], "triton") == "reference"


@pytest.mark.parametrize("kind", ["wrong", "nan", "fails"])
def test_bad_backend_is_excluded_and_reported_and_never_used(machine, caplog, kind):
    machine.fake = Fake(bad(kind))
    assert run() == "reference"
    calls = machine.fake.calls
    assert run() == "reference"
    machine.new_process()
    assert run() == "reference"
    assert machine.fake.calls == calls
    (message,) = [m for m in caplog.messages if "'triton' is not used for panel" in m]
    text, _ = stored(machine)
    assert text["choices"]["panel d=362 n=16"]["excluded"]["triton"] in message


def test_bad_default_is_replaced_by_the_reference(machine):
    machine.fake = Fake(bad("wrong"))
    machine.fake.preferred = lambda size: True
    dispatch.CANDIDATES["cpu"] = ("triton", "reference")
    assert run() == "reference"


def test_backend_and_environment_override_the_choice(machine, monkeypatch):
    assert run(backend="reference") is None
    monkeypatch.setenv("RLSEDIT_BACKEND", "reference")
    assert run() is None
    monkeypatch.setenv("RLSEDIT_BACKEND", "reference,cpu")
    assert run() is None
    assert not machine.timed
    monkeypatch.setenv("RLSEDIT_BACKEND", "cuda")
    with pytest.raises(BackendError, match="'cuda'"):
        run()


def test_nothing_is_measured_when_switched_off_or_small_or_without_an_alternative(machine, monkeypatch):
    assert run(d=150) == "reference"
    machine.fake.OPS = {}
    assert run() == "reference"
    machine.fake.OPS = {"panel": reference.panel}
    assert run() == "reference"
    machine.fake = Fake()
    with dispatch.unmeasured():
        assert run() == "reference"
    monkeypatch.setenv("RLSEDIT_TUNE", "0")
    assert run() == "reference"
    assert not machine.timed
    assert not machine.folder.exists()
    monkeypatch.setenv("RLSEDIT_TUNE", "yes")
    with pytest.raises(InputError, match="RLSEDIT_TUNE='yes': expected 1"):
        run()


def test_a_process_stops_measuring_after_its_time(machine, monkeypatch):
    monkeypatch.setattr(selection, "SECONDS", {"cpu": 1e-9})
    assert [run(), run(100), run()] == ["triton", "reference", "triton"]
    machine.new_process()
    assert run(100) == "triton"
    assert machine.timed == ["panel d=362 n=16", "panel d=362 n=128"]


@pytest.mark.parametrize(
    "content",
    [
        "{ not json",
        "[]",
        "\xff",
        '{"kind": "rlsedit backends 1"}',
        '{"kind": "other", "identity": {}, "choices": {}}',
        '{"kind": "rlsedit backends 1", "identity": {"torch": "1.0"}, "choices": {}}',
        "choices: 3",
        "choices: backend missing",
    ],
)
def test_damaged_or_foreign_file_is_ignored_and_written_again(machine, caplog, content):
    run()
    text, path = stored(machine)
    if content.startswith("choices: "):
        wrong = 3 if content.endswith("3") else {"panel d=362 n=16": {"ms": {}}}
        content = json.dumps(text | {"choices": wrong})
    path.write_bytes(content.encode("latin-1"))
    machine.new_process()
    machine.ms = {"reference": 1.0, "triton": 9.0}
    caplog.clear()
    assert run() == "reference"
    assert stored(machine)[0]["choices"]["panel d=362 n=16"]["backend"] == "reference"
    assert any(str(path) in m for m in caplog.messages if "ignored" in m)


def test_unwritable_cache_is_reported_once_and_the_defaults_are_used(machine, caplog):
    machine.folder.write_text("a file in place of the folder")
    assert [run(), run(100)] == ["reference", "reference"]
    assert not machine.timed
    (message,) = [m for m in caplog.messages if "cannot be written" in m]
    assert "RLSEDIT_CACHE" in message


def test_choices_of_a_read_only_cache_are_used(machine, monkeypatch, caplog):
    run()

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Choices, "_locked", refuse)
    machine.new_process()
    assert [run(), run(100)] == ["triton", "reference"]
    assert sum("Permission denied" in m for m in caplog.messages) == 1


A, B, C = (f"panel d=512 n={n}" for n in (1, 2, 4))


def test_two_processes_agree_on_the_first_choice(machine):
    about = choices.identity(CPU, ["reference", "triton"])
    one, other = Choices(about), Choices(about)
    one.store({A: Choice("triton"), B: Choice("cpu")})
    assert other.store({A: Choice("reference"), C: Choice("cuda")})[A].backend == "triton"
    assert {key: choice.backend for key, choice in one.read().items()} == {A: "triton", B: "cpu", C: "cuda"}
    assert one.store({A: Choice("reference")}, replace=True)[A].backend == "reference"


def store_many(folder, width):
    own = Choices({"device": "GPU/0: a"}, folder)
    for i in range(20):
        keys = f"panel d=512 n={2**i}", f"downdate_ d={width} r={2**i}"
        assert own.store({key: Choice("cpu") for key in keys})


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    assert in_processes(store_many, (tmp_path, 512), (tmp_path, 1024)) == [0, 0]
    found = Choices({"device": "GPU/0: a"}, tmp_path).read()
    assert len(found) == 60
    assert not list(tmp_path.glob("*.tmp"))


def test_other_versions_threads_and_backends_have_their_own_file(machine, monkeypatch):
    def path():
        return Choices(choices.identity(CPU, ["reference"])).path

    first = path()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert path() != first
    monkeypatch.undo()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert Choices(choices.identity(CPU, ["reference"]), first.parent).path != first
    finally:
        torch.set_num_threads(before)
    assert Choices(choices.identity(CPU, ["reference", "cpu"]), first.parent).path != first


def die_while_trying(own):
    with own.trying("panel", "triton"):
        os._exit(3)


def in_processes(function, *each):
    """Runs a function in forked processes at once, and returns their exit codes."""
    started = [multiprocessing.get_context("fork").Process(target=function, args=given) for given in each]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def test_backend_that_ended_a_process_is_excluded(monkeypatch, tmp_path):
    """A kernel that crashes the process must not do so again."""
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path))
    here = Choices({"device": "GPU"})
    with here.trying("panel", "cuda"):
        assert not here.crashed("panel"), "this process runs"
    assert in_processes(die_while_trying, (here,)) == [3]
    assert here.crashed("panel").keys() == {"triton"}
    assert "a process ended" in here.crashed("panel")["triton"]
    assert not here.crashed("factor")
    fake = Fake()
    one = selection.Selection(here, CPU)
    choice = one.measure(
        SizeClass("panel", (300,), 4), {"reference": reference.panel, "triton": fake.OPS["panel"]}, "triton"
    )
    assert choice.backend == "reference"
    assert not fake.calls
    here.forget_crashes()
    assert not here.crashed("panel")


def test_too_little_memory_decides_nothing(machine, monkeypatch, caplog):
    def full(*arguments):
        raise torch.OutOfMemoryError("no memory")

    machine.fake.OPS = {"panel": full}
    with caplog.at_level(logging.INFO, logger="rlsedit_fast.ops"):
        assert run() == "reference"
    assert not list(machine.folder.glob("*.json"))
    assert any("not enough memory" in m for m in caplog.messages)


def test_device_that_fails_after_a_kernel_excludes_the_kernel(machine, monkeypatch, caplog):
    """After an illegal access on a GPU, every later call raises."""
    machine.fake = Fake(bad("fails"))

    def broken(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    real, calls = measurement.problem, []

    def once(*given, **options):
        calls.append(1)
        return real(*given, **options) if len(calls) == 1 else broken()

    monkeypatch.setattr(measurement, "problem", once)
    dispatch.CANDIDATES["cpu"] = ("triton", "reference")
    assert run() == "reference"
    assert stored(machine)[0]["choices"]["panel d=362 n=16"]["excluded"].keys() == {"triton"}


def test_pinned_backends_are_used_where_they_can_run(machine):
    assert run() == "triton"
    with dispatch.pinned({"panel d=362 n=16": "reference"}):
        assert run() == "reference"
        assert run(100) == "triton"
    with dispatch.pinned({"panel d=362 n=16": "cuda"}):
        assert run() == "triton"
    assert run() == "triton"


def test_doctor_shows_the_stored_choice(machine, capsys):
    run()
    doctor.main([])
    text = capsys.readouterr().out
    assert str(stored(machine)[1]) in text
    assert "panel d=362 n=16" in text
    assert "reference 1 ms" in text


def test_doctor_tune_measures_common_and_stored_sizes(machine, monkeypatch, capsys):
    from rlsedit_fast.cli import main
    from rlsedit_fast.ops import tune

    run(100)
    monkeypatch.setattr(tune, "WIDTHS", ((300, 64),))
    monkeypatch.setattr(tune, "EDITS", (16,))
    machine.ms = {"reference": 1.0, "triton": 9.0}
    assert main(["doctor", "--tune", "--json"]) == 0
    (about,) = json.loads(capsys.readouterr().out)["choices"]
    assert about["path"] == str(stored(machine)[1])
    assert {key: choice["backend"] for key, choice in about["choices"].items()} == {
        "panel d=362 n=16": "reference",
        "panel d=362 n=128": "reference",
    }
    assert run() == "reference"
    machine.new_process()
    monkeypatch.setattr(Choices, "writable", lambda self: False)
    assert main(["doctor", "--tune"]) == 2
    assert "set RLSEDIT_CACHE" in capsys.readouterr().err


def test_cuda_identity_has_driver_capability_and_versions(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    driver = tmp_path / "version"
    monkeypatch.setattr(choices, "_DRIVER", driver)
    paths = set()
    for text, precision in (
        ("NVRM version: 580.1\nGCC", ""),
        ("NVRM version: 590.2\nGCC", ""),
        (None, ""),
        (None, "ieee"),
    ):
        driver.unlink(missing_ok=True) if text is None else driver.write_text(text)
        monkeypatch.setenv("RLSEDIT_TRITON_PRECISION", precision)
        about = choices.identity(torch.device("cuda", 0), ["reference", "triton"])
        assert about["driver"] == (text.splitlines()[0] if text else "unknown")
        assert (about["capability"], about["device"], about["triton"]) == (
            "9.0",
            "NVIDIA H200",
            choices.version("triton"),
        )
        paths.add(Choices(about, tmp_path).path)
    assert len(paths) == 4
    assert all(path.name.startswith("backends-NVIDIA-H200-") for path in paths)


def test_new_state_measures_nothing(machine):
    """It runs every operation once, at a size that may never be used."""
    import rlsedit_fast as rf

    machine.fake = Fake(ops=("panel", "factor", "downdate_", "correct_"))
    state = rf.RLSState(torch.zeros(300, 300), rf.Prior(lam=1.0))
    assert not machine.timed
    state.update(torch.ones(1, 300), torch.ones(1, 300))
    assert {key.split()[0] for key in machine.timed} == {"panel", "correct_"}


def test_missing_home_folder_does_not_fail_an_operation(machine, monkeypatch, caplog):
    def none():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("rlsedit_fast.files.Path.home", none)
    monkeypatch.delenv("RLSEDIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    dispatch._warn_once.cache_clear()
    assert [run(), run()] == ["reference"] * 2
    assert sum("no cache folder" in m for m in caplog.messages) == 1
    assert doctor.report()["choices"] == []


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.op)
def test_backends_of_a_gpu_are_measured(size, monkeypatch, tmp_path):
    monkeypatch.setenv("RLSEDIT_CACHE", str(tmp_path))
    device = torch.device("cuda", 0)
    tensors, _ = problem(size, device)
    names, default = dispatch.alternatives(size, tensors)
    here = selection.Selection(dispatch.choices_of(device), device)
    choice = here.measure(size, dispatch.runs(size.op, names), default)
    assert not choice.excluded
    assert choice.ms.keys() == set(names) or len(names) == 1
