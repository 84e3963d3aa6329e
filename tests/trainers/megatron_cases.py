"""What test_megatron.py's processes run: megatron-core on CPU tensors with gloo.

Nothing of Megatron is replaced but by `use_ademamix`.
"""

import contextlib
import gc
import inspect
import multiprocessing
import sys
from pathlib import Path

import torch
import torch._dynamo  # before the stubs: it wants torch's own functions

FORMATS = ("fully_reshardable", "dp_reshardable", "dp_zero_gather_scatter", "legacy")
STEPS = 10  # before and after a checkpoint


class _Stream:
    def __init__(self, *_, **__):
        pass

    def wait_stream(self, _):
        pass

    wait_event = wait_stream

    def synchronize(self):
        pass


def stub_cuda():
    """What Megatron asks of torch.cuda, answered by the CPU."""
    if torch.cuda.current_stream is _current_stream:
        return
    multiprocessing.current_process()._config["daemon"] = False  # Megatron's writer starts processes
    kind = torch.Tensor.type
    torch.Tensor.type = lambda t, *a, **k: kind(t, *a, **k) if a or k else kind(t).replace("torch.", "torch.cuda.", 1)
    torch.Tensor.cuda = lambda t, *a, **k: t
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = _current_stream
    torch.cuda.default_stream = lambda *_: _Stream()
    torch.cuda.Stream = _Stream
    torch.cuda.stream = lambda *_: contextlib.nullcontext()
    for name in ("synchronize", "empty_cache", "set_device"):  # a function each: Dynamo has rules by function
        setattr(torch.cuda, name, lambda *_: None)
    torch.cuda.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8)
    for name in ("tensor", "zeros", "empty", "full", "ones", "zeros_like", "empty_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _current_stream(*_, **__):
    return _Stream()


def _on_cpu(factory):
    def make(*args, **kwargs):
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class Training:
    """A small model in Megatron's DistributedDataParallel, and Megatron's optimizer."""

    def __init__(self, seed=0, dtype=torch.float32, distributed=True, **config):
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import MegatronModule, TransformerConfig

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        torch.manual_seed(seed)
        shape = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=1)

        class Model(MegatronModule):
            def __init__(self):
                super().__init__(shape)
                self.first, self.last = torch.nn.Linear(64, 96), torch.nn.Linear(96, 7)

            def forward(self, x):
                return self.last(self.first(x).tanh())

        self.dtype, self.distributed = dtype, distributed
        ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(shape, ddp, Model().to(dtype))
        options = dict(optimizer="adam", lr=0.01, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.99, clip_grad=1.0)
        options |= dict(use_distributed_optimizer=distributed, bf16=dtype == torch.bfloat16, params_dtype=dtype)
        self.optimizer = get_megatron_optimizer(OptimizerConfig(**{**options, **config}), [self.model])

    def train(self, steps):
        for t in steps:
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            generator = torch.Generator().manual_seed(t)
            x = torch.randn(8, 64, generator=generator).to(self.dtype)
            (self.model(x) - x[:, :7]).float().square().mean().backward()
            self.model.finish_grad_sync()
            self.optimizer.step()
        return self

    def weights(self):
        """Of the model, and what the optimizer updates of it here."""
        inner = self.optimizer.optimizer
        own = [p.detach().clone() for group in inner.param_groups for p in group["params"]]
        return [p.detach().clone() for p in self.model.parameters()], own

    def save(self, folder, kind, asynchronous=False):
        from megatron.core import dist_checkpointing

        rank = torch.distributed.get_rank()
        folder = Path(folder)
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        if kind == "legacy":
            self.optimizer.save_parameter_state(str(folder / "state.pt"))
            if rank == 0:
                torch.save((self.model.state_dict(), self.optimizer.state_dict()), folder / "rest.pt")
            torch.distributed.barrier()
            return
        state = self._sharded(kind, is_loading=False)
        parameters = inspect.signature(dist_checkpointing.save).parameters
        strategy = {"async_strategy": "mcore"} if "async_strategy" in parameters else {}  # main's default is a package
        request = dist_checkpointing.save(state, str(folder), async_sharded_save=asynchronous, **strategy)
        if asynchronous:
            request.execute_sync()

    def load(self, folder, kind):
        from megatron.core import dist_checkpointing

        if kind == "legacy":
            model, optimizer = torch.load(Path(folder) / "rest.pt", weights_only=False)
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
            self.optimizer.load_parameter_state(str(Path(folder) / "state.pt"))
        else:
            state = dist_checkpointing.load(self._sharded(kind, is_loading=True), str(folder))
            self.model.module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        return self

    def _sharded(self, kind, is_loading):
        model = self.model.module.sharded_state_dict()
        metadata = {"distrib_optim_sharding_type": kind} if self.distributed else {}
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}


@contextlib.contextmanager
def prepared(te=False):
    """Megatron with the stubs, on the path that it takes with or without Transformer Engine; undone at the end."""
    stub_cuda()
    from megatron.core import optimizer, parallel_state
    from megatron.core.optimizer import distrib_optimizer

    from torch_ademamix.megatron import integration

    gc.freeze()  # Megatron collects garbage at each save, among all modules' objects
    before = dict(vars(optimizer)), dict(vars(distrib_optimizer))
    if te:
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    try:
        yield
    finally:
        vars(optimizer).update(before[0])
        vars(distrib_optimizer).update(before[1])
        integration._originals.clear()
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()


def end():
    """Ends the process that has a queue of Megatron's writer: it would outlive this one, which is killed."""
    if writer := sys.modules.get("megatron.core.dist_checkpointing.strategies.filesystem_async"):
        writer._results_queue = None
        gc.unfreeze()
        gc.collect()


def options_of(bits):
    return dict(alpha=8.0, t_alpha=30, t_beta3=30, beta3=0.999, **({"min_8bit_size": 0} if bits == 8 else {}))


def class_of(bits):
    from torch_ademamix import AdEMAMix, AdEMAMix8bit

    return AdEMAMix8bit if bits == 8 else AdEMAMix


def use(bits, **more):
    from torch_ademamix.megatron import use_ademamix

    use_ademamix(class_of(bits), **options_of(bits), **more)


def name_of(bits, dtype, te):
    return f"{bits}-{str(dtype).removeprefix('torch.')}-{te}"


def save_all(folder, cases, formats=FORMATS):
    """Trains each case's model and saves it in every format after STEPS steps; returns the weights after twice that."""
    result = {}
    for bits, dtype, te in cases:
        with prepared(te):
            use(bits)
            training = Training(dtype=dtype).train(range(STEPS))
            for kind in formats:
                training.save(f"{folder}/{name_of(bits, dtype, te)}-{kind}", kind, asynchronous=te and bits == 8)
            result[bits, dtype, te] = training.train(range(STEPS, 2 * STEPS)).weights()
    return result


def load_all(folder, cases, formats=FORMATS, load_bits=None):
    result = {}
    for bits, dtype, te in cases:
        for kind in formats:
            with prepared(te):
                use(load_bits or bits)
                training = Training(seed=1, dtype=dtype).load(f"{folder}/{name_of(bits, dtype, te)}-{kind}", kind)
                result[bits, dtype, te, kind] = training.train(range(STEPS, 2 * STEPS)).weights()
    return result


def check_adamw(folder):
    """AdEMAMix goes on from AdamW's checkpoint with its moments and step, and from its own checkpoint then."""
    with prepared(te=True):
        from megatron.core import optimizer
        from megatron.core.optimizer import distrib_optimizer

        optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        optimizer.USING_PYTORCH_OPTIMIZER = False
        adamw = Training().train(range(STEPS))
        adamw.save(folder, "fully_reshardable")
        expected = [dict(state) for state in adamw.optimizer.optimizer.state.values()]
    with prepared(te=True):
        use(32, load_from="adamw")
        training = Training(seed=1).load(folder, "fully_reshardable")
        inner = training.optimizer.optimizer
        for state, old in zip(inner.state.values(), expected, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(state[name], old[name], rtol=0, atol=0)
            assert state["step"] == STEPS
            assert not state["exp_avg_slow"].any()
        group = inner.param_groups[0]
        assert (group["betas"], group["schedule_start"], group["alpha"]) == ((0.9, 0.99, 0.999), STEPS, 8.0)
        training.train(range(STEPS, STEPS + 2))
        training.save(folder + "-own", "dp_reshardable")
        weights = training.train([99]).weights()
    with prepared(te=True):
        use(32)
        again = Training(seed=2).load(folder + "-own", "dp_reshardable").train([99]).weights()
        assert all(map(torch.equal, again[0], weights[0]))


def check_apertus(folder):
    """A checkpoint for the fork has its names, which it loads from and we load again."""
    from torch.distributed.checkpoint import FileSystemReader

    for beta1, names in ((0.9, {"exp_avg_fast", "exp_avg_slow", "exp_avg_sq"}), (0.0, {"exp_avg_slow", "exp_avg_sq"})):
        place = f"{folder}-{beta1}"
        with prepared():
            use(32, save_for="apertus", load_from="apertus")
            training = Training(adam_beta1=beta1).train(range(STEPS))
            training.save(place, "fully_reshardable")
            groups = training.optimizer.state_dict()["optimizer"]["param_groups"]
            assert [(g["step"], g["alpha_warmup"], g["beta3_warmup"]) for g in groups] == [(STEPS, 30, 30)] * len(
                groups
            )
            entries = FileSystemReader(place).read_metadata().state_dict_metadata
            stored = {key.split(".")[2] for key in entries if key.startswith("optimizer.state.")}
            assert stored == {"fp32_param", "param", *names} & {*stored, *names}, stored
            weights = training.train(range(STEPS, 2 * STEPS)).weights()
        with prepared():
            use(32, load_from="apertus")
            resumed = Training(seed=1, adam_beta1=beta1).load(place, "fully_reshardable")
            again = resumed.train(range(STEPS, 2 * STEPS)).weights()
            assert all(map(torch.equal, again[0], weights[0]))


def check_plain(folder, bits):
    with prepared():
        use(bits)
        training = Training(distributed=False).train(range(STEPS))
        training.save(folder, "torch_dist")
        unbroken = training.train(range(STEPS, 2 * STEPS)).weights()
    with prepared():
        use(bits)
        resumed = Training(seed=1, distributed=False).load(folder, "torch_dist")
        return unbroken, resumed.train(range(STEPS, 2 * STEPS)).weights()


def refusals():
    """The text of each."""
    texts = {}
    for name, options in {
        "optimizer_cpu_offload": {"optimizer_cpu_offload": True},
        "decoupled_weight_decay": {"decoupled_weight_decay": False},
    }.items():
        with prepared(te=True):
            use(32)
            try:
                Training(dtype=torch.bfloat16, **options)
            except (NotImplementedError, ValueError) as error:
                texts[name] = str(error)
    with prepared():
        use(32)
        training = Training()
        training.model.ddp_config.use_megatron_fsdp = True
        try:
            from megatron.core import optimizer
            from megatron.core.optimizer import OptimizerConfig

            config = OptimizerConfig(optimizer="adam", lr=0.1)
            optimizer._get_megatron_optimizer_based_on_param_groups(config, [training.model], [])
        except NotImplementedError as error:
            texts["use_megatron_fsdp"] = str(error)
    with prepared():
        use(32)
        training = Training().train(range(1))
        inner = training.optimizer.optimizer
        first = inner.param_groups[0]["params"][0]
        inner.zero_grad()
        first.grad = torch.ones_like(first)
        inner.step()
        try:
            training.optimizer.state_dict()
        except ValueError as error:
            texts["steps"] = str(error)
    return texts


class FusedAdam(torch.optim.Optimizer):
    """Shaped as Transformer Engine's: the step in the group."""

    def __init__(self, params, lr, weight_decay, betas, eps, **_):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            t = group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                update = (
                    state["exp_avg"] / (1 - beta1**t) / ((state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"])
                )
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
