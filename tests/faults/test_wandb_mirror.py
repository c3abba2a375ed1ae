"""Weights & Biases in every kind of trouble: training goes on, is told once, and never waits."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import UserError
from pretrain import wandb_mirror
from pretrain.config import Config, load_config
from pretrain.wandb_mirror import WandbMirror


class FakeWandb(types.ModuleType):
    """A client that does what the test says."""

    def __init__(self) -> None:
        super().__init__("wandb")
        import wandb.errors

        self.errors = wandb.errors
        self.Settings = dict
        self.modes: list[str] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.exit_codes: list[int] = []
        self.on_init: Callable[[str], None] = lambda mode: None
        self.on_log: Callable[[], None] = lambda: None

    def init(self, mode: str, **arguments: Any) -> FakeWandb:
        self.modes.append(mode)
        self.on_init(mode)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self.on_log()
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def config(write_config: Callable[..., Path]) -> Config:
    config = load_config(write_config("mirrored", {"metrics.wandb": "online"}))
    config.run.folder.mkdir(parents=True)
    return config


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """What a client that hangs waits for: set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_numbers_arrive_in_order_and_nothing_else(wandb: FakeWandb, config: Config) -> None:
    mirror = WandbMirror(config)
    for step in range(1, 4):
        mirror.log(step, {"loss": 1.0 / step, "documents": [1, 2], "fault": "spike"})
    mirror.finish(0)
    assert wandb.logged == [(1, {"loss": 1.0}), (2, {"loss": 0.5}), (3, {"loss": 1 / 3})]
    assert wandb.modes == ["online"] and wandb.exit_codes == [0] and mirror.failures == 0


def test_where_the_service_is_not_reached_the_run_goes_on_offline(
    wandb: FakeWandb, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_init(mode: str) -> None:
        if mode == "online":
            raise wandb.errors.CommError("no route to host\nlong story")

    wandb.on_init = on_init
    mirror = WandbMirror(config)
    mirror.log(1, {"loss": 1.0})
    mirror.finish(0)
    assert wandb.modes == ["online", "offline"] and wandb.logged == [(1, {"loss": 1.0})]
    assert capsys.readouterr().err == (
        "warning: Weights & Biases: no route to host; going on offline. Training goes on\n"
    )


def test_a_client_that_fails_altogether_costs_one_line(
    wandb: FakeWandb, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.on_init = raising(OSError("disk"))
    mirror = WandbMirror(config)
    for step in range(5):
        mirror.log(step, {"loss": 1.0})
    mirror.finish(0)
    assert capsys.readouterr().err.count("warning:") == 1 and mirror.failures == 2


def test_every_failure_to_send_is_counted_and_told_once(
    wandb: FakeWandb, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.on_log = raising(RuntimeError("service died"))
    mirror = WandbMirror(config)
    for step in range(5):
        mirror.log(step, {"loss": 1.0})
    mirror.finish(1)
    assert mirror.failures == 5 and wandb.exit_codes == [1]
    assert capsys.readouterr().err == "warning: Weights & Biases: service died. Training goes on\n"


def test_a_client_that_hangs_holds_nobody_up(
    wandb: FakeWandb, config: Config, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    monkeypatch.setattr(wandb_mirror, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(wandb_mirror, "QUEUED_STEPS", 10)
    wandb.on_log = released.wait  # type: ignore[assignment]
    mirror, begin = WandbMirror(config), time.monotonic()
    for step in range(100):
        mirror.log(step, {"loss": 1.0})
    mirror.finish(0)
    assert time.monotonic() - begin < 60, "a hang is forever; this is any time at all"
    assert mirror.failures >= 89, "steps beyond the queue, and the end, are counted"


def test_a_start_waits_only_so_long_for_the_service(
    wandb: FakeWandb, config: Config, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    monkeypatch.setattr(wandb_mirror, "INIT_SECONDS", 0.1)
    wandb.on_init = lambda mode: released.wait() and None
    mirror = WandbMirror(config)
    mirror.log(1, {"loss": 1.0})
    mirror.finish(0)
    assert mirror.failures == 2, "no answer, and not finished"


def test_what_the_user_must_do_is_an_error_before_training(wandb: FakeWandb, config: Config) -> None:
    wandb.on_init = raising(wandb.errors.UsageError("api_key not configured"))
    with pytest.raises(UserError, match=r"metrics\.wandb=online: api_key not configured; run `wandb login`"):
        WandbMirror(config)
