"""What a step computes, in PyTorch: schedules, formats of state, roundings, and the kernels' oracle."""
