"""Measurements of edits in the present model: ranks, and the answers to their prompts, also in a chat."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.layers import EditedLayers
from rlsedit_fast.editing.ledger import Ledger
from rlsedit_fast.editing.records import EditRecord
from rlsedit_fast.editing.requests import Request
from rlsedit_fast.editing.search.objective import Measured, measure
from rlsedit_fast.editing.search.value_search import Values
from rlsedit_fast.editing.status import Sample
from rlsedit_fast.errors import UnstatedError, listed
from rlsedit_fast.models.answers import CHAT_TOKENS, answer_facts, chat_answer_facts, chat_fact, supports_chat
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.models.tokens import Row


@dataclass(frozen=True)
class Answers:
    """Answers of a model to requests.

    Attributes:
        plain: greedy continuation of each bare prompt, with as many tokens as the target.
        chat: answer to each prompt as a user message; None without a chat template, or if the prompt is too long.
    """

    plain: list[str]
    chat: list[str | None]


class Measurement:
    """Measures edits in the present model.

    Args:
        context: the model.
    """

    def __init__(self, context: ModelContext) -> None:
        self._context = context
        self._has_chat = context.config.measure_chat and supports_chat(context.tokenizer)

    def ranks(self, requests: Sequence[Request]) -> Measured:
        """Measures NLL and rank of the targets at the bare prompts; `realized` has no meaning."""
        found = measure(self._context.site, [request.contexts[0] for request in requests])
        self._context.processes.same_tensors(found.nll, found.rank)
        return found

    def ranks_everywhere(self, requests: Sequence[Request]) -> Measured:
        """Measures NLL and rank of the targets in the worst of the bare prompts and the contexts in a chat."""
        rows = [row for request in requests for row in (request.contexts[0], *_chat_contexts(request))]
        found = measure(self._context.site, rows, contexts=1 + requests[0].chat)
        nll, rank = (column.unflatten(0, (len(requests), -1)).amax(1) for column in (found.nll, found.rank))
        self._context.processes.same_tensors(nll, rank)
        return Measured(torch.ones(len(requests)), nll, rank)

    def sample(self, ledger: Ledger, layers: EditedLayers, most: int) -> Sample:
        """Measures at most `most` active edits, evenly spaced over the stream."""
        active, config = ledger.active, self._context.config
        ids = [active[at * len(active) // min(most, len(active))] for at in range(min(most, len(active)))]
        if not ids:
            return Sample(0, None, None)
        requests = ledger.requests(ids)
        shift = None
        if config.stored_rows is not None:
            shift = layers.key_shift(requests, ledger.rows(ids), config.effective_rows)
        return Sample(len(ids), float((self.ranks(requests).rank == 1).float().mean()), shift)

    def answers(self, requests: Sequence[Request]) -> Answers:
        """Generates answers to the prompts."""
        model, tokenizer = self._context.model, self._context.tokenizer
        plain = answer_facts(model, tokenizer, [one.edit for one in requests])
        chat: list[str | None] = [None] * len(requests)
        rows = self._chat_rows(requests)
        texts = chat_answer_facts(model, tokenizer, [requests[at].edit for at in rows]) if rows else []
        for at, text in zip(rows, texts, strict=True):
            chat[at] = text
        return self._context.processes.same(Answers(plain, chat))

    def answer_fields(self, requests: Sequence[Request]) -> list[dict[str, Any]]:
        """Returns for each request the fields of its record about answers of the present model."""
        now = self.answers(requests)
        fields: list[dict[str, Any]] = [
            {"answer": plain, "chat_answer": chat} for plain, chat in zip(now.plain, now.chat, strict=True)
        ]
        if rows := self._chat_rows(requests):
            found = measure(self._context.site, list(rows.values()))
            for at, nll, rank in zip(rows, found.nll.tolist(), found.rank.tolist(), strict=True):
                fields[at] |= {"chat_nll": nll, "chat_rank": rank}
        return fields

    def record_fields(
        self, requests: Sequence[Request], values: Values, written: Collection[int], before: Answers | None
    ) -> list[dict[str, Any]]:
        """Returns for each request the fields of its record about its search and the model after the write.

        Args:
            requests: the batch.
            values: its values.
            written: positions of the requests that were written.
            before: answers to the new requests, which are the first ones, before the change.
        """
        bare = [request.contexts[0] for request in requests]
        now = measure(self._context.site, bare, values.goal[:, 0], values.delta.norm(dim=1))
        now.realized[[at for at in range(len(requests)) if at not in written]] = 0.0
        columns = {
            "search_converged": values.converged,
            "search_nll": values.nll,
            "search_rank": values.rank,
            "search_steps": values.steps,
            "realized": now.realized,
            "nll": now.nll,
            "rank": now.rank,
        }
        each = zip(*(column.tolist() for column in columns.values()), strict=True)
        fields = [dict(zip(columns, row, strict=True)) for row in each]
        results = [one | answer for one, answer in zip(fields, self.answer_fields(requests), strict=True)]
        if before is not None:
            for one, plain, chat in zip(results, before.plain, before.chat, strict=False):
                one |= {"answer_before": plain, "chat_answer_before": chat}
        return self._context.processes.same(results)

    def _chat_rows(self, requests: Sequence[Request]) -> dict[int, Row]:
        """Returns the rows of the prompts in a chat, by position; without those that are too long for the model."""
        if not self._has_chat:
            return {}
        longest = max_tokens(self._context.model.config)
        rows = {at: chat_fact(self._context.tokenizer, request.edit) for at, request in enumerate(requests)}
        return {at: row for at, row in rows.items() if longest is None or len(row.ids) + CHAT_TOKENS <= longest}


def _chat_contexts(request: Request) -> tuple[Row, ...]:
    return request.contexts[len(request.contexts) - request.chat :]


def check_stated(records: Sequence[EditRecord], earlier: int) -> None:
    """Raises UnstatedError if the model does not state the target of an edit of a batch.

    Args:
        records: records of the batch.
        earlier: number of edits before the batch.
    """
    failed = [at for at, record in enumerate(records) if not record.success or record.state != "active"]
    if failed:
        lines = [
            f"edit {earlier + at + 1}: {records[at].prompt!r}, subject {records[at].subject!r}: the model states "
            f"{records[at].answer!r}, the target is {records[at].target!r}"
            for at in failed
        ]
        raise UnstatedError(
            f"the model does not state the targets of {len(failed)} of {len(records)} edits of a batch; the batch was "
            "not applied:\n" + "\n".join(listed(lines)),
            hint="correct or leave out these edits, or apply them without --require-stated (Python: require_stated)",
        )
