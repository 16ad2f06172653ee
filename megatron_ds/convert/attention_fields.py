"""How rotary positions and sliding windows of a config.json are ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ds.config.schema import MOST_LAYERS
from megatron_ds.config.text import shortest
from megatron_ds.config.transformer import ROPE_SCALING
from megatron_ds.convert.settings import Settings, must_be
from megatron_ds.convert.translations import Values
from megatron_ds.errors import ConfigError

_CONTEXT = "original_max_position_embeddings"


@dataclass(frozen=True)
class Rope:
    """Rotary positions, in the words of ``transformers`` 4 and of 5.

    Attributes:
        theta: default of the base wavelength. theta_key: what older files call it.
        fraction_key: what older files call the share of a head's dims that is rotated; None: the class rotates all.
        kinds: of scaling that the class knows. older_kinds: their names in older files.
        context: ``original_max_position_embeddings`` of a class whose files have it beside the rotary settings; what
            stands there goes before what stands among them.
    """

    theta: float = 10000.0
    theta_key: str = "rope_theta"
    fraction_key: str | None = None
    fraction: float = 1.0
    kinds: tuple[str, ...] = ("linear", "dynamic", "llama3", "yarn", "longrope")
    older_kinds: Mapping[str, str] = field(default_factory=dict)
    context: int | None = None

    def read(self, config: Settings) -> dict[str, Any]:
        must_be(config, rope_interleaved=False)
        theta, fraction = config.get(self.theta_key, self.theta), self.fraction
        if self.fraction_key is None:
            must_be(config, partial_rotary_factor=1.0)
        else:
            fraction = config.get(self.fraction_key, fraction)
        newer, older = config.inner("rope_parameters"), config.inner("rope_scaling")
        found = [self.one(config, rope, theta, fraction) for rope in (older, newer) if rope is not None]
        if len(found) == 2 and found[0] != found[1]:
            raise ConfigError(
                f"config.json has rope_scaling={dict(older or {})} and rope_parameters={dict(newer or {})}, which "
                "differ; remove one of them"
            )
        # `transformers` lets rope_scaling win where a file has both.
        return found[0] if found else self._fields(config, theta, fraction, None)

    def one(self, config: Settings, rope: Settings, theta: float, fraction: float) -> dict[str, Any]:
        """Of one object of rotary settings, and the values of what it leaves out."""
        kind, older = rope.get("rope_type"), rope.get("type")
        kind = kind or older or "default"
        kind = self.older_kinds.get(kind, kind)
        theta, share = rope.get("rope_theta", theta), rope.get("partial_rotary_factor", fraction)
        if self.fraction_key is None and share != 1.0:
            raise ConfigError(f"partial_rotary_factor={share} in {rope.where} is not supported, only 1.0")
        if kind not in ("default", *self.kinds):
            known = ", ".join(map(repr, ("default", *self.kinds)))
            raise ConfigError(f"rope_type={kind!r} in {rope.where} is not supported; known: {known}")
        return self._fields(config, theta, share, None if kind == "default" else self._scaling(config, rope, kind))

    def _scaling(self, config: Settings, rope: Settings, kind: str) -> dict[str, Any]:
        needed, optional = ROPE_SCALING[kind]
        values = {name: rope.get(name) for name in (*needed, *optional)}
        if kind == "dynamic":  # the class takes the model's own
            values[_CONTEXT] = config["max_position_embeddings"]
        elif _CONTEXT in needed:
            values[_CONTEXT] = config.get(_CONTEXT, self.context) or values[_CONTEXT]
        if kind == "longrope" and values["factor"] is None and values[_CONTEXT]:
            values["factor"] = config["max_position_embeddings"] / values[_CONTEXT]
        lacking = [name for name in needed if values[name] is None]
        if lacking:
            raise ConfigError(
                f"{rope.where} has rope_type={kind!r} without {', '.join(lacking)}, and what was trained with cannot "
                "be guessed; write them into the file, as the model's authors give them"
            )
        given = {name: value for name, value in values.items() if value is not None}
        return given if kind == "llama3" else {"rope_type": kind, **given}

    def _fields(self, config: Settings, theta: float, fraction: float, scaling: Any) -> dict[str, Any]:
        fields = {"position": "rope", "rope_theta": float(theta), "rope_scaling": scaling}
        if fraction == 1.0:
            return fields
        size = dict.get(config, "head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return {**fields, "rotary_dim": int(size * fraction)}

    def write(self, model: Values) -> dict[str, Any]:
        scaling = model["rope_scaling"] or {}
        parameters: dict[str, Any] = {
            "rope_type": scaling.get("rope_type", "llama3" if scaling else "default"),
            **scaling,
        }
        if parameters["rope_type"] == "dynamic":
            del parameters[_CONTEXT]
        fraction = {}
        if self.fraction_key is not None:
            share = _share(model["rotary_dim"], model["head_dim"])
            fraction, parameters["partial_rotary_factor"] = {self.fraction_key: share}, share
        written = {
            self.theta_key: model["rope_theta"],
            "rope_scaling": dict(parameters) if scaling else None,
            "rope_parameters": {**parameters, "rope_theta": model["rope_theta"]},
            **fraction,
        }
        if parameters["rope_type"] == "dynamic":
            written["max_position_embeddings"] = scaling[_CONTEXT]
        elif self.context is not None and _CONTEXT in scaling:
            written[_CONTEXT] = scaling[_CONTEXT]
        return written


def _share(part: int, whole: int) -> float:
    """The number whose product with ``whole`` is ``part`` when it is rounded down."""
    share = part / whole
    while int(whole * share) < part:
        share = math.nextafter(share, 2.0)
    return share


def _layers(config: Settings) -> int:
    """Before a list of so many is made."""
    layers = config["num_hidden_layers"]
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise ConfigError(f"num_hidden_layers={layers!r} in {config.where} should be 1 to {MOST_LAYERS}")
    return layers


@dataclass(frozen=True)
class LayerTypes:
    """The sliding windows of some of the layers: ``layer_types``, or a number in older files.

    Attributes:
        pattern: the layers of a class whose files say nothing, repeated. every: a key of older files: how many layers
            a repetition has, of which one sees all.
        size: the window's default. full_first: that layer is the first of a repetition.
    """

    pattern: tuple[str, ...]
    size: int
    every: str | None = None
    full_first: bool = False

    def read(self, config: Settings) -> dict[str, Any]:
        layers = _layers(config)
        pattern, every = self.pattern, config.get(self.every) if self.every else None
        if every is not None:
            local = ("window",) * (every - 1)
            pattern = ("full", *local) if self.full_first else (*local, "full")
        types = config.get("layer_types")
        kinds = [pattern[i % len(pattern)] for i in range(layers)] if types is None else [self._kind(t) for t in types]
        if len(kinds) != layers:
            raise ConfigError(f"layer_types in {config.where} has {len(kinds)} entries for {layers} layers")
        size = self.window(config)
        if size is None or "window" not in kinds:
            return {"window": None}
        return {"window": size, "attention_pattern": shortest(kinds)}

    def _kind(self, theirs: str) -> str:
        kinds = {"sliding_attention": "window", "full_attention": "full"}
        if theirs not in kinds:
            raise ConfigError(f"layer_types has {theirs!r}, which is not supported; known: {', '.join(kinds)}")
        return kinds[theirs]

    def window(self, config: Settings) -> int | None:
        value: int | None = config.get("sliding_window", self.size)
        return value

    def write(self, model: Values) -> dict[str, Any]:
        kinds = {"window": "sliding_attention", "full": "full_attention"}
        return {
            "layer_types": [kinds[kind] for kind in _every_layer(model)],
            "sliding_window": self.size if model["window"] is None else model["window"],
        }


def _every_layer(model: Values) -> list[str]:
    pattern = model["attention_pattern"]
    return [pattern[i % len(pattern)] for i in range(model["num_layers"])]


class QwenWindows(LayerTypes):
    """Qwen: layers from ``max_window_layers`` on, where ``use_sliding_window`` says so."""

    def read(self, config: Settings) -> dict[str, Any]:
        must_be(config, use_mrope=False)
        first, layers = config.get("max_window_layers", 28), _layers(config)
        pattern = tuple("window" if i >= first else "full" for i in range(layers))
        return (
            LayerTypes(pattern, self.size).read(config)
            if config.get("use_sliding_window", False)
            else self._none(config)
        )

    def _none(self, config: Settings) -> dict[str, Any]:
        if "sliding_attention" in config.get("layer_types", ()):
            raise ConfigError(
                f"layer_types has 'sliding_attention' and use_sliding_window is false in {config.where}; one of them "
                "is wrong: set use_sliding_window to true, or the layers to 'full_attention'"
            )
        config.get("sliding_window")
        return {"window": None}

    def write(self, model: Values) -> dict[str, Any]:
        written = super().write(model)
        used = model["window"] is not None
        first = next((i for i, kind in enumerate(_every_layer(model)) if kind == "window"), 0)
        if not used:
            del written["sliding_window"]
        return {**written, "use_sliding_window": used, **({"max_window_layers": first} if used else {})}


class ModernBertWindows(LayerTypes):
    """ModernBERT counts the window's both sides together."""

    def window(self, config: Settings) -> int | None:
        return int(config.get("local_attention", self.size)) // 2 + 1

    def write(self, model: Values) -> dict[str, Any]:
        written = super().write(model)
        del written["sliding_window"]
        size = self.size if model["window"] is None else 2 * (model["window"] - 1)
        return {**written, "local_attention": size}


@dataclass(frozen=True)
class RopeOfLayers:
    """Rotary positions of a base wavelength for layers with a window and another for those without.

    Attributes:
        full, local: what older files call them; ``thetas``: their defaults. windows: which layers those are.
    """

    full: str
    local: str
    thetas: tuple[float, float]
    windows: LayerTypes
    rope: Rope = field(default_factory=lambda: Rope(kinds=("linear", "llama3", "yarn")))

    def read(self, config: Settings) -> dict[str, Any]:
        thetas = config.get(self.full, self.thetas[0]), config.get(self.local, self.thetas[1])
        both, scaling = config.inner("rope_parameters"), config.inner("rope_scaling")
        full = None if both is None else both.inner("full_attention")
        local = None if both is None else both.inner("sliding_attention")
        given = scaling or full
        fields = self.rope._fields(config, thetas[0], 1.0, None)
        if full is not None:
            fields = self.rope.one(config, full, thetas[0], 1.0)
        if scaling is not None and given is not full:
            fields = self.rope.one(config, scaling, fields["rope_theta"], 1.0)
        of_window = float(thetas[1])
        if local is not None:
            found = self.rope.one(config, local, thetas[1], 1.0)
            of_window = found["rope_theta"]
            if found["rope_scaling"]:
                raise ConfigError(f"rotary scaling of layers with a window ({local.where}) is not supported; remove it")
        if self.windows.read(config)["window"] is not None:
            fields["window_rope_theta"] = of_window
        return fields

    def write(self, model: Values) -> dict[str, Any]:
        one = self.rope.write(model)
        local = model["window_rope_theta"] or (model["rope_theta"] if model["window"] else self.thetas[1])
        return {
            self.full: model["rope_theta"],
            self.local: local,
            "rope_scaling": one["rope_scaling"],
            "rope_parameters": {
                "full_attention": one["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }
