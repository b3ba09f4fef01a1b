"""The command `python -m src.explain`: what it reads, what it refuses, and what it writes."""

import gzip
import json
import os
import pickle
import pickletools
import re
import resource
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from src.explain import __main__ as program
from src.explain import outputs, reading
from src.explain.page import page
from src.explain.reading import load, read, read_all, save
from src.explain.timeline import timeline
from src.utils import UsageError
from tests.explain_history import MIB, History
from tests.helpers import ROOT, assert_one_error_line, run_python


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the program in this process: (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["explain", *map(str, arguments)])
        return int(program.main()), *capsys.readouterr()

    return run


def one_step(size=2 * MIB):
    """A peak of 5 MiB and `size`, asked for by name."""
    step = History()
    step.there(512, 3 * MIB, "load /code/data.py:5")
    step.alloc(8 * MIB, 2 * MIB, frames=["forward /code/$x$_net.py:7"])
    step.alloc(16 * MIB, size, frames=["cross_entropy /code/loss.py:9"])
    step.free(16 * MIB)
    return step


@pytest.fixture
def files(tmp_path):
    """The same program before and after a change, the second packed."""
    paths = tmp_path / "a.$1$.pickle", tmp_path / "b.pickle.gz"
    save(one_step().snapshot(), paths[0])
    paths[1].write_bytes(gzip.compress(pickle.dumps(one_step(6 * MIB).snapshot())))
    return paths


def test_one_file_is_reported(cli, files):
    status, stdout, stderr = cli(files[0], "--top", 1)
    assert (status, stderr) == (0, "")
    assert stdout.startswith(f"{files[0]}\nPeak 7.0 MiB in the forward phase, after event 2 of 3, 3 blocks alive\n")
    assert stdout.split("by\n")[1].splitlines()[0].endswith("before the trace  load (data.py:5)")


def test_two_files_are_compared_by_category_and_by_frame(cli, files):
    status, stdout, stderr = cli(*files)
    assert (status, stderr) == (0, "")
    by_category, by_frame = stdout.split("at the peak")[1].split("asked for by")
    assert re.search(r"\nlogits and loss +2.0 MiB +6.0 MiB +\+4.0 MiB\n", by_category)
    assert re.search(r"\ncross_entropy \(loss.py:9\) +2.0 MiB +6.0 MiB +\+4.0 MiB\n", by_frame)
    assert all(re.search(r"\npeak +7.0 MiB +11.0 MiB +\+4.0 MiB\n", table) for table in (by_category, by_frame))


def test_gpus_are_named_the_fullest_first(cli, tmp_path):
    other = one_step(6 * MIB)
    other.device = 3
    snapshot = other.snapshot()
    snapshot["device_traces"][0] = one_step().trace
    snapshot["segments"] += one_step().segments()
    save(snapshot, tmp_path / "two.pickle")
    _, stdout, _ = cli(tmp_path / "two.pickle")
    assert re.search(r"2 GPUs .*\nGPU 3 +11.0 MiB .*\nGPU 0 +7.0 MiB .*\n\nGPU 3:\nPeak 11.0 MiB", stdout)


def test_category_of_the_users_own_is_shown(cli, files):
    _, stdout, _ = cli(files[0], "--category", r"my net=_net\.py:7$", "--category", "my net=^load ")
    assert re.search(r"\nmy net +5.0 MiB", stdout)


@pytest.mark.parametrize(
    "arguments", [(), ("x", "y", "z"), ("x", "--top", "-1"), ("x", "--category", "a"), ("x", "--category", "a=(")]
)
def test_mistake_is_one_line(cli, arguments):
    status, stdout, stderr = cli(*arguments)
    assert (status, stdout) == (2, "")
    assert_one_error_line(stderr, "")


def test_help_and_mistakes_wait_for_no_library():
    code = "import sys\nfrom src.explain import __main__ as program\ntry: program.main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    for arguments in (["--help"], ["x", "--top", "y"]):
        done = run_python("-c", code, *arguments)
        assert done.stdout.endswith("[]\n"), done


def test_reading_drawing_and_page_need_no_torch():
    code = "import src.explain.reading, src.explain.page, src.explain.plot, sys; print('torch' in sys.modules)"
    assert run_python("-c", code).stdout == "False\n"


def test_interruption_is_one_line(cli, monkeypatch):
    monkeypatch.setattr(program, "_run", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli() == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("where", ["closed pipe", "full disk"])
def test_standard_output_that_cannot_be_written_is_one_line(files, tmp_path, where):
    read_end, write_end = os.pipe()
    os.close(read_end)
    target = write_end if where == "closed pipe" else os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    command = [sys.executable, "-m", "src.explain", files[0]]
    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))} if target != write_end else {}
    done = subprocess.run(command, cwd=ROOT, stdout=target, stderr=subprocess.PIPE, text=True, check=False, **limits)
    assert done.returncode == 1
    assert_one_error_line(done.stderr, "cannot write: ")


# What is read.


def test_file_we_write_is_of_protocol_4(files):
    opcode, protocol, _ = next(pickletools.genops(files[0].read_bytes()))
    assert (opcode.name, protocol) == ("PROTO", 4)


def test_bare_list_of_segments_is_read(tmp_path):
    save(one_step().segments(), tmp_path / "segments.pickle")
    found = read(tmp_path / "segments.pickle")
    assert (found.known_peak_bytes, found.device.recorded) == (5 * MIB, False)


@pytest.mark.parametrize("name", ["missing", "folder", "a.$1$.pickle/below", "fifo", "link to fifo"])
def test_what_is_no_regular_file_is_one_line(cli, files, tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link to fifo").symlink_to(tmp_path / "fifo")
    status, stdout, stderr = cli(files[1], tmp_path / name)
    assert (status, stdout) == (2, "")
    assert_one_error_line(stderr, name)


class Calls:
    """A pickle that calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_nothing_in_a_file_is_executed(cli, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "hostile.pickle"
    for thing in (Calls(os.system, f"touch {marker}"), Calls(open, str(marker), "w"), np.ones(2)):
        path.write_bytes(pickle.dumps(one_step().snapshot() | {"allocator_settings": thing}))
        status, stdout, stderr = cli(path)
        assert (status, stdout) == (2, "")
        assert_one_error_line(stderr, "which a memory snapshot has no use for")
    assert not marker.exists()


BOMBS = {
    "a key of two million tuples": (b"\x80\x04}()" + b"\x85" * (2 * 10**6) + b"K\x01u.", "nested too deep"),
    "memo of 2^32": (b"\x80\x04]r" + struct.pack("<I", 2**32 - 1) + b".", "GiB"),
    "text of a terabyte": (b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.", "GiB"),
    "a million lists": (b"\x80\x04" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", "no memory snapshot"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_file_made_to_crash_or_to_fill_the_machine_is_one_line(cli, tmp_path, name):
    (tmp_path / "bomb").write_bytes(BOMBS[name][0])
    status, stdout, stderr = cli(tmp_path / "bomb")
    assert (status, stdout) == (2, "")
    assert_one_error_line(stderr, BOMBS[name][1])


def test_file_beyond_the_limit_is_unpacked_no_further(monkeypatch, tmp_path):
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 10**6)
    unpacked = []
    readinto = gzip.GzipFile.readinto
    monkeypatch.setattr(gzip.GzipFile, "readinto", lambda *args: unpacked.append(n := readinto(*args)) or n)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(b"\x80\x04" + b"N" * 10**8, 1))
    with (tmp_path / "bomb.gz").open("rb") as file, pytest.raises(UsageError, match="larger than"):
        load(file)
    assert sum(unpacked) < 4 * 10**6


def changed(**changes):
    """A snapshot, one of whose events is another; None takes a key away."""
    snapshot = one_step().snapshot()
    event = snapshot["device_traces"][0][0] | changes
    snapshot["device_traces"][0][0] = {key: value for key, value in event.items() if value is not None}
    return snapshot


OTHERS = [
    *(7, "segments", None, [1, 2], {}, {"segments": []}, {"segments": [], "device_traces": 3}),
    *({"segments": [], "device_traces": [[1]]}, {"segments": ["a"], "device_traces": [[]]}),
    *(changed(size=None), changed(size=-512), changed(size=2**70), changed(size=512.0), changed(addr=[])),
    *(changed(user_metadata=["model"]), changed(frames=[1]), changed(frames=3), changed(time_us="now")),
    changed(frames=[{"name": "f", "filename": "x", "line": "1"}]),
    one_step().snapshot() | {"external_annotations": [{"name": 3, "stage": "START", "time_us": 1}]},
    {"segments": [], "device_traces": [[{"action": "alloc", "addr": i, "size": 2**60} for i in range(5)]]},
]


WHOLE = pickle.dumps(one_step().snapshot())
PACKED = gzip.compress(WHOLE)
BROKEN = [b"", b"no pickle\n", b"\x1f\x8b", WHOLE[:-1], PACKED[:-5], PACKED[:60] + bytes(40) + PACKED[100:]]
BROKEN += [b"\x80\x02h\x07.", b"\x80\x02X\x01\0\0\0aQ.", b"I" + b"9" * 10**5 + b"\n."]


def test_pickle_of_something_else_and_broken_file_are_refused(tmp_path):
    for content in [*map(pickle.dumps, OTHERS), *BROKEN]:
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(UsageError), (tmp_path / "other").open("rb") as file:
            load(file)


def test_empty_gpu_is_one_line(cli, tmp_path):
    save({"segments": [], "device_traces": [[], []]}, tmp_path / "empty.pickle")
    status, _, stderr = cli(tmp_path / "empty.pickle", "--plot", tmp_path / "plot.png")
    assert status == 2
    assert_one_error_line(stderr, "holds no block of GPU memory")


@pytest.mark.parametrize("repeat", range(4))
def test_damaged_file_is_read_or_one_line(cli, tmp_path, rng, repeat):
    data = bytearray(WHOLE)
    for _ in range(3):
        data[rng.randrange(len(data))] = rng.randrange(256)
    (tmp_path / "damaged").write_bytes(data)
    status, _, stderr = cli(tmp_path / "damaged")
    assert status in (0, 2)
    if status:
        assert_one_error_line(stderr, "damaged")


# What is written.


def test_outputs_replace_only_files_of_their_own_kind(cli, files, tmp_path):
    before = files[0].read_bytes()
    (tmp_path / "text").write_text("precious")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "text")
    (tmp_path / "same").hardlink_to(files[0])
    (tmp_path / "foreign.html").write_text("<!DOCTYPE html>\n<p>mine")
    for name in ("text", "fifo", "link", "same", files[0].name, "foreign.html", ".", "text/below"):
        for flag in ("--plot", "--html"):
            status, stdout, stderr = cli(files[0], flag, tmp_path / name)
            assert (status, files[0].read_bytes()) == (2, before)
            if "below" not in name:  # found out before anything is read
                assert stdout == ""
            assert_one_error_line(stderr, flag)
    assert (tmp_path / "text").read_text() == "precious"
    assert cli(files[0], "--plot", tmp_path / "x", "--html", tmp_path / "x")[0] == 2
    for _ in range(2):  # new, then in place of its own
        assert cli(files[0], "--html", tmp_path / "new.html")[0] == 0
    Image.new("RGB", (1, 1)).save(tmp_path / "old.png")
    assert cli(*files, "--plot", tmp_path / "old.png")[0] == 0


def test_plot_draws_names_with_dollars_as_they_are(files, tmp_path):
    texts = []
    from matplotlib.text import Text

    from src.explain.plot import figure, save_plot

    drawn = {"$\\broken$ a": read(files[0]), "b": read(files[1])}
    save_plot(drawn, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        image.load()
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24)) > 20
    texts = [text.get_text() for text in figure(drawn).findobj(Text)]
    assert r"\$\broken\$ a" in texts


def hostile_step():
    """A history whose names would break out of a page."""
    step = one_step()
    step.alloc(64 * MIB, 9 * MIB, frames=["</script><script>document.title='broken'</script> <i>.py:1"])
    step.alloc(96 * MIB, MIB, frames=["<!--<script> /code/a&b.py:2", "\ud800 /code/c.py:3"])
    return step


def data_of(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_page_is_whole_and_escaped(files):
    html = page([("</title><script>x", [timeline(hostile_step().snapshot())]), ("b", read_all(files[1]))])
    assert html.encode(errors="replace").startswith(outputs.PAGE_MARK)
    assert not re.search(r"https?:|<link|<img|src=|@import|url\(", html)
    assert html.count("<script") == html.count("</script>") == 2
    assert "</title><script>" not in html
    data = data_of(html)
    assert [file["name"] for file in data["files"]] == ["</title><script>x", "b"]
    (gpu,) = data["files"][0]["gpus"]
    assert sum(group["size"] for group in gpu["groups"]) == gpu["peak"] == 15 * MIB
    assert gpu["groups"][0]["by"].startswith("</script><script>")
    assert sum(row[3] for row in data["changes"]["category"]) == (11 - 15) * MIB
    assert sum(row[3] for row in data["changes"]["asked for by"]) == (11 - 15) * MIB


def test_page_of_a_large_history_stays_small(monkeypatch):
    monkeypatch.setattr("src.explain.page._ALL_LETTERS", 20_000)
    step = History()
    for i in range(3000):
        step.alloc((i + 1) * MIB, 512 * i, frames=[f"f{j}_{i}_{'x' * 40} /a/file.py:{i}" for j in range(3)])
    html = page([("large", [timeline(step.snapshot())])])
    data = data_of(html)
    (gpu,) = data["files"][0]["gpus"]
    assert len("".join(data["frames"])) < 21_000
    assert (len(gpu["groups"]), gpu["left"]) == (1500, 1500)
    assert sum(group["size"] for group in gpu["groups"]) + gpu["leftBytes"] == gpu["peak"]
    assert len(gpu["numbers"]) <= 1200


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_page_works_in_a_browser(tmp_path):
    html = page([("a", [timeline(hostile_step().snapshot())])])
    # What a reader does: search, open a stack, point at the timeline.
    act = """<script>
    const search = document.querySelector("input"), canvas = document.querySelector("canvas");
    search.value = "a&b.py"; search.dispatchEvent(new Event("input"));
    document.querySelector("tr.group").click();
    canvas.dispatchEvent(new MouseEvent("mousemove", {clientX: canvas.getBoundingClientRect().right - 12}));
    document.title = "acted";
    </script></body>"""
    (tmp_path / "page.html").write_text(html.replace("</body>", act), errors="replace")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [BROWSER, *options, (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    assert "<title>acted</title>" in dom
    assert "1 blocks at the peak, 1.0 MiB, in 1 groups" in dom
    assert "&lt;!--&lt;script&gt; (a&amp;b.py:2)" in re.search(r'<tr class="stack">.*?</tr>', dom, re.DOTALL)[0]
    tip = re.search(r'<div class="tip".*?</div></div>', dom, re.DOTALL)[0]
    assert "after event" in tip
    assert " MiB in all" in tip
