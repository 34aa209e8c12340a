"""Zoom: a second pass over a region at a higher resolution, for the samples that need it (Q-Zoom)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.axes import Axes
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gates.layout import channels_last
from gatecc.ir.program import shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site, Value
from gatecc.ir.sizes import described_shape, on_example
from gatecc.passes.again import again, between
from gatecc.passes.loop.functional import functional
from gatecc.passes.operands import beside, condition, place, stage, static_sizes
from gatecc.passes.samples import over
from gatecc.passes.skipping import skip_for_samples

NEVER = 2.0


class TwoScales(nn.Module):
    """A model of images with a second input, the same images at a higher resolution, which nothing reads yet."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, fine: Tensor) -> Tensor:
        """image: (B, C, H, W), fine: (B, C, H', W') -> what the model makes of the image"""
        found = self.model(image)
        return found if isinstance(found, Tensor) else found.logits


class Twig(nn.Module):
    """Which samples are looked at again, and where: attention of a query over the tokens of a block.

    p = softmax(q·k / sqrt(d)) over the tokens of the grid, q from the mean of all tokens; the region is centred on the
    mean of their places under p; a sample zooms if σ(w·Σ p v + b) >= ``threshold``, a buffer.
    """

    threshold: Tensor
    places: Tensor

    def __init__(self, axes: Axes, channels: int, size: int, grid: tuple[int, int], share: float, start: float) -> None:
        super().__init__()
        self.axes, self.share = axes, share
        self.norm = nn.LayerNorm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, size) for _ in range(3))
        self.gate = nn.Linear(size, 1)
        y, x = ((torch.arange(n) + 0.5) * 2 / n - 1 for n in grid)
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("threshold", torch.tensor(start))

    def looked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: a block's output -> the logit of zooming (B,) and the shares of the places (B, h w)"""
        x = self.norm(channels_last(x, self.axes, {})[0].flatten(1, -2))
        tokens = x[:, x.size(1) - self.places.size(0) :]
        scores = (self.key(tokens) @ self.query(x.mean(1)).unsqueeze(-1)).squeeze(-1)
        p = torch.softmax(scores * self.query.out_features**-0.5, -1)
        return self.gate((p.unsqueeze(1) @ self.value(tokens)).squeeze(1)).squeeze(-1), p

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: a block's output -> which samples zoom (B,) of bool, and the centres of their regions (B, 2), x then y"""
        logit, p = self.looked(x)
        centre = p @ self.places.to(p.dtype)
        return torch.sigmoid(logit.float()) >= self.threshold, centre.clamp(self.share - 1, 1 - self.share)


def cropped(fine: Tensor, image: Tensor, centre: Tensor, share: float) -> Tensor:
    """The region of ``share`` of each side around a centre, at the size of the image.

    fine: (B, C, H', W'), image: (B, C, H, W), centre: (B, 2) in [-1, 1] -> (B, C, H, W)
    """
    y, x = ((torch.arange(n, device=fine.device, dtype=fine.dtype) + 0.5) * 2 / n - 1 for n in image.shape[2:])
    across = centre[:, 0, None, None] + share * x
    down = centre[:, 1, None, None] + share * y.unsqueeze(-1)
    grid = torch.stack(torch.broadcast_tensors(across, down), -1)
    return F.grid_sample(fine, grid.to(fine.dtype), mode="bilinear", padding_mode="border", align_corners=False)


def both(coarse: Tensor, fine: Tensor) -> Tensor:
    """The mean of both passes"""
    return (coarse + fine) / 2


def zoomed(zooms: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
    """y <- the second pass for the samples that zoom, else the first. zooms: (B,)"""
    return torch.where(over(zooms, fine), fine, coarse)


@dataclass(frozen=True)
class Zoom(Rewrite):
    """Let a twig on a block decide, for each sample, whether the model looks at a region again, at a higher resolution.

    The region has ``share`` of each side of the image and lies where the twig's attention does; it is cut out of
    ``fine``, an input (B, C, H', W') with the same images ("" is the image itself), brought to the image's size, and
    goes through the whole model with the same weights. The result is the mean of both passes, or with
    ``joined=False`` the second. ``grid``: rows and columns of the tokens; without, those of a map, or a square behind
    tokens such as [CLS]. With a ``threshold`` above 1, the start, nobody zooms. The second pass runs for the samples
    that zoom alone.
    """

    name = "zoom"

    threshold: float = NEVER
    fine: str = "fine"
    share: float = 0.5
    size: int = 32
    grid: tuple[int, ...] = ()
    joined: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if not 0 < self.share <= 1 or self.size < 1 or len(self.grid) not in (0, 2):
            raise ArgumentError(
                "no region can be looked at like this",
                found=f"share={self.share}, size={self.size}, grid={self.grid}",
                expected="0 < share <= 1, size >= 1, grid=(rows, columns) or ()",
            )
        if self.site.kind != "block":
            raise ArgumentError("a twig grows at a block", found=str(self.site), expected="block[...]")

    def contract(self) -> Contract:
        return identity_at_init() if self.threshold > 1 else changes_function()

    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_cache=True)

    def rewrite(self, site: Site, edit: Editor) -> None:
        value, image = stage(site, "out"), edit.program.placeholders[0]
        logits = self._result(site, edit)
        fine = condition(self.fine, edit.program, value).node if self.fine else image
        _check_images(image, fine, site)
        channels = static_sizes(value).get("c")
        if channels is None or not value.axes.text.startswith("b"):
            raise SiteRefusedError(
                "a twig reads tokens or maps with channels",
                where=place(site),
                found=f"axes {value.axes} of ({described_shape(value.node)})",
                expected="bnc, or a map",
            )
        grid = grid_at_end(value, self.grid, site, edit)
        made = lambda: beside(Twig(value.axes, channels, self.size, grid, self.share, self.threshold), edit)  # noqa: E731
        zooms, centre = edit.call(edit.module("twig", made), value.node, name="twig")
        crop = edit.call(cropped, fine, image, centre, self.share, name="region")
        functional(between(edit.program.graph, {image: image}, (logits,)))
        second = again(edit, {image: crop}, logits)
        inside = set(between(edit.program.graph, {crop: crop}, (second,))) | {crop}
        if self.joined:
            second = edit.call(both, logits, second, name="both")
            inside.add(second)
        chosen = edit.call(zoomed, zooms, second, logits, name="zoomed")
        edit.replace(logits, chosen)
        skip_for_samples(chosen, inside, edit, "the second pass", "leave out what shows the inside (use_cache=False)")

    def _result(self, site: Site, edit: Editor) -> fx.Node:
        models = [s for s in edit.sites if s.kind == "model"]
        found = models[0].find("logits") or models[0].find("out") if models else None
        if found is None:
            raise SiteRefusedError("the model returns no tensor", where=place(site), do="return its logits")
        return found.node


def grid_at_end(value: Value, grid: tuple[int, ...], site: Site, edit: Editor) -> tuple[int, int]:
    """Rows and columns of a block's tokens; the graph holds for this size alone. Raises SiteRefusedError."""
    letters = [a for a in value.axes.positions if a != "b"]
    sizes = [edit.pin(value.node, value.axes.index(a)) for a in letters]
    if len(sizes) == 2 and not grid:
        return sizes[0], sizes[1]
    tokens = sizes[0] if len(sizes) == 1 else 0
    rows, columns = grid or (isqrt(tokens), isqrt(tokens))
    if not 0 < rows * columns <= tokens:
        raise SiteRefusedError(
            "the tokens of the block are no grid",
            where=place(site),
            found=f"axes {value.axes} of ({described_shape(value.node)}), {rows} x {columns} places",
            expected="tokens (b, n, c) with a grid at their end, or a map",
            do="name it: grid=(rows, columns)",
        )
    return rows, columns


def _check_images(image: fx.Node, fine: fx.Node, site: Site) -> None:
    one, other = ([on_example(size) for size in shape(node)] for node in (image, fine))
    if len(one) != 4 or len(other) != 4 or one[:2] != other[:2]:
        raise SiteRefusedError(
            "a region is cut out of the images that the model reads",
            where=place(site),
            found=f"{image.name} ({described_shape(image)}), {fine.name} ({described_shape(fine)})",
            expected="a first input (B, C, H, W), and the same images (B, C, H', W')",
            do="gatecc.train.TwoScales(model) has such an input",
        )
