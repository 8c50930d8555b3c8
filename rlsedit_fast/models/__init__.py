"""Everything that depends on transformers: loading, projections, sites, tokens, generation and fingerprints.

`find_decoder` finds the blocks and editable projections of a model, `encode` tokenizes a prompt and finds the token at
which it is edited, and `find_site` returns the place in the model at which the value of an edit is optimized.
"""

from rlsedit_fast.models.answers import chat_answers, chat_row, generate_answers, supports_chat
from rlsedit_fast.models.conversations import ROLES, Conversation, Message, invalid_messages, render
from rlsedit_fast.models.experts import ExpertProjection
from rlsedit_fast.models.facts import ChatForm, Fact, encode_fact, encode_in_chat
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.generation import Sample, greedy, sample
from rlsedit_fast.models.joins import Join, join_texts
from rlsedit_fast.models.linear import LinearProjection, Projection
from rlsedit_fast.models.loading import load_model
from rlsedit_fast.models.passes import hidden_of, quiet, with_hidden
from rlsedit_fast.models.prefixes import Prefixed, shared_prefixes, with_prefixes
from rlsedit_fast.models.projections import Decoder, find_decoder
from rlsedit_fast.models.sites import Site, SiteState, find_site
from rlsedit_fast.models.tokens import FactToken, Row, encode, encode_plain, fill, pad, target_ids

__all__ = [
    "ROLES",
    "ChatForm",
    "Conversation",
    "Decoder",
    "ExpertProjection",
    "Fact",
    "FactToken",
    "Join",
    "LinearProjection",
    "Message",
    "Prefixed",
    "Projection",
    "Row",
    "Sample",
    "Site",
    "SiteState",
    "chat_answers",
    "chat_row",
    "encode",
    "encode_fact",
    "encode_in_chat",
    "encode_plain",
    "fill",
    "find_decoder",
    "find_site",
    "fingerprint",
    "generate_answers",
    "greedy",
    "hidden_of",
    "invalid_messages",
    "join_texts",
    "load_model",
    "pad",
    "quiet",
    "render",
    "sample",
    "shared_prefixes",
    "supports_chat",
    "target_ids",
    "with_hidden",
    "with_prefixes",
]
