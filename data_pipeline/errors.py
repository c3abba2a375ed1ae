"""What a user's mistake looks like: one line that names the thing and the remedy, and exit code 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# The packages behind fsspec's protocols raise classes of their own, many of which are no OSError.
NETWORK_PACKAGES = {"aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "httpx"}
NETWORK_PACKAGES |= {"huggingface_hub", "paramiko", "requests", "urllib3"}


class UserError(Exception):
    """A mistake that the user can mend; its text is one line that names the thing and the remedy."""


def is_failed_reading(error: BaseException) -> bool:
    """Whether a network or a disk threw this. A plain TypeError or KeyError is a defect of ours, not to be hidden."""
    if isinstance(error, (OSError, EOFError)):
        return True
    return any(kind.__module__.partition(".")[0] in NETWORK_PACKAGES for kind in type(error).__mro__)


def run_command(main: Callable[[list[str] | None], None]) -> NoReturn:
    """Run a command's main(None), which reads sys.argv, and exit with its code.

    0: done. 2: a UserError or a full disk, as one `error: …` line on stderr. 130: interrupted.
    Any other exception is a defect of ours and keeps its traceback.
    """
    try:
        main(None)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`); the interpreter must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        _fail(f"the disk that holds {error.filename or 'the output'} is full: free space there and run again", 2)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
