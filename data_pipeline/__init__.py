"""Documents → tokens → shards → order → packed batches. This is the package's public face."""

from data_pipeline.errors import UserError, run_command
from data_pipeline.packing import Allocate, Batch
from data_pipeline.shards import Dataset, open_dataset
from data_pipeline.sources import mix, open_mixture
from data_pipeline.splits import Split
from data_pipeline.stream import Stream, validation_batches
from data_pipeline.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Allocate",
    "Batch",
    "Dataset",
    "Split",
    "Stream",
    "Tokenizer",
    "UserError",
    "load_tokenizer",
    "mix",
    "open_dataset",
    "open_mixture",
    "run_command",
    "validation_batches",
]
