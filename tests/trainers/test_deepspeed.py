"""DeepSpeed: an AdEMAMix that it is given trains, and resumes bit for bit, at every stage of ZeRO, in one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed isn't installed")

pytestmark = pytest.mark.integrations
FOLDER = Path(__file__).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_training_and_resuming(tmp_path):
    """A resumed run's losses are the unbroken one's; in float32 they are the plain loop's too."""
    one = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    environment = {**os.environ, **one, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(FOLDER.parents[1])}
    program = [sys.executable, FOLDER / "deepspeed_cases.py", tmp_path]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
