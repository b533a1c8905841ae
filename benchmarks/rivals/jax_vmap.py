"""JAX: `jit` of the whole step, `vmap(value_and_grad(...))` of a model of its own, and optax."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import feed
from benchmarks.case import Batch, Case, Unwritten, stacked
from benchmarks.rival import Cannot, Rival, Running


def start(case: Case, models: list[nn.Module]) -> Running:
    import jax  # it may not be installed

    if isinstance(case.in_jax, Unwritten):
        raise Cannot(case.in_jax.why)
    jax.config.update("jax_enable_x64", next(models[0].parameters()).dtype is torch.float64)
    jax.config.update("jax_default_matmul_precision", "highest")  # else it rounds factors on a GPU
    on_cpu = next(models[0].parameters()).device.type == "cpu"
    params, buffers = ({name: array(value) for name, value in part.items()} for part in stacked(models))
    whole, optimizer = step_of_all(case, models[0])
    held: list[Any] = [params, buffers, optimizer.init(params), jax.random.split(jax.random.key(0), len(models))]
    compiled = jax.jit(whole, donate_argnums=(0, 1, 2, 3) if case.trains else ())

    def step(batch: Any) -> Tensor:
        if isinstance(batch[0], Tensor):
            batch = tuple(map(array, batch))
        held[:], losses = compiled(*held, batch)
        return torch.from_dlpack(jax.block_until_ready(losses) if on_cpu else losses)

    def state() -> dict[str, Tensor]:
        whole = {**held[0], **held[1]}
        return {name: as_before(value, whole[name]) for part in stacked(models[:1]) for name, value in part.items()}

    def memory(batch: Batch) -> int:
        """What XLA says that it needs: arguments, results that do not lie in their place, and what is between."""
        told = compiled.lower(*held, tuple(map(array, batch))).compile().memory_analysis()
        return (
            told.argument_size_in_bytes + told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
        )

    return Running(step, state, in_jax, memory)


def step_of_all(case: Case, template: nn.Module) -> tuple[Callable, Any]:
    """The step as a pure function of (params, buffers, moments, keys, batch), and its optimizer."""
    import jax
    import optax

    from benchmarks.in_jax import layers

    forward = import_module(f"benchmarks.in_jax.{case.in_jax}").forward
    trunk = getattr(template, "trunk", None)
    arrays = None if trunk is None else {name: array(value) for name, value in trunk.named_parameters()}
    mode = layers.Mode(case.trains, case.still is not None, arrays)

    def loss_of_one(params, buffers, key, *batch):
        *inputs, target = batch
        out, new = forward(params, buffers, key, *inputs, mode=mode)
        return layers.loss(case.objective, out, target), new

    in_axes = (0, 0, 0, *case.in_dims[1:])
    optimizer = optimizer_of(case)

    def train(params, buffers, moments, keys, batch):
        here, later = jax.vmap(jax.random.split, out_axes=1)(keys)
        differentiated = jax.vmap(jax.value_and_grad(loss_of_one, has_aux=True), in_axes=in_axes)
        (losses, new), grads = differentiated(params, buffers, here, *batch)
        if case.recipe.clip is not None:
            norms = jax.vmap(optax.global_norm)(grads)
            scale = jax.numpy.minimum(case.recipe.clip / (norms + 1e-6), 1.0)
            grads = jax.tree.map(lambda grad: grad * scale.reshape(-1, *(1,) * (grad.ndim - 1)), grads)
        updates, moments = optimizer.update(grads, moments, params)
        return [optax.apply_updates(params, updates), new, moments, later], losses

    def predict(params, buffers, moments, keys, batch):
        def one(params, buffers, key, *inputs):
            return forward(params, buffers, key, *inputs, mode=mode)[0]

        return [params, buffers, moments, keys], jax.vmap(one, in_axes=in_axes)(params, buffers, keys, *batch)

    return (train if case.trains else predict), optimizer


def optimizer_of(case: Case) -> Any:
    """All members have one rate, and no moment of one looks at another's: one optimizer for the stacked arrays."""
    import optax

    if case.recipe.momentum is None:
        return optax.adam(case.recipe.lr)
    return optax.sgd(case.recipe.lr, momentum=case.recipe.momentum)


def in_jax(data: feed.Data) -> Callable[[int], object]:
    """As `feed.in_torch`, from arrays."""
    import jax
    import jax.numpy as jnp

    if data.ready:
        ready = [tuple(map(array, batch)) for batch in data.ready]
        return lambda number: ready[number % len(ready)]
    rows, picks = tuple(map(array, data.rows)), tuple(map(array, data.picks))
    pick = jax.jit(lambda rows, pick: tuple(jnp.take(part, pick, axis=data.axis) for part in rows))
    return lambda number: pick(rows, picks[number % len(picks)])


def array(value: Tensor) -> Any:
    """A copy: JAX is handed it for good."""
    import jax.numpy as jnp

    return jnp.array(value.detach().cpu().numpy())


def as_before(before: Tensor, value: Any) -> Tensor:
    """In the dtype of the member's tensor: JAX counts in 32 bits."""
    import numpy

    found = torch.tensor(numpy.asarray(value), device=before.device)
    return found if found.is_floating_point() else found.to(before.dtype)


RIVAL = Rival("jax", "JAX", "jit of the step, vmap(value_and_grad), optax", start, needs=("jax", "optax"))
