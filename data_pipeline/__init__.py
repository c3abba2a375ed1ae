"""Documents → tokens → shards → order → packed batches. This is the package's public face."""

from data_pipeline.errors import UserError, run_command
from data_pipeline.packing import Batch
from data_pipeline.shards import Dataset, Split, open_dataset
from data_pipeline.stream import Stream, validation_batches
from data_pipeline.tokenizers import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Dataset",
    "Split",
    "Stream",
    "Tokenizer",
    "UserError",
    "load_tokenizer",
    "open_dataset",
    "run_command",
    "validation_batches",
]
