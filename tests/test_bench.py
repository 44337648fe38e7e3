"""The benchmarks of bench/ that users quote, small and on the CPU: they run, agree and say what they measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from flash_ext.backends import native

pytest.importorskip("tqdm")
pytestmark = pytest.mark.skipif(native is None, reason="needs the native extension")
FOLDER = Path(__file__).parents[1] / "bench"
SMALL = ["--device", "cpu", "--rounds", "1"]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """A function that imports a benchmark; its results go to tmp_path."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.syspath_prepend(FOLDER.parent / "examples")
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path)
    yield importlib.import_module
    for name in set(sys.modules) - before:  # names like `common` are not for others to find
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(FOLDER)):
            del sys.modules[name]


def results(folder, name):
    assert (folder / f"{name}.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    saved = json.loads((folder / f"{name}.json").read_text())
    assert saved["machine"]["torch"] == torch.__version__
    return saved["results"]


def test_speedup(bench, tmp_path, capsys):
    bench("speedup").main([*SMALL, "--tokens", "32", "64", "--heads", "4"])
    found = results(tmp_path, "speedup-cpu")
    assert [r["tokens"] for r in found] == [32, 64]
    assert {"flash_ext", "eager", "SDPA", "SDPA flash", "SDPA math"} <= found[0]["seconds"].keys()
    assert "over eager" in capsys.readouterr().out


def test_module(bench, tmp_path, monkeypatch, capsys):
    module = bench("module")
    monkeypatch.setitem(module.SHAPES, "cpu", (1, 2, 32, 32))
    monkeypatch.setitem(module.MODULES, "cpu", (1, module.Config(heads=2, width=32, context=16)))
    monkeypatch.setattr(torch, "compile", lambda module, fullgraph: module)
    module.main(SMALL)
    titles = [r["title"] for r in results(tmp_path, "module-cpu")]
    assert len(titles) == 5 and titles[-1] == "module, forward and backward, compiled"
    assert "CausalSelfAttention" in capsys.readouterr().out


def test_prefill(bench, tmp_path, capsys):
    bench("prefill").main([*SMALL, "--tokens", "32", "--markdown"])
    found = results(tmp_path, "prefill-cpu")
    assert [r["model"] for r in found] == ["Mistral-7B", "Llama-3-8B", "Phi-2"]
    assert all(r["errors"]["flash_ext"] < 1e-5 for r in found)
    assert "| Phi-2, 32 " in capsys.readouterr().out


@pytest.mark.parametrize("name, billions", [("Mistral-7B", 7.242), ("Llama-3-8B", 8.030), ("Phi-2", 2.780)])
def test_decoders_have_their_size(bench, name, billions):
    decoders = bench("decoders")
    with torch.device("meta"):
        model = decoders.Decoder(decoders.SHAPES[name])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=5e-4)


@pytest.mark.parametrize("name", ["Llama-3-8B", "Phi-2"])
def test_decoders_are_transformers(bench, name):
    """Logits of the small shapes beside transformers' own model with the same weights."""
    transformers = pytest.importorskip("transformers")
    decoders = bench("decoders")
    shape = decoders.SHAPES[name].small()
    model = decoders.random_decoder(shape, torch.float32, "cpu")
    options = dict(
        hidden_size=shape.width, intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads_q, num_key_value_heads=shape.heads_kv, vocab_size=shape.vocabulary,
        tie_word_embeddings=False, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
    )  # fmt: skip
    if shape.is_phi:
        options["rope_parameters"]["partial_rotary_factor"] = shape.rotary_dim / shape.head_dim
        theirs = transformers.PhiForCausalLM(transformers.PhiConfig(**options)).eval()
    else:
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, rms_norm_eps=1e-5)).eval()
    load(theirs.state_dict(), model.state_dict(), shape.is_phi)
    tokens = torch.randint(shape.vocabulary, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits[:, -1]
        found, cache = model(tokens, decoders.ATTENTION["flash_ext"])
    assert len(cache) == shape.layers
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


NAMES = {
    "embedding": "model.embed_tokens", "head": "lm_head", "norm1": "input_layernorm", "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
}  # fmt: skip
LLAMA = NAMES | {
    "norm": "model.norm", "norm2": "post_attention_layernorm", "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
PHI = NAMES | {
    "attention.out": "self_attn.dense", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "norm": "input_layernorm",
}  # fmt: skip


def load(theirs, ours, is_phi):
    """Copies our weights into theirs, all of them."""
    names = PHI if is_phi else LLAMA
    missing = set(theirs)
    for name, value in ours.items():
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("blocks."):
            _, number, stem = stem.split(".", 2)
            target = f"model.layers.{number}.{names[stem]}.{kind}"
        else:
            target = f"model.final_layernorm.{kind}" if is_phi and stem == "norm" else f"{names[stem]}.{kind}"
        theirs[target].copy_(value)
        missing.remove(target)
    assert not {name for name in missing if "inv_freq" not in name}


def test_train(bench, tmp_path, capsys):
    bench("train").main([*SMALL, "--batch", "2"])
    found = results(tmp_path, "train-cpu")
    assert found["losses"]["flash_ext"] == pytest.approx(found["losses"]["sdpa"], rel=1e-4)
    assert "tokens/s" in capsys.readouterr().out


def test_accuracy(bench, tmp_path, capsys):
    bench("accuracy").main(["--device", "cpu", "--tokens", "64", "--dtypes", "float32", "--head-dims", "32"])
    found = json.loads((tmp_path / "accuracy-cpu.json").read_text())["results"]
    assert [r["title"] for r in found] == ["d32-64", "d32-64-shifted", "d32-64-causal", "d32-64-causal-shifted"]
    assert all(0 < r["errors"]["flash_ext"]["mean"] < r["errors"]["flash_ext"]["largest"] < 1e-5 for r in found)
    assert "PyTorch" in capsys.readouterr().out
