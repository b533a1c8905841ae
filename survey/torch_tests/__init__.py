"""PyTorch's own tests of `vmap`, `functional_call` and `stack_module_state`, pointed at Memberwise."""
