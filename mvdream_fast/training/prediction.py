"""The model that a training goes on from: what its UNet predicts where nothing says so, and rows for new words."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from mvdream_fast.checkpoints.open import Model, load_model, needed, not_ours, open_source
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.models.tokenizer import Tokenizer

EPS, V = 0.7, 0.4  # the cosine of output and input: noise is predicted above the one, v below the other


def pretrained(path: str, settings: Sequence[str]) -> Model:
    """A whole model in float32, Stable Diffusion's own with new camera layers.

    Stable Diffusion 2's flat files come in two kinds, SD 2.1-base predicts noise and SD 2.1 for 768 pixels v, and are
    otherwise alike. What is found is printed; `settings` (of --set) go before it.

    Raises:
        ModelError: if there is no such model, or it does not say and the UNet's output leaves it open.
    """
    source = open_source(path, add_cameras=True)
    if source.config.foreign:
        raise not_ours(source.config)
    model = load_model(source, torch.float32)
    if source.says_prediction or any(setting.startswith("schedule.prediction=") for setting in settings):
        return model
    found = likeness(model)
    if V < found < EPS:
        raise ModelError(
            f"{path} does not say whether its UNet predicts noise or v, and its output leaves it open (at the last "
            f"timestep its cosine with the noise is {found:.2f}); add --set schedule.prediction=eps or =v"
        )
    prediction, word = ("eps", "noise") if found >= EPS else ("v", "v")
    print(
        f"{path} does not say what its UNet predicts; it is {word}, by its output at the last timestep (cosine with "
        f"the noise {found:.2f}); --set schedule.prediction=... goes before this",
        flush=True,
    )
    model.config = replace(model.config, schedule=replace(model.config.schedule, prediction=prediction))
    return model


@torch.no_grad()
def likeness(model: Model) -> float:
    """The cosine of the UNet's output and its input, pure noise at the last timestep without a text.

    There hardly anything is left of an image (a share of 0.068 in Stable Diffusion's schedule): what predicts noise
    returns its input, and what predicts v, alpha * noise - sigma * image, gives the mean image.
    """
    size, config = model.config.latent_size, model.config
    noise = Stream(0, 0, "prediction").normal(1, config.unet.in_channels, size, size)
    unet, (text, tokenizer) = needed(model.unet, "unet"), model.words()
    out = unet(noise, torch.tensor(config.schedule.n_timesteps - 1), text(tokenizer.encode("").ids))
    return F.cosine_similarity(out.flatten(), noise.flatten(), dim=0).item()


@torch.no_grad()
def with_words(model: Model, vocabulary: Sequence[str]) -> Model:
    """The model with rows for those lines of a subset vocabulary that its own has not: small random vectors, for a
    text tower that goes on learning. Of CLIP's whole vocabulary nothing is missing."""
    text, tokenizer = model.words()
    new = [line for line in vocabulary if line not in set(tokenizer.vocabulary)]
    if tokenizer.config.vocabulary != "subset" or not new:
        return model
    spread = text.model.embeddings.token_embedding.weight.std()
    text = text.with_rows(Stream(0, len(new), "new words").normal(len(new), tokenizer.config.width) * spread)
    words = Tokenizer(text.config, [*tokenizer.vocabulary, *new], tokenizer.stand_ins)
    return replace(model, config=replace(model.config, text=text.config), text=text, tokenizer=words)
