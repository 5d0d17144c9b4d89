"""Which families each fold leaves out, and which labels say less than others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fortpoint.guard.training.examples import Example
from fortpoint.guard.training.folds import Folds, hashed

# Those that only measure are spread by cluster, and so are our own texts and the role prompts
# (awesome_chatgpt_prompts): they are the one benign set of their kind, and a guard that has seen
# none takes a third of them for jailbreaks.
FOLDS: tuple[tuple[str, ...], ...] = (
    ("advbench-like", "banking77", "sf_film_locations", "nltk_inaugural"),
    ("in-the-wild", "gsm8k", "mt_vicuna_bench", "nltk_state_union"),
    ("asb_agent_security_bench", "coa_attack_prompts", "clinc_oos"),
    ("bastioncorpus", "giskard_prompt_injections", "self_instruct"),
    ("bipia", "nltk_shakespeare", "fortunes"),
    ("injecagent", "cyberseceval_attacks", "written", "factbook"),
    ("deepset_prompt_injections", "nltk_movie_reviews", "jargon"),
    ("lakera_gandalf", "python_stdlib", "nltk_genesis"),
    ("piguard_notinject", "model_written_evals", "wordnet"),
    ("xstest", "nltk_product_reviews_1", "nltk_pros_cons"),
)

# Attacks that are only attacks where they stand (an order inside a tool's result reads like
# any user's request) say less about a text on its own.
RELIANCE = {
    "bipia": 0.3,
    "injecagent": 0.3,
    "asb_agent_security_bench": 0.5,
    "llm_adaptive_attacks": 0.5,
    "written_agent": 0.5,
}


def plan(examples: Sequence[Example]) -> Folds:
    """The fold that leaves each example out."""
    known = {family: fold for fold, families in enumerate(FOLDS) for family in families}
    found = [known.get(one.family, hashed(one.cluster, len(FOLDS))) for one in examples]
    return Folds(np.array(found), "family")
