"""Trains a small causal language model on the true facts of CounterFact records, as a model to edit.

    python bench/counterfact_lm.py --data counterfact.json --text wikitext.txt --out DIR --facts 2000
    python bench/paper.py model --model DIR --data counterfact.json --text wikitext.txt --among 2000 \\
        --layers 0 --clamp 1.5

This gives real prompts, answers of several tokens and thousands of edits without any download: a byte-level BPE
tokenizer trained on the texts, and a GPT-NeoX of four layers with d_k = 4,096, trained on the prompt, paraphrase and
locality prompt of every record with their true answers, and on running text. In most sentences, positions after a
subject attend only to its last token, as in the recipe of the demo model, so that the model collects a subject at the
token that is edited. Edits use the first layer with a clamp of 1.5; the published 0.75 is too small for a hidden size
of 256.

An interrupted run resumes from its last checkpoint in DIR. At the end, DIR is a regular checkpoint, and `recipe.json`
reports the accuracy on the facts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from recording import record

from rlsedit_fast.evaluation.datasets import counterfact_record
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.files import written_whole
from rlsedit_fast.models.tokens import encode, encode_plain
from rlsedit_fast.world.train import additive_mask, learning_rate_factor, weighted_nll

BEGIN, END = "<s>", "</s>"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training."""

    facts: int = 2000
    vocabulary: int = 8192
    layers: int = 4
    hidden: int = 256
    intermediate: int = 4096
    heads: int = 4
    steps: int = 3000
    texts_per_step: int = 64
    text_share: float = 0.2  # fraction of the texts of a step
    text_length: int = 64
    learning_rate: float = 1.5e-3
    warmup: int = 100
    weight_decay: float = 0.01
    name_mask_rate: float = 0.7
    template_weight: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class _Text:
    ids: list[int]
    weights: list[float]  # loss weight of each token
    name: tuple[int, int]  # [start, stop) of the tokens of the subject; empty if there is none


def read_facts(path: Path, count: int) -> list[tuple[str, str | None, str]]:
    """Returns `(prompt, subject, true answer)` of prompts, paraphrases and locality prompts of the first records."""
    facts: dict[tuple[str, str | None, str], None] = {}
    for fact in map(counterfact_record, json.loads(path.read_text(encoding="utf-8"))[:count]):
        subject, answer = fact["subject"], fact["ground_truth"]
        facts[fact["prompt"], subject if subject in fact["prompt"] else None, answer] = None
        for text in fact["paraphrases"]:
            facts[text, subject if subject in text else None, answer] = None
        for text, right in fact["neighborhood"]:
            facts[text, None, right] = None
    return list(facts)


def train_tokenizer(texts: Sequence[str], size: int, out: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END)
    fast.save_pretrained(out)
    return fast


def new_model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(recipe.seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            max_position_embeddings=512,
            use_parallel_residual=False,
            tie_word_embeddings=True,
            initializer_range=recipe.hidden**-0.5,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(facts: Sequence[tuple[str, str | None, str]], tokenizer: Any, recipe: Recipe) -> list[_Text]:
    texts = []
    stop = tokenizer(".", add_special_tokens=False)["input_ids"]
    for prompt, subject, answer in facts:
        if subject is None:
            row, name = encode_plain(tokenizer, prompt, answer), (0, 0)
        else:
            row = encode(tokenizer, prompt, subject, target=answer)
            first = encode(tokenizer, prompt, subject, fact_token="subject_first").lookup
            name = (first, row.lookup + 1)
        weights = [recipe.template_weight] * row.prompt_length + [1.0] * (len(row.ids) - row.prompt_length + len(stop))
        weights[slice(*name)] = [0.0] * (name[1] - name[0])  # subjects cannot be predicted
        texts.append(_Text([*row.ids, *stop], weights, name))
    return texts


def pieces(path: Path, tokenizer: Any, recipe: Recipe) -> list[_Text]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    ids = [token for line in lines if line for token in tokenizer(line, add_special_tokens=False)["input_ids"]]
    length = recipe.text_length
    cut = [ids[at : at + length] for at in range(0, len(ids) - length, length)]
    return [_Text([tokenizer.bos_token_id, *part], [0.0] + [recipe.template_weight] * length, (0, 0)) for part in cut]


def batch_of(step: int, facts: Sequence[_Text], texts: Sequence[_Text], recipe: Recipe) -> list[_Text]:
    """Returns the texts of a step, which depend only on its number, so that training can resume at any step."""
    running = round(recipe.texts_per_step * recipe.text_share)
    each = recipe.texts_per_step - running
    chosen = []
    for at in range(step * each, (step + 1) * each):
        epoch, place = divmod(at, len(facts))
        chosen.append(facts[_order(epoch, len(facts), recipe.seed)[place]])
    return chosen + random.Random(f"{recipe.seed}-{step}").sample(texts, running)


_orders: dict[tuple[int, int, int], list[int]] = {}


def _order(epoch: int, count: int, seed: int) -> list[int]:
    key = (epoch, count, seed)
    if key not in _orders:
        if len(_orders) > 2:
            _orders.clear()
        _orders[key] = random.Random(f"{seed}-epoch-{epoch}").sample(range(count), count)
    return _orders[key]


def parts_of(batch: Sequence[_Text], most_padded: float = 1.3) -> list[list[_Text]]:
    """Groups texts of similar length, since padding all of them to the longest is much slower."""
    parts: list[list[_Text]] = []
    for text in sorted(batch, key=lambda text: len(text.ids)):
        if not parts or len(text.ids) > most_padded * len(parts[-1][0].ids) + 4:
            parts.append([])
        parts[-1].append(text)
    return parts


def collate(batch: Sequence[_Text], rng: random.Random, recipe: Recipe, device: str) -> tuple[torch.Tensor, ...]:
    """Returns token ids `[b, t]`, the additive mask `[b, 1, t, t]` and the loss weight of each token `[b, t]`."""
    width = max(len(text.ids) for text in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    weight = torch.zeros(len(batch), width)
    visible = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(batch), 1, 1)
    for row, text in enumerate(batch):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        weight[row, : len(text.ids)] = torch.tensor(text.weights)
        start, stop = text.name
        if stop > start and rng.random() < recipe.name_mask_rate:
            visible[row, stop:, start : stop - 1] = False
    return ids.to(device), additive_mask(visible).to(device), weight.to(device)


def known(model: Any, tokenizer: Any, facts: Sequence[tuple[str, str | None, str]], most: int = 1000) -> float:
    some = random.Random(1).sample(list(facts), min(most, len(facts)))
    found = score(model, tokenizer, [(prompt, answer) for prompt, _, answer in some])
    return sum(one.exact for one in found) / len(found)


def train(options: argparse.Namespace, recipe: Recipe) -> None:
    out, device = options.out, options.device
    out.mkdir(parents=True, exist_ok=True)
    facts = read_facts(options.data, recipe.facts)
    checkpoint = out / "training.pt"
    started = torch.load(checkpoint, map_location="cpu") if checkpoint.exists() else None
    if started is not None and started["recipe"] != asdict(recipe):
        raise SystemExit(f"{checkpoint} has another recipe: {started['recipe']}; choose another --out or remove it")
    if started is None:
        texts = [f"{prompt} {answer}." for prompt, _, answer in facts]
        tokenizer = train_tokenizer([*texts, options.text.read_text(encoding="utf-8")], recipe.vocabulary, out)
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(out)
    sentences, running = tokenize(facts, tokenizer, recipe), pieces(options.text, tokenizer, recipe)
    model = new_model(recipe, tokenizer).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    first, seconds = 0, 0.0
    if started is not None:
        model.load_state_dict(started["model"])
        optimizer.load_state_dict(started["optimizer"])
        first, seconds = started["step"], started["seconds"]
        print(f"resuming at step {first}")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(facts)} sentences", flush=True)
    began = time.monotonic() - seconds
    model.train()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(step, warmup=recipe.warmup, steps=recipe.steps)
        rng, loss = random.Random(f"{recipe.seed}-mask-{step}"), 0.0
        parts = [collate(part, rng, recipe, device) for part in parts_of(batch_of(step, sentences, running, recipe))]
        whole = sum(weight[:, 1:].sum() for _, _, weight in parts)
        for ids, mask, weight in parts:
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=not options.full_precision):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            part_loss = weighted_nll(logits, ids, weight) * (weight[:, 1:].sum() / whole)
            part_loss.backward()
            loss += part_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == recipe.steps
        if (step + 1) % options.report_every == 0 or last:
            seconds = time.monotonic() - began
            model.eval()
            accuracy = known(model, tokenizer, facts, 300)
            model.train()
            print(f"step {step + 1:5d}  loss {loss:.4f}  known {accuracy:.3f}  {seconds / 60:.1f} min", flush=True)
            if not last:
                with written_whole(checkpoint) as (temporary,):
                    torch.save(
                        {
                            "recipe": asdict(recipe),
                            "model": model.state_dict(),
                            "optimizer": optimizer.state_dict(),
                            "step": step + 1,
                            "seconds": seconds,
                        },
                        temporary,
                    )
    model.eval()
    model.save_pretrained(out)
    shares = {
        "prompts and rephrasings": known(model, tokenizer, [fact for fact in facts if fact[1] is not None], 4000),
        "locality prompts": known(model, tokenizer, [fact for fact in facts if fact[1] is None], 4000),
    }
    about = {"recipe": asdict(recipe), "known": shares, "minutes": seconds / 60, "loss": loss}
    record(out / "recipe.json", "a model that knows CounterFact's true facts", **about)
    checkpoint.unlink(missing_ok=True)
    print(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CounterFact file, original or EasyEdit layout")
    parser.add_argument("--text", type=Path, required=True, help="text file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    parser.add_argument("--full-precision", action="store_true", help="do not use bfloat16")
    parser.add_argument("--report-every", type=int, default=100, help="steps between evaluations and checkpoints")
    for name, default in asdict(Recipe()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options, Recipe(**{name: getattr(options, name) for name in asdict(Recipe())}))


if __name__ == "__main__":
    main()
