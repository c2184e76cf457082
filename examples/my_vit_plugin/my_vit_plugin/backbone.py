"""The plug-in: where STA goes in `MyViT`, and where the clips of a batch end."""

from sta_adapter.backbone import Backbone
from sta_adapter.backbones.frames import row_clips

BACKBONE = Backbone(
    name="my_vit",
    encoder_classes=("MyViT",),
    blocks="layers",
    norm="mlp_norm",
    heads=lambda vit: vit.heads,
    layout=lambda call: row_clips(
        len(call.tensor("images")), (call.encoder.size // call.encoder.patch) ** 2, call.clip_lengths, prefix=1
    ),
    separate_frames=True,
    dummy_inputs=lambda vit: ((vit.class_token.new_zeros(2, 3, vit.size, vit.size),), {}),
)
