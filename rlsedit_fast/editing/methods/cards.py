"""Collects what the model card of an edited model states."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from rlsedit_fast.baselines import RECURSIVE
from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.session import EditSession
from rlsedit_fast.editing.status import layer_deviations
from rlsedit_fast.export.card import CardContents, CardEdit
from rlsedit_fast.models.tokens import fill


def card_contents(
    context: ModelContext,
    session: EditSession,
    *,
    anchors: str | None = None,
    stability: Mapping[str, Any] | None = None,
    stored: bool = False,
) -> CardContents:
    """Returns the contents of a card: settings, edits, and figures that were measured.

    Args:
        context: the model.
        session: its edits.
        anchors: description of the anchors, if it is known.
        stability: results on other text as `rlsedit edit --json` writes them: `text`, `before` and `after`.
        stored: whether the edits are in a store.
    """
    records = [record for record in session.ledger.records if record.state == "active"]
    config = context.config
    settings = {
        "method": "RLSEdit" if config.rule == RECURSIVE else config.rule,
        "edited layers": ", ".join(map(str, context.layers)),
        "edited weights": ", ".join(projection.name for projection in context.projections),
        "active edits": str(len(records)),
        "batch size": str(config.batch_size),
    }
    if config.rule == RECURSIVE:
        settings["adherence"] = f"{config.prior.adherence:g}"
        for layer, prior in zip(context.layers, session.priors, strict=False):
            settings[f"layer {layer}"] = f"lam {prior.lam:.4g}, mu {prior.mu:.4g}"
    if anchors:
        settings["anchors"] = anchors
    if session.protected:
        settings["protected prompts"] = str(len(session.protected))
    figures = dict[str, str]()
    if records:
        figures |= {
            "targets stated when last measured": f"{sum(one.success for one in records)} of {len(records)}",
            "median rank of the worst target token": f"{median(one.rank for one in records):g}",
            "median NLL of the target tokens, nats": f"{median(one.nll for one in records):.3f}",
            "mean fraction of the target change realized": f"{fmean(one.realized for one in records):.3f}",
        }
        chats = [one for one in records if one.chat_success is not None]
        if chats:
            figures["answers in a chat that contain the target"] = (
                f"{sum(bool(one.chat_success) for one in chats)} of {len(chats)}"
            )
    figures |= _stability_figures(stability or {})
    for deviation in layer_deviations(session.edited, session.layers):
        figures[f"weight change of layer {deviation.layer} (Frobenius norm)"] = (
            f"{deviation.weight:.4g}, at most {deviation.weight_bound:.4g}"
        )
    edits = [CardEdit(fill(one.prompt, one.subject)[0], one.target, one.rank, one.nll) for one in records]
    base = str(getattr(context.model.config, "_name_or_path", "") or "")
    return CardContents(base, len(records), edits, settings, figures, _undo(config.rule, stored))


def _stability_figures(stability: Mapping[str, Any]) -> dict[str, str]:
    if "after" not in stability:
        return {}
    before, after = stability["before"], stability["after"]
    return {
        f"perplexity on {after['tokens']} tokens of {stability['text']}": (
            f"{after['perplexity']:.3f} (before the edits {before['perplexity']:.3f})"
        ),
        "KL divergence from the base model there, nats per token": f"{after['kl']:.4f}",
    }


def _undo(rule: str, stored: bool) -> str:
    if rule != RECURSIVE:
        return "The edits of this method cannot be undone one by one; use the base model."
    if stored:
        return (
            "The edits are kept in a store, with which each of them is undone exactly: `rlsedit history --store DIR` "
            "lists them, and `rlsedit undo --store DIR ID --out NEW` undoes one and writes the model. Without the "
            "store, use the base model."
        )
    return (
        "The edits were applied without a store, so that they cannot be undone one by one; use the base model. "
        "`rlsedit edit --store DIR` keeps edits so that each of them can be undone exactly."
    )
