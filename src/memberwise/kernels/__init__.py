"""Kernels of our own, in C++, for what torch's own leave far from what a processor can do."""
