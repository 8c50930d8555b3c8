"""The batched value search against one request at a time through the whole model, side by side.

One request at a time is written as MEMIT's released code does it (Meng et al. 2023): every step runs all contexts of a
request and its KL prompts as one padded batch through the whole model, a hook adds the change to the edited block's
output, and the loss is read off the full logits. Loss, descent and number of steps are those of `search_values`; KL
prompts that the search leaves out are not run here either. Contenders take turns, times are medians.

    python bench/values.py --json bench/results/values-cpu.json

`one_by_one_s`, `equal_steps_s` and `rank_stop_s` are seconds a request; the first two take all steps, the last stops as
an edit does. `one_by_one_s` is measured on some requests of each batch (`alone`), and `max_delta_error` compares those:
the largest ||ours - one by one|| / ||one by one||. `key_pass_s` is one pass over all keys of the batch, `step_s` one
further step of its search. On CUDA, `peak_mib` is what each contender allocated at most beyond the model. In the
random model clamp and stop are loose and targets of two tokens do not converge, since the second is said from a token
that is not changed: `converged` tells how many did, and the others' steps count in `rank_stop_s`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.doctor import context
from rlsedit_fast.editing import EditConfig
from rlsedit_fast.editing.config import DEFAULT_RATE
from rlsedit_fast.editing.descent import NormalizedDescent
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.requests import Request, prepare
from rlsedit_fast.editing.values import Values, search_values
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.models.passes import hidden_of, quiet, with_hidden
from rlsedit_fast.models.projections import Decoder, find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.models.tokens import pad
from rlsedit_fast.world import World, load_demo_model
from rlsedit_fast.world.tokens import build_tokenizer

SEED = 0
SHOWN = (
    *("model", "fact_token", "requests", "one_by_one_s", "equal_steps_s", "rank_stop_s", "equal_steps_ratio"),
    *("rank_stop_ratio", "max_delta_error", "converged", "mean_steps_to_stop", "key_pass_s", "step_s"),
)
PREFIX_WORDS = 10  # with these before them, the world's prompts come to about 16 tokens


@dataclass(frozen=True)
class Task:
    """Some batches to be searched in one model."""

    model: str
    config: EditConfig
    requests: tuple[int, ...]
    alone: int  # requests of each batch that are searched one by one


def tasks() -> list[Task]:
    """The random model is edited at the last token, which steers its answer; the subject's token is left to timing."""
    prefixes = [text for text in anchor_texts(World.generate(), SEED) if len(text.split()) == PREFIX_WORDS][:5]
    deep = EditConfig(layers=(4,), context_prefixes=("", *prefixes), fact_token="last", clamp=4.0, search_stop_nll=1.0)
    return [
        Task("random", deep, (8, 32), 3),
        Task("random", replace(deep, fact_token="subject_last"), (8,), 3),
        Task("demo", CONFIG, (10, 100), 10),
    ]


def load(name: str) -> tuple[Any, Any]:
    """The demo model, or a random Llama of 49 million parameters with 12 layers and a vocabulary of 32,000."""
    if name == "demo":
        return load_demo_model()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1088,
        num_hidden_layers=12,
        num_attention_heads=8,
        max_position_embeddings=256,
        initializer_range=512**-0.5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), build_tokenizer()


def one_by_one(decoder: Decoder, request: Request, config: EditConfig) -> Tensor:
    """The change `[d]` that `config.search_steps` steps find for one request, through the whole model."""
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
        return with_hidden(output, hidden.index_put((every, lookup), delta.expand(len(hidden), -1), accumulate=True))

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
        wanted = target[:contexts] >= 0
        delta.requires_grad_()
        descent = NormalizedDescent(config.search_rate or DEFAULT_RATE["normalized"], norm)
        for step in range(config.search_steps + 1):
            states.clear()
            said = log_probabilities()
            token_nll = -said[:contexts].gather(2, target[:contexts, :, None].clamp_min(0))[:, :, 0] * wanted
            loss = (token_nll.sum(1) / wanted.sum(1)).mean()
            if len(at_kl):
                divergence = (before.exp() * (before - said[at_kl, last[contexts:]])).sum(-1)
                loss = loss + config.kl_factor * divergence.mean()
            loss = loss + (config.weight_decay * delta.norm(dim=1) / norm.square()).sum()
            if step == config.search_steps:
                break
            (gradient,) = torch.autograd.grad(loss, delta)
            with torch.no_grad():
                descent.step(delta, gradient)
                allowed = config.clamp * norm / delta.norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
                delta.mul_(allowed.clamp_max(1)[:, None])
    finally:
        handle.remove()
    return delta.detach()[0]


class Clock:
    """Seconds of every contender, and on CUDA its peak of memory beyond what was held before."""

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self.seconds: dict[str, list[float]] = {}
        self.peak: dict[str, float] = {}

    def time(self, name: str, run: Callable[[], Any]) -> Any:
        """What `run` returns."""
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        began = time.perf_counter()
        result = run()
        if self._cuda:
            torch.cuda.synchronize()
            self.peak[name] = round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def median(self, name: str) -> float:
        """Of the seconds that `name` took."""
        return statistics.median(self.seconds[name])


def measure(task: Task, count: int, repeats: int, device: str) -> dict[str, Any]:
    """One row of the results: a batch of `count` requests."""
    model, tokenizer = load(task.model)
    model.to(device)
    decoder = find_decoder(model)
    fixed = replace(task.config, search_stop_nll=0.0)
    short = replace(fixed, search_steps=1)
    edits = [case.edit for case in world_cases(World.generate(), count, SEED)]
    requests = prepare(tokenizer, edits, fixed, longest=model.config.max_position_embeddings)
    picked = [i * count // task.alone for i in range(task.alone)]
    projections = decoder.select(fixed.layers or ())
    clock = Clock(device)
    with quiet(model):
        site = find_site(decoder, projections, longest=model.config.max_position_embeddings)
        one_by_one(decoder, requests[0], short)  # warms up
        search_values(site, requests, short)
        for _ in range(repeats):
            single = clock.time("one_by_one", lambda: [one_by_one(decoder, requests[i], fixed) for i in picked])
            equal: Values = clock.time("equal_steps", lambda: search_values(site, requests, fixed))
            stopped: Values = clock.time("rank_stop", lambda: search_values(site, requests, task.config))
            clock.time("one_step", lambda: search_values(site, requests, short))
            clock.time("key_pass", lambda: request_keys(decoder, projections, requests))
    if bool((equal.steps < fixed.search_steps).any()):
        raise SystemExit("a request reached an NLL of 0 and stopped: the steps are not equal")
    truth = torch.stack(single)
    errors = (equal.delta[picked] - truth).norm(dim=1) / truth.norm(dim=1)
    one_by_one_s = clock.median("one_by_one") / len(picked)
    equal_steps_s, rank_stop_s = clock.median("equal_steps") / count, clock.median("rank_stop") / count
    step_s = (clock.median("equal_steps") - clock.median("one_step")) / (fixed.search_steps - 1)
    return {
        "model": task.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fact_token": task.config.fact_token,
        "requests": count,
        "contexts": len(task.config.context_prefixes),
        "tokens": statistics.mean(row.prompt_length for request in requests for row in request.contexts),
        "steps": fixed.search_steps,
        "alone": len(picked),
        "one_by_one_s": one_by_one_s,
        "equal_steps_s": equal_steps_s,
        "rank_stop_s": rank_stop_s,
        "equal_steps_ratio": one_by_one_s / equal_steps_s,
        "rank_stop_ratio": one_by_one_s / rank_stop_s,
        "max_delta_error": float(errors.max()),
        "converged": int(stopped.converged.sum()),
        "mean_steps_to_stop": float(stopped.steps.double().mean()),
        "key_pass_s": clock.median("key_pass"),
        "step_s": step_s,
        "key_pass_over_step": clock.median("key_pass") / step_s,
        "config": asdict(task.config),
        "all_s": clock.seconds,
        **({"peak_mib": clock.peak} if clock.peak else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results")
    options = parser.parse_args()
    rows = []
    for task in tasks():
        for count in task.requests:
            row = measure(task, count, options.repeats, options.device)
            rows.append(row)
            shown = {name: f"{row[name]:.3g}" if isinstance(row[name], float) else row[name] for name in SHOWN}
            print("  ".join(f"{name}={value}" for name, value in (shown | row.get("peak_mib", {})).items()), flush=True)
    if options.json:
        about = {"what": "value search against one request at a time", "device": options.device, "seed": SEED}
        result = {**about, "repeats": options.repeats, **context(), "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
