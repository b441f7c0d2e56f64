"""The multi-view UNet: Stable Diffusion's, with self-attention over all views of a scene and a camera embedding.

Its blocks are in blocks.py. Parameter names and numbers are those of the released MVDream checkpoints.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.machine import in_format
from mvdream_fast.models import functional as fn
from mvdream_fast.models.blocks import (
    Conditions,
    Downsample,
    KeysValues,
    MultiViewTransformer,
    ResBlock,
    TransformerBlock,
    Upsample,
    zero,
)
from mvdream_fast.models.config import UNetConfig
from mvdream_fast.models.plain import is_plain
from mvdream_fast.ops import MLP, camera_embedding, time_camera_embedding
from mvdream_fast.ops.time_camera_embedding import sinusoid

OP = "MultiViewUNet"
Indexed = TypeVar("Indexed", ResBlock, MultiViewTransformer)


@dataclass(frozen=True)
class TextContext:
    """A prompt's embedding [B, L, Dt] with the keys and values of every text attention; made by `prepare_context`.

    They are used while the weights they came from are unchanged and nothing is differentiated; otherwise the UNet goes
    back to the embedding. Writes through `parameter.data` escape this watch: prepare again after those.

    made_from: None where the caller has looked whether they hold, as a graph's caller must (`MultiViewUNet.holding`).
    """

    context: Tensor
    pairs: tuple[KeysValues, ...] = field(repr=False)
    made_from: "_Snapshot | None" = field(repr=False, default=None)


class MultiViewUNet(nn.Module):
    """Predicts the noise (or v) in latents of V views of each scene, views fastest in the batch.

    With `n_views=1` and no camera it is the plain 2D model. Without autograd it works in place on its own tensors and
    keeps the weights of layers that read the same input in common storage; a hook that keeps what it is given has to
    copy it. Layers are called, or have their weights read where they are plain (plain.py), so that hooks on them and
    forwards of their own count; those on what only holds layers (Attention, FeedForward, most Sequentials) don't.
    `gradient_checkpointing` trades time for memory in training.

    Raises: ModelError for a configuration whose channels do not divide into groups and heads.
    Source: Shi et al. 2023, "MVDream", section 3; Rombach et al. 2022 for the 2D model.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        _check_config(config)
        self.config = config
        self.gradient_checkpointing = False
        emb = config.time_embed_dim
        self.time_embed = _mlp(config.model_channels, emb)
        if config.camera_places:
            self.camera_embed = _mlp(config.camera_dim, emb)
        if "text" in config.camera_places:
            self.camera_token = nn.Linear(emb, config.context_dim)
        if config.input_skip:
            # c_skip of Karras et al. 2022, learned. Channels of little variance are nearly all noise at nearly all
            # times, and what is best said of them is a multiple of the input.
            self.skip_scale = zero(nn.Linear(emb, config.in_channels))
        self._build()
        self._res_blocks = _indexed(self, ResBlock)
        self._transformers = _indexed(self, MultiViewTransformer)
        self.register_load_state_dict_post_hook(_channels_last)
        _channels_last(self)

    def _build(self) -> None:
        """The two arms and the middle; an arm's skip connections are its outputs, last in, first out."""
        config = self.config
        width, factor, skips = config.model_channels, 1, [config.model_channels]
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(config.in_channels, width, 3, padding=1)])])
        for level, multiple in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(self._stage(width, multiple * config.model_channels, factor))
                width = multiple * config.model_channels
                skips.append(width)
            if level < len(config.channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)
                factor *= 2
        around = (self._res_block(width, width) for _ in range(2))
        self.middle_block = nn.ModuleList([next(around), self._transformer(width), next(around)])
        self.output_blocks = nn.ModuleList()
        for level, multiple in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                stage = self._stage(width + skips.pop(), multiple * config.model_channels, factor)
                width = multiple * config.model_channels
                if level > 0 and i == config.num_res_blocks:
                    stage.append(Upsample(width))
                    factor //= 2
                self.output_blocks.append(stage)
        conv = zero(nn.Conv2d(width, config.out_channels, 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(config.norm_groups, width), nn.SiLU(), conv)

    def _stage(self, channels: int, out_channels: int, factor: int) -> nn.ModuleList:
        stage = nn.ModuleList([self._res_block(channels, out_channels)])
        if factor in self.config.attention_resolutions:
            stage.append(self._transformer(out_channels))
        return stage

    def _res_block(self, channels: int, out_channels: int) -> ResBlock:
        return ResBlock(channels, self.config.time_embed_dim, out_channels, self.config.norm_groups)

    def _transformer(self, channels: int) -> MultiViewTransformer:
        heads = self.config.num_heads or channels // (self.config.num_head_channels or channels)
        return MultiViewTransformer(channels, heads, channels // heads, self.config)

    def forward(
        self,
        latents: Tensor,
        t: Tensor,
        context: Tensor | TextContext,
        camera: Tensor | None = None,
        n_views: int = 1,
        n_prompts: int = 1,
    ) -> Tensor:
        """One call of the model.

        For guidance, `n_prompts=2` with the contexts of both prompts predicts for both from one set of latents, and
        does what comes before the first text attention once. It equals a call with everything repeated.

        Args:
            latents: [B*V, C, h, w]; h and w divisible by the down-sampling of the lowest level.
            t: [B*V] or a scalar tensor, diffusion steps.
            context: [G*B, L, Dt] shared by the views of a scene, [G*B*V, L, Dt], or what `prepare_context` made of
                either. G is n_prompts, the slowest index.
            camera: [B*V, 16] flattened camera-to-world matrices; None leaves the camera embedding out.
            n_views: V, must divide the batch.
            n_prompts: G.

        Returns:
            [G*B*V, C_out, h, w], contiguous.

        Raises:
            ValueError, TypeError: shapes, n_views, dtypes.
        """
        prepared = context if isinstance(context, TextContext) else None
        text = context.context if isinstance(context, TextContext) else context
        self._check(latents, t, text, camera, n_views, n_prompts)
        conditions, embs = self._conditions(t, len(latents), text, camera, n_views, n_prompts)
        pairs = self._prepared_pairs(prepared)

        def run(stage: nn.Module, h: Tensor) -> Tensor:
            for layer in stage.children():
                if isinstance(layer, ResBlock):
                    h = self._call(layer, h, embs[layer.index])
                elif isinstance(layer, MultiViewTransformer):
                    h = self._call(layer, h, conditions, pairs[layer.index])
                else:
                    h = fn.conv3x3(layer, h) if isinstance(layer, nn.Conv2d) else layer(h)
            return h

        h, skips = latents.contiguous(memory_format=torch.channels_last), []
        for stage in self.input_blocks:
            h = run(stage, h)
            skips.append(h)
        h = run(self.middle_block, h)
        for stage in self.output_blocks:
            h = run(stage, torch.cat([h, fn.widen(skips.pop(), len(h))], dim=1))
        out = fn.conv3x3(self.out[2], fn.group_norm(self.out[0], h))
        if self.config.input_skip:
            out = out + embs[-1][:, :, None, None] * fn.widen(latents, len(out))
        return out.contiguous()

    def learn_camera(self, seed: int = 0) -> None:
        """Puts a fresh camera embedding, added to that of the time, in the place of what it had of one.

        Its last layer is zero, so that whatever camera it is told, its answers are at first those of 2D mode.
        """
        self.config = dataclasses.replace(self.config, camera_in="time")
        self.camera_embed = fresh_camera_embedding(self.config, seed).to(next(self.out.parameters()).device)

    @torch.no_grad()
    def prepare_context(self, context: Tensor) -> TextContext:
        """Keys and values of every text attention for [B, L, Dt] or [B*V, L, Dt], to be passed as forward's `context`.

        Once per prompt: they depend on neither the step nor the view. No gradient flows through them.
        """
        pairs = tuple(block.attn2.keys_values(context) for block in self._text_blocks())
        return TextContext(context, pairs, _Snapshot(self._text_sources(context)))

    def _text_blocks(self) -> list[TransformerBlock]:
        blocks = (block for transformer in self._transformers for block in transformer.transformer_blocks)
        return [block for block in blocks if isinstance(block, TransformerBlock)]

    def _text_sources(self, context: Tensor) -> list[Tensor] | None:
        """All that text keys and values depend on; None where a layer isn't plain, and may be switched unseen."""
        projections = [m for block in self._text_blocks() for m in (block.attn2.to_k, block.attn2.to_v)]
        plain = [m for m in projections if is_plain(m, nn.Linear)]
        return [context, *(m.weight for m in plain)] if len(plain) == len(projections) else None

    def holding(self, prepared: TextContext) -> tuple[KeysValues, ...]:
        """The prepared keys and values; none where the weights they came from have changed, or may have."""
        holds = prepared.made_from is None or prepared.made_from.holds(self._text_sources(prepared.context))
        return prepared.pairs if holds else ()

    def _prepared_pairs(self, prepared: TextContext | None) -> tuple[KeysValues | None, ...]:
        """The prepared keys and values of each transformer; None each where they do not hold (any more)."""
        pairs = () if prepared is None or torch.is_grad_enabled() else self.holding(prepared)
        return pairs or (None,) * len(self._transformers)

    def _call(self, layer: nn.Module, *args) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Nothing in a layer is random, and a graph under capture has no state of random numbers to keep.
            return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)
        return layer(*args)

    def _camera_embedding(self, camera: Tensor | None) -> Tensor | None:
        """[B*V, E]. Not kept from call to call: it is a thousandth of one, and writes through `parameter.data`, as of
        an average of weights, would be seen by nobody."""
        if camera is None or not self.config.camera_places:
            return None
        weights = _weights(self.camera_embed)
        if weights is None:
            return self.camera_embed(camera.to(self._dtype))
        return camera_embedding(camera, weights)

    def _conditions(
        self, t: Tensor, batch: int, context: Tensor, camera: Tensor | None, n_views: int, n_prompts: int
    ) -> tuple[Conditions, tuple[Tensor, ...]]:
        """What all blocks share, and what each ResBlock adds, and the input's factors: a row per image and prompt."""
        wide, where = batch * n_prompts, self.config.camera_places
        camera_emb = self._camera_embedding(camera)
        embs = self._embeddings(t, batch, camera_emb if "time" in where else None)
        tokens = None
        if camera_emb is not None:
            camera_emb = fn.widen(camera_emb, wide)
            tokens = self.camera_token(camera_emb)[:, None] if "text" in where else None
        conditions = Conditions(wide, n_views, context, camera_emb if "attention" in where else None, tokens)
        widths = [block.out_channels for block in self._res_blocks]
        widths += [self.config.in_channels] if self.config.input_skip else []
        return conditions, fn.widen(embs, wide).split(widths, dim=-1)

    def _embeddings(self, t: Tensor, batch: int, camera_emb: Tensor | None) -> Tensor:
        """What all ResBlocks add and the input's factors, side by side: [B*V, sum of widths], in one GEMM."""
        t, weights = t.expand(batch), _weights(self.time_embed)
        plain = [_projection(block.emb_layers) for block in self._res_blocks]
        plain += [self.skip_scale if is_plain(self.skip_scale, nn.Linear) else None] if self.config.input_skip else []
        projections = [m for m in plain if m is not None]
        if weights is None or len(projections) < len(plain):
            return self._embeddings_by_layers(t, camera_emb)
        return time_camera_embedding(
            t,
            None,
            weights,
            None,
            fn.packed([m.weight for m in projections]),
            fn.packed([m.bias for m in projections]),
            camera_embedding=camera_emb,
        )

    def _embeddings_by_layers(self, t: Tensor, camera_emb: Tensor | None) -> Tensor:
        """`_embeddings` where a layer has to be called; t [B*V]."""
        emb = self.time_embed(sinusoid(t, self.config.model_channels, self._dtype))
        emb = emb if camera_emb is None else emb + camera_emb.to(emb.dtype)
        parts = [block.emb_layers(emb) for block in self._res_blocks]
        parts += [self.skip_scale(F.silu(emb))] if self.config.input_skip else []
        return torch.cat(parts, dim=-1)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.out[2].parameters()).dtype

    def _check(
        self, latents: Tensor, t: Tensor, context: Tensor, camera: Tensor | None, n_views: int, n_prompts: int
    ) -> None:
        config = self.config
        batch = latents.shape[0] if latents.ndim else 0
        if latents.ndim != 4 or latents.shape[1] != config.in_channels:
            _refuse("latents", f"[B*V, {config.in_channels}, h, w]", tuple(latents.shape), "see config.in_channels")
        factor = 2 ** (len(config.channel_mult) - 1)
        if latents.shape[2] % factor or latents.shape[3] % factor:
            _refuse(
                "latents", f"of height and width divisible by {factor}", tuple(latents.shape[2:]), "pad or crop them"
            )
        if n_views < 1 or batch % n_views:
            _refuse("n_views", f"a divisor of the batch of {batch}", n_views, "views are the fastest batch index")
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, batch)):
            _refuse("t", f"a scalar or [{batch}]", tuple(t.shape), "one step per image")
        scenes = batch // n_views
        if n_prompts < 1:
            _refuse("n_prompts", "at least 1", n_prompts, "2 is guidance")
        rows = (n_prompts * scenes, n_prompts * batch)
        if context.ndim != 3 or context.shape[2] != config.context_dim or context.shape[0] not in rows:
            wanted = f"[{rows[0]} or {rows[1]}, L, {config.context_dim}]"
            _refuse(
                "context", wanted, tuple(context.shape), "one row per scene or per image, of the text tower's width"
            )
        if camera is not None and camera.shape != (batch, config.camera_dim):
            wanted = f"[{batch}, {config.camera_dim}]"
            _refuse("camera", wanted, tuple(camera.shape), "one flattened camera per image, or None for 2D mode")
        dtype = self._dtype
        for name, x in (("latents", latents), ("context", context)):
            if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
                _refuse(name, f"{dtype} as the weights", x.dtype, f"convert it with .to({dtype})", TypeError)


def _refuse(argument: str, requirement: str, got: object, remedy: str, error: type[Exception] = ValueError) -> None:
    raise error(f"{OP}: {argument} must be {requirement}, got {got}; {remedy}")


def _check_config(config: UNetConfig) -> None:
    if (config.num_heads is None) == (config.num_head_channels is None):
        raise ModelError(f"{OP}: exactly one of num_heads and num_head_channels must be set, got "
                         f"{config.num_heads} and {config.num_head_channels}; set the other to null")  # fmt: skip
    for multiple in config.channel_mult:
        channels = multiple * config.model_channels
        for name in ("norm_groups", "num_heads", "num_head_channels"):
            part = getattr(config, name)
            if part is not None and (part < 1 or channels % part):
                raise ModelError(
                    f"{OP}: {name} must divide the {channels} channels of a level, got {part}; change either"
                )


def _indexed(root: MultiViewUNet, kind: type[Indexed]) -> tuple[Indexed, ...]:
    """All modules of a kind in the order of use, each told its index: where its slice of a shared GEMM lies."""
    arms = (root.input_blocks, root.middle_block, root.output_blocks)
    found = tuple(module for arm in arms for module in arm.modules() if isinstance(module, kind))
    for index, module in enumerate(found):
        module.index = index
    return found


def _channels_last(module: nn.Module, _: object = None) -> None:
    in_format(module, torch.channels_last)


def _mlp(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, out_channels), nn.SiLU(), nn.Linear(out_channels, out_channels))


def fresh_camera_embedding(config: UNetConfig, seed: int = 0) -> nn.Sequential:
    """Weights of an embedding of [B*V, 16] cameras beside that of the time; it begins as nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = _mlp(config.camera_dim, config.time_embed_dim)
    zero(fresh[2])
    return fresh


def _weights(mlp: nn.Sequential) -> MLP | None:
    """Those of Linear - SiLU - Linear; None where it is more than that, and has to be called."""
    if not is_plain(mlp, nn.Sequential) or len(mlp) != 3:
        return None
    first, between, last = mlp
    if not (is_plain(first, nn.Linear) and is_plain(between, nn.SiLU) and is_plain(last, nn.Linear)):
        return None
    return MLP(first.weight, first.bias, last.weight, last.bias)


def _projection(layers: nn.Sequential) -> nn.Linear | None:
    """The Linear of SiLU - Linear; None where it is more than that, and has to be called."""
    if not is_plain(layers, nn.Sequential) or len(layers) != 2:
        return None
    first, last = layers
    return last if is_plain(first, nn.SiLU) and is_plain(last, nn.Linear) else None


class _Snapshot:
    """What a cached result was made from: which tensors, seen how, at which version of their contents."""

    def __init__(self, tensors: list[Tensor] | None):
        self.key = _key(tensors)
        # Kept alive, so that a new tensor cannot take an old one's address and pass for it.
        self.alive = None if self.key is None or tensors is None else [x.detach() for x in tensors]

    def holds(self, tensors: list[Tensor] | None) -> bool:
        return self.key is not None and self.key == _key(tensors)


def _key(tensors: list[Tensor] | None) -> tuple | None:
    """Equal as long as the tensors were not replaced or written to; None where that cannot be told."""
    if torch.compiler.is_compiling() or tensors is None:
        return None
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_inference() for x in tensors):
        return None
    device = tensors[0].device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # which torch refuses to answer for the meta device
    cast = torch.get_autocast_dtype(device) if on else None
    return (cast, *((x.data_ptr(), x._version, x.dtype, x.shape, x.stride()) for x in tensors))
