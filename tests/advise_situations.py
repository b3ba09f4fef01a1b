"""Situations that advice is asked for in tests, and what dry runs showed of them, kept in advise_outcomes.json.

python -m tests.advise_situations [NAME]     # the dry runs anew, which takes some minutes
"""

import dataclasses
import json
import sys
from pathlib import Path

from src.advise.outcomes import Outcome, side_by_side
from src.advise.request import request
from src.advise.search import Search
from src.advise.sizes import SizeSearch

FILE = Path(__file__).with_name("advise_outcomes.json")
_1B, _8B = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"


def _of(model_name, gpu, batch_size, seq_length, goal="speed", **more):
    sizes = {"batch_size": batch_size, "seq_length": seq_length}
    return {"model_name": model_name, "gpu": gpu, "goal": goal, **sizes, **more}


SITUATIONS = {
    "roomy": _of(_1B, "h100", 8, 1024),
    "few tokens": _of(_1B, "h100", 1, 1024),
    "logits fill it": _of(_1B, "h100", 32, 1024),
    "small card": _of(_1B, "h100", 8, 1024, "fit", gpu_memory_gib=24),
    "twice the batch": _of(_1B, "h100", 16, 1024, "fit", gpu_memory_gib=24),
    "largest batch": _of(_1B, "h100", 8, 1024, "largest", gpu_memory_gib=24),
    "half precision": _of(_1B, "h100", 4, 1024, dtype="fp16"),
    "large model": _of(_8B, "h100", 8, 1024),
    "too large a model": _of(_8B, "rtx4090", 1, 1024, "fit"),
    "small model": _of("Qwen/Qwen3-0.6B", "h100", 8, 1024),
    "tiny": _of("tiny-llama", "h100", 2, 64),
}


def kept(asked):
    """What evaluates the trials of a request by the file, as `side_by_side` would by dry runs."""
    known = json.loads(FILE.read_text())

    def evaluate(trials):
        return [Outcome(choice, config, **known[_key(asked, config)]) for choice, config in trials]

    return evaluate


def _key(asked, config):
    return f"{asked.card.name}, {asked.room_bytes} bytes: {config.run_name}"


def values(outcome):
    """Of an outcome what the file keeps: all but what the request says."""
    names = [f.name for f in dataclasses.fields(outcome) if f.name not in ("choice", "config")]
    return {name: getattr(outcome, name) for name in names}


def main():
    """Keep what dry runs show."""
    found = json.loads(FILE.read_text()) if sys.argv[1:] else {}
    for name in sys.argv[1:] or SITUATIONS:
        asked = request(**SITUATIONS[name])
        with side_by_side(asked) as evaluate:

            def keep(trials, asked=asked, evaluate=evaluate):
                outcomes = evaluate(trials)
                found.update((_key(asked, o.config), values(o)) for o in outcomes if isinstance(o, Outcome))
                return outcomes

            (SizeSearch if asked.searched else Search)(asked, keep, print).run()
        FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
