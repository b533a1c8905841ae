"""Why what runs member by member does so: a sentence for each reason that lies in the program itself, and one for each
operation and module that has a reason of its own. What has none is a fault."""

from __future__ import annotations

from survey.records import Record

BECAUSE: dict[str, tuple[str, ...]] = {
    "How many rows belong to each cluster depends on a member's targets: members' tensors differ in shape.": (
        "nn.AdaptiveLogSoftmaxWithLoss",
    ),
    "Code of old Lua days: its backward writes into tensors that its forward has made.": ("nn.CrossMapLRN2d",),
    "With `scale_grad_by_freq` torch's kernel divides by the frequency of another index, which depends on what else is "
    "in the table; indices beyond a last offset are in the last bag by one of its kernels, in none by another. Only a "
    "member's own call gives what it gives.": (
        "nn.EmbeddingBag",
        "aten::_embedding_bag",
        "aten::_embedding_bag_backward",
    ),
    "In evaluation it leaves padding out by nested tensors; no tensor of a stack can be nested.": (
        "TransformerEncoder",
    ),
    "Its chunked form computes gradients in forward, to hold the logits of one chunk only; one pass for all members "
    "would hold M times that.": ("linear_cross_entropy",),
    "torch counts in one set of bins; to which of two bins a value at the border belongs is its kernel's rounding.": (
        *("aten::histc", "aten::histogram", "aten::_histogramdd_bin_edges", "aten::_histogramdd_from_bin_cts"),
        "aten::_histogramdd_from_bin_tensors",
    ),
    "It takes one matrix. `cdist` would take all members' at once, and computes each distance twice.": (
        "aten::_pdist_forward",
        "aten::_pdist_backward",
    ),
    "One scan of a member's values costs less than to number all places of all members' and put each in its row.": (
        "aten::nonzero_static",
    ),
    "A tensor of another size gets memory of its own, of which only what was there before is defined: each is resized "
    "alone.": ("aten::resize", "aten::resize_as"),
    "Where leading dimensions differ, torch's kernel reads pivots beyond the tensor, of members as well.": (
        "aten::linalg_ldl_solve",
    ),
    "Of an empty matrix that all members share, torch's batching gives a result without members.": (
        "aten::linalg_pinv",
    ),
    "With an empty source a mask with a true value is an error, of which only values tell.": ("aten::masked_scatter",),
    "Of images that lie channels last torch gives such a result, and has no batching for it; a rule's is in order.": (
        "aten::max_unpool2d",
        "aten::_upsample_nearest_exact3d",
    ),
    "Of matrices in column order that may be images (QR gives such), only a member's own call tells in which order the "
    "result lies.": ("aten::cat",),
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
    "has another number of rows for one member than for another": (
        "Its gradient has a row for each place of a member's mask, or different index; in backward it is too late to "
        "part ways."
    ),
    "but its data is not allocated": (
        "Code in C++ reads an index tensor's values in memory, and goes on as they say; a member tensor has no memory."
    ),
    "which no member tensor can show": "No member tensor can be sparse: each member makes and takes its own.",
}
"""What `explain` says of any operation -> why nothing faster is right."""


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
