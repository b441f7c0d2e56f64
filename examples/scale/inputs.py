"""Every number that the simulation is given, with its unit and where it comes from. All are flags of the command."""

from dataclasses import dataclass, field, fields
from typing import Any

KINDS = ("measured", "counted", "published", "prediction", "assumption")


def given(value: Any, unit: str, kind: str, origin: str) -> Any:
    """A field with a default and its origin."""
    return field(default=value, metadata={"unit": unit, "kind": kind, "origin": origin})


H100 = "docs/gpu_measured.md, an H100"
SHEET = "NVIDIA's data sheet of the H100 SXM and the DGX H100"


@dataclass(frozen=True)
class Inputs:
    """Of machines, prices and the three jobs."""

    dollars: float = given(3.0, "$ a GPU hour", "assumption", "rented H100s cost 2 to 4")
    gpus_per_node: int = given(8, "", "published", SHEET)
    cores_per_gpu: int = given(16, "", "assumption", "the H100 of docs/gpu_measured.md had 16")
    node_hours: float = given(
        1000.0, "h a failure", "assumption", "of one node; Llama 3's had 6,335 (419 failures in 54 days)"
    )
    repair_min: float = given(10.0, "min", "assumption", "until a failed node, or another, works again")
    expiry_s: float = given(60.0, "s", "counted", "`EXPIRY_S` of the queue: no heartbeat for so long")
    start_s: float = given(30.0, "s", "assumption", "a container, Python, torch, kernels")
    slowness: float = given(0.03, "deviation", "assumption", "of GPUs' pace, and of steps'")
    store_gb_s: float = given(10.0, "GB/s", "assumption", "one for all: a file system of ten servers, or a bucket")
    node_store_gb_s: float = given(12.5, "GB/s", "published", "a node's 100 Gb/s network card")
    store_ops: float = given(5000.0, "1/s", "published", "S3's 3,500 writes and 5,500 reads a second of a prefix")
    store_latency_ms: float = given(0.5, "ms", "assumption", "of an operation; one file after the other")

    sds_steps: int = given(10000, "", "published", "MVDream; half at 64 px with 8 images, half at 256 px with 4")
    unet_ms: float = given(8.0, "ms", "prediction", "docs/gpu.md: guided step of 8 images, a CUDA graph")
    vae_ms: float = given(6.5, "ms", "prediction", "docs/gpu.md: 4 images of 256 px, forward and backward, 16 bits")
    sample_ns: float = given(7.3, "ns", "measured", f"{H100}: field 6.9, composite 0.24, march 0.14")
    samples_per_ray: float = given(26.0, "", "measured", f"{H100}, of one trained view")
    asset_cv: float = given(0.15, "deviation", "assumption", "of assets' times: how much of the volume is full")
    export_s: float = given(15.0, "s", "measured", "docs/text_to_3d.md: mesh and texture of 512, on a CPU")
    asset_mb: float = given(30.0, "MB", "assumption", "mesh, turntable, report, fields of one asset")
    volume_mb: float = given(151.2, "MB", "counted", "12,599,920 numbers and two moments of each in float32")
    released_gb: float = given(5.22, "GB", "published", "the released .pt")
    folder_gb: float = given(2.61, "GB", "counted", "the same as a folder in 16 bits (`convert`)")
    prompts: int = given(10000, "", "assumption", "the job")

    meshes: int = given(800000, "", "published", "Objaverse 1.0")
    mesh_mb: float = given(12.5, "MB", "published", "Objaverse: its users report 10 TB")
    mesh_core_s: float = given(5.0, "core s", "assumption", "64 views of 256 px; small meshes: 2.3, measured")
    mesh_sigma: float = given(1.0, "of its log", "assumption", "how uneven meshes are")
    mesh_out_mb: float = given(0.57, "MB", "measured", "64 views of 256 px of small meshes in a shard")

    scenes: int = given(1024, "", "published", "MVDream: of 4 views, so 4,096 images a step")
    train_steps: int = given(50000, "", "published", "MVDream")
    guided_ms: float = given(7.2, "ms", "measured", f"{H100}: how long a guided step of 8 images keeps the GPU busy")
    launch_ms: float = given(38.9, "ms", "measured", f"{H100}: the same launched from Python, a forward")
    encode_ms: float = given(0.54, "ms", "prediction", "docs/gpu.md: an image to latents, a third of --vae-ms")
    gpu_gb: float = given(80.0, "GB", "published", SHEET)
    nvlink_gb_s: float = given(450.0, "GB/s", "published", f"{SHEET}: one way")
    node_net_gb_s: float = given(400.0, "GB/s", "published", f"{SHEET}: eight cards of 400 Gb/s a node")
    network_share: float = given(0.8, "", "assumption", "of those rates that collectives reach")
    hop_us: float = given(5.0, "us", "assumption", "from one GPU of a ring to the next")
    view_kb: float = given(8.9, "KB", "measured", "a view in a shard, as --mesh-out-mb")
    restart_min: float = given(5.0, "min", "assumption", "until the others notice, and a new start stands")


def rows(inputs: Inputs) -> list[list[str]]:
    """Name, value with unit, kind and origin of every input."""
    found = []
    for item in fields(Inputs):
        value, meta = getattr(inputs, item.name), item.metadata
        flag = "--" + item.name.replace("_", "-")
        found.append([f"`{flag}`", f"{value:,g} {meta['unit']}".strip(), meta["kind"], meta["origin"]])
    return found
