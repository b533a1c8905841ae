"""Diffusion, flows, differential equations, operators, potentials, Gaussian processes."""

from __future__ import annotations

from typing import Any

import diffusers
import e3nn.o3
import gpytorch
import nflows.distributions
import nflows.flows
import nflows.transforms
import torch
import torchdiffeq
import zuko
from torch import nn

from survey.third_party.case import Case, Inputs, call_in_order, randn

# -- diffusion


def noisy(generator: torch.Generator) -> Inputs:
    return {
        "sample": torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64),
        "timestep": torch.randint(0, 100, (2,), generator=generator),
    }


def noisy_with_text(generator: torch.Generator) -> Inputs:
    return {**noisy(generator), "text": torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)}


def conditioned(model: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> Any:
    return model(sample, timestep, encoder_hidden_states=text)


def unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        dropout=0.1,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def conditional_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def autoencoder() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def reconstructed(model: nn.Module, x: torch.Tensor) -> Any:
    """A draw of the latent between encoder and decoder."""
    latent = model.encode(x).latent_dist
    return model.decode(latent.sample()), latent.kl()


CASES = [
    Case("diffusion U-Net", "diffusers", unet, noisy),
    Case("diffusion U-Net, text", "diffusers", conditional_unet, noisy_with_text, conditioned),
    Case("autoencoder with a drawn latent", "diffusers", autoencoder, randn(2, 3, 16, 16), reconstructed),
]

# -- normalizing flows


def log_prob(model: nn.Module, x: torch.Tensor, context: torch.Tensor) -> Any:
    return model(context).log_prob(x)


def sampled(model: nn.Module, x: torch.Tensor, context: torch.Tensor) -> Any:
    """Draws that gradients go through, and their density."""
    return model(context).rsample_and_log_prob()


def of_nflows(model: nn.Module, x: torch.Tensor, context: torch.Tensor) -> Any:
    """nflows makes tensors of the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return model.log_prob(x, context), model.sample_and_log_prob(2, context)
    finally:
        torch.set_default_dtype(before)


def conditional(generator: torch.Generator) -> Inputs:
    return {
        "x": torch.randn(5, 3, generator=generator, dtype=torch.float64),
        "context": torch.randn(5, 2, generator=generator, dtype=torch.float64),
    }


def coupling() -> nn.Module:
    steps = []
    for _ in range(2):
        steps += [
            nflows.transforms.ActNorm(3),
            nflows.transforms.RandomPermutation(3),
            nflows.transforms.MaskedAffineAutoregressiveTransform(3, 8, context_features=2, use_batch_norm=True),
            nflows.transforms.LULinear(3),
        ]
    return nflows.flows.Flow(nflows.transforms.CompositeTransform(steps), nflows.distributions.StandardNormal([3]))


def splines() -> nn.Module:
    steps = [
        nflows.transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            3, 8, context_features=2, num_bins=4, tails="linear", tail_bound=3.0
        )
        for _ in range(2)
    ]
    return nflows.flows.Flow(nflows.transforms.CompositeTransform(steps), nflows.distributions.StandardNormal([3]))


CASES += [
    Case(
        "neural spline flow",
        "zuko",
        lambda: zuko.flows.NSF(3, 2, transforms=2, hidden_features=(8, 8)),
        conditional,
        log_prob,
    ),
    Case(
        "neural spline flow, sampled",
        "zuko",
        lambda: zuko.flows.NSF(3, 2, transforms=2, hidden_features=(8, 8)),
        conditional,
        sampled,
    ),
    Case(
        "masked autoregressive flow",
        "zuko",
        lambda: zuko.flows.MAF(3, 2, transforms=2, hidden_features=(8, 8)),
        conditional,
        log_prob,
    ),
    Case("continuous flow", "zuko", lambda: zuko.flows.CNF(3, 2, hidden_features=(8,)), conditional, log_prob),
    Case(
        "neural autoregressive flow",
        "zuko",
        lambda: zuko.flows.NAF(3, 2, transforms=1, hidden_features=(8,)),
        conditional,
        log_prob,
    ),
    Case("affine autoregressive flow with ActNorm", "nflows", coupling, conditional, of_nflows),
    Case("rational quadratic splines", "nflows", splines, conditional, of_nflows),
]

# -- differential equations


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(y) * torch.cos(t)


class NeuralODE(nn.Module):
    """A field, and a solver that chooses its steps by what it finds."""

    def __init__(self, adjoint: bool = False, method: str = "dopri5", **options: Any) -> None:
        super().__init__()
        self.field = Field()
        self.solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        self.options = {"method": method, "rtol": 1e-4, "atol": 1e-5, **options}

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.solve(self.field, y, torch.linspace(0, 1, 4, dtype=y.dtype), **self.options)


CASES += [
    Case("neural ODE, adaptive", "torchdiffeq", NeuralODE, randn(2, 3)),
    Case("neural ODE, adaptive, adjoint", "torchdiffeq", lambda: NeuralODE(adjoint=True), randn(2, 3)),
    Case("neural ODE, fixed steps", "torchdiffeq", lambda: NeuralODE(method="rk4"), randn(2, 3)),
    Case("neural ODE, fixed steps, adjoint", "torchdiffeq", lambda: NeuralODE(adjoint=True, method="rk4"), randn(2, 3)),
]

# -- operators and potentials


class Equivariant(nn.Module):
    """e3nn's tensor products over all pairs of points: an energy, and the forces that are its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.harmonics = e3nn.o3.Irreps.spherical_harmonics(2)
        self.hidden = e3nn.o3.Irreps("4x0e + 2x1o + 1x2e")
        self.product = e3nn.o3.FullyConnectedTensorProduct("4x0e", self.harmonics, self.hidden)
        self.linear = e3nn.o3.Linear(self.hidden, "3x0e")
        self.embedding = nn.Linear(1, 4)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        apart = points[:, None] - points[None, :] + torch.eye(len(points), dtype=points.dtype)[..., None]
        waves = e3nn.o3.spherical_harmonics(self.harmonics, apart, normalize=True, normalization="component")
        features = self.embedding(apart.norm(dim=-1, keepdim=True))
        return self.linear(self.product(features, waves)).sum((0, 1))


def energy_and_forces(model: nn.Module, points: torch.Tensor) -> Any:
    energy = model(points).sum()
    (gradient,) = torch.autograd.grad(energy, points, create_graph=True)
    return energy, -gradient


def cloud(generator: torch.Generator) -> Inputs:
    return {"points": torch.randn(4, 3, generator=generator, dtype=torch.float64)}


class DeepKernel(gpytorch.models.ExactGP):
    """A Gaussian process on features of a network; in training its marginal likelihood."""

    def __init__(self) -> None:
        x = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        super().__init__(x, torch.sin(6 * x[:, 0]), likelihood)
        self.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 2))
        self.mean_module = gpytorch.means.ConstantMean()
        self.kernel = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2))

    def forward(self, x: torch.Tensor) -> Any:
        features = self.net(x)
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.kernel(features))


def marginal_likelihood(model: DeepKernel, x: torch.Tensor) -> Any:
    if not model.training:
        found = model(x)
        return found.mean, found.variance
    found = model(*model.train_inputs)
    return gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(found, model.train_targets)


CASES += [
    Case("equivariant tensor products", "e3nn", Equivariant, cloud),
    Case("equivariant potential, forces", "e3nn", Equivariant, cloud, energy_and_forces),
    Case("deep kernel Gaussian process", "gpytorch", DeepKernel, randn(3, 1), marginal_likelihood),
]
__all__ = ["CASES", "call_in_order"]
