"""Evaluation suites, by name. Each is a function of a subject, a data set and a limit to a JSON-able result."""

from pretrain.evals.belief import BELIEF
from pretrain.evals.city import CITY
from pretrain.evals.countdown import COUNTDOWN
from pretrain.evals.harness import LM_EVAL
from pretrain.evals.latent import LATENT
from pretrain.evals.path_star import PATH_STAR
from pretrain.evals.perplexity import PERPLEXITY
from pretrain.evals.probes import PROBES
from pretrain.evals.speculative import SPECULATIVE
from pretrain.evals.suite import Suite
from pretrain.evals.word_problem import WORD_PROBLEM

SUITES: dict[str, Suite] = {
    "perplexity": PERPLEXITY,
    "speculative": SPECULATIVE,
    "lm_eval": LM_EVAL,
    "probes": PROBES,
    "latent": LATENT,
    "path_star": PATH_STAR,
    "countdown": COUNTDOWN,
    "city": CITY,
    "word_problem": WORD_PROBLEM,
    "belief": BELIEF,
}

__all__ = ["SUITES", "Suite"]
