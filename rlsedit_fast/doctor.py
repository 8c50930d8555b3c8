"""Report of package versions, machine, backends and build.

The module must import even where transformers, triton or a native library is missing or broken: versions are read from
package metadata, and each backend reports why it is unavailable.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rlsedit_fast._version import __version__
from rlsedit_fast.ops import cuda, dispatch, tune
from rlsedit_fast.ops.choices import Choice, processor, version
from rlsedit_fast.ops.selection import described

BUILD_FACTS = Path(__file__).parent / "ops" / "_build.json"
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "pydantic", "numpy", "scipy")


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _backend(name: str) -> dict[str, Any]:
    module = dispatch.load(name)
    reason = module.unavailable_reason()
    return {"available": reason is None, "reason": reason, "operations": [*module.OPS]}


def _build() -> dict[str, Any]:
    """Returns the build outcome that setup.py recorded."""
    try:
        return json.loads(BUILD_FACTS.read_text())
    except FileNotFoundError:
        reason = "no build record found; install the package with pip install ."
    except (OSError, ValueError) as error:
        reason = f"{BUILD_FACTS} cannot be read ({error}); reinstall the package"
    return {part: {"built": False, "reason": reason} for part in ("cpu", "cuda")}


def report() -> dict[str, Any]:
    """Returns the report as a JSON-serializable dictionary.

    Returns:
        `versions` by package (None if not installed), `machine`, `backends` (each with `available`, `reason` or None,
        and `operations`), `backend_wish` (value of `RLSEDIT_BACKEND`, or None), `cuda_kernels` (source of the kernels
        of the `cuda` backend, or None), `choices` (measured backends by device, see `ops.tune.stored`), `tuned`
        (whether they are used) and `build`.
    """
    return {
        "versions": {
            "rlsedit-fast": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "machine": {
            "system": platform.platform(),
            "cpu": processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "cuda": torch.version.cuda,
            "gpus": _gpus(),
        },
        "backends": {name: _backend(name) for name in dispatch.BACKENDS},
        "backend_wish": os.environ.get(dispatch.ENVIRONMENT),
        "cuda_kernels": cuda.kernels(),
        "tuned": os.environ.get(dispatch.TUNE) != "0",
        "choices": tune.stored(),
        "build": _build(),
    }


def context() -> dict[str, Any]:
    """Returns the part of `report` that result files record, with the date (UTC) and the one-minute load average."""
    facts = report()
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "load": round(os.getloadavg()[0], 2),
        "machine": facts["machine"],
        "versions": facts["versions"],
        "build": facts["build"],
    }


def render(facts: dict[str, Any]) -> str:
    """Formats the report as text."""
    machine = facts["machine"]
    lines = ["Versions"]
    lines += [f"  {name:<14}{version or 'not installed'}" for name, version in facts["versions"].items()]
    lines += [
        "Machine",
        f"  {machine['system']}",
        f"  {machine['cpu']}, {machine['cores']} cores, {machine['torch_threads']} torch threads",
        f"  GPU: {', '.join(machine['gpus']) or 'none available to torch'} (torch CUDA: {machine['cuda'] or 'none'})",
        "Backends",
    ]
    for name, backend in facts["backends"].items():
        lines.append(f"  {name:<12}{'yes' if backend['available'] else 'no':<6}{', '.join(backend['operations'])}")
        if backend["reason"]:
            lines.append(f"                    reason: {backend['reason']}")
    if facts["cuda_kernels"]:
        lines.append(f"  cuda kernels: {facts['cuda_kernels']}")
    if facts["backend_wish"]:
        lines.append(f"  selected by {dispatch.ENVIRONMENT}: {facts['backend_wish']}")
    lines.append("Measured backends" if facts["tuned"] else f"Measured backends (not used: {dispatch.TUNE}=0)")
    for device in facts["choices"]:
        lines.append(f"  {device['device']}: {len(device['choices'])} sizes in {device['path']}")
        lines += [f"    {key:<44}{described(Choice(**choice))}" for key, choice in device["choices"].items()]
        reasons = {f"{name}: {why}" for one in device["choices"].values() for name, why in one["excluded"].items()}
        lines += [f"    excluded: {reason}" for reason in sorted(reasons)]
    lines.append("Build")
    for part, outcome in facts["build"].items():
        details = ", ".join(f"{key}: {value}" for key, value in outcome.items() if key != "built")
        lines.append(f"  {part:<12}{'built' if outcome['built'] else 'not built':<12}{details}".replace("\n", "\n    "))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the report as text, or with `--json` as JSON to stdout or to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m rlsedit_fast", description="Print package versions, machine, backends and build."
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print the report as JSON, or write it to FILE"
    )
    options = parser.parse_args(argv)
    facts = report()
    if options.json is None:
        print(render(facts))
    elif options.json == "-":
        print(json.dumps(facts, indent=2))
    else:
        try:
            Path(options.json).write_text(json.dumps(facts, indent=2) + "\n")
        except OSError as error:
            parser.error(f"--json {options.json}: cannot write the file ({error.strerror}); choose another path")
    return 0
