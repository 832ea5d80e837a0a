"""State dicts in the layouts of other projects, of nano size and with random values."""

import torch
from torch import Tensor


def open_clip_state() -> dict[str, Tensor]:
    """The shapes of a nano image tower under open_clip's names."""
    width, depth = 64, 4
    vectors = ("ln_pre.weight", "ln_pre.bias", "ln_post.weight", "ln_post.bias", "class_embedding")
    state = {name: torch.randn(width) for name in vectors}
    state |= {"positional_embedding": torch.randn(17, width), "conv1.weight": torch.randn(width, 3, 8, 8)}
    state["proj"] = torch.randn(width, 32)
    for block in range(depth):
        shapes = {
            **dict.fromkeys(("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"), (width,)),
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width),
            "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width),
            "mlp.c_proj.bias": (width,),
        }
        state |= {f"transformer.resblocks.{block}.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return state
