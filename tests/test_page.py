"""The advisor's page: what a visitor asks, in a process of its own, and all of it in a browser where there is one."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from src.advise import visit
from src.advise.visit import Chosen, Refused
from tests.helpers import ROOT

QUESTION = {"model_name": "tiny-llama", "gpu": "h100", "batch_size": 2, "seq_length": 64, "goal": "fit"}
HOSTILE = {
    "no.json": "nothing like JSON",
    "code.json": json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}),
    "deep.json": "[" * 100_000,
    "wide.json": json.dumps({"model_type": "llama", "hidden_size": 10**9}),
}


def test_visit_is_answered_in_a_process_of_its_own_which_ends_with_it(tmp_path):
    visit.prepare()
    for name, text in HOSTILE.items():
        (tmp_path / name).write_text(text)
        *_, last = visit.answers(QUESTION, [], str(tmp_path / name))
        assert isinstance(last, Refused)
        assert "\n" not in last.reason
        assert str(tmp_path) not in last.reason
    *_, last = visit.answers({**QUESTION, "batch_size": -3}, [], None)
    assert "--batch_size must be from 1" in last.reason
    messages = visit.answers(QUESTION, [visit.LIGER, "gradient checkpointing"], None)
    chosen = next(m for m in messages if isinstance(m, Chosen))
    messages.close()
    assert chosen.outcome.config.gradient_checkpointing
    assert chosen.outcome.config.flce
    assert sum(chosen.timeline.breakdown().values()) == chosen.outcome.peak_bytes


BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Alone with the page: Chromium asks its maker's machines for this and that otherwise.
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1400,2600"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# The page's server, which says when it connects to another machine.
SERVER = """
import runpy, sys
def hear(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in ("127.0.0.1", "::1"):
        print("connects to", arguments[1][0], file=sys.stderr, flush=True)
sys.addaudithook(hear)
sys.argv = ["advise", "--page"]
runpy.run_module("src.advise", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def server(tmp_path):
    """The page as a user starts it; ends as Ctrl-C ends it. Its address, and what it has written to stderr."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed: requirements-extra.txt")
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path)), "HOME": str(tmp_path)}
    errors = tmp_path / "stderr"
    with errors.open("w") as file:
        words = [sys.executable, "-c", SERVER]
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, errors.read_text()
        yield found[0], errors
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if BROWSER is None or DRIVER is None:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'browser'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def find(browser, selector, timeout_s=60):
    """The first such element that is shown."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if shown := [e for e in browser.find_elements("css selector", selector) if e.is_displayed()]:
            return shown[0]
        time.sleep(0.1)
    raise AssertionError(f"no {selector} on the page")


def ask(browser, timeout_s=150, **fields):
    """Fill in numbers and press the button; the status that is shown in the end."""
    for name, value in fields.items():
        place = find(browser, f"#{name} input, #{name} textarea")
        place.send_keys("\ue009a\ue000\ue017", value)  # Control and A, Delete: all of it is replaced
    status = find(browser, "#status textarea")
    browser.execute_script("arguments[0].value = ''", status)
    find(browser, "#answer").click()
    deadline = time.monotonic() + timeout_s
    while not (told := status.get_property("value")).startswith(("Done", "Not possible")):
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    return told


def test_page_answers_and_survives_nonsense_without_leaving_the_machine(server, browser, tmp_path):
    address, errors = server
    browser.get(address)
    assert "batch_size must be from 1" in ask(browser, batch="-3")
    assert "no number of GiB" in ask(browser, batch="2", length="64", memory="much")
    for name, text in HOSTILE.items():
        (tmp_path / name).write_text(text)
    own = find(browser, "#config")
    own.find_element("css selector", "input[type=file]").send_keys(str(tmp_path / "code.json"))
    find(browser, "#config a, #config .file-preview")
    assert "auto_map" in ask(browser, memory="")
    own.find_element("css selector", "button[aria-label='Clear'], button[title='Clear']").click()
    find(browser, "#model input").send_keys("\ue009a\ue000", "tiny-llama", "\ue007")  # and Enter
    find(browser, "#techniques label").click()
    assert ask(browser) == "Done."
    assert find(browser, "#fits textarea").get_property("value").startswith("Yes: Liger kernels")
    for picture in ("peak", "chart"):
        assert find(browser, f"#{picture} img").get_property("naturalWidth") > 300
    assert "all_gpu_liger_kernel.py --model_name tiny-llama" in find(browser, "#command .cm-content").text
    assert "TrainingArguments(" in find(browser, "#program .cm-content").text
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert not [url for url in asked if url.startswith(("http", "ws")) and not url.startswith(address)]
    assert "connects to" not in errors.read_text()
