"""Patches of an image; the model asks its grid alone for geometry, so clips of frames run too."""

import pytest
import torch
from einops import rearrange
from torch import nn

from dis_ssm.models.config import DiSConfig
from dis_ssm.models.dis import DiS
from dis_ssm.models.patches import PatchGrid


class ClipGrid(PatchGrid):
    """The patches of a clip, sides (T, H, W), patch (o, p, q)."""

    def embedding(self, in_channels, dim):
        return nn.Conv3d(in_channels, dim, self.patch, stride=self.patch)

    def unpatchify(self, h):
        sizes = dict(zip("thwopq", (*self.cells, *self.patch), strict=True))
        return rearrange(h, "b (t h w) (o p q c) -> b c (t o) (h p) (w q)", **sizes)


@pytest.fixture
def clips(monkeypatch):
    """A DiS of clips of 4 frames of 8x6, two frames a patch."""
    grid = ClipGrid((4, 8, 6), (2, 2, 2))
    monkeypatch.setattr(DiSConfig, "grid", property(lambda self: grid))
    torch.manual_seed(0)
    model = DiS(in_channels=3, hidden_size=16, depth=3, num_classes=5)
    nn.init.normal_(model.decoder.linear.weight)
    return model


def test_a_model_of_clips_runs_forward_and_backward(clips):
    x = torch.randn(2, 3, 4, 8, 6, requires_grad=True)
    t, y = torch.tensor([3.0, 700.0]), torch.tensor([0, 4])
    out = clips(x, t, y)
    assert out.shape == (2, 6, 4, 8, 6)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clips.parameters())
    assert x.grad.flatten(1).abs().sum(1).gt(0).all()


def test_a_model_of_clips_tells_what_it_takes(clips):
    with pytest.raises(ValueError, match=r"x must be \(batch, 3, 4, 8, 6\), got \(2, 3, 8, 6\)"):
        clips(torch.randn(2, 3, 8, 6), torch.zeros(2), torch.zeros(2, dtype=torch.long))


def test_frames_go_back_to_where_they_came_from(clips):
    x = torch.randn(1, 3, 4, 8, 6)
    tokens = rearrange(x, "b c (t o) (h p) (w q) -> b (t h w) (o p q c)", o=2, p=2, q=2)
    assert clips.grid.unpatchify(tokens).equal(x)
    assert len(clips.grid) == tokens.shape[1] and str(clips.grid) == "4x8x6 in patches of 2x2x2"


def test_tokens_go_along_rows():
    grid = PatchGrid.of((4, 6), 2)
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    tokens = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # (1, J, p q)
    assert grid.unpatchify(tokens).equal(x)
    assert grid.cells == (2, 3) and len(grid) == 6 and grid.patch_area == 4


def test_resized_rows_keep_a_constant_and_a_ramp():
    old, new = PatchGrid.of(8, 2), PatchGrid.of((16, 12), 2)
    across = torch.arange(4.0).repeat(4)[None, :, None]  # a ramp along the width
    rows = new.resize(torch.cat([torch.ones_like(across), across], dim=-1), old).reshape(8, 6, 2)
    assert rows[..., 0].allclose(torch.ones(8, 6))
    assert rows[0, :, 1].diff().gt(0).all() and rows[:, 3, 1].allclose(rows[0, 3, 1].expand(8))


@pytest.mark.parametrize(
    ("size", "patch", "message"),
    [
        (9, 2, "patch_size 2 does not divide the input size 9x9"),
        ((8, 0), 2, "width must be at least 1"),
        (8, 0, "patch_size must be at least 1"),
    ],
)
def test_refused(size, patch, message):
    with pytest.raises(ValueError, match=message):
        PatchGrid.of(size, patch)
