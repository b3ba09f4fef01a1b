"""What to turn on when you train a model on a GPU, and what it costs and saves: predicted, on any machine.

    python -m src.advise --model_name meta-llama/Llama-3.2-1B --gpu rtx4090 --batch_size 8 --seq_length 1024
    python -m src.advise --model_name meta-llama/Llama-3.1-8B --gpu h100 --batch_size 4 --seq_length 2048 --goal fit
    python -m src.advise --model_name Qwen/Qwen3-4B --gpu a100 --batch_size 1 --seq_length 4096 --goal longest
    python -m src.advise ... --measure     # on the GPU: runs the first three, and says how far off predictions were
    python -m src.advise --page            # the same as a page in the browser, for this machine alone

Tries out, in dry runs, what can help where memory and time are bound; takes half a minute to one, and the longest
sequences or largest batch one to two. Parity is how far gradients were from fp32's on record, relative to Hugging
Face's code in the same dtype.
"""

import argparse
import sys

from src import program
from src.advise.request import GOALS, check_gpu, request
from src.config import DTYPES
from src.techniques.libraries import missing
from src.utils import UsageError


def _parsed() -> argparse.Namespace:
    page = "--page" in sys.argv[1:]  # it asks for the rest itself
    parser = program.Parser(
        prog="python -m src.advise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model_name", required=not page, help="Hub id with a shipped shape, or a local folder")
    parser.add_argument("--gpu", required=not page, help="such as h100, a100-40gb, rtx4090")
    parser.add_argument("--gpu_memory_gib", type=float, help="its memory, where it is another than the usual")
    rates = "its speed, as python -m src.predict.calibrate wrote it (default: fitted, or by its data sheet)"
    parser.add_argument("--gpu_rates", metavar="FILE", help=rates)
    parser.add_argument("--batch_size", type=int, required=not page, help="sequences a step")
    parser.add_argument("--seq_length", type=int, required=not page, help="tokens a sequence")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and states (default: %(default)s)")
    goals = "; ".join(f"{name}: {words}" for name, words in GOALS.items())
    parser.add_argument("--goal", choices=GOALS, default="speed", help=f"{goals} (default: %(default)s)")
    parser.add_argument("--measure", action="store_true", help="run the first three choices here, on a GPU")
    parser.add_argument("--page", action="store_true", help="ask on a page in the browser; goes with no other flag")
    return parser.parse_args()


def _run() -> int:
    arguments = vars(_parsed())
    if arguments.pop("page"):
        return _page()
    measure = arguments.pop("measure")
    asked = request(**arguments)
    if measure:
        check_gpu("without --measure all is predicted")
    # Imported here, so that --help and mistakes need not wait for PyTorch.
    from src.advise.answer import answer
    from src.advise.ranking import shipped_parities
    from src.advise.report import report

    known = shipped_parities()
    found = answer(asked, known, tell=lambda line: print(line, file=sys.stderr, flush=True))
    print(report(found, known))
    if measure and found.ranked:
        from src.advise.measured import measure_first, measured_report

        print(f"\n{measured_report(measure_first(found), asked.card.name)}")
    return 0 if found.ranked else 3


def _page() -> int:
    if len(sys.argv) > 2:
        raise UsageError("--page goes with no other flag: the page asks for the rest")
    if reason := missing("gradio"):
        raise UsageError(f"--page: {reason}")
    from src.advise.page import serve

    serve()
    return 0


if __name__ == "__main__":
    program.begin()
    sys.exit(program.guarded(_run))
