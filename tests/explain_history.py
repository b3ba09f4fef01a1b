"""Small allocator histories in PyTorch's format, made up event by event, and random ones of which all is known."""

import numpy as np

from src.explain.categories import CATEGORIES, GATHER, LOSS_MODULE, REDUCE

MIB = 2**20
PHASES = ("forward", "backward", "optimizer")
OWNED = ("parameters", "gradients", "optimizer_state", "checkpoints", "inputs", "library_workspace")
# Labels as a labelled step has them, and what they mean in the forward phase.
BY_LABEL = {
    "model.layers.3.self_attn.q_proj|": "attention",
    "model.layers.11.self_attn|ScaledDotProductBackward0": "attention",
    "model.layers.0.mlp.down_proj|MmBackward0": "mlp",
    "model.layers.1.input_layernorm|": "norm",
    "model.layers.2|AddBackward0": "hidden_states",
    "model.embed_tokens|": "hidden_states",
    "model.rotary_emb|": "inputs",
    "model|": "inputs",
    "lm_head|": "logits_and_loss",
    f"{LOSS_MODULE}|NllLossBackward0": "logits_and_loss",
    GATHER: "gathered_parameters",
    REDUCE: "gradient_reduction",
    "": "unattributed",
    "unheard.of|": "unattributed",
}


def category_of(label, phase):
    """What a block that nothing owns is for."""
    if phase == "optimizer":
        return "optimizer_temporaries"
    if phase == "backward" and label.startswith("model.embed_tokens"):
        return "gradients"
    return BY_LABEL[label]


def rounded(size):
    return (size + 511) // 512 * 512


def frame(text):
    """A frame from "function file:line"."""
    name, _, place = text.rpartition(" ")
    file, _, line = place.rpartition(":")
    return {"name": name, "filename": file, "line": int(line)}


class History:
    """Writes down what an allocator does as PyTorch would; a microsecond passes from one thing to the next."""

    def __init__(self, device=0):
        self.device, self.time = device, 10**15
        self.trace, self.notes, self.sizes, self.frames = [], [], {}, {}
        self.reserved = None  # (address, size) of segments; None: one around each block

    def _event(self, action, address, size, frames=(), **more):
        self.time += 1
        event = {"action": action, "addr": address, "size": size, "stream": 0, "time_us": self.time}
        self.trace.append(event | {"frames": list(map(frame, frames))} | more)

    def there(self, address, size, *frames):
        """A block from before the first event."""
        self.sizes[address], self.frames[address] = size, list(map(frame, frames))

    def alloc(self, address, size, label="", frames=()):
        self.sizes[address], self.frames[address] = size, list(map(frame, frames))
        self._event("alloc", address, size, frames, user_metadata=label)

    def free(self, address, frames=()):
        self._event("free_requested", address, self.sizes.pop(address), frames)

    def other(self, action, address=0, size=2 * MIB, **more):
        self._event(action, address, size, **more)

    def note(self, name, stage="START"):
        self.time += 1
        self.notes.append({"name": name, "stage": stage, "device": self.device, "time_us": self.time})

    def segments(self):
        reserved = self.reserved
        if reserved is None:
            reserved = [(address, rounded(size)) for address, size in self.sizes.items()]
        found = []
        for start, total in reserved:
            blocks = [
                {"address": a, "size": rounded(s), "requested_size": s, "state": "active_allocated"}
                | {"frames": self.frames.get(a, [])}
                for a, s in self.sizes.items()
                if start <= a < start + total
            ]
            found.append({"device": self.device, "address": start, "total_size": total, "blocks": blocks})
        return found

    def snapshot(self):
        traces = [[] for _ in range(self.device)] + [self.trace]
        return {"segments": self.segments(), "device_traces": traces, "external_annotations": self.notes}


class Random:
    """A random labelled history, and what is known of it: size, first and last event, and category of each block."""

    def __init__(self, rng, events):
        self.rng, self.step, self.known, self.phases = rng, History(device=rng.randrange(3)), [], {}
        self.count, self.live, self.released, self.next_address = 0, {}, [], 10**9
        self.step.alloc(1, 0, "model|")  # so that it has labels
        self.step.free(1)
        self.count = 2
        for _ in range(rng.randrange(6)):
            self._add(self.step.there, first=-1)
        self.phase = ""
        for phase in (*PHASES, *rng.choices(PHASES, k=2)):
            if rng.random() < 0.9:
                self.phase = phase
                self.step.note(f"phase {phase}")
                self.phases[self.count] = phase
            for _ in range(rng.randrange(events)):
                self._happen()

    def _happen(self):
        if self.rng.random() < 0.3:
            self.step.other(self.rng.choice(["free_completed", "segment_alloc", "segment_free", "oom", "snapshot"]))
        if self.live and self.rng.random() < 0.45:
            address = self.rng.choice(list(self.live))
            self.step.free(address)
            self.live.pop(address)["last"] = self.count
            self.released.append(address)
            self.count += 1
        else:
            label = self.rng.choice(list(BY_LABEL))
            self._add(lambda address, size: self.step.alloc(address, size, label), first=self.count, label=label)
            self.count += 1
        if self.live and self.rng.random() < 0.3:
            address, owner = self.rng.choice(list(self.live)), self.rng.choice(OWNED)
            self.step.note(f"owner {owner} {address}")
            self.live[address]["category"] = owner

    def _add(self, take, first, label=None):
        size = self.rng.choice([0, 1, 512, self.rng.randrange(5000), self.rng.randrange(10**7)])
        if self.released and self.rng.random() < 0.6:
            address = self.released.pop(self.rng.randrange(len(self.released)))
        else:
            self.next_address += 10**8
            address = self.next_address
        take(address, size)
        category = "unattributed" if first < 0 else category_of(label, self.phase)
        self.live[address] = {"size": rounded(size), "first": first, "last": np.inf, "category": category}
        self.known.append(self.live[address])

    def bytes_at(self, event):
        """What each category has after an event."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for block in self.known:
            if block["first"] <= event < block["last"]:
                totals[block["category"]] += block["size"]
        return totals

    def curve(self):
        return [sum(self.bytes_at(event).values()) for event in range(-1, self.count)]
