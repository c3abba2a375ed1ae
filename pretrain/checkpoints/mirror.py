"""A second copy of the checkpoints, at any URL that fsspec knows: written in the background, read where all is lost.

A mirrored checkpoint is whole once its manifest is there, which is uploaded last, after every other file was read back
and had its sha256; `latest` moves after that. What an outage interrupts goes on where it stopped. Beside each one lie
the run's metrics.jsonl up to it and the wandb id, so that an empty disk is enough to go on.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.checkpoints.manifest import (
    MANIFEST,
    DamagedManifest,
    FileEntries,
    check_file,
    flush_folder,
    parse_manifest,
    read_manifest,
)
from pretrain.checkpoints.retention import UNFINISHED, hold, name_of, retained, saved_steps, validation_loss
from pretrain.checkpoints.state import STATE, read_state
from pretrain.config import Config
from pretrain.metrics import METRICS_FILE
from pretrain.remote import open_url, put_file, sha256_of, sizes_in

LATEST, WANDB_ID = "latest", "wandb_id"
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 1.0


class Mirror:
    """The checkpoints at a URL. Raises UserError for a URL that fsspec does not know."""

    def __init__(self, url: str):
        self.url = url
        self.fs, self.root = open_url(url, "checkpoint.mirror=")

    def whole_steps(self) -> list[int]:
        """The steps mirrored completely, newest first. Raises what the file system raises."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.root):
            return []
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.root, detail=False)]
        steps = sorted((int(name[5:]) for name in names if name[:5] == "step_" and name[5:].isdigit()), reverse=True)
        return [step for step in steps if self.fs.exists(self._at(step, MANIFEST))]

    def upload(self, path: Path, step: int) -> None:
        """Copy one whole local checkpoint, whatever of it is there already; verified before its manifest follows.

        Raises OSError, or what the file system raises, where it cannot be.
        """
        with hold(path):
            manifest = read_manifest(path)
            self.fs.makedirs(self._at(step, ""), exist_ok=True)
            files: FileEntries = dict(manifest["files"])
            there = sizes_in(self.fs, self._at(step, ""))
            for name, entry in sorted(files.items()):
                remote = self._at(step, name)
                if there.get(name) != entry["bytes"] or sha256_of(self.fs, remote) != entry["sha256"]:
                    put_file(self.fs, path / name, remote)
                    if sha256_of(self.fs, remote) != entry["sha256"]:
                        raise OSError(f"{remote}: does not read back as it was written")
            self._upload_run_files(path, step)
            put_file(self.fs, path / MANIFEST, self._at(step, MANIFEST))

    def move_latest(self, step: int) -> None:
        """Say which mirrored checkpoint is the newest."""
        self.fs.pipe_file(f"{self.root}/{LATEST}", name_of(step).encode())

    def prune(self, config: Config) -> None:
        """Remove mirrored checkpoints by the rules that hold locally."""
        losses = {step: self._validation_loss(step) for step in self.whole_steps()}
        for step in losses.keys() - retained(losses, config.checkpoint):
            self.fs.rm_file(self._at(step, MANIFEST))  # from here on it is no checkpoint
            self.fs.rm(self._at(step, ""), recursive=True)

    def restore(self, run: Path) -> Path | None:
        """Fetch the newest mirrored checkpoint that is whole into a run's folder; None where there is none."""
        for step in self.whole_steps():
            path = run / "checkpoints" / name_of(step)
            try:
                self._fetch(step, path)
            except DamagedManifest as problem:
                print(f"warning: leaving damaged checkpoint {self._at(step, '')}: {problem}", file=sys.stderr)
                continue
            self._fetch_run_files(step, path, run)
            return path
        return None

    def _fetch(self, step: int, path: Path) -> None:
        unfinished = path.with_name(f"{UNFINISHED}{path.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            content = self.fs.cat_file(self._at(step, MANIFEST))
            for name, entry in parse_manifest(content, self._at(step, MANIFEST))["files"].items():
                target = unfinished / name
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.fs.get_file(self._at(step, name), str(target))
                except FileNotFoundError:
                    raise DamagedManifest(f"{name} is missing") from None
                if problem := check_file(target, entry):
                    raise DamagedManifest(f"{name} {problem}")
            (unfinished / MANIFEST).write_bytes(content)
            shutil.rmtree(path, ignore_errors=True)  # damaged, or it would have been taken
            unfinished.rename(path)
            flush_folder(path.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _upload_run_files(self, path: Path, step: int) -> None:
        run = path.parent.parent
        with (run / METRICS_FILE).open("rb") as file:
            self.fs.pipe_file(self._at(step, METRICS_FILE), file.read(read_state(path)["metrics_bytes"]))
        if (run / WANDB_ID).exists():
            put_file(self.fs, run / WANDB_ID, self._at(step, WANDB_ID))

    def _fetch_run_files(self, step: int, path: Path, run: Path) -> None:
        metrics = run / METRICS_FILE
        if not metrics.exists() or metrics.stat().st_size < read_state(path)["metrics_bytes"]:
            self.fs.get_file(self._at(step, METRICS_FILE), str(metrics))
        if not (run / WANDB_ID).exists() and self.fs.exists(self._at(step, WANDB_ID)):
            self.fs.get_file(self._at(step, WANDB_ID), str(run / WANDB_ID))

    def _validation_loss(self, step: int) -> float | None:
        loss = json.loads(self.fs.cat_file(self._at(step, STATE))).get("validation_loss")
        return None if loss is None else float(loss)

    def _at(self, step: int, name: str) -> str:
        return f"{self.root}/{name_of(step)}/{name}".rstrip("/")


class MirrorThread:
    """Keeps a mirror up to date beside the training: outages are told and counted, and stop nothing."""

    def __init__(self, mirror: Mirror, config: Config):
        self.mirror, self.config = mirror, config
        self.failures = 0
        """Attempts that failed."""
        self._told = 0
        self._work = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._work.set()  # what an earlier start could not upload any more
        self._thread.start()

    def wake(self) -> None:
        """There is a new checkpoint."""
        self._work.set()

    def new_failures(self) -> bool:
        """Whether attempts have failed since this was last asked."""
        told, self._told = self._told, self.failures
        return self.failures > told

    def close(self, patience: float) -> None:
        """Stop once everything is uploaded, or after `patience` seconds."""
        self._closing.set()
        self._work.set()
        self._thread.join(patience)

    def _run(self) -> None:
        while True:
            self._work.wait()
            self._work.clear()
            for attempt in range(ATTEMPTS):
                if self._sync():
                    break
                self._closing.wait(FIRST_PAUSE_SECONDS * 4**attempt)
            if self._closing.is_set() and not self._work.is_set():
                return

    def _sync(self) -> bool:
        """Upload what stays locally and is not there yet, newest first. Whether nothing went wrong."""
        local = saved_steps(self.config.run.folder / "checkpoints")
        wanted = retained({step: validation_loss(path) for step, path in local.items()}, self.config.checkpoint)
        failures = self.failures
        with self._counting():
            missing = wanted - set(self.mirror.whole_steps())
            for step in sorted(missing, reverse=True):
                with self._counting():  # one that cannot be uploaded, being damaged, holds up no other
                    self.mirror.upload(local[step], step)
            if there := self.mirror.whole_steps():
                self.mirror.move_latest(there[0])
                self.mirror.prune(self.config)
        return self.failures == failures

    @contextmanager
    def _counting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each file system has errors of its own, and none may stop the run
            self.failures += 1
            print(
                f"warning: checkpoint.mirror={self.mirror.url}: {type(error).__name__}: {error}; the run goes on, "
                "and the mirror is tried again",
                file=sys.stderr,
                flush=True,
            )
