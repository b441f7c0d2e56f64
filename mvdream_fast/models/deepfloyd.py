"""DeepFloyd IF's first stage: diffusers' UNet, which diffuses 64 x 64 pixels, with what our denoiser asks of one.

Its text tower is in t5.py; the settings below are all that its three sizes have in common, so a folder's JSON is held
against them in checkpoints/deepfloyd.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mvdream_fast.models.config import UNetConfig
from mvdream_fast.models.unet import MultiViewUNet, TextContext, fresh_camera_embedding


def unet_settings(config: UNetConfig) -> dict[str, Any]:
    """What makes a UNet2DConditionModel IF's first stage; where nothing is said, its own defaults hold."""
    widths = [config.model_channels * multiple for multiple in config.channel_mult]
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    return {
        "in_channels": config.in_channels,
        "out_channels": 2 * config.out_channels,
        "block_out_channels": widths,
        "down_block_types": ["SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ["SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        "layers_per_block": config.num_res_blocks,
        "attention_head_dim": config.num_head_channels,
        "norm_num_groups": config.norm_groups,
        "encoder_hid_dim": config.context_dim,
        "encoder_hid_dim_type": "text_proj",
        "cross_attention_dim": widths[-1],
        "cross_attention_norm": "group_norm",
        "addition_embed_type": "text",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    }


class DeepFloydUNet(nn.Module):
    """Predicts the noise in images [B, 3, 64, 64]; what the network says of the variance is dropped.

    Source: Saharia et al. 2022, "Imagen", whose first stage DeepFloyd IF is a form of.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        # The submodule: the package's top level would import every model class.
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        self.config = config
        self.model = UNet2DConditionModel(**unet_settings(config))

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        context: Tensor | TextContext,
        camera: Tensor | None = None,
        n_views: int = 1,
        n_prompts: int = 1,
    ) -> Tensor:
        """One call of the model; see `MultiViewUNet.forward`, whose 2D mode this is.

        Args:
            latents: the noised pixels [B, 3, Hp, Wp].
            context: [G*B, L, Dt], the text tower's states. G is n_prompts, the slowest index.
            camera: [B, 16], after `learn_camera` alone, and then always.

        Returns:
            [G*B, 3, Hp, Wp].

        Raises:
            ValueError: for a camera that it has not learned, or several views that should see each other.
        """
        learned = self.model.class_embedding is not None
        if (camera is not None and not learned) or n_views != 1:
            raise ValueError(
                f"DeepFloydUNet: camera must be None and n_views 1, got {n_views} views"
                f"{' with cameras' if camera is not None else ''}; IF draws single images: ask it in the mode 2d"
            )
        text = context.context if isinstance(context, TextContext) else context
        noised = latents.repeat(n_prompts, 1, 1, 1)
        told = camera.repeat(n_prompts, 1) if camera is not None else None
        times = t.expand(len(latents)).repeat(n_prompts)
        noise, _variance = self.model(noised, times, text, class_labels=told).sample.chunk(2, dim=1)
        return noise.contiguous()

    def learn_camera(self, seed: int = 0) -> None:
        """See `MultiViewUNet.learn_camera`; diffusers' class embedding is what it is."""
        embedding = fresh_camera_embedding(self.config, seed).to(self.model.device)
        # any module that takes class_labels will do; diffusers names its own kinds
        self.model.class_embedding = embedding  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def prepare_context(self, context: Tensor) -> TextContext:
        """The embedding itself: to project it again takes a thousandth of a call."""
        return TextContext(context, ())

    def holding(self, prepared: TextContext) -> tuple[()]:
        """No keys and values, which are prepared for none."""
        return ()


UNet = MultiViewUNet | DeepFloydUNet  # what a denoiser asks
