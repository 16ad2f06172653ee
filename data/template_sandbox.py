"""Jinja's sandbox as chat templates expect it, with bounds on time and memory.

A template comes with somebody's model, and its conversations from somebody's corpus: it may divide by zero, recurse,
loop without end or ask for more memory than there is. Whatever it does, :func:`render` ends.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 10.0
"""Of one rendering; processor time, so that a busy machine does not change the result."""
EXTRA_BYTES = 1 << 30
"""Address space that a rendering may take besides what the process has."""
MAX_TEXT = 64 << 20
MAX_BITS = 1 << 16


class LimitExceeded(Exception):
    """A bound on a rendering that it went beyond."""


MARKING, _BEGIN, _END = "mark_generation", "\ue002", "\ue003"
"""The variable that has generation blocks marked, and the marks: of Unicode's private use."""


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: what stands inside, between marks where :data:`MARKING` is true."""

    tags = {"generation"}  # noqa: RUF012  (as its base declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno

        def mark(text: str) -> nodes.Node:
            output = nodes.Output([nodes.TemplateData(text)])
            return nodes.If(nodes.Name(MARKING, "load"), [output], [], []).set_lineno(line, override=True)

        return [mark(_BEGIN), *parser.parse_statements(("name:endgeneration",), drop_needle=True), mark(_END)]


def cut_marks(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A text without its marks, and where each marked part starts and stops in that."""
    plain, spans = "", []
    for number, piece in enumerate(text.replace(_END, _BEGIN).split(_BEGIN)):
        if number % 2:
            spans.append((len(plain), len(plain) + len(piece)))
        plain += piece
    return plain, tuple(spans)


class _Environment(ImmutableSandboxedEnvironment):
    # Single operations that no signal interrupts, bounded beforehand.
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * abs(right) > MAX_BITS:
            raise LimitExceeded(f"a power of more than {MAX_BITS} bits")
        if operator == "*":
            if numbers and left.bit_length() + right.bit_length() > MAX_BITS:
                raise LimitExceeded(f"a product of more than {MAX_BITS} bits")
            for sequence, count in ((left, right), (right, left)):
                if (
                    isinstance(sequence, str | list | tuple)
                    and isinstance(count, int)
                    and len(sequence) * count > MAX_TEXT
                ):
                    raise LimitExceeded(f"{count} repetitions of {len(sequence)} elements")
        return super().call_binop(context, operator, left, right)


def compile_template(source: str) -> jinja2.Template:
    """The template, with the settings and helpers that ``transformers`` gives it.

    Raises:
        jinja2.TemplateError: not valid Jinja.
    """
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def render(template: jinja2.Template, **variables: Any) -> str:
    """The text of a template.

    Raises:
        LimitExceeded: too long, in time or in text.
        Exception: whatever the template does wrong, ``MemoryError`` and ``RecursionError`` included.
    """
    with bounded(CPU_SECONDS, EXTRA_BYTES):
        text = template.render(**variables)
    if len(text) > MAX_TEXT:
        raise LimitExceeded(f"it makes a text of {len(text)} characters")
    text.encode("utf-8")  # half of a surrogate pair is no text
    return text


@contextlib.contextmanager
def bounded(cpu_seconds: float, extra_bytes: int) -> Iterator[None]:
    """Bound what the body takes; where the system or the thread has no such bound, without it.

    Raises:
        LimitExceeded: in the body, after ``cpu_seconds`` of this process's time (only in its main thread).
        MemoryError: in the body, when it asks for more than ``extra_bytes``.
    """
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():

            def stop(*_: object) -> None:
                raise LimitExceeded(f"it takes more than {cpu_seconds:g} s")

            stack.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, stop))
            stack.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds, 0.5)  # again, should the first be lost in a finalizer
        with contextlib.suppress(OSError, ValueError):
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            wanted = pages * resource.getpagesize() + extra_bytes
            if all(limit == resource.RLIM_INFINITY or limit > wanted for limit in (soft, hard)):
                resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
                stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        yield


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
