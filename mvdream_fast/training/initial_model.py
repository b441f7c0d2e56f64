"""The model that a training run begins with: a new one, a trained one in a changed configuration, parts of both."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mvdream_fast.checkpoints.manifest import PARTS, build, manifest, owner
from mvdream_fast.checkpoints.open import Model, load_model, needed, read_stand_ins
from mvdream_fast.core import machine, run_folder
from mvdream_fast.core.errors import ArgumentError, ModelError
from mvdream_fast.core.files import read_lines
from mvdream_fast.models.blocks import zero
from mvdream_fast.models.config import NAMED, with_settings
from mvdream_fast.models.tokenizer import Tokenizer, build_subset_vocabulary
from mvdream_fast.training.flags import Flags
from mvdream_fast.training.prediction import pretrained, with_words

ADDED = re.compile(r"(^|\.)(camera_embed|camera_token|camera_vectors|norm_views|attn_views)\.")  # layers --set may add


def new_model(name: str, vocabulary: list[str], seed: int, settings: Sequence[str] = ()) -> Model:
    """A model of a named configuration, changed by `settings`, with random weights.

    `vocabulary` counts where it has a subset of the rows.
    """
    config = with_settings(NAMED[name], settings)
    if config.text.vocabulary == "subset":
        config = replace(config, text=replace(config.text, vocabulary_size=len(vocabulary)))
    torch.manual_seed(seed)
    model = Model(config, tokenizer=Tokenizer(config.text, vocabulary))
    for part in PARTS:
        setattr(model, part, build(part, config))
    return model


def vocabulary_rows(args: Flags, folder: Path, captions: list[str]) -> list[str]:
    """The rows of a new text tower: a resumed run's own, else those of the captions and of --vocabulary."""
    if args.resume:
        kept = (run_folder.load_latest_meta(folder / "checkpoints") or {}).get("vocabulary")
        if kept:
            return kept
    extra = read_lines(args.vocabulary) if args.vocabulary else []
    return build_subset_vocabulary([*captions, *extra])


def initial_model(args: Flags, folder: Path, captions: list[str]) -> Model:
    """The model to train; a word of the captions is learned, so nothing stands in for it."""
    vocabulary = vocabulary_rows(args, folder, captions)
    model = _model(args, vocabulary)
    if not args.freeze_text:
        model = with_words(model, vocabulary)
    tokenizer, trained = needed(model.tokenizer, "text"), set(re.findall(r"\w+", " ".join(captions).lower()))
    found = read_stand_ins(args.stand_ins) if args.stand_ins else tokenizer.stand_ins
    stand_ins = {word: other for word, other in found.items() if not trained.issuperset(word.split("_"))}
    model.tokenizer = Tokenizer(tokenizer.config, tokenizer.vocabulary, stand_ins)
    return model


def _model(args: Flags, vocabulary: list[str]) -> Model:
    """The model that --init names, or a new one of --config with the autoencoder that --vae names, if it has one."""
    if args.init is not None and args.vae is None:
        return adjusted(pretrained(args.init, args.settings), args.settings, args.seed)
    has_codec = args.config in NAMED and NAMED[args.config].vae.kind == "pixels"
    if args.init is not None or (args.vae is None) != has_codec:
        raise ArgumentError(
            "give one of --init (a whole model) and --vae (an autoencoder, made with --stage vae); neither with "
            "--config pixels, which has no autoencoder"
        )
    model = new_model(args.config, vocabulary, args.seed, args.settings)
    if args.vae is None:
        return _with_text(model, args.text) if args.text else model
    trained = load_model(args.vae, torch.float32, ("vae",))
    made, wanted = trained.config.vae.latent_channels, model.config.unet.in_channels
    if made != wanted:
        raise ModelError(f"{args.vae} has an autoencoder of {made} latent channels; {args.config} needs {wanted}")
    model.config, model.vae = replace(model.config, vae=trained.config.vae), trained.vae
    return _with_text(model, args.text) if args.text else model


def _with_text(model: Model, source: str) -> Model:
    """The new model with a trained text tower and its words; of a deeper one, with as many of its first layers."""
    trained = load_model(source, torch.float32, ("text",))
    text, tokenizer = trained.words()
    made, wanted = trained.config.text.width, model.config.unet.context_dim
    if made != wanted:
        raise ModelError(f"{source} has a text tower of width {made}; the new model needs {wanted}")
    n_layers = min(model.config.text.n_layers, trained.config.text.n_layers)
    model.config = replace(model.config, text=replace(trained.config.text, n_layers=n_layers))
    model.text, model.tokenizer = text.with_layers(n_layers), tokenizer
    return model


def adjusted(model: Model, settings: Sequence[str], seed: int) -> Model:
    """A trained model in a configuration changed by settings.

    Layers that both have keep their weights, those only the old one has are left out, new ones add nothing at first
    (but a camera token: the text attention sees it from the start).
    """
    config = with_settings(model.config, settings)
    for part in PARTS if settings else ():
        if (module := getattr(model, part)) is None:
            continue
        trained, wanted = owner(part, module).state_dict(), manifest(part, config)
        fixed = [name for name in trained.keys() | wanted.keys() if not ADDED.search(name)]
        if any(name not in trained or trained[name].shape != wanted.get(name) for name in fixed):
            raise ArgumentError(f"--set must leave the widths and depths of --init as they are, got "
                                f"{' '.join(settings)}; change them in a new model of --config")  # fmt: skip
        torch.manual_seed(seed)
        with torch.device("cpu" if wanted.keys() - trained.keys() else "meta"):
            changed = build(part, config)
        if part == "unet" and "time" in config.unet.camera_places and "camera_embed.2.weight" not in trained:
            # Where another layer begins at zero, this one must not, or neither learns.
            zero(changed.get_submodule("camera_embed.2"))
        kept = {name: weight for name, weight in trained.items() if name in wanted}
        owner(part, changed).load_state_dict(kept, strict=False, assign=True)
        setattr(model, part, machine.in_format(changed, torch.channels_last))
    model.config = config
    return model
