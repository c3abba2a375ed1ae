"""A rank's end: all said, all tidied, and no thread waited for."""

from __future__ import annotations

import subprocess
import sys

import pytest

ENDS = """
import atexit, sys, threading
from pretrain.distributed import leave
atexit.register(print, "tidied", end="")
threading.Thread(target=threading.Event().wait).start()  # as gloo's, which the interpreter would wait for or cut off
print("said", end=" ")
leave({code})
"""


@pytest.mark.parametrize("code", [0, 75])
def test_leaves_with_its_code_its_output_and_its_exit_handlers_done(code):
    process = subprocess.run(
        [sys.executable, "-c", ENDS.format(code=code)], capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stdout) == (code, "said tidied"), process.stderr
