"""Where documents come from, and what is recorded of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import decoded, jsonl, make, make_texts, make_whole, quiet

from data_pipeline import UserError
from data_pipeline.documents import Fields, open_source
from data_pipeline.verify import verify


def test_every_kind_of_file(tmp_path: Path) -> None:
    texts = make_texts(30)
    lines = "".join(json.dumps({"body": t}) + "\n" for t in texts).encode()
    for name, content in {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines),
        "jsonl.zst": pa.Codec("zstd").compress(lines, asbytes=True),
    }.items():
        (tmp_path / f"x.{name}").write_bytes(content)
    pq.write_table(pa.table({"id": list(range(30)), "body": texts}), tmp_path / "x.parquet", row_group_size=7)
    prints = set()
    for name in (
        "x.jsonl",
        "x.jsonl.gz",
        "x.jsonl.zst",
        "x.parquet",
        f"file://{tmp_path}/x.jsonl",
        "x.jsonl.g*",
    ):
        source = name if "://" in name else tmp_path / name
        dataset = make(source, tmp_path / f"out{len(list(tmp_path.iterdir()))}", field="body", validation=0.0)
        assert decoded(dataset, "train") == texts
        prints.add(dataset.fingerprint)
    assert len(prints) == 1


def test_arrow_files_and_folders_of_datasets(tmp_path: Path) -> None:
    import datasets

    texts = make_texts(40)
    table = pa.table({"text": texts, "id": list(range(40))})
    for name, opened in {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}.items():
        with opened(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        assert decoded(make_whole(tmp_path / f"{name}.arrow", tmp_path / name)) == texts
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    assert decoded(make_whole(tmp_path / "saved", tmp_path / "from_saved")) == texts
    folder = tmp_path / "hub"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{"text": text} for text in texts])
    assert decoded(make_whole(f"hub:{folder}", tmp_path / "from_hub")) == texts
    (tmp_path / "bad.arrow").write_bytes(b"not arrow at all")
    with pytest.raises(UserError, match=r"bad\.arrow: not an Arrow file"):
        make_whole(tmp_path / "bad.arrow", tmp_path / "o")


def test_hub_source_streams_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        asked.append((name, config, options))
        if name == "none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'none' doesn't exist")
        return [{"text": t} for t in ("one", "", "two")]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = make("hub:some/set:cfg:test", tmp_path / "o", validation=0.0)
    assert decoded(dataset, "train") == ["one", "two"] and dataset.manifest["skipped"] == {"empty": 1}
    assert asked == [("some/set", "cfg", {"split": "test", "streaming": True})]
    with pytest.raises(UserError, match="hub:none: Dataset 'none' doesn't exist"):
        make("hub:none", tmp_path / "p")
    with pytest.raises(UserError, match="write hub:NAME"):
        open_source("hub:a:b:c:d")


def test_memory_and_glob_urls(tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/texts/a.txt", b"one")
    fs.pipe_file("/texts/b/c.txt", b"two")
    try:
        assert decoded(make_whole("memory://texts", tmp_path / "o")) == ["one", "two"]
        assert decoded(make_whole("memory://texts/*.txt", tmp_path / "p")) == ["one"]
    finally:
        fs.rm("/texts", recursive=True)


def test_where_each_document_comes_from(corpus: Path, tmp_path: Path) -> None:
    dataset = make_whole(corpus, tmp_path / "o", validation=0.2, shard_bytes=15_000)
    for name in ("train", "validation"):
        files = [dataset.path / shard["files"]["names"]["file"] for shard in dataset.split(name).shards]
        names = [line for file in files for line in file.read_text().splitlines()]
        assert [(corpus / line).read_bytes().decode() for line in names] == decoded(dataset, name)
    lines = jsonl(tmp_path / "x.jsonl", [{"text": t} for t in ("a", "", "b")])
    made = make_whole(lines, tmp_path / "p")
    assert (made.path / "train/00000.names").read_text() == "x.jsonl:1\nx.jsonl:3\n"
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "two\nlines.txt").write_text("x")
    verify(make_whole(tmp_path / "odd", tmp_path / "q").path, quiet())


def test_a_source_opened_twice_is_the_same(corpus: Path) -> None:
    fields = Fields(skip_invalid=True)
    assert open_source(str(corpus)).identity == open_source(str(corpus)).identity
    assert open_source(str(corpus)).identity != open_source(str(corpus), fields).identity
