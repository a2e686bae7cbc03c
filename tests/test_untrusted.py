"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minisa.checkpoint.safetensors import write_safetensors
from minisa.files import write_whole, written_whole

WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_whole(path, "text"),
    "safetensors": lambda path: write_safetensors(path, {"a": torch.ones(3)}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
class TestWhole:
    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
    def test_a_full_disk_leaves_what_was_there_and_nothing_else(
        self, write: Callable[[Path], None], tmp_path: Path
    ) -> None:
        file = tmp_path / "file"
        file.write_text("before")
        (tmp_path / f"file.{os.getpid()}.part").symlink_to("/dev/full")
        with pytest.raises(OSError) as raised:
            write(file)
        assert raised.value.errno == errno.ENOSPC
        assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "before"
        write(file)
        assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_bytes() != b"before"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_another_process_that_writes_the_same_file(self, write: Callable[[Path], None], tmp_path: Path) -> None:
        file = tmp_path / "file"
        with written_whole(file) as partial:
            partial.write_text("ours")
            child = os.fork()
            if child == 0:
                write(file)
                os._exit(0)
            assert os.wait()[1] == 0
            assert partial.read_text() == "ours"
        assert file.read_text() == "ours"

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("", errno.EISDIR), (".", errno.EISDIR), ("folder", errno.EISDIR), ("pipe", errno.EINVAL)],
    )
    def test_what_is_no_file_stays_what_it_is(
        self,
        name: str,
        expected: int,
        write: Callable[[Path], None],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        os.mkfifo("pipe")
        os.mkdir("folder")
        with pytest.raises(OSError) as raised:
            write(Path(name))
        assert raised.value.errno == expected
        assert sorted(os.listdir()) == ["folder", "pipe"]
        assert not Path("pipe").is_file()
