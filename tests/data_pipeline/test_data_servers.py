"""Real servers on loopback: HTTP with and without byte ranges, and S3."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from data_helpers import decoded, make, make_texts, make_whole, same_batches

from data_pipeline import Dataset, UserError, open_dataset
from data_pipeline import cache as module


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges, or without where `ranges` says so."""

    ranges = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content, status = path.read_bytes(), 200
        if self.ranges and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1 if last else None], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path, ranges: bool) -> Iterator[str]:
    """The address of an HTTP server of a folder."""
    handler = type("Handler", (Ranges,), {"ranges": ranges})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_data_set_over_http(dataset: Dataset, tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_BLOCK", 4096)
    with serving(dataset.path, ranges) as url:
        same_batches(dataset, open_dataset(url, cache=tmp_path / "c"))
        with pytest.raises(UserError, match=r"none/manifest\.json: cannot be read"):
            open_dataset(f"{url}/none", cache=tmp_path / "c")


@pytest.mark.parametrize("ranges", [True, False])
def test_documents_over_http(tmp_path: Path, ranges: bool) -> None:
    texts = make_texts(50)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    with serving(tmp_path / "served", ranges) as url:
        assert decoded(make_whole(f"{url}/x.jsonl.gz", tmp_path / "o")) == texts
        with pytest.raises(UserError, match=r"none\.jsonl: nothing found"):
            make_whole(f"{url}/none.jsonl", tmp_path / "p")
    with pytest.raises(UserError, match=r"x\.jsonl: (nothing found|cannot be read)"):
        make_whole(f"{url}/x.jsonl", tmp_path / "p")  # nobody answers


def test_s3(dataset: Dataset, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's server, which speaks S3 over HTTP: a data set read, and documents prepared from a bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("bucket")
        fs.put(str(dataset.path), "bucket/set", recursive=True)
        fs.put(str(corpus), "bucket/corpus", recursive=True)
        same_batches(dataset, open_dataset("s3://bucket/set", cache=tmp_path / "c", cache_bytes=200_000))
        made = make("s3://bucket/corpus", tmp_path / "o", shard_bytes=15_000)
        assert made.fingerprint == dataset.fingerprint
        with pytest.raises(UserError, match="s3://bucket/none: nothing found"):
            make("s3://bucket/none", tmp_path / "p")
    finally:
        server.stop()
