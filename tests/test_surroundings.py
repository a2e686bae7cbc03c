"""chat.py in surroundings that lack something: the text is the same in all of them, or the end is one line."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minisa.interrupts import uninterrupted
from tests.loadable import chat_model

ROOT = Path(__file__).parents[1]
FLAGS = ("--prompt", "Füße", "--max-new-tokens", "16", "--device", "cpu", "--dtype", "fp32", "--temperature", "0.9")


pytestmark = pytest.mark.skipif(os.name != "posix", reason="terminals, forks and locales of POSIX")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("tiny"))


def run(
    tiny: Path, *flags: str, without: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[bytes]:
    kept = {name: value for name, value in os.environ.items() if name not in without}
    command = [sys.executable, "chat.py", "--model", str(tiny), "--seed", "7", *flags]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def usual(tiny: Path) -> bytes:
    """What is said with nothing lacking."""
    ran = run(tiny, *FLAGS)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout) > 16
    return ran.stdout


def test_one_thread_no_home_nowhere_to_write_and_a_locale_of_ascii(tiny: Path, usual: bytes) -> None:
    nowhere = {"XDG_CACHE_HOME": "/proc/nowhere", "XDG_CONFIG_HOME": "/proc/nowhere"}
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = run(tiny, *FLAGS, without=("HOME",), OMP_NUM_THREADS="1", **nowhere, **ascii_only)
    assert (ran.returncode, ran.stdout) == (0, usual)
    assert b"Traceback" not in ran.stderr
    before, found, _ = usual.decode().partition("\ufffd")
    assert found
    assert run(tiny, *FLAGS, "--stop", found, **ascii_only).stdout.decode() == before + "\n"


def test_a_line_that_is_no_utf_8(tiny: Path, tmp_path: Path) -> None:
    """Where the locale takes nothing else: it is said, and the session goes on."""
    errors = tmp_path / "stderr"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        os.environ["PYTHONIOENCODING"] = "utf-8:strict"
        os.execl(sys.executable, sys.executable, "chat.py", "--model", str(tiny), "--device", "cpu")
    wait_until(lambda: b"/help" in errors.read_bytes() if errors.exists() else False)
    os.write(terminal, b"/system \xff\n")
    # Ctrl-D again and again: what is typed as the line editor takes the terminal over is no end to it.
    wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid or not os.write(terminal, b"\x04"))
    assert "(the message is not UTF-8 at character 8)" in errors.read_text()
    assert "Traceback" not in errors.read_text()


def test_no_compiler(tiny: Path, usual: bytes) -> None:
    """Asked to compile all the same: the line that says what runs says why."""
    ran = run(tiny, *FLAGS, "--compile", without=("CXX",), PATH="/nowhere")
    assert (ran.returncode, ran.stdout) == (0, usual)
    assert b"fp32 on cpu, eager (no C++ compiler)" in ran.stderr
    assert len(ran.stderr.splitlines()) == 2  # this line, and the footer


def test_a_terminal_of_latin_1(tiny: Path, usual: bytes) -> None:
    """It shows a question mark for what it has not."""
    ran = run(tiny, *FLAGS, PYTHONIOENCODING="latin-1")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == usual.decode().encode("latin-1", "replace")


def test_no_stdin_at_all(tiny: Path) -> None:
    command = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "chat.py", "--model", str(tiny)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=120)
    assert (ran.returncode, ran.stderr) == (2, b"chat.py: stdin is closed: give --prompt TEXT\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_an_output_that_is_closed(closed: str, tiny: Path, usual: bytes) -> None:
    """What would go there goes nowhere."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "chat.py", "--model", str(tiny), "--seed", "7"]
    ran = subprocess.run([*command, *FLAGS], cwd=ROOT, capture_output=True, check=False, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, b"" if closed == ">&-" else usual)
    assert b"Traceback" not in ran.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_an_output_that_takes_nothing(tiny: Path) -> None:
    command = ["sh", "-c", 'exec "$@" >/dev/full', "sh", sys.executable, "chat.py", "--model", str(tiny), *FLAGS]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[1:] == [b"chat.py: no space left on the disk while writing the output"]


@pytest.mark.parametrize("command", [["chat.py"], ["bench.py"], ["-m", "minisa", "models"]], ids=" ".join)
def test_ctrl_c_while_pytorch_loads(command: list[str], tmp_path: Path) -> None:
    """That takes seconds; here it takes a minute."""
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGINT, b"")


@pytest.mark.parametrize("ignored", [False, True], ids=["hangup ends it", "as under nohup"])
def test_a_terminal_that_is_closed(ignored: bool, tiny: Path, tmp_path: Path) -> None:
    """While an answer is on its way: nobody is left, no process stays behind and nothing is said."""
    errors = tmp_path / "stderr"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.execl(sys.executable, sys.executable, "chat.py", "--model", str(tiny), "--device", "cpu")
    wait_until(lambda: b"/help" in errors.read_bytes() if errors.exists() else False)
    os.write(terminal, b"Why?\n")
    time.sleep(0.3)
    os.close(terminal)
    ended: list[int] = []
    wait_until(lambda: bool((found := os.waitpid(pid, os.WNOHANG))[0]) and not ended.append(found[1]))
    assert os.waitstatus_to_exitcode(ended[0]) in ((0, 1, 2) if ignored else (128 + signal.SIGHUP,))
    assert "Traceback" not in errors.read_text()
    assert "Exception ignored" not in errors.read_text()


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_handler_that_is_not_pythons_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that Python is embedded in: Python, which knows it as None, could not put it back."""
    set_for: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGHUP else signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", lambda number, _: set_for.append(number))
    with uninterrupted():
        pass
    assert set_for == [signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_torch_s_threads_leave_their_cores_to_the_compiler_while_they_wait(given: str | None, expected: str) -> None:
    """Set before PyTorch is loaded, which reads it once; what the user says goes first."""
    script = """
import os, runpy, sys

class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))

sys.meta_path.insert(0, Watch())
sys.argv = ["chat.py", "--help"]
runpy.run_path("chat.py", run_name="__main__")
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.stdout.splitlines()[0] == expected, ran.stderr
