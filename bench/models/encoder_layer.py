"""The training step of one Transformer encoder layer."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import torch
from torch import nn

from .. import providers
from ..case import Function, Shape, Tensors, Variant, Verdict, Work
from ..workload import Workload
from .bound import WITHOUT_DROPOUT, Bound, match_of_layers, parameter_bytes, parameters_of


@dataclasses.dataclass(frozen=True)
class EncoderLayerVariant(Variant):
    """A layer of ``width`` with heads of 64 and a feed-forward of four times the width."""

    name: str
    op: str = "encoder_layer"
    width: int = 1024
    head_dim: int = 64
    norm_first: bool = False
    dropout_p: float = 0.0

    def small(self) -> EncoderLayerVariant:
        return dataclasses.replace(self, width=32, head_dim=16)

    def module(self, layers: ModuleType, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """layers: torch.nn or whatever has its constructors."""
        return layers.TransformerEncoderLayer(
            *(self.width, self.width // self.head_dim, 4 * self.width, self.dropout_p, "gelu"),
            batch_first=True,
            norm_first=self.norm_first,
            dtype=dtype,
            device=device,
        )

    def function(self, module: nn.Module, call: nn.Module) -> Function:
        """call: the module, or what a compiler made of it."""

        def step(tensors: Tensors) -> torch.Tensor:
            module.train(WITHOUT_DROPOUT not in tensors)
            return call(tensors["src"])

        return Bound(module, step)

    def tensors(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        src = torch.randn(*shape, self.width, device=device).to(dtype).requires_grad_()
        return {"src": src, **parameters_of(self.module(nn, dtype, device), trained=True)}

    def work(self, shape: Shape, tensors: Tensors, direction: str) -> Work:
        """The products: four of width x width and two of four times that for each token, attention's two
        forward and five backward. Input, output and parameters once."""
        batch, length = shape
        tokens = batch * length
        dense = 2 * tokens * 12 * self.width**2
        product = 2 * batch * length**2 * self.width
        rows, parameters = tensors["src"].nbytes, parameter_bytes(tensors)
        forward = Work(2 * rows + parameters, dense + 2 * product)
        backward = Work(3 * rows + 2 * parameters, 2 * dense + 5 * product)
        assert forward.flops is not None and backward.flops is not None
        both = Work(forward.bytes + backward.bytes, forward.flops + backward.flops, tokens)
        return {"forward": forward, "backward": backward, "both": both}[direction]

    def match(self, function: Function, shape: Shape, tensors: Tensors) -> Verdict:
        """One sequence, of a length at which float64 stores the scores; without dropout."""
        few = {**tensors, "src": tensors["src"][:1, :512].detach().requires_grad_()}
        few[WITHOUT_DROPOUT] = torch.empty(0)
        module = self.module(nn, few["src"].dtype, few["src"].device)
        verdict = match_of_layers(function, self.function(module, module), few, layers=1)
        if self.dropout_p > 0:
            return verdict._replace(detail=f"without dropout: {verdict.detail}")
        return verdict


WORKLOAD = Workload(
    name="encoder_layer",
    sizes=("batch", "length"),
    swept="length",
    bound="matmul",
    variants=(
        EncoderLayerVariant("post-norm"),
        EncoderLayerVariant("pre-norm", norm_first=True),
        EncoderLayerVariant("post-norm, dropout", dropout_p=0.1),
    ),
    shapes=((8, 2048), (32, 512)),
    small_shapes=((2, 24),),
    providers=providers.LAYERS,
)
