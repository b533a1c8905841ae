"""One network trained alone, with hyperparameters of its own, in plain PyTorch: `python five_rates.py adamw 3`."""

import sys

import torch
from torch import nn

SETS = {
    "adamw": [
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        {"lr": 3e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1},
        {"lr": 1e-2, "betas": (0.5, 0.95), "eps": 1e-8, "weight_decay": 0.01},
        {"lr": 3e-3, "betas": (0.9, 0.9), "eps": 1e-4, "weight_decay": 1.0},
        {"lr": 5e-2, "betas": (0.0, 0.99), "eps": 1e-3, "weight_decay": 0.05},
    ],
    "sgd": [
        {"lr": 1e-1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0},
        {"lr": 3e-2, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.1},
        {"lr": 1e-2, "momentum": 0.99, "dampening": 0.5, "weight_decay": 0.01},
        {"lr": 3e-3, "momentum": 0.5, "dampening": 0.1, "weight_decay": 1.0},
        {"lr": 5e-1, "momentum": 0.3, "dampening": 0.0, "weight_decay": 0.05},
    ],
}
CLIP = [0.5, 0.1, 1.0, 0.05, 0.3]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


def main(kind, member, steps=100):
    model = network(member)
    optimizers = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimizer = optimizers[kind](model.parameters(), **SETS[kind][member])
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP[member])
        optimizer.step()
    return model.state_dict()


if __name__ == "__main__":
    for name, value in main(sys.argv[1], int(sys.argv[2])).items():
        print(name, value.tolist())
