"""Full training steps as one graph, compiled or captured on a GPU.

Both do what this loop does, or raise::

    optimizer.zero_grad()
    loss = loss_fn(model, *batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

- Gradients of all parameters of the model and of the optimizer are cleared before and after, as if by `zero_grad` with
  `set_to_none=True`. So several steps over one model, as a generator's and a discriminator's, don't see each other's.
  Other leaves of the loss, as a batch that requires a gradient, get theirs; with hooks of parameters, or DTensors, not
  in a compiled step.
- Hooks of parameters, modules and the optimizer's steps are called; a compiled step with a module's backward hook is
  refused by Dynamo. What a model logs is left out of a compiled step, which it would break (with torch 2.13).
- An overridden `step()` of the optimizer's class is called, after the graph. One that was put on the instance raises;
  LR schedulers' wrapper is fine.
- Several optimizers are stepped in the given order: AdEMAMix in the graph, others by their own `step()` after it, from
  the gradients that the graph leaves. Parameters that belong to none of them are warned of.
- Tensors with a history that the forward pass leaves on modules, such as an auxiliary loss, are detached in a compiled
  step.
- With TORCH_COMPILE_DISABLE=1, a compiled step runs as the plain loop.
- Learning rates, betas, α, the warm-ups, eps and weight decay are read anew at each step, so that schedulers, made
  before or after, change them: call `scheduler.step()` after the step as ever. Other options are noticed too.
- Parameters that are frozen, moved or added to the optimizer are noticed at the next step. Where the model has other
  parameters in the place of the optimizer's, the step refuses.
- `model.eval()` and evaluation between steps, and loading state into model and optimizer, are as ever.
"""

from torch_ademamix.training.captured import capture_train_step
from torch_ademamix.training.compiled import compile_train_step
from torch_ademamix.training.release import release_gradients

__all__ = ["capture_train_step", "compile_train_step", "release_gradients"]
