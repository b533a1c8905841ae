"""Train 32 small CNNs as one: 8 seeds x 4 learning rates, on scikit-learn's handwritten digits.

    make demo                          or: python examples/digits.py --help

One stack holds all members, one captured step trains them. Then four of them are trained again, each alone in plain
PyTorch: that gives the time of the loop, and shows that a member of the stack is what it would be alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import memberwise

BATCH = 32
BINS = 15  # of the expected calibration error
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
ALONE = 4

Data = dict[str, tuple[torch.Tensor, torch.Tensor]]


# -- the model, its loss and the data: written for one model, no word of members


def make_model() -> nn.Module:
    """A small CNN for 8 x 8 images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 10)),
    )


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean cross entropy of one model on one batch."""
    return F.cross_entropy(model(x), y)


def load() -> Data:
    """Images (N, 1, 8, 8) and labels (N,): 1000 to train with, 297 to choose by, 500 held out."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(labels)[order]
    parts = {"train": slice(1000), "choose": slice(1000, 1297), "test": slice(1297, None)}
    return {name: (x[part], y[part]) for name, part in parts.items()}


def batches(seed: int, count: int, epochs: int) -> Iterator[list[torch.Tensor]]:
    """For each epoch the indices of its batches, in the order that belongs to the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield list(order[: count - count % BATCH].split(BATCH))


# -- all members as one stack


@dataclass
class Run:
    """What a training run left behind, and the seconds of each of its steps."""

    model: Any
    seconds: list[float] = field(default_factory=list)
    predicted: list[torch.Tensor] = field(default_factory=list)  # (M, N, classes) after each epoch, of "choose"

    @property
    def starting(self) -> float:
        """What the first steps took beyond the usual: recording and compiling."""
        usual = statistics.median(self.seconds)
        return sum(max(0.0, seconds - usual) for seconds in self.seconds[:8])


def train_as_one(seeds: list[int], rates: list[float], data: Data, epochs: int, console: Console) -> Run:
    """Train one member for each pair of a seed and a learning rate."""
    run = Run(stack := memberwise.build(make_model, seeds=seeds))
    optimizer = memberwise.optim.AdamW(stack.parameters(), lr=rates)
    member_losses = memberwise.vmap(loss_fn, in_dims=(0, 0, 0))

    @memberwise.compile
    def train_step(x: torch.Tensor, y: torch.Tensor) -> None:
        optimizer.zero_grad()
        member_losses(stack, x, y).sum().backward()
        optimizer.step()

    x, y = data["train"]
    with bar(console, f"{len(seeds)} members as one stack", epochs * (len(y) // BATCH)) as advance:
        for epoch in zip(*(batches(seed, len(y), epochs) for seed in seeds), strict=True):
            stack.train()
            for own in zip(*epoch, strict=True):
                index = torch.stack(own)  # (M, batch): each member has an order of its own
                start = time.perf_counter()
                train_step(x[index], y[index])
                run.seconds.append(time.perf_counter() - start)
                advance()
            stack.eval()
            run.predicted.append(probabilities(stack, data["choose"][0]))
    return run


# -- the same, each member alone, in plain PyTorch


def train_alone(seed: int, rate: float, data: Data, epochs: int, dtype: torch.dtype, advance: Any) -> Run:
    """One member as its own script would train it."""
    torch.manual_seed(seed)
    run = Run(model := make_model().to(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    (x, y), (x_choose, _) = data["train"], data["choose"]
    x, x_choose = x.to(dtype), x_choose.to(dtype)
    for epoch in batches(seed, len(y), epochs):
        model.train()
        for index in epoch:
            start = time.perf_counter()
            optimizer.zero_grad()
            loss_fn(model, x[index], y[index]).backward()
            optimizer.step()
            run.seconds.append(time.perf_counter() - start)
            advance()
        model.eval()
        run.predicted.append(probabilities(model, x_choose))
    return run


def compare_alone(run: Run, seeds: list[int], rates: list[float], data: Data, epochs: int, console: Console) -> Any:
    """Train some members alone: the seconds that all would take, and how far the stack's members are from them.

    Rounding grows from step to step. How far it alone takes a run, the same runs in float64 show.
    """
    picked = sorted({round(i * (len(seeds) - 1) / (ALONE - 1)) for i in range(ALONE)})
    with bar(console, f"{len(picked)} members alone, twice", 2 * len(picked) * len(run.seconds)) as advance:
        single, double = (
            [train_alone(seeds[member], rates[member], data, epochs, dtype, advance) for member in picked]
            for dtype in (torch.float32, torch.float64)
        )
    alone, exact = (torch.stack([torch.stack(r.predicted) for r in runs], 1) for runs in (single, double))
    together = torch.stack(run.predicted)[:, picked]  # (epochs, members, N, classes), as the other two
    seconds = sum(sum(lone.seconds) for lone in single)
    return {
        "members": picked,
        "seconds": seconds,
        "seconds_scaled": seconds * len(seeds) / len(picked),
        "stack_from_alone": deviation(together, alone),
        "float64_from_alone": deviation(exact, alone),
    }


def deviation(these: torch.Tensor, those: torch.Tensor) -> dict[str, Any]:
    """How far two sets of probabilities (epochs, members, N, classes) are apart."""
    apart = (these - those).abs()
    return {
        "largest_after_first_epoch": apart[0].max().item(),
        "largest_at_last": apart[-1].max().item(),
        "answers_that_differ": int((these[-1].argmax(-1) != those[-1].argmax(-1)).sum()),
        "answers": apart[-1, ..., 0].numel(),
    }


# -- what comes out: functions of probabilities (..., N, classes) and labels (N,)


@torch.no_grad()
def probabilities(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A model's probabilities (N, classes); a stack's (M, N, classes)."""
    return model(x).softmax(-1)


def accuracy(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The share of right answers."""
    return (p.argmax(-1) == y).float().mean(-1)


def nll(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean negative log likelihood."""
    return -p[..., torch.arange(len(y)), y].clamp_min(1e-12).log().mean(-1)


def ece(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The expected calibration error: |confidence - accuracy|, averaged over bins of confidence.

    Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015.
    """
    confidence, answer = p.max(-1)
    gap = (answer == y).float() - confidence
    place = (confidence * BINS).long().clamp_max(BINS - 1)
    return torch.zeros(*gap.shape[:-1], BINS).scatter_add_(-1, place, gap).abs().sum(-1) / gap.shape[-1]


MEASURES = {"accuracy": accuracy, "NLL": nll, "ECE": ece}


def figures(p: torch.Tensor, y: torch.Tensor, best: int) -> dict[str, dict[str, float]]:
    """For each measure: the member chosen beforehand, the median member, the ensemble of all."""
    return {
        name: {
            "best": measure(p[best], y).item(),
            "median": measure(p, y).median().item(),
            "ensemble": measure(p.mean(0), y).item(),
        }
        for name, measure in MEASURES.items()
    }


def by_size(p: torch.Tensor, y: torch.Tensor, draws: int = 50) -> dict[int, float]:
    """Accuracy of an ensemble of k members, averaged over random choices of them."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(p), generator=generator) for _ in range(draws)]
    sizes = sorted({2**i for i in range(len(p).bit_length())} | {len(p)})
    return {k: sum(accuracy(p[o[:k]].mean(0), y).item() for o in orders) / draws for k in sizes if k <= len(p)}


# -- showing and writing it


class bar:
    """A progress bar; entering it gives the function that advances it by one step."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task(what, total=total)

    def __enter__(self) -> Any:
        self.progress.start()
        return lambda: self.progress.advance(self.task)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def show(report: dict[str, Any], console: Console) -> None:
    """Print the report."""
    table = Table("on held-out data", "best member", "median member", f"ensemble of {report['members']}")
    for name, row in report["held_out"].items():
        table.add_row(name, *(f"{row[who]:.4f}" for who in ("best", "median", "ensemble")))
    console.print(table)
    one, alone = report["as_one"], report["alone"]
    console.print(
        f"\nas one stack: {one['seconds']:.1f} s for {report['members']} members, {one['seconds_starting']:.1f} s of it"
        f" to record and compile the step\n"
        f"member by member: {alone['seconds_scaled']:.1f} s, scaled from {len(alone['members'])} members that"
        f" took {alone['seconds']:.1f} s in plain PyTorch, in this run\n"
        f"ratio: {report['ratio']:.1f}, and {report['ratio_of_steps']:.1f} once the step is compiled\n"
    )
    found = Table("largest deviation of a probability", "first epoch", "last epoch", "answers that differ")
    for name, key in (
        ("stack's members from their lone runs", "stack_from_alone"),
        ("lone runs in float64 from those in float32", "float64_from_alone"),
    ):
        row = alone[key]
        first, last = (f"{row[epoch]:.1e}" for epoch in ("largest_after_first_epoch", "largest_at_last"))
        found.add_row(name, first, last, f"{row['answers_that_differ']} of {row['answers']}")
    console.print(found)


def plot(curves: torch.Tensor, rates: list[float], sizes: dict[int, float], path: Path) -> None:
    """Learning curves (epochs, M) of all members; accuracy of the ensemble against its size."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colors = {rate: f"C{i}" for i, rate in enumerate(dict.fromkeys(rates))}
    for rate, curve in zip(rates, curves.T.tolist(), strict=True):
        left.plot(range(1, len(curve) + 1), curve, color=colors[rate], alpha=0.5, linewidth=1)
    for rate, color in colors.items():
        left.plot([], [], color=color, label=f"learning rate {rate:g}")
    left.set(xlabel="epoch", ylabel="accuracy", title=f"each of {len(rates)} members", ylim=(0.85, 1.0))
    left.legend()
    right.plot(list(sizes), list(sizes.values()), marker="o")
    right.set(xlabel="members in the ensemble", ylabel="accuracy", title="ensemble, on held-out data", xscale="log")
    right.set_xticks(list(sizes), [str(size) for size in sizes])
    right.minorticks_off()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(run: Run, curves: torch.Tensor, report: dict[str, Any], rates: list[float], folder: Path) -> None:
    """The stack, its best member as a plain state dict, the plot, the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(run.model.state_dict(), folder / "stack.safetensors")
    torch.save(run.model.unstack()[report["best_member"]].state_dict(), folder / "best_member.pt")
    plot(curves, rates, report["accuracy_by_ensemble_size"], folder / "digits.png")
    (folder / "digits.json").write_text(json.dumps(report, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, compare, print and write; the report is returned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=8, help="how many seeds, each with every learning rate")
    parser.add_argument("--threads", type=int, default=1, help="tensors as small as these gain nothing by more")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="the folder to write to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console()
    pairs = [(seed, rate) for rate in RATES for seed in range(options.seeds)]
    seeds, rates = [seed for seed, _ in pairs], [rate for _, rate in pairs]
    data = load()

    run = train_as_one(seeds, rates, data, options.epochs, console)
    alone = compare_alone(run, seeds, rates, data, options.epochs, console)

    (x, y), (_, y_choose) = data["test"], data["choose"]
    best = int(nll(run.predicted[-1], y_choose).argmin())
    p, seconds = probabilities(run.model, x), sum(run.seconds)
    report = {
        "members": len(pairs),
        "steps": len(run.seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "best_member": best,
        "best_member_is": {"seed": seeds[best], "learning_rate": rates[best]},
        "held_out": figures(p, y, best),
        "as_one": {"seconds": seconds, "seconds_starting": run.starting},
        "alone": alone,
        "ratio": alone["seconds_scaled"] / seconds,
        "ratio_of_steps": alone["seconds_scaled"] / (seconds - run.starting),
        "accuracy_by_ensemble_size": by_size(p, y),
    }
    show(report, console)
    curves = torch.stack([accuracy(predicted, y_choose) for predicted in run.predicted])
    write(run, curves, report, rates, options.out)
    console.print(f"written to {options.out}: stack.safetensors, best_member.pt, digits.png, digits.json")
    return report


if __name__ == "__main__":
    main()
