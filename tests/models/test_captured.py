"""When a call becomes a graph, when it may not, and what becomes of arguments, answers and gradients; on small layers.

The graphs are reference/graph_stand_in.py's. What is captured of the models: test_denoiser.py, test_sds_graph.py,
test_captured_steps.py.
"""

import contextlib
import gc
import threading
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from reference.graph_stand_in import GraphStandIn, capturable
from torch import nn

from mvdream_fast.models import captured
from mvdream_fast.models.captured import MOST, Captured


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch):
    capturable(monkeypatch)


@pytest.fixture(autouse=True)
def _nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def layer(width: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, width)


def scaled(module: nn.Module, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor]:
    return (module(x) * scale,)


def graphs() -> int:
    return len(GraphStandIn.made)


@contextlib.contextmanager
def said_once(why: str):
    """Inside, the work named "the work" says once why it stays without a graph."""
    text = f"the work runs without a CUDA graph: .*{why}.*; graphs=False or --no-graphs leaves the attempt out"
    with pytest.warns(RuntimeWarning, match=text) as said:
        yield
    assert len(said) == 1


def agree(call: Captured, *arguments) -> torch.Tensor:
    """The call's answer, which must be that of the work itself to the bit."""
    (answer,) = call(*arguments)
    assert torch.equal(answer, call.work(*arguments)[0])
    return answer


def test_the_second_call_of_a_kind_is_captured_and_the_answers_are_the_callers():
    call, module, answers = Captured("it", scaled), layer(), []
    for i in range(4):
        x = torch.full((2, 3), float(i))
        answers.append(agree(call, module, x))
        assert (graphs(), GraphStandIn.replays) == ((0, 0) if i == 0 else (1, i))
        x.zero_()  # the caller's own, too
    for i, answer in enumerate(answers):
        assert torch.equal(answer, module(torch.full((2, 3), float(i))))
        assert not answer.requires_grad or i == 0


def test_without_a_device_for_them_or_switched_off_there_are_none(monkeypatch):
    off, module, x = Captured("it", scaled, enabled=False), layer(), torch.ones(2, 3)
    for _ in range(3):
        agree(off, module, x)
    monkeypatch.setattr(captured, "graphs_on", lambda device: None)
    on = Captured("it", scaled)
    for _ in range(3):
        agree(on, module, x)
    assert graphs() == 0


def test_a_cpu_has_none_and_cuda_has_its_own(monkeypatch):
    monkeypatch.undo()
    assert captured.graphs_on(torch.device("cpu")) is None
    assert captured.graphs_on(torch.device("cuda", 1)) is captured.CudaGraph


def test_each_kind_has_its_own_graph():
    call, module = Captured("it", scaled), layer()
    wide = torch.arange(12.0).reshape(2, 6)
    arguments = [
        (module, torch.ones(2, 3)), (module, torch.ones(4, 3)), (module, wide[:, ::2]), (module, torch.ones(2, 3), 2.0),
    ]  # fmt: skip
    for _ in range(3):
        for given in arguments:
            agree(call, *given)
    assert graphs() == len(arguments)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert agree(call, *arguments[0]).dtype == torch.bfloat16
    with torch.no_grad():
        for _ in range(3):
            agree(call, *arguments[0])
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            agree(call, *arguments[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert graphs() == len(arguments) + 3


def test_new_numbers_in_the_weights_are_read_and_new_weights_make_a_new_graph():
    call, module, x = Captured("it", scaled), layer(), torch.ones(2, 3)
    for _ in range(2):
        agree(call, module, x)
    with torch.no_grad():
        module.weight.mul_(3)
    agree(call, module, x)
    module.load_state_dict(layer().state_dict())
    agree(call, module, x)
    module.weight.data.add_(1)  # unseen by versions
    agree(call, module, x)
    assert graphs() == 1
    for change in (
        lambda: module.load_state_dict({name: 2 * w for name, w in module.state_dict().items()}, assign=True),
        lambda: setattr(module, "weight", nn.Parameter(torch.ones(3, 3))),
        lambda: setattr(module.weight, "data", torch.full((3, 3), 0.5)),
        lambda: setattr(module, "bias", None),
        lambda: module.eval(),
        lambda: module.requires_grad_(False),
    ):
        n = graphs()
        change()
        for _ in range(3):
            agree(call, module, x)
        assert graphs() == n + 1


def test_a_replaced_layer_and_another_model_are_seen():
    call, x = Captured("it", scaled), torch.ones(2, 3)
    model = nn.Sequential(layer(), nn.Tanh())
    for _ in range(3):
        agree(call, model, x)
    model[1] = nn.ReLU()
    for _ in range(3):
        agree(call, model, x)
    other = nn.Sequential(layer(), nn.ReLU())
    with torch.no_grad():
        other[0].weight.add_(1)
    for _ in range(3):
        agree(call, other, x)
    assert graphs() == 3


def test_a_setting_with_a_list_in_it_is_known_by_itself():
    @dataclass(frozen=True)
    class Settings:
        scales: list[float]

    def work(module, x, settings):
        return (module(x) * settings.scales[0],)

    call, module = Captured("it", work), layer()
    for settings in (Settings([2.0]), Settings([3.0])):
        for i in range(3):
            agree(call, module, torch.full((2, 3), float(i)), settings)
    assert graphs() == 2


def test_two_models_at_once_have_graphs_of_their_own():
    calls, x = [Captured("it", scaled) for _ in range(2)], torch.ones(2, 3)
    models = [layer(), layer()]
    with torch.no_grad():
        models[1].weight.mul_(-1)
    for _ in range(3):
        for call, model in zip(calls, models, strict=True):
            agree(call, model, x)
    assert graphs() == 2


def test_what_a_graph_would_pass_over_runs_eagerly_which_is_said_once():
    seen = []

    class Mine(nn.Linear):
        scale = 1.0

        def forward(self, x):
            return self.scale * super().forward(x)

    hooked, mine = layer(), Mine(3, 3)
    hooked.register_forward_hook(lambda *_: seen.append(1))
    unusual = layer()
    unusual.weight = nn.Parameter(torch.ones(3, 3).as_subclass(type("Sub", (torch.Tensor,), {})))
    opaque = {hooked: "a hook is on a Linear", mine: "what a Mine does", unusual: "a weight of a Linear is a Sub"}
    for module, why in opaque.items():
        call, x = Captured("the work", scaled), torch.ones(2, 3)
        with said_once(why):
            for _ in range(3):
                call(module, x)
    assert len(seen) == 3
    assert graphs() == 0


def test_neither_hooks_on_all_modules_nor_a_forward_of_its_own_are_passed_over():
    seen, patched, x = [], NormAndConv(), torch.ones(2, 3)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        call = Captured("the work", scaled)
        with said_once("a hook is on all modules"):
            for _ in range(3):
                call(layer(), x)
    finally:
        handle.remove()
    assert len(seen) == 3
    for module in (layer(), patched):
        call, factor = Captured("the work", scaled), [2.0]
        plain = module.forward
        module.forward = lambda x, plain=plain, factor=factor: factor[0] * plain(x)
        with said_once(f"a {type(module).__name__} has a forward of its own"):
            for i in range(3):
                factor[0] = float(i)
                agree(call, module, x if module is not patched else torch.ones(1, 4, 5, 5))
    assert graphs() == 0


class NormAndConv(nn.Module):
    """Torch's layers, whose settings may be switched."""

    __module__ = "mvdream_fast.models.stand_in"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop, self.conv = nn.GroupNorm(2, 4), nn.Dropout(0.0), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.drop(self.norm(x)))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("norm", "eps", 10.0), ("norm", "num_groups", 1), ("conv", "padding_mode", "circular"), ("conv", "stride", (2, 2)),
     ("drop", "p", 1.0)],
)  # fmt: skip
def test_settings_of_torchs_own_layers_are_seen(name, setting, value):
    call, module = Captured("it", scaled), NormAndConv()
    x = torch.arange(100.0).reshape(1, 4, 5, 5).sin()
    for _ in range(3):
        before = agree(call, module, x)
    setattr(getattr(module, name), setting, value)
    if setting == "padding_mode":
        module.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    for _ in range(3):
        after = agree(call, module, x)
    assert before.shape != after.shape or not torch.equal(before, after)
    assert graphs() == 2


SWITCHES = [
    (torch.backends.cudnn, "enabled"), (torch.backends.cudnn, "deterministic"), (torch.backends.cudnn, "benchmark"),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    (torch.backends.cuda.matmul, "allow_fp16_accumulation"),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "name"), SWITCHES, ids=[name for _, name in SWITCHES])
def test_settings_of_torch_have_graphs_of_their_own(owner, name):
    call, module, x = Captured("it", scaled), layer(), torch.ones(2, 3)
    was = getattr(owner, name)
    try:
        for value in (was, not was):
            setattr(owner, name, value)
            for _ in range(3):
                agree(call, module, x)
    finally:
        setattr(owner, name, was)
    assert graphs() == 2


def test_the_usual_dtype_has_a_graph_of_its_own():
    def work(module, x):
        return (module(x) + torch.zeros(2, 3),)

    call, module, x = Captured("it", work), layer(), torch.ones(2, 3)
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            for _ in range(3):
                assert agree(call, module, x).dtype == dtype
        finally:
            torch.set_default_dtype(torch.float32)
    assert graphs() == 2


@pytest.mark.parametrize("what", ["shapes or settings", "weights, layers or adapters"])
def test_what_changes_at_every_call_is_never_captured_which_is_said_once(what):
    call, module = Captured("the work", scaled), layer()
    with said_once(f"its {what} change from call to call"):
        for i in range(3 * MOST):
            if "shapes" in what:
                agree(call, module, torch.ones(i + 1, 3))
            else:
                module.weight = nn.Parameter(torch.full((3, 3), float(i)))
                agree(call, module, torch.ones(2, 3))
    assert graphs() == 0


def test_the_graphs_that_were_used_last_are_kept():
    call, module = Captured("it", scaled), layer()
    for n in range(1, MOST + 2):
        for _ in range(2):
            agree(call, module, torch.ones(n, 3))
    assert graphs() == MOST + 1
    agree(call, module, torch.ones(MOST + 1, 3))
    assert graphs() == MOST + 1
    for _ in range(2):
        agree(call, module, torch.ones(1, 3))  # forgotten, so it is met anew
    assert graphs() == MOST + 2


@pytest.mark.parametrize("look", ["item", "numpy", "mask", "constant", "memory"])
def test_a_capture_that_fails_leaves_the_work_as_it_is_and_says_why(look):
    def work(module, x):
        y = module(x).detach()
        if look == "item":
            return (y * y.sum().item(),)
        if look == "numpy":
            return (y * float(y.numpy().sum()),)
        if look == "mask":
            return (y[y > 0],)
        if look == "constant":
            return (y * torch.tensor(2.0),)
        if captured.is_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (y,)

    call, module = Captured("the work", work), layer()
    why = "there is not enough memory" if look == "memory" else "waits for the device"
    with said_once(why):
        for i in range(4):
            agree(call, module, torch.full((2, 3), float(i)))
    assert graphs() == 0


def test_an_error_of_the_work_is_its_own():
    call = Captured("the work", lambda module, x: (module(x @ x),))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            call(layer(), torch.ones(2, 3))


def test_an_error_in_a_graph_names_it(monkeypatch):
    class Broken(GraphStandIn):
        def replay(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    call, module, x = Captured("the guided UNet call", scaled), layer(), torch.ones(2, 3)
    monkeypatch.setattr(captured, "graphs_on", lambda device: Broken)
    call(module, x)
    with pytest.raises(RuntimeError) as raised:
        call(module, x)
    assert str(raised.value) == (
        "the guided UNet call: its CUDA graph failed: CUDA error: an illegal memory access was encountered; "
        "graphs=False or --no-graphs shows where"
    )


def test_other_threads_know_of_a_capture_as_autograds_on_cuda_must():
    known = []

    def work(module, x):
        thread = threading.Thread(target=lambda: known.append(captured.is_capturing()))
        thread.start()
        thread.join()
        return (module(x),)

    call, module = Captured("it", work), layer()
    for _ in range(3):
        call(module, torch.ones(2, 3))
    assert known == [False, True, True]  # eager, warmed up, recorded; a replay runs no Python
    assert not captured.is_capturing()


def test_inside_of_a_graph_another_is_the_work_itself():
    inner = Captured("inner", scaled)
    outer = Captured("outer", lambda module, x: inner(module, x))
    module = layer()
    for i in range(4):
        agree(outer, module, torch.full((2, 3), float(i)))
        agree(inner, module, torch.full((2, 3), float(i)))
    assert graphs() == 2


def test_forgetting_frees_the_graphs():
    call, module = Captured("it", scaled), layer()
    for _ in range(2):
        call(module, torch.ones(2, 3))
    graph = weakref.ref(GraphStandIn.made.pop())
    assert graph() is not None
    call.forget()
    gc.collect()
    assert graph() is None


# Gradients


def descend(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor]:
    loss = module(x).square().sum()
    loss.backward()
    return (loss.detach(),)


def test_gradients_add_up_as_without_graphs():
    """Two layers, of which some calls use only the first: its gradient alone is there, the other stays None."""
    pairs = [nn.ModuleList([layer(), layer()]) for _ in range(2)]
    calls = [Captured("it", _partly, list(pair.parameters())) for pair in pairs]
    calls[1].enabled = False
    for i, (n_micro, both) in enumerate([(1, True), (2, True), (3, False), (1, False), (2, True), (2, False)]):
        for pair, call in zip(pairs, calls, strict=True):
            for p in pair.parameters():
                p.grad = None
            if i == 4:
                pair[0].weight.grad = torch.ones(3, 3)  # somebody else's
            for micro in range(n_micro):
                call(pair, torch.full((2, 3), 1.0 + i + micro), both)
        ours, eager = ([p.grad for p in pair.parameters()] for pair in pairs)
        for a, b in zip(ours, eager, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    assert graphs() == 2
    assert pairs[0][1].weight.grad is None
    kept = pairs[0][0].weight.grad
    for p in pairs[0].parameters():
        p.grad = None
    calls[0](pairs[0], torch.ones(2, 3), True)
    assert pairs[0][0].weight.grad is kept  # in the same memory, from graph to graph


def _partly(pair: nn.ModuleList, x: torch.Tensor, both: bool) -> tuple[torch.Tensor]:
    return descend(nn.Sequential(*pair) if both else pair[0], x)


def test_a_graph_that_is_made_between_two_others_leaves_their_gradients():
    module = layer()
    call = Captured("it", descend, list(module.parameters()))
    for _ in range(3):
        call(module, torch.ones(2, 3))
    before = module.weight.grad.clone()
    call(module, torch.ones(4, 3))  # met for the first time
    call(module, torch.ones(4, 3))  # captured
    (one,) = torch.autograd.grad(module(torch.ones(4, 3)).square().sum(), module.weight)
    torch.testing.assert_close(module.weight.grad, before + one + one)


def test_training_with_graphs_gives_the_same_bytes():
    runs = []
    for enabled in (True, False):
        module = layer()
        call = Captured("it", descend, list(module.parameters()), enabled)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        losses = []
        for i in range(6):
            losses += call(module, torch.full((2, 3), 1.0 + i))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        runs.append([*losses, *module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert graphs() == 1
