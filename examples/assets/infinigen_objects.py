"""Household things, fruit and sea creatures from Infinigen's generators, as PLY files with baked colours.

    python examples/assets/infinigen_objects.py OUT --seeds 14 --minutes 180

runs in an environment of its own (Python 3.11, bpy 4.2.0, infinigen 1.15.5 without python-fcl and coacd; BSD-3). One
process makes the seeds of one factory; whatever hangs is ended from outside after --patience seconds of CPU time and
not tried again. Run it again to go on. OUT/metadata.csv names every object, for `python -m mvdream_fast.render OUT`.
"""

import argparse
import contextlib
import csv
import importlib
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

MAX_FACES = 20_000
LOADING = 20.0  # seconds of CPU time for Blender, with the first object
COLUMNS = ("file", "caption", "noun", "category", "has_front", "pack", "creator", "licence")
CREATOR = "Princeton Vision & Learning Lab and the Infinigen authors"

# noun: (module, class, category, has a front)
FACTORIES = {
    "bottle": ("tableware.bottle", "BottleFactory", "kitchenware", False),
    "bowl": ("tableware.bowl", "BowlFactory", "kitchenware", False),
    "tin can": ("tableware.can", "CanFactory", "food", False),
    "chopsticks": ("tableware.chopsticks", "ChopsticksFactory", "kitchenware", False),
    "cup": ("tableware.cup", "CupFactory", "kitchenware", False),
    "fork": ("tableware.fork", "ForkFactory", "kitchenware", False),
    "spoon": ("tableware.spoon", "SpoonFactory", "kitchenware", False),
    "knife": ("tableware.knife", "KnifeFactory", "kitchenware", False),
    "frying pan": ("tableware.pan", "PanFactory", "kitchenware", False),
    "cooking pot": ("tableware.pot", "PotFactory", "kitchenware", False),
    "plate": ("tableware.plate", "PlateFactory", "kitchenware", False),
    "food bag": ("tableware.food_bag", "FoodBagFactory", "food", True),
    "food box": ("tableware.food_box", "FoodBoxFactory", "food", True),
    "plant pot": ("tableware.plant_container", "PlantPotFactory", "plant", False),
    "apple": ("fruits.apple", "FruitFactoryApple", "food", False),
    "pineapple": ("fruits.pineapple", "FruitFactoryPineapple", "food", False),
    "blackberry": ("fruits.blackberry", "FruitFactoryBlackberry", "food", False),
    "strawberry": ("fruits.strawberry", "FruitFactoryStrawberry", "food", False),
    "starfruit": ("fruits.starfruit", "FruitFactoryStarfruit", "food", False),
    "durian": ("fruits.durian", "FruitFactoryDurian", "food", False),
    "young coconut": ("fruits.coconutgreen", "FruitFactoryCoconutgreen", "food", False),
    "coconut": ("fruits.coconuthairy", "FruitFactoryCoconuthairy", "food", False),
    "chair": ("seating.chairs.chair", "ChairFactory", "furniture", True),
    "bar stool": ("seating.chairs.bar_chair", "BarChairFactory", "furniture", True),
    "office chair": ("seating.chairs.office_chair", "OfficeChairFactory", "furniture", True),
    "pillow": ("seating.pillow", "PillowFactory", "household", False),
    "mattress": ("seating.mattress", "MattressFactory", "furniture", False),
    "sofa": ("seating.sofa", "SofaFactory", "furniture", True),
    "armchair": ("seating.sofa", "ArmChairFactory", "furniture", True),
    "desk lamp": ("lamp.lamp", "DeskLampFactory", "lamp", False),
    "floor lamp": ("lamp.lamp", "FloorLampFactory", "lamp", False),
    "ceiling lamp": ("lamp.ceiling_lights", "CeilingLightFactory", "lamp", False),
    "hanging lamp": ("lamp.ceiling_classic_lamp", "CeilingClassicLampFactory", "lamp", False),
    "dishwasher": ("appliances.dishwasher", "DishwasherFactory", "household", True),
    "refrigerator": ("appliances.beverage_fridge", "BeverageFridgeFactory", "household", True),
    "oven": ("appliances.oven", "OvenFactory", "household", True),
    "toaster": ("appliances.toaster", "ToasterFactory", "household", True),
    "tv": ("appliances.tv", "TVFactory", "electronics", True),
    "monitor": ("appliances.tv", "MonitorFactory", "electronics", True),
    "bathroom sink": ("bathroom.bathroom_sink", "BathroomSinkFactory", "bathroom", True),
    "pedestal sink": ("bathroom.bathroom_sink", "StandingSinkFactory", "bathroom", True),
    "bathtub": ("bathroom.bathtub", "BathtubFactory", "bathroom", True),
    "toilet": ("bathroom.toilet", "ToiletFactory", "bathroom", True),
    "clam": ("mollusk.generate", "ClamFactory", "animal", False),
    "mussel": ("mollusk.generate", "MusselFactory", "animal", False),
    "conch shell": ("mollusk.generate", "ConchFactory", "animal", False),
    "auger shell": ("mollusk.generate", "AugerFactory", "animal", False),
    "volute shell": ("mollusk.generate", "VoluteFactory", "animal", False),
    "nautilus shell": ("mollusk.generate", "NautilusFactory", "animal", False),
    "dining table": ("tables.dining_table", "TableDiningFactory", "furniture", False),
    "side table": ("tables.dining_table", "SideTableFactory", "furniture", False),
    "coffee table": ("tables.dining_table", "CoffeeTableFactory", "furniture", False),
    "cocktail table": ("tables.cocktail_table", "TableCocktailFactory", "furniture", False),
    "trousers": ("clothes.pants", "PantsFactory", "clothing", True),
    "shirt": ("clothes.shirt", "ShirtFactory", "clothing", True),
    "folded towel": ("clothes.towel", "TowelFactory", "household", False),
    "book": ("table_decorations.book", "BookFactory", "book", False),
    "stack of books": ("table_decorations.book", "BookStackFactory", "book", False),
    "row of books": ("table_decorations.book", "BookColumnFactory", "book", True),
    "vase": ("table_decorations.vase", "VaseFactory", "decor", False),
    "kitchen sink": ("table_decorations.sink", "SinkFactory", "household", True),
    "faucet": ("table_decorations.sink", "TapFactory", "household", True),
    "balloon": ("wall_decorations.balloon", "BalloonFactory", "decor", True),
    "range hood": ("wall_decorations.range_hood", "RangeHoodFactory", "household", True),
    "rug": ("elements.rug", "RugFactory", "decor", False),
    "snake plant": ("small_plants.snake_plant", "SnakePlantFactory", "plant", False),
    "spider plant": ("small_plants.spider_plant", "SpiderPlantFactory", "plant", False),
    "succulent": ("small_plants.succulent", "SucculentFactory", "plant", False),
    "bookcase": ("shelves.simple_bookcase", "SimpleBookcaseFactory", "furniture", True),
    "shelf": ("shelves.cell_shelf", "CellShelfFactory", "furniture", True),
    "large shelf": ("shelves.large_shelf", "LargeShelfFactory", "furniture", True),
    "corner shelf": ("shelves.triangle_shelf", "TriangleShelfFactory", "furniture", True),
    "tv stand": ("shelves.cell_shelf", "TVStandFactory", "furniture", True),
    "cabinet": ("shelves.single_cabinet", "SingleCabinetFactory", "furniture", True),
    "desk": ("shelves.simple_desk", "SimpleDeskFactory", "furniture", True),
    "aquarium": ("decor.aquarium_tank", "AquariumTankFactory", "decor", False),
    "fish": ("creatures.fish", "FishFactory", "animal", True),
    "beetle": ("creatures.beetle", "BeetleFactory", "animal", True),
    "dragonfly": ("creatures.insects.dragonfly", "DragonflyFactory", "animal", True),
    "jellyfish": ("creatures.jellyfish", "JellyfishFactory", "animal", False),
}


def main() -> None:
    """Makes what is missing, one seed of all nouns after the other, until the minutes are used up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=14, help="variants of each noun")
    parser.add_argument("--batch", type=int, default=4, help="seeds that one process makes")
    parser.add_argument("--nouns", nargs="*", default=list(FACTORIES), help="only these")
    parser.add_argument("--patience", type=float, default=40, help="seconds for one object")
    parser.add_argument("--minutes", type=float, default=180, help="stop after so many")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.worker:
        noun, *seeds = json.loads(args.worker)
        work(args.out, noun, seeds)
        return
    end = time.monotonic() + 60 * args.minutes
    log = args.out / "log.jsonl"  # what was tried, and what came of it
    for first in range(0, args.seeds, args.batch):
        for noun in args.nouns:
            tried = {tuple(json.loads(line)[:2]) for line in log.read_text().splitlines()} if log.exists() else set()
            seeds = [s for s in range(first, min(first + args.batch, args.seeds)) if (noun, s) not in tried]
            while seeds and time.monotonic() < end:
                seeds = watched(args.out, noun, seeds, args.patience, log)
    write_metadata(args.out)


def watched(out: Path, noun: str, seeds: list[int], patience: float, log: Path) -> list[int]:
    """Runs a worker for some seeds; returns those that are left after one that hung or crashed."""
    command = [sys.executable, __file__, str(out), "--worker", json.dumps([noun, *seeds])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout or ()], daemon=True).start()
    left, until = list(seeds), patience + LOADING
    while left:
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if process.poll() is None and used(process) < until:
                continue
            line = f"RESULT {'crashed' if process.poll() is not None else 'took too long'}"
        if line.startswith("RESULT "):
            with log.open("a") as file:
                file.write(json.dumps([noun, left.pop(0), line[7:].strip()]) + "\n")
            until = used(process) + patience
            if "made" not in line:
                break
    if left:
        process.kill()
    process.wait()
    return left


def used(process: subprocess.Popen) -> float:
    """Seconds of CPU time that a process has had, so that a busy machine makes nobody late."""
    with contextlib.suppress(psutil.NoSuchProcess):
        times = psutil.Process(process.pid).cpu_times()
        return times.user + times.system
    return 0.0


def write_metadata(out: Path) -> None:
    """metadata.csv of all objects in the folder, as `python -m mvdream_fast.render` reads it."""
    with (out / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for noun, (_, _, category, front) in FACTORIES.items():
            for path in sorted(out.glob(f"{noun.replace(' ', '-')}_*.ply")):
                row = path.name, noun, noun, category, "yes" if front else "no", "infinigen", CREATOR, "BSD-3-Clause"
                writer.writerow(row)


def work(out: Path, noun: str, seeds: list[int]) -> None:
    """Makes the objects in this process; a line `RESULT made` or `RESULT <error>` for each."""
    import infinigen.core.init
    from infinigen.core.util.math import FixedSeed

    infinigen.core.init.require_blender_addon = lambda *_, **__: True  # no add-on is needed, or fetched
    module, name, _, _ = FACTORIES[noun]
    factory_of = getattr(importlib.import_module(f"infinigen.assets.objects.{module}"), name)
    for seed in seeds:
        try:
            clear()
            with FixedSeed(seed):
                factory = factory_of(seed)
                made = factory.spawn_asset(0)
                factory.finalize_assets([made])
            bake(joined(made), out / f"{noun.replace(' ', '-')}_{seed}.ply")
            result = "made"
        except Exception as error:  # a generator fails in many ways, each of them says something of itself alone
            result = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        print(f"RESULT {result}", flush=True)
        if result != "made":
            return


def clear() -> None:
    """Empties the scene, so that no seed sees what another has left."""
    import bpy

    for item in list(bpy.data.objects):
        bpy.data.objects.remove(item, do_unlink=True)
    kinds = ("meshes", "materials", "curves", "textures", "images", "node_groups", "collections")
    for items in (getattr(bpy.data, kind) for kind in kinds):
        for item in list(items):
            items.remove(item)


def joined(made):
    """One mesh of an object and its children, all modifiers applied, with 4,000 to MAX_FACES faces where it can."""
    import bpy

    bpy.context.view_layer.update()
    family = [made, *made.children_recursive]
    meshes = [x for x in family if x.type == "MESH" and not x.hide_render]
    graph = bpy.context.evaluated_depsgraph_get()
    copies = []
    for item in meshes:
        mesh = bpy.data.meshes.new_from_object(item.evaluated_get(graph), depsgraph=graph)
        mesh.transform(item.matrix_world)
        copies.append(bpy.data.objects.new("copy", mesh))
        bpy.context.scene.collection.objects.link(copies[-1])
    for item in [x for x in bpy.data.objects if x not in copies]:
        bpy.data.objects.remove(item, do_unlink=True)
    select(copies)
    if len(copies) > 1:
        bpy.ops.object.join()
    item = bpy.context.view_layer.objects.active
    n = len(item.data.polygons)
    if n > MAX_FACES:
        item.modifiers.new("fewer", "DECIMATE").ratio = MAX_FACES / n
        bpy.ops.object.modifier_apply(modifier="fewer")
    elif n < 4000:  # colours are baked into the vertices
        more = item.modifiers.new("more", "SUBSURF")
        more.subdivision_type, more.levels = "SIMPLE", 1 if n > 1200 else 2
        bpy.ops.object.modifier_apply(modifier="more")
    return item


def select(items: list) -> None:
    """Makes these the selected objects, the first the active one."""
    import bpy

    bpy.ops.object.select_all(action="DESELECT")
    for item in items:
        item.select_set(True)
    bpy.context.view_layer.objects.active = items[0]


def bake(item, path: Path) -> None:
    """The base colours of all materials into the vertices, then a PLY file with y up and the front at +Z."""
    import bpy
    import numpy as np
    import trimesh

    for old in list(item.data.color_attributes):
        item.data.color_attributes.remove(old)
    item.data.attributes.active_color = item.data.color_attributes.new("baked", "FLOAT_COLOR", "POINT")
    for material in [m for m in item.data.materials if m and m.use_nodes]:
        for node in [n for n in material.node_tree.nodes if n.type == "BSDF_PRINCIPLED"]:
            for name in ("Metallic", "Transmission Weight"):  # these have no diffuse colour, and would be black
                socket = node.inputs[name]
                for link in list(socket.links):
                    material.node_tree.links.remove(link)
                socket.default_value = 0
    scene = bpy.context.scene
    scene.render.engine, scene.cycles.device, scene.cycles.samples = "CYCLES", "CPU", 1
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    settings = scene.render.bake
    settings.use_pass_direct = settings.use_pass_indirect = False
    settings.use_pass_color, settings.target = True, "VERTEX_COLORS"
    select([item])
    bpy.ops.object.bake(type="DIFFUSE")
    mesh = item.data
    mesh.calc_loop_triangles()
    points, faces = np.empty((len(mesh.vertices), 3), "f4"), np.empty((len(mesh.loop_triangles), 3), "i4")
    linear = np.empty((len(mesh.vertices), 4), "f4")
    mesh.vertices.foreach_get("co", points.reshape(-1))
    mesh.loop_triangles.foreach_get("vertices", faces.reshape(-1))
    mesh.color_attributes["baked"].data.foreach_get("color", linear.reshape(-1))
    light = np.clip(linear[:, :3], 0, 1)
    srgb = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-6) ** (1 / 2.4) - 0.055)
    colors = np.hstack([np.round(255 * srgb), np.full((len(srgb), 1), 255)]).astype("u1")
    trimesh.Trimesh(points[:, [1, 2, 0]], faces, vertex_colors=colors, process=False).export(path)


if __name__ == "__main__":
    main()
