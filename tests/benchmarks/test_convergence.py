"""The search and the comparison of `benchmarks.convergence`, by a real run of a few steps and by made-up losses."""

import json
import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from benchmarks.convergence import __main__ as convergence
from benchmarks.convergence import rosenbrock, training
from benchmarks.convergence.plan import (
    ADAMW,
    ADANA,
    FLOAT32,
    LONG,
    NO_MOMENTUM,
    PERTURBED,
    SCHEMES,
    SHORT,
    Config,
    Plan,
    base_of,
)
from benchmarks.convergence.search import STAGES, Runs, comparison, long_runs, mixtures, rounded, settings
from benchmarks.convergence.training import warmup_cosine

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


def test_smaller_loss_decides_between_alphas(runs):
    (found,) = mixtures(replace(PLAN, beta3s=(0.999,), alphas=(5.0, 2.0)), runs)
    assert found.alpha == 2.0


def test_comparison_has_new_seeds_and_every_scheme(runs):
    configs = list(comparison(PLAN, runs, SCHEMES))
    assert {config.optimizer for config in configs} == set(SCHEMES)
    assert len(configs) == len(set(configs)) == 2 * (1 + 2 + 2 * 4 + 1 + 2) + 4
    assert {c.optimizer for c in configs if c.seed == PLAN.search_seed} == {n for n, s in SCHEMES.items() if s.varied}
    for base in (ADAMW, ADANA, NO_MOMENTUM):
        (best,) = settings(base, PLAN, runs)
        assert {c.lr for c in configs if base_of(c.optimizer) == base} == {best.lr}
    perturbed = [c for c in configs if c.optimizer == PERTURBED]
    assert {c.beta3 for c in perturbed} == {0.999}, "the noise is measured at the best setting"


def test_long_runs_search_their_learning_rates(runs):
    configs = list(long_runs(PLAN, runs, SCHEMES))
    assert [(c.optimizer, c.seed) for c in configs] == [(name, seed) for name in LONG for seed in PLAN.long_seeds]
    assert {c.steps for c in configs} == {PLAN.long_steps}
    assert next(c for c in configs if c.optimizer == FLOAT32).lr == 0.001, "from half of it, in steps of √2"
    for config in configs:
        neighbours = [replace(config, seed=1, lr=rounded(config.lr * factor)) for factor in (0.5**0.5, 2**0.5)]
        assert all(neighbour.filename in runs.records for neighbour in neighbours)


@pytest.mark.parametrize("stage", STAGES)
def test_a_scheme_alone_needs_no_other_runs(runs, stage):
    assert {config.optimizer for config in STAGES[stage](PLAN, runs, [ADANA])} == {ADANA}
    assert all(name.startswith("ADANA_lr") for name in runs.records)


def test_diverged_runs_lose(runs, monkeypatch):
    monkeypatch.setattr(runs, "_train", lambda config: {"final": None if config.lr > 2e-3 else 1.0})
    config = Config(ADAMW, 1e-3, None, None, seed=0, steps=10)
    assert runs.loss(replace(config, lr=4e-3)) == math.inf
    assert runs.best(config, (1e-3, 4e-3), extend=False).lr == 1e-3


def test_learning_rate_factor():
    factors = [warmup_cosine(step, 200) for step in range(201)]
    assert factors[0] == 0.1
    assert factors[9] == factors[10] == max(factors) == 1.0
    assert factors[200] == pytest.approx(0.1)


@pytest.mark.nightly
@pytest.mark.slow
def test_short_form(tmp_path, capsys, monkeypatch):
    """Trains, writes everything, and doesn't train again; another text is refused."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # Inductor would take a minute
    monkeypatch.setattr(training, "standard_library", cache(training.standard_library))
    convergence.main(["--short", "--out", str(tmp_path), "--stages", "comparison", "--only", ADAMW])
    assert len(list((tmp_path / "runs").iterdir())) == 2 + 1
    assert len(list(tmp_path.iterdir())) == 1, "a part of the runs has no tables"
    convergence.main(["--short", "--out", str(tmp_path)])
    first = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    records = [json.loads((tmp_path / "runs" / name).read_text()) for name in first]
    assert len(records) == 4 * 2 + (1 + 2 + 4 + 1 + 2) + 4 + 4
    assert {r["config"]["steps"] for r in records} == {SHORT.steps, SHORT.long_steps}
    assert all(len(record["curve"]) == SHORT.evaluations for record in records)
    quantized = {record["config"]["optimizer"]: record["quantized"] for record in records}
    assert quantized["8-bit"] == records[0]["parameters"]
    assert quantized["32-bit"] == quantized[ADAMW] == 0
    losses = {(r["config"]["optimizer"], r["config"]["lr"], r["config"]["seed"]): r["final"] for r in records}
    assert len(set(losses.values())) > 5
    assert losses["32-bit", 4e-3, 1] < 4.0, "untrained: ln 256 = 5.5"
    printed = capsys.readouterr().out
    assert "| AdEMAMix, 8-bit, slow_ema_bits=8 |" in printed
    for name in ("loss.svg", "search.svg", "long.svg", "rosenbrock.svg"):
        assert "</svg>" in (tmp_path / name).read_text()

    monkeypatch.setattr(convergence, "write", lambda *_: None)
    removed = next(name for name in first if name.startswith("8-bit_lr"))
    record = json.loads((tmp_path / "runs" / removed).read_text())
    (tmp_path / "runs" / removed).unlink()
    convergence.main(["--short", "--out", str(tmp_path)])
    again = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert {name for name in first if again[name] != first[name]} == {removed}
    repeated = json.loads((tmp_path / "runs" / removed).read_text())
    assert [repeated[key] for key in ("final", "curve")] == [record[key] for key in ("final", "curve")]

    other = tmp_path / "runs" / next(name for name in first if name != removed)
    other.write_text(json.dumps({**json.loads(other.read_text()), "text": {"training bytes": 1}}))
    (tmp_path / "runs" / removed).unlink()
    with pytest.raises(SystemExit, match="another text"):
        convergence.main(["--short", "--out", str(tmp_path)])


def test_arrival():
    def walk(*distances):
        return rosenbrock.Walk(1e-3, list(distances), 0.0).arrival

    assert walk(5.0, 0.05, 0.2, 0.09, 0.05) == 3
    assert walk(5.0, 0.05, 0.2) is None
    assert walk(5.0, math.nan) is None


def test_walk_goes_downhill():
    walk = rosenbrock.walk(rosenbrock.OPTIMIZERS["Adam, β1 = 0.9"], 0.1, 300)
    assert len(walk.distances) == 301
    assert walk.distances[0] == math.dist(rosenbrock.START, rosenbrock.MINIMUM)
    assert walk.distances[-1] < walk.distances[0]
    x, y, step = -1.2, 0.7, 1e-6

    def value(x, y):
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    expected = (
        (value(x + step, y) - value(x - step, y)) / (2 * step),
        (value(x, y + step) - value(x, y - step)) / (2 * step),
    )
    assert rosenbrock.gradient(x, y) == pytest.approx(expected, rel=1e-6)
