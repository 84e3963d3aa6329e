"""What models do that a whole step as one graph has to follow, as docs/compile.md says it."""

import inspect
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix, compile_train_step

LOGGER = logging.getLogger("a model's")
WIDTH, HEADS, CONTEXT, VOCABULARY, STEPS = 16, 2, 8, 37, 3


def policy(context, op, *args, **kwargs):
    random = torch.Tag.nondeterministic_seeded in op.tags
    return CheckpointPolicy.MUST_SAVE if random else CheckpointPolicy.PREFER_RECOMPUTE


ORDINARY = {"use_reentrant": False}
SAVES_RANDOM = {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, policy)}

SINCE_2_13 = pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="came with torch 2.13"
)


@pytest.fixture
def counter():
    return CompileCounterWithBackend("aot_eager")


class Block(nn.Module):
    """Checkpointed with these options, or not at all."""

    def __init__(self, options, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.options = options

    def body(self, x):
        return x + self.dropout(torch.tanh(self.linear(x)))

    def forward(self, x):
        return self.body(x) if self.options is None else checkpoint(self.body, x, **self.options)


class Attention(Block):
    def body(self, x):
        q, k, v = (x.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for x in (x, self.linear(x), x))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.dropout(attention.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Layers before the block and after it; without `first`, the block's input requires no gradient."""

    def __init__(self, block, first=True):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH) if first else nn.Identity()
        self.block = block
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.last(self.block(self.first(x)))


def squared(model, x):
    return model(x).square().mean()


def vectors(i):
    return {"x": torch.randn(4, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(i))}


def plain_step(model, optimizer, loss_fn, forward=None):
    def step(**batch):
        loss = loss_fn(model if forward is None else forward, **batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def trained(make, make_step, loss_fn=squared, batch=vectors):
    """The losses and what has become of the model, with the same random numbers each time."""
    torch.manual_seed(0)
    model = make()
    step = make_step(model, AdEMAMix(model.parameters(), lr=1e-2), loss_fn)
    torch.manual_seed(1)
    return [step(**batch(i)) for i in range(STEPS)], model.state_dict()


class Recorded:
    """A backend that computes as eager does, and has the targets of what it computes."""

    def __init__(self):
        self.targets = []

    def __call__(self, graph, inputs):
        return aot_autograd(fw_compiler=self.record, keep_inference_input_mutations=True)(graph, inputs)

    def record(self, graph, _):
        self.targets += [str(node.target) for node in graph.graph.nodes]
        return graph

    def count(self, name):
        return self.targets.count(f"aten.{name}.default")


@SINCE_2_13
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """As the plain loop, and the block is computed again for the backward pass."""
    options = {"use_reentrant": reentrant}
    expected = trained(lambda: Model(Block(options)), plain_step)
    for make, tanhs in ((lambda: Model(Block(options)), 2), (lambda: Model(Block(None)), 1)):
        torch._dynamo.reset()
        backend = Recorded()
        assert_identical(trained(make, partial(compile_train_step, backend=backend)), expected)
        assert backend.count("tanh") == tanhs


def test_reentrant_checkpointing_of_what_requires_no_gradient(counter):
    """The plain loop doesn't train the block, of which torch warns; under torch.compile it is trained."""

    def make(reentrant):
        return Model(Block({"use_reentrant": reentrant}), first=False)

    torch.manual_seed(0)
    untrained = make(True).block.state_dict()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        _, plain = trained(lambda: make(True), plain_step)
    assert_identical({name: plain[f"block.{name}"] for name in untrained}, untrained)
    compiled = trained(lambda: make(True), partial(compile_train_step, backend=counter))
    assert_identical(compiled, trained(lambda: make(False), plain_step))


@SINCE_2_13
@pytest.mark.parametrize(("kind", "dropout"), [(Block, 0.3), (Attention, 0.0), (Attention, 0.3)])
def test_random_operations_in_what_is_checkpointed(kind, dropout):
    """torch raises rather than repeat them in a graph with the backward pass; they can be saved, the rest repeated."""
    expected = trained(lambda: Model(kind(ORDINARY, dropout)), plain_step)

    try:
        compiled = trained(lambda: Model(kind(ORDINARY, dropout)), partial(compile_train_step, backend="aot_eager"))
    except BackendCompilerFailed as error:
        assert "does not support RNG ops in recompute regions" in str(error)  # noqa: PT017 (torch 2.15 may not raise)
    else:
        assert not dropout  # attention without it isn't random
        assert_identical(compiled, expected)
    for make, products in ((lambda: Model(kind(SAVES_RANDOM, dropout)), 4), (lambda: Model(kind(None, dropout)), 3)):
        torch._dynamo.reset()
        backend = Recorded()
        assert_identical(trained(make, partial(compile_train_step, backend=backend)), expected)
        assert backend.count("addmm") == products  # one more: the block's linear layer again


def test_compiled_model_and_eager_step():
    """The other way out, which wants nothing of the model."""

    def step_of(model, optimizer, loss_fn):
        return plain_step(model, optimizer, loss_fn, torch.compile(model, backend="aot_eager", fullgraph=True))

    expected = trained(lambda: Model(Attention(ORDINARY, 0.3)), plain_step)
    assert_identical(trained(lambda: Model(Attention(ORDINARY, 0.3)), step_of), expected)


@SINCE_2_13
def test_checkpointing_and_micro_batches(counter):
    with pytest.raises(BackendCompilerFailed, match="Detected 2 disjoint backward regions"):
        trained(lambda: Model(Block(ORDINARY)), partial(compile_train_step, backend=counter, accumulate=2))


def on_forward(linear):
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)


def on_tensor(linear):
    def hook(module, inputs, output):
        output.register_hook(lambda grad: 2 * grad)

    linear.register_forward_hook(hook)


def on_backward(linear):
    linear.register_full_backward_hook(lambda module, of_input, of_output: (2 * of_input[0],))


def hooked(register):
    def make():
        model = Model(Block(None))
        if register is not None:
            register(model.block.linear)
        return model

    return make


@pytest.mark.parametrize("register", [on_forward, on_tensor])
def test_hooks_of_modules(counter, register):
    compiled = trained(hooked(register), partial(compile_train_step, backend=counter))
    assert_identical(compiled, trained(hooked(register), plain_step))
    unhooked, _ = trained(hooked(None), plain_step)
    assert compiled[0][-1] != unhooked[-1]


def test_backward_hooks_of_modules(counter):
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Module-level backwards hooks"):
        trained(hooked(on_backward), partial(compile_train_step, backend=counter))


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("compiled_before", [False, True])
def test_anomaly_detection_is_refused(counter, compiled_before):
    model = Model(Block(None))
    optimizer = AdEMAMix(model.parameters())
    step = compile_train_step(model, optimizer, squared, backend=counter)
    if compiled_before:
        step(**vectors(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="anomaly detection is on"):
        step(x=torch.full((4, CONTEXT, WIDTH), torch.nan))
    assert_identical(model.state_dict(), before)
    step(**vectors(0))
    assert counter.frame_count == 1


@SINCE_2_13
def test_logging(counter):
    """It is left out of the graph, which it would break."""

    class Logging(Model):
        def forward(self, x):
            LOGGER.warning("%d rows", x.shape[0])
            LOGGER.debug("and so on")
            return super().forward(x)

    expected = trained(lambda: Logging(Block(None)), plain_step)
    assert_identical(trained(lambda: Logging(Block(None)), partial(compile_train_step, backend=counter)), expected)
    assert counter.frame_count == 1
    assert not torch._dynamo.config.ignore_logging_functions


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    size = dict(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=2, n_head=HEADS)
    return GPT2LMHeadModel(GPT2Config(**size, **options))


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    size = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=HEADS)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, **size, **options))


def tokens(i):
    """The last row is padded."""
    ids = torch.randint(VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(i))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_of(model, **batch):
    return model(**batch).loss


@pytest.mark.each_value
@SINCE_2_13
@pytest.mark.integrations
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [None, {"attn_implementation": "eager"}, SAVES_RANDOM], ids=["", "eager", "saved"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_transformers(counter, make, use_cache, options):
    """GPT-2 with its dropout, Llama; plain, and checkpointed with either way out."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'torch-ademamix[integrations]'")
    config = {"use_cache": use_cache}
    if options is not None and options is not SAVES_RANDOM:
        config |= options
        if make is gpt2:
            config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)

    def model(checkpointing):
        made = make(**config).train()
        if options is not None:
            made.gradient_checkpointing_enable(checkpointing)
        return made

    compiled = ORDINARY if options is not SAVES_RANDOM else SAVES_RANDOM
    step_of = partial(compile_train_step, backend=counter)
    assert_identical(
        trained(lambda: model(compiled), step_of, loss_of, tokens),
        trained(lambda: model(ORDINARY), plain_step, loss_of, tokens),
    )
    assert counter.frame_count == 1
