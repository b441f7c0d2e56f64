"""An op out of one declaration: the autograd.Function of eager calls, and the form in torch.library that graphs hold.

Both are made of the same two functions of the op's arguments; what those compute lives in the op's file.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvdream_fast.ops._edges import is_mapped, vjp


class Differentiable(torch.autograd.Function):
    """What `differentiable` returns: an autograd.Function that knows what it was made of."""

    run: Callable[..., Any]
    pull: Callable[..., Sequence[Any]]
    keeps: tuple[int, ...]
    n_outputs: int


def differentiable(
    run: Callable[..., Any],
    pull: Callable[..., Sequence[Any]],
    *,
    keeps: tuple[int, ...] = (),
    n_outputs: int = 1,
    twice: Callable[..., Any] | None = None,
) -> type[Differentiable]:
    """The autograd.Function of a forward and a backward on the same arguments.

    run: the arguments -> a tensor, or several. The first n_outputs are the op's; the others are there for the backward.
    pull: (cotangents, kept, wanted, *arguments) -> the arguments' gradients in their order, those that have none at
        the end left out. kept: the results of `run` whose numbers are in `keeps`; wanted: a bool for each argument.
    twice: `run` in plain torch, for second derivatives, and for cotangents that stand for a batch of them
        (is_grads_batched, torch.func.vmap); without it there are first ones only.
    """

    def gradients_of(ctx, *cotangents):
        arguments, kept = _saved(ctx)
        if twice is not None and (torch.is_grad_enabled() or any(map(is_mapped, cotangents))):
            return _pull_twice(twice, arguments, cotangents)
        cotangents = [d if d is None else d.resolve_neg() for d in cotangents]  # a kernel reads what lies there
        gradients = pull(cotangents, kept, ctx.needs_input_grad, *arguments)
        missing = len(arguments) - len(gradients)
        return (*gradients, *[None] * missing) if missing else tuple(gradients)

    answer = once_differentiable(gradients_of) if twice is None else gradients_of

    class Function(Differentiable):
        @staticmethod
        def forward(ctx, *arguments):
            outputs = run(*arguments)
            _save(ctx, arguments, [outputs[i] for i in keeps])
            if n_outputs > 1:
                ctx.set_materialize_grads(False)
                return outputs[:n_outputs]
            return outputs if isinstance(outputs, Tensor) else outputs[0]

        @staticmethod
        def backward(ctx, *cotangents):
            return answer(ctx, *cotangents)

    Function.__name__ = run.__module__.rpartition(".")[2]  # after which torch names the node in a graph
    Function.run, Function.pull, Function.keeps, Function.n_outputs = run, pull, keeps, n_outputs
    return Function


def register(schema: str, *, cpu: Callable, cuda: Callable | None = None, fake: Callable) -> None:
    """Makes torch.ops.mvdream_fast.<name>, and where it has derivatives <name>_backward beside it.

    schema: `name(arguments) -> results`, as torch.library writes them. cpu, cuda: what runs on such tensors: either a
    `differentiable` or, for an op without derivatives, a function. fake: the arguments -> empty results of the right
    shapes. A result may be None, for which an empty tensor stands. Gradients come contiguous or, where an argument is
    channels_last, in that format.
    """
    name, _, form = schema.partition("(")
    arguments, _, results = form.rpartition(") -> ")
    bodies = {device: body for device, body in (("cpu", cpu), ("cuda", cuda)) if body is not None}
    one = not results.startswith("(")
    runs = {device: _filling(getattr(body, "run", body), one) for device, body in bodies.items()}
    op = _define(name, f"({form}", runs, _filling(fake, one))
    if not _is_differentiable(cpu):
        return
    lists = _lists_of_tensors(arguments)
    pulls = {device: _pulling(body, lists) for device, body in bodies.items() if _is_differentiable(body)}
    signature = f"(Tensor[] cotangents, Tensor[] kept, bool[] wanted, {arguments}) -> Tensor[]"
    backward = _define(f"{name}_backward", signature, pulls, _pull_faking(lists))

    def setup(ctx, inputs, output):
        outputs = _several(output)
        ctx.lengths = [len(x) if several else None for x, several in zip(inputs, lists)]
        _save(ctx, _flat(inputs, lists), [outputs[i] for i in cpu.keeps])

    def gradients(ctx, *cotangents):
        flat, kept = _saved(ctx)
        wanted = [isinstance(x, Tensor) and x.requires_grad for x in flat]
        own = list(cotangents[: cpu.n_outputs])
        given = iter(backward(own, list(kept), wanted, *_nested(flat, ctx.lengths)))
        return tuple(_nested([next(given) if want else None for want in wanted], ctx.lengths))

    op.register_autograd(gradients, setup_context=setup)


def _is_differentiable(body: Callable) -> TypeGuard[type[Differentiable]]:
    return isinstance(body, type)


def _define(name: str, schema: str, runs: dict[str, Callable], fake: Callable):
    (device, run), *others = runs.items()
    op = torch.library.custom_op(f"mvdream_fast::{name}", run, mutates_args=(), device_types=device, schema=schema)
    for device, run in others:
        op.register_kernel(device, run)
    op.register_fake(fake)
    return op


def _filling(run: Callable, one: bool) -> Callable:
    """`run` with an empty tensor for each result that is None."""

    def filled(*arguments):
        outputs = run(*arguments)
        like = next(x for x in arguments if isinstance(x, Tensor))
        return outputs if one else tuple(like.new_empty(0) if x is None else x for x in outputs)

    return filled


def _pulling(body: type[Differentiable], lists: Sequence[bool]) -> Callable:
    def pull(cotangents, kept, wanted, *arguments):
        gradients = zip(body.pull(cotangents, kept, wanted, *arguments), _flat(arguments, lists), wanted)
        return [_own(d, x) for d, x, want in gradients if want]

    return pull


def _pull_faking(lists: Sequence[bool]) -> Callable:
    def fake(cotangents, kept, wanted, *arguments):
        flat = _flat(arguments, lists)
        return [torch.empty_like(x, memory_format=_format(x)) for x, want in zip(flat, wanted) if want]

    return fake


def _own(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient as `_pull_fake` says, in memory of its own: what an op returns may share none."""
    gradient = gradient.contiguous(memory_format=_format(like))
    shares = gradient.untyped_storage().nbytes() > gradient.numel() * gradient.element_size()
    return gradient.clone() if shares else gradient


def _format(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _pull_twice(twice: Callable, arguments: Sequence[Any], cotangents: Sequence[Tensor | None]) -> tuple:
    """Gradients of the op in plain torch, with a graph of their own where one is recorded."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]

    def run(*tensors):
        given = iter(tensors)
        return _several(twice(*(next(given) if isinstance(x, Tensor) else x for x in arguments)))

    gradients = iter(vjp(run, tensors, cotangents))
    return tuple(next(gradients) if isinstance(x, Tensor) else None for x in arguments)


def _save(ctx, arguments: Iterable[Any], kept: Sequence[Tensor]) -> None:
    ctx.others = others = [None if isinstance(x, Tensor) else x for x in arguments]
    ctx.save_for_backward(*[x if y is None else None for x, y in zip(arguments, others)], *kept)


def _saved(ctx) -> tuple[list[Any], Sequence[Tensor]]:
    """The arguments, and what was kept."""
    saved, others = ctx.saved_tensors, ctx.others
    return [x if y is None else y for x, y in zip(saved, others)], saved[len(others) :]


def _several(outputs: Any) -> Sequence[Any]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _lists_of_tensors(arguments: str) -> list[bool]:
    """Which arguments of a schema are lists of tensors: an empty list does not say what it is of."""
    return [argument.strip().startswith("Tensor[]") for argument in arguments.split(",")]


def _flat(arguments: Sequence[Any], lists: Sequence[bool]) -> list[Any]:
    """The arguments with each list of tensors laid open."""
    return [x for argument, several in zip(arguments, lists) for x in (argument if several else [argument])]


def _nested(flat: Sequence[Any], lengths: Sequence[int | None]) -> list[Any]:
    """The inverse of `_flat`; lengths: of the lists of tensors, None for any other argument."""
    rest = iter(flat)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths]
