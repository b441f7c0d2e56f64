"""Where the model lies that a user names: a file, a model folder, a finished run, a snapshot of the hub's cache.

No torch here, so that a command can look at its model first; nothing is read but JSON. What files hold is open.py's.
"""

import json
import re
from pathlib import Path

from mvdream_fast.checkpoints.folder import is_model_folder, read_json
from mvdream_fast.checkpoints.manifest import PARTS, printable
from mvdream_fast.core.errors import ModelError
from mvdream_fast.core.files import read_text
from mvdream_fast.core.run_folder import LATEST
from mvdream_fast.core.schema import is_object

WEIGHTS = Path(__file__).parents[1] / "weights"
EMBEDDED = {"embedded": "mini", "mini": "mini", "pixels": "pixels"}  # names of models that ship -> folders of WEIGHTS
PUBLISHED = ("unet", "vae", "text_encoder")  # the folders of a model in diffusers' layout

_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}\b")
_INDEX = re.compile(r"\.(safetensors|bin)\.index(\.\w+)?\.json$")
_VARIANTS = ("", ".fp32", ".fp16", ".bf16", ".non_ema")  # in the order in which they are taken
_WHERE = (
    "The released weights are on the Hugging Face hub, in the repository MVDream/MVDream: sd-v2.1-base-4view.pt "
    "(5.22 GB) and sd-v1.5-4view.pt (4.27 GB); ashawkey/mvdream-sd2.1-diffusers mirrors the first in fp16. Fetch it "
    "with `hf download MVDream/MVDream sd-v2.1-base-4view.pt --local-dir weights`, convert it once with `python -m "
    "mvdream_fast.convert weights/sd-v2.1-base-4view.pt models/sd21-4view`; the model named embedded needs no download"
)
WHERE_IF = (
    "Accept the licence of DeepFloyd/IF-I-XL-v1.0 (or IF-I-L-v1.0, IF-I-M-v1.0) on the Hugging Face hub, then fetch "
    "the folders unet, text_encoder, tokenizer and scheduler with `hf download DeepFloyd/IF-I-XL-v1.0 --local-dir "
    "models/IF-I-XL --exclude '*.bin'` and name the folder models/IF-I-XL"
)
_NO_MODEL = (
    "is not a model folder: it must hold config.json and the safetensors files that mvdream_fast.convert writes, or "
    "the folders unet, vae and text_encoder; for a released .pt, give the file itself"
)


def embedded_folder(name: str) -> Path | None:
    """Where the model of this name lies that ships with the package; None for a path or another name."""
    return WEIGHTS / EMBEDDED[name] if name in EMBEDDED else None


def find_model(path_or_name: str | Path) -> Path:
    """The file or the folder that holds a model.

    A folder may also be a run of `train` or `dreambooth` (its model is RUN/model), a repository of the hub's cache
    (the snapshot of its main revision), or hold one checkpoint and whatever else.

    Raises:
        ModelError: if nothing is there, the run is not finished, or the folder holds no model or several.
    """
    try:
        embedded = embedded_folder(str(path_or_name))
        path = embedded or Path(path_or_name).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{printable(str(path_or_name))!r} is no path to a model: {error}") from error
    if embedded and not (path / "config.json").exists():
        raise ModelError(
            f"the model {path_or_name} is not part of this installation: {path} holds no model; name another one"
        )
    if not exists:
        raise ModelError(f"there is no model at {printable(str(path.absolute()), 400)}. {_WHERE}")
    return _in_folder(path) if is_folder else path


def stored_config(path_or_name: str | Path) -> dict:
    """config.json of the model of ours that a user names; of DeepFloyd IF's folders, what it would say of cameras and
    sizes; empty where there is none, or another layout. Raises: ModelError where it cannot be one."""
    try:
        place = find_model(path_or_name)
        if is_deepfloyd(place):
            size = read_json(place / "unet" / "config.json").get("sample_size")
            return {"unet": {"camera_in": "none", "view_mixing": "2d"}, "vae": {"image_size": size}}
    except ModelError:
        return {}
    config = read_json(place / "config.json") if is_own(place) else {}
    for part in PARTS:
        if not is_object(config.get(part, {})):
            raise ModelError(f"{place / 'config.json'}: {part} must be an object, got {config[part]!r:.300}")
    return config


def draws_single_images(path_or_name: str | Path) -> bool:
    """Whether the model that a user names knows no cameras, by its `stored_config`."""
    unet = stored_config(path_or_name).get("unet", {})
    return (unet.get("camera_in"), unet.get("view_mixing")) == ("none", "2d")


def is_own(path: Path) -> bool:
    """Whether the folder is of mvdream_fast's layout, or meant to be."""
    parts = any((path / f"{part}.safetensors").exists() for part in PARTS)
    return (parts and (path / "config.json").exists()) or is_model_folder(path)


def is_published(path: Path) -> bool:
    """Whether the folder is of diffusers' layout."""
    return all((path / name).is_dir() for name in PUBLISHED)


def is_deepfloyd(path: Path) -> bool:
    """Whether the folder is DeepFloyd IF's first stage in diffusers' layout, or meant to be.

    Raises: ModelError where it says that it is another stage of it.
    """
    unet, text = (path / "unet").is_dir(), (path / "text_encoder").is_dir()
    if not (unet or text):
        return False
    kind = read_json(path / "model_index.json").get("_class_name")
    if isinstance(kind, str) and re.fullmatch(r"IF\w+Pipeline", kind):
        raise ModelError(f"{path} is of diffusers' {kind}, not IF's first stage (IFPipeline). {WHERE_IF}")
    return kind == "IFPipeline" or (kind is None and unet and text and not (path / "vae").exists())


def _in_folder(folder: Path) -> Path:
    if (folder / "snapshots").is_dir():
        folder = _snapshot(folder)
    if is_own(folder) or is_published(folder) or is_deepfloyd(folder):
        return folder
    kind = read_json(folder / "config.json").get("kind")
    if kind == "sds":
        raise ModelError(f"{folder} is a text-to-3D run, which leaves a 3D object and no model; name the run's model")
    if kind == "dreambooth" or (folder / "checkpoints" / LATEST).exists():
        return _of_run(folder, kind)
    found = sorted(path.name for path in folder.iterdir() if _is_checkpoint(path))
    if len(found) > 1:
        raise ModelError(f"{folder} holds several checkpoints; name one of them: {', '.join(map(printable, found))}")
    if not found:
        raise ModelError(f"{folder} {_NO_MODEL}")
    return folder / found[0]


def _is_checkpoint(path: Path) -> bool:
    if path.name.startswith(".") or _SHARD.search(path.name) or not path.is_file():
        return False
    return path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors") or _INDEX.search(path.name) is not None


def _snapshot(repository: Path) -> Path:
    """The main revision of a repository in the hub's cache, or the only one that is there."""
    names = sorted(path.name for path in (repository / "snapshots").iterdir() if path.is_dir())
    reference = repository / "refs" / "main"
    main = read_text(reference, ModelError).strip() if reference.is_file() else None
    chosen = main if main in names else names[0] if len(names) == 1 else None
    if chosen is None:
        raise ModelError(f"{repository} must hold the snapshot of one revision, got {len(names)}; name the snapshot")
    return repository / "snapshots" / chosen


def _of_run(run: Path, kind: str | None) -> Path:
    """The model that a run of `train` or `dreambooth` left."""
    model, (step, steps) = run / "model", _progress(run, kind)
    if (model / "config.json").exists() and step >= steps:
        return model
    done = f" (step {step} of {steps})" if step < steps else ""
    other = f", or name {model}, the model as it was shown last" if (model / "config.json").exists() else ""
    flag = "--resume-from-checkpoint" if kind == "dreambooth" else "--resume"
    raise ModelError(f"{run} is a run that is not finished{done}: go on with it by {flag}{other}")


def _progress(run: Path, kind: str | None) -> tuple[int, int]:
    """Steps that the run's last checkpoint has seen, and those that it is to have; equal where that cannot be told.

    A stage of DreamBooth3D, a folder without a config.json, may end before its options say.
    """
    from safetensors import SafetensorError, safe_open

    folder = run / "checkpoints"
    try:
        name = Path(read_text(folder / LATEST, ModelError).strip()).name
        with safe_open(folder / name, framework="np") as file:
            meta = json.loads(file.metadata()["meta"])
        if kind is None and meta["kind"] == "dreambooth":
            return 0, 0
        return int(meta["step"]), int(meta["options"]["steps"])
    except (OSError, ModelError, SafetensorError, KeyError, ValueError, TypeError):
        return 0, 0


def weights_of(folder: Path) -> Path:
    """The weights of one part in diffusers' layout: one file, or the index of its shards.

    Any variant is taken that is there, the plain one before the others and safetensors before pickles.

    Raises:
        ModelError: if there is no such file, naming what there is.
    """
    of_text = folder.name == "text_encoder"  # transformers' names, the others are diffusers'
    stem = "model" if of_text else "diffusion_pytorch_model"
    names = {path.name for path in folder.iterdir()}
    for variant in _VARIANTS:
        for start, kind in ((stem, "safetensors"), ("pytorch_model" if of_text else stem, "bin")):
            for name in (f"{start}{variant}.{kind}", f"{start}.{kind}.index{variant}.json"):
                if name in names:
                    return folder / name
    others = sorted(name for name in names if _is_checkpoint(folder / name))
    if len(others) == 1 and _INDEX.search(others[0]) is None:
        return folder / others[0]
    there = ", ".join(map(printable, sorted(names)[:6])) or "nothing"
    raise ModelError(
        f"{folder} must hold {stem}.safetensors, a variant of it (.fp16, .bf16, .non_ema), its shards with their "
        f"index, or the same as .bin; got {there}"
    )
