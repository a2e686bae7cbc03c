"""python -m minisa as people use it: help, models, pull and plan. The studies have tests of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import bench
import chat
from minisa import SharingPlan, cli, console
from minisa.models.registry import DEFAULT_MODEL, ModelEntry, find, registry
from tests.commands import Ran
from tests.loadable import N_TOKENS, loadable_gguf
from tests.tiny import tiny_config

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def run_cli(run_main: Callable[..., Ran]) -> Callable[..., Ran]:
    return lambda *arguments: run_main(cli.main, "__main__.py", *arguments)


def test_without_a_command_there_is_help(run_cli: Callable[..., Ran]) -> None:
    ran = run_cli()
    assert (ran.status, ran.err) == (0, "")
    assert set(cli.main.commands) <= {line.split()[0] for line in ran.out.splitlines() if line.startswith("  ")}


@pytest.mark.parametrize("main", [chat.main, bench.main, cli.main, *cli.main.commands.values()], ids=lambda c: c.name)
def test_both_flags_for_help(
    main: click.Command, run_main: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "_help_option", None)  # click keeps the flags of the first call, another test's perhaps
    short, long = run_main(main, "x.py", "-h"), run_main(main, "x.py", "--help")
    assert short == long and short.status == 0 and short.out.startswith("Usage: x.py")


def test_models_says_what_is_here_and_what_is_gated(
    run_cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "local_path", lambda entry: Path("x") if entry.name == "llama2-7b" else None)
    rows = {line.split()[0]: line.split(maxsplit=3)[3] for line in run_cli("models").out.splitlines()}
    assert rows.keys() == registry().keys()
    assert rows["llama2-7b"].split()[0] == "here"
    assert rows["llama3-8b"].split() == ["gated", *find("llama3-8b").licence.split()]
    assert rows[DEFAULT_MODEL] == "Apache-2.0"
    assert f"{DEFAULT_MODEL:<28}    0.10 GB" in run_cli("models").out


def test_pull_fetches_what_is_not_here(
    run_cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINISA_WEIGHTS", str(tmp_path))
    fetched = []
    monkeypatch.setattr(console, "pull", lambda entry, progress: fetched.append(entry.name) or tmp_path / "tiny.gguf")
    ran = run_cli("pull", DEFAULT_MODEL)
    assert (ran.status, ran.out, fetched) == (0, "", [DEFAULT_MODEL])
    said, done = ran.err.splitlines()
    assert said == f"{DEFAULT_MODEL}: 98 MB, licence Apache-2.0, from {find(DEFAULT_MODEL).source} to {tmp_path}"
    assert done == f"{DEFAULT_MODEL} is ready: {tmp_path / 'tiny.gguf'}"
    monkeypatch.setattr(cli, "local_path", lambda entry: tmp_path / "here.gguf")
    ran = run_cli("pull", DEFAULT_MODEL)
    assert (ran.err, len(fetched)) == (f"{DEFAULT_MODEL} is there already: {tmp_path / 'here.gguf'}\n", 1)


def test_a_pull_that_waits_for_another_says_so(
    run_cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waiting(entry: ModelEntry, progress: Callable[..., None]) -> Path:
        for _ in range(3):
            progress("waiting for another process that is fetching it", 0, None)
        return tmp_path

    monkeypatch.setenv("MINISA_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(console, "pull", waiting)
    assert run_cli("pull", DEFAULT_MODEL).err.count("waiting for another process that is fetching it\n") == 1


@pytest.mark.real_model
def test_the_plan_is_the_one_the_readme_shows(run_cli: Callable[..., Ran], smollm2_path: Path) -> None:
    (shown,) = re.findall(r"\$ python -m minisa plan\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert run_cli("plan").out == shown


def test_a_plan_of_any_model_is_shown_and_saved(run_cli: Callable[..., Ran], tmp_path: Path) -> None:
    model = loadable_gguf(tmp_path / "tiny.gguf", tiny_config(n_layers=4, vocab_size=N_TOKENS))
    ran = run_cli("plan", "0:2,1:3", "--model", model, "--save", tmp_path / "plan.json")
    assert ran.status == 0, ran.err
    assert "plan 0:2,1:3: 2 of 4 layers follow\n    0  L L f f\nlayer 0 leads 2\n" in ran.out
    assert re.search(r"^KV cache   .* \(-25\.0%\)$", ran.out, re.MULTILINE)  # n/(2L)
    assert SharingPlan.load(tmp_path / "plan.json") == SharingPlan.parse("0:2,1:3", 4)
    assert run_cli("plan", tmp_path / "plan.json", "--model", model).out == ran.out
    assert "(+0.0%)" in run_cli("plan", "none", "--model", model).out
