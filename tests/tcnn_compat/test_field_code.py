"""Fields as threestudio and nerfstudio build them out of tiny-cuda-nn: they run, train and save on any device.

Written for this test in those projects' manner; `tcnn` is all that their files would import.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference.tcnn_formulas import DEVICE, draw
from torch import nn

import mvdream_fast.tcnn_compat as tcnn

GRID = {
    "otype": "HashGrid",
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 12,
    "base_resolution": 8,
    "per_level_scale": 1.447269237440378,
}


def on_sphere(points):
    """What the fields learn: dense inside of a ball of radius 0.6."""
    return (points.norm(dim=-1, keepdim=True) < 0.6).float()


class TcnnEncoding(nn.Module):
    """threestudio's wrapper: full precision, and the width is asked of the encoding."""

    def __init__(self, in_channels, config, dtype=torch.float32):
        super().__init__()
        self.n_input_dims = in_channels
        self.encoding = tcnn.Encoding(in_channels, config, dtype=dtype)
        self.n_output_dims = self.encoding.n_output_dims

    def forward(self, x):
        return self.encoding(x)


class ProgressiveGrid(nn.Module):
    """threestudio's ProgressiveBandHashGrid: a grid whose finer levels are masked until their step."""

    def __init__(self, in_channels, config):
        super().__init__()
        settings = config.copy()
        settings["otype"], settings["type"] = "Grid", "Hash"
        self.encoding = tcnn.Encoding(in_channels, settings, dtype=torch.float32)
        self.n_input_dims, self.n_output_dims = in_channels, self.encoding.n_output_dims
        self.config, self.level = config, config["start_level"]
        self.mask = torch.zeros(config["n_levels"] * config["n_features_per_level"], device=DEVICE)

    def forward(self, x):
        return self.encoding(x) * self.mask

    def update_step(self, step):
        start, every = self.config["start_step"], self.config["update_steps"]
        self.level = min(self.config["start_level"] + max(step - start, 0) // every, self.config["n_levels"])
        self.mask[: self.level * self.config["n_features_per_level"]] = 1.0


class WithPosition(nn.Module):
    """threestudio's CompositeEncoding: the position itself beside the encoding."""

    def __init__(self, encoding):
        super().__init__()
        self.encoding = encoding
        self.n_output_dims = encoding.n_input_dims + encoding.n_output_dims

    def forward(self, x):
        return torch.cat([x * 2 - 1, self.encoding(x)], dim=-1)


class VanillaMLP(nn.Module):
    """threestudio's plain network, which keeps autocast out."""

    def __init__(self, dim_in, dim_out, n_neurons):
        super().__init__()
        first, last = nn.Linear(dim_in, n_neurons, bias=False), nn.Linear(n_neurons, dim_out, bias=False)
        self.layers = nn.Sequential(first, nn.ReLU(inplace=True), last).to(DEVICE)

    def forward(self, x):
        with torch.autocast(DEVICE, enabled=False):
            return self.layers(x)


class ImplicitVolume(nn.Module):
    """threestudio's implicit volume: density, features and analytic normals at points of [-1, 1]^3."""

    def __init__(self, encoding, network_config):
        super().__init__()
        self.encoding = WithPosition(encoding)
        self.density_network = VanillaMLP(self.encoding.n_output_dims, 1, 32)
        self.feature_network = tcnn.Network(self.encoding.n_output_dims, 3, network_config)

    def forward(self, points, output_normal=False):
        with torch.set_grad_enabled(self.training or output_normal):
            if output_normal:
                points = points.detach().requires_grad_(True)
            contracted = (points + 1) / 2
            encoded = self.encoding(contracted.view(-1, self.encoding.encoding.n_input_dims))
            density = F.softplus(self.density_network(encoded).float().view(*points.shape[:-1], 1) * 10)
            features = self.feature_network(encoded).float().view(*points.shape[:-1], 3)
        out = {"density": density, "features": features}
        if output_normal:
            gradient = torch.autograd.grad(
                density, points, grad_outputs=torch.ones_like(density), create_graph=self.training
            )[0]
            out["normal"] = F.normalize(-gradient, dim=-1)
        return out


class DensityField(nn.Module):
    """nerfstudio's HashMLPDensityField, a proposal network: positions outside of the box count for nothing."""

    def __init__(self, max_res=64, base_res=8, num_levels=4, features_per_level=2):
        super().__init__()
        growth = np.exp((np.log(max_res) - np.log(base_res)) / (num_levels - 1))
        self.mlp_base = tcnn.NetworkWithInputEncoding(
            n_input_dims=3,
            n_output_dims=1,
            encoding_config={
                "otype": "HashGrid",
                "n_levels": num_levels,
                "n_features_per_level": features_per_level,
                "log2_hashmap_size": 12,
                "base_resolution": base_res,
                "per_level_scale": growth,
            },
            network_config={
                "otype": "FullyFusedMLP",
                "activation": "ReLU",
                "output_activation": "None",
                "n_neurons": 16,
                "n_hidden_layers": 1,
            },
        )

    def forward(self, points):
        positions = (points + 1) / 2
        selector = ((positions > 0) & (positions < 1)).all(dim=-1)
        positions = positions * selector[..., None]
        raw = self.mlp_base(positions.view(-1, 3)).view(*points.shape[:-1], -1).to(positions)
        return torch.exp(raw - 1) * selector[..., None]


class RadianceField(nn.Module):
    """nerfstudio's nerfacto field: a base with features, directions as harmonics, an appearance code, a head."""

    def __init__(self, geo_feat_dim=15, n_images=4, appearance_dim=8):
        super().__init__()
        self.geo_feat_dim = geo_feat_dim
        self.direction_encoding = tcnn.Encoding(
            n_input_dims=3, encoding_config={"otype": "SphericalHarmonics", "degree": 4}
        )
        layers = {"otype": "FullyFusedMLP", "activation": "ReLU", "n_neurons": 64}
        self.mlp_base = tcnn.NetworkWithInputEncoding(
            n_input_dims=3,
            n_output_dims=1 + geo_feat_dim,
            encoding_config=GRID,
            network_config={**layers, "output_activation": "None", "n_hidden_layers": 1},
        )
        self.embedding_appearance = nn.Embedding(n_images, appearance_dim).to(DEVICE)
        self.mlp_head = tcnn.Network(
            n_input_dims=self.direction_encoding.n_output_dims + geo_feat_dim + appearance_dim,
            n_output_dims=3,
            network_config={**layers, "output_activation": "Sigmoid", "n_hidden_layers": 2},
        )

    def forward(self, points, directions, images):
        flat = ((points + 1) / 2).view(-1, 3)
        raw, embedding = torch.split(self.mlp_base(flat), [1, self.geo_feat_dim], dim=-1)
        d = self.direction_encoding(((directions + 1) / 2).view(-1, 3))
        h = torch.cat([d, embedding, self.embedding_appearance(images.view(-1))], dim=-1)
        rgb = self.mlp_head(h).view(*points.shape[:-1], -1).to(directions)
        return torch.exp(raw.to(points)).view(*points.shape[:-1], 1), rgb


def train(field, loss, steps=50):
    """The first and the last loss of a short run: under autocast on a GPU, without on a CPU, as both projects train."""
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2, eps=1e-15)
    losses = []
    for step in range(steps):
        points = (draw(8, 32, 3, seed=step) * 2 - 1) * 0.999
        with torch.autocast(DEVICE, enabled=DEVICE == "cuda"):
            value = loss(points, step)
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in field.parameters())
        optimizer.step()
        losses.append(value.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("otype", ["FullyFusedMLP", "CutlassMLP"])
@pytest.mark.parametrize("progressive", [False, True])
def test_threestudio(otype, progressive, tmp_path):
    network = {"otype": otype, "activation": "ReLU", "output_activation": "none", "n_neurons": 32, "n_hidden_layers": 1}
    bands = {**GRID, "start_level": 2, "start_step": 10, "update_steps": 10, "otype": "ProgressiveBandHashGrid"}
    encoding = ProgressiveGrid(3, bands) if progressive else TcnnEncoding(3, GRID)
    field = ImplicitVolume(encoding, network)

    def loss(points, step):
        if progressive:
            encoding.update_step(step)
        out = field(points, output_normal=True)
        facing = (out["normal"] * F.normalize(points, dim=-1)).sum(-1)
        color = F.mse_loss(out["features"].sigmoid(), points.abs())
        return F.mse_loss(out["density"].clamp(max=1), on_sphere(points)) + 0.01 * (1 - facing).mean() + color

    first, last = train(field, loss)
    assert last < 0.6 * first
    torch.save(field.state_dict(), tmp_path / "field.ckpt")
    field.load_state_dict(torch.load(tmp_path / "field.ckpt"))
    assert set(field.state_dict()) >= {"encoding.encoding.encoding.params", "feature_network.params"}
    field.eval()
    points = draw(4, 5, 3) * 2 - 1
    assert not field(points)["density"].requires_grad
    normal = field(points, output_normal=True)["normal"]
    torch.testing.assert_close(normal.norm(dim=-1), torch.ones_like(normal[..., 0]))


def test_nerfstudio_proposals():
    field = DensityField()
    first, last = train(field, lambda points, step: F.mse_loss(field(points).clamp(max=1), on_sphere(points)))
    assert last < 0.6 * first
    outside = torch.tensor([[1.5, 0.0, 0.0]], device=DEVICE)
    with torch.no_grad():
        assert field(outside).tolist() == [[0.0]]


def test_nerfstudio_radiance():
    field = RadianceField()
    images = torch.arange(8, device=DEVICE)[:, None].expand(8, 32) % 4

    def loss(points, step):
        density, rgb = field(points, F.normalize(points, dim=-1), images)
        return F.mse_loss(rgb, points.abs()) + F.mse_loss(density.clamp(max=2), 2 * on_sphere(points))

    first, last = train(field, loss)
    assert last < 0.6 * first
    groups = {name.split(".")[0]: p.grad.abs().max() for name, p in field.named_parameters() if p.numel()}
    assert set(groups) == {"mlp_base", "embedding_appearance", "mlp_head"}
    assert all(grad > 0 for grad in groups.values())
