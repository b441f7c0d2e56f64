"""What the compiler makes of the CUDA kernels, without a GPU: no warnings, no spills where it counts, registers as
recorded, and an extension that links for every architecture, loads, and says what is missing.

`MVDREAM_FAST_RECORD=1 pytest tests/ops/test_cuda_build.py -m slow` writes benchmarks/cuda_static.json anew.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
RECORD = ROOT / "benchmarks/cuda_static.json"
TREE = ROOT / "build/cuda"  # kept, so that a second run compiles only what has changed
GROWTH = 1.1
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
# Kernels a training step or a rendered image spends its time in, at the default widths.
HOT = re.compile(
    r"composite_|march_|prune_|sample_positions|encode_kernel<2>|scatter_kernel<2>|(field_\w+|render)_kernel<64|packed_|"
    r"product_|transpose_"
)
# Instructions on sm_90 of the field's kernels for few samples, with three products of tf32 for each of float32.
MOST_INSTRUCTIONS = {"field_forward_kernel<64,0,1,1>": 3800, "field_backward_kernel<64,0,1,1>": 8000}
CLASSES = {"MarchArgs", "Packed", "Queue", "ScanArgs"}
FUNCTIONS = {
    *("march_status", "march_count", "march_fill", "sample_positions", "prune_count", "prune_fill", "update_occupancy"),
    *("composite_forward", "composite_backward", "hash_encode_forward", "hash_encode_backward"),
    *("field_forward", "field_backward", "render", "packed_scan", "packed_product_backward", "traverse"),
    *("rasterize_forward", "rasterize_backward", "interpolate_forward", "interpolate_backward"),
    *("antialias_forward", "antialias_backward", "texture_forward", "texture_backward"),
}

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
    pytest.mark.timeout(7200),
]


def kernel_name(symbol):
    """`field_forward_kernel<64,0>` of a mangled symbol."""
    name, rest = re.search(r"\d+([a-z_]+_kernel)(.*)", symbol).groups()
    arguments = re.match(r"I((?:L[ib]\d+E)+)E", rest)
    if arguments is None:
        return name
    return f"{name}<{','.join(re.findall('L[ib]([0-9]+)E', arguments[1]))}>"


def parse(log):
    """name -> what `ptxas -v` prints of it."""
    kernels, name = {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = kernel_name(entry[1])
        elif stack := re.search(r"(\d+) bytes stack frame", line):
            kernels[name] = {"stack_bytes": int(stack[1])}
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[name] |= {"registers": int(used[1]), "static_shared_bytes": int(shared[1]) if shared else 0}
    return kernels


def parse_usage(dump):
    """architecture -> name -> the same, of `cuobjdump --dump-resource-usage`; the first KB is the system's."""
    found, arch, name = {}, None, None
    for line in dump.splitlines():
        if here := re.search(r"^arch = (sm_\d+)", line):
            arch = here[1]
        elif entry := re.search(r"Function (\w+_kernel\w*):", line):
            name = kernel_name(entry[1])
        elif used := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, used.groups())
            shared -= 1024 if arch != "sm_80" and shared >= 1024 else 0
            kernel = {"stack_bytes": stack, "registers": registers, "static_shared_bytes": shared}
            found.setdefault(arch, {})[name] = kernel
    return found


def count_instructions(dump):
    """architecture -> name -> how many instructions, of `cuobjdump --dump-sass`, how many of them load from shared
    memory, and how many from where only a run can tell."""
    found, arch, name = {}, None, None
    for line in dump.splitlines():
        if here := re.search(r"^\s*arch = (sm_\d+)|^\s*code for (sm_\d+)", line):
            arch = here[1] or here[2]
        elif entry := re.search(r"Function : (\w+)", line):
            name = kernel_name(entry[1])
            found.setdefault(arch, {})[name] = {"instructions": 0, "shared_loads": 0, "generic_loads": 0}
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", line):
            kernel = found[arch][name]
            kernel["instructions"] += 1
            kernel["shared_loads"] += code[1] == "LDS"
            kernel["generic_loads"] += code[1] == "LD"
    return found


def cuobjdump(option, path):
    triton = importlib.util.find_spec("triton") or pytest.skip("cuobjdump comes with triton, which is not installed")
    command = [Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump", option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(arch, folder, flags=()):
    """Every kernel of csrc/cuda for one architecture; warnings are errors."""

    def compile_one(source):
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", *flags]
        command += ["-Werror", "all-warnings", "-I", ROOT / "csrc"]
        command += [ROOT / f"csrc/cuda/{source}.cu", "-o", folder / f"{source}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source} for sm_{arch}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        kernels = parse(done.stdout + done.stderr)
        counts = count_instructions(cuobjdump("--dump-sass", folder / f"{source}.cubin"))[f"sm_{arch}"]
        return {name: kernel | counts[name] for name, kernel in kernels.items()}

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return {name: kernel for kernels in pool.map(compile_one, SOURCES) for name, kernel in kernels.items()}


def write_record(found):
    rows = {
        arch: ",\n".join(f'  "{name}": {json.dumps(k)}' for name, k in sorted(found[arch].items())) for arch in found
    }
    RECORD.write_text("{\n" + ",\n".join(f' "{arch}": {{\n{rows[arch]}\n }}' for arch in ARCHITECTURES) + "\n}\n")


def check(arch, kernels, part=False):
    hot = [name for name in kernels if HOT.search(name)]
    assert len(hot) >= 12
    # A spilled register lies in the stack frame.
    assert {name: kernels[name]["stack_bytes"] for name in hot if kernels[name]["stack_bytes"]} == {}
    # Of which memory it is, each load knows when it is compiled.
    assert {name: kernel["generic_loads"] for name, kernel in kernels.items() if kernel["generic_loads"]} == {}
    known = json.loads(RECORD.read_text())[arch]
    assert kernels.keys() <= known.keys() if part else kernels.keys() == known.keys()
    worse = {
        f"{name} {what}": (value, known[name][what])
        for name, kernel in kernels.items()
        for what, value in kernel.items()
        if value > GROWTH * known[name][what]
    }
    assert worse == {}


def test_hopper_at_the_default_width(tmp_path):
    kernels = compile_all(90, tmp_path, ["-DMVDREAM_FAST_DEFAULT_WIDTH_ONLY"])
    check("sm_90", kernels, part=True)
    assert {
        name: kernels[name]["instructions"]
        for name, most in MOST_INSTRUCTIONS.items()
        if kernels[name]["instructions"] > most
    } == {}


@pytest.fixture(scope="module")
def extension():
    """mvdream_fast._C with the CUDA backend for every architecture, as `pip install` makes it, warnings as errors."""
    import pybind11
    from reference.cuda_host import alone_in

    configure = ["cmake", "-S", ROOT, "-B", TREE, "-G", "Ninja", "-DMVDREAM_FAST_CUDA=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    with alone_in(TREE):
        subprocess.run([*configure, f"-DMVDREAM_FAST_OUTPUT={TREE / 'site'}"], check=True, capture_output=True)
        built = subprocess.run(["cmake", "--build", TREE, "--parallel", "2"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:]
    (library,) = (TREE / "site").glob("_C*.so")
    return library


@pytest.fixture(scope="module")
def usage(extension):
    found, counts = (
        read(cuobjdump(option, extension))
        for read, option in ((parse_usage, "--dump-resource-usage"), (count_instructions, "--dump-sass"))
    )
    found = {arch: {name: k | counts[arch][name] for name, k in kernels.items()} for arch, kernels in found.items()}
    if os.environ.get("MVDREAM_FAST_RECORD"):
        write_record(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch, usage):
    check(arch, usage[arch])


@pytest.mark.slow
def test_the_linked_extension_has_every_op_and_refuses_without_a_gpu(extension):
    done = subprocess.run([sys.executable, __file__, extension], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert set(said["names"]) == CLASSES | FUNCTIONS
    assert said["cuda"].startswith("13.") or said["cuda"].startswith("12."), said["cuda"]
    assert said["cuda"].endswith(" for 80-real 90-real 100-real 120")
    assert said["cpu_still_works"] == [0.5, 0.5]
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0:
        pytest.skip("there is a GPU: tests/ops/test_cuda_gpu.py calls them on it")
    assert set(said["refusals"]) == FUNCTIONS
    for name, text in said["refusals"].items():
        assert re.fullmatch(r"[a-z_ ]+: CUDA must succeed, got .*(driver|device).*; .+", text), (name, text)


def say_what_it_can(library):
    """Prints what the module at `library` exports and what each of its CUDA functions says without a device."""
    import ctypes

    spec = importlib.util.spec_from_file_location("_C", library)
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    cuda, queue, box = native.cuda, native.cuda.Queue(0), [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0]
    grid = native.HashGrid(2, [(3.0, 4, 0, 64, False)])
    field = native.Field(grid, 0.5, 10.0, 0.5, False, True, 0, [(0, 16, 2), (0, 1, 16)], [(0, 16, 2), (0, 3, 16)])
    march = cuda.MarchArgs(*[0] * 5, 0.0, 9.0, 4, 0, [4, 4, 4], box, 0.1, -1, queue)
    packed = cuda.Packed(0, 0, 0, 4, queue)
    scan = cuda.ScanArgs(0, 0, 4, 0, False, True, False, False, 0, queue)
    meshes = native.Meshes(0, 0, 1, 3, 1, 4, 4)
    attributes = native.Attributes(0, 0, 0, 0, 0, [1, 16, 3, 1, 0], 2, 0)
    silhouettes = native.Silhouettes(meshes, 0, 0, 3)
    textured = native.Textured(0, 0, 0, [1, 16, 4, 0], [2, 2, 1, 3], 1, 0)
    calls = {
        "march_status": (march,),
        "march_count": (march, 0, 0),
        "march_fill": (march, 0, 0, 0),
        "sample_positions": (packed, 0, 0, 0),
        "prune_count": (packed, 0, 0.0, 1.0, 0, 0),
        "prune_fill": (packed, 0, 0, 0, 0),
        "update_occupancy": (0, 8, 0, 0, 8, 0.95, 0.01, 0, 0, queue),
        "composite_forward": (packed, *[0] * 9),
        "packed_scan": (scan,),
        "packed_product_backward": (scan, 0),
        "traverse": ([0] * 7, 4, 1, [4, 4, 4], 0.1, 0.0, -1, [0] * 4, [0] * 6, queue),
        "composite_backward": (packed, *[0] * 6, [0] * 5, 0, 0, 0),
        "hash_encode_forward": (grid, 0, 0, 4, 0, queue),
        "hash_encode_backward": (grid, 0, 0, 4, 0, 1 << 20, 0, queue),
        "field_forward": (field, 0, 4, 0, 0, queue),
        "field_backward": (field, 0, 4, 0, 0, 1 << 20, 0, 0, 0, queue),
        "render": (field, march, 0.0, 1.0, 0, 0, 0, 0, 0),
        "rasterize_forward": (meshes, 0, 0, queue),
        "rasterize_backward": (meshes, *[0] * 4, queue),
        "interpolate_forward": (attributes, 0, 0, queue),
        "interpolate_backward": (attributes, 0, 0, 1 << 20, 0, 0, queue),
        "antialias_forward": (silhouettes, 0, 0, 0, queue),
        "antialias_backward": (silhouettes, 0, 0, 0, 1 << 20, 0, queue),
        "texture_forward": (textured, 0, queue),
        "texture_backward": (textured, 0, 1 << 20, 0, 0, queue),
    }
    refusals = {}
    for name, arguments in calls.items():
        try:
            getattr(cuda, name)(*arguments)
        except RuntimeError as error:
            refusals[name] = str(error)
    points, ones, out = (ctypes.c_float * 6)(*[0.3] * 6), (ctypes.c_float * 64)(*[0.5] * 64), (ctypes.c_float * 2)()
    grid = native.HashGrid(1, [(3.0, 4, 0, 64, False)])
    native.hash_encode_forward(grid, *map(ctypes.addressof, (ones, points)), 2, ctypes.addressof(out), 1)
    names = [name for name in dir(cuda) if not name.startswith("_")]
    info = {"names": names, "cuda": native.build_info()["cuda"], "cpu_still_works": list(out), "refusals": refusals}
    print(json.dumps(info))


def test_the_log_is_read():
    log = """ptxas info    : Compiling entry function '_ZN4cuda20field_forward_kernelILi64ELb0EEEv' for 'sm_90'
ptxas info    : Function properties for _ZN
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem"""
    expected = {"stack_bytes": 8, "registers": 40, "static_shared_bytes": 128}
    assert parse(log) == {"field_forward_kernel<64,0>": expected}
    dump = """arch = sm_90
Resource usage:
 Function _ZN4cuda20field_forward_kernelILi64ELb0EEEv:
  REG:40 STACK:8 SHARED:1152 LOCAL:0 CONSTANT[0]:424"""
    assert parse_usage(dump) == {"sm_90": {"field_forward_kernel<64,0>": expected}}
    dump = """	code for sm_90
		Function : _ZN4cuda20field_forward_kernelILi64ELb0EEEv
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDS.64 R2, [R0] ;           /* 0x00000a00ff017b82 */
        /*0020*/               @P0 LD.E R2, [R0] ;             /* 0x00000a00ff017b82 */"""
    counts = {"instructions": 3, "shared_loads": 1, "generic_loads": 1}
    assert count_instructions(dump) == {"sm_90": {"field_forward_kernel<64,0>": counts}}


if __name__ == "__main__":
    say_what_it_can(sys.argv[1])
