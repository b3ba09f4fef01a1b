"""What GPU memory is for: the categories in the order they are shown, their colours, and our notes in a snapshot."""

CATEGORIES = (
    "parameters",
    "gathered_parameters",  # under ZeRO-3 and FSDP: weights fetched for their use
    "gradients",
    "gradient_reduction",  # gradients on their way to other GPUs or the host, their copies and norms
    "optimizer_state",
    "optimizer_temporaries",
    "checkpoints",  # the layer inputs that gradient checkpointing keeps
    "logits_and_loss",
    "attention",  # here and below: activations kept for the backward pass, their gradients, and temporaries
    "mlp",
    "norm",
    "hidden_states",  # between the parts of a layer, and between layers
    "inputs",  # tokens, positions, rotary tables
    "library_workspace",
    "allocator_rounding",  # what the allocator counts beyond what was asked for
    "unattributed",
)

# Only snapshots of other programs have these: they say less than ours, which label every block.
ACTIVATIONS = "activations"  # of the forward or backward pass, in a module that the stack does not name
BEFORE = "before_the_trace"  # there before the first recorded event, and nothing tells what it is

# Notes in a snapshot, as names of PyTorch's annotations: "phase NAME", "owner CATEGORY ADDRESS", "peak BYTES".
PHASE, OWNER, PEAK = "phase", "owner", "peak"

# The model itself: what runs in it outside its decoder is the LM head and the loss.
LOSS_MODULE = "loss"
GATHER, REDUCE = "zero3.gather", "zero3.reduce"

# Told apart by lightness as well as by hue, for print in grey and for the colour-blind.
COLOURS = {
    "parameters": "#08306b",
    "gathered_parameters": "#4a78b5",
    "gradients": "#6baed6",
    "gradient_reduction": "#a6cee8",
    "optimizer_state": "#c6dbef",
    "optimizer_temporaries": "#dfe9f3",
    "checkpoints": "#1b5e20",
    "logits_and_loss": "#d95f02",
    "attention": "#7b3294",
    "mlp": "#fdb863",
    "norm": "#c2a5cf",
    "hidden_states": "#5aae61",
    "inputs": "#a6dba0",
    "library_workspace": "#969696",
    "allocator_rounding": "#d9d9d9",
    "unattributed": "#252525",
    ACTIVATIONS: "#8c6d31",
    BEFORE: "#525252",
}
_OF_USERS = ("#e7298a", "#e6ab02", "#17becf", "#b30000", "#9edae5", "#f7b6d2")


def order(names: tuple[str, ...] | list[str]) -> list[str]:
    """`names` in the order they are shown: a user's own first, what is not known last."""
    known = [*CATEGORIES[:-2], ACTIVATIONS, BEFORE, *CATEGORIES[-2:]]
    return [name for name in names if name not in known] + [name for name in known if name in names]


def colours(names: list[str]) -> dict[str, str]:
    """The colour of each category."""
    own = [name for name in names if name not in COLOURS]
    return COLOURS | {name: _OF_USERS[i % len(_OF_USERS)] for i, name in enumerate(own)}


def words(name: str) -> str:
    """A category as a reader sees it."""
    return name.replace("_", " ")
