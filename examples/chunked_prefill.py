"""Prefill by hand, a chunk of the prompt at a time, beside attention over the whole prompt at once.

A chunk's queries are the newest tokens: they see all keys that the cache holds already, and of their own chunk the ones
before them. That is a causal mask from the bottom right corner, flash_ext's meaning of `is_causal`: the last query sees
the last key. PyTorch's starts at the top left, and hides nearly the whole cache from the chunk.
"""

import argparse

import torch

import flash_ext


def visible(queries, keys, **options):
    """bool [queries, keys], asked of the function itself: for one-hot values its output is the weights."""
    q, k = torch.zeros(1, 1, queries, 8), torch.zeros(1, 1, keys, 8)
    return flash_ext.attn(q, k, torch.eye(keys)[None, None], is_causal=True, **options)[0, 0] > 0


def picture(mask, begin):
    keys = mask.shape[1]
    lines = [f"            key {' '.join(str(j % 10) for j in range(keys))}"]
    for i, row in enumerate(mask.tolist()):
        lines.append(f"query {begin + i:2} (row {i}) {' '.join('#' if sees else '.' for sees in row)}")
    return "\n".join(lines)


def prefill(q, k, v, chunk):
    """attn(q, k, v, is_causal=True) in pieces of the queries; key and value grow as a cache does."""
    outputs = []
    for begin in range(0, q.shape[2], chunk):
        end = min(begin + chunk, q.shape[2])
        keys, values = k[:, :, :end], v[:, :, :end]  # views: strides of a cache need no copy
        outputs.append(flash_ext.attn(q[:, :, begin:end], keys, values, is_causal=True))
    return torch.cat(outputs, dim=2)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    print("The second chunk of 4 tokens; # is a key that a query sees.\n")
    print('is_causal=True, causal_align="bottom_right" (the default): right for a chunk')
    print(picture(visible(4, 8), begin=4))
    print(
        '\ncausal_align="top_left" (torch\'s is_causal): wrong for a chunk, right where queries and keys begin together'
    )
    print(picture(visible(4, 8, causal_align="top_left"), begin=4))

    torch.manual_seed(0)
    q = torch.randn(2, 8, options.tokens, 64, device=options.device)
    k, v = torch.randn(2, 2, 2, options.tokens, 64, device=options.device)  # 2 heads serve the 8 of q
    at_once = flash_ext.attn(q, k, v, is_causal=True)
    in_chunks = prefill(q, k, v, options.chunk)
    difference = (at_once - in_chunks).abs().max().item()
    print(f"\n{options.tokens} tokens in chunks of {options.chunk}, and all at once: they differ by {difference:.1e}")
    torch.testing.assert_close(in_chunks, at_once, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    main()
