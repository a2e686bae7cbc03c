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

from tests.loadable import chat_model

ROOT = Path(__file__).parents[1]
FLAGS = ("--prompt", "Füße", "--max-new-tokens", "16", "--device", "cpu", "--dtype", "fp32", "--temperature", "0.9")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="terminals and signals of POSIX")


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


def test_one_thread_and_nowhere_to_write(tiny: Path, usual: bytes) -> None:
    nowhere = {"XDG_CACHE_HOME": "/proc/nowhere", "XDG_CONFIG_HOME": "/proc/nowhere"}
    ran = run(tiny, *FLAGS, without=("HOME",), OMP_NUM_THREADS="1", **nowhere)
    assert (ran.returncode, ran.stdout) == (0, usual)
    assert b"Traceback" not in ran.stderr


def test_no_compiler(tiny: Path, usual: bytes) -> None:
    """Asked to compile all the same: the line that says what runs says why it is eager."""
    ran = run(tiny, *FLAGS, "--compile", without=("CXX",), PATH="/nowhere")
    assert (ran.returncode, ran.stdout) == (0, usual)
    assert b"fp32 on cpu, eager (no C++ compiler" in ran.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_an_output_that_takes_nothing(tiny: Path) -> None:
    command = ["sh", "-c", 'exec "$@" >/dev/full', "sh", sys.executable, "chat.py", "--model", str(tiny), *FLAGS]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[1:] == [b"chat.py: input or output: No space left on device"]


@pytest.mark.parametrize(
    "command",
    [["chat.py", "--prompt", "Hi"], ["bench.py"], ["-m", "minisa", "selfcheck"]],
    ids=["chat", "bench", "selfcheck"],
)
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
    assert (process.returncode, errors.strip()) in ((-signal.SIGINT, b""), (130, b""))


def test_a_terminal_that_is_closed(tiny: Path, tmp_path: Path) -> None:
    """While an answer is on its way: nobody is left, no process stays behind and nothing is said."""
    errors = tmp_path / "stderr"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        os.execl(sys.executable, sys.executable, "chat.py", "--model", str(tiny), "--device", "cpu")
    wait_until(lambda: b"/help" in errors.read_bytes() if errors.exists() else False)
    os.write(terminal, b"Why?\n")
    time.sleep(0.3)
    os.close(terminal)
    ended: list[int] = []
    wait_until(lambda: bool((found := os.waitpid(pid, os.WNOHANG))[0]) and not ended.append(found[1]))
    assert os.waitstatus_to_exitcode(ended[0]) != 0
    assert "Traceback" not in errors.read_text()
    assert "Exception ignored" not in errors.read_text()


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
