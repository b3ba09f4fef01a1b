"""Programs at their edges: Ctrl-C, closed pipes, full disks, and terminals that know only ASCII."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from src.record import save
from tests.helpers import ROOT, assert_one_error_line, run_python
from tests.made_up import ALL, NONE, made_up, predicted

STUDY = ROOT / "doc" / "data" / "h100_offload"
PAIR = sorted(STUDY.glob("*.json"))[:2]
PROGRAMS = {
    "table": [ROOT / "drawing.py", "--table", "markdown", STUDY],
    "compare": ["-m", "src.study", "compare", *PAIR],
    "document": ["-m", "doc.build", "--table", "offload", STUDY],
}


def start(program, **kwargs):
    command = [sys.executable, *map(str, PROGRAMS[program])]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **kwargs)


@pytest.mark.parametrize("program", PROGRAMS)
def test_closed_pipe_is_one_line(program):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, start(program, stdout=pipe) as process:
        stderr = process.communicate()[1]
    assert process.returncode == 1
    assert_one_error_line(stderr, "cannot write: [Errno 32] Broken pipe")


@pytest.mark.parametrize("program", PROGRAMS)
def test_full_disk_at_standard_output_is_one_line(program, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        sys.dont_write_bytecode = True

    with (tmp_path / "out").open("w") as file:
        with start(
            program, stdout=file, preexec_fn=limit, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
        ) as process:
            stderr = process.communicate()[1]
    assert process.returncode == 1
    assert_one_error_line(stderr, "cannot write: [Errno 27] File too large")


@pytest.mark.parametrize("program", ["table", "document"])
def test_ctrl_c_is_one_line_also_while_it_imports(program):
    code = (
        "import os, runpy, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'src.record.record': os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "first = sys.argv.pop(1); sys.argv = sys.argv[1:] if first == '-m' else [first, *sys.argv[1:]]\n"
        "run = runpy.run_module if first == '-m' else runpy.run_path\n"
        "run(sys.argv[0], run_name='__main__')\n"
    )
    done = run_python("-c", code, *PROGRAMS[program])
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_folders_may_have_any_name_where_the_terminal_knows_only_ascii(tmp_path):
    folder = tmp_path / "Ergebnisse für 日本"
    for one in (made_up(NONE, 4), made_up(ALL, 4), predicted(ALL, 4, model_name=str(tmp_path / "模型"))):
        save(one, folder / f"{one.run_name}.json", lambda record: record.run.model_name)
    (folder / "x.json").write_text("{")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    environment = {**os.environ, **ascii_only}
    done = run_python(ROOT / "drawing.py", folder, "--out", tmp_path / "Bilder für", env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert_one_error_line(done.stderr, "x.json is not a record")
    assert len(done.stdout.splitlines()) == len(list((tmp_path / "Bilder für").iterdir())) == 2
    done = run_python(ROOT / "drawing.py", folder, "--table=csv", env=environment, cwd=tmp_path)
    assert (done.returncode, len(done.stdout.splitlines())) == (1, 4)
    files = [folder / f"{made_up(name, 4).run_name}.json" for name in (NONE, ALL)]
    done = run_python("-m", "src.study", "compare", *files, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
