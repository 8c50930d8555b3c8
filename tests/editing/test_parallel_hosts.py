"""Processes in network namespaces of their own, connected by a virtual link, which is cut in the middle of a stream."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time

import pytest

import rlsedit_fast as rf
from rlsedit_fast.editing.storage.recovery import read_history

from . import host_worker as worker
from .test_parallel import save

pytestmark = pytest.mark.soak

TIMEOUT = 8  # seconds of a collective
CUTS = 3


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts():
    """Two network namespaces with a link between them: names, interface in each, and address of the first."""
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("needs root and iproute2 for network namespaces")
    names = [f"rlsedit-{os.getpid()}-{at}" for at in range(2)]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link0", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not possible here: {error.stderr.strip()}")
        for at, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.231.7.{at + 1}/24", "dev", "link0")
            for device in ("lo", "link0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def start(hosts, folder, name, last=""):
    """Starts a process in each namespace; the one of the first host holds the rendezvous and the store."""
    given = {"MASTER_ADDR": "10.231.7.1", "MASTER_PORT": "29571", "GLOO_SOCKET_IFNAME": "link0", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, worker.__file__, folder, name, str(rank), str(TIMEOUT), last],
            env=os.environ | given | {"TRANSFORMERS_VERBOSITY": "error"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank, host in enumerate(hosts)
    ]


def acknowledged(folder, name):
    file = folder / f"acknowledged-{name}"
    return int(file.read_text().split()[-1]) if file.exists() and file.read_text().strip() else 0


def test_a_cut_link_loses_no_acknowledged_edit(tmp_path, tokenizer, hosts):
    """All processes end by themselves; the store has all acknowledged edits, and no part of a batch."""
    save(tmp_path, tokenizer, "llama")
    draw, before = random.Random(3), 0
    for cut in range(CUTS):
        name = f"cut{cut}"
        running = start(hosts, tmp_path, name)
        try:
            end = time.monotonic() + 120
            while acknowledged(tmp_path, name) < before + 2 * worker.SIZE:
                assert time.monotonic() < end, "the stream does not proceed"
                assert all(process.poll() is None for process in running), "a process ended before the cut"
                time.sleep(0.02)
            time.sleep(draw.random() * 0.5)
            ip("-n", hosts[draw.randrange(2)], "link", "set", "link0", "down")
            codes = [process.wait(10 * TIMEOUT) for process in running]
        finally:
            for process in running:
                process.kill()
        assert codes == [1, 1]
        ended = [(tmp_path / f"ended-{name}-{rank}").read_text() for rank in range(2)]
        assert all(text.startswith("ProcessError: ") for text in ended), ended
        records = read_history(tmp_path / "store")
        assert [record.id for record in records] == list(range(1, len(records) + 1))
        assert len(records) % worker.SIZE == 0
        assert 0 <= len(records) - acknowledged(tmp_path, name) <= worker.SIZE
        before = len(records)
        for host in hosts:
            ip("-n", host, "link", "set", "link0", "up")
    last = before + 2 * worker.SIZE
    running = start(hosts, tmp_path, "whole", str(last))
    assert [process.wait(240) for process in running] == [0, 0]
    with rf.Editor.from_pretrained(tmp_path / "llama", store=tmp_path / "store", dtype="float32") as editor:
        assert [record.id for record in editor.history()] == list(range(1, last + 1))
