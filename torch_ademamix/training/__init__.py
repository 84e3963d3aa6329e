"""Full training steps as one graph, compiled or captured on a GPU.

Both do what this training loop does, or raise::

    optimizer.zero_grad()
    loss = loss_fn(model, *batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

- The step clears the gradients of all parameters of the model and the optimizer before and after, as `zero_grad` does
  with `set_to_none=True`. So several steps over one model, such as a generator's and a discriminator's, don't see each
  other's gradients. Other leaves of the loss, such as a batch that requires a gradient, get theirs, except in a
  compiled step with hooks of parameters or with DTensors.
- The step calls hooks of parameters, modules and the optimizer's steps. Dynamo doesn't support backward hooks of
  modules. A compiled step leaves out what a model logs, since that would break its graph (torch 2.13).
- If the optimizer's class overrides `step()`, that is called after the graph. A `step()` assigned to the instance
  raises, except an LR scheduler's wrapper.
- Several optimizers make their steps in the given order: AdEMAMix in the graph, others by their own `step()` after it,
  from the gradients that the graph leaves. A warning names parameters that belong to none of them.
- If the forward pass leaves tensors with a history on modules, such as an auxiliary loss, a compiled step detaches
  them.
- With TORCH_COMPILE_DISABLE=1, a compiled step runs as the standard training loop.
- Each step reads learning rates, betas, α, the warm-ups, eps and weight decay, so schedulers created before or after it
  work: call `scheduler.step()` after the step as usual. Changes of other options take effect too.
- Freezing, moving or adding parameters takes effect at the next step. If parameters of the optimizer are no longer the
  model's, the step raises.
- `model.eval()`, evaluation between steps, and loading state into the model and the optimizer work as usual.
"""

from torch_ademamix.training.captured import capture_train_step
from torch_ademamix.training.compiled import compile_train_step
from torch_ademamix.training.release import release_gradients

__all__ = ["capture_train_step", "compile_train_step", "release_gradients"]
