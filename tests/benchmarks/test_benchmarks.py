"""The benchmarks measure what they say."""

import json

import pytest
import torch

from benchmarks import drift, memory, weights
from benchmarks.cpu import __main__ as cpu
from benchmarks.cpu import measure, peers, report
from benchmarks.cpu.cases import IN_PLACE, Case, Group
from benchmarks.shared import writing
from benchmarks.shared.target import Target
from torch_ademamix import ReferenceAdEMAMix


def parameters(count: int = 3) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(100)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@pytest.mark.parametrize("name", peers.SAME_FORMULA)
def test_competitors_compute_the_same_step(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f=None, **options: f or (lambda g: g))
    torch.manual_seed(0)
    params = parameters()
    expected = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, expected, strict=True):
        q.grad = p.grad
    peer, reference = peers.PEERS[name](params), ReferenceAdEMAMix(expected)
    for _ in range(3):
        peer.step()
        reference.step()
    torch.testing.assert_close(params, expected, rtol=2e-6, atol=1e-6)


def test_state_of_gpt2():
    """Bytes per parameter, flat buffers with their padding and the steps included."""
    of = {recipe.name: memory.gpt2_state(recipe) for recipe in memory.RECIPES if "AdEMAMix" in recipe.name}
    assert of["AdEMAMix, beta1=0"] == pytest.approx(8, abs=1e-4)
    assert of["AdEMAMix8bit, beta1=0"] <= 3.04
    assert of["AdEMAMix8bit, slow_ema_bits=12"] <= 3.07
    assert of["AdEMAMix8bit, slow_ema_bits=12, beta1=0"] <= 2.06
    assert of["AdEMAMix8bit, with remainders"] - of["AdEMAMix8bit"] == pytest.approx(2, abs=1e-4)
    assert of["AdEMAMix8bit, with remainders in 8 bits"] - of["AdEMAMix8bit"] == pytest.approx(1, abs=1e-4)


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(measure, "IN_PLACE_NUMEL", 1000)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("small_buffer")
def test_command(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    group = Group(("AdEMAMix",), rounds=2)
    case = Case("3 small ones", [(5,)] * 3, (group,))
    monkeypatch.setattr(cpu, "CASES", {"host 400": case, "large": case})
    target = Target(
        "the host's time", "host 400", lambda result: result.ratio("AdEMAMix", peers.ADAMW), "it is a test", at_most=2
    )
    monkeypatch.setattr(report, "TARGETS", [target])
    cpu.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "3 small ones, float32: 15 parameters" in printed
    assert "the host's time" in printed
    written = json.loads((tmp_path / "cpu.json").read_text())
    rows = {row["name"]: row for row in written["large"]["rows"]}
    assert set(rows) == {"AdEMAMix", "AdamW, fused", IN_PLACE}
    assert rows["AdEMAMix"]["state_bytes_per_parameter"] == (15 * 12 + 3 * 4) / 15
    assert "AdEMAMix" in (tmp_path / "README.md").read_text()
    assert "</svg>" in (tmp_path / "speed.svg").read_text()

    cpu.main(["--out", str(tmp_path), "--case", "large", "--busy"])
    again = json.loads((tmp_path / "cpu.json").read_text())
    assert again["host 400"] == written["host 400"]
    assert again["large"]["machine"]["time"] != written["large"]["machine"]["time"]
    assert "- time: the clock's; the process' own" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("benchmark", [drift, weights])
def test_tables_of_drift(benchmark, tmp_path, monkeypatch, capsys):
    """Written between their marks, whatever was there."""
    document = tmp_path / "document.md"
    begin, end = writing.marks(benchmark.__name__.rpartition(".")[2])
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    monkeypatch.setattr(benchmark, "DOCUMENT", document)
    benchmark.main(["--steps", "20", "--write"])
    table = capsys.readouterr().out
    assert document.read_text() == f"before\n{begin}\n{table}{end}\nafter\n"
    assert len(table.splitlines()) == 2 + len(benchmark.SCHEMES)
    assert all(f"| {scheme} |" in table.replace("`", "") for scheme in benchmark.SCHEMES)
    if benchmark is weights:
        assert '| `master_weights="remainder"` | 0 | 0 | 0 | 0 |' in table
