"""A run's numbers at Weights & Biases: a copy that training neither waits for nor depends on."""

from __future__ import annotations

import queue
import sys
import threading
import uuid
from collections.abc import Mapping
from typing import Any

from data_pipeline import UserError
from pretrain.config import Config

INIT_SECONDS = 30.0
"""How long a start waits to hear whether the service is there. Later it may still come."""
FINISH_SECONDS = 60.0
"""How long the end of a run waits for what is not sent yet; `wandb sync` sends the rest."""
QUEUED_STEPS = 10_000
"""Steps that wait for a service that does not answer; further ones are counted as lost. metrics.jsonl has them all."""


class WandbMirror:
    """Sends numbers from a thread of its own, under one id for all starts of a run.

    Whatever the service or its client does, `log` returns at once. Trouble is told once on stderr, and counted in
    `failures`. Where the service cannot be reached, the client writes to the run's folder for `wandb sync`.
    Raises UserError on construction where the user has to do something: log in, or choose offline.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.failures = 0
        self._client: Any = None
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | None] = queue.Queue(QUEUED_STEPS)
        self._started = threading.Event()
        self._mistake: str | None = None
        self._exit_code = 0
        self._thread = threading.Thread(target=self._send, name="wandb-mirror", daemon=True)
        self._thread.start()
        self._started.wait(INIT_SECONDS)
        if self._mistake is not None:
            mode = config.metrics.wandb
            raise UserError(f"metrics.wandb={mode}: {self._mistake}; run `wandb login`, or set metrics.wandb=offline")
        if not self._started.is_set():
            self._trouble(f"no answer within {INIT_SECONDS:g} s")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """One step's numbers; what is not a number stays in metrics.jsonl alone."""
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        try:
            self._queue.put_nowait((step, numbers))
        except queue.Full:
            self._trouble("too many steps wait to be sent")

    def finish(self, exit_code: int) -> None:
        """Send what is left, for at most FINISH_SECONDS."""
        self._exit_code = exit_code
        try:
            self._queue.put_nowait(None)
            self._thread.join(FINISH_SECONDS if self._started.is_set() else 0.0)
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._trouble(f"not finished; `wandb sync` sends what is under {self.config.run.folder}/wandb")

    def _send(self) -> None:
        try:
            self._client = self._init()
        except Exception as error:  # whatever it is, it is not worth a run
            self._trouble(_first_line(error))
        self._started.set()
        while (item := self._queue.get()) is not None:
            self._attempt("log", item[1], step=item[0])
        self._attempt("finish", exit_code=self._exit_code)

    def _attempt(self, method: str, *args: Any, **kwargs: Any) -> None:
        try:
            if self._client is not None:
                getattr(self._client, method)(*args, **kwargs)
        except Exception as error:  # as above
            self._trouble(_first_line(error))

    def _init(self) -> Any:
        """A run of the client's: online if that was asked for and works, else offline; None after a mistake."""
        import wandb

        id_file = self.config.run.folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        arguments: dict[str, Any] = {
            "project": self.config.metrics.wandb_project,
            "name": self.config.run.name,
            "id": id_file.read_text(encoding="utf-8"),
            "resume": "allow",
            "dir": str(self.config.run.folder),
            "config": self.config.model_dump(mode="json"),
            "settings": wandb.Settings(init_timeout=0.8 * INIT_SECONDS),
        }
        try:
            return wandb.init(mode="offline" if self.config.metrics.wandb == "offline" else "online", **arguments)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            self._mistake = _first_line(error)
            return None
        except Exception as error:  # as above
            if self.config.metrics.wandb == "offline":
                raise
            self._trouble(f"{_first_line(error)}; going on offline")
            return wandb.init(mode="offline", **arguments)

    def _trouble(self, reason: str) -> None:
        self.failures += 1
        if self.failures == 1:
            print(f"warning: Weights & Biases: {reason}. Training goes on", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
