"""Compares single layers and groups of layers to edit on one model, with causal tracing.

    python bench/layer_choice.py --model path/to/checkpoint --data counterfact.json --text text.txt \\
        --json bench/results/layer-choice.json

Every trial applies the same edits in one batch with the default settings to the given layers. Drift is measured on the
last quarter of the text; the rest is used as anchors. Causal tracing follows Meng et al., 2022 (arXiv 2202.05262): on
prompts that the model completes correctly, noise of three standard deviations is added to the embeddings of the subject
tokens. Then the hidden state, or the MLP output in a window of layers, is restored to its clean value at the last
subject token. The indirect effect is the recovered probability of the answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from recording import add_json, record
from torch import Tensor, nn

from rlsedit_fast import Edit, EditConfig, read_edits
from rlsedit_fast.errors import RLSEditError
from rlsedit_fast.evaluation.grounds import running_text
from rlsedit_fast.evaluation.layer_trials import Trial, Trials
from rlsedit_fast.evaluation.layers import compare, single_layers, windows
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.models.loading import load_model
from rlsedit_fast.models.passes import hidden_of, quiet, with_hidden
from rlsedit_fast.models.projections import Decoder
from rlsedit_fast.models.tokens import encode

NOISE = 3.0
"""Noise level in standard deviations of the embeddings."""
SEEDS = 4
"""Noise samples per fact."""


def paraphrased_edits(path: Path, count: int) -> list[Edit]:
    """Returns the first edits with different subjects whose paraphrases are genuine.

    Many of the rephrased prompts in EasyEdit's CounterFact are generation prompts of the original data set, such as
    "The best restaurants around {} include" for "{} is located in the country of", which the target does not complete.
    A paraphrase counts as genuine if it ends with a prompt template of the file: 2,342 of the 10,000 first ones do.
    """
    edits = read_edits(path).edits
    templates = {_template(edit.prompt, edit.subject) for edit in edits}
    first: dict[str, Edit] = {}
    for edit in edits:
        texts = [_template(text, edit.subject) for text in edit.filled_paraphrases]
        if texts and all(any(text.endswith(template) for template in templates) for text in texts):
            first.setdefault(edit.subject, edit)
    return list(first.values())[:count]


def _template(text: str, subject: str) -> str:
    return text if "{}" in text else text.replace(subject, "{}")


def describe(trial: Trial) -> str:
    layers = f"{trial.layers[0]}-{trial.layers[-1]}" if len(trial.layers) > 1 else str(trial.layers[0])
    shares = (trial.efficacy, trial.generalization, trial.specificity)
    figures = " ".join("    -" if share is None else f"{share:5.3f}" for share in shares)
    return f"{layers:>8}  {figures}  score {trial.score:.3f}  KL {trial.kl:.4f}  change {trial.change:.4f}"


def known_facts(model: Any, tokenizer: Any, path: Path, count: int) -> list[tuple[str, str, str]]:
    """Returns `(prompt with {}, subject, true answer)` of the first facts that the model completes correctly."""
    records = json.loads(path.read_text(encoding="utf-8"))
    facts = [
        (record["prompt"].replace(record["subject"], "{}"), record["subject"], record["ground_truth"])
        for record in records[: 50 * count]
        if record["prompt"].count(record["subject"]) == 1
    ]
    found = score(model, tokenizer, [(prompt.replace("{}", subject), answer) for prompt, subject, answer in facts])
    return [fact for fact, answer in zip(facts, found, strict=True) if answer.exact][:count]


def trace(
    model: Any, tokenizer: Any, decoder: Decoder, facts: Sequence[tuple[str, str, str]], window: int
) -> dict[str, Any]:
    """Returns average indirect effects of the hidden state and MLP output per layer at the last subject token."""
    count, embeddings = len(decoder.blocks), model.get_input_embeddings()
    rows = [encode(tokenizer, prompt, subject, target=answer) for prompt, subject, answer in facts]
    firsts = [encode(tokenizer, prompt, subject, fact_token="subject_first").lookup for prompt, subject, _ in facts]
    mlps = [projection.module for projection in decoder.projections]
    generator = torch.Generator().manual_seed(0)
    hidden, mlp = torch.zeros(len(facts), count), torch.zeros(len(facts), count)
    clean, corrupted = torch.zeros(len(facts)), torch.zeros(len(facts))
    with quiet(model), torch.inference_mode():
        tokens = [embeddings(torch.tensor(row.ids[a : row.lookup + 1])) for row, a in zip(rows, firsts, strict=True)]
        deviation = NOISE * torch.cat(tokens).float().std()
        for i, (row, first) in enumerate(zip(rows, firsts, strict=True)):
            ids, answer = torch.tensor([row.ids[: row.prompt_length]]), row.ids[row.prompt_length]
            width = embeddings(ids).shape[-1]
            noise = torch.randn(SEEDS, row.lookup + 1 - first, width, generator=generator) * deviation

            def noisy(output: Any, at: int = first, end: int = row.lookup + 1, noise: Tensor = noise) -> Any:
                output = output.clone()
                output[:, at:end] += noise.to(output)
                return output

            def probability(ids: Tensor, answer: int = answer) -> float:
                return float(model(input_ids=ids, use_cache=False).logits[:, -1].float().softmax(-1)[:, answer].mean())

            with ExitStack() as stack:
                states = [stack.enter_context(_kept(block)) for block in decoder.blocks]
                outputs = [stack.enter_context(_kept(module)) for module in mlps]
                clean[i] = probability(ids)
            several = ids.expand(SEEDS, -1)
            with _changed(embeddings, noisy):
                corrupted[i] = probability(several)
                for layer in range(count):
                    with _changed(decoder.blocks[layer], _restoring(states[layer][0], row.lookup)):
                        hidden[i, layer] = probability(several) - corrupted[i]
                    with ExitStack() as stack:
                        for near in range(max(0, layer - window // 2), min(count, layer + window // 2 + 1)):
                            stack.enter_context(_changed(mlps[near], _restoring(outputs[near][0], row.lookup)))
                        mlp[i, layer] = probability(several) - corrupted[i]
    return {
        "facts": len(facts),
        "window": window,
        "clean": float(clean.mean()),
        "corrupted": float(corrupted.mean()),
        "hidden": hidden.mean(0).tolist(),
        "mlp": mlp.mean(0).tolist(),
        "mlp_error": (mlp.std(0, correction=0) / len(facts) ** 0.5).tolist(),
    }


@contextmanager
def _kept(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(hidden_of(output).clone()))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _changed(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _module, _inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def _restoring(clean: Tensor, at: int) -> Callable[[Any], Any]:
    def restore(output: Any) -> Any:
        state = hidden_of(output).clone()
        state[:, at] = clean[0, at]
        return with_hidden(output, state)

    return restore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model checkpoint")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="CounterFact in the EasyEdit layout")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text file, one paragraph per line")
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=20_000, help="number of anchor tokens")
    parser.add_argument("--stride", type=int, help="distance between the single layers")
    parser.add_argument("--widths", type=int, nargs="*", default=[3, 5], help="sizes of the groups of layers")
    parser.add_argument("--groups", nargs="*", default=[], metavar="A-B", help="additional groups of layers")
    parser.add_argument("--facts", type=int, default=20, help="number of facts for causal tracing; 0 skips it")
    parser.add_argument("--window", type=int, default=3, help="layers whose MLP outputs are restored together")
    add_json(parser)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype="float32")
    texts = running_text(options.text)
    cut = len(texts) * 3 // 4
    edits = paraphrased_edits(options.data, options.edits)
    config = EditConfig()
    trials = Trials(model, tokenizer, edits, texts[:cut], texts[cut:], config=config, tokens=options.tokens)
    depth = len(trials.decoder.blocks)
    trials_done: list[Trial] = []

    def run(groups: Sequence[tuple[int, ...]]) -> None:
        groups = [group for group in dict.fromkeys(groups) if group not in {trial.layers for trial in trials_done}]
        trials.collect_for({layer for group in groups for layer in group})
        for group in groups:
            try:
                trials_done.append(trials.run(config.replace(layers=group)))
                print(describe(trials_done[-1]), flush=True)
            except RLSEditError as error:
                print(f"{group}: {error}", flush=True)

    singles = single_layers(depth, options.stride)
    run([(layer,) for layer in singles])
    if trials.divisible(singles[0]):
        near = max(trials_done, key=lambda trial: trial.score).layers[-1]
        named = [tuple(range(int(a), int(b) + 1)) for a, _, b in (group.partition("-") for group in options.groups)]
        run([config.layers_for(depth), *windows(near, depth, options.widths), *named])
    best = max(trials_done, key=lambda trial: trial.score)
    rows = []
    for trial in trials_done:
        difference, error = compare(trial, best)
        rows.append({**asdict(trial), "behind_best": -difference, "behind_best_error": error})
    traced = None
    if options.facts:
        facts = known_facts(model, tokenizer, options.data, options.facts)
        traced = trace(model, tokenizer, trials.decoder, facts, options.window)
        print(f"causal tracing on {len(facts)} facts: {traced['clean']:.3f}, with noise {traced['corrupted']:.3f}")
        for layer, (state, output) in enumerate(zip(traced["hidden"], traced["mlp"], strict=True)):
            print(f"{layer:>8}  hidden state {state:6.3f}  MLP {output:6.3f}")
    about = {name: getattr(options, name) for name in ("edits", "tokens", "stride", "widths")}
    name = Path(options.model).name
    record(options.json, "layer choice", model=name, depth=depth, **about, rows=rows, tracing=traced)


if __name__ == "__main__":
    main()
