"""DINOv2, with registers or without: frames come as the batch, and whoever calls must tell the clips."""

from __future__ import annotations

from torch import nn

from sta_adapter.backbones.frames import attention_heads, picture_dummy, pixel_layout, pixel_positions
from sta_adapter.injection.backbone import Backbone, LoRARecipe, number_of


def leading_tokens(encoder: nn.Module) -> int:
    """The class token and the registers."""
    return 1 + number_of(encoder.config, "num_register_tokens", default=0)


# Versions of transformers and sizes of the model differ in their names: query or q_proj, fc1 or a gated MLP.
DINO_LORA = LoRARecipe(
    target_modules=(
        *("attention.query", "attention.key", "attention.value", "attention.output.dense"),
        *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        *("mlp.fc1", "mlp.fc2", "mlp.weights_in", "mlp.weights_out", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    rank_pattern={r"attention\.(query|key|value|[qkv]_proj)": 32},
    alpha_pattern={r"attention\.(query|key|value|[qkv]_proj)": 32},
)

BACKBONE = Backbone(
    name="dinov2",
    encoder_classes=("Dinov2Model", "Dinov2Backbone", "Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
    layout=pixel_layout(prefix=leading_tokens),
    separate_frames=True,
    heads=attention_heads,
    blocks="encoder.layer",
    lora=DINO_LORA,
    dummy_inputs=picture_dummy,
    positions=pixel_positions,
)
