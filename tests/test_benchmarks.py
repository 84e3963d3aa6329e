"""The benchmarks measure what they say."""

import json

import pytest
import torch

from benchmarks import cpu
from benchmarks.rounds import Times, take_turns
from torch_ademamix import ReferenceAdEMAMix


def parameters(count: int = 3) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(100)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@pytest.mark.parametrize("name", [name for name, c in cpu.COMPETITORS.items() if c.bytes_per_param == 36])
def test_competitors_compute_the_same_step(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f=None, **options: f or (lambda g: g))
    torch.manual_seed(0)
    params = parameters()
    expected = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, expected, strict=True):
        q.grad = p.grad
    step, reference = cpu.COMPETITORS[name].make(params), ReferenceAdEMAMix(expected)
    for _ in range(3):
        step()
        reference.step()
    torch.testing.assert_close(params, expected, rtol=2e-6, atol=1e-6)


def test_take_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = take_turns(steps, rounds=3, calls=2, title="test")
    assert "".join(order) == "ab" + "aabb" + "aabb" + "bbaa" + "aabb"
    assert all(len(times.rounds[name]) == 3 for name in steps)


def test_ratio_is_taken_within_rounds():
    times = Times({"a": [1.0, 10.0, 3.0], "b": [2.0, 10.0, 1.0]}, {"a": 1.0, "b": 1.0})
    assert times.median("a") == 3.0
    assert times.ratio("a", "b") == 1.0
    assert times.best("b") == 1.0


def test_absent_peers_are_named(capsys, monkeypatch):
    def absent(params):
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(cpu.COMPETITORS, "peer", cpu.Competitor(absent, 12))
    case = cpu.Case(3, (5,), ("AdEMAMix", "AdamW, fused", "peer"), rounds=2)
    times = cpu.run_case(case, case.rounds)
    assert set(times.rounds) == {"AdEMAMix", "AdamW, fused"}
    assert "absent: peer (No module named 'peer')" in capsys.readouterr().out


def test_command(capsys, monkeypatch, tmp_path):
    eager = ("AdEMAMix", "AdamW, fused")
    monkeypatch.setattr(cpu, "CASES", {"small": cpu.Case(3, (5,), eager, rounds=2)})
    monkeypatch.setattr(cpu, "QUICK", ("small",))
    cpu.main(["--quick", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert "3 tensors of 5, 20 rounds" in printed
    assert "time, over fused AdamW's" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written["seconds"]["small"]["rounds"]) == set(eager)
