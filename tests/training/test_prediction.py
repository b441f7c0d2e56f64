"""What a UNet predicts is measured where nothing says so: models that are known to be of the one kind and the other."""

import pytest
import torch
from reference import stable_diffusion
from torch import Tensor, nn

from mvdream_fast.checkpoints.open import Model, load_model
from mvdream_fast.core.errors import ModelError
from mvdream_fast.diffusion.schedule import NoiseSchedule
from mvdream_fast.models.tokenizer import build_subset_vocabulary
from mvdream_fast.training import prediction
from mvdream_fast.training.prediction import EPS, V, likeness, pretrained, with_words


class AsNoise(nn.Module):
    """The same denoiser, with the noise that its v stands for as its output."""

    def __init__(self, model: Model):
        super().__init__()
        self.unet, self.schedule = model.unet, NoiseSchedule.from_config(model.config.schedule)

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.schedule.to_noise(z, self.unet(z, t, text), t)


def test_a_trained_model_in_both_predictions():
    """The embedded model predicts v; a trained model's noise at the last timestep is nearly its input."""
    model = load_model("embedded", torch.float32)
    assert model.config.schedule.prediction == "v"
    assert likeness(model) < V
    model.unet = AsNoise(model)
    assert likeness(model) > 0.99 > EPS


@pytest.fixture(scope="module")
def flat(tmp_path_factory) -> str:
    return str(stable_diffusion.write_flat(tmp_path_factory.mktemp("sd") / "v2-1.safetensors"))


@pytest.mark.parametrize(("cosine", "kind"), [(0.999, "eps"), (EPS, "eps"), (V, "v"), (0.1, "v"), (-0.5, "v")])
def test_a_flat_file_is_taken_for_what_its_output_says(flat, cosine, kind, monkeypatch, capsys):
    monkeypatch.setattr(prediction, "likeness", lambda model: cosine)
    assert pretrained(flat, ()).config.schedule.prediction == kind
    said = capsys.readouterr().out
    assert f"{flat} does not say what its UNet predicts; it is {'noise' if kind == 'eps' else 'v'}, by" in said
    assert f"{cosine:.2f}" in said


def test_an_output_that_leaves_it_open_is_asked_about(flat, monkeypatch):
    monkeypatch.setattr(prediction, "likeness", lambda model: 0.55)
    with pytest.raises(ModelError, match=r"predicts noise or v, .* noise is 0.55\); add --set schedule.prediction=eps"):
        pretrained(flat, ())


def test_what_is_said_is_not_measured(flat, tmp_path, monkeypatch, capsys):
    def measured(_: Model) -> float:
        raise AssertionError("nothing was to be measured")

    monkeypatch.setattr(prediction, "likeness", measured)
    pretrained(flat, ("vae.image_size=16", "schedule.prediction=v"))
    stable_diffusion.write_folder(tmp_path / "folder", prediction_type="v_prediction")
    assert pretrained(str(tmp_path / "folder"), ()).config.schedule.prediction == "v"
    assert capsys.readouterr().out == ""


def test_new_words_get_rows_behind_those_that_are_known():
    model = load_model("embedded", torch.float32, ("text",))
    rows = len(model.tokenizer.vocabulary)
    assert model.tokenizer.encode("a red velocity").replaced == [[]]
    assert model.tokenizer.encode("a red velocity").unknown == [["velocity"]]
    lines = build_subset_vocabulary(["a red velocity"])
    new = [line for line in lines if line not in model.tokenizer.vocabulary]
    assert "".join(new) == "velocity</w>"  # one row, or one for each of its pieces
    grown = with_words(model, lines)
    assert grown.tokenizer.vocabulary[rows:] == new
    assert grown.config.text.vocabulary_size == rows + len(new)
    assert set(grown.tokenizer.encode("a red velocity").ids[0, 3 : 3 + len(new)].tolist()) == {
        *range(rows, rows + len(new))
    }
    ids = model.tokenizer.encode("a red chair").ids
    assert torch.equal(grown.text(ids), model.text(ids))
    weight = grown.text.model.embeddings.token_embedding.weight
    assert 0.8 < weight[rows:].std() / weight[:rows].std() < 1.2
    assert with_words(grown, lines) is grown
