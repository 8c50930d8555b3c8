"""The training recipe of the demo model.

A training text consists of two sentences about two people. In most texts, positions after a name can attend only to
the last token of the name, so that the model learns to collect the identity of a person at that token, as large models
do. Without this mask, later positions attend to each word of the name, and an edit at the last token has no effect. The
mask is used only in training; the model is edited and evaluated with the ordinary causal mask.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_fast.world.facts import World, shuffled
from rlsedit_fast.world.tokens import build_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training.

    Attributes:
        seed: seed of the world, of the initial weights (`seed`) and of the order of the texts (`seed + 1`).
        people: number of people in the world.
        layers: number of blocks.
        hidden: width of the residual stream.
        intermediate: width of the MLP, that is of the keys; with experts, of each routed expert.
        experts: number of routed experts in every layer; 0 for ordinary MLPs.
        active: number of routed experts per token.
        shared: width of the shared expert in every layer.
        heads: number of attention heads.
        init_std: standard deviation of the initial weights, about `1 / sqrt(hidden)`; with the usual 0.02 the gated
            MLPs learn very slowly.
        first_people: number of people in the first steps; few people speed up learning to identify a name.
        first_steps: number of steps with `first_people`.
        steps: number of all steps.
        texts_per_step: batch size, in texts of two sentences.
        learning_rate: maximum learning rate of AdamW.
        warmup: steps of linear warmup, see `learning_rate_factor`.
        weight_decay: weight decay of AdamW.
        name_mask_rate: probability that the mask described in this module is applied to a sentence.
        template_weight: loss weight of tokens that belong neither to a name (0) nor to an answer (1).
    """

    seed: int = 0
    people: int = 2000
    layers: int = 4
    hidden: int = 128
    intermediate: int = 1536
    experts: int = 0
    active: int = 2
    shared: int = 512
    heads: int = 4
    init_std: float = 0.08
    first_people: int = 200
    first_steps: int = 200
    steps: int = 2500
    texts_per_step: int = 128
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.01
    name_mask_rate: float = 0.7
    template_weight: float = 0.1


@dataclass(frozen=True)
class _Sentence:
    tokens: list[int]  # without <s>; ends with a period
    name: tuple[int, int]  # [start, stop) of the tokens of the name
    answer: tuple[int, int]  # [start, stop) of the tokens of the answer


def _tokenize(world: World, tokenizer: Any) -> list[_Sentence]:
    vocab = tokenizer.get_vocab()
    sentences = []
    for prompt, name, answer in world.sentences():
        before, after = ([vocab[w] for w in part.split()] for part in prompt.split("{}"))
        name_ids, answer_ids = ([vocab[w] for w in text.split()] for text in (name, answer))
        start, prompt_stop = len(before), len(before) + len(name_ids) + len(after)
        sentences.append(
            _Sentence(
                before + name_ids + after + answer_ids + [vocab["."]],
                (start, start + len(name_ids)),
                (prompt_stop, prompt_stop + len(answer_ids)),
            )
        )
    return sentences


def _collate(
    pairs: list[tuple[_Sentence, _Sentence]], recipe: Recipe, bos: int, pad: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns token ids `[b, t]`, the additive mask `[b, 1, t, t]` and the loss weight of each token `[b, t]`."""
    width = 1 + max(len(a.tokens) + len(b.tokens) for a, b in pairs)
    ids = torch.full((len(pairs), width), pad)
    weight = torch.zeros(len(pairs), width)
    visible = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(pairs), 1, 1)
    for row, pair in enumerate(pairs):
        ids[row, 0] = bos
        at = 1
        for sentence in pair:
            stop = at + len(sentence.tokens)
            ids[row, at:stop] = torch.tensor(sentence.tokens)
            weight[row, at:stop] = recipe.template_weight
            weight[row, at + sentence.answer[0] : at + sentence.answer[1]] = 1.0
            name_start, name_stop = at + sentence.name[0], at + sentence.name[1]
            weight[row, name_start:name_stop] = 0.0  # names cannot be predicted
            if rng.random() < recipe.name_mask_rate:
                visible[row, name_stop:, name_start : name_stop - 1] = False
            at = stop
    return ids, additive_mask(visible), weight


def additive_mask(visible: torch.Tensor) -> torch.Tensor:
    """Converts a boolean mask `[b, t, t]` of visible positions to an additive float32 mask `[b, 1, t, t]`."""
    return torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min).unsqueeze(1)


def learning_rate_factor(step: int, *, warmup: int, steps: int) -> float:
    """Returns the learning rate factor of a step: linear warmup, then cosine decay to 0.

    Args:
        step: index of the step, from 0.
        warmup: number of warmup steps.
        steps: number of all steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def weighted_nll(logits: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the weighted mean negative log-likelihood of all tokens except the first.

    Args:
        logits: logits of all positions except the last, `[b, t - 1, vocabulary]`.
        ids: token ids `[b, t]`.
        weight: weight of each token `[b, t]`.

    Returns:
        A float32 scalar, in nats.
    """
    nll = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")
    return (nll * weight[:, 1:]).sum() / weight[:, 1:].sum()


def _new_model(recipe: Recipe, tokenizer: Any) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(recipe.seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.heads,
        "max_position_embeddings": 256,
        "initializer_range": recipe.init_std,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not recipe.experts:
        return LlamaForCausalLM(LlamaConfig(**settings))
    settings |= {
        "num_experts": recipe.experts,
        "num_experts_per_tok": recipe.active,
        "moe_intermediate_size": recipe.intermediate,
        "shared_expert_intermediate_size": recipe.shared,
        "norm_topk_prob": True,
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**settings))


def _states(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Returns the last hidden states `[b, t, d]` and the loss that balances the experts, 0 without experts."""
    experts = getattr(model.config, "num_experts", 0)
    if not experts:
        return model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state, 0.0
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    # The model's own loss takes masks [b, t] only; padding, which is a small part, counts here.
    output = model.model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True)
    balance = load_balancing_loss_func(output.router_logits, experts, model.config.num_experts_per_tok)
    return output.last_hidden_state, model.config.router_aux_loss_coef * balance


def recall(model: PreTrainedModel, tokenizer: Any, world: World, limit: int = 2000, seed: int = 1) -> float:
    """Measures which facts the model knows.

    Args:
        model: the model, on the CPU.
        tokenizer: its tokenizer.
        world: world of the facts.
        limit: maximum number of random (fact, phrasing) pairs.
        seed: seed of their choice.

    Returns:
        The fraction of the pairs whose answer tokens are all ranked first.
    """
    sentences = shuffled(_tokenize(world, tokenizer), random.Random(seed))[:limit]
    right = 0
    for at in range(0, len(sentences), 250):
        chunk = sentences[at : at + 250]
        width = 1 + max(len(s.tokens) for s in chunk)
        ids = torch.full((len(chunk), width), tokenizer.pad_token_id)
        for row, sentence in enumerate(chunk):
            ids[row, : 1 + len(sentence.tokens)] = torch.tensor([tokenizer.bos_token_id, *sentence.tokens])
        with torch.inference_mode():
            predicted = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        for row, sentence in enumerate(chunk):
            start, stop = sentence.answer  # +1 for <s>, -1 for next-token prediction
            right += bool((predicted[row, start:stop] == ids[row, start + 1 : stop + 1]).all())
    return right / len(sentences)


def train(recipe: Recipe, out: Path, report_every: int = 100) -> PreTrainedModel:
    """Trains a model and writes its weights (float16), its tokenizer and `recipe.json`.

    Args:
        recipe: hyperparameters.
        out: output folder.
        report_every: number of steps between lines of progress.

    Returns:
        The trained model in evaluation mode, with the written weights in float32.
    """
    world = World.generate(recipe.seed, recipe.people)
    tokenizer = build_tokenizer()
    sentences = _tokenize(world, tokenizer)
    first = _tokenize(World(world.people[: recipe.first_people], world.seed), tokenizer)
    model = _new_model(recipe, tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )

    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warmup=recipe.warmup, steps=recipe.steps)
    )
    rng = random.Random(recipe.seed + 1)
    queue: list[_Sentence] = []
    began = time.monotonic()
    for step in range(recipe.steps):
        if step == recipe.first_steps:
            queue.clear()
        while len(queue) < 2 * recipe.texts_per_step:
            queue.extend(shuffled(first if step < recipe.first_steps else sentences, rng))
        batch, queue = queue[: 2 * recipe.texts_per_step], queue[2 * recipe.texts_per_step :]
        pairs = list(zip(batch[::2], batch[1::2], strict=True))
        ids, mask, weight = _collate(pairs, recipe, tokenizer.bos_token_id, tokenizer.pad_token_id, rng)
        # On a CPU the grouped products of experts are several times slower in bfloat16.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not recipe.experts):
            states, balance = _states(model, ids, mask)
            logits = model.lm_head(states)[:, :-1]
        loss = weighted_nll(logits, ids, weight) + balance
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % report_every == 0 or step + 1 == recipe.steps:
            model.eval()
            known = recall(model, tokenizer, world, 1000)
            model.train()
            minutes = (time.monotonic() - began) / 60
            print(f"step {step + 1:5d}  loss {loss.item():.4f}  known {known:.3f}  {minutes:.1f} min", flush=True)
    model.eval()
    model.half().save_pretrained(out)
    save_tokenizer(tokenizer, out)
    model.float()
    facts = {"recipe": asdict(recipe), "torch": torch.__version__, "known": recall(model, tokenizer, world, 10_000)}
    (out / "recipe.json").write_text(json.dumps(facts, indent=2) + "\n")
    return model
