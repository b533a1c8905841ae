"""Why what runs member by member does so: a sentence for each reason that lies in the program itself, and one for each
operation and module that has a reason of its own. What has none is a fault."""

from __future__ import annotations

from survey.records import WRONG, Record

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

IN_THE_PROGRAM = {
    "the shape of its result depends on values": (
        "How many elements it gives depends on a member's values: members' results differ in shape, or happen to agree."
    ),
    "gives the members results of different shapes": (
        "The members' results differ in shape: no stacked tensor holds them, and each member goes on with its own."
    ),
    "reads a value on the host, and the members differ in it": (
        "The program goes on with that value as it likes: members with different ones go different ways."
    ),
    "writes a member's value into a tensor that all members share": (
        "Alone, too, a member finds there what the one before it has written: one has to follow the other."
    ),
    "which no member tensor can show": "No member tensor can be sparse: each member makes and takes its own.",
}
"""What `explain` says of any operation -> why nothing faster is right."""

EXPLAINED = {
    "linspace.tensor_overload": "Found by this run, and mended after it: it is computed in the type of the result now.",
    "nn.functional.conv_transpose3d": "Rounding: one of sums up to 839 is off by three units in the last place of the "
    "largest, for all members' channels are one convolution, which adds in another order.",
}
"""What a recorded run calls wrong -> what it came to."""


def why(record: Record, op: str) -> str:
    """The sentence for one operation that a record says ran member by member; "" where there is none."""
    own = WHY.get(op) or WHY.get(record.name)
    return own or next((why for told, why in IN_THE_PROGRAM.items() if told in record.slow[op]), "")


def unjustified(records: list[Record]) -> list[str]:
    """`name: operation (reason)` of what runs member by member, and nobody has said why it must."""
    return [
        f"{record.name} ({record.variant}): {op} ({reason})"
        for record in records
        for op, reason in record.slow.items()
        if not why(record, op)
    ]


def unexplained(records: list[Record]) -> list[str]:
    """`name (variant): what` of what is wrong, and nobody has said what it came to."""
    return [f"{r.name} ({r.variant}): {r.what}" for r in records if r.verdict == WRONG and r.name not in EXPLAINED]
