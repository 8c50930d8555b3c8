"""Edits a 7B-shaped checkpoint of random weights, saves it, and compares it with its base byte by byte.

    python bench/large_checkpoint.py --tokenizer ~/.cache/rlsedit/models/smollm2 --text wikitext2-valid.txt \
        --work large --json bench/results/large-checkpoint.json

The checkpoint has the shape of Llama 2 7B, in bfloat16 and in files of about 1 GB, with the tokens of the tokenizer,
and a tensor that the class of the model does not use. Its weights are random, so the edit says nothing about quality;
the figures are the memory, the time and the bytes. The process samples its memory every 20 ms: `anonymous` is memory of
its own, `resident` also contains pages of the memory-mapped base, which the kernel can drop at any time. The written
files are deleted at the end unless --keep is given. They need twice the size of the checkpoint on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from recording import add_json, record
from safetensors.torch import save_file

import rlsedit_fast as rf
from rlsedit_fast.export import compare_checkpoints

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
SHARD = 10**9  # bytes
UNUSED = "mtp.fc.weight"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
GIB = 2**30


class Noise:
    """Normal random numbers from one block, read at a random place for each tensor: writing is faster than drawing."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._block = torch.randn(2**24, generator=self._generator).bfloat16()

    def tensor(self, *shape: int, scale: float) -> torch.Tensor:
        """Returns a new tensor, bfloat16."""
        start = int(torch.randint(2**23, (1,), generator=self._generator))
        count = torch.Size(shape).numel()
        part = self._block[start:]
        return part.repeat(-(-count // len(part)))[:count].mul_(scale).view(shape)


def tensors(layers: int, vocabulary: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of the checkpoint, one at a time."""
    noise, width, inner = Noise(seed), SHAPE["hidden_size"], SHAPE["intermediate_size"]
    scale = width**-0.5
    yield "model.embed_tokens.weight", noise.tensor(vocabulary, width, scale=1.0)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for one in "qkvo":
            yield f"{name}.self_attn.{one}_proj.weight", noise.tensor(width, width, scale=scale)
        for one in ("gate", "up"):
            yield f"{name}.mlp.{one}_proj.weight", noise.tensor(inner, width, scale=scale)
        yield f"{name}.mlp.down_proj.weight", noise.tensor(width, inner, scale=inner**-0.5)
        for one in ("input", "post_attention"):
            yield f"{name}.{one}_layernorm.weight", torch.ones(width, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(width, dtype=torch.bfloat16)
    yield "lm_head.weight", noise.tensor(vocabulary, width, scale=scale)
    yield UNUSED, noise.tensor(width, width, scale=scale)


def make_checkpoint(folder: Path, tokenizer: Path, layers: int, seed: int) -> int:
    """Writes the checkpoint, file by file; returns its number of parameters."""
    from transformers import AutoTokenizer, LlamaConfig

    own = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(own),
        num_hidden_layers=layers,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        **SHAPE,
    )
    config.save_pretrained(folder)
    for name in FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    places, held, count, number = dict[str, str](), dict[str, torch.Tensor](), 0, 1

    def write() -> None:
        nonlocal number
        name = f"model-{number:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, name))
        held.clear()
        number += 1

    for name, tensor in tensors(layers, len(own), seed):
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > SHARD:
            write()
        held[name] = tensor
        count += tensor.numel()
    write()
    index = {"metadata": {"total_size": 2 * count}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return count


class Memory:
    """Samples the memory of this process, and keeps the peaks of the present phase."""

    def __init__(self) -> None:
        self._peaks = {"resident": 0, "anonymous": 0}
        self._done = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        names = {"VmRSS": "resident", "RssAnon": "anonymous"}
        while not self._done.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                field, _, value = line.partition(":")
                if field in names:
                    kind = names[field]
                    self._peaks[kind] = max(self._peaks[kind], 1024 * int(value.split()[0]))

    @contextmanager
    def phase(self, name: str, into: dict[str, Any]) -> Iterator[None]:
        """Enters the peaks and the seconds of the block into a dict."""
        self._peaks.update(resident=0, anonymous=0)
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        time.sleep(0.1)
        peaks = {f"{kind}_gib": round(value / GIB, 2) for kind, value in self._peaks.items()}
        into[name] = {"seconds": round(seconds, 1)} | peaks
        print(name, into[name], flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Makes, loads, edits, saves and compares the checkpoint."""
    base, edited = options.work / "base", options.work / "edited"
    shutil.rmtree(options.work, ignore_errors=True)
    base.mkdir(parents=True)
    phases: dict[str, Any] = {}
    memory = Memory()
    with memory.phase("make", phases):
        count = make_checkpoint(base, options.tokenizer, options.layers, options.seed)
    layer = options.layers - 4
    config = rf.EditConfig(
        layers=[layer],
        contexts={"prefixes": [""]},
        search={"steps": options.steps, "kl_prompts": []},
        prior={"lam": 0.1, "mu": 1.0 if options.anchors else 0.0},
        refine=0,
    )
    with memory.phase("load", phases):
        editor = rf.Editor.from_pretrained(base, config=config, dtype="auto")
    tokens = 0
    if options.anchors:
        with memory.phase("anchor", phases):
            tokens = editor.anchor([options.text.read_text(encoding="utf-8")[:20_000]], tokens=options.anchors)
    facts = [("The capital of {} is", "France", " Lyon"), ("{} plays the", "Miles Davis", " piano")]
    with memory.phase("edit", phases):
        records = editor.edit([rf.Edit(*fact) for fact in facts[: options.edits]])
    with memory.phase("save", phases):
        report = editor.save_pretrained(edited)
    with memory.phase("compare", phases):
        difference = compare_checkpoints(base, edited)
    expected = f"model.layers.{layer}.mlp.down_proj.weight"
    same = difference.tensors == (expected,) and not any(
        (difference.lacking, difference.added, difference.headers, difference.files, difference.lacking_files)
    )
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    return {
        "shape": SHAPE | {"num_hidden_layers": options.layers},
        "parameters": count,
        "checkpoint_gib": round(size / GIB, 2),
        "files": len(report.tensors) + report.copied,
        "edits": len(records),
        "anchor_tokens": tokens,
        "phases": phases,
        "peak": {
            kind: max(one[kind] for name, one in phases.items() if name not in ("make", "compare"))
            for kind in ("resident_gib", "anonymous_gib")
        },
        "report": {"tensors": report.tensors, "copied": report.copied, "reason": report.reason, "notes": report.notes},
        "differing_tensors": difference.tensors,
        "all_other_bytes_equal": same,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="folder with a tokenizer")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text of the anchors")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the checkpoints; emptied")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--edits", type=int, default=1, choices=(1, 2))
    parser.add_argument("--steps", type=int, default=5, help="steps of the value search")
    parser.add_argument("--anchors", type=int, default=64, metavar="TOKENS", help="0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    add_json(parser)
    options = parser.parse_args()
    try:
        results = run(options)
        print(json.dumps(results, indent=2))
        record(options.json, "a 7B-shaped checkpoint: memory and bytes of an edit", **results)
        if not results["all_other_bytes_equal"]:
            raise SystemExit("other bytes than those of the edited tensor differ")
    finally:
        if not options.keep:
            shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    main()
