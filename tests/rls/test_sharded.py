"""A state whose columns two or three processes hold, against a state in one process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rlsedit_fast.errors import InputError
from rlsedit_fast.rls import RLSState, ShardedColumns
from rlsedit_fast.rls.plan import batch_traffic, flush_traffic, held_width, shard_memory
from rlsedit_fast.rls.results import Saved

from . import sharded_worker as worker

SIZES = (1, 2, 3)
TOLERANCE = {"float64": 1e-10, "custom": 1e-10, "float32": 1e-4, "bfloat16": 1e-4}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process of each group found: `found[size][rank]`."""
    folder = tmp_path_factory.mktemp("sharded")
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, worker.__file__, str(folder)]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return {
        size: [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)] for size in SIZES
    }


@pytest.fixture(scope="module")
def alone():
    """The same scenarios in this process."""
    return {case: worker.scenario(case, *worker.whole()) for case in worker.CASES}


def joined(name, parts):
    """Returns the whole of what the processes hold a part of, or what all of them have."""
    if name in ("weight", "model"):
        return torch.cat(parts, 1)
    if name == "covariance":
        return torch.cat(parts)
    assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between the processes"
    return parts[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", worker.CASES)
def test_processes_that_share_a_weight_find_what_one_process_finds(found, alone, size, case):
    for stage, expected in alone[case].items():
        if stage in ("saved", "monitor"):
            continue
        for name, value in expected.items():
            whole = joined(name, [each[case][stage][name] for each in found[size]])
            allowed = 2**-8 if name == "model" and case == "bfloat16" else TOLERANCE[case]
            error = (whole.double() - value.double()).abs().max()
            assert error <= allowed * value.double().abs().max().clamp_min(1.0), f"{stage}: {name}"


@pytest.mark.parametrize("size", SIZES)
def test_monitor_measures_the_drift_of_all_parts(found, alone, size):
    for each in found[size]:
        assert each["float64"]["monitor"]["residual"] < 1e-12
        single, shared = (float(run["float32"]["monitor"]["residual"]) for run in (alone, each))
        assert shared < 5 * single + 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_a_call_that_one_process_cannot_make_is_refused_in_all(found, size):
    kinds = dict.fromkeys(
        ["keys", "values", "weights", "count", "shape", "replace", "reweigh", "refresh", "weight", "delay"],
        "InputError",
    )
    kinds |= {"removal": "RemovalError", "overflow": "UpdateError", "prior": "PriorError", "pivot": "UpdateError"}
    if size == 1:  # one process cannot differ from another
        for name in ("count", "reweigh", "delay"):
            del kinds[name]
    objectives = set()
    memory = [each["refused"][0]["memory"][0] for each in found[size]]
    assert memory == ["ResourceError"] * (size - 1) + ["OutOfMemoryError"]
    for rank, each in enumerate(found[size]):
        errors, same, objective = each["refused"]
        objectives.add(objective)
        for name, kind in kinds.items():
            assert errors[name] is not None, f"{name} was accepted by process {rank}"
            assert errors[name][0] == kind, f"{name}: {errors[name]}"
        if size > 1:
            assert same, "a refused call changed the state"
        if size > 1 and rank < size - 1:
            assert f"in process {size - 1} of {size}" in errors["keys"][1]
            assert "keys contains NaN or Inf in row 1" in errors["keys"][1]
            assert "given different arguments" in errors["count"][1]
    assert len(objectives) == 1


@pytest.mark.parametrize("size", SIZES)
def test_rows_stay_pending_in_all_processes_while_one_holds_a_snapshot(found, size):
    for each in found[size]:
        assert each["pending"] == [3, 6, 9, 3]


@pytest.mark.parametrize("size", SIZES)
def test_a_batch_sends_what_the_plan_says(found, size):
    for each in found[size]:
        flushed = 0
        for rows, weighted, pending, sent, counted, largest in each["traffic"]["batches"]:
            assert sum(sent.values()) == counted, "the columns count other bytes than the collectives send"
            # gathered parts are padded to the widest one
            d_k, flush = max(worker.WIDTHS[size]) * size, sent.pop("flush", 0)
            together = rows
            planned = batch_traffic(rows, worker.D_V, d_k, size, pending=pending, item=8, weighted=weighted)
            if flush:
                flushed += 1
                rows_sent = pending if pending + rows > 8 and pending else rows
                extra = rows if rows > 8 and pending else 0
                assert flush == flush_traffic(rows_sent + extra, d_k, size, item=8)
                sent["decisions"] -= (size - 1) * 8 * (1 + (rows > 8))  # agreement on a flush
                together = max(rows, rows_sent)
            assert {kind: count for kind, count in sent.items() if count} == planned
            if size > 1:
                assert largest == together * d_k
                assert largest < worker.D_K**2
        assert flushed or size == 1


@pytest.mark.parametrize("size", SIZES)
def test_the_start_sends_each_process_its_rows_of_the_inverse(found, size):
    for rank, each in enumerate(found[size]):
        sent, counted, largest = each["traffic"]["start"]
        assert sum(sent.values()) == counted
        others = sum(worker.WIDTHS[size][1:])  # their rows of C, and of the image of the monitor
        assert sent.get("start", 0) == (rank == 0) * 8 * (worker.D_K + 1) * others
        if size > 1:
            assert largest == worker.D_K * (max(worker.WIDTHS[size][1:]) if rank == 0 else worker.WIDTHS[size][rank])


def test_a_batch_sends_nothing_of_the_size_of_c():
    counts = [sum(batch_traffic(100, 8192, d_k, 8, pending=512).values()) for d_k in (10_000, 20_000, 40_000)]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def test_a_state_is_restored_in_another_number_of_processes(found, alone):
    expected = alone["float64"]["saved"]["saved"]
    original = worker.draw(worker.D_V, worker.D_K, seed=0)
    keys, values, weights = worker.batches(torch.float64)[2]
    single = RLSState(original, worker.make_prior("moment"), delay=8, saved=expected)
    single.update(keys, values, weights)
    for name, value in (("weight", single.weight), ("covariance", single.precision_inverse())):
        whole = joined(name, [each["resumed"][name] for each in found[2]])
        torch.testing.assert_close(whole, value, rtol=1e-9, atol=1e-10)
    saved = Saved.joined([each["float64"]["saved"]["saved"] for each in found[3]])
    continued = RLSState(original, worker.make_prior("moment"), delay=8, saved=saved)
    continued.update(keys, values, weights)
    torch.testing.assert_close(continued.weight, single.weight, rtol=1e-9, atol=1e-10)


def test_parts_of_a_state_that_do_not_belong_together_are_refused(found):
    parts = [each["float64"]["saved"]["saved"] for each in found[3]]
    for wrong in ([], parts[:2], [parts[0], parts[0], parts[2]], parts[1:]):
        with pytest.raises(InputError, match="parts"):
            Saved.joined(wrong)
    with pytest.raises(InputError, match="the saved state of layer has shapes"):
        RLSState(worker.draw(worker.D_V, worker.D_K, seed=0), worker.make_prior("moment"), saved=parts[0])


def test_columns_need_a_process_group():
    with pytest.raises(InputError, match="no process group"):
        ShardedColumns(torch.zeros(1, 2))


@pytest.mark.parametrize(("d_v", "d_k", "gigabytes"), [(8192, 28672, 2.06), (16384, 53248, 7.09)])
def test_memory_of_five_layers_over_eight_processes(d_v, d_k, gigabytes):
    memory = shard_memory(d_v, d_k, 8, delay=512)
    assert 5 * memory.covariance / 1e9 == pytest.approx(gigabytes, abs=0.005)
    assert memory.covariance == 4 * held_width(d_k, 8) * d_k
    single = shard_memory(d_v, d_k, 1, delay=512)
    assert single.covariance == 8 * memory.covariance
