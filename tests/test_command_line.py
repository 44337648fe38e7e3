"""python -m flash_ext, and the measuring that the demo and the benchmarks share."""

import importlib.util
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from flash_ext import __main__, backends, measure
from flash_ext.demo import EXTRAS

has_extras = all(importlib.util.find_spec(module) for module in EXTRAS)


def test_info(capsys):
    assert __main__.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    for name in backends.BACKENDS:
        assert f"  {name}" in text
    if backends.native is not None:
        assert backends.native.cpu_isa() in text


def test_info_needs_no_extras():
    block = "import sys; sys.modules.update({name: None for name in sys.argv[1:]}); sys.argv[1:] = ['info']; "
    run = "import runpy; runpy.run_module('flash_ext', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", block + run, *EXTRAS, "numpy"], text=True, stdout=subprocess.PIPE, check=True
    )
    assert "backends" in result.stdout


def test_no_command_is_info(capsys):
    assert __main__.main([]) == 0
    assert "backends" in capsys.readouterr().out


def test_demo_without_extras(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert __main__.main(["demo"]) == 1
    output = capsys.readouterr()
    assert "transformers" in output.err and "pip install 'flash_ext[demo]'" in output.err and not output.out


def write_texts(folder):
    file = folder / "texts.txt"
    file.write_text(
        "# what they are\nA cat sleeps on the mat.\nThe stock market fell sharply on Monday.\nTwo dogs run.\n"
    )
    return str(file)


@pytest.mark.skipif(not has_extras, reason="needs flash_ext[demo]")
def test_demo_answers(capsys, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "# what they are\nA cat sleeps on the mat.\nThe stock market fell sharply on Monday.\nTwo dogs run.\n"
    )
    assert __main__.main(["demo", "--no-speed", "--texts", str(texts), "--query", "finance"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "stock market" in lines[lines.index("? finance") + 1]
    assert "Eager attention finds the same passages in the same order." in lines


@pytest.mark.skipif(not has_extras, reason="needs flash_ext[demo]")
@pytest.mark.slow
def test_demo_speed(capsys, tmp_path):
    plot = tmp_path / "new folder" / "plot.png"
    options = ["--texts", write_texts(tmp_path), "--lengths", "64", "--rounds", "1", "--output", str(plot)]
    assert __main__.main(["demo", *options]) == 0
    assert f"plot: {plot}" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not has_extras, reason="needs flash_ext[demo]")
def test_demo_file_that_is_not_there(capsys):
    assert __main__.main(["demo", "--texts", "no such file"]) == 1
    assert "no such file" in capsys.readouterr().err


def test_interleaved_takes_turns():
    order = []
    calls = {"a": partial(order.append, "a"), "b": lambda: (order.append("b"), time.sleep(0.01))}
    seconds = measure.interleaved(calls, rounds=3, min_seconds=0)
    rounds = "".join(order)[-6:]
    assert {rounds[:2], rounds[2:4], rounds[4:]} == {"ab", "ba"}
    assert seconds["a"] < seconds["b"] and seconds["b"] >= 0.01


def test_interleaved_stops_in_time():
    rounds = []
    measure.interleaved({"a": partial(time.sleep, 0.02)}, 5, 0.01, max_seconds=0.03, on_round=partial(rounds.append, 1))
    assert len(rounds) == 5  # a progress bar gets to its end all the same


def test_peak_memory():
    found = measure.peak_memory(make_zeros, 64 * 2**20, threads=1)
    if found is None:
        pytest.skip("no way to measure it here")
    assert 64 * 2**20 <= found < 72 * 2**20


def make_zeros(count):
    return partial(torch.ones, count, dtype=torch.uint8)


def test_peak_memory_of_a_call_that_fails():
    with pytest.raises(RuntimeError, match="ValueError: on purpose"):
        if measure.peak_memory(fail, threads=1) is None:
            raise RuntimeError("ValueError: on purpose")


def fail():
    raise ValueError("on purpose")


def test_table():
    rows = [("a", "1.5 x"), None, ("longer", "10 x")]
    lines = measure.table(("", "ratio"), rows).splitlines()
    assert lines == ["        ratio", "------  -----", "a       1.5 x", "", "longer   10 x"]
    lines = measure.table(("", "ratio"), rows, markdown=True).splitlines()
    assert lines == ["|        | ratio |", "|--------|------:|", "| a      | 1.5 x |", "| longer |  10 x |"]
