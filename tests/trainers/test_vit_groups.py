"""Several groups of images in one pass: against passes of their own, with masks, compiled, checkpointed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from trainers import vit
from trainers.config import resolve
from trainers.streams import Streams
from trainers.vit import Tokens, ViT

VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_registers": 0, "pre_norm": True, "mlp": "swiglu"},
    {"sink": "attention_bias", "register_mask": "patches_cannot_read"},
    {"sink": "softmax1", "register_mask": "detached"},
    {"sink": "value_gate", "register_mask": "registers_cannot_write", "mlp": "quick_gelu"},
]


def backbone(**settings: object) -> ViT:
    given = {"size": "nano", "patch_size": 8, "image_size": 32, "num_registers": 3, "layer_scale": None, **settings}
    ours = ViT(resolve({"preset": "short", "model": given}).model, Streams(2))
    ours.add_mask_token(Streams(2))
    with torch.no_grad():
        ours.mask_token.normal_(generator=torch.Generator().manual_seed(9))
    return ours


def groups(counts: Sequence[int] = (4, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    sides = ((32, 32), (16, 16), (16, 24))
    return [torch.randn(n, 3, *side, generator=generator) for n, side in zip(counts, sides, strict=False)]


def masks(count: int = 4) -> Tensor:
    return torch.rand(count, 16, generator=torch.Generator().manual_seed(3)) > 0.5


def close(actual: Tokens, expected: Tokens, atol: float = 1e-5) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=atol)


def total(tokens: Sequence[Tokens]) -> Tensor:
    return sum((part.sin().sum() for of_group in tokens for part in of_group if part is not None), torch.zeros(()))


@pytest.mark.parametrize("settings", VARIANTS)
def test_one_pass_equals_a_pass_of_each_group(settings: dict[str, Any]) -> None:
    ours = backbone(**settings).eval()
    given = groups((2, 3, 1))
    for together, images in zip(ours.forward_groups(given), given, strict=True):
        close(together, ours.tokens(images))


def test_gradients_of_one_pass_are_those_of_several() -> None:
    ours = backbone().train()
    total(ours.forward_groups(groups())).backward()
    together = {name: value.grad.clone() for name, value in ours.named_parameters() if value.grad is not None}
    ours.zero_grad()
    total([ours.tokens(images) for images in groups()]).backward()
    for name, gradient in together.items():
        torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-4)


def test_one_group_is_computed_bit_for_bit_as_before() -> None:
    ours = backbone().eval()
    (images,) = groups((3,))
    (tokens,) = ours.forward_groups([images])
    assert all(torch.equal(one, other) for one, other in zip(tokens, ours.tokens(images), strict=True))


def test_masked_patches_of_the_first_group_get_the_mask_token_before_the_position() -> None:
    ours = backbone().eval()
    seen: list[Tensor] = []
    ours.tap = lambda layer, x_BTD: seen.append(x_BTD) if layer == 0 else None
    plain = ours.forward_groups(groups())
    masked = ours.forward_groups(groups(), masks())
    unmasked, with_masks = (x_BTD[:, 4:] for x_BTD in seen)
    position = cast(Tensor, ours.pos_embed)[:, 1:].expand(4, -1, -1)
    assert torch.equal(with_masks[~masks()], unmasked[~masks()])
    torch.testing.assert_close(with_masks[masks()], (ours.mask_token + position)[masks()])
    close(masked[1], plain[1])
    assert (masked[0].patches_BND - plain[0].patches_BND).abs().max() > 0.1


def test_the_tap_sees_the_first_group_of_every_layer() -> None:
    ours = backbone(drop_path=0.5, drop_path_group=4).eval()
    for training in (False, True):
        ours.train(training)
        seen: dict[int, Tensor] = {}
        ours.tap = seen.__setitem__
        ours.forward_groups(groups())
        assert list(seen) == [0, 1, 2, 3, 4]
        assert {x_BTD.shape for x_BTD in seen.values()} == {(4, 20, 64)}
        if not training:
            expected = [torch.cat([t.registers_BRD, t.patches_BND], 1) for t in ours.residuals(groups()[0])]
            torch.testing.assert_close(torch.stack(expected), torch.stack(list(seen.values()))[:, :, 1:])


def test_wrong_groups_are_refused() -> None:
    ours = backbone()
    with pytest.raises(ValueError, match=r"masks are \[4, 16\], the patches \[2, 16\]"):
        ours.forward_groups(groups((2, 2)), masks())
    with pytest.raises(ValueError, match=r"groups of \[4, 8\] images cannot hold \[2, 3\] crops"):
        ours.forward_groups(groups(), crops=(2, 3))
    with pytest.raises(ValueError, match="cannot hold"):
        ours.forward_groups(groups(), crops=(2,))
    ours.mask_token = None
    with pytest.raises(ValueError, match="call add_mask_token"):
        ours.forward_groups(groups(), masks())


class Own(torch.nn.Module):
    """A user's backbone, which knows nothing of groups."""

    embed_dim, num_registers = 3, 0

    def tokens(self, images: Tensor, *, normed: bool = True) -> Tokens:
        patches = images.flatten(2).mT if normed else images.flatten(2).mT + 1
        return Tokens(None, patches[:, :0], patches)


def test_a_users_own_backbone_sees_one_group_at_a_time() -> None:
    own = cast(vit.Backbone, Own())
    first, second = vit.forward_groups(own, groups())
    assert torch.equal(first.patches_BND, groups()[0].flatten(2).mT)
    assert second.patches_BND.shape == (8, 256, 3)
    with pytest.raises(ValueError, match="masks patches, which a backbone of your own"):
        vit.forward_groups(own, groups(), masks())
    ours = backbone().eval()
    close(vit.forward_groups(ours, groups(), masks())[0], ours.forward_groups(groups(), masks())[0], atol=0.0)


def gradients(ours: ViT) -> dict[str, Tensor]:
    ours.zero_grad()
    total(ours.forward_groups(groups(), masks(), crops=(1, 2))).backward()
    return {name: value.grad.clone() for name, value in ours.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("group", [None, 4])
def test_activation_checkpointing_changes_no_bit(group: int | None) -> None:
    settings: dict[str, Any] = {"drop_path": 0.3, "drop_path_group": group, "sink": "attention_bias"}
    plain, checkpointed = backbone(**settings).train(), backbone(**settings).train()
    checkpointed.activation_checkpointing = True
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        expected = gradients(plain)
        without = sum(saved)
        saved.clear()
        given = gradients(checkpointed)
    assert sum(saved) != without
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], gradient) for name, gradient in expected.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's compiler looks at it, then hides this
@pytest.mark.parametrize("group", [None, 4])
def test_compiled_blocks_agree_with_eager_ones(group: int | None) -> None:
    settings: dict[str, Any] = {"drop_path": 0.3, "drop_path_group": group, "reg_init_std": 1.0}
    settings |= {"register_mask": "patches_cannot_read", "sink": "attention_bias"}
    eager, compiled = backbone(**settings).train(), backbone(**settings).train()
    compiled.compile_blocks()
    assert list(eager.state_dict()) == list(compiled.state_dict())
    for _ in range(2):  # the draws of the second pass differ, what is compiled does not
        given, expected = (model.forward_groups(groups(), masks()) for model in (compiled, eager))
        for one, other in zip(given, expected, strict=True):
            close(one, other)
    expected_gradients = gradients(eager)
    for name, gradient in gradients(compiled).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        close(compiled.eval().tokens(groups()[0]), eager.eval().tokens(groups()[0]))
