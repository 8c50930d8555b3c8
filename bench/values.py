"""Compares the batched value search with one request at a time through the whole model.

One request at a time follows the released MEMIT code (Meng et al., 2023): every step runs all contexts of a request and
its KL prompts as one padded batch through the whole model, a hook adds the change to the output of the edited layer,
and the loss is computed from the full logits. At equal steps both use normalized descent on the published loss with the
KL term at every step, and both skip the same KL prompts. The contenders alternate; times are medians.

    python bench/values.py --json bench/results/values-cpu.json

All `_s` are seconds per request. `one_by_one_s` and `equal_steps_s` use all steps. `nll_stop_s` is the search of an
edit, which stops each request once the model generates its target (`rank_stop_s` in `results/values-cpu.json`, which is
older than this name). `one_by_one_stop_s` is one request at a time with the same stopping rule, since the published
rule rarely applies. One request at a time is measured on some requests of each batch (`alone`); `max_delta_error` is
the largest ||ours - one by one|| / ||one by one|| of these at equal steps.
`key_pass_s` is one forward pass for all keys of the batch, `step_s` one additional step of the search at equal steps.
`peak_mib` is the peak memory of a contender: on CUDA from the allocator, on a CPU the growth of the process in a
separate run. In the random model, clamp and stopping rule are loose, and targets of two tokens often do not converge,
since the second one is generated from an unchanged token: `converged` is the number of converged requests, and the
steps of the others count in `nll_stop_s`; `converging_s` and `converging_ratio` are for a batch of converged requests
only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from random_models import SHAPES, random_llama
from recording import add_json, record
from torch import Tensor

from rlsedit_fast.editing import EditConfig
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.requests import Request, prepare
from rlsedit_fast.editing.search.optimizers import Gradients, NormalizedOptimizer
from rlsedit_fast.editing.search.value_search import Values, search_values
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.models.passes import hidden_of, quiet, with_hidden
from rlsedit_fast.models.prefixes import with_prefixes
from rlsedit_fast.models.projections import Decoder, find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.models.tokens import pad
from rlsedit_fast.world import World, load_demo_model
from rlsedit_fast.world.tokens import build_tokenizer

SEED = 0
SHOWN = (
    *("model", "fact_token", "requests", "one_by_one_s", "equal_steps_s", "nll_stop_s"),
    *("equal_steps_ratio", "nll_stop_ratio", "same_stop_ratio", "converging_ratio", "max_delta_error", "converged"),
    *("mean_steps_to_stop", "key_pass_over_step", "peak_mib"),
)
PREFIX_WORDS = 10  # with such a prefix, prompts have about 16 tokens


@dataclass(frozen=True)
class Task:
    """Batches of requests to search in one model."""

    model: str
    config: EditConfig
    requests: tuple[int, ...]
    alone: int  # number of requests of each batch that are also searched one by one


def tasks(device: str) -> list[Task]:
    """Returns the tasks; random models are edited at the last token, and at the subject token only for timing."""
    prefixes = [text for text in anchor_texts(World.generate(), SEED) if len(text.split()) == PREFIX_WORDS][:5]
    deep = EditConfig(
        layers=(4,), contexts={"prefixes": ("", *prefixes)}, fact_token="last", search={"clamp": 4.0, "stop_nll": 1.0}
    )
    listed = [
        Task("random", deep, (8, 32), 3),
        Task("random", deep.replace(fact_token="subject_last"), (8,), 3),
        Task("demo", CONFIG, (10, 100), 10),
    ]
    if torch.device(device).type == "cuda":
        listed.append(Task("llama-3-8b", deep.replace(layers=(8,), fact_token="subject_last"), (8, 100), 2))
    return listed


def load(name: str, device: str) -> tuple[Any, Any]:
    """Loads the demo model or a random Llama, with 49 million parameters or the shape of Llama-3-8B (bfloat16)."""
    if name == "demo":
        model, tokenizer = load_demo_model()
        return model.to(device), tokenizer
    return random_llama(name, device), build_tokenizer()


def one_by_one(decoder: Decoder, request: Request, config: EditConfig, *, stops: bool = False) -> Tensor:
    """Returns the change `[d]` after `config.search.steps` steps for one request through the whole model."""
    rows = [*request.contexts, *request.kl]
    contexts = len(request.contexts)
    ids, mask = pad([replace(row, ids=row.ids[:-1] if row.target else row.ids) for row in rows], decoder.device)
    lookup = torch.tensor([row.lookup for row in rows], device=ids.device)
    last = torch.tensor([row.prompt_length - 1 for row in rows], device=ids.device)
    target = torch.full_like(ids, -1)
    for at, row in enumerate(request.contexts):
        target[at, row.prompt_length - 1 : len(row.ids) - 1] = torch.tensor(row.target, device=ids.device)
    states: list[Tensor] = []
    delta = torch.zeros(1, decoder.model.config.hidden_size, device=ids.device)

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        states.append(hidden.detach())
        every = torch.arange(len(hidden), device=hidden.device)
        change = delta.to(hidden).expand(len(hidden), -1)
        return with_hidden(output, hidden.index_put((every, lookup), change, accumulate=True))

    def log_probabilities() -> Tensor:
        logits = decoder.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits.float().log_softmax(-1)

    handle = decoder.blocks[max(config.layers or ())].register_forward_hook(add)
    try:
        with torch.no_grad():
            before = log_probabilities()[torch.arange(len(rows), device=ids.device), last]
        norm = states[0][0, lookup[0]].float().norm()[None]
        answer = before.argmax(-1)
        kept = (torch.arange(len(rows), device=ids.device) < contexts) | (answer != answer[0])
        ids, mask, lookup, last, target = (tensor[kept] for tensor in (ids, mask, lookup, last, target))
        before, at_kl = before[kept][contexts:], torch.arange(contexts, len(ids), device=ids.device)
        in_target = target[:contexts] >= 0
        delta.requires_grad_()
        descent = NormalizedOptimizer(config.search.effective_learning_rate, norm)
        for step in range(config.search.steps + 1):
            states.clear()
            log_probs = log_probabilities()
            token_nll = -log_probs[:contexts].gather(2, target[:contexts, :, None].clamp_min(0))[:, :, 0] * in_target
            loss = (token_nll.sum(1) / in_target.sum(1)).mean()
            if len(at_kl):
                divergence = (before.exp() * (before - log_probs[at_kl, last[contexts:]])).sum(-1)
                loss = loss + config.search.loss.kl_factor * divergence.mean()
            loss = loss + (config.search.loss.weight_decay * delta.norm(dim=1) / norm.square()).sum()
            if step == config.search.steps or (
                stops and _converged(log_probs, token_nll, in_target, target, contexts, config)
            ):
                break
            (gradient,) = torch.autograd.grad(loss, delta)
            with torch.no_grad():
                zero = torch.zeros_like(gradient)
                descent.step(delta, Gradients(gradient, None, zero, zero[:, 0], zero[:, 0]))
                allowed = config.search.clamp * norm / delta.norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
                delta.mul_(allowed.clamp_max(1)[:, None])
    finally:
        handle.remove()
    return delta.detach()[0]


def _converged(
    log_probs: Tensor, token_nll: Tensor, in_target: Tensor, target: Tensor, contexts: int, config: EditConfig
) -> bool:
    """The stopping rule of the value search."""
    first = (log_probs[:contexts].argmax(-1) == target[:contexts]) | ~in_target
    return bool(first.all()) and float((token_nll.detach().sum(1) / in_target.sum(1)).max()) <= config.search.stop_nll


class Clock:
    """Seconds and additional peak memory of every contender."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self.seconds: dict[str, list[float]] = {}
        self.peak: dict[str, float] = {}

    def time(self, name: str, run: Callable[[], Any]) -> Any:
        """Times `run` and returns its result."""
        if self._cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        result = run()
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def measure_memory(self, name: str, run: Callable[[], Any]) -> None:
        """Runs it once more to measure its peak memory."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            run()
            peak = torch.cuda.max_memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system first
            start = _resident()
            with _Watch() as watch:
                run()
            peak = watch.peak
        self.peak[name] = round(max(0, peak - start) / 2**20, 1)

    def median(self, name: str) -> float:
        """Returns the median seconds of `name`."""
        return statistics.median(self.seconds[name])


class _Watch:
    """Samples the memory of this process every millisecond."""

    def __enter__(self) -> _Watch:
        self.peak, self._over = _resident(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.wait(0.001):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(task: Task, count: int, repeats: int, device: str) -> dict[str, Any]:
    """Returns one row of the results: a batch of `count` requests."""
    model, tokenizer = load(task.model, device)
    published = task.config.replace(search={"optimizer": "normalized", "stop_nll": 0.0})
    short = published.replace(search={"steps": 1})
    edits = [case.edit for case in world_cases(World.generate(), count, SEED)]
    longest = model.config.max_position_embeddings
    requests = prepare(tokenizer, edits, published, longest=longest)
    few = min(task.alone, count)
    some = [i * count // few for i in range(few)]
    picked = [requests[i] for i in some]
    clock = Clock(device)
    with quiet(model):
        decoder = with_prefixes(find_decoder(model), longest=longest)
        projections = decoder.select(published.layers or ())
        site = find_site(decoder, projections)
        stopping = task.config.replace(search={"optimizer": "normalized"})

        def one_at_a_time(config: EditConfig, *, stops: bool) -> list[Tensor]:
            return [one_by_one(decoder, request, config, stops=stops) for request in picked]

        one_by_one(decoder, requests[0], short)  # warms up
        first: Values = search_values(site, requests, task.config.search)
        converging = [requests[i] for i in first.converged.nonzero()[:, 0].tolist()]
        runs: dict[str, Callable[[], Any]] = {
            "one_by_one": lambda: one_at_a_time(published, stops=False),
            "equal_steps": lambda: search_values(site, requests, published.search),
            "nll_stop": lambda: search_values(site, requests, task.config.search),
            "one_by_one_stop": lambda: one_at_a_time(stopping, stops=True),
            "one_step": lambda: search_values(site, requests, short.search),
            "key_pass": lambda: request_keys(decoder, projections, requests),
        }
        if converging:
            runs["converging"] = lambda: search_values(site, converging, task.config.search)
        found: dict[str, Any] = {}
        for _ in range(repeats):
            found = {name: clock.time(name, run) for name, run in runs.items()}
        for name in ("one_by_one", "equal_steps", "nll_stop", "key_pass"):
            clock.measure_memory(name, runs[name])
    equal, stopped = found["equal_steps"], found["nll_stop"]
    truth = torch.stack(found["one_by_one"])
    errors = (equal.delta[some] - truth).norm(dim=1) / truth.norm(dim=1)
    shares = {"one_by_one": few, "one_by_one_stop": few, "converging": len(converging)}
    each = {name: clock.median(name) / shares.get(name, count) for name in runs if name not in ("one_step", "key_pass")}
    step_s = (clock.median("equal_steps") - clock.median("one_step")) / (published.search.steps - 1)
    return {
        "model": task.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fact_token": task.config.fact_token,
        "requests": count,
        "contexts": len(task.config.contexts.prefixes),
        "tokens": statistics.mean(row.prompt_length for request in requests for row in request.contexts),
        "steps": published.search.steps,
        "alone": few,
        "prefixed": decoder.prefixed,
        **{f"{name}_s": seconds for name, seconds in each.items()},
        "equal_steps_ratio": each["one_by_one"] / each["equal_steps"],
        "nll_stop_ratio": each["one_by_one"] / each["nll_stop"],
        "same_stop_ratio": each["one_by_one_stop"] / each["nll_stop"],
        "converging_ratio": each["one_by_one"] / each["converging"] if converging else None,
        "max_delta_error": float(errors.max()),  # in bfloat16 this includes rounding
        "stopped_before_the_last_step": int((equal.steps < published.search.steps).sum()),  # must be 0 for equal steps
        "converged": int(stopped.converged.sum()),
        "mean_steps_to_stop": float(stopped.steps.double().mean()),
        "key_pass_s": clock.median("key_pass"),
        "step_s": step_s,
        "key_pass_over_step": clock.median("key_pass") / step_s,
        "peak_mib": clock.peak,
        "config": task.config.to_dict(),
        "all_s": clock.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--models", nargs="+", choices=("demo", *SHAPES), help="models (default: all that are suitable for the device)"
    )
    parser.add_argument("--requests", type=int, nargs="+", help="requests per batch (default: depends on the model)")
    add_json(parser)
    options = parser.parse_args()
    rows = []
    for task in tasks(options.device):
        for count in (options.requests or task.requests) if task.model in (options.models or [task.model]) else ():
            row = measure(task, count, options.repeats, options.device)
            rows.append(row)
            shown = {name: f"{row[name]:.3g}" if isinstance(row[name], float) else row[name] for name in SHOWN}
            print("  ".join(f"{name}={value}" for name, value in shown.items()), flush=True)
            about = {"device": options.device, "seed": SEED, "repeats": options.repeats}
            record(options.json, "value search against one request at a time", **about, rows=rows)


if __name__ == "__main__":
    main()
