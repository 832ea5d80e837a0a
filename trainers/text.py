"""The text side of image–text training: open_clip's tokeniser and text tower, initialised from named streams.

Source: mlfoundations/open_clip (package open_clip_torch): src/open_clip/tokenizer.py, src/open_clip/transformer.py.
Shapes: B captions, L tokens of the longest of them, E width of the joint space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from open_clip.tokenizer import tokenize
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from trainers.method_settings import OpenCLIPConfig
from trainers.methods import initialise_
from trainers.streams import Streams

VOCABULARY = 49_408  # byte-pair encodings of CLIP's tokeniser, with the start and the end of a text


def tokens_of(captions: Sequence[str], context_length: int) -> Tensor:
    """Captions as int64 [B, L]: start, byte-pair encodings in lower case, end, zeros; at most `context_length` long.

    open_clip always gives `context_length` columns. Those behind every caption's end are left out here: with causal
    attention and features taken at the end of the text they can change nothing.
    """
    tokens: Tensor = tokenize(list(captions), context_length=context_length)
    last = int(tokens.argmax(dim=1).max())  # the end has the highest number; 0 may also stand for a "!"
    return tokens[:, : last + 1].contiguous()


def build_text_tower(settings: OpenCLIPConfig, streams: Streams) -> TextTransformer:
    """open_clip's text tower for CLIP's tokeniser: causal, read at the end of the text, projected to E.

    Every parameter is drawn from the stream of its own name, with the deviations of open_clip's `init_parameters`;
    what these leave alone is as PyTorch makes it.
    """
    with torch.random.fork_rng(devices=[]):  # open_clip draws from the global generator; nothing of it is kept
        tower = TextTransformer(
            context_length=settings.context_length,
            vocab_size=VOCABULARY,
            width=settings.text_width,
            heads=settings.text_heads,
            layers=settings.text_layers,
            output_dim=settings.embed_dim,
        )
    deviations = dict(_deviations(tower))
    for name, parameter in tower.named_parameters():
        if name in deviations:
            initialise_(parameter, f"text.{name}", streams, std=deviations[name])
        elif name.endswith((".c_fc.bias", ".c_proj.bias")):
            _uniform_(parameter, f"text.{name}", streams, fan_in=_fan_in(tower, name))
        # Norms (1 and 0) and the other biases (0) already stand.
    return tower


def _deviations(tower: TextTransformer) -> Iterator[tuple[str, float]]:
    """Names of the parameters that open_clip draws from a normal distribution, and its standard deviation."""
    width, layers = tower.width, len(tower.transformer.resblocks)
    yield "token_embedding.weight", 0.02
    yield "positional_embedding", 0.01
    yield "text_projection", width**-0.5
    for index in range(layers):
        block = f"transformer.resblocks.{index}"
        yield f"{block}.attn.in_proj_weight", width**-0.5
        yield f"{block}.attn.out_proj.weight", width**-0.5 * (2 * layers) ** -0.5
        yield f"{block}.mlp.c_fc.weight", (2 * width) ** -0.5
        yield f"{block}.mlp.c_proj.weight", width**-0.5 * (2 * layers) ** -0.5


def _fan_in(tower: TextTransformer, bias: str) -> int:
    linear = cast(nn.Linear, tower.get_submodule(bias.rpartition(".")[0]))
    return linear.in_features


def _uniform_(tensor: Tensor, purpose: str, streams: Streams, fan_in: int) -> None:
    """Uniform within ±1 / √fan_in, as PyTorch initialises the bias of a linear layer."""
    generator = torch.Generator().manual_seed(streams.seed_for(f"init:{purpose}"))
    with torch.no_grad():
        tensor.copy_(torch.empty(tensor.shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator))


def encode(tower: TextTransformer, tokens_BL: Tensor) -> Tensor:
    """Projected features [B, E] of the captions, not normalised; L may be less than the context length."""
    length = tokens_BL.shape[1]
    mask: dict[str, Any] = {"attn_mask": tower.attn_mask[:length, :length]}  # open_clip's has the context length
    return cast(Tensor, torch.func.functional_call(tower, mask, (tokens_BL,)))
