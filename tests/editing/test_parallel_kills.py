"""A process of several is killed at any moment: the others end, and a new start resumes from the store."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import MAKERS

WORKER = Path(__file__).with_name("parallel_kills.py")


def run(folder, tokenizer, kills, seed, timeout):
    MAKERS["llama"](len(tokenizer)).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    command = [sys.executable, str(WORKER), str(folder), str(kills), str(seed)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TRANSFORMERS_VERBOSITY": "error"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=variables, text=True, start_new_session=True, **pipes) as started:
        try:
            printed, said = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # also the processes that it started
            raise
    assert started.returncode == 0, said[-4000:]
    return json.loads(printed.splitlines()[-1])


def test_kills_of_a_process_lose_no_acknowledged_change(tmp_path, tokenizer):
    result = run(tmp_path, tokenizer, 2, 0, 240)
    assert result["killed"] == 2
    assert result["changes"] > 2
    assert result["error"] < 1e-3, "rounding is amplified by the search"


@pytest.mark.soak
def test_a_hundred_kills(tmp_path, tokenizer):
    result = run(tmp_path, tokenizer, 100, 1, 7200)
    assert 0 < result["killed_first"] < result["killed"] == 100
    assert result["killed_in_opening"] > 0
    assert result["error"] < 1e-3
