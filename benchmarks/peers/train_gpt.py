"""Train a small Llama on text, so that its weights never were anything but float32. usage:

    train_gpt.py FOLDER STEPS TEXT...

FOLDER gets a Hugging Face checkpoint with a byte-level BPE tokenizer, and held-out.txt: the last tenth of each text,
not trained on. Runs in onnxpress's environment. Widths are multiples of 256, the block of llama.cpp's K-quants.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 4096, 256, 768, 12, 4, 2
LENGTH, BATCH, RATE, WARM_UP, DECAY = 128, 8, 3e-3, 0.05, 0.1
END = "<|end|>"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        (text[i : i + 10_000] for text in texts for i in range(0, len(text), 10_000)), trainer
    )
    return tokenizer


def rate(progress: float) -> float:
    """Learning rate after a share of the steps: linear warm-up, then half a cosine."""
    if progress < WARM_UP:
        return RATE * progress / WARM_UP
    return RATE * (0.02 + 0.49 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, steps: int) -> None:
    """AdamW on random windows; 500 steps take two cores about five minutes. Prints the mean loss of the last 50."""
    random.seed(0)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step / steps)
        begins = [random.randrange(len(tokens) - LENGTH) for _ in range(BATCH)]
        batch = torch.stack([tokens[i : i + LENGTH] for i in begins])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses = [*losses[-49:], loss.item()]
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {sum(losses) / len(losses):.3f}", flush=True)


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.manual_seed(0)
    texts = [Path(name).read_text(encoding="utf-8") for name in sys.argv[3:]]
    cuts = [9 * len(text) // 10 for text in texts]
    seen = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    tokenizer = train_tokenizer(seen)
    tokens = torch.tensor([token for text in seen for token in tokenizer.encode(text).ids])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(tokens)} tokens", flush=True)
    train(model, tokens, steps)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)
    held_out = "\n".join(text[cut:] for text, cut in zip(texts, cuts, strict=True))
    (folder / "held-out.txt").write_text(held_out, encoding="utf-8")


if __name__ == "__main__":
    main()
