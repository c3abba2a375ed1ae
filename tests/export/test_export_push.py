"""An export copied to a URL: whole once its manifest is there, taken up again where it stopped, never a mixture."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from export_helpers import MemoryCheckpoint, bytes_tokenizer
from rich.console import Console

from data_pipeline import UserError
from pretrain.decoding.loading import MANIFEST, load_export
from pretrain.export import export
from pretrain.export.__main__ import main
from pretrain.export.pushing import push

URL = "memory://bucket/models/test"
FILES = fsspec.filesystem("memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "model"
    return export(MemoryCheckpoint(bytes_tokenizer()), out, shard_bytes=20_000, console=Console(file=io.StringIO()))


@pytest.fixture(autouse=True)
def empty_bucket() -> Iterator[None]:
    yield
    FILES.rm("/bucket", recursive=True) if FILES.exists("/bucket") else None


def quietly(folder: Path, url: str = URL) -> int:
    return push(folder, url, Console(file=io.StringIO()))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def there() -> dict[str, bytes]:
    return {path.removeprefix("/bucket/models/test/"): FILES.cat(path) for path in FILES.find("/bucket/models/test")}


class Puts:
    """Stands in for the file system's put_file: notes names, fails from the `after`-th on, or spoils what it copies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int | None = None, spoil: str = ""):
        self.put, self.names, self.after, self.spoil = FILES.put_file, [], after, spoil
        monkeypatch.setattr(FILES, "put_file", self)

    def __call__(self, local: str, remote: str, **options: Any) -> None:
        if self.after is not None and len(self.names) == self.after:
            raise ConnectionError("no route\nto host")
        self.names.append(remote.removeprefix("/bucket/models/test/"))
        self.put(local, remote, **options)
        if self.names[-1] == self.spoil:
            FILES.pipe_file(remote, FILES.cat_file(remote)[:-1] + b"?")


def test_everything_is_copied_the_manifest_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    puts = Puts(monkeypatch)
    assert quietly(folder) == len(content(folder)) - 1
    assert there() == content(folder)
    assert puts.names[-1] == MANIFEST and puts.names.count(MANIFEST) == 1


def test_a_folder_url_gives_a_folder_that_loads(folder: Path, tmp_path: Path) -> None:
    quietly(folder, f"file://{tmp_path}/far/model")
    assert content(tmp_path / "far" / "model") == content(folder)
    assert load_export(tmp_path / "far" / "model").manifest["source"]["step"] == 7


def test_an_interrupted_push_has_no_manifest_and_the_next_one_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Puts(monkeypatch, after=5)
    with pytest.raises(UserError) as caught:
        quietly(folder)
    again = f"{folder} is whole, and python -m pretrain.export {folder} --push-to {URL} goes on where this stopped"
    assert str(caught.value) == f"--push-to {URL}: no route to host; {again}"
    assert len(there()) == 5 and MANIFEST not in there()
    monkeypatch.undo()
    puts = Puts(monkeypatch)
    main([str(folder), "--push-to", URL])
    assert len(puts.names) == len(content(folder)) - 5 and there() == content(folder)
    assert quietly(folder) == 0


def test_what_arrived_damaged_is_found_at_once_and_mended_by_the_next_push(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "nextlat/model.safetensors"
    Puts(monkeypatch, spoil=name)
    with pytest.raises(UserError, match=f"{name} does not read back as it was written"):
        quietly(folder)
    assert MANIFEST not in there()
    monkeypatch.undo()
    puts = Puts(monkeypatch)
    quietly(folder)
    assert name in puts.names and there() == content(folder)


def test_rot_behind_a_whole_push_is_mended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quietly(folder)
    FILES.pipe_file("/bucket/models/test/config.json", FILES.cat("/bucket/models/test/config.json")[:-1] + b"?")
    puts = Puts(monkeypatch)
    assert quietly(folder) == 1
    assert puts.names == ["config.json", MANIFEST] and there() == content(folder)


def test_another_export_is_not_left_half_replaced_as_if_it_were_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = MemoryCheckpoint(bytes_tokenizer())
    checkpoint.weights["trunk.norm.weight"] *= 2
    other = export(checkpoint, tmp_path / "other", shard_bytes=20_000, console=Console(file=io.StringIO()))
    quietly(folder)
    Puts(monkeypatch, after=1)
    with pytest.raises(UserError, match="goes on where this stopped"):
        quietly(other)
    assert MANIFEST not in there()
    monkeypatch.undo()
    quietly(other)
    assert there() == content(other)


def test_files_of_something_else_are_left_alone(folder: Path) -> None:
    FILES.pipe_file("/bucket/models/test/model-00009-of-00009.safetensors", b"of an older export")
    FILES.pipe_file("/bucket/models/test/.gitattributes", b"of a hub, which is fine")
    with pytest.raises(UserError, match=r"holds model-00009-of-00009.safetensors, which is no file of .*; remove it"):
        quietly(folder)
    assert len(there()) == 2


def test_a_damaged_export_is_not_pushed(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    (copy / "config.json").write_bytes((copy / "config.json").read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"config\.json: missing or not as it was exported; export the model again"):
        quietly(copy)
    assert there() == {}


@pytest.mark.parametrize("make_source", [lambda folder: folder, lambda folder: folder.parent], ids=["export", "run"])
def test_without_a_target_there_must_be_an_export_to_push(folder: Path, make_source: Callable[[Path], Path]) -> None:
    source = make_source(folder)
    with pytest.raises(UserError, match=re.escape("--out DIR is missing; only an exported folder can do without")):
        main([str(source), *([] if source == folder else ["--push-to", URL])])
    assert there() == {}


def test_one_command_exports_and_pushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pretrain.checkpoints.open_checkpoint", lambda path: MemoryCheckpoint(bytes_tokenizer()))
    main(["runs/test", "--out", str(tmp_path / "model"), "--push-to", URL])
    assert there() == content(tmp_path / "model")
    assert f"to {URL}" in " ".join(capsys.readouterr().err.split())


def test_s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against moto's server, which speaks S3 over HTTP."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # of a server that another test has stopped
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = fsspec.filesystem("s3")
        fs.mkdir("exports")  # moto keeps the buckets of a process's other servers
        quietly(folder, "s3://exports/model")
        assert quietly(folder, "s3://exports/model") == 0
        found = {path.removeprefix("exports/model/"): fs.cat_file(path) for path in fs.find("exports/model")}
        assert found == content(folder)
        with pytest.raises(UserError, match=r"--push-to s3://no-such-bucket/model: .*; .* is whole, and"):
            quietly(folder, "s3://no-such-bucket/model")
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()
