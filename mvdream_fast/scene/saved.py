"""What a representation is handed back from a file: whether it is its own."""

from collections.abc import Mapping

from torch import Tensor

from mvdream_fast.core.errors import ModelError


def check_state(what: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises ModelError where the names or shapes of tensors found are not one's own, or a number is not finite.

    what: of which they are, in the errors: "volume".
    """
    wanted, given = ({name: tuple(x.shape) for name, x in tensors.items()} for tensors in (own, found))
    if wanted != given:
        name, shape = sorted(set(wanted.items()) ^ set(given.items()))[0]
        raise ModelError(f"the saved {what} is of another configuration: {name} {list(shape)}")
    for name, value in found.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ModelError(f"the saved {what} holds numbers that are not finite in {name}")
