"""Some tens of turns of tests/soak.py on a tiny model: interrupts anywhere, memory flat, answers a fresh session's."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loadable import chat_model
from tests.soak import Soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("loading", "options"),
    [({}, {}), ({"sa": "0:1,2:3"}, {"speculate": True})],
    ids=["plain", "shared and speculating"],
)
def test_a_session_with_interrupts(loading: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    soak = Soak(str(chat_model(tmp_path)), seed=1, every=2, max_seq_len=256, compile=False, **loading)
    handler = signal.getsignal(signal.SIGALRM)
    soak.run(30, report=10, max_new_tokens=10, repetition_penalty=1.1, **options)
    assert soak.counts["compared"] > 10
    assert soak.counts["interrupted between chunks"] > 2
    assert soak.counts["turns dropped"] > 10
    (_, warm), *_, (_, last) = soak.memory[1:]
    assert last - warm < 4 << 20
    assert signal.getsignal(signal.SIGALRM) is handler
