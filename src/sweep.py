"""Runs a grid of experiments with either script; survives whatever becomes of a single one, and goes on where it was.

    python -m src.sweep study --dry_run                                     # predict the original's grids, no GPU
    python -m src.sweep study --script deepspeed --preset fast              # measure them
    python -m src.sweep study --script deepspeed --memory_limit_gib 24      # as on a 24 GB card
    python -m src.sweep study --script deepspeed --num_gpus 4               # each cell on four GPUs
    python -m src.sweep batch_size=1,2,4 seq_length=512 strategy=none,all --dtype fp32

A grid is `batch` (the original's batch sizes at 1024 tokens), `sequence` (its lengths at batch 4), `study` (both) or
axes like batch_size=1,2,4; strategies are none, no_flce, all or kernels like rope+flce. Other flags go to the script
as they are. Each cell leaves its record in --result_dir; what has one is not run again, nor without a memory limit what
ran under one and never met it. A cell that crashes, hangs or is killed is recorded as that, and the sweep goes on.
Cells beyond one that ran out of memory with the same settings are not run but recorded as `inferred`; --every_cell runs
them.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from src import records, study
from src.cli import parse_config, run
from src.config import STRATEGIES, RunConfig, Strategy, config_of
from src.offload.ranks import die_with_parent, ending_of
from src.recording import check_folders
from src.utils import GIB, ExitStatus, UsageError, error_line

_BATCH = {"seq_length": [str(study.FIXED_LENGTH)], "batch_size": [str(size) for size in study.BATCH_SIZES]}
_SEQUENCE = {"batch_size": [str(study.FIXED_BATCH)], "seq_length": [str(length) for length in study.SEQ_LENGTHS]}
# The original's two grids: name -> axes of each part.
GRIDS: dict[str, list[dict[str, list[str]]]] = {
    "batch": [_BATCH],
    "sequence": [_SEQUENCE],
    "study": [_BATCH, _SEQUENCE],
}
STRATEGY_NAMES = dict(zip(("none", "no_flce", "all"), STRATEGIES.values(), strict=True))

_INTERRUPTIONS = (signal.SIGTERM, signal.SIGHUP)  # end a sweep as Ctrl-C does

SCRIPTS = {"all_gpu": "all_gpu_liger_kernel", "deepspeed": "deepspeed_liger_kernel"}


@dataclass(frozen=True)
class Cell:
    """One experiment of the grid."""

    config: RunConfig
    arguments: tuple[str, ...]  # of the script

    @property
    def label(self) -> str:
        """What tells it apart, for a person."""
        return f"{self.config.strategy.title}, {self.config.batch_size} x {self.config.seq_length}"


def grid_axes(words: Sequence[str]) -> list[dict[str, list[str]]]:
    """The axes of each part of the grid that `words` name. Raises `UsageError`."""
    if len(words) == 1 and words[0] in GRIDS:
        return GRIDS[words[0]]
    axes: dict[str, list[str]] = {}
    for word in words:
        name, separator, values = word.partition("=")
        if not separator or not all(values.split(",")):
            raise UsageError(f"{word!r} is no grid: take one of {', '.join(GRIDS)}, or axes like batch_size=1,2,4")
        if name in axes:
            raise UsageError(f"{name} is given twice")
        axes[name] = values.split(",")
    return [axes]


def strategy_of(word: str) -> Strategy:
    """The strategy that a word on the command line names. Raises `UsageError`."""
    return STRATEGY_NAMES[word] if word in STRATEGY_NAMES else Strategy.only(*word.split("+"))


def cells_of(axes: Sequence[dict[str, list[str]]], script: str, flags: Sequence[str], num_gpus: int = 1) -> list[Cell]:
    """Every cell of the grid once: strategy by strategy, the smallest first, so that the largest can be inferred.

    Those that differ in their sizes alone stand together.
    """
    found: dict[str, Cell] = {}
    for part in axes:
        names = [name for name in part if name != "strategy"]
        for word in part.get("strategy", list(STRATEGY_NAMES)):
            for values in itertools.product(*(part[name] for name in names)):
                sizes = [f"--{name}={value}" for name, value in zip(names, values)]
                cell = _cell(script, [*_kernel_flags(strategy_of(word)), *sizes, *flags], num_gpus)
                found.setdefault(cell.config.run_name, cell)
    order = {settings: i for i, settings in enumerate(dict.fromkeys(but_for_sizes(c.config) for c in found.values()))}
    return sorted(found.values(), key=lambda cell: (order[but_for_sizes(cell.config)], cell.config.tokens_per_step))


def but_for_sizes(config: RunConfig) -> RunConfig:
    """`config` with its sizes replaced: the same for runs that differ in nothing else."""
    return dataclasses.replace(config, batch_size=1, seq_length=2)


def _kernel_flags(strategy: Strategy) -> list[str]:
    fields = dataclasses.fields(Strategy)
    return [f"--{field.metadata['flag']}={int(getattr(strategy, field.name))}" for field in fields]


def _cell(script: str, arguments: list[str], num_gpus: int) -> Cell:
    module = importlib.import_module(SCRIPTS[script])
    cpu_defaults = getattr(module, "CPU_DEFAULTS", None) or module.kernel_check.DEFAULTS
    config = parse_config(None, module.DEFAULTS, cpu_defaults=cpu_defaults, words=arguments)
    if num_gpus > 1:
        config = dataclasses.replace(config, world_size=num_gpus)
    return Cell(config, tuple(arguments))


class Sweep:
    """Runs cells one after the other in processes forked from this one, which has imported everything.

    In other processes because Liger's patches cannot be undone and a GPU that ran out of memory starts clean; forked
    because importing takes longer than most cells. This process must never initialise CUDA.
    """

    def __init__(self, cells: Sequence[Cell], *, timeout_s: float, every_cell: bool) -> None:
        self._cells = cells
        self._timeout_s = timeout_s
        self._every_cell = every_cell
        self._environment: dict[str, Any] | None = None
        self._job: _Job | None = None

    def run(self) -> int:
        """Run what has no record yet; returns the exit status."""
        own = {cell.config.run_name: told for cell in self._cells if (told := finished_record(cell.config))}
        done = self._ran_under_a_limit() | own
        self._check_machine(done)
        waiting = [cell for cell in self._cells if cell.config.run_name not in done]
        for cell in waiting:
            check_folders(cell.config)
        if done:
            limited = len(done) - len(own)
            note = f", {limited} of them under a memory limit that they never met" if limited else ""
            print(f"{len(done)} of {len(self._cells)} cells have a record already{note}: not run again")
        failed = 0
        with tqdm(total=len(waiting), unit="cell", disable=None) as progress, contextlib.closing(self):
            for cell in waiting:
                progress.set_description(cell.label)
                reason = None if self._every_cell else self._too_large(cell.config, done)
                started = time.monotonic()
                record = self._infer(cell, reason) if reason else self._measure(cell)
                done[cell.config.run_name] = record
                failed += record["status"] == "error"
                progress.write(f"{time.monotonic() - started:6.1f} s  {cell.label}: {outcome(record)}")
                progress.update()
        if failed:
            error_line(f"{failed} cells failed; their records say why, and the next sweep tries them again")
        return ExitStatus.FAILED if failed else ExitStatus.DONE

    def _ran_under_a_limit(self) -> dict[str, dict[str, Any]]:
        """Name of a cell without a memory limit -> record of the same run under one that it never met."""
        names = {cell.config.run_name for cell in self._cells}
        found = {}
        for folder in {Path(cell.config.result_dir) for cell in self._cells}:
            for path in sorted(folder.glob("[!.]*.json")):
                with contextlib.suppress(UsageError):
                    record = study.without_its_limit(records.load_whole(path))
                    if record and study.is_measured(record) and (name := config_of(record).run_name) in names:
                        found[name] = record
        return found

    def close(self) -> None:
        """End the processes in which cells run."""
        if self._job is not None:
            self._job.end()
            self._job = None

    def _check_machine(self, done: dict[str, dict[str, Any]]) -> None:
        gpus = {record["environment"]["gpu"] for record in done.values() if record["mode"] == "measured"}
        if gpus - {self._facts()["gpu"]}:
            folder = self._cells[0].config.result_dir
            raise UsageError(f"{folder} has records of {', '.join(map(str, gpus))}: take another --result_dir")

    @staticmethod
    def _too_large(config: RunConfig, done: dict[str, dict[str, Any]]) -> str | None:
        """The run that shows that `config` does not fit: no larger, otherwise the same, and out of memory."""
        for name, record in done.items():
            if record["status"] != "oom" or record["mode"] == "inferred":
                continue
            sizes = {size: record["config"][size] for size in ("batch_size", "seq_length")}
            smaller = all(size <= getattr(config, field) for field, size in sizes.items())
            if smaller and dataclasses.replace(config, **sizes).run_name == name:
                return name
        return None

    def _infer(self, cell: Cell, reason: str) -> dict[str, Any]:
        return self._write(cell, "inferred", "oom", "Inferred", f"not run: {reason} ran out of memory")

    def _write(self, cell: Cell, mode: str, status: str, kind: str, message: str) -> dict[str, Any]:
        """Record for a cell what it could not record itself."""
        facts = dict.fromkeys(("requested_bytes", "free_bytes", "allocated_bytes")) if status == "oom" else {}
        record = records.EMPTY | {
            "run_name": cell.config.run_name,
            "script": cell.config.script,
            "mode": mode,
            "status": status,
            "config": cell.config.to_dict(),
            "environment": self._facts() | {"argv": [SCRIPTS[cell.config.script] + ".py", *cell.arguments]},
            "error": {"type": kind, "message": message, **facts},
        }
        records.save(record, cell.config.record_file)
        return record

    def _measure(self, cell: Cell) -> dict[str, Any]:
        """Run a cell and read its record; if it left none, write one that says what happened."""
        started = time.time()
        log = cell.config.record_file.with_suffix(".log")
        rank, ending = self._run(cell, log)
        mode = "predicted" if cell.config.dry_run else {"cuda": "measured", "cpu": "interpreted"}[cell.config.device]
        record = _record_since(started, cell.config)
        # A rank that is killed leaves others that fail for want of it.
        killed = ending is None or ending < 0
        if record is None or (killed and rank and record["status"] == "error"):
            kind, message = _what_happened(ending, log)
            return self._write(cell, mode, "error", kind, rank + message)
        if record["status"] != "error":
            log.unlink(missing_ok=True)
        return record

    def _run(self, cell: Cell, log: Path) -> tuple[str, int | None]:
        """Which of several ranks ended the cell, and its exit status: negative for a signal, None for too long."""
        log.unlink(missing_ok=True)
        if self._job is None or not self._job.takes(cell):
            self.close()
            self._job = _Job(cell)
        rank, ending = self._job.run(cell, log, self._timeout_s)
        if ending != ExitStatus.DONE or not self._job.is_kept:
            self.close()
        return rank, ending

    def _facts(self) -> dict[str, Any]:
        """The environment as a cell would record it, read in a child: it initialises CUDA."""
        if self._environment is None:
            self._environment = _facts_of(self._cells[0].config)
        return self._environment


def _ranks_of(config: RunConfig) -> list[dict[str, str]]:
    """What a launcher tells each process of a job by its environment; nothing to a single one."""
    count = getattr(config, "world_size", 1)
    if count == 1:
        return [{}]
    from src.ds_utils import free_port

    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("RANK", "LOCAL_RANK")
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **dict.fromkeys(names[0], str(count))}
    return [job | dict.fromkeys(names[1], str(rank)) for rank in range(count)]


@dataclass(frozen=True)
class _Worker:
    """A process in which cells run."""

    pid: int
    connection: Connection  # takes cells, gives their exit statuses
    name: str  # which rank it is, to begin a message with; nothing if it is the only one

    def give(self, cell: Cell, log: Path) -> None:
        """Let it run `cell`; it may have died."""
        with contextlib.suppress(OSError):
            self.connection.send((cell, log))

    def ending(self) -> int | None:
        """Exit status of its cell, or how the process died; None while neither has happened."""
        if self.connection.poll():
            with contextlib.suppress(EOFError, OSError):
                return self.connection.recv()
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None


class _Job:
    """The processes, one a GPU, in which a cell runs, and those after it where the script can share what it built."""

    def __init__(self, cell: Cell) -> None:
        self.is_kept = hasattr(_module(cell), "main_of_sweep")
        self._settings = but_for_sizes(cell.config)
        self._workers: list[_Worker] = []
        sys.stdout.flush()
        sys.stderr.flush()
        for environment in _ranks_of(cell.config):
            ours, theirs = Pipe()
            pid = _fork()
            if pid == 0:
                ours.close()
                _serve(cell, theirs, environment)
            theirs.close()
            self._workers.append(_Worker(pid, ours, f"rank {environment['RANK']}: " if environment else ""))

    def takes(self, cell: Cell) -> bool:
        """Whether `cell` can run in these processes."""
        return self.is_kept and but_for_sizes(cell.config) == self._settings

    def run(self, cell: Cell, log: Path, timeout_s: float) -> tuple[str, int | None]:
        """Name and exit status of the first rank that fails, or of the last; no name and None if it takes too long."""
        for worker in self._workers:
            worker.give(cell, log)
        waiting, deadline = list(self._workers), time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for worker in list(waiting):
                ending = worker.ending()
                if ending is not None:
                    waiting.remove(worker)
                    if ending or not waiting:
                        return worker.name, ending
            time.sleep(0.02)
        return "", None

    def end(self) -> None:
        """End the processes, and what they started."""
        for worker in self._workers:
            _end_group(worker.pid)
            worker.connection.close()


def _fork() -> int:
    """`os.fork`, at whose end an interruption is heard: raised in one of the hooks that run in it, it would be lost."""
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *_INTERRUPTIONS})
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of other threads. There are only those of OpenBLAS, which wait for work.
            warnings.simplefilter("ignore", DeprecationWarning)
            return os.fork()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _module(cell: Cell) -> Any:
    return importlib.import_module(SCRIPTS[cell.config.script])


def _serve(first: Cell, connection: Connection, environment: dict[str, str]) -> NoReturn:
    """In a worker: be the script, for one cell after the other."""
    try:
        os.setsid()  # so that whatever it starts can be ended with it
        die_with_parent()
        for number in _INTERRUPTIONS:
            signal.signal(number, signal.SIG_DFL)
        os.environ |= environment
        module = _module(first)
        main = module.main_of_sweep() if hasattr(module, "main_of_sweep") else module.main
        while True:
            connection.send(_run_cell(main, *connection.recv()))
    except (EOFError, BrokenPipeError):
        pass  # the sweep has ended
    except BaseException as error:
        error_line(f"{type(error).__name__}: {error}")
    finally:
        os._exit(ExitStatus.FAILED)  # what the parent registered for its own end is not the child's


def _run_cell(main: Callable[[RunConfig], int], cell: Cell, log: Path) -> int:
    """Exit status of `main` for a cell, with what it prints going to `log`."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [f"{SCRIPTS[cell.config.script]}.py", *cell.arguments]
    status = int(run(main, cell.config))
    sys.stdout.flush()
    return status


def _end_group(child: int) -> None:
    """End what is left of a child and of what it started."""
    for kill in (os.killpg, os.kill):  # it may not have come to lead a group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def _record_since(moment: float, config: RunConfig) -> dict[str, Any] | None:
    """The record of `config` if it was written since `moment` and says what became of the run."""
    try:
        record = records.load(config.record_file) if config.record_file.stat().st_mtime >= moment - 1e-2 else None
    except (OSError, UsageError):
        return None
    return record if record and _is_of(record, config) else None


def _is_of(record: dict[str, Any], config: RunConfig) -> bool:
    """Whether a record is whole and of this run: nothing but a result may stand in for one."""
    whole = all(isinstance(record[key], dict) for key in ("config", "environment"))
    return whole and record["run_name"] == config.run_name and record["status"] in ("ok", "oom", "error")


def _what_happened(ending: int | None, log: Path) -> tuple[str, str]:
    """Type and message of the error of a cell that left no record."""
    if ending is None:
        return "TimedOut", "it took too long and was ended"
    if ending < 0:
        return "Killed", ending_of(ending)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return "Failed", f"exit status {ending}: {told.removeprefix('error: ') or 'it printed nothing'}"


def _facts_of(config: RunConfig) -> dict[str, Any]:
    """`runtime.environment` of the device of `config`, from a child process."""
    reading, writing = os.pipe()
    child = _fork()
    if child == 0:
        try:
            import torch

            from src.runtime import environment

            with os.fdopen(writing, "w") as file:
                json.dump(environment(torch.device("cpu" if config.dry_run else config.device)), file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise UsageError("the GPU cannot be used: run the script by itself to see why")
    return json.loads(text)


def finished_record(config: RunConfig) -> dict[str, Any] | None:
    """The record of an experiment that ended with a result of its own; failures are tried again."""
    try:
        record = records.load(config.record_file)
    except UsageError:
        return None
    return record if _is_of(record, config) and record["status"] != "error" and record["mode"] != "inferred" else None


def outcome(record: dict[str, Any]) -> str:
    """A record in a few words."""
    if record["status"] == "oom":
        return "out of memory" + (" (inferred)" if record["mode"] == "inferred" else "")
    if record["status"] == "error":
        return f"failed: {record['error']['message']}"
    peak, speed = record["peak_memory_bytes"], record["throughput_tokens_per_s"]
    words = [] if peak is None else [f"peak {peak / GIB:,.2f} GiB"]
    words += [] if speed is None else [f"{speed:,.0f} tokens/s"]
    return ", ".join(words) or record["mode"]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let a request to terminate end the sweep as Ctrl-C does; one that is ignored, as under nohup, stays so."""
    heard = [number for number in _INTERRUPTIONS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_gpus(count: int) -> None:
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        raise UsageError("no GPU here: --dry_run predicts the grid, --device cpu runs tiny models")
    if found < count:
        raise UsageError(f"--num_gpus {count}, but {found} here")


def main() -> int:
    """Run the grid on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m src.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("grid", nargs="+", help=f"{', '.join(GRIDS)}, or axes like batch_size=1,2,4")
    parser.add_argument("--script", choices=SCRIPTS, default="all_gpu", help="which experiment (default: %(default)s)")
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs of a cell under --script deepspeed")
    parser.add_argument("--every_cell", action="store_true", help="run cells that cannot fit, too")
    parser.add_argument("--timeout_s", type=float, default=900, help="the longest a cell may take")
    arguments, flags = parser.parse_known_args()
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # look for a GPU without initialising CUDA
    tqdm.monitor_interval = 0  # no thread beside a process that forks
    try:
        with _interruptible():
            axes = grid_axes(arguments.grid)
            if arguments.num_gpus < 1 or (arguments.num_gpus > 1 and arguments.script != "deepspeed"):
                raise UsageError("--num_gpus must be 1 or more, and 1 without --script deepspeed")
            if not {"--dry_run", "--device"} & {flag.partition("=")[0] for flag in flags}:
                _require_gpus(arguments.num_gpus)
            # Snapshots and logs of a whole grid are asked for, not usual.
            flags = ["--snapshot_dir=", "--log_dir=", *flags]
            cells = cells_of(axes, arguments.script, flags, arguments.num_gpus)
            return Sweep(cells, timeout_s=arguments.timeout_s, every_cell=arguments.every_cell).run()
    except UsageError as error:
        error_line(error)
        return ExitStatus.BAD_ARGUMENTS
    except OSError as error:
        error_line(f"{error}; the same command goes on where this one was")
        return ExitStatus.FAILED
    except KeyboardInterrupt:
        error_line("interrupted; the same command goes on where this one was")
        return ExitStatus.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
