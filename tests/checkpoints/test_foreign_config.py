"""Settings of folders in diffusers' layout: each is applied or refused, and no class has one that is neither."""

import dataclasses
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers.schedulers import KarrasDiffusionSchedulers
from reference import stable_diffusion
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTokenizer

from mvdream_fast.checkpoints.foreign_config import APPLIED, FILES, NO_EFFECT, implied
from mvdream_fast.checkpoints.open import open_source
from mvdream_fast.core.errors import ModelError
from mvdream_fast.models.config import SD21, ModelConfig, ScheduleConfig


def fields_of(cls: type) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}


SCHEDULERS = [getattr(diffusers, member.name) for member in KarrasDiffusionSchedulers]
SCHEDULERS = [cls for cls in SCHEDULERS if "torchsde" not in getattr(cls, "_backends", ())]  # a stand-in without it
CLASSES = [("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL), ("text", CLIPTextConfig),
           ("tokenizer", CLIPTokenizer), *(("scheduler", cls) for cls in SCHEDULERS)]  # fmt: skip
# Words for which a model of ours has no value: whatever is set is refused, but null, false, zero and empty.
MUST_BE_UNSET = {
    "unet": {"center_input_sample", "freq_shift", "only_cross_attention", "reverse_transformer_layers_per_block",
             "encoder_hid_dim", "encoder_hid_dim_type", "dual_cross_attention", "class_embed_type",
             "addition_embed_type", "addition_time_embed_dim", "num_class_embeds", "resnet_skip_time_act",
             "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim",
             "projection_class_embeddings_input_dim", "class_embeddings_concat", "mid_block_only_cross_attention",
             "cross_attention_norm"},
    "vae": {"latents_mean", "latents_std"},
    "text": {"is_encoder_decoder"},
    "tokenizer": set(),
    "scheduler": {"clip_sample", "thresholding", "use_flow_sigmas", "use_dynamic_shifting", "shift_terminal",
                  "sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "rho"},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "cls"), CLASSES, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_of_the_classes_is_known(kind, cls):
    known = APPLIED[kind] | NO_EFFECT[kind] | implied(SD21)[kind].keys() | MUST_BE_UNSET[kind]
    assert fields_of(cls) - known == set()


@pytest.mark.parametrize("kind", FILES)
def test_a_field_is_of_one_sort(kind):
    sorts = [APPLIED[kind], NO_EFFECT[kind], implied(SD21)[kind].keys(), MUST_BE_UNSET.get(kind, set())]
    assert sum(map(len, sorts)) == len(set().union(*sorts))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "plain"
    stable_diffusion.write_folder(folder)
    (folder / "tokenizer").mkdir()
    about = {"bos_token": "<|startoftext|>", "do_lower_case": True, "pad_token": "<|endoftext|>", "errors": "replace",
             "model_max_length": 77, "unk_token": "<|endoftext|>", "add_prefix_space": False,
             "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False}}  # fmt: skip
    (folder / FILES["tokenizer"]).write_text(json.dumps(about))
    (folder / FILES["special_tokens"]).write_text(json.dumps({"pad_token": "!", "bos_token": "<|startoftext|>"}))
    return folder


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "x")


def opened(folder: Path, kind: str, **changes: Any) -> ModelConfig:
    path, before = folder / FILES[kind], (folder / FILES[kind]).read_text()
    path.write_text(json.dumps(json.loads(before) | changes))
    try:
        return open_source(folder, add_cameras=True).config
    finally:
        path.write_text(before)


APPLICATIONS = [
    ("vae", {"scaling_factor": 1}, "vae", {"scale_factor": 1}),
    ("vae", {"scaling_factor": 0.5, "shift_factor": 0.25}, "vae", {"scale_factor": 0.5, "shift_factor": 0.25}),
    ("vae", {"shift_factor": -1}, "vae", {"shift_factor": -1}),
    ("vae", {"norm_num_groups": 8}, "vae", {"norm_num_groups": 8}),
    ("unet", {"norm_num_groups": 16}, "unet", {"norm_groups": 16}),
    ("unet", {"attention_head_dim": 4}, "unet", {"num_heads": 4, "num_head_channels": None}),
    ("unet", {"attention_head_dim": [4, 4]}, "unet", {"num_heads": 4, "num_head_channels": None}),
    ("unet", {"attention_head_dim": [2, 4]}, "unet", {"num_heads": None, "num_head_channels": 32}),
    ("unet", {"num_attention_heads": 2}, "unet", {"num_heads": 2, "num_head_channels": None}),
    ("text", {"num_attention_heads": 4}, "text", {"n_heads": 4}),
    ("text", {"hidden_act": "quick_gelu"}, "text", {"activation": "quick_gelu"}),
    ("special_tokens", {"pad_token": {"content": "<|endoftext|>"}}, "text", {"pad_id": 49407}),
    ("special_tokens", {"pad_token": "!"}, "text", {"pad_id": 0}),
    ("scheduler", {"prediction_type": "v_prediction"}, "schedule", {"prediction": "v"}),
    ("scheduler", {"beta_start": 0.001, "beta_end": 0.5}, "schedule", {"linear_start": 0.001, "linear_end": 0.5}),
    ("scheduler", {"beta_schedule": "linear"}, "schedule", {"beta_schedule": "linear"}),
    ("scheduler", {"num_train_timesteps": 500}, "schedule", {"n_timesteps": 500}),
    ("scheduler", {"timestep_spacing": "trailing"}, "schedule", {"timestep_spacing": "trailing"}),
    ("scheduler", {"steps_offset": 0}, "schedule", {"steps_offset": 0}),
    ("scheduler", {"set_alpha_to_one": True}, "schedule", {"set_alpha_to_one": True}),
    ("scheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "schedule",
     {"rescale_betas_zero_snr": True, "prediction": "v"}),
    ("scheduler", {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}, "schedule", {"trained_betas": (0.1, 0.2)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "section", "values"), APPLICATIONS, ids=str)
def test_what_a_setting_changes(folder, kind, changes, section, values):
    before = open_source(folder, add_cameras=True).config
    config = opened(folder, kind, **changes)
    for name, value in values.items():
        assert getattr(getattr(config, section), name) == value
    others = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in (section, "name")]
    assert all(getattr(config, name) == getattr(before, name) for name in others)


def test_each_applied_setting_has_its_test():
    """`image_size` and `sample_size` count where there are camera layers: test_published_layouts; LDM's: test_open."""
    tested = {kind: {name for k, changes, *_ in APPLICATIONS if k == kind for name in changes} for kind in FILES}
    elsewhere = {"unet": {"image_size", "sample_size", "num_heads", "num_head_channels"}, "tokenizer": {"pad_token"}}
    for kind in FILES:
        assert APPLIED[kind] == tested[kind] | elsewhere.get(kind, set())


@pytest.mark.parametrize("kind", sorted(FILES.keys() - {"camera"}))
def test_what_our_model_does_not_do_is_refused_by_name(folder, kind):
    """Every field that is neither applied nor without effect, with a value that it must not have."""
    wanted = implied(open_source(folder, add_cameras=True).config)[kind]
    for name in sorted(wanted.keys() | MUST_BE_UNSET.get(kind, set())):
        value = wanted.get(name)
        other = not value if isinstance(value, bool) else "another" if isinstance(value, str) else 7
        with pytest.raises(ModelError, match=rf"{FILES[kind]}: {name} must be .*, got {other!r}; no other is supp"):
            opened(folder, kind, **{name: other})
        if name in wanted:
            opened(folder, kind, **{name: value})
        opened(folder, kind, **{name: None})


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("vae", {"scaling_factor": "0.18"}, "scaling_factor must be a number, got '0.18'"),
        ("vae", {"scaling_factor": True}, "scaling_factor must be a number, got True"),
        ("vae", {"scaling_factor": 0}, "scale_factor must be a positive number, got 0"),
        ("vae", {"shift_factor": [0.1]}, r"shift_factor must be a number, got \[0.1\]"),
        ("vae", {"never_heard_of": 3}, "vae/config.json: never_heard_of must be unset or false, got 3"),
        ("unet", {"attention_head_dim": [1, 3]}, r"attention_head_dim must give heads of one width .* got \[1, 3\]"),
        ("unet", {"attention_head_dim": []}, "attention_head_dim must be a whole number, or one for each level"),
        ("unet", {"attention_head_dim": "8"}, "attention_head_dim must be a whole number, got '8'"),
        ("unet", {"sample_size": [64, 96]}, "sample_size must be a whole number over 0"),
        ("unet", {"ip_dim": 16}, "ip_dim must be unset or false, got 16"),
        ("text", {"hidden_act": ["gelu"]}, "hidden_act must be one of gelu, quick_gelu"),
        ("text", {"use_attention_mask": True}, "use_attention_mask must be unset or false, got True"),
        ("scheduler", {"prediction_type": "sample"}, "prediction_type must be one of epsilon, v_prediction"),
        ("scheduler", {"beta_schedule": "sigmoid"}, "beta_schedule must be one of scaled_linear, linear, squared"),
        ("scheduler", {"trained_betas": 3}, "trained_betas must be a list of numbers, got 3"),
        ("scheduler", {"trained_betas": [0.1]}, "trained_betas must be one for each timestep, got 1 numbers"),
        ("scheduler", {"trained_betas": [0.1, -1], "num_train_timesteps": 2}, "trained_betas must be over 0"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "prediction must be v where the last timestep is all noise"),
        ("scheduler", {"rescale_betas_zero_snr": "yes"}, "rescale_betas_zero_snr must be true or false, got 'yes'"),
        ("scheduler", {"steps_offset": 1000}, "steps_offset must be under n_timesteps, got 1000"),
        ("scheduler", {"original_inference_steps": 50}, "original_inference_steps must be unset or false, got 50"),
        ("special_tokens", {"pad_token": "<pad>"}, "pad_token must be one of !, <|startoftext|>, <|endoftext|>"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_cannot_be(folder, kind, changes, sentence):
    with pytest.raises(ModelError, match=sentence.replace("|", r"\|") if "pad_token" in sentence else sentence):
        opened(folder, kind, **changes)


@pytest.mark.parametrize("name", ["quant_conv", "post_quant_conv"])
def test_a_vae_without_its_inner_convolutions_is_refused_by_the_setting(folder, name):
    """Its file lacks their tensors, too: the setting says why."""
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    kept = {key: x.clone() for key, x in load_file(path).items() if not key.startswith(name)}
    save_file(kept, path)
    with pytest.raises(ModelError, match=f"vae/config.json: use_{name} must be True, got False"):
        opened(folder, "vae", **{f"use_{name}": False})


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_a_scheduler_as_diffusers_saves_it(folder, cls):
    """What DDIMScheduler.from_config makes of the file, but for the corrections that diffusers' pipelines make."""
    if cls is diffusers.EDMEulerScheduler:
        cls().save_pretrained(folder / "scheduler")
        with pytest.raises(ModelError, match="scheduler_config.json: .* must be unset or false"):
            open_source(folder, add_cameras=True)
        return
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    settings |= {"clip_sample": False} if "clip_sample" in fields_of(cls) else {}
    cls(**{name: value for name, value in settings.items() if name in fields_of(cls)}).save_pretrained(
        folder / "scheduler"
    )
    schedule = open_source(folder, add_cameras=True).config.schedule
    theirs = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler", steps_offset=1).config
    assert schedule == ScheduleConfig(
        timestep_spacing=theirs.timestep_spacing, set_alpha_to_one=theirs.set_alpha_to_one and cls.__name__[:2] != "PN"
    )


def test_a_scheduler_of_an_old_version_has_the_defaults_of_its_class(folder):
    for name, start, end, kind, spacing in (
        ("DDIMScheduler", 1e-4, 0.02, "linear", "leading"),
        ("EulerDiscreteScheduler", 1e-4, 0.02, "linear", "linspace"),
        ("HeunDiscreteScheduler", 0.00085, 0.012, "linear", "linspace"),
    ):
        (folder / FILES["scheduler"]).write_text(json.dumps({"_class_name": name}))
        schedule = open_source(folder, add_cameras=True).config.schedule
        expected = ScheduleConfig(1000, start, end, beta_schedule=kind, timestep_spacing=spacing, set_alpha_to_one=True)
        assert schedule == expected


def test_what_a_file_leaves_out_is_the_default_of_its_class(folder):
    """transformers writes no default, old versions of diffusers did not know each field."""

    def without(kind: str, *names: str) -> ModelConfig:
        path = folder / FILES[kind]
        path.write_text(json.dumps({n: x for n, x in json.loads(path.read_text()).items() if n not in names}))
        return open_source(folder, add_cameras=True).config

    text = without("text", "hidden_act", "num_attention_heads").text
    assert (text.activation, text.n_heads) == ("quick_gelu", 8)
    unet = without("unet", "attention_head_dim", "norm_num_groups").unet
    assert (unet.num_heads, unet.num_head_channels, unet.norm_groups) == (8, None, 32)
    vae = without("vae", "scaling_factor", "shift_factor", "norm_num_groups").vae
    assert (vae.scale_factor, vae.shift_factor, vae.norm_num_groups) == (0.18215, 0.0, 32)
    assert without("special_tokens", "pad_token").text.pad_id == 49407  # tokenizer_config.json's
    assert without("tokenizer", "pad_token").text.pad_id == 0  # SD 2's


def test_a_folder_without_a_scheduler_does_not_say_what_it_predicts(folder):
    shutil.rmtree(folder / "scheduler")
    source = open_source(folder, add_cameras=True)
    assert (source.says_prediction, source.config.schedule) == (False, ScheduleConfig())
