"""What no text-to-3D run can be made of, as one sentence each, for the command and the library alike; no torch here."""

from collections.abc import Mapping

from mvdream_fast.core.errors import ArgumentError
from mvdream_fast.core.ramp import is_ever_on
from mvdream_fast.distill.config import VSD_ALONE, SDSConfig, check_learning, check_stages, settings_of, typed
from mvdream_fast.models.tokenizer import check_prompt


def check_config(config: SDSConfig, names: Mapping[str, str] | None = None, given: bool = False) -> None:
    """Raises ArgumentError for numbers that no run can use. names: what the user wrote for a setting, as a flag. given:
    the first stage is handed something, too."""
    check_stages(config, given)
    names, learns = names or {}, any(stage.guidance.kind == "vsd" for stage in config.stages)
    for stage in config.stages:
        of_others = VSD_ALONE if learns and stage.guidance.kind != "vsd" else ()
        _check_stage(stage, {name: flag for name, flag in names.items() if name not in of_others})


def _check_stage(config: SDSConfig, names: Mapping[str, str]) -> None:
    settings = settings_of(config)
    typed(settings, "", ArgumentError, names)
    if config.mode == "2d" and config.method == "reconstruct":
        raise ArgumentError("--mode must be 3d with --method reconstruct, whose views are sampled together, got 2d")
    check_learning(config, names)
    for name in ("render_size", "n_groups"):
        if len(settings[name]) != len(config.milestones) + 1:
            raise ArgumentError(
                f"{name} must have one entry more than milestones {config.milestones}, got {settings[name]}"
            )
    if list(config.milestones) != sorted(config.milestones):
        raise ArgumentError(f"milestones must grow, got {config.milestones}")
    for name in ("distance_range", "fovy_range_deg", "elevation_range_deg"):
        low, high = settings[name]
        if low > high:
            raise ArgumentError(f"{names.get(name, name)} must be low, then high, got {low} and {high}")
    weight = settings.get("lambda_orient", (0.0, 0.0, 0.0, 0.0))
    if is_ever_on(weight) and not config.shading:
        raise ArgumentError(
            f"lambda_orient must be 0 throughout without shading, which alone makes the normals that it is a loss of, "
            f"got {tuple(weight)}; add --shading (with a weight of its own), or shading = true to the settings file"
        )
    check_guidance(config)
    check_prompt(config.negative_prompt, allow_empty=True)
    check_prompt(config.suffix, allow_empty=True)


def check_guidance(config: SDSConfig) -> None:
    """Raises ArgumentError for settings of guidance that have no meaning together."""
    guidance, mode = config.guidance, config.mode
    if guidance.weighting != "sds" and guidance.kind == "sds" and guidance.loss == "x0":
        raise ArgumentError(
            f"--weighting {guidance.weighting} is of the loss sds, got --loss x0, which has no weight; add --loss sds"
        )
    if guidance.perp_neg and not (mode == "2d" and guidance.tells_sides(mode)):
        got = f"--mode {mode}" if mode != "2d" else "--no-view-words"
        raise ArgumentError(
            "--perp-neg leads each view away from the words of its other sides, so it needs --mode 2d and --view-words,"
            f" got {got}"
        )
    if guidance.view_words and config.method == "reconstruct":
        raise ArgumentError("--view-words can't be told to the views of --method reconstruct, which share one prompt")
