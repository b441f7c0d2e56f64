"""The text tower: transformers' CLIPTextModel, run to the layer that the diffusion model was trained on.

Reading checkpoints lives in checkpoints/, the tokenizer in tokenizer.py (its names are offered here too).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from mvdream_fast.models.config import TextConfig
from mvdream_fast.models.tokenizer import CLIP_ROWS, Encoded, Tokenizer, check_prompt

__all__ = ["Encoded", "TextEncoder", "Tokenizer", "check_prompt"]


class TextEncoder(nn.Module):
    """Token ids to the per-token states that the UNet attends to: causal transformer, then the final norm.

    Only `n_layers - skip_last` layers exist; for SD 2.1 those are 23 of ViT-H's 24 ("penultimate"). Padding is
    attended to like any token, as in training.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel

        self.config = config
        start, end = (CLIP_ROWS - 2, CLIP_ROWS - 1) if config.vocabulary == "clip" else (1, 2)
        hf = CLIPTextConfig(
            vocab_size=config.vocabulary_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            projection_dim=config.width,
            num_hidden_layers=config.n_layers - config.skip_last,
            num_attention_heads=config.n_heads,
            max_position_embeddings=config.context_length,
            hidden_act=config.activation,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=0,
        )
        self.model = CLIPTextModel(hf)
        # A buffer outside of the state dict: on the CPU even where the weights are built on the meta device.
        positions = torch.arange(config.context_length, device="cpu").expand(1, -1)
        self.model.embeddings.register_buffer("position_ids", positions, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """States after the final norm.

        Args:
            ids: token ids, int64 [B, L], L at most the context length.

        Returns:
            [B, L, width].

        Raises:
            ValueError: if ids is not [B, L] with 1 <= L <= context_length.
        """
        limit = self.config.context_length
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= limit:
            raise ValueError(f"TextEncoder: ids must be [B, L] with L from 1 to {limit}, got {tuple(ids.shape)}")
        return self.model(input_ids=ids).last_hidden_state

    @torch.no_grad()
    def with_token(self, like: Tensor) -> "TextEncoder":
        """A copy of the tower with one more embedding row, the mean of the rows `like` (int64 [n]); see Tokenizer."""
        weight = self.model.embeddings.token_embedding.weight
        return self.with_rows(weight[like.to(weight.device)].float().mean(0, keepdim=True))

    @torch.no_grad()
    def with_rows(self, rows: Tensor) -> "TextEncoder":
        """A copy of the tower with more embedding rows [n, width] behind its own."""
        weight = self.model.embeddings.token_embedding.weight
        state = self.model.state_dict()
        state["embeddings.token_embedding.weight"] = torch.cat([weight, rows.to(weight)])
        with torch.device("meta"):
            grown = TextEncoder(replace(self.config, vocabulary_size=len(weight) + len(rows)))
        grown.model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        return grown.train(self.training)

    def with_layers(self, n_layers: int) -> "TextEncoder":
        """The first layers of the tower and its final norm, sharing its weights; to be trained on."""
        with torch.device("meta"):
            lower = TextEncoder(replace(self.config, n_layers=n_layers))
        kept = {name: tensor for name, tensor in self.model.state_dict().items() if name in lower.model.state_dict()}
        lower.model.load_state_dict(kept, assign=True)
        return lower.train(self.training)
