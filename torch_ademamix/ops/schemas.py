"""The schemas of the step ops.

Each op takes lists of equal dtypes on one device. Two overloads differ in the form of the hyperparameters
(:class:`torch_ademamix.numerics.hyperparameters.Hyperparameters`): numbers, row after row, with learning rates that may
be tensors; or one tensor of shape [rows, numbers].

- `rows`: each parameter's row of hyperparameters; empty if all have the first.
- `stochastic_param_rounding`: how bfloat16 parameters without remainders are rounded.
- `seed`, `subsequences`: those of the random bits. Each parameter has a subsequence; empty if nothing is drawn.
- `offsets`: where state lies in tensors that parameters share (offsets.py); empty if each has its own.
- `grad_scale`, `found_inf`: GradScaler's tensors. Gradients are divided by the first; if the second isn't 0, nothing
  changes.
- `dry_run`: checks the arguments and does nothing else.
"""

SCALER = ("grad_scale", "found_inf")

HYPERPARAMETERS = {
    "": "float[] hyperparameters, Tensor[] lrs",
    ".tensor_hyperparameters": "Tensor hyperparameters",
}

STEP = """ademamix_step_{overload}(
    Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_slows, Tensor(d!)[] exp_avg_sqs,
    Tensor(e!)[] steps, Tensor(z!)[] remainders, {hyperparameters}, *, int[] rows, bool maximize,
    bool stochastic_param_rounding, int seed, int[] subsequences, int[] offsets,
    Tensor? grad_scale=None, Tensor? found_inf=None, bool dry_run=False) -> ()"""

BLOCKWISE_STEP = """ademamix_blockwise_step_{overload}(
    Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_absmaxs,
    Tensor(d!)[] exp_avg_slows, Tensor(e!)[] exp_avg_slow_absmaxs, Tensor(f!)[] exp_avg_sqs,
    Tensor(g!)[] exp_avg_sq_absmaxs, Tensor(h!)[] steps, Tensor(z!)[] remainders, {hyperparameters}, *, int[] rows,
    bool maximize, bool stochastic_rounding, bool stochastic_param_rounding, int seed, int[] subsequences,
    int[] offsets, Tensor? grad_scale=None, Tensor? found_inf=None, bool dry_run=False) -> ()"""


def overloads(template: str) -> list[str]:
    return [template.format(overload=name, hyperparameters=given) for name, given in HYPERPARAMETERS.items()]
