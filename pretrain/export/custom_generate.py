"""custom_generate/: our decoder as transformers' `generate` runs it, copied so that it needs nothing of ours.

The files are the modules of `pretrain.decoding` themselves, with their imports of one another made relative.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from pretrain import latent_dynamics
from pretrain.decoding import (
    acceptance,
    accounting,
    adaptive_length,
    captured,
    coasting,
    cycle,
    draft_length,
    drafting,
    dynamics_folder,
    in_transformers,
    sampling,
    seconds,
    speculative,
    stragglers,
    text_worth,
    trunk,
)

MODULES = (
    acceptance,
    accounting,
    adaptive_length,
    captured,
    coasting,
    cycle,
    draft_length,
    drafting,
    dynamics_folder,
    latent_dynamics,
    sampling,
    seconds,
    speculative,
    stragglers,
    text_worth,
    trunk,
)
ERRORS = '''"""What is raised for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend; its text is one line that names the thing and the remedy."""
'''


def write_custom_generate(folder: Path) -> None:
    """Write `folder`/custom_generate/."""
    target = folder / "custom_generate"
    target.mkdir()
    (target / "errors.py").write_text(ERRORS, encoding="utf-8")
    for module in MODULES:
        (target / f"{module.__name__.rpartition('.')[2]}.py").write_text(_freed(module), encoding="utf-8")
    (target / "generate.py").write_text(_freed(in_transformers), encoding="utf-8")


def _freed(module: object) -> str:
    """A module's source that imports its neighbours relatively."""
    text = inspect.getsource(module)  # type: ignore[arg-type]  # a module, which has no type of its own here
    text = text.replace("from data_pipeline import UserError", "from .errors import UserError")
    text = re.sub(r"^from pretrain(?:\.\w+)*\.(\w+) import ", r"from .\1 import ", text, flags=re.MULTILINE)
    left = re.search(r"^\s*(?:from|import) (?:pretrain|data_pipeline).*", text, flags=re.MULTILINE)
    assert left is None, f"{module}: `{left and left[0]}` would not work outside this package"
    return text
