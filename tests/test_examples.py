"""The programs in examples/, small and on the CPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import flash_ext

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """A function that imports an example."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(FOLDER)):
            del sys.modules[name]


def test_gpt_is_gpt2(example):
    gpt = example("gpt")
    with torch.device("meta"):
        model = gpt.GPT(gpt.PRESETS["124m"])
    padding = (50304 - 50257) * 768
    assert model.size() - padding == 124_439_808  # GPT-2's


@pytest.mark.parametrize("compiled", [False, True])
def test_gpt_attentions_agree(example, compiled):
    """Loss and gradients; compiled, without a graph break."""
    gpt = example("gpt")
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, attention in gpt.ATTENTION.items():
        torch.manual_seed(0)
        model = gpt.GPT(gpt.Config(layers=1, heads=2, width=16, context=16, vocabulary=256), attention)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        call(tokens, tokens).backward()
        found[name] = [p.grad for p in model.parameters()]
    for x, y in zip(*found.values(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_train_gpt(example, tmp_path, capsys):
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    data, results, plot = tmp_path / "text", tmp_path / "results.json", tmp_path / "losses.png"
    data.write_text("the same words again and again, " * 200)
    options = [
        "--device",
        "cpu",
        "--preset",
        "tiny",
        "--steps",
        "15",
        "--batch",
        "4",
        "--rate",
        "3e-3",
        "--dropout",
        "0",
    ]
    files = ["--data", str(data), "--json", str(results), "--plot", str(plot)]
    example("train_gpt").main([*options, *files, "--attention", "flash_ext", "sdpa"])
    ours, theirs = json.loads(results.read_text())["results"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert ours["losses"][-1] < 0.8 * ours["losses"][0]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in capsys.readouterr().out


def test_train_gpt_text_without_a_file(example):
    pytest.importorskip("tqdm")
    text = example("train_gpt").read_text(None)
    assert text.dtype == torch.uint8 and len(text) > 1_000_000


def test_train_gpt_empty_text(example, tmp_path):
    pytest.importorskip("tqdm")
    (tmp_path / "empty").touch()
    with pytest.raises(SystemExit, match="no text in .*empty"):
        example("train_gpt").read_text(tmp_path / "empty")


def test_generate(example, capsys):
    pytest.importorskip("transformers")
    example("generate").main(["--device", "cpu", "--tokens", "6", "--prompt", "A"])
    assert capsys.readouterr().out.endswith("the same tokens\n")


def test_chunked_prefill(example, capsys):
    module = example("chunked_prefill")
    module.main(["--device", "cpu", "--tokens", "50", "--chunk", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert "query  4 (row 0) # # # # # . . ." in lines and "query  4 (row 0) # . . . . . . ." in lines
    assert torch.equal(module.visible(2, 3), torch.tensor([[True, True, False], [True, True, True]]))
    q, k = torch.randn(1, 2, 10, 8), torch.randn(1, 1, 10, 8)
    torch.testing.assert_close(module.prefill(q, k, k, 3), flash_ext.attn(q, k, k, is_causal=True))
