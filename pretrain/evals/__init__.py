"""Evaluation suites, by name. Each is a function of a subject, a data set and a limit to a JSON-able result."""

from pretrain.evals.perplexity import PERPLEXITY
from pretrain.evals.speculative import SPECULATIVE
from pretrain.evals.suite import Suite

SUITES: dict[str, Suite] = {"perplexity": PERPLEXITY, "speculative": SPECULATIVE}

__all__ = ["SUITES", "Suite"]
