"""Every benchmark at its smallest size; the result file has the fields that the documentation uses."""

import importlib
import json
import sys

import pytest
import torch

from rlsedit_fast.editing import EditConfig
from rlsedit_fast.evaluation.demo import CONFIG
from rlsedit_fast.ops import cpu

CONTEXT = {"what", "date", "load", "machine", "versions", "build"}
SEARCHED = ("mean_steps", "not_converged", "efficacy_strict", "generalization_strict", "neighbors_unchanged")

needs_native = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=f"no native kernels: {cpu.unavailable_reason()}"
)


@pytest.fixture
def result(tmp_path, monkeypatch):
    """Runs a script and returns its result; the output folder is created."""

    def run(name, *options):
        script = importlib.import_module(name)
        path = tmp_path / "made" / "result.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options), "--json", str(path)])
        script.main()
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found.keys() >= CONTEXT
        return found

    return run


@pytest.fixture
def few_anchors(monkeypatch):
    """Reduces the anchors of a script to a hundredth."""

    def take(name):
        script = importlib.import_module(name)
        every = script.anchor_texts
        monkeypatch.setattr(script, "anchor_texts", lambda world, seed: every(world, seed)[::100])
        return script

    return take


@needs_native
def test_panel(result):
    (row,) = result("panel", "--d", 64, "--n", 3, "--repeats", 1)["results"]
    assert row.keys() == {"d", "n", "native_ms", "torch_ms", "ratio"}


@needs_native
@pytest.mark.parametrize("op", ["downdate_", "moment_", "correct_split_"])
def test_native(op, result):
    found = result("native", op, "--d", 64, "--rows", 3, "--repeats", 1)
    assert found["what"] == f"{op} on the CPU"
    assert found["results"][0].keys() >= {"d", "rows", "native_ms", "torch_ms", "ratio"}


def test_step(result, tmp_path):
    pytest.importorskip("matplotlib")
    chart = tmp_path / "step.png"
    rows = result("step", "--d", 64, "--n", 1, 4, "--rounds", 1, "--chart", chart)["rows"]
    contenders = {f"{name}_s" for name in ("ours", "torch", "released", "update", "torch_update", "alphaedit", "memit")}
    assert [row["n"] for row in rows] == [1, 4]
    assert all(row.keys() >= {"d", "d_v", "delay", *contenders} for row in rows)
    assert chart.stat().st_size
    rows = result("step", "--d", 64, "--n", 2, "--delay", 4, 8, "--rounds", 1, "--no-solves")["rows"]
    assert [row["delay"] for row in rows] == [4, 8]


def test_torch_step_does_not_synchronize(monkeypatch):
    """`cholesky` reads the result of the factorization on the host; torch without it is the baseline."""
    step = importlib.import_module("step")
    monkeypatch.setattr(torch.linalg, "cholesky", lambda *_: pytest.fail("synchronizes"))
    keys, values, device = torch.randn(3, 20), torch.randn(3, 5), torch.device("cpu")
    step.Torch(20, device, torch.zeros(5, 20))(keys, values)
    rows, solved = step.whitened(keys, keys, values)
    sigma = torch.eye(3) + keys @ keys.T
    torch.testing.assert_close(rows.T @ solved, keys.T @ torch.linalg.solve(sigma, values))


def test_floor_of_a_panel_is_what_it_reads():
    """The CUDA panel reads one triangle of C, the Triton panel and torch read all of it."""
    gpu = importlib.import_module("gpu")
    whole = {name: gpu.least_bytes("panel", name, 1000, 1, 2) for name in ("reference", "triton", "triton graph")}
    half = {name: gpu.least_bytes("panel", name, 1000, 1, 2) for name in ("cuda", "cuda graph", "triton triangle")}
    assert set(whole.values()) == {2 * (4 * 1000**2 + 8 * 1000)}
    assert set(half.values()) == {2 * (2 * 1000**2 + 8 * 1000)}
    assert gpu.least_bytes("downdate_", "cuda", 1000, 1, 1) == gpu.least_bytes("downdate_", "triton", 1000, 1, 1)


def test_state_build(result):
    (row,) = result("state_build", "--d", 300, "--rounds", 1)["rows"]
    assert row["blocks residual"] < 1e-3
    assert row["ratio"] > 0


def test_masters(result):
    found = result("masters", "--d-v", 8, "--d-k", 16, "--updates", 3)
    assert [row["kept as"] for row in found["rows"]][:2] == ["float32", "two halves"]
    assert found["rows"][1]["difference from float32"] == 0


def test_moment_accuracy(result):
    found = result("moment_accuracy", "--d", 8, "--tokens", 10)
    assert all(row.keys() == {"sums", "rms error", "of the largest eigenvalue"} for row in found["rows"])


def test_solver_accuracy(result):
    found = result("solver_accuracy", "--d-k", 16, "--d-v", 4, "--updates", 4, "--removals", 1, "--conditions", 100)
    assert len(found["results"]) == 4
    for row in found["results"]:
        for stage in ("after_updates", "after_removals", "after_refresh"):
            assert row[stage].keys() == {"weight", "precision_inverse", "objective", "monitor_residual"}


def test_precision(result):
    rows = result("precision", "--d", 16, "--d-v", 4, "--updates", 3, "--norms", 1)["results"]
    assert {row["precision"] for row in rows} == {"ieee", "tf32x3", "bf16x6", "bf16x3", "tf32", "bf16"}
    assert all(row.keys() >= {"C", "W", "smallest_eigenvalue", "positive_definite"} for row in rows)


def test_search(result, few_anchors):
    few_anchors("search")
    rows = result("search", "--edits", 2, "--batch-size", 2, "--settings", "constrained (default)", "normalized 0.09")[
        "rows"
    ]
    assert [row["setting"] for row in rows] == ["constrained (default)", "normalized 0.09"]
    assert all(row.keys() >= {*SEARCHED, "same_subject_unchanged"} for row in rows)


def test_search_settings_are_valid():
    search = importlib.import_module("search")
    assert all(isinstance(EditConfig(**changes), EditConfig) for changes in search.SETTINGS.values())


@pytest.mark.soak
def test_values(result, monkeypatch):
    values = importlib.import_module("values")
    monkeypatch.setattr(
        values,
        "CONFIG",
        EditConfig(
            **{
                "search": {"steps": 4},
                **vars(CONFIG),
            }
        ),
    )
    found = result("values", "--models", "demo", "--requests", 1, "--repeats", 1)
    (row,) = found["rows"]
    assert row.keys() >= {*values.SHOWN, "one_by_one_stop_s", "step_s", "config"}
    assert row["max_delta_error"] < 1e-3
    assert row["nll_stop_ratio"] > 0


def test_edit_stream(result, few_anchors):
    few_anchors("edit_stream")
    found = result("edit_stream", "--edits", 4, "--batch-size", 2)
    assert len(found["batches"]) == 2
    parts = found["seconds_by_part"]
    assert all(parts[part] > 0 for part in parts if part != "store"), "a measured function was moved"
    assert found["flat"]["all"] > 0
    assert found.keys() >= {"edits_per_second", "share_by_part", "not_converged", "mean_steps", "state_bytes"}


def test_store(result, few_anchors, monkeypatch):
    store = few_anchors("store")
    monkeypatch.setattr(store, "D_K", 96)
    monkeypatch.setattr(store, "D_V", 64)
    found = result("store", "--edits", 4, "--batch-size", 2, "--stored", 20, "--halved", 2)
    assert found["batch"]["same_weights_as_without"]
    assert 0 < found["batch"]["share_in_store"] < 1
    assert [(one["keys"], one["batch_size"]) for one in found["open"]] == [("full", 100), ("fp16", 100), ("full", 10)]
    for one in found["open"]:
        assert one["same_weights"]
        assert one["edits_worst"] == one["edits_at_the_end"] == 20
        assert one.keys() >= {"open_seconds_worst", "changes_replayed_worst", "sizes", "bytes_per_edit"}
    assert all(one.keys() >= {"efficacy", "realized", "error_of_weight"} for one in found["rounding"])


@pytest.mark.soak
def test_demo_rate(result):
    (row,) = result("demo_rate", "--edits", 2, "--rounds", 1)["rows"]
    assert row["version"] == "now"
    assert row.keys() >= {"edits_per_second", "all_rates", "ratio", "mean_steps", "efficacy", "same_subject"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is available")
def test_gpu_reports_a_missing_device(result):
    with pytest.raises(SystemExit) as ended:
        result("gpu", "--d", 64, "--n", 1, "--layers", 1, "--repeats", 1)
    assert ended.value.code == 1


def test_gpu_cases_rejects_other_backends(monkeypatch, capsys):
    cases = importlib.import_module("gpu_cases")
    monkeypatch.setattr(sys, "argv", ["gpu_cases.py", "reference"])
    with pytest.raises(SystemExit):
        cases.main()
    assert "cuda" in capsys.readouterr().err
