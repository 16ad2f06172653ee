"""The hooks of a user's optimizer, which torch would run in its ``step()`` and an engine, which never calls that, runs.

And two of the engine's own: the optimizer's state is in shards, so that torch's ``state_dict()`` would be without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from torch.optim import Optimizer
from torch.optim import optimizer as of_all

from megatron_ds.errors import EngineError

Hook = Callable[[Optimizer, Any, Any], Any]


class OptimizerHooks:
    """Runs what ``register_step_pre_hook`` and ``register_step_post_hook`` got, around an update that is not skipped.

    Args:
        optimizer: None for the configuration's own, which has no hooks.
        keeps_state: the optimizer's ``state_dict()`` is refused, which would come without what is kept.
        mark_gradients: called before hooks run: ``.grad``, which they may look at, says that it is elsewhere.
    """

    def __init__(self, optimizer: Optimizer | None, keeps_state: bool, mark_gradients: Callable[[], None]):
        self._optimizer, self._mark_gradients = optimizer, mark_gradients
        self._own = []
        if optimizer is not None and keeps_state:
            self._own = [
                optimizer.register_state_dict_pre_hook(_refuse_to_save),
                optimizer.register_load_state_dict_pre_hook(_refuse_to_load),
            ]

    def before_update(self) -> None:
        if self._optimizer is not None:
            own: Any = self._optimizer
            self._run(chain(of_all._global_optimizer_pre_hooks.values(), own._optimizer_step_pre_hooks.values()))

    def after_update(self) -> None:
        if self._optimizer is not None:
            own: Any = self._optimizer
            self._run(chain(own._optimizer_step_post_hooks.values(), of_all._global_optimizer_post_hooks.values()))

    def close(self) -> None:
        for handle in self._own:
            handle.remove()

    def _run(self, hooks: Iterable[Hook]) -> None:
        for number, hook in enumerate(list(hooks)):
            if number == 0:
                self._mark_gradients()
            hook(self._optimizer, (self._optimizer,), {})  # type: ignore[arg-type]


def _refuse_to_save(optimizer: Optimizer) -> None:
    raise EngineError(
        f"{type(optimizer).__name__}.state_dict() would be without the state, which the engine keeps in parts over the "
        "ranks; engine.save_checkpoint() writes it, engine.get_optimizer_state(name, kind) gives one whole tensor of it"
    )


def _refuse_to_load(optimizer: Optimizer, state_dict: Any) -> None:
    raise EngineError(
        f"{type(optimizer).__name__}.load_state_dict() after initialize() would set learning rates and leave the state "
        "as it is; call it before initialize(), which takes the state over, or use engine.load_checkpoint()"
    )
