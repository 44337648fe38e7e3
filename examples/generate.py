"""Text from a model of Hugging Face transformers whose attention runs on flash_ext, and the same with eager attention.

python examples/generate.py                                         # a small Llama with random weights, no download
python examples/generate.py --model gpt2 --prompt "Attention is"    # a folder, or a name that transformers can download

Greedy, so both have to find the same tokens, except where two are equally likely but for rounding.
"""

import argparse
import time

import torch
import transformers

from flash_ext.integrations.transformers import register
from flash_ext.measure import table


def random_model():
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def generate(model, inputs, options):
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    tokens = model.generate(**inputs, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return tokens, time.perf_counter() - begin


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", metavar="PATH_OR_NAME", help="instead of a small one with random weights")
    parser.add_argument("--prompt", default="Attention is", help="a text to go on with")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="how many more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options = parser.parse_args(arguments)
    if options.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        inputs, decode = tokenizer(options.prompt, return_tensors="pt"), tokenizer.decode
    else:
        model = random_model()
        tokens = torch.tensor([list(options.prompt.encode())])  # its vocabulary is the bytes
        inputs, decode = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, list
    model = model.to(options.device, getattr(torch, options.dtype)).eval()
    inputs = {name: tensor.to(options.device) for name, tensor in inputs.items()}

    found, rows = {}, []
    for name, implementation in {"flash_ext": register(), "eager": "eager"}.items():
        model.set_attn_implementation(implementation)
        generate(model, inputs, options)  # the first time loads what is needed
        found[name], seconds = generate(model, inputs, options)
        new = found[name].shape[1] - inputs["input_ids"].shape[1]
        rows.append((name, new, f"{new / seconds:.1f}"))
    print(decode(found["flash_ext"][0].tolist()), end="\n\n")
    print(table(("attention", "new tokens", "tokens/s"), rows))
    print("\nthe same tokens" if torch.equal(*found.values()) else "\nthe tokens differ")


if __name__ == "__main__":
    main()
