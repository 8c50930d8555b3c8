"""An editor that is killed at any moment resumes from its store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_random_kills_lose_no_acknowledged_change(tmp_path):
    """After every kill, the state is that of a run without kills after the last acknowledged change or the next."""
    result = run(HERE / "victim.py", tmp_path / "store", 1, 25, 40)
    assert result["killed"] >= 20
    assert result["killed_in_opening"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 7))
def test_a_thousand_kills(tmp_path, seed):
    result = run(HERE / "victim.py", tmp_path / "store", seed, 205, 300)
    assert result["killed"] >= 200
    assert result["present_but_not_acknowledged"] > 0


def test_exit_at_random_lines_leaves_a_change_complete_or_absent(tmp_path):
    result = run(HERE / "lines.py", tmp_path, 2)
    assert result["ended"] >= 10
    assert result["absent"] > 1
    assert result["present"] > 1


@pytest.mark.soak
def test_exit_at_every_line(tmp_path):
    result = run(HERE / "lines.py", tmp_path, 0)
    assert result["ended"] > 300
