"""examples/average_models.py: the mean of two models, one of which has learned more."""

import average_models
import pytest
import torch
from reference.random_model import random_model

from mvdream_fast.checkpoints.open import load_model, save_model


def test_weights_are_averaged_and_what_is_new_is_kept_or_scaled():
    before = {"a": torch.tensor([[2.0, 4.0]]), "rows": torch.ones(2, 3)}
    after = {"a": torch.tensor([[4.0, 0.0]]), "rows": torch.full((3, 3), 5.0), "new": torch.full((2,), 8.0)}
    out = average_models.averaged(before, after, 0.25)
    assert torch.equal(out["a"], torch.tensor([[2.5, 3.0]]))
    assert torch.equal(out["rows"], torch.tensor([[2.0] * 3, [2.0] * 3, [5.0] * 3]))
    assert torch.equal(out["new"], torch.full((2,), 2.0))


def test_other_shapes_are_refused():
    with pytest.raises(SystemExit, match=r"a is \[2, 3\] in one model and \[2, 2\] in the other"):
        average_models.averaged({"a": torch.ones(2, 3)}, {"a": torch.ones(2, 2)}, 0.5)


def test_a_model_of_two(tmp_path):
    for seed, name in enumerate(("one", "two")):
        save_model(random_model(seed), tmp_path / name)
    average_models.main([str(tmp_path / "one"), str(tmp_path / "two"), "-o", str(tmp_path / "mean"), "--share", "0.5"])
    one, two, mean = (load_model(str(tmp_path / name), torch.float32) for name in ("one", "two", "mean"))
    for part in ("unet", "text"):
        states = [getattr(model, part).state_dict() for model in (one, two, mean)]
        for name, weight in states[2].items():
            assert torch.allclose(weight, (states[0][name] + states[1][name]) / 2, atol=2e-3)
    assert all(torch.equal(x, y.half().float()) for x, y in zip(mean.vae.parameters(), two.vae.parameters()))
