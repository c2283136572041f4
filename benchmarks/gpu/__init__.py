"""Tools for the CUDA kernels: cases for sanitizers and profilers, readers of their output, the emulated device."""
