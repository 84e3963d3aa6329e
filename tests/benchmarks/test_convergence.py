"""The search and the comparison of `benchmarks.convergence`, by a real run of a few steps and by made-up losses."""

import json
import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from benchmarks.convergence import __main__ as convergence
from benchmarks.convergence import training
from benchmarks.convergence.plan import (
    ADAMW,
    ADANA,
    FLOAT32,
    NO_MOMENTUM,
    SHORT,
    Plan,
    base_of,
)
from benchmarks.convergence.search import Runs, rounded, settings

pytest.importorskip("matplotlib")


# The best lr by (β3, α); of ADANA a 64th of AdamW's, and with β1 = 0 twice that with β1 = 0.9.
LOWEST = {(None, None): 3.1e-2, (0.999, 2.0): 1e-3, (0.999, 5.0): 1e-3, (0.9999, 2.0): 3e-4}
FACTORS = {ADANA: 1 / 64, NO_MOMENTUM: 2}


class MadeUp(Runs):
    """Runs whose losses are a parabola in log lr, with its lowest point at LOWEST."""

    def _train(self, config):
        best = LOWEST[config.beta3, config.alpha] * FACTORS.get(base_of(config.optimizer), 1)
        return {"final": math.log2(config.lr / best) ** 2 + (config.alpha or 0) / 10}


@pytest.fixture
def runs(tmp_path):
    return MadeUp(tmp_path, Plan())


PLAN = Plan(alphas=(2.0,), seeds=(1, 2))


def test_search_goes_past_its_edges(runs):
    found = {scheme: settings(scheme, PLAN, runs) for scheme in (ADAMW, FLOAT32, NO_MOMENTUM, ADANA)}
    assert {(c.optimizer, c.beta3): c.lr for configs in found.values() for c in configs} == {
        (ADAMW, None): 0.032,
        (FLOAT32, 0.999): 0.001,
        (FLOAT32, 0.9999): 0.00025,
        (NO_MOMENTUM, 0.999): 0.002,
        (ADANA, None): 0.0005,
    }
    for config in (c for configs in found.values() for c in configs):
        factor = 2 if config.beta3 == 0.9999 else 2**0.5
        neighbours = [replace(config, lr=rounded(lr)) for lr in (config.lr / factor, config.lr * factor)]
        assert all(neighbour.filename in runs.records for neighbour in neighbours)
        assert all(runs.loss(neighbour) > runs.loss(config) for neighbour in neighbours)
    assert {file.name for file in runs.folder.iterdir()} == set(runs.records)
    assert not any(name.startswith("ADANA_lr-0.008") for name in runs.records), "the line goes on at its best end only"


@pytest.mark.nightly
@pytest.mark.slow
def test_short_form(tmp_path, capsys, monkeypatch):
    """Trains, writes everything, and doesn't train again."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # Inductor would take a minute
    monkeypatch.setattr(training, "standard_library", cache(training.standard_library))
    convergence.main(["--short", "--out", str(tmp_path)])
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    records = [json.loads(file.read_text()) for file in first]
    assert {r["config"]["steps"] for r in records} == {SHORT.steps, SHORT.long_steps}
    losses = {(r["config"]["optimizer"], r["config"]["lr"], r["config"]["seed"]): r["final"] for r in records}
    assert losses["32-bit", 4e-3, 1] < 4.0, "untrained: ln 256 = 5.5"
    assert "| AdEMAMix, 8-bit, slow_ema_bits=8 |" in capsys.readouterr().out
    for name in ("loss.svg", "search.svg", "long.svg", "rosenbrock.svg"):
        assert "</svg>" in (tmp_path / name).read_text()
    monkeypatch.setattr(convergence, "write", lambda *_: None)
    convergence.main(["--short", "--out", str(tmp_path)])
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()} == first
