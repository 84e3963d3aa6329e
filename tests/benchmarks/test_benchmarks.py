"""The benchmarks measure what they say."""

import json
import sys
import time

import pytest
import torch

from benchmarks import drift, memory, weights
from benchmarks.cpu import __main__ as cpu
from benchmarks.cpu import measure, peers, report
from benchmarks.cpu.cases import IN_PLACE, Case, Group
from benchmarks.cpu.rounds import Times, take_turns
from benchmarks.shared import footprint, origin, writing
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


@pytest.mark.parametrize(("name", "per_parameter"), [("AdEMAMix", 12), ("AdamW, fused", 8), (peers.PLAIN, 12)])
def test_state_bytes(name, per_parameter, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f=None, **options: f or (lambda g: g))
    peer = peers.PEERS[name](parameters())
    peer.step()
    steps = 0 if name == peers.PLAIN else 3 * 4
    assert footprint.state_bytes(peer.state) == 300 * per_parameter + steps


def test_state_of_gpt2():
    """Bytes per parameter, flat buffers with their padding and the steps included."""
    of = {recipe.name: memory.gpt2_state(recipe) for recipe in memory.RECIPES if "AdEMAMix" in recipe.name}
    assert of["AdEMAMix, beta1=0"] == pytest.approx(8, abs=1e-4)
    assert of["AdEMAMix8bit, beta1=0"] <= 3.04
    assert of["AdEMAMix8bit, slow_ema_bits=12"] <= 3.07
    assert of["AdEMAMix8bit, slow_ema_bits=12, beta1=0"] <= 2.06
    assert of["AdEMAMix8bit, with remainders"] - of["AdEMAMix8bit"] == pytest.approx(2, abs=1e-4)
    assert of["AdEMAMix8bit, with remainders in 8 bits"] - of["AdEMAMix8bit"] == pytest.approx(1, abs=1e-4)


def test_state_bytes_counts_shared_tensors_once():
    shared = torch.zeros(256)
    assert footprint.state_bytes({"a": [shared, torch.zeros(2)], "b": {"c": shared, "d": 1}}) == 1024 + 8


def test_state_bytes_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    params = [torch.nn.Parameter(torch.randn(4096)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    peer = peers.PEERS["bitsandbytes AdEMAMix8bit"](params)
    peer.step()
    scales, maps = 3 * 3 * 4096 // 256 * 4, 2 * 256 * 4  # the two maps are shared
    assert footprint.state_bytes(peer.state) == 3 * 3 * 4096 + scales + maps


def test_peak_bytes():
    size = 64 * 2**20

    def allocate() -> None:
        torch.ones(size, dtype=torch.uint8)

    peak = footprint.peak_bytes(allocate)
    if peak is None:
        pytest.skip("this system doesn't count resident memory")
    assert peak == pytest.approx(size, rel=0.1)
    assert footprint.peak_bytes(lambda: None) < size / 10


def test_take_turns():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    times = take_turns(steps, rounds=20, calls=2, title="test")
    turns = ["".join(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert len(turns) == 20
    assert set(turns) == {"aabb", "bbaa"}
    assert all(len(times[name]) == 20 for name in steps)


def test_own_time_leaves_waiting_out():
    steps = {"waits": lambda: time.sleep(0.2)}
    (own,) = take_turns(steps, rounds=1, calls=1, title="test", clock=time.process_time)["waits"]
    (clock,) = take_turns(steps, rounds=1, calls=1, title="test")["waits"]
    assert own < 0.1 < 0.2 <= clock


def test_ratio_is_taken_within_rounds():
    times = Times({"a": [1.0, 10.0, 3.0], "b": [2.0, 10.0, 1.0]}, {"a": 1.0, "b": 1.0})
    assert times.median("a") == 3.0
    assert times.quartiles("a") == (2.0, 6.5)
    assert times.ratio("a", "b") == 1.0


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(measure, "IN_PLACE_NUMEL", 1000)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("small_buffer")
def test_absent_peers_are_named(monkeypatch):
    def absent(params):
        raise ImportError("No module named 'peer'")

    monkeypatch.setitem(peers.PEERS, "peer", absent)
    group = Group(("AdEMAMix", "peer", peers.PLAIN), rounds=2)
    result = measure.run_case(Case("test", [(5,)] * 3, (group,), left_out={peers.PLAIN: "too slow"}))
    assert set(result.times[0].rounds) == {"AdEMAMix", "AdamW, fused", IN_PLACE}
    printed = "\n".join(report.lines(report.record(result, {}, [])))
    assert "absent: peer (not installed: No module named 'peer')" in printed
    assert f"absent: {peers.PLAIN} (too slow)" in printed


def test_traffic_of_a_step():
    case = Case("test", [(5,)] * 3, (), torch.bfloat16)
    result = measure.Result(case, state_bytes={"a": 180})
    assert result.traffic("a") == 15 * 2 * 3 + 360


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


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "folder" / "file.txt"
    writing.write(file, "old")
    with pytest.raises(TypeError):
        writing.write(file, None)
    assert file.read_text() == "old"


def test_versions_name_what_is_installed():
    versions = origin.versions("numpy", "no-such-package")
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "no-such-package" not in versions


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


def test_a_table_needs_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- other: begin -->\n<!-- other: end -->\n")
    with pytest.raises(ValueError, match="has no <!-- drift: begin --> and <!-- drift: end --> to write a table"):
        writing.write_table(page, "drift", "| a |")
    assert "|" not in page.read_text()
