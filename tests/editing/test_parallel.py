"""An editor in several processes, which tensor parallelism divides a model over, against one in a single process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlsedit_fast.cli import INTERRUPTED
from rlsedit_fast.editing.storage.recovery import read_history
from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.shards import check_division

from ..conftest import MAKERS
from . import parallel_worker as worker

RANKS = 2
# A step of the search amplifies rounding errors of the sums over processes.
ALLOWED = 1e-3


def run(folder, world, *scenarios, timeout=240):
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, worker.__file__, str(folder), str(world), *scenarios]
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True, start_new_session=True) as started:
        try:
            _, said = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # also the processes that it started
            raise
    assert started.returncode == 0, said[-4000:]


def read(folder, scenario, family, world):
    names = [folder / f"{scenario}-{family}-{world}-{rank}.pt" for rank in range(world)]
    return [torch.load(name, weights_only=False) for name in names]


def save(folder, tokenizer, *families):
    for family in families:
        MAKERS[family](len(tokenizer)).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)


def save_wide(folder, tokenizer):
    """Saves a model whose keys are much wider than its other tensors."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "wide")
    tokenizer.save_pretrained(folder / "wide")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Models, and what the scenarios found in one process and in two."""
    folder = tmp_path_factory.mktemp("parallel")
    save(folder, tokenizer, "llama", "mixtral")
    save_wide(folder, tokenizer)
    shared = ["stream/llama", "stored/llama", "commands/llama"]
    run(folder, 1, *shared, "copies/llama")
    run(folder, RANKS, *shared, "copies/llama", "traffic/wide", "refused/llama", "failing/llama")
    return folder


def close(found, expected, allowed=ALLOWED):
    found, expected = (torch.as_tensor(one, dtype=torch.float64) for one in (found, expected))
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= allowed * float(expected.norm()) + 1e-9, (found, expected)


def compare(found, expected, allowed=ALLOWED):
    """Compares what each process found with what a single one found."""
    first, alone = found[0], expected[0]
    for stage in ("edited", "changed", "consolidated"):
        for name in ("covariance", "numbers", "objectives", "priors"):
            for one, other in zip(first[stage][name], alone[stage][name], strict=True):
                close(one, other, allowed)
        for one, other, original in zip(
            first[stage]["weights"], alone[stage]["weights"], alone["originals"], strict=True
        ):
            close(one - original, other - original, allowed)
        for each in found:
            assert each[stage]["records"] == alone[stage]["records"]
            assert each[stage]["objectives"] == first[stage]["objectives"]
            assert all(map(torch.equal, each[stage]["weights"], first[stage]["weights"]))
    for one, other in zip(first["originals"], alone["originals"], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(first["status"], alone["status"], strict=True):
        close(one, other, allowed)
    close(first["overlap"], alone["overlap"], allowed)
    assert {each["fingerprint"] for each in found} == {alone["fingerprint"]}


def test_processes_edit_undo_replace_and_protect_as_one_process(folder):
    compare(read(folder, "stream", "llama", RANKS), read(folder, "stream", "llama", 1))


def test_processes_with_copies_of_the_model_search_parts_of_each_batch(folder):
    several = read(folder, "copies", "llama", RANKS)
    compare(several, read(folder, "copies", "llama", 1))
    assert all(each["changed"]["weights"] for each in several)
    place = folder / f"llama-{RANKS}-copies"
    assert (place / "checkpoint" / "model.safetensors").is_file()
    assert (place / "delta.safetensors").is_file()


def test_processes_write_a_checkpoint_in_which_only_the_edited_tensors_differ(folder):
    family = "llama"
    base, alone, several = (
        load_file(place / "model.safetensors")
        for place in (
            folder / family,
            folder / f"{family}-1" / "checkpoint",
            folder / f"{family}-{RANKS}" / "checkpoint",
        )
    )
    edited = {name for name in base if not torch.equal(base[name], several[name])}
    assert edited == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    for name in edited:
        close(several[name] - base[name], alone[name] - base[name])
    found = read(folder, "stream", family, RANKS)
    assert all(each["report"] == found[0]["report"] for each in found)
    assert found[0]["report"][0] == ""
    for name in ("delta.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(folder / f"{family}-{world}" / name) for world in (RANKS, 1))
        assert ours.keys() == theirs.keys()
        rounding = ("index", "value")  # elements that rounding changed; their number differs
        assert all(ours[key].shape == theirs[key].shape for key in ours if not key.endswith(rounding))


def test_a_store_is_continued_in_several_processes_and_then_in_one(folder):
    written, several = read(folder, "stored", "llama", 1)[0]["written"], read(folder, "stored", "llama", RANKS)
    opened, left = several[0]["opened"], several[0]["left"]
    for name in ("weights", "covariance", "objectives"):
        for one, other in zip(opened[name], written[name], strict=True):
            close(one, other, 1e-5)
    assert [each["opened"]["records"] for each in several] == [written["records"]] * RANKS
    run(folder, 1, "stored/llama")
    again = read(folder, "stored", "llama", 1)[0]["opened"]
    for name in ("weights", "covariance", "objectives"):
        for one, other in zip(again[name], left[name], strict=True):
            close(one, other, 1e-5)
    assert again["records"] == left["records"]


def test_a_process_that_fails_ends_the_others_in_the_state_before_the_batch(folder):
    *others, last = read(folder, "failing", "llama", RANKS)
    for each in (*others, last):
        assert each["alike"][0] == "RequestError"
        assert each["defect"][:2] == ["RuntimeError", "a defect of the model"]  # the group did not end
        assert each["modified"][0] == "ModelError"
        assert all(unchanged for *_, unchanged in each.values())
    assert "in process 1 of 2" in others[0]["modified"][1]
    assert last["interrupted"][:2] == ["KeyboardInterrupt", "one process is interrupted"]
    for each in others:
        assert each["interrupted"][0] == "ProcessError"
        assert "process 1 of 2 failed" in each["interrupted"][1]
        assert "one process is interrupted" in each["interrupted"][1]
    for each in (*others, last):
        assert each["after"][0] == "ProcessError"
        assert "start the processes again" in each["after"][1]


def test_models_that_are_divided_in_other_ways_are_refused_with_the_way_that_works(folder):
    for each in read(folder, "refused", "llama", RANKS):
        assert "FSDP2" in each["fsdp"]
        assert "pipeline parallelism" in each["pipeline"]
        assert "--tp N" in each["fsdp"]
        assert "--tp N" in each["pipeline"]
        assert "mixture of experts" in each["mixture"]
        assert "over 2 processes, which do not divide the 1 key value heads of the model; use 1" in each["heads"]
        assert "rule='memit'" in each["rule"]


def test_a_batch_of_an_editor_sends_what_the_plan_of_show_says(folder):
    for each in read(folder, "traffic", "wide", RANKS):
        (_, d_k), *_ = each["widths"]
        assert each["start"] == d_k**2 // RANKS  # rows of C, which the counter sees
        for batch in each["batches"]:
            assert batch["sent"] == batch["plan"]
            assert batch["largest"] == batch["rows"] * d_k  # of all messages, also those of the model


def test_a_wrapper_is_refused_by_name():
    wrapper = type("DistributedDataParallel", (torch.nn.Module,), {})
    with pytest.raises(ModelError, match=r"model\.module"):
        check_division(wrapper())


def test_commands_in_several_processes_report_once_what_one_process_reports(folder):
    (alone,), (first, second) = read(folder, "commands", "llama", 1), read(folder, "commands", "llama", RANKS)
    assert {name: (code, "", "") for name, (code, _, _) in first.items()} == second
    codes = {"edit": alone["edit"][0], "undo": 0, "exists": 2, "wrong": 2, "undivided": 2, "interrupted": INTERRUPTED}
    assert {name: code for name, (code, _, _) in first.items()} == codes
    assert alone["edit"][0] in (0, 1)
    assert "checkpoint: " in first["edit"][1]
    assert "already exists" in first["exists"][2]
    assert "--nproc-per-node 3" in first["wrong"][2]
    assert "add --tp 2" in first["undivided"][2]
    results = [json.loads((folder / f"edit-{world}.json").read_text()) for world in (1, RANKS)]
    for one, other in zip(*(each["records"] for each in results), strict=True):
        assert one["answer"] == other["answer"]
        close(one["nll"], other["nll"])
    for name in ("out", "undone"):
        ours, theirs = (load_file(folder / f"{name}-{world}" / "model.safetensors") for world in (RANKS, 1))
        for key in ours:
            close(ours[key], theirs[key], 1e-5)


def test_ctrl_c_in_one_process_ends_all_of_them_after_the_batch(folder):
    first, *_ = read(folder, "commands", "llama", RANKS)
    assert "interrupted in another process" in first["interrupted"][2]
    assert len(read_history(folder / f"interrupted-{RANKS}")) == 2  # a batch


@pytest.mark.soak
def test_processes_collect_statistics_and_forecast_as_one_process(tmp_path, tokenizer):
    save(tmp_path, tokenizer, "qwen3")
    for world in (1, RANKS):
        run(tmp_path, world, "forecast/qwen3")
    alone, several = read(tmp_path, "forecast", "qwen3", 1)[0], read(tmp_path, "forecast", "qwen3", RANKS)
    for each in several:
        for one, other in zip(each["moments"], alone["moments"], strict=True):
            close(one, other, 1e-5)
        close(each["points"], alone["points"])
        close(each["mu"], alone["mu"])
