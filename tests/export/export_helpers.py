"""A checkpoint in memory: what the exporter reads, without an engine."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import torch

from data_pipeline import Tokenizer, load_tokenizer
from data_pipeline.tokenizers import train_sentencepiece
from pretrain.config import Config
from pretrain.model import PretrainingModel, initialise

NEXTLAT = {"name": "nextlat", "horizon": 2, "next_latent_weight": 1.0, "kl_weight": 0.5, "dynamics_width": 48}


class MemoryCheckpoint:
    """Stands in for pretrain.checkpoints.Checkpoint."""

    def __init__(self, tokenizer: Tokenizer, objective: dict | None = None, extra_rows: int = 3, **model):
        self.path, self.step, self.tokens = Path("runs/test/checkpoints/step_00000007"), 7, 1792
        self.config = Config.model_validate(
            {
                "run": {"name": "test"},
                "model": {"layers": 2, "width": 32, "heads": 4, "mlp_width": 48} | model,
                "objective": objective or NEXTLAT,
                "data": {"path": "nowhere", "sequence_length": 48},
                "batch": {"global_sequences": 2, "micro_sequences": 2},
                "optimizer": {"learning_rate": 0.001, "weight_decay": 0.0, "gradient_clip": None},
                "schedule": {"name": "constant", "steps": 1},
            }
        )
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size + extra_rows
        self.dataset = {
            "path": "nowhere",
            "fingerprint": "0" * 64,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        }
        self.model = PretrainingModel(self.config, self.vocab_size)
        initialise(self.model, seed=1, std=0.2)
        generator = torch.Generator().manual_seed(2)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
        self.weights = {name: parameter.data for name, parameter in self.model.named_parameters()}

    @property
    def tokenizer_file(self) -> Path | None:
        return self._tokenizer.path

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def weight_names(self) -> list[str]:
        return list(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weights[name].shape)

    def read(self, name: str, first: int, length: int) -> torch.Tensor:
        return self.weights[name].flatten()[first : first + length].clone()

    def weight(self, name: str) -> torch.Tensor:
        return self.weights[name].clone()


@functools.cache
def library_text() -> list[str]:
    """Some real code and prose: files of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ["argparse.py", "textwrap.py", "json/decoder.py", "random.py", "heapq.py", "stringprep.py", "gettext.py"]
    return [(folder / name).read_text(encoding="utf-8") for name in names]


@functools.cache
def sentencepiece_model() -> bytes:
    return train_sentencepiece(library_text(), 600)


def sentencepiece_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    return load_tokenizer(path)


def bytes_tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]
