"""A synthetic world of people and their attributes, and a small language model trained on it.

`facts` generates the world from a seed, `tokens` builds its tokenizer, `train` is the training recipe of the weights in
`model/`, and `load_demo_model` loads model and tokenizer.
"""

from rlsedit_fast.world.facts import RELATIONS, Person, Relation, World
from rlsedit_fast.world.shipped import MODEL_DIR, load_demo_model

__all__ = ["MODEL_DIR", "RELATIONS", "Person", "Relation", "World", "load_demo_model"]
