"""Compares the answers of a vLLM server with those of transformers, for a base model, an adapter and reloaded weights.

    python bench/serving.py --vllm VENV/bin/python --base BASE --edited EDITED --adapter ADAPTER --patch PATCH \\
        --facts counterfact.json --limit 50 --json bench/results/real/serving-smollm2.json

VENV is an environment with vLLM, which may require other versions than this package. EDITED, ADAPTER and PATCH are
written by `rlsedit export --store STORE --out EDITED --adapter ADAPTER --for vllm --patch PATCH`. The script starts the
server on the base model, and compares the greedy continuations of the prompts and the log probabilities of their
tokens: base model; adapter and base model, asked at the same time; edited checkpoint after a reload; base model after
another one. With `--patch`, a `vllm.LLM` is asked before and after
the patch, a patch back to the base, and reloads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from recording import add_json, record
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsedit_fast import Edit
from rlsedit_fast.data import load_edits
from rlsedit_fast.errors import ServerError
from rlsedit_fast.export import changes_between, write_patch
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.tokens import fill
from rlsedit_fast.serving import VLLM, Completion

TOKENS = 5
START = 1800.0  # seconds until the server must answer
END = 60.0  # seconds until it must stop

LLM = """
import json, sys
from vllm import LLM, SamplingParams
from rlsedit_fast.serving import patch_llm, reload_llm
model, edited, patch, back, dtype, tokens = sys.argv[1:7]
prompts = json.load(sys.stdin)
llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=512)
greedy = SamplingParams(temperature=0.0, max_tokens=int(tokens), logprobs=1)
def ask():
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    first = [one.outputs[0] for one in outputs]
    return [[one.text, [step[id].logprob for id, step in zip(one.token_ids, one.logprobs)]] for one in first]
found = {"base": ask()}
patch_llm(llm, patch)
found["patched"] = ask()
patch_llm(llm, back)
found["patched_back"] = ask()
patch_llm(llm, patch)
reload_llm(llm, model)
found["reloaded_base"] = ask()
reload_llm(llm, edited)
found["reloaded_edited"] = ask()
print("RESULT" + json.dumps(found))
"""


@torch.no_grad()
def reference(checkpoint: str, prompts: Sequence[str], dtype: str) -> list[Completion]:
    """Returns the greedy continuations that transformers generates."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        made = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        ids = made.sequences[0, inputs["input_ids"].shape[1] :]
        logprobs = [
            float(logits[0].float().log_softmax(-1)[token])
            for logits, token in zip(made.logits, ids.tolist(), strict=True)
        ]
        tokens = tuple(tokenizer.decode([token]) for token in ids.tolist())
        found.append(Completion(tokenizer.decode(ids, skip_special_tokens=True), tokens, tuple(logprobs)))
    return found


def compare(served: Sequence[Completion], expected: Sequence[Completion]) -> dict[str, Any]:
    """Returns how many answers are equal, and the largest difference of the log probabilities of equal answers."""
    equal = [(one, other) for one, other in zip(served, expected, strict=True) if one.text == other.text]
    differences = [abs(a - b) for one, other in equal for a, b in zip(one.logprobs, other.logprobs, strict=False)]
    return {
        "equal": len(equal),
        "asked": len(expected),
        "largest_logprob_difference": max(differences, default=None),
        "different": [
            {"served": one.text, "transformers": other.text}
            for one, other in zip(served, expected, strict=True)
            if one.text != other.text
        ],
    }


@contextlib.contextmanager
def serving(python: str, options: argparse.Namespace, rank: int) -> Iterator[VLLM]:
    """Runs a vLLM server on the base model, unless one is running."""
    if options.url:
        yield VLLM(options.url)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", options.base, "--dtype", options.dtype]
    command += ["--served-model-name", "base", "--port", str(port), "--host", "127.0.0.1", "--enforce-eager"]
    command += ["--max-model-len", "512", "--enable-lora", "--max-lora-rank", str(rank)]
    # The CPU kernels copy the factors of an adapter for each token of a batch.
    command += ["--max-loras", str(options.max_loras), "--max-num-seqs", "16", "--max-num-batched-tokens", "512"]
    environment = environment_of(python) | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            server = VLLM(f"http://127.0.0.1:{port}")
            until = time.monotonic() + START
            while True:
                with contextlib.suppress(ServerError):
                    server.models()
                    break
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    sys.exit(f"the server did not start:\n{log.read()[-3000:]}")
                time.sleep(1)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(END)
            except subprocess.TimeoutExpired:  # a server that is still starting
                process.kill()
                process.wait()


def environment_of(python: str) -> dict[str, str]:
    """Returns the environment of vLLM on a CPU; its wheel needs Intel's OpenMP library to be loaded first."""
    found = sorted(Path(python).parents[1].glob("lib/**/libiomp5.so"))
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"LD_PRELOAD": str(found[0])} if found else {}
    return {**os.environ, **environment}


def in_every_state(
    server: VLLM,
    options: argparse.Namespace,
    edits: list[Edit],
    prompts: list[str],
    base: list[Completion],
    edited: list[Completion],
) -> dict[str, Any]:
    """Asks a server before and after loading an adapter and other weights."""

    def ask(model: str = "base") -> list[Completion]:
        start = time.perf_counter()
        answers = server.complete(prompts, model=model, max_tokens=TOKENS)
        print(f"{model}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return answers

    def stated(answers: Sequence[Completion]) -> int:
        return sum(answer.text.lstrip().startswith(edit.target) for answer, edit in zip(answers, edits, strict=True))

    results = {"vllm": server.request("GET", "/version")["version"], "base": compare(ask(), base)}
    start = time.perf_counter()
    server.load_adapter("edited", options.adapter)
    results["seconds_load_adapter"] = time.perf_counter() - start
    with ThreadPoolExecutor(2) as both:
        beside, adapted = both.map(ask, ("base", "edited"))
    results["base_beside_the_adapter"], results["adapter"] = compare(beside, base), compare(adapted, edited)
    results["stated_by_the_base"], results["stated_by_the_adapter"] = stated(beside), stated(adapted)
    server.unload_adapter("edited")
    results["unloaded"] = sorted(server.models())
    start = time.perf_counter()
    server.reload_weights(options.edited)
    results["seconds_reload"] = time.perf_counter() - start
    reloaded = ask()
    results["reloaded_edited"], results["stated_after_the_reload"] = compare(reloaded, edited), stated(reloaded)
    server.reload_weights(options.base)
    results["reloaded_base"] = compare(ask(), base)
    return results


def in_server(python: str, options: argparse.Namespace, edits: list[Edit], prompts: list[str]) -> dict[str, Any]:
    """Asks vLLM in every state and returns the comparisons."""
    rank = json.loads(Path(options.adapter, "adapter_config.json").read_text())["r"]
    results: dict[str, Any] = {"adapter_rank": rank}
    with ThreadPoolExecutor(1) as meanwhile:
        expected = meanwhile.map(reference, (options.base, options.edited), [prompts] * 2, [options.dtype] * 2)
        with serving(python, options, rank) as server:
            base, edited = expected
            results |= in_every_state(server, options, edits, prompts, base, edited)
    return results | (in_llm(python, options, prompts, base, edited) if options.patch else {})


def in_llm(
    python: str, options: argparse.Namespace, prompts: list[str], base: list[Completion], edited: list[Completion]
) -> dict[str, Any]:
    """Asks a `vllm.LLM` before and after its weights are patched, patched back and reloaded."""
    with tempfile.TemporaryDirectory() as folder:
        back = f"{folder}/back.safetensors"
        after, before = (
            AutoModelForCausalLM.from_pretrained(path, dtype=options.dtype) for path in (options.edited, options.base)
        )
        write_patch(changes_between(after, before), back, base_fingerprint=fingerprint(after))
        del after, before
        done = subprocess.run(
            [python, "-c", LLM, options.base, options.edited, options.patch, back, options.dtype, str(TOKENS)],
            input=json.dumps(prompts),
            env=environment_of(python)
            | {"PYTHONPATH": str(Path(__file__).parents[1]), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found, results = json.loads(done.stdout.partition("RESULT")[2]), {}
    for name, answers in found.items():
        expected = edited if name in ("patched", "reloaded_edited") else base
        answers = [Completion(text, (), tuple(logprobs)) for text, logprobs in answers]
        results[f"llm_{name}"] = compare(answers, expected)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="interpreter of an environment with vLLM")
    for name, what in (
        ("base", "checkpoint before the edits"),
        ("edited", "edited checkpoint"),
        ("adapter", "adapter"),
    ):
        parser.add_argument(f"--{name}", required=True, metavar="DIR", help=what)
    parser.add_argument("--patch", metavar="FILE", help="sparse patch")
    parser.add_argument("--facts", required=True, type=Path, metavar="FILE", help="the edits")
    parser.add_argument("--limit", type=int, help="number of edits (default: all)")
    parser.add_argument("--url", help="address of a server on the base model, named `base`, instead of starting one")
    parser.add_argument("--dtype", default="float32", help="dtype of both programs (default float32)")
    parser.add_argument(
        "--max-loras",
        type=int,
        default=2,
        help="slots for adapters (default 2: with 1, vLLM 0.32 on a CPU applies the adapter in the last slot also to "
        "requests of the base model that are in the same batch)",
    )
    add_json(parser)
    options = parser.parse_args()
    edits = load_edits(options.facts)[: options.limit]
    prompts = [fill(edit.prompt, edit.subject)[0] for edit in edits]
    results = in_server(options.vllm, options, edits, prompts)
    print(json.dumps(results, indent=2))
    shown = {"edits": len(edits), "tokens": TOKENS, "dtype": options.dtype, "max_loras": options.max_loras}
    record(options.json, "answers of vLLM compared with transformers", **shown, **results)


if __name__ == "__main__":
    main()
