"""A made-up world of people and their attributes, and the small language model that has learnt it.

`facts` generates the world from a seed, `tokens` turns it into a tokenizer, `train` is the recipe that
made the weights in `model/`, and `load_demo_model` hands model and tokenizer to whoever asks.
"""

from rlsedit_fast.world.facts import RELATIONS, Person, Relation, World
from rlsedit_fast.world.shipped import MODEL_DIR, load_demo_model

__all__ = ["MODEL_DIR", "RELATIONS", "Person", "Relation", "World", "load_demo_model"]
