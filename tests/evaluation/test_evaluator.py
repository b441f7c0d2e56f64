"""The evaluator: what its towers promise, its files, its losses by hand, its batches, and a bit-exact resume."""

import dataclasses
import json
import math

import pytest
import torch
from test_batches import make_sample

from mvdream_fast.core.errors import InputFileError, ModelError
from mvdream_fast.core.rng import Stream
from mvdream_fast.data.batches import ImageSource, Shards
from mvdream_fast.data.shards import Sample, write_shard
from mvdream_fast.evaluation.evaluator import (
    EVALUATOR_FOLDER,
    Evaluator,
    EvaluatorConfig,
    load_evaluator,
    save_evaluator,
)
from mvdream_fast.evaluation.judging import read_prompts
from mvdream_fast.evaluation.reference import Reference
from mvdream_fast.models.tokenizer import build_subset_vocabulary
from mvdream_fast.training import evaluator as module
from mvdream_fast.training import loop
from mvdream_fast.training.evaluator import (
    PATCH,
    Degradation,
    EvaluatorOptions,
    EvaluatorSource,
    EvaluatorTrainer,
    azimuth_loss,
    backgrounds,
    contrastive,
    mirrored,
)
from mvdream_fast.training.vae import Linear

WORDS = ["a red thing", "a blue thing", "a very long caption of a thing"]
SMALL = EvaluatorConfig(image_size=8, channels=(16,), blocks=1, features=16, embedding=8, n_azimuths=8, text_width=16)


def small(seed: int = 0) -> Evaluator:
    vocabulary = build_subset_vocabulary([*WORDS, *(f"a red thing{i}" for i in range(9))])
    torch.manual_seed(seed)
    return Evaluator(dataclasses.replace(SMALL, vocabulary_size=len(vocabulary)), vocabulary).eval()


def render(i: int, orbit: int, split: str = "train", size: int = 16) -> Sample:
    """make_sample's orbit of asset i with what the evaluator reads besides.

    Odd orbits are painted blue; even assets have a front: the views of the half turn before it are bluer.
    """
    sample = make_sample(20 * i + orbit, size, split)
    sample.views[[*range(4), *range(12, 16)], ..., 2] = 0 if i % 2 else 255
    azimuth = [22.5 * k + 5.625 for k in range(16)]
    color = "blue" if orbit % 2 else "red"
    sample.meta.update(
        id=f"thing{i}", key=f"thing{i}-o{orbit}", name=f"thing{i}", painted=orbit % 2 == 1, azimuth_deg=azimuth,
        elevation_deg=15.0, caption=f"a {color} thing{i}", variants=[f"a thing{i}"], colors=[color],
    )  # fmt: skip
    return sample


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Shards:
    folder = tmp_path_factory.mktemp("shards")
    write_shard(folder / "train-00000.tar", [render(i, orbit) for i in range(4) for orbit in range(3)])
    return Shards(folder)


def trainer(shards: Shards, **options) -> EvaluatorTrainer:
    degradation = Degradation(Linear.fit(ImageSource(shards).images(Stream(0, 0, "fit"), 8), PATCH), SMALL.image_size)
    settings = EvaluatorOptions(**{"steps": 4, "batch_size": 4, "more_captions": 3, "warmup": 1} | options)
    return EvaluatorTrainer(small(), EvaluatorSource(shards), degradation, settings)


def test_embeddings_have_unit_length_and_views_are_averaged():
    evaluator, views = small(), Stream(0, 0, "views").uniform(2, 4, 3, 16, 16)
    embeddings = evaluator.embed_views(views)
    assert embeddings.shape == (2, 8)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(embeddings, evaluator.embed_views(views.flip(1)))
    assert evaluator.embed_text(WORDS).norm(dim=1).tolist() == pytest.approx([1] * 3)


def test_a_sentence_does_not_depend_on_its_neighbours():
    evaluator = small()
    together, alone = evaluator.embed_text(WORDS), torch.cat([evaluator.embed_text([w]) for w in WORDS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_pictures_of_any_size():
    evaluator = small()
    large = torch.full((2, 3, 40, 40), 0.25)
    torch.testing.assert_close(evaluator.features(large), evaluator.features(large[..., :16, :16]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="images must be"):
        evaluator.features(torch.zeros(2, 16, 16))


def test_headings_read_the_head():
    evaluator = small()
    torch.nn.init.zeros_(evaluator.azimuth.weight)
    features = torch.zeros(1, 16)

    def heading(*bins):
        logits = torch.full((8,), -30.0)
        logits[list(bins)] = 5.0
        evaluator.azimuth.bias.data = logits
        found = evaluator.headings(features)
        return found.azimuth_deg.item(), found.confidence.item()

    assert heading(6) == pytest.approx((270, 1), abs=1e-3)
    assert heading(1, 2) == pytest.approx((67.5, math.cos(math.pi / 8)), abs=1e-3)
    assert heading(0, 4)[1] == pytest.approx(0, abs=1e-3)  # from the front or from behind: it can't tell


def test_files_come_back(tmp_path):
    evaluator = small()
    evaluator.about = {"held_out": {"top1": 0.5}}
    save_evaluator(evaluator, tmp_path)
    loaded = load_evaluator(tmp_path)
    assert loaded.about == evaluator.about
    assert loaded.config == evaluator.config
    for name, tensor in evaluator.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    images = Stream(0, 0, "x").uniform(3, 3, 16, 16)
    torch.testing.assert_close(loaded.features(images), evaluator.features(images), atol=0.01, rtol=0)
    again = tmp_path / "again"
    save_evaluator(loaded, again)
    for name in ("evaluator.safetensors", "config.json", "vocabulary.txt"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ModelError, match="holds no evaluator"):
        load_evaluator(tmp_path)
    save_evaluator(small(), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "evaluator.safetensors"
    about, content = json.loads(config.read_text()), weights.read_bytes()
    for change, text in (
        ({"kind": "model"}, "holds no evaluator"),
        ({"sizes": {**about["sizes"], "colour": 1}}, "unknown key"),
        ({"sizes": {**about["sizes"], "features": 32}}, "misshapen"),
        ({"sizes": {**about["sizes"], "channels": [17]}}, "sixteens"),
        ({"sizes": {**about["sizes"], "blocks": -1}}, "sizes must be from 1"),
    ):
        config.write_text(json.dumps(about | change))
        with pytest.raises(ModelError, match=text):
            load_evaluator(tmp_path)
    config.write_text(json.dumps(about))
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="no readable"):
        load_evaluator(tmp_path)
    broken = small()
    torch.nn.init.constant_(broken.match.bias, math.nan)
    save_evaluator(broken, tmp_path)
    with pytest.raises(ModelError, match=r"not finite in match\.bias"):
        load_evaluator(tmp_path)


def test_the_contrastive_loss_by_hand():
    """Two images, three texts, similarities [[1, 0, 0], [0, 1, 1]] doubled."""
    image, text = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    none = torch.zeros(2, 3, dtype=torch.bool)
    e2 = math.exp(2)
    rows = (math.log(1 + 2 / e2) + math.log(2 + 1 / e2)) / 2  # images among texts
    columns = math.log(1 + 1 / e2)  # texts among images
    assert contrastive(image, text, torch.tensor(2.0), none).item() == pytest.approx((rows + columns) / 2)
    also = none.clone()
    also[1, 2] = True  # the third text is true of the second image: no negative
    rows = (math.log(1 + 2 / e2) + math.log(1 + 1 / e2)) / 2
    assert contrastive(image, text, torch.tensor(2.0), also).item() == pytest.approx((rows + columns) / 2)


def test_the_azimuth_loss_shares_between_bins():
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    logs = logits.log_softmax(-1)[0]
    assert azimuth_loss(logits[:0], torch.zeros(0)) == 0  # a batch without fronts
    loss = [azimuth_loss(logits, torch.tensor([angle])).item() for angle in (0.0, 90.0, 22.5, 337.5, 360.0)]
    far, near = -logs[1].item(), -logs[0].item()
    assert loss == pytest.approx([near, far, 0.75 * near + 0.25 * far, 0.75 * near + 0.25 * far, near])


def test_batches_pair_the_colors_of_an_asset(shards):
    source = EvaluatorSource(shards)
    batch = source.batch(Stream(0, 1, "x"), 6, 2, 5)
    again = source.batch(Stream(0, 1, "x"), 6, 2, 5)
    assert torch.equal(batch.images, again.images)
    assert batch.captions == again.captions
    assert batch.images.shape == (6, 2, 3, 16, 16)
    assert batch.images.min() >= 0
    assert batch.images.max() <= 1
    assert len(batch.captions) == 11
    values = (batch.images[:, 0, 0, 0, 0] * 255).round().long()  # asset and orbit, see render
    for k in range(3):
        assert values[k] // 20 == values[k + 3] // 20
        assert values[k] != values[k + 3]
    step = (batch.azimuth_deg[:, 1] - batch.azimuth_deg[:, 0]) % 360
    assert step.tolist() == [180] * 6
    assert batch.fronts.tolist() == [int(value) // 20 % 2 == 0 for value in values]


def test_what_its_source_calls_frontless_has_no_front(tmp_path):
    samples = [render(0, orbit) for orbit in range(2)]
    for sample, stated in zip(samples, (False, True)):
        sample.meta.update(id=f"is-{stated}", has_front=stated)
    write_shard(tmp_path / "train-00000.tar", samples)
    source = EvaluatorSource(Shards(tmp_path))
    assert [source.has_front(i) for i in range(2)] == [False, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("id", None), ("id", 5), ("azimuth_deg", None), ("azimuth_deg", [0.0] * 15), ("azimuth_deg", [math.nan] * 16),
        ("azimuth_deg", ["0"] * 16), ("elevation_deg", "high"), ("painted", None), ("name", None),
    ],
)  # fmt: skip
def test_renders_without_what_is_learned_from_are_named(tmp_path, name, value):
    """All is looked at before the first step: what is only measured is read at the first report, minutes later."""
    sample = render(0, 0)
    sample.meta[name] = value
    if value is None:
        del sample.meta[name]
    write_shard(tmp_path / "train-00000.tar", [render(1, 0), sample])
    message = rf"train-00000.tar: {name} of thing0-o0 must be .*, got .*; render it again"
    with pytest.raises(InputFileError, match=message):
        EvaluatorSource(Shards(tmp_path))


def test_other_true_captions_are_no_negatives(shards):
    batch = EvaluatorSource(shards).batch(Stream(0, 2, "x"), 6, 1, 9)
    for i, j in ((i, j) for i in range(6) for j in range(15)):
        value = int((batch.images[i, 0, 0, 0, 0] * 255).round())
        words = batch.captions[j].removesuffix(", 3d asset").split()
        true = words[-1] == f"thing{value // 20}" and words[1:-1] in ([], ["blue" if value % 20 % 2 else "red"])
        assert batch.also_true[i, j] == (true and i != j)
    assert batch.also_true.any()


def test_softened_pictures_stay_pictures(shards):
    linear = Linear.fit(ImageSource(shards).images(Stream(0, 0, "fit"), 8), PATCH)
    degradation, images = Degradation(linear, 16), Stream(0, 0, "images").uniform(5, 3, 16, 16)
    out = degradation(images, Stream(0, 0, "soft"))
    assert torch.equal(out, degradation(images, Stream(0, 0, "soft")))
    assert out.shape == images.shape
    assert Degradation(linear, 8)(images, Stream(0, 0, "soft")).shape == (5, 3, 8, 8)
    assert out.min() >= 0
    assert out.max() <= 1
    assert (out - images).abs().mean() > 0.01
    torch.testing.assert_close(degradation._patched(images, 3 * PATCH**2), images, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="patches of 8"):
        Degradation(dataclasses.replace(linear, patch=4), 16)


def test_in_a_mirror_left_is_right():
    images, azimuths = Stream(0, 0, "x").uniform(2, 3, 3, 4, 6), torch.tensor([[0.0, 30.0, 200.0]] * 2)
    flipped, turned = mirrored(images, azimuths, torch.tensor([True, False]))
    assert torch.equal(flipped[0], images[0].flip(-1))
    assert torch.equal(flipped[1], images[1])
    assert turned.tolist() == [[0, 330, 160], [0, 30, 200]]


def test_a_batch_has_half_of_its_scenes_from_a_mirror(shards, monkeypatch):
    """Beside that it is the batch of the same stream without one."""
    source, seen = EvaluatorSource(shards), []
    plain = module.mirrored
    monkeypatch.setattr(module, "mirrored", lambda *given: seen.append(given) or plain(*given))
    batch = source.batch(Stream(0, 1, "x"), 40, 2, 5)
    ((images, azimuths, which),) = seen
    assert 0.25 < which.float().mean() < 0.75
    assert torch.equal(batch.images, plain(images, azimuths, which)[0])
    assert torch.equal(batch.azimuth_deg, plain(images, azimuths, which)[1])


def test_backgrounds_are_mostly_grey():
    colors = backgrounds(Stream(0, 0, "x"), 1000)
    grey, white = ((colors == value).all(1).float().mean().item() for value in (0.5, 1.0))
    assert grey == pytest.approx(0.5, abs=0.06)
    assert white == pytest.approx(0.15, abs=0.04)


def test_a_resumed_run_has_the_same_bytes(shards, tmp_path):
    straight, first, second = (trainer(shards) for _ in range(3))
    losses = [straight.train_step() for _ in range(4)]
    assert loop.Loop(first, tmp_path, loop.LoopOptions(steps=2)).run() == 0
    assert loop.Loop(second, tmp_path, loop.LoopOptions(steps=4)).resume()
    assert [second.train_step() for _ in range(2)] == losses[2:]
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_a_checkpoint_of_other_sizes_is_refused(shards, tmp_path):
    first, other = trainer(shards), trainer(shards)
    loop.Loop(first, tmp_path, loop.LoopOptions(steps=1)).run()
    other.about["config"]["sizes"]["features"] = 32
    with pytest.raises(ModelError, match=r"sizes\.features differs"):
        loop.Loop(other, tmp_path, loop.LoopOptions(steps=2)).resume()


def test_it_learns(shards):
    """Which of twelve flat colours a picture shows, and from which half of the turn; views are judged together too."""
    run = trainer(shards, steps=80, batch_size=8, n_views=2, more_captions=8, lr=5e-3)
    losses = [run.train_step() for _ in range(80)]
    for name in ("match", "azimuth"):
        first, last = (sum(x[name] for x in part) for part in (losses[:10], losses[-10:]))
        assert last < 0.85 * first, name


def test_the_shipped_evaluator():
    """It loads, says its own accuracy, is small, knows the words of the prompts, and tells opposite sentences apart."""
    evaluator, reference = load_evaluator(), Reference.load()
    assert evaluator.about["held_out"] == reference.scores
    assert reference.scores["top1"] > 0.4  # of 40 captions; chance is 0.025
    assert len(reference.captions) == 40
    assert reference.seen is not None  # what the ImageNet classifier makes of the same renders
    assert reference.seen.features.shape == (40, 3, 4, 320)
    frechet = reference.seen.scores()["classifier_frechet"]
    assert reference.scores["classifier_frechet"] == pytest.approx(frechet, rel=0.01)  # kept in half precision
    assert sum(path.stat().st_size for path in EVALUATOR_FOLDER.iterdir()) < 7.25 * 2**20
    assert not any(evaluator.tokenizer.encode(read_prompts()).unknown)
    with torch.no_grad():
        red, blue, again = evaluator.embed_text(["a red car", "a blue bed", "a red car"])
    assert red @ again > 0.999
    assert red @ blue < 0.5
