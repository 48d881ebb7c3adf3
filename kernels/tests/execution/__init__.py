"""The kernels as compiled for an AMD GPU, executed on the CPU lane by lane."""
