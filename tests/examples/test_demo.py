"""`make demo`."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="comes with the extra `examples`")
pytest.importorskip("tqdm", reason="comes with the extra `examples`")

DEMO = Path(__file__).parents[2] / "examples" / "train_gpt.py"


def run(*arguments):
    return subprocess.run([sys.executable, DEMO, *arguments], capture_output=True, text=True)


@pytest.mark.nightly
@pytest.mark.slow
def test_comparison(tmp_path):
    """It trains both optimizers, writes one figure, and prints a row for each."""
    done = run("--compare", "--size", "nano", "--steps", "12", "--context", "16", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "the last 10 steps repeat bit for bit" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("AdEMAMix ", "AdamW "))]
    assert [row[:2] for row in rows] == [["AdEMAMix", "0.0028"], ["AdamW", "0.004"]]
    assert all(3 < float(loss) < 6 for row in rows for loss in row[2:4])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_with_itself():
    done = run("--compare", "--optimizer", "AdamW")
    assert done.returncode == 2
    assert "--compare trains AdamW in addition to --optimizer" in done.stderr
