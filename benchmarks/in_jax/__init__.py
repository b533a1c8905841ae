"""The workloads' models of one member in JAX, as plain functions `forward(params, buffers, key, *inputs, mode)`.

Parameters and buffers are dicts by the torch model's names, with torch's layouts; the result is the output and the new
buffers. Importing a module here imports jax.
"""
