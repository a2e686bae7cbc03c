"""How a command line ends: whatever the system refuses is one line on stderr and status 2, never a traceback."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import bench
from minisa import cli, console
from minisa.errors import MinisaError
from minisa.files import written_whole
from minisa.study.heal_command import heal
from minisa.study.search_command import search


def torch_allocates() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (MinisaError("a\nb"), "a b"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "plan.json"), "plan.json: Read-only file system"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "input or output: Input/output error"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x"), "no space left on the disk while writing x"),
        (MemoryError(), "the device is out of memory"),
        (torch_allocates, "the device is out of memory"),
    ],
)
def test_one_line_and_status_2(
    trouble: Exception | Callable[[], None],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @click.command()
    def command() -> None:
        if isinstance(trouble, Exception):
            raise trouble
        trouble()

    monkeypatch.setattr("sys.argv", ["chat.py"])
    with pytest.raises(SystemExit) as ended:
        console.run(command)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"chat.py: {says}")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x"])
def test_a_finite_number(value: str) -> None:
    kind = console.Finite(0)
    assert kind.convert("2.5", None, None) == 2.5
    with pytest.raises(click.UsageError, match=value):
        kind.convert(value, None, None)


def test_a_rate_that_no_float_could_hold() -> None:
    ran = CliRunner().invoke(heal, ["--rate", "1e300"])
    assert ran.exit_code == 2
    assert "Invalid value for '--rate'" in ran.output


@pytest.fixture
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_at_work_tidies_up_when_it_is_told_to_end(
    number: signal.Signals, signals_as_before: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @click.command()
    def command() -> None:
        if signal.getsignal(number) is signal.SIG_DFL:  # it would end the tests
            return
        with written_whole(tmp_path / "plan.json") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), number)
            time.sleep(5)

    monkeypatch.setattr("sys.argv", ["chat.py"])
    with pytest.raises(SystemExit) as ended:
        console.run(command)
    assert ended.value.code == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_under_nohup_a_terminal_that_goes_is_none_of_ours(
    signals_as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr("sys.argv", ["chat.py"])
    with pytest.raises(SystemExit) as ended:
        console.run(click.Command("nothing", callback=lambda: os.kill(os.getpid(), signal.SIGHUP)))
    assert ended.value.code == 0


@pytest.mark.parametrize(("command", "flag"), [(heal, "--minutes"), (heal, "--rate"), (search, "--budget-minutes")])
def test_no_time_and_no_rate_is_nan(command: click.Command, flag: str) -> None:
    ran = CliRunner().invoke(command, [flag, "nan"])
    assert ran.exit_code == 2
    assert f"Invalid value for '{flag}'" in ran.output


def test_other_errors_are_ours_and_show_where(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def command() -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr("sys.argv", ["chat.py"])
    with pytest.raises(RuntimeError, match="a mistake"):
        console.run(command)


WRITES = (
    "eval --json", "eval --plot", "isotropy --json", "isotropy --plot", "baselines --json", "search --out",
    "refit --out", "heal --out", "plan --save", "bench --json", "bench --plot",
)  # fmt: skip


@pytest.mark.parametrize("flag", WRITES)
def test_a_file_that_cannot_be_written_is_refused_before_any_work(flag: str) -> None:
    command, option = flag.split()
    main, start = (bench.main, []) if command == "bench" else (cli.main, [command])
    plans = ("plan.safetensors", "plan", ".json") if option in ("--out", "--save") else ()
    for name in ("", ".", os.devnull, "no/such/folder.json", "ö" * 98 + ".json", *plans):
        ran = CliRunner().invoke(main, [*start, option, name])
        assert ran.exit_code == 2 and f"Invalid value for '{option}'" in ran.stderr, (name, ran.stderr)


@pytest.mark.parametrize("flag", WRITES)
def test_a_checkpoint_s_files_are_refused_before_any_work(flag: str, tmp_path: Path) -> None:
    command, option = flag.split()
    main, start = (bench.main, []) if command == "bench" else (cli.main, [command])

    def says(path: Path) -> str:
        return CliRunner().invoke(main, [*start, option, str(path), "--model", "./none"]).stderr

    refused = "is for a file of the checkpoint there"
    for name in ("plan.json", "plan.delta.safetensors"):  # which no checkpoint consists of
        (tmp_path / name).touch()
    assert refused not in says(tmp_path / "config.json")
    (tmp_path / "model.safetensors").touch()
    names = ["config.json", "tokenizer_config.json", "model.safetensors.index.json"]
    if option not in ("--out", "--save"):
        names += ["model.safetensors", "plan.delta.safetensors"]
    for name in names:
        assert refused in says(tmp_path / name), name
    assert refused not in says(tmp_path / "plan.json")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write anywhere
    ran = CliRunner().invoke(cli.main, ["plan", "--save", str(tmp_path / "plan.json")])
    assert ran.exit_code == 2 and "the folder cannot be read and written to" in ran.stderr


APART = {
    "bench": "--json a.json --plot ./a.json",
    "bench of a model": "--model a.gguf --json ./a.gguf",
    "bench of a plan": "--sa a.json --json a.json",
    "eval": "--json a.json --data a.json --task piqa",
    "eval of items": "--json a.json --plot a.items.jsonl --data b --task piqa",
    "eval of a model": "--model a.gguf --json a.gguf --data b --task piqa",
    "eval of a plan": "--sa 1 --sa a.json --json ./a.json --data b --task piqa",
    "eval of a rival": "--rival drop:1 --rival sa:a.json+kv-int8 --plot a.json --data b --task piqa",
}


@pytest.mark.parametrize("name", APART)
def test_two_flags_that_name_one_file_to_write(name: str) -> None:
    command = name.split()[0]
    main, start = (bench.main, []) if command == "bench" else (cli.main, [command])
    ran = CliRunner().invoke(main, [*start, *APART[name].split()])
    assert isinstance(ran.exception, MinisaError)
    assert "names the same file: give another" in str(ran.exception)
