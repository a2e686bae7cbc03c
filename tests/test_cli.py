"""python -m minisa, and how every command line ends: whatever goes wrong is one line on stderr and status 2."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from minisa import SharingPlan, cli, console
from minisa.device import DTYPES, KV_DTYPES
from minisa.errors import MinisaError
from minisa.files import written_whole
from minisa.models.registry import DEFAULT_MODEL, find, registry
from minisa.quantize import QUANTIZATIONS
from tests.commands import Ran
from tests.loadable import N_TOKENS, loadable_gguf
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run_cli(run_main: Callable[..., Ran]) -> Callable[..., Ran]:
    return lambda *arguments: run_main(cli.main, "__main__.py", *arguments)


HELP = """
import importlib, sys
sys.modules["torch"] = None  # whoever imports it fails
from click.testing import CliRunner
from minisa import cli
for command in ("chat", "bench", "minisa", *(f"minisa {name}" for name in cli.main.list_commands(None))):
    program, *arguments = command.split()
    try:
        main = cli.main if program == "minisa" else importlib.import_module(program).main
        ran = CliRunner().invoke(main, [*arguments, "--help"], catch_exceptions=False)
        assert ran.output.startswith("Usage: ")
    except ImportError as error:
        print(f"{command}: {error}")
"""


def test_help_imports_no_torch() -> None:
    ran = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


def test_pull_imports_neither_torch_nor_a_study() -> None:
    code = "import sys; from minisa import cli; cli.main.get_command(None, 'pull'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "minisa.models.download" in loaded.split()
    assert not {"torch", "minisa.study", "minisa.benchmark"} & set(loaded.split())


def test_the_flags_name_what_there_is() -> None:
    """Their help is written out, so that it needs no torch."""
    helps = {option.name: option for option in click.command()(console.model_options(lambda **_: None)).params}
    assert tuple(helps["quantize"].type.choices) == QUANTIZATIONS  # type: ignore[attr-defined]
    ours = {name for name, dtype in DTYPES.items() if not str(dtype).endswith(name)}
    assert set(re.findall(r"\b[a-z]+\d+\b", helps["dtype"].help or "")) == ours  # type: ignore[attr-defined]
    assert {name for name in KV_DTYPES if name not in DTYPES} == {"fp8"}


class TestModels:
    def test_without_a_command_there_is_help(self, run_cli: Callable[..., Ran]) -> None:
        ran = run_cli()
        assert (ran.status, ran.err) == (0, "")
        commands = {line.split()[0] for line in ran.out.splitlines() if line.startswith("  ")}
        assert {"pull", "models", "plan", "selfcheck", *cli.ELSEWHERE} <= commands

    def test_models_says_what_is_here_and_what_is_gated(
        self, run_cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cli, "local_path", lambda entry: Path("x") if entry.name == "llama2-7b" else None)
        rows = {line.split()[0]: line.split(maxsplit=3)[3] for line in run_cli("models").out.splitlines()}
        assert rows.keys() == registry().keys()
        assert rows["llama2-7b"].split()[0] == "here"
        assert rows["llama3-8b"].split() == ["gated", *find("llama3-8b").licence.split()]
        assert rows[DEFAULT_MODEL] == "Apache-2.0"

    def test_pull_fetches_what_is_not_here(
        self, run_cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MINISA_WEIGHTS", str(tmp_path))
        fetched = []
        monkeypatch.setattr(console, "pull", lambda entry, progress: fetched.append(entry.name) or tmp_path / "x.gguf")
        ran = run_cli("pull", DEFAULT_MODEL)
        assert (ran.status, ran.out, fetched) == (0, "", [DEFAULT_MODEL])
        assert ran.err.splitlines() == [
            f"{DEFAULT_MODEL}: 98 MB, licence Apache-2.0, from {find(DEFAULT_MODEL).source} to {tmp_path}",
            f"{DEFAULT_MODEL} is ready: {tmp_path / 'x.gguf'}",
        ]
        monkeypatch.setattr(cli, "local_path", lambda entry: tmp_path / "here.gguf")
        assert run_cli("pull", DEFAULT_MODEL).err == f"{DEFAULT_MODEL} is there already: {tmp_path / 'here.gguf'}\n"
        assert len(fetched) == 1

    @pytest.mark.real_model
    def test_the_plan_is_the_one_the_readme_shows(self, run_cli: Callable[..., Ran], smollm2_path: Path) -> None:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        (shown,) = re.findall(r"\$ python -m minisa plan\n(.*?)```", readme, re.DOTALL)
        assert run_cli("plan").out == shown

    def test_a_plan_of_any_model_is_shown_and_saved(self, run_cli: Callable[..., Ran], tmp_path: Path) -> None:
        model = loadable_gguf(tmp_path / "tiny.gguf", tiny_config(n_layers=4, vocab_size=N_TOKENS))
        ran = run_cli("plan", "0:2,1:3", "--model", model, "--save", tmp_path / "plan.json")
        assert ran.status == 0, ran.err
        assert "plan 0:2,1:3: 2 of 4 layers follow\n    0  L L f f\nlayer 0 leads 2\n" in ran.out
        assert re.search(r"^KV cache   .* \(-25\.0%\)$", ran.out, re.MULTILINE)  # n/(2L)
        assert SharingPlan.load(tmp_path / "plan.json") == SharingPlan.parse("0:2,1:3", 4)
        assert run_cli("plan", tmp_path / "plan.json", "--model", model).out == ran.out
        assert "(+0.0%)" in run_cli("plan", "none", "--model", model).out


def torch_allocates() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def raises(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


class TestEnds:
    @pytest.fixture(autouse=True)
    def signals_as_before(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGTERM)
        yield
        signal.signal(signal.SIGTERM, before)

    @pytest.mark.parametrize(
        ("work", "says"),
        [
            (raises(MinisaError("a\nb")), "a b"),
            (raises(OSError(errno.EROFS, os.strerror(errno.EROFS), "plan.json")), "plan.json: Read-only file system"),
            (raises(OSError(errno.EIO, os.strerror(errno.EIO))), "input or output: Input/output error"),
            (raises(MemoryError()), "the device is out of memory"),
            (torch_allocates, "the device is out of memory"),
        ],
    )
    def test_one_line_and_status_2(self, work: Callable[[], None], says: str, run_main: Callable[..., Ran]) -> None:
        ran = run_main(click.Command("x", callback=work), "chat.py")
        assert ran.status == 2
        (line,) = ran.err.splitlines()
        assert line.startswith(f"chat.py: {says}")

    def test_ctrl_c_is_130_and_other_errors_show_where(self, run_main: Callable[..., Ran]) -> None:
        assert run_main(click.Command("x", callback=raises(KeyboardInterrupt())), "chat.py") == (130, "", "\n")
        with pytest.raises(RuntimeError, match="a mistake"):
            console.run(click.Command("x", callback=raises(RuntimeError("a mistake"))))

    def test_what_is_at_work_tidies_up_when_it_is_told_to_end(
        self, run_main: Callable[..., Ran], tmp_path: Path
    ) -> None:
        def work() -> None:
            with written_whole(tmp_path / "plan.json") as partial:
                partial.write_text("half")
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)

        assert run_main(click.Command("x", callback=work), "chat.py").status == 128 + signal.SIGTERM
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["search --out", "plan --save", "isotropy --plot"])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(flag: str, tmp_path: Path) -> None:
    command, option = flag.split()
    for name in (tmp_path, "no/such/folder.json", *(["plan.toml"] if option in ("--out", "--save") else [])):
        ran = CliRunner().invoke(cli.main, [command, option, str(name)])
        assert ran.exit_code == 2 and f"Invalid value for '{option}'" in ran.stderr, (name, ran.stderr)


def test_two_flags_that_name_one_file_to_write() -> None:
    console.keep_apart({"--json": "a", "--plot": None}, ("--text", "t"), ("--text", "./t"), ("--model", None))
    for written, read in (({"--json": "a", "--plot": "./a"}, ()), ({"--json": "a"}, (("--text", "./a"),))):
        with pytest.raises(MinisaError, match=r"--(plot|text) \./a: --json names the same file: give another"):
            console.keep_apart(written, *read)


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "x"])
def test_a_finite_number(value: str) -> None:
    kind = console.Finite(0)
    assert kind.convert("2.5", None, None) == 2.5
    with pytest.raises(click.UsageError, match=value):
        kind.convert(value, None, None)
