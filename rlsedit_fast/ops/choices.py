"""The backends that were chosen on a machine, in a file of the cache folder.

A file belongs to one device with its driver, and to one version of everything that computes. A choice takes effect only
once it is stored, and a stored choice is not changed by a later measurement except by `rlsedit doctor --tune`: so all
processes, also those that start later, compute the same, and a store is replayed bit for bit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rlsedit_fast._version import __version__
from rlsedit_fast.errors import RLSEditError
from rlsedit_fast.files import cache_folder, written_whole
from rlsedit_fast.ops.sizes import SizeClass

logger = logging.getLogger(__name__)

KIND = "rlsedit backends 1"
PRECISION = "RLSEDIT_TRITON_PRECISION"
_DRIVER = Path("/proc/driver/nvidia/version")


@cache
def processor() -> str:
    """Returns the CPU model name from /proc/cpuinfo, or the architecture where that is not available."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def version(package: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    with suppress(OSError):
        return _DRIVER.read_text().splitlines()[0]
    return "unknown"


def identity(device: torch.device, backends: Sequence[str]) -> dict[str, Any]:
    """Returns what the speed and the results of the backends on a device depend on.

    Args:
        device: `cpu`, or a CUDA device with its index.
        backends: the backends that are available for it.
    """
    about: dict[str, Any] = {"kind": device.type, "rlsedit-fast": __version__, "torch": torch.__version__}
    about["backends"] = [*backends]
    if device.type == "cpu":
        return about | {"device": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    major, minor = torch.cuda.get_device_capability(device)
    return about | {
        "device": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "driver": _driver(),
        "triton": version("triton"),
        "precision": os.environ.get(PRECISION, ""),
    }


@dataclass(frozen=True)
class Choice:
    """The backend of a size class.

    Attributes:
        backend: the backend.
        ms: measured milliseconds by backend.
        excluded: why a backend is not used, by backend.
    """

    backend: str
    ms: dict[str, float] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)


class Choices:
    """The stored choices of one device.

    Args:
        about: identity of the device, see `identity`.
        folder: folder of the file.
    """

    def __init__(self, about: Mapping[str, Any], folder: Path | None = None) -> None:
        self.about = dict(about)
        text = json.dumps(self.about, sort_keys=True)
        name = re.sub(r"[^A-Za-z0-9]+", "-", str(self.about["device"]))[:40].strip("-")
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        self.path = (folder or cache_folder()) / f"backends-{name}-{digest}.json"
        self._complained = False

    def read(self) -> dict[str, Choice]:
        """Returns the stored choices by key of the size class; a file that cannot be used counts as empty."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            self._complain(f"{self.path} cannot be read ({error}) and is ignored")
            return {}
        try:
            found = json.loads(text)
            if found["kind"] != KIND or found["identity"] != self.about:
                raise ValueError("it is from another version or device")
            return {SizeClass.parse(key).key: _checked(choice) for key, choice in found["choices"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._complain(f"{self.path} is ignored and will be written again: {_one_line(error)}")
            return {}

    def writable(self) -> bool:
        """Returns whether choices can be stored; reports once if they cannot."""
        try:
            with self._locked():
                return True
        except OSError as error:
            self._complain(
                f"backends are not measured and the defaults are used, since {self.path.parent} cannot be written "
                f"({error.strerror or error}); set RLSEDIT_CACHE to a writable folder, or RLSEDIT_TUNE=0"
            )
            return False

    def store(self, new: Mapping[str, Choice], *, replace: bool = False) -> dict[str, Choice] | None:
        """Stores choices and returns all stored ones, or None if the file cannot be written, which is reported once.

        Args:
            new: choices by key of the size class.
            replace: whether they replace stored choices. Otherwise a choice that another process stored first stays.
        """
        try:
            with self._locked():
                stored = self.read()
                merged = {**stored, **new} if replace else {**new, **stored}
                text = {
                    "kind": KIND,
                    "identity": self.about,
                    "choices": {key: asdict(choice) for key, choice in merged.items()},
                }
                with written_whole(self.path) as (temporary,):
                    temporary.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
                return merged
        except (OSError, RLSEditError) as error:
            self._complain(f"the choice of backends cannot be stored ({_one_line(error)}); the defaults are used")
            return None

    @contextmanager
    def trying(self, op: str, backend: str) -> Iterator[None]:
        """Leaves a file if the process ends in the block, so that `crashed` reports the backend later."""
        mark = self.path.with_name(f"{self.path.stem}.{socket.gethostname()}.{os.getpid()}.{op}.{backend}.trying")
        mark.touch()
        try:
            yield
        finally:
            with suppress(OSError):
                mark.unlink()

    def crashed(self, op: str) -> dict[str, str]:
        """Returns backends during whose check or timing a process on this machine ended, with the reason."""
        found = {}
        for mark in self.path.parent.glob(f"{self.path.stem}.{socket.gethostname()}.*.{op}.*.trying"):
            *_, pid, _, backend, _ = mark.name.split(".")
            if not _runs(int(pid)):
                found[backend] = f"a process ended while it was tried ({mark.name})"
        return found

    def forget_crashes(self) -> None:
        """Deletes the files that `trying` left."""
        for mark in self.path.parent.glob(f"{self.path.stem}.*.trying"):
            with suppress(OSError):
                mark.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Locks the file against other processes; the lock ends with the process."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _complain(self, text: str) -> None:
        if not self._complained:
            logger.warning("%s", text)
            self._complained = True


def _checked(stored: Mapping[str, Any]) -> Choice:
    """Returns a stored choice; raises TypeError or ValueError if it has other fields or types."""
    choice = Choice(**stored)
    if not (isinstance(choice.backend, str) and isinstance(choice.ms, dict) and isinstance(choice.excluded, dict)):
        raise ValueError("a choice has fields of the wrong type")
    return choice


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _runs(pid: int) -> bool:
    """Returns whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # of another user
    return True
