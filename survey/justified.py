"""Why what runs member by member does so: one sentence for each operation and module. What has none is a fault."""

from __future__ import annotations

from survey.records import Record

BECAUSE: dict[str, tuple[str, ...]] = {
    "How many rows belong to each cluster depends on a member's targets: members' tensors differ in shape.": (
        "nn.AdaptiveLogSoftmaxWithLoss",
    ),
    "Code of old Lua days: its backward writes into tensors that its forward has made.": ("nn.CrossMapLRN2d",),
    "With `scale_grad_by_freq` torch's kernel divides by the frequency of another index, which depends on what else is "
    "in the table; indices beyond a last offset are in the last bag by one of its kernels, in none by another. Only a "
    "member's own call gives what it gives.": ("nn.EmbeddingBag",),
    "In evaluation it leaves padding out by nested tensors; no tensor of a stack can be nested.": (
        "TransformerEncoder",
    ),
    "Its chunked form computes gradients in forward, to hold the logits of one chunk only; one pass for all members "
    "would hold M times that.": ("linear_cross_entropy",),
}
"""Sentence -> ATen operations that run alone by it, and modules whose calls do."""

WHY = {name: sentence for sentence, names in BECAUSE.items() for name in names}


def why(record: Record, op: str) -> str:
    """The sentence for one operation that a record says ran member by member; "" where there is none."""
    return WHY.get(op) or WHY.get(record.name, "")


def unjustified(records: list[Record]) -> list[str]:
    """`name: operation (reason)` of what runs member by member, and nobody has said why it must."""
    return [
        f"{record.name} ({record.variant}): {op} ({reason})"
        for record in records
        for op, reason in record.slow.items()
        if not why(record, op)
    ]
