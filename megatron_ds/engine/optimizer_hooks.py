"""The hooks of a user's optimizer, which torch would run in its ``step()`` and an engine, which never calls that, runs.

The optimizer's state is sharded meanwhile, and torch's ``state_dict()`` would be without it. Two hooks of the engine
refuse ``state_dict()`` and ``load_state_dict()``, and a dictionary in place of ``optimizer.state`` refuses to be read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as of_all

from megatron_ds.errors import EngineError

Hook = Callable[[Optimizer, Any, Any], Any]


class ShardedState(defaultdict[Any, Any]):
    """``optimizer.state`` while the engine has the parameters' state sharded. Other keys are kept as in any dictionary.

    ``in`` and ``get()`` find no parameter, as before an optimizer's first step, so that an optimizer can be copied.

    Raises:
        EngineError: the state of a parameter is read or set, as by a loop that drops its momentum.
    """

    def __missing__(self, key: Any) -> Any:
        _require_own_key(key)
        return super().__missing__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _require_own_key(key)
        super().__setitem__(key, value)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        _require_own_key(key)
        return super().setdefault(key, default)

    def clear(self) -> None:
        raise EngineError(_ELSEWHERE)


_ELSEWHERE = (
    "optimizer.state is without the state of parameters, which the engine keeps in parts over the ranks: to update "
    "call engine.step(), and not the optimizer's; engine.get_optimizer_state(name, kind) gives one whole tensor of it "
    "and set_optimizer_state(name, kind, value) writes one; to train on without it, call engine.close() and "
    "initialize() again"
)


def _require_own_key(key: Any) -> None:
    if isinstance(key, Tensor):
        raise EngineError(_ELSEWHERE)


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
        self._state: ShardedState | None = None
        if optimizer is not None and keeps_state:
            optimizer.state = self._state = ShardedState(dict, optimizer.state)
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

    def fault(self) -> str | None:
        """What was done to the optimizer's state, which an update would not know of; or None."""
        intact = self._state is None or (self._optimizer is not None and self._optimizer.state is self._state)
        return None if intact else _ELSEWHERE

    def close(self) -> None:
        for handle in self._own:
            handle.remove()
        if self._optimizer is not None and self._state is not None:
            self._optimizer.state = defaultdict(dict, self._state)

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
