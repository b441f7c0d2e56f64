"""The public fused ops: each with a plain-torch reference beside it; ops hold no weights and know no model."""

# Imported eagerly: a lazily loaded submodule would shadow the function of the same name. Triton and the native
# extension are loaded inside the ops, on first use.
from mvdream_fast.ops.antialias import antialias, antialias_ref, edge_topology
from mvdream_fast.ops.composite import Rendered, composite, composite_ref
from mvdream_fast.ops.cross_view_attention import cross_view_attention, cross_view_attention_ref
from mvdream_fast.ops.field import FieldSpec, HashGridField, field, field_density, field_density_ref, field_ref
from mvdream_fast.ops.geglu import geglu, geglu_ref
from mvdream_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_ref
from mvdream_fast.ops.hash_encode import HashGrid, hash_encode, hash_encode_ref
from mvdream_fast.ops.interpolate import interpolate, interpolate_ref
from mvdream_fast.ops.march_rays import Samples, march_rays, march_rays_ref, prune_samples, prune_samples_ref
from mvdream_fast.ops.packed_scan import packed_scan, packed_scan_ref
from mvdream_fast.ops.rasterize import Rasterized, rasterize, rasterize_ref
from mvdream_fast.ops.render import render, render_ref
from mvdream_fast.ops.sds_target import SDSTarget, sds_target, sds_target_ref
from mvdream_fast.ops.texture import texture, texture_ref
from mvdream_fast.ops.time_camera_embedding import (
    MLP,
    camera_embedding,
    time_camera_embedding,
    time_camera_embedding_ref,
)
from mvdream_fast.ops.traverse_grids import Traversed, traverse_grids
from mvdream_fast.ops.update_occupancy import update_occupancy, update_occupancy_ref
from mvdream_fast.ops.winograd import winograd_conv3x3, winograd_conv3x3_ref, winograd_pays

__all__ = [
    "MLP",
    "FieldSpec",
    "HashGrid",
    "HashGridField",
    "Rasterized",
    "Rendered",
    "SDSTarget",
    "Samples",
    "Traversed",
    "antialias",
    "antialias_ref",
    "camera_embedding",
    "composite",
    "composite_ref",
    "cross_view_attention",
    "cross_view_attention_ref",
    "edge_topology",
    "field",
    "field_density",
    "field_density_ref",
    "field_ref",
    "geglu",
    "geglu_ref",
    "group_norm_silu",
    "group_norm_silu_ref",
    "hash_encode",
    "hash_encode_ref",
    "interpolate",
    "interpolate_ref",
    "march_rays",
    "march_rays_ref",
    "packed_scan",
    "packed_scan_ref",
    "prune_samples",
    "prune_samples_ref",
    "rasterize",
    "rasterize_ref",
    "render",
    "render_ref",
    "sds_target",
    "sds_target_ref",
    "texture",
    "texture_ref",
    "time_camera_embedding",
    "time_camera_embedding_ref",
    "traverse_grids",
    "update_occupancy",
    "update_occupancy_ref",
    "winograd_conv3x3",
    "winograd_conv3x3_ref",
    "winograd_pays",
]
