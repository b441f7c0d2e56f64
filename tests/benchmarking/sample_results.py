"""A results file made by hand: four contests, a goal that was met and one that was missed, one peer that can't run."""

from mvdream_fast.benchmarking.results import Contest, Goal, Limit, Machine, Results, Row, Scaling, Skipped

LIMIT = Limit(multiply_add_gflop_s=100.0, copy_gb_s=20.0, gather_gb_s=5.0)

GEGLU = Contest(
    group="geglu (2048, 1024)",
    what="forward",
    file="bench_geglu.py",
    rows=(
        Row("reference", "reference", 4e-3, 2e-4, 30, 64.0, 2.0, 3.0, 0.15),
        Row("torch.compile", "peer", 2.5e-3, 1e-4, 30, 48.0, 3.2, 4.8, 0.24),
        Row("ours", "ours", 2e-3, 1e-4, 30, 48.0, 4.0, 6.0, 0.30),
    ),
    work={"flop": 8e6, "bytes": 12e6},
    skipped=(Skipped("xformers", "needs a GPU"),),
    goals=(
        Goal("speed of ours against reference: at least 2.5x", 2.5, 2.0, "x", False),
        Goal("time of ours: at most 0.003 s", 0.003, 0.002, "s", True),
    ),
    limit=LIMIT,
)
BACKWARD = Contest(
    group="geglu (2048, 1024)",
    what="forward+backward",
    file="bench_geglu.py",
    rows=(Row("reference", "reference", 8e-3, 4e-4, 30), Row("ours", "ours", 5e-3, 1e-4, 30, of_limit=0.4)),
    limit=LIMIT,
)
FIELD = Contest(
    group="field",
    what="forward",
    file="bench_field.py",
    rows=(
        Row("reference, 10000 samples", "reference", 0.06, 0.003, 5),
        Row("ours, 10000 samples", "ours", 2e-3, 1e-4, 20, gflop_s=40.0, gb_s=4.0),
        Row("ours, 1e+06 samples", "ours", 0.17, 1e-2, 20, gflop_s=47.0, gb_s=4.7),
    ),
    scaling=Scaling("samples", {"reference": ((1e4, 0.06),), "ours": ((1e4, 2e-3), (1e6, 0.17))}),
    limit=LIMIT,
)
MARCH = Contest("march", "forward", "bench_render.py", (Row("ours", "ours", 0.5, 0.01, 10, of_limit=0.5),))

RESULTS = Results(
    name="a-cpu-2-cores-avx2",
    machine=Machine(cpu="A CPU", cores=2, isa="AVX2", threads=2, memory_gb=8.0),
    versions={"python": "3.11.2", "torch": "2.13.0"},
    commit="0123456789",
    changed=False,
    date="2026-11-29",
    command="make bench",
    contests=(FIELD, GEGLU, BACKWARD, MARCH),
)
