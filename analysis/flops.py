"""What registers cost by closed formula: parameters and FLOPs of a plain ViT (the paper's Fig. 12); pure.

L layers (blocks), D width, N patches, R registers, p side of a patch in px; T = N + 1 + R tokens with the class token.
"""

from __future__ import annotations

from dataclasses import dataclass

MLP_RATIO = 4  # hidden width of the MLP over D


@dataclass(frozen=True)
class Shape:
    """Shape of a ViT and of the square images that it is trained on.

    Attributes:
        width, depth: D and L.
        patch_size, image_size: p and the side of an image, in px.
        num_classes: outputs of a linear classifier; 0 for a backbone alone.
    """

    width: int
    depth: int
    patch_size: int
    image_size: int
    num_classes: int = 0

    @property
    def num_patches(self) -> int:
        """N; what is less than a patch at an edge is cut off."""
        return (self.image_size // self.patch_size) ** 2


def forward_flops(shape: Shape, num_registers: int = 0) -> float:
    """FLOPs of one image's forward pass, two per multiply-add.

    F(T) = L·[(8 + 4ρ)·T·D² + 4·T²·D] + 6·p²·N·D + 2·D·C: projections and MLP of ratio ρ = 4, attention, the embedding
    of patches of three channels, the classifier. Norms, activations and softmax are not counted.
    """
    width, tokens = shape.width, shape.num_patches + 1 + num_registers
    blocks = shape.depth * ((8 + 4 * MLP_RATIO) * tokens * width**2 + 4 * tokens**2 * width)
    embedding = 6 * shape.patch_size**2 * shape.num_patches * width
    return float(blocks + embedding + 2 * width * shape.num_classes)


def parameters(shape: Shape, num_registers: int = 0) -> int:
    """Parameters with biases: embeddings of patches, places and class token, registers, blocks, last norm, classifier.

    LayerScale is not counted (it adds 2·L·D).
    """
    width = shape.width
    embedding = (3 * shape.patch_size**2 + 1) * width + (shape.num_patches + 1) * width + width
    block = (4 + 2 * MLP_RATIO) * width**2 + (4 + MLP_RATIO + 1 + 4) * width  # the last 4: two norms
    classifier = shape.num_classes * (width + 1) if shape.num_classes else 0
    return embedding + num_registers * width + shape.depth * block + 2 * width + classifier


def flops_increase(shape: Shape, num_registers: int) -> float:
    """By which share of the forward pass without registers one with them is dearer; 0.02 is 2 %."""
    return forward_flops(shape, num_registers) / forward_flops(shape) - 1


def parameters_increase(shape: Shape, num_registers: int) -> float:
    """By which share of the parameters without registers there are more; 0.02 is 2 %."""
    return parameters(shape, num_registers) / parameters(shape) - 1
