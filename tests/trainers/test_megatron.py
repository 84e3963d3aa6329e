"""AdEMAMix in megatron-core of PyPI: training, checkpoints in every format, and what doesn't work."""

import importlib.util
import sys
import types

import pytest
import torch

from tests.helpers.config import assert_identical

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("there is no megatron-core", allow_module_level=True)

from tests.helpers.workers import Workers
from tests.trainers import megatron_cases as cases
from torch_ademamix import AdEMAMix
from torch_ademamix.megatron import use_ademamix
from torch_ademamix.megatron.integration import _kwargs

pytestmark = [pytest.mark.distributed, pytest.mark.integrations, pytest.mark.slow]

SECONDS = 1200  # on a busy machine, with Megatron's imports
CASES = [(bits, torch.float32, te) for bits in (32, 8) for te in (False, True)]
HALF = [(bits, torch.bfloat16, True) for bits in (32, 8)]
HALF_FORMATS = ("dp_reshardable", "legacy")


@pytest.fixture(scope="module")
def pools():
    """Processes that save, and others that load."""
    with Workers(2) as first, Workers(4) as second:
        yield first, second
        for pool in first, second:
            if pool.size_running:
                pool.run(pool.size_running, cases.end)


@pytest.fixture(scope="module")
def saved(pools, tmp_path_factory):
    """A folder of checkpoints, and each rank's weights of the runs that went on without them."""
    folder = str(tmp_path_factory.mktemp("megatron"))
    return folder, pools[0].run(2, cases.save_all, folder, CASES, seconds=SECONDS)


@pytest.fixture(scope="module")
def saved_half(pools, tmp_path_factory):
    """The same of bfloat16 models, in a format of each kind."""
    folder = str(tmp_path_factory.mktemp("half"))
    return folder, pools[0].run(2, cases.save_all, folder, HALF, HALF_FORMATS, seconds=SECONDS)


def test_a_resumed_run_repeats_the_unbroken_one_bit_for_bit(pools, tmp_path):
    """With the options that most of the others have too: 8 bits, Transformer Engine, asynchronous writing."""
    case, formats = (8, torch.float32, True), ("fully_reshardable", "legacy")
    unbroken = pools[0].run(2, cases.save_all, str(tmp_path), [case], formats, seconds=SECONDS)
    resumed = pools[1].run(2, cases.load_all, str(tmp_path), [case], formats, seconds=SECONDS)
    for expected, results in zip(unbroken, resumed, strict=True):
        assert len(results) == len(formats)
        for weights in results.values():
            assert_identical(weights, expected[case])


@pytest.mark.nightly
def test_resumed_runs_repeat_the_unbroken_ones_bit_for_bit(pools, saved, saved_half):
    for (folder, unbroken), of, formats in ((saved, CASES, cases.FORMATS), (saved_half, HALF, HALF_FORMATS)):
        resumed = pools[1].run(2, cases.load_all, folder, of, formats, seconds=SECONDS)
        assert len(resumed[0]) == len(of) * len(formats)
        for rank, results in enumerate(resumed):
            for (bits, dtype, te, kind), weights in results.items():
                assert_identical(weights, unbroken[rank][bits, dtype, te], f"{bits} bits, {dtype}, te={te}, {kind}: ")


@pytest.mark.nightly
def test_another_number_of_ranks(pools, saved, tmp_path):
    """From 2 to 4 and from 4 to 2: within 1e-6 of the run that went on."""
    case = CASES[1]
    on_4 = str(tmp_path), pools[1].run(4, cases.save_all, str(tmp_path), [case], seconds=SECONDS)
    for (folder, unbroken), pool, ranks in ((saved, pools[1], 4), (on_4, pools[0], 2)):
        for results in pool.run(ranks, cases.load_all, folder, [case], seconds=SECONDS):
            assert len(results) == len(cases.FORMATS)
            for weights, _ in results.values():
                _assert_close(weights, unbroken[0][case][0], 1e-6)


@pytest.mark.nightly
def test_between_32_and_8_bits(pools, saved):
    folder, unbroken = saved
    for saved_as, load_bits in ((CASES[2], 32), (CASES[0], 8)):
        arguments = (folder, [saved_as], ("fully_reshardable",), load_bits)
        for weights, _ in pools[0].run(2, cases.load_all, *arguments, seconds=SECONDS)[0].values():
            _assert_close(weights, unbroken[0][saved_as][0], 2e-2)


def test_other_optimizers_checkpoints(pools, tmp_path):
    pools[0].run(2, cases.check_adamw, str(tmp_path / "adamw"), seconds=SECONDS)
    pools[0].run(2, cases.check_apertus, str(tmp_path / "apertus"), seconds=SECONDS)


@pytest.mark.nightly
@pytest.mark.parametrize("bits", [32, 8])
def test_without_the_distributed_optimizer(pools, tmp_path, bits):
    unbroken, resumed = pools[0].run(2, cases.check_plain, str(tmp_path), bits, seconds=SECONDS)[0]
    assert_identical(resumed, unbroken)


def test_what_does_not_work_is_refused(pools):
    texts = pools[0].run(2, cases.refusals, seconds=SECONDS)[0]
    assert "optimizer_cpu_offload is on" in texts["optimizer_cpu_offload"]
    assert "decoupled_weight_decay is False" in texts["decoupled_weight_decay"]
    assert "use_megatron_fsdp is on" in texts["use_megatron_fsdp"]
    assert "done 1, 2 steps" in texts["steps"]


def _assert_close(actual, expected, bound):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= bound


def test_errors_of_the_call(monkeypatch):
    with pytest.raises(ValueError, match="load_from is 'adam', but must be one of ademamix, adamw, apertus"):
        use_ademamix(load_from="adam")
    with pytest.raises(ValueError, match="save_for is 'adamw', but must be ademamix or apertus"):
        use_ademamix(save_for="adamw")
    with pytest.raises(TypeError, match="betas, lr come from Megatron's configuration"):
        use_ademamix(AdEMAMix, lr=1e-3, betas=(0.9, 0.999, 0.9999))
    with pytest.raises(ValueError, match="alpha is -1, but must be at least 0"):
        use_ademamix(alpha=-1)
    for option in ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer"):
        config = types.SimpleNamespace(**{option: True})
        with pytest.raises(NotImplementedError, match=rf"{option} is on, .*: use optimizer='adam'"):
            _kwargs(config, [types.SimpleNamespace()], None)
    for version in ("0.15.2", "0.17.0", "0.19.2", "1.0"):
        core = types.SimpleNamespace(__version__=version)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "megatron.core", core)
            with pytest.raises(RuntimeError, match=rf"megatron-core is {version}, but .* supports 0\.16\.x"):
                use_ademamix()
