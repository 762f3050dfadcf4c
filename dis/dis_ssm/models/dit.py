"""DiT, from diffusers, to compare with (imported when it is asked for: that takes seconds)."""

from torch import nn

from dis_ssm.system.extras import declare_torchvision_operators


def dit(
    input_size: tuple[int, int],
    patch_size: int,
    in_channels: int,
    num_classes: int,
    depth: int,
    heads: int,
    head_width: int,
) -> nn.Module:
    """diffusers' DiT with learned sigma (arXiv 2212.09748); no classes become one.

    diffusers gives every block embedders of time and class; here they share one pair, as in the
    paper. The class itself takes squares only.
    """
    declare_torchvision_operators()
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=in_channels,
        out_channels=2 * in_channels,
        num_layers=depth,
        sample_size=max(input_size),
        patch_size=patch_size,
        num_embeds_ada_norm=max(num_classes, 1),
    )
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    return model
